"""`python -m dsfast.train --config FILE --output-dir DIR [--seed N] [--steps N] [--resume [DIR]]`."""

from __future__ import annotations

import sys
import warnings
from math import isfinite
from pathlib import Path

from dsfast.command import CommandParser, run_command, whole_number
from dsfast.config import Config, load_config
from dsfast.errors import UserError
from dsfast.files import check_output_folder
from dsfast.train.checkpoint import find_checkpoint
from dsfast.train.loop import Trainer, TrainingError, TrainResult
from dsfast.train.run_folder import expect_utf8

FEW = 0.6
"""Where a router uses less than this part of its experts, tokens meet nearly the same ones: of two, one has nine in ten."""


def main(argv: list[str]) -> int:
    """Train; returns 0. Raises UserError, also where in the end nothing was learnt, and Interrupted after Ctrl-C, SIGTERM or
    SIGHUP (exit code 130, 143, 129)."""
    arguments = _parser().parse_args(argv)
    resume = arguments.output_dir if arguments.resume is True else arguments.resume
    resume = resume and find_checkpoint(resume)
    config = _config(arguments.config, resume, {"seed": arguments.seed, "train.steps": arguments.steps})
    expect_utf8(check_output_folder(arguments.output_dir, "--output-dir"))
    result = Trainer(config, arguments.output_dir).train(resume)
    print(_summary(result, config.model.n_routed_experts))
    if result.skipped_steps == len(result.losses) or not isfinite(result.final_loss):
        raise TrainingError(
            f"nothing was learnt: {result.skipped_steps} of {len(result.losses)} steps were skipped, their loss or gradients not"
            f" finite, the last loss is {result.final_loss:.4f}; a smaller train.learning_rate may help"
        )
    _warn_of_unused(result.experts_used, config)
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m dsfast.train", description="Train a model from a config.")
    parser.add_path("--config", metavar="FILE", help="what to train; with --resume the checkpoint's own if absent")
    parser.add_path("--output-dir", metavar="DIR", required=True, help="new or empty; with --resume the run's own")
    parser.add_argument("--seed", metavar="N", type=whole_number, help="in place of the config's")
    parser.add_argument("--steps", metavar="N", type=whole_number, help="in place of the config's train.steps")
    parser.add_path(
        "--resume", metavar="DIR", nargs="?", const=True,
        help="continue from a checkpoint, or from the newest in a run folder (default: --output-dir)",
    )  # fmt: skip
    return parser


def _config(path: str | None, resume: Path | None, changes: dict[str, int | None]) -> Config:
    if path is None and resume is None:
        raise UserError("python -m dsfast.train: expected --config FILE, or --resume to take a checkpoint's own")
    path = path if path is not None else resume / "config.json"
    given = {name: value for name, value in changes.items() if value is not None}
    flags = " and ".join(f"--{name.removeprefix('train.')}" for name in given)
    return load_config(path).replace(where=f"{path} with {flags}" if flags else str(path), **given)


def _summary(result: TrainResult, experts: int) -> str:
    skipped = f", {result.skipped_steps} steps skipped" if result.skipped_steps else ""
    prepared = result.preparation_seconds
    before = "" if prepared is None else f" after {prepared:.1f} s of preparation"
    each = ", ".join(f"{used:.1f}" for used in result.experts_used)
    used = f", experts used {each} of {experts}" if each else ""
    return (
        f"trained to step {result.steps} in {result.seconds:.1f} s{before}: loss {result.final_loss:.4f}, "
        f"{result.tokens_per_second:,.0f} tokens/s, peak memory {result.peak_memory_bytes / 2**20:,.0f} MiB{used}{skipped}; "
        f"checkpoint {result.checkpoint}"
    )


def _warn_of_unused(used: list[float], config: Config) -> None:
    experts, speed = config.model.n_routed_experts, config.train.bias_update_speed
    if used and min(used) < FEW * experts:
        warnings.warn(
            f"the last step's tokens met {experts} experts as unevenly as if there were {min(used):.1f} (1 / the sum of squared"
            f" shares); a train.bias_update_speed above {speed:g} evens that out sooner",
            stacklevel=2,
        )


if __name__ == "__main__":
    sys.exit(run_command(main))
