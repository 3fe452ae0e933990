"""`python -m dsfast.generate --checkpoint DIR --prompt "..."`: continue a prompt."""

from __future__ import annotations

import sys

from dsfast.command import CommandParser, number, run_command, whole_number
from dsfast.generate import generate
from dsfast.train import load_checkpoint
from dsfast.train.runtime import answering


def main(argv: list[str]) -> int:
    """Print the prompt and its continuation. Raises UserError for bad input."""
    arguments = _parser().parse_args(argv)
    model, tokenizer, config = load_checkpoint(arguments.checkpoint)
    length = config.suite.max_new_tokens if arguments.max_new_tokens is None else arguments.max_new_tokens
    with answering(model, config, arguments.device):
        text = generate(model, tokenizer, arguments.prompt, length, arguments.temperature, arguments.seed)
    print(arguments.prompt + text)
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m dsfast.generate", description="Continue a prompt with a checkpoint.")
    parser.add_path("--checkpoint", required=True, metavar="DIR", help="a checkpoint, or a run folder (its newest)")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: the one it was trained on, where that is here"
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument(
        "--max-new-tokens",
        type=whole_number,
        metavar="N",
        help="default: the config's suite.max_new_tokens; fewer where prompt and answer fill max_position_embeddings",
    )
    parser.add_argument("--temperature", type=number, default=0.0, metavar="X", help="0, the default, is greedy")
    parser.add_argument(
        "--seed", type=whole_number, default=0, metavar="N", help="of the sampling, above temperature 0"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
