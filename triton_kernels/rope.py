"""Triton kernel of dsfast.ops.rope, whose module has the maths.

N tokens, H heads, Dr rotary width, P positions; BT tokens, BH heads and DR columns (Dr rounded up to a power of two) in a tile.

A tile is read as it lies, pairs side by side, and taken apart in registers: both members of a pair are with one thread. A
token's angles are read once for the heads of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from dsfast.triton_kernels.launch import Launch, expect_dtype, on_meta, rows
from dsfast.triton_kernels.pieces import options
from torch import Tensor

ELEMENTS = 2048  # of a tile, for four warps
WIDEST = 4096


@triton.jit(do_not_specialize=["N", "P"])
def rope_kernel(
    x, cos, sin, positions, y, x_n, x_h, N, H, P, Dr: tl.constexpr, DR: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
    INVERSE: tl.constexpr,
):  # fmt: skip
    """y [N, H, Dr] for one tile of tokens and heads."""
    groups = tl.cdiv(H, BH)
    i = tl.program_id(0) // groups * BT + tl.arange(0, BT)  # [BT]
    h = (tl.program_id(0) % groups * BH + tl.arange(0, BH))[None, :, None]  # [1, BH, 1]
    d, pair = tl.arange(0, DR)[None, None, :], tl.arange(0, DR // 2)[None, :]
    m_x = (i < N)[:, None, None] & (h < H) & (d < Dr)  # [BT, BH, DR]
    n, h = tl.cast(i, tl.int64)[:, None, None], tl.cast(h, tl.int64)
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
    tl.store(y + (n * H + h) * Dr + d, tl.reshape(b_y, [BT, BH, DR]).to(y.dtype.element_ty), mask=m_x)


def rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, inverse: bool) -> Tensor:
    """Shapes as dsfast.ops.rope -> [N, H, Dr] contiguous; `inverse` turns back.

    A token whose position is not in 0 .. P - 1 becomes NaN: the positions lie on the device, and looking would make the host
    wait. Raises TypeError for other dtypes than float32, float16 and bfloat16, ValueError for Dr above WIDEST.
    """
    expect_dtype("rope", x.dtype)
    if x.size(2) > WIDEST:
        raise ValueError(f"rope: the Triton kernel takes Dr up to {WIDEST}, got {x.size(2)}")
    y = x.new_empty(x.shape)
    if y.numel():
        with torch.cuda.device_of(x):
            rope_launch(x, cos, sin, positions, inverse, y).run()
    return y


def rope_launch(x, cos, sin, positions, inverse: bool, y) -> Launch:
    """The launch that fills y, contiguous; tensors may lie on the meta device. Starting values: nobody has measured them."""
    x, cos, sin, positions = *rows(x), cos.contiguous(), sin.contiguous(), positions.contiguous()
    n, h, dr = x.shape
    padded = triton.next_power_of_2(dr)
    bh = min(triton.next_power_of_2(h), max(1, ELEMENTS // padded))
    bt = max(1, min(128, ELEMENTS // (padded * bh)))
    arguments = {
        "x": x, "cos": cos, "sin": sin, "positions": positions, "y": y, "x_n": x.stride(0), "x_h": x.stride(1), "N": n,
        "H": h, "P": cos.size(0), "Dr": dr, "DR": padded, "BT": bt, "BH": bh, "INVERSE": inverse,
    }  # fmt: skip
    grid = (triton.cdiv(n, bt) * triton.cdiv(h, bh),)
    return Launch(rope_kernel, grid, arguments, options(4), x.dtype.itemsize, 0)


EXAMPLES = {
    "500K": (8192, 4, 16),
    "500K shared key": (8192, 1, 16),
    "DeepSeek-V3": (4096, 128, 64),
    "DeepSeek-V3 shared key": (4096, 1, 64),
}
"""N, H and Dr that are compiled ahead."""


def example_launches(size: str, dtype: torch.dtype, large: bool) -> dict[str, Launch]:
    """Kernel and variant -> launch at EXAMPLES[size], on the meta device; views as the model's projections leave them."""
    n, h, dr = EXAMPLES[size]
    empty = on_meta(dtype)
    x, table = empty(n, h, 3 * dr)[..., 2 * dr :], empty(4096, dr // 2)
    positions, y = empty(n, dtype=torch.int64), empty(n, h, dr)
    return {
        "rope_kernel": rope_launch(x, table, table, positions, False, y),
        "rope_kernel, inverse": rope_launch(y, table, table, positions, True, y),
    }
