"""Files that commands write: tried out before the work begins, then written whole or not at all; and where caches are."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsfast.errors import UserError


@contextmanager
def os_errors_as(message: str, *others: type[Exception]) -> Iterator[None]:
    """Inside, an OSError or one of `others` becomes a UserError: `message`, a colon and the reason."""
    try:
        yield
    except (OSError, *others) as error:
        raise UserError(f"{message}: {getattr(error, 'strerror', None) or error}") from None


def check_output_file(path: str, argument: str) -> Path:
    """`path`, given as `argument`, as a Path. Raises UserError where a file could not be written there."""
    target = Path(path)
    with os_errors_as(f"{argument} {path}: cannot be written"):
        if target.is_dir():
            raise UserError(f"{argument} {path}: expected a file, this is a folder")
        with tempfile.TemporaryFile(dir=target.parent):
            pass
        if target.is_file():
            target.open("ab").close()
    return target


def check_output_folder(path: str, argument: str) -> Path:
    """`path` as a Path, tried out and left as it was. Raises UserError where nothing could be written into it."""
    folder = Path(path)
    absent = [p for p in (folder, *folder.parents) if not os.path.exists(p)]
    with os_errors_as(f"{argument} {path}: cannot be written to"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for created in absent:
            created.rmdir()
    return folder


def cache_folder() -> Path:
    """Where dsfast keeps what it need not make again: $DSFAST_CACHE, else $XDG_CACHE_HOME/dsfast, else ~/.cache/dsfast."""
    if folder := os.environ.get("DSFAST_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsfast"


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none, in UTF-8. Raises OSError.

    What UTF-8 cannot hold, such as a file name in another encoding, is written as \\udcXX: in JSON the right escape.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of `value` as JSON, with null for numbers that are not finite."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """`value` with None in place of inf and nan, for which JSON has no word, in dicts, lists and tuples too."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
