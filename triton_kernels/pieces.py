"""Pieces that kernels of several operators are made of."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from dsfast.triton_kernels.launch import Launch, rows
from dsfast.triton_kernels.limits import MULTIPROCESSORS
from dsfast.triton_kernels.version import numbers
from torch import Tensor

PROGRAMS = 4 * MULTIPROCESSORS  # at most, that a launch is split into where its tiles are fewer
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
# Running maximum before the first score or logit: finite, for inf - inf is NaN.
UNSEEN = tl.constexpr(-3.4028234663852886e38)
_SUMMED = 8192  # elements in a step of sum_kernel: 64 for each thread

BY_3_7 = numbers(triton.__version__) <= (3, 7)
"""Whether this is triton 3.6 or 3.7, which cannot compile some kernels as the later ones do."""


def options(warps: int, stages: int = 1) -> dict[str, int | bool]:
    """The compiler's. Fused multiply-add, its default up to triton 3.9, is asked for: later versions are to leave it out."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def takes_raw(dtype: torch.dtype, large: int) -> bool:
    """Whether a softmax is RAW at first, see `nothing`: in the 16-bit dtype with the range of float32, on chips whose products
    are fast beside what threads do. On sm_80 what begins anew has other parts of the kernel spill."""
    return dtype == torch.bfloat16 and large != 0


def splits(tiles: int, steps: int, programs: int | None = None) -> tuple[int, int]:
    """(number of splits, steps of each) of a loop of `steps`, so that `tiles` programs become up to `programs` (None: PROGRAMS);
    none is empty, and where there is nothing to do there is one.

    It depends on the sizes alone and not on the chip, so that the sums are the same bits everywhere.
    """
    tiles, steps = max(1, tiles), max(1, steps)
    per = triton.cdiv(steps, min(steps, max(1, (programs or PROGRAMS) // tiles)))
    return triton.cdiv(steps, per), per


@triton.jit
def swizzle(A, B, G: tl.constexpr, number=None):
    """(a, b) of this program, or of that `number`, a in 0 .. A - 1 and b in 0 .. B - 1: all b for G neighbouring a, these side by
    side, then for the next G. What the programs of one a read is so still in the L2 cache for the next b."""
    pid = tl.program_id(0) if number is None else number
    first = pid // (G * B) * G
    together = tl.minimum(G, A - first)
    rest = pid - first * B
    return first + rest % together, rest // together


@triton.jit
def opaque(x):
    """x itself, where the grid has no third dimension, in a way that the compiler does not see through: one instruction.

    LLVM else keeps a pointer and a bound in registers for each row a thread copies, and addresses from before the loop for
    after it: some 80 registers beside the sums of a wide tile, which spill.
    """
    return x & -tl.num_programs(2)


@triton.jit
def nothing(A: tl.constexpr, B: tl.constexpr, RAW: tl.constexpr):
    """What a softmax of A rows begins with: the sum b_o [A, B] of exp2(x - m) times rows of B numbers, m [A], the sum b_l [A] of
    exp2(x - m).

    One m is as good as another as long as float32, and the products' dtype, hold the sums. So where RAW m is 0, and stays: then a
    round has no maximum to find, for which a thread waits for others, and no sums to rescale. `fits` tells whether that was
    right; if not, all begins anew with the maximum so far.
    """
    return tl.zeros([A, B], tl.float32), tl.full([A], 0.0 if RAW else UNSEEN, tl.float32), tl.zeros([A], tl.float32)


@triton.jit
def fits(b_l):
    """Whether sums of exponentials b_l [A] are so far from the smallest and largest float32 that no part of them is lost or
    infinite, nor its product with a factor of up to 2^62. Not where one is NaN."""
    return tl.min(((b_l > 2.0**-64) & (b_l < 2.0**64)).to(tl.int32), 0) == 1


@triton.jit
def load_tile(
    x, stride, start, d, N,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, MASKED: tl.constexpr, ANEW: tl.constexpr = False,
):  # fmt: skip
    """x[start : start + ROWS, d : d + COLS], 0 from column D on, and where MASKED from row N on.

    ANEW: by 64-bit offsets, so that addresses are computed in each round of a loop and not kept in registers; where they are all
    the same, a start from `opaque` prevents it.
    """
    row, col = tl.arange(0, ROWS)[:, None], d + tl.arange(0, COLS)[None, :]
    p_x = x + tl.cast(start, tl.int64) * stride + (row * stride + col)
    if ANEW:
        p_x = x + (start + row).to(tl.int64) * stride + col
    if MASKED:
        return tl.load(p_x, mask=(row < N - start) & (col < D), other=0.0)
    if D % COLS:
        return tl.load(p_x, mask=col < D, other=0.0)
    return tl.load(p_x)


@triton.jit
def store_rows(x, stride, start, N, b_x, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Rows of x = b_x [ROWS, DP], in x's dtype, up to row N and column D."""
    row, d = tl.arange(0, ROWS)[:, None], tl.arange(0, DP)[None, :]
    p_x = x + tl.cast(start, tl.int64) * stride + (row * stride + d)
    tl.store(p_x, b_x.to(x.dtype.element_ty), mask=(row < N - start) & (d < D))


@triton.jit(do_not_specialize=("S", "R"))
def sum_kernel(parts, base, y, parts_s, parts_r, S, R, D, BS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """y [R, D] = sum over s of parts [S, R, D], which have the strides parts_s, parts_r and 1, plus base [R, D] where there is
    one. In float32, BS of them at a time, always in the same order."""
    blocks = tl.cdiv(D, BN)
    r = (tl.program_id(0) // blocks).to(tl.int64) * BM + tl.arange(0, BM)[:, None]
    d = (tl.program_id(0) % blocks).to(tl.int64) * BN + tl.arange(0, BN)[None, :]
    m_y = (r < R) & (d < D)
    s, p_parts = tl.arange(0, BS)[:, None, None], parts + (r * parts_r + d)[None, :, :]
    b_y = tl.zeros([BS, BM, BN], tl.float32)
    for k in range(0, S, BS):
        m_parts = (k + s < S) & m_y[None, :, :]
        b_y += tl.load(p_parts + (k + s).to(tl.int64) * parts_s, mask=m_parts, other=0.0).to(tl.float32)
    b_sum = tl.sum(b_y, 0)
    if base is not None:
        b_sum += tl.load(base + r * D + d, mask=m_y, other=0.0).to(tl.float32)
    tl.store(y + r * D + d, b_sum.to(y.dtype.element_ty), mask=m_y)


def sum_launch(parts: Tensor, y: Tensor, base: Tensor | None = None) -> Launch:
    """The launch that fills y, contiguous, with the sum of parts [S, *y.shape], contiguous or [S, R, D] with contiguous rows, and
    of base, contiguous, where there is one."""
    if parts.is_contiguous():
        parts = parts.flatten(1)[:, None]
    s, r, d = parts.shape
    bs, bm, bn = (triton.next_power_of_2(max(1, n)) for n in (s, r, d))
    bs = min(128, bs)
    bn = min(1024, bn, _SUMMED // bs)
    bm = min(bm, _SUMMED // (bs * bn))
    while bn > 16 and triton.cdiv(r, bm) * triton.cdiv(d, bn) < PROGRAMS:
        bn //= 2
    arguments = {
        "parts": parts, "base": base, "y": y, "parts_s": parts.stride(0), "parts_r": parts.stride(1), "S": s, "R": r, "D": d,
        "BS": bs, "BM": bm, "BN": bn,
    }  # fmt: skip
    grid = (triton.cdiv(r, bm) * triton.cdiv(d, bn),)
    return Launch(sum_kernel, grid, arguments, options(4), y.dtype.itemsize, 0)


def gradients_read(dys: list[Tensor], dh: Tensor | None) -> dict[str, Tensor | int | None]:
    """A kernel's arguments dy, dy_2, dy_3 (up to three readers' gradients) and dh, None where there is none, and dy_n ... dh_n:
    how far apart their rows are."""
    given = dict(zip(("dy", "dy_2", "dy_3"), rows(*dys), strict=False)) | ({} if dh is None else {"dh": rows(dh)[0]})
    found: dict[str, Tensor | int | None] = {}
    for name in ("dy", "dy_2", "dy_3", "dh"):
        found |= {name: given.get(name), f"{name}_n": given[name].stride(0) if name in given else 0}
    return found
