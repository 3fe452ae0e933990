"""What this machine can do at best, measured in the run whose figures are held against it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from dsfast.bench.timing import Call, repeat

SIZES = (256, 512, 1024, 2048)  # rows and columns; the last is large enough for any blocking
LONG_ENOUGH = 0.1  # seconds of a product that is large enough, whatever its size
COPY_BYTES = 2**28  # many times any cache
CALLS = 10
BUDGET = 3.0  # seconds after which a ceiling is taken from fewer calls


@dataclass(frozen=True)
class Ceilings:
    """Floating point operations per second of torch.mm, and bytes per second, read plus written, of Tensor.copy_.

    float32_size, bfloat16_size: rows and columns of the product that was timed.
    """

    float32: float
    bfloat16: float
    bandwidth: float
    float32_size: int
    bfloat16_size: int

    def ideal_seconds(self, flops: int, bytes_moved: int, dtype: torch.dtype = torch.float32) -> float:
        """The shortest time for this work, products in float32 or bfloat16: what computing takes, or what moving takes."""
        rate = self.bfloat16 if dtype == torch.bfloat16 else self.float32
        return max(flops / rate, bytes_moved / self.bandwidth)


def measure_ceilings() -> Ceilings:
    """The best of CALLS calls each, of fewer where they are slow: a ceiling is what was reached, not what is usual."""
    bandwidth = measure_bandwidth()
    float32, float32_size = _matrix(torch.float32)
    bfloat16, bfloat16_size = _matrix(torch.bfloat16)
    return Ceilings(float32, bfloat16, bandwidth, float32_size, bfloat16_size)


def measure_bandwidth() -> float:
    """Bytes per second as in Ceilings, the best of CALLS."""
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _best(partial(target.copy_, source))


def _matrix(dtype: torch.dtype) -> tuple[float, int]:
    """(operations per second, size) of the largest product of SIZES, or the first that takes LONG_ENOUGH.

    Without instructions for bfloat16 the last takes up to a minute a call, and its rate is no better than a small one's.
    """
    for size in SIZES:
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        multiply = partial(torch.mm, a, b, out=torch.empty_like(a))
        if _best(multiply, calls=2) >= LONG_ENOUGH:
            break
    return 2 * size**3 / _best(multiply), size


def _best(call: Call, calls: int = CALLS) -> float:
    return min(repeat([call], calls, BUDGET))[0]
