"""What this machine can do at best, measured in the run whose figures are held against it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsfast.bench.timing import seconds

MATRIX = 2048  # rows and columns: large enough for any blocking, small enough for a second
COPY_BYTES = 2**28  # many times any cache


@dataclass(frozen=True)
class Ceilings:
    """Floating point operations per second of torch.mm, and bytes per second, read plus written, of Tensor.copy_."""

    float32: float
    bfloat16: float
    bandwidth: float

    def ideal_seconds(self, flops: int, bytes_moved: int) -> float:
        """The shortest time for this float32 work: what computing takes, or what moving takes."""
        return max(flops / self.float32, bytes_moved / self.bandwidth)


def measure_ceilings(repeats: int) -> Ceilings:
    """The best of `repeats` calls each: a ceiling is what was reached, not what is usual."""
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    copying = _best(lambda: target.copy_(source), repeats)
    return Ceilings(_matrix(torch.float32, repeats), _matrix(torch.bfloat16, repeats), 2 * COPY_BYTES / copying)


def _matrix(dtype: torch.dtype, repeats: int) -> float:
    a, b = (torch.randn(MATRIX, MATRIX).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * MATRIX**3 / _best(lambda: torch.mm(a, b, out=out), repeats)


def _best(call, repeats: int) -> float:
    call()
    return min(seconds(call) for _ in range(repeats))
