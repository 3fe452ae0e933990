"""The compiled CPU kernels: loading them, and noticing when they are missing or older than their sources."""

from __future__ import annotations

import functools
import os
import runpy
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401  (first, so that the module shares torch's OpenMP runtime)

from dsfast.errors import UserError

SOURCES = Path(__file__).parents[2] / "csrc"
REBUILD = "run `make build`, or `pip install -e .` with a C++17 compiler"


def source_hash() -> str | None:
    """The hash of csrc/ as it is now; None where only the built package is installed."""
    script = SOURCES / "source_hash.py"
    return runpy.run_path(str(script))["source_hash"](SOURCES) if script.exists() else None


@functools.cache
def status() -> tuple[ModuleType | None, str]:
    """The module, or None and the reason. A build older than its sources counts as missing: it would not be what is read."""
    try:
        from dsfast import _native
    except ImportError as error:
        if "DSFAST_ISA" in str(error):  # a wrong wish, not a missing build
            raise UserError(str(error)) from None
        return _unavailable(f"dsfast._native is not built ({error}); {REBUILD}")
    expected = source_hash()
    if expected is not None and _native.source_hash != expected:
        return _unavailable(f"dsfast._native was built from other sources than csrc/ holds now; {REBUILD}")
    return _native, f"compiled for {_native.isa}"


def _unavailable(reason: str) -> tuple[None, str]:
    if os.environ.get("DSFAST_REQUIRE_NATIVE") == "1":
        raise UserError(f"{reason} (DSFAST_REQUIRE_NATIVE=1 forbids going on without)")
    return None, reason


def module() -> ModuleType:
    """The module, for code that runs only after `status` said it is there."""
    native, reason = status()
    if native is None:
        raise UserError(reason)
    return native
