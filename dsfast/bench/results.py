"""The file that `--json` writes: every figure, with what is needed to judge it (described in benchmarks/README.md)."""

from __future__ import annotations

import json
import os
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dsfast import info, ops
from dsfast.errors import UserError

SCHEMA_VERSION = 1


def check_writable(path: str) -> Path:
    """`path` as a Path. Raises UserError, before anything is timed, where a file could not be written there."""
    target = Path(path)
    try:
        if target.is_dir():
            raise UserError(f"--json {path}: expected a file, this is a folder")
        with tempfile.TemporaryFile(dir=target.parent):
            pass
        if target.exists() and not os.access(target, os.W_OK):
            raise UserError(f"--json {path}: cannot be written: permission denied")
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written: {error.strerror}") from None
    return target


def document(arguments: list[str], settings: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """What is written: schema_version, created, command, settings, machine, versions, commit, native, operators, results.

    machine says processor, cores, memory and thread count; native the instruction set that runs; operators and
    fallbacks what dsfast's operators took.
    """
    facts = info.collect()
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": ["python", "-m", "dsfast.bench", *arguments],
        "settings": settings,
        **facts,
        "fallbacks": ops.fallbacks(),
        "results": results,
    }


def write(path: Path, values: dict[str, Any]) -> None:
    """Write the whole file or none. Raises UserError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)
