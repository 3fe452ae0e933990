"""What the GPU can do at best, measured in the run whose figures are held against it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from dsfast.bench.cases import Work
from dsfast.bench.timing import repeat

COPY_BYTES = 2**30
SIZE = 8192  # rows and columns of the product
CALLS = 10
BUDGET = 2.0  # seconds of each bound
RATES = {torch.bfloat16: "bfloat16", torch.float16: "bfloat16", torch.float32: "float32"}


@dataclass(frozen=True)
class Bounds:
    """Bytes per second, read plus written, of Tensor.copy_; FLOP/s of torch.mm at `size` (tf32: of float32 operands)."""

    bandwidth: float
    bfloat16: float
    tf32: float
    float32: float
    size: int

    def ideal_seconds(self, work: Work, dtype: torch.dtype) -> float:
        """The shortest time for `work` in `dtype`: what computing takes, or what moving takes."""
        return max(work.flops / getattr(self, RATES[dtype]), work.bytes_of(dtype.itemsize) / self.bandwidth)


def measure_bounds(clock: Any, device: str, copy_bytes: int = COPY_BYTES, size: int = SIZE) -> dict[str, float]:
    """The fields of Bounds, each the best of CALLS calls."""
    source = torch.ones(copy_bytes // 4, device=device)
    bandwidth = 2 * copy_bytes / _best(clock, partial(torch.empty_like(source).copy_, source))
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    flops = 2 * size**3
    before = torch.get_float32_matmul_precision()
    rates = {}
    try:
        for name, precision, x, y in (
            ("bfloat16", before, a.bfloat16(), b.bfloat16()),
            ("tf32", "high", a, b),
            ("float32", "highest", a, b),
        ):
            torch.set_float32_matmul_precision(precision)
            rates[name] = flops / _best(clock, partial(torch.mm, x, y))
    finally:
        torch.set_float32_matmul_precision(before)
    return asdict(Bounds(bandwidth, **rates, size=size))


def _best(clock: Any, call) -> float:
    call()
    return min(taken for (taken,) in repeat((call,), CALLS, BUDGET, clock.seconds))
