"""The results file: test_results_fast_500k_YYYYMMDD_HHMMSS.json (schema: docs/TESTS.md)."""

from __future__ import annotations

import os
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from dsfast.files import os_errors_as, write_json

SCHEMA_VERSION = 1


def write_results(folder: Path, results: dict[str, Any], now: datetime) -> Path:
    """Write `results` into `folder`, all at once, and return the path. Numbers that are not finite become null.

    Where a file of this second exists, the next free second is taken: nothing is overwritten. Raises UserError.
    """
    whole = folder / f".test_results_fast_500k_{os.getpid()}.json"
    with os_errors_as(f"{folder}: the results cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(whole, results)
        try:
            return _named(whole, folder, now)
        finally:
            whole.unlink(missing_ok=True)


def _named(whole: Path, folder: Path, now: datetime) -> Path:
    path = _claim(folder, now)
    try:
        os.replace(whole, path)
    except OSError:
        path.unlink(missing_ok=True)
        raise
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
