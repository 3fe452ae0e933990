"""`python -m dsfast.evaluate --checkpoint DIR`: put the prompts to a checkpoint and score its answers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from dsfast.command import CommandParser, run_command
from dsfast.config import Config
from dsfast.data import load_facts, load_prompts, taught_facts
from dsfast.data.sources import ENCYCLOPEDIA
from dsfast.errors import UserError
from dsfast.evaluate.probes import ask, check_lengths
from dsfast.evaluate.recall import as_json, check_taught, measure_taught
from dsfast.files import check_output_file, os_errors_as, write_json
from dsfast.train import load_checkpoint
from dsfast.train.checkpoint import checkpoints, is_checkpoint
from dsfast.train.run_folder import RUN_FILES
from dsfast.train.runtime import answering


def main(argv: list[str]) -> int:
    """Print the answers and the recall; with --json also write them. Raises UserError for bad input."""
    arguments = _parser().parse_args(argv)
    prompts = load_prompts(arguments.prompts)
    path = check_output_file(arguments.json, "--json") if arguments.json else None
    if path is not None:
        _check_not_a_runs_own(path, arguments.prompts)
    model, tokenizer, config = load_checkpoint(arguments.checkpoint)
    asked = [*prompts.fast, *prompts.full]
    check_lengths(tokenizer, asked, config.model.max_position_embeddings)
    taught = _taught(config)
    check_taught(tokenizer, taught, config.model.max_position_embeddings)
    with answering(model, config, arguments.device):
        probes = ask(model, tokenizer, asked, config.suite.max_new_tokens)
        recall = measure_taught(model, tokenizer, taught)
    result = {
        "checkpoint": str(arguments.checkpoint),
        "config_sha256": config.hash(),
        "probes": [probe.to_dict() for probe in probes],
        "exact": sum(probe.exact for probe in probes),
        "recall": as_json(recall),
    }
    print(_text(result))
    if path is not None:
        with os_errors_as(f"--json {path}: cannot be written"):
            write_json(path, result)
    return 0


def _check_not_a_runs_own(path: Path, prompts: str | None) -> None:
    """Raise UserError where the results would take the place of what was read, or of what a run has written."""
    if is_checkpoint(path.parent):
        raise UserError(f"--json {path}: expected a file that is not in a checkpoint")
    if path.name in RUN_FILES and checkpoints(path.parent):
        raise UserError(f"--json {path}: expected another file than the run's own")
    if prompts is not None and path.exists() and path.samefile(prompts):
        raise UserError(f"--json {path}: expected another file than the prompts")


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m dsfast.evaluate", description=__doc__)
    parser.add_path("--checkpoint", required=True, metavar="DIR", help="a checkpoint, or a run folder (its newest)")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: the one it was trained on, where that is here"
    )
    parser.add_path("--prompts", metavar="FILE", help="prompts of your own (format: docs/TESTS.md)")
    parser.add_path("--json", metavar="FILE", help="write the results here too")
    return parser


def _taught(config: Config) -> list:
    """The facts the checkpoint's run was taught; none where it read a text of the user's."""
    return taught_facts(load_facts(), config.data.facts) if config.data.source == ENCYCLOPEDIA else []


def _text(result: dict[str, Any]) -> str:
    lines = [
        f"{'exact' if p['exact'] else 'wrong':<6} {100 * p['similarity']['combined']:5.1f}%  "
        f"{p['prompt']} -> {p['generated'].strip()!r} (expected {p['expected']!r})"
        for p in result["probes"]
    ]
    lines.append(f"\nexact answers: {result['exact']} of {len(result['probes'])}")
    for name, recall in result["recall"].items():
        if recall is None:
            lines.append(f"recall, {name} phrasings: none (the model read a text of your own)")
        else:
            numbers = f"{recall['correct']} of {recall['asked']}, {100 * recall['fraction']:.1f}%"
            lines.append(
                f"recall, {name} phrasings: {numbers} (95%: {100 * recall['low']:.1f}-{100 * recall['high']:.1f}%)"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
