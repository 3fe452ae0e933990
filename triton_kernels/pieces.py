"""Pieces that kernels of several operators are made of."""

from __future__ import annotations

import triton
import triton.language as tl
from dsfast.triton_kernels.launch import Launch
from torch import Tensor

PROGRAMS = 528  # at most, that a launch is split into where its tiles are fewer: 4 for each of 132 processors
_SUMMED = (16, 64)  # parts and elements in a step of sum_kernel


def options(warps: int, stages: int = 1) -> dict[str, int | bool]:
    """The compiler's; fused multiply-add is the default up to triton 3.9 and is to be switched off after it."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def splits(tiles: int, steps: int) -> tuple[int, int]:
    """(number of splits, steps of each) of a loop of `steps`, so that `tiles` programs become up to PROGRAMS; none is empty.

    It depends on the sizes alone and not on the chip, so that the sums are the same bits everywhere.
    """
    per = triton.cdiv(steps, min(steps, max(1, PROGRAMS // tiles)))
    return triton.cdiv(steps, per), per


@triton.jit
def place(A, B, G: tl.constexpr):
    """(a, b) of this program, a in 0 .. A - 1 and b in 0 .. B - 1: all b for G neighbouring a, these side by side, then for the
    next G. What the programs of one a read is so still in the L2 cache for the next b."""
    pid = tl.program_id(0)
    first = pid // (G * B) * G
    together = tl.minimum(G, A - first)
    rest = pid - first * B
    return first + rest % together, rest // together


@triton.jit
def load_tile(x, stride, start, d, N, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, MASKED: tl.constexpr):
    """x[start : start + ROWS, d : d + COLS], 0 from column D on, and where MASKED from row N on."""
    row, col = tl.arange(0, ROWS)[:, None], d + tl.arange(0, COLS)[None, :]
    p_x = x + tl.cast(start, tl.int64) * stride + (row * stride + col)
    if MASKED:
        return tl.load(p_x, mask=(row < N - start) & (col < D), other=0.0)
    if D % COLS:
        return tl.load(p_x, mask=col < D, other=0.0)
    return tl.load(p_x)


@triton.jit(do_not_specialize=("S",))
def sum_kernel(parts, y, S, SIZE, BS: tl.constexpr, BLOCK: tl.constexpr):
    """y [SIZE] = sum over s of parts [S, SIZE], BS of them at a time, always in the same order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    b_y = tl.zeros([BS, BLOCK], tl.float32)
    for k in range(tl.cdiv(S, BS)):
        s = k * BS + tl.arange(0, BS)[:, None]
        b_y += tl.load(parts + s.to(tl.int64) * SIZE + i, mask=(s < S) & (i < SIZE), other=0.0)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.sum(b_y, 0).to(y.dtype.element_ty), mask=i < SIZE)


def sum_launch(parts: Tensor, y: Tensor) -> Launch:
    """The launch that fills y, contiguous, with the sum of parts [S, *y.shape], contiguous and float32."""
    bs, block = _SUMMED
    arguments = {"parts": parts, "y": y, "S": parts.size(0), "SIZE": y.numel(), "BS": bs, "BLOCK": block}
    return Launch(sum_kernel, (triton.cdiv(y.numel(), block),), arguments, options(4), y.dtype.itemsize, 0)


def padded(width: int) -> int:
    """The power of two that a product's inner dimension of `width` is rounded up to."""
    return max(16, triton.next_power_of_2(width))
