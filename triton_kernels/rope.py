"""Triton kernel of dsfast.ops.rope, whose module has the maths.

N tokens, H heads, Dr rotary width, P positions; BT tokens, BH heads and DR columns (Dr rounded up to a power of two) in a tile.

A tile is read as it lies, pairs side by side, and taken apart in registers: both members of a pair are with one thread. A
token's angles are read once for the heads of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from dsfast.triton_kernels.launch import Launch, on_meta, rows
from dsfast.triton_kernels.pieces import options
from torch import Tensor

ELEMENTS = 2048  # of a tile, for four warps


@triton.jit
def _turn(
    x, x_n, x_h, plain, plain_n, plain_h, cos, sin, positions, y, y_n, y_h, tile, N, H, P,
    Dr: tl.constexpr, DR: tl.constexpr, Dp: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
    INVERSE: tl.constexpr,
):  # fmt: skip
    """y [N, H, Dp + Dr] for one tile of tokens and heads: plain [N, H, Dp] as it is, then x [N, H, Dr], which may be y, turned
    by the tokens' positions."""
    groups = tl.cdiv(H, BH)
    i = tile // groups * BT + tl.arange(0, BT)  # [BT]
    h = (tile % groups * BH + tl.arange(0, BH))[None, :, None]  # [1, BH, 1]
    d, pair = tl.arange(0, DR)[None, None, :], tl.arange(0, DR // 2)[None, :]
    m_row = (i < N)[:, None, None] & (h < H)  # [BT, BH, 1]
    m_x = m_row & (d < Dr)  # [BT, BH, DR]
    n, h = tl.cast(i, tl.int64)[:, None, None], tl.cast(h, tl.int64)
    p_y = y + n * y_n + h * y_h
    b_x = tl.load(x + n * x_n + h * x_h + d, mask=m_x, other=0.0)

    b_p = tl.load(positions + i, mask=i < N, other=-1)  # [BT]
    known = (b_p >= 0) & (b_p < P)
    at = tl.where(known, b_p, 0)[:, None] * (Dr // 2) + pair  # [BT, DR / 2]
    m_pair = known[:, None] & (pair < Dr // 2)
    b_cos = tl.load(cos + at, mask=m_pair, other=float("nan")).to(tl.float32)[:, None, :]
    b_sin = tl.load(sin + at, mask=m_pair, other=float("nan")).to(tl.float32)[:, None, :]
    if INVERSE:
        b_sin = -b_sin
    even, odd = tl.split(tl.reshape(b_x.to(tl.float32), [BT, BH, DR // 2, 2]))  # [BT, BH, DR / 2]
    b_y = tl.join(even * b_cos - odd * b_sin, even * b_sin + odd * b_cos)
    tl.store(p_y + Dp + d, tl.reshape(b_y, [BT, BH, DR]).to(y.dtype.element_ty), mask=m_x)
    if Dp > 0:
        d_plain = tl.arange(0, DP)[None, None, :]
        m_plain = m_row & (d_plain < Dp)
        b_plain = tl.load(plain + n * plain_n + h * plain_h + d_plain, mask=m_plain, other=0.0)
        tl.store(p_y + d_plain, b_plain, mask=m_plain)


@triton.jit(do_not_specialize=["N", "P"])
def rope_kernel(
    x, cos, sin, positions, y, x_n, x_h, y_n, y_h, N, H, P,
    Dr: tl.constexpr, DR: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """y [N, H, Dr] for one tile of tokens and heads."""
    tile = tl.program_id(0)
    _turn(x, x_n, x_h, x, 0, 0, cos, sin, positions, y, y_n, y_h, tile, N, H, P, Dr, DR, 0, 1, BT, BH, INVERSE)


@triton.jit(do_not_specialize=["N", "P"])
def pair_kernel(
    q, q_plain, q_out, k, k_plain, k_out, cos, sin, positions, q_n, q_h, q_plain_n, q_plain_h, q_out_n, q_out_h, k_n, k_plain_n,
    k_out_n, N, H, P,
    Dr: tl.constexpr, DR: tl.constexpr, Dq: tl.constexpr, DQ: tl.constexpr, Dk: tl.constexpr, DK: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """q_out [N, H, Dq + Dr] and k_out [N, Dk + Dr], a tile of one of them: BT tokens and BH heads of q, or BK tokens of k."""
    tile, queries = tl.program_id(0), tl.cdiv(N, BT) * tl.cdiv(H, BH)
    if tile < queries:
        _turn(
            q, q_n, q_h, q_plain, q_plain_n, q_plain_h, cos, sin, positions, q_out, q_out_n, q_out_h, tile, N, H, P,
            Dr, DR, Dq, DQ, BT, BH, INVERSE,
        )  # fmt: skip
    else:
        tile -= queries
        _turn(
            k, k_n, 0, k_plain, k_plain_n, 0, cos, sin, positions, k_out, k_out_n, 0, tile, N, 1, P,
            Dr, DR, Dk, DK, BK, 1, INVERSE,
        )  # fmt: skip


def rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, inverse: bool) -> Tensor:
    """Shapes as dsfast.ops.rope -> [N, H, Dr] contiguous; `inverse` turns back.

    A token whose position is not in 0 .. P - 1 becomes NaN: the positions lie on the device, and looking would make the host
    wait.
    """
    y = x.new_empty(x.shape)
    if y.numel():
        with torch.cuda.device_of(x):
            rope_launch(x, cos, sin, positions, inverse, y).run()
    return y


def rope_(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    """`rope` in the memory of x, whose pairs lie side by side."""
    if x.numel():
        with torch.cuda.device_of(x):
            rope_launch(x, cos, sin, positions, False, x).run()


def pair(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """`rope` of q [N, H, Dr] and of k [N, Dr] in one launch -> both contiguous."""
    found = q.new_empty(q.shape), k.new_empty(k.shape)
    if k.numel():
        with torch.cuda.device_of(q):
            pair_launch(q, None, k, None, cos, sin, positions, False, *found).run()
    return found


def pair_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    """`pair` in the memory of q and k, whose pairs lie side by side."""
    if k.numel():
        with torch.cuda.device_of(q):
            pair_launch(q, None, k, None, cos, sin, positions, False, q, k).run()


def pair_backward(dq_plain, dq, dk_plain, dk, cos, sin, positions) -> tuple[Tensor, Tensor]:
    """The gradients of what `pair` had a part of: [dq_plain; dq turned back] [N, H, Dq + Dr] and [dk_plain; dk turned back]
    [N, Dk + Dr]."""
    found = tuple(
        x.new_empty(*x.shape[:-1], plain.size(-1) + x.size(-1)) for plain, x in ((dq_plain, dq), (dk_plain, dk))
    )
    if dk.numel():
        with torch.cuda.device_of(dq):
            pair_launch(dq, dq_plain, dk, dk_plain, cos, sin, positions, True, *found).run()
    return found


def rope_launch(x, cos, sin, positions, inverse: bool, y) -> Launch:
    """The launch that fills y, which may be x; tensors may lie on the meta device. Not tuned on a GPU."""
    x, cos, sin, positions = *rows(x), cos.contiguous(), sin.contiguous(), positions.contiguous()
    n, h, dr = x.shape
    bt, bh = _tile(h, dr)
    arguments = {
        "x": x, "cos": cos, "sin": sin, "positions": positions, "y": y, "x_n": x.stride(0), "x_h": x.stride(1),
        "y_n": y.stride(0), "y_h": y.stride(1), "N": n, "H": h, "P": cos.size(0), "Dr": dr, "DR": triton.next_power_of_2(dr),
        "BT": bt, "BH": bh, "INVERSE": inverse,
    }  # fmt: skip
    grid = (triton.cdiv(n, bt) * triton.cdiv(h, bh),)
    return Launch(rope_kernel, grid, arguments, options(4), x.dtype.itemsize, 0)


def _tile(heads: int, width: int) -> tuple[int, int]:
    """Tokens and heads of a tile of rows of `width` columns."""
    padded = triton.next_power_of_2(width)
    bh = min(triton.next_power_of_2(heads), max(1, ELEMENTS // padded))
    return max(1, min(128, ELEMENTS // (padded * bh))), bh


def pair_launch(q, q_plain, k, k_plain, cos, sin, positions, inverse: bool, q_out, k_out) -> Launch:
    """The launch that fills q_out and k_out; without q_plain and k_plain what is turned is all of them, and may be what it is
    turned into."""
    cos, sin, positions = cos.contiguous(), sin.contiguous(), positions.contiguous()
    (q, k), (n, h, dr) = rows(q, k), q.shape
    q_plain, k_plain = (None, None) if q_plain is None else rows(q_plain, k_plain)
    dq, dk = q_out.size(-1) - dr, k_out.size(-1) - dr
    (bt, bh), (bk, _) = _tile(h, max(dr, dq)), _tile(1, max(dr, dk))
    arguments = {
        "q": q, "q_plain": q_plain, "q_out": q_out, "k": k, "k_plain": k_plain, "k_out": k_out, "cos": cos, "sin": sin,
        "positions": positions, "q_n": q.stride(0), "q_h": q.stride(1), "q_plain_n": q_plain.stride(0) if dq else 0,
        "q_plain_h": q_plain.stride(1) if dq else 0, "q_out_n": q_out.stride(0), "q_out_h": q_out.stride(1),
        "k_n": k.stride(0), "k_plain_n": k_plain.stride(0) if dk else 0, "k_out_n": k_out.stride(0),
        "N": n, "H": h, "P": cos.size(0), "Dr": dr, "DR": triton.next_power_of_2(dr), "Dq": dq,
        "DQ": triton.next_power_of_2(max(1, dq)), "Dk": dk, "DK": triton.next_power_of_2(max(1, dk)), "BT": bt, "BH": bh,
        "BK": bk, "INVERSE": inverse,
    }  # fmt: skip
    grid = (triton.cdiv(n, bt) * triton.cdiv(h, bh) + triton.cdiv(n, bk),)
    return Launch(pair_kernel, grid, arguments, options(4), q.dtype.itemsize, 0)


EXAMPLES = {
    "500K": (8192, 4, 16, 32, 32),
    "500K shared key": (8192, 1, 16, 32, 32),
    "DeepSeek-V3": (4096, 128, 64, 128, 512),
    "DeepSeek-V3 shared key": (4096, 1, 64, 128, 512),
}
"""N, H, Dr, and the widths of what is not turned of a query and beside the shared key, that are compiled ahead."""


def example_launches(size: str, dtype: torch.dtype, large: int) -> dict[str, Launch]:
    """Kernel and variant -> launch at EXAMPLES[size], on the meta device; views as the model's projections leave them."""
    n, h, dr, dq, dk = EXAMPLES[size]
    empty = on_meta(dtype)
    x, table = empty(n, h, 3 * dr)[..., 2 * dr :], empty(4096, dr // 2)
    positions, y = empty(n, dtype=torch.int64), empty(n, h, dr)
    q, kv, turned = empty(n, h, dq + dr), empty(n, dk + dr), empty(n, dr)
    tables = table, table, positions
    return {
        "rope_kernel": rope_launch(x, *tables, False, y),
        "rope_kernel, in place": rope_launch(x, *tables, False, x),
        "rope_kernel, inverse": rope_launch(y, *tables, True, y),
        "pair_kernel": pair_launch(q[..., dq:], None, kv[:, dk:], None, *tables, False, y, turned),
        "pair_kernel, in place": pair_launch(
            q[..., dq:], None, kv[:, dk:], None, *tables, False, q[..., dq:], kv[:, dk:]
        ),
        "pair_kernel, inverse": pair_launch(y, empty(n, h, dq), turned, empty(n, dk), *tables, True, q, kv),
    }
