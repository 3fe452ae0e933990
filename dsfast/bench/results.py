"""The file that `--json` writes: every figure, with what is needed to judge it (described in benchmarks/README.md)."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from dsfast import info, ops

SCHEMA_VERSION = 1


def document(arguments: list[str], settings: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """What is written: schema_version, created, command, settings, what `info.collect` says, fallbacks and results.

    Of that, machine has processor, cores, memory and thread count, native the instruction set that runs, caches their folders;
    operators and fallbacks say what dsfast's operators took.
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
