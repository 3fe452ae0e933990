"""The folder of a run: config.json, metrics.jsonl, checkpoints; and the rules for starting or continuing in one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsfast.config import Config, load_config
from dsfast.errors import UserError
from dsfast.files import expect_possible_name, for_one_run, os_errors_as, write_json
from dsfast.train.checkpoint import checkpoint_step, checkpoints, read_manifest

METRICS, CONFIG = "metrics.jsonl", "config.json"
RUN_FILES = (METRICS, CONFIG)
"""What a run writes beside its checkpoints."""


def expect_utf8(folder: Path) -> None:
    """Raise UserError for a folder from which no checkpoint could be read again, or that cannot be."""
    expect_possible_name(folder)
    with os_errors_as(f"{folder}: cannot be used as output folder", RuntimeError):  # RuntimeError: a loop of links
        try:
            os.fsencode(folder.resolve()).decode()
        except UnicodeDecodeError:
            raise UserError(
                f"{folder}: expected a name in UTF-8; safetensors reads no checkpoint from another one"
            ) from None


@contextmanager
def run_folder(folder: Path, config: Config, step: int, resumed: Path | None) -> Iterator[None]:
    """Create `folder` where it is absent and write config.json into it; inside, no other run may.

    `step` steps are done; `resumed` is the checkpoint they were read from. Raises UserError when the folder cannot be
    written, or is another run's at the time, when it is not empty and the checkpoint is not in it, or when it holds checkpoints
    of later steps, complete or not, which this run would come to write again.
    """
    expect_utf8(folder)
    with os_errors_as(f"{folder}: cannot be used as output folder"):
        folder.mkdir(parents=True, exist_ok=True)
    with for_one_run(folder):
        _begin(folder, config, step, resumed)
        yield


def _begin(folder: Path, config: Config, step: int, resumed: Path | None) -> None:
    with os_errors_as(f"{folder}: cannot be used as output folder"):
        found = sorted(path.name for path in folder.iterdir())
        own = resumed is not None and resumed.parent.resolve() == folder.resolve()
        if found and not own:
            raise UserError(
                f"{folder}: expected a new or empty folder, found {found[0]!r} in it; or resume its own run"
            )
        for leftover in folder.glob(".*.partial"):  # of a run that was killed while it wrote
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        later = [path.name for path in checkpoints(folder) if checkpoint_step(path) > step]
        if later:
            raise UserError(
                f"{folder}: holds {later[-1]}, later than step {step} to resume from; "
                f"expected another output folder, or later checkpoints removed"
            )
        write_json(folder / CONFIG, config.to_dict())


def check_same_run(checkpoint: Path, config: Config, data_manifest: dict[str, Any]) -> None:
    """Raise UserError when `config` or the data differ from the checkpoint's in what a resumed run cannot change.

    That is the model, the seed, the batch size, the optimizer, and the data wherever they were read from.
    """
    saved = load_config(checkpoint / "config.json")
    train, data = saved.train, read_manifest(checkpoint)["data"]
    pairs = [
        ("seed", saved.seed, config.seed),
        ("train.batch_size", train.batch_size, config.train.batch_size),
        ("train.optimizer", train.optimizer, config.train.optimizer),
        *((f"model.{name}", value, getattr(config.model, name)) for name, value in vars(saved.model).items()),
        *((f"data: {name}", data.get(name), value) for name, value in data_manifest.items() if name != "source"),
    ]
    for name, before, now in pairs:
        if before != now:
            raise UserError(f"{checkpoint}: cannot be resumed: {name} was {before!r} there and is {now!r} in this run")
