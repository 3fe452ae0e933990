"""The results file: test_results_fast_500k_YYYYMMDD_HHMMSS.json (schema: docs/TESTS.md)."""

from __future__ import annotations

import json
import math
import os
import tempfile
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from dsfast.errors import UserError

SCHEMA_VERSION = 1


def check_output_dir(folder: str) -> Path:
    """The folder as a Path, tried out and left as it was. Raises UserError where nothing could be written to it."""
    if not folder.strip():
        raise UserError("--output-dir: expected a folder, got an empty name")
    path = Path(folder)
    absent = [p for p in (path, *path.parents) if not p.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
        for created in absent:
            created.rmdir()
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot be written to: {error.strerror}") from None
    return path


def write_results(folder: Path, results: dict[str, Any], now: datetime) -> Path:
    """Write `results` into `folder`, all at once, and return the path. Numbers that are not finite become null.

    Where a file of this second exists, the next free second is taken: nothing is overwritten. Raises UserError.
    """
    text = json.dumps(_finite(results), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    partial = folder / f".test_results_fast_500k_{os.getpid()}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        path = _claim(folder, now)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{folder}: the results cannot be written: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)
    return path


def _claim(folder: Path, now: datetime) -> Path:
    """Create the first free file name at or after `now`, empty, so that no other process takes it."""
    while True:
        path = folder / f"test_results_fast_500k_{now:%Y%m%d_%H%M%S}.json"
        try:
            path.touch(exist_ok=False)
            return path
        except FileExistsError:
            now += timedelta(seconds=1)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
