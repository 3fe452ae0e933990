"""python -m dsfast.export --checkpoint DIR --to huggingface OUT: a checkpoint in a layout that others read."""

from __future__ import annotations

import sys

from dsfast.command import CommandParser, run_command
from dsfast.model import export_huggingface
from dsfast.train.checkpoint import load_checkpoint


def main(argv: list[str]) -> int:
    """Export as `argv` says; raises UserError for a mistake in the input."""
    parser = CommandParser(
        prog="python -m dsfast.export", description="Write a checkpoint in a layout that others read."
    )
    parser.add_path("--checkpoint", metavar="DIR", required=True, help="a checkpoint, or a run folder (its newest)")
    parser.add_argument("--to", choices=["huggingface"], required=True, help="huggingface: for transformers and vLLM")
    parser.add_path("out", metavar="OUT", help="the folder to write; new or empty")
    arguments = parser.parse_args(argv)
    model, tokenizer, _ = load_checkpoint(arguments.checkpoint)
    export_huggingface(model, tokenizer, arguments.out)
    print(f"written: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
