"""The compiled CPU kernels: loading them, and noticing when they are missing or older than their sources."""

from __future__ import annotations

import functools
import importlib.util
import os
import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType

import torch  # first, so that the module shares torch's OpenMP runtime

from dsfast.errors import UserError

SOURCES = Path(__file__).parents[2] / "csrc"
REBUILD = "run `make build`, or `pip install -e .` with a C++17 compiler"


def source_hash(sources: Path = SOURCES) -> str | None:
    """The hash of a folder csrc/ as it is now; None where it is not there, as where only the built package is installed."""
    script = sources / "source_hash.py"
    return runpy.run_path(str(script))["source_hash"](sources) if script.exists() else None


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


def built() -> bool:
    """Whether there is a module, of whatever sources."""
    return importlib.util.find_spec("dsfast._native") is not None


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


OF_PRODUCTS = (
    "embedding", "mla_attention", "moe_experts", "swiglu_mlp", "linear_cross_entropy", "muon", "newton_schulz",
)  # fmt: skip
"""The operators that are made of matrix products."""
_products: ContextVar[torch.dtype] = ContextVar("dsfast_products", default=torch.float32)


@contextmanager
def products_in(dtype: torch.dtype) -> Iterator[None]:
    """float32, or bfloat16: inside the block the kernels round what their matrix products multiply to bfloat16.

    Sums and all tensors stay float32, and so do the router's scores and PyTorch's own linear layers between the operators.
    Where the processor has no instruction for it the rounding is emulated, and slower than float32. Raises UserError where
    even that is not there (it takes AVX2), ValueError for another dtype.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"products_in: dtype must be float32 or bfloat16, got {dtype}")
    if dtype == torch.bfloat16 and not hasattr(module(), "bfloat16"):
        raise UserError(f"bfloat16 on the CPU takes AVX2 at least; the kernels here run as {module().isa}")
    token = _products.set(dtype)
    try:
        yield
    finally:
        _products.reset(token)


def fast_bfloat16() -> bool:
    """Whether bfloat16 products take less time here than float32 ones: on AMD's processors with an instruction for them, which
    does twice the work of an FMA. Intel's does the same work in twice the time."""
    return bool(getattr(status()[0], "fast_bfloat16", False))


def how(operator: str) -> str:
    """What the kernel of `operator` is compiled for, and what its products multiply where that is not float32."""
    rounded = _products.get() == torch.bfloat16 and operator in OF_PRODUCTS
    return status()[1] + (", products of bfloat16" if rounded else "")


def products() -> ModuleType:
    """`module`, or where `products_in` says so its part with bfloat16 products: for kernels made of matrix products."""
    return module().bfloat16 if _products.get() == torch.bfloat16 else module()
