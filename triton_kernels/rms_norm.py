"""Triton kernels of dsfast.ops.rms_norm, whose module has the maths.

N tokens, D model width, P programs; BD is D rounded up to a power of two, BN the rows of a tile.

A row is read once and stays in registers: where D is small a program takes several rows at a time, else one. With
x^ = h rstd and g = dy weight, the gradients are

    dx = rstd (g - x^ mean(g x^)) + dh           dweight = sum over tokens of dy x^

dy being the sum of up to three gradients, one for each reader of y.

The backward pass has as many programs as the chip takes at once. Each goes through its share of the tiles, the next tile on
its way while one is summed, keeps its part of dweight in registers and writes it once, as float32; a second kernel adds the
parts up.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from dsfast.triton_kernels.launch import (
    Launch,
    aside,
    large_tiles,
    multiprocessors,
    on_meta,
    padded,
    rows,
)
from dsfast.triton_kernels.limits import MULTIPROCESSORS, NORM_WIDEST
from dsfast.triton_kernels.pieces import gradients_read, load_tile, options, store_rows, sum_launch
from torch import Tensor


@triton.jit(do_not_specialize=["N"])
def forward_kernel(
    x, residual, weight, y, h, rstd, eps, x_n, residual_n, N, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr
):
    """y [N, D], rstd [N] and, where there is a residual, h [N, D], for one tile of rows."""
    start = tl.program_id(0) * BN
    d = tl.arange(0, BD)
    b_h = load_tile(x, x_n, start, 0, N, D, BN, BD, True)  # [BN, BD]
    if residual is not None:
        b_h = b_h.to(tl.float32) + load_tile(residual, residual_n, start, 0, N, D, BN, BD, True).to(tl.float32)
        b_h = b_h.to(h.dtype.element_ty)  # the norm is that of the rounded sum: it is what the backward pass reads
        store_rows(h, D, start, N, b_h, BN, D, BD)
    b_h = b_h.to(tl.float32)
    b_rstd = 1 / tl.sqrt_rn(tl.sum(b_h * b_h, 1) / D + eps)  # [BN]
    b_weight = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    store_rows(y, D, start, N, b_h * b_rstd[:, None] * b_weight[None, :], BN, D, BD)
    n = start + tl.arange(0, BN)
    tl.store(rstd + n, b_rstd, mask=n < N)


@triton.jit(do_not_specialize=["N"])
def backward_kernel(
    dy, dy_2, dy_3, dh, h, weight, rstd, dx, parts, dy_n, dy_2_n, dy_3_n, dh_n, h_n, N,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx [N, D], and this program's part of dweight [P, D]: tiles p, p + P, p + 2 P ..."""
    p, programs = tl.program_id(0), tl.num_programs(0)
    d = tl.arange(0, BD)
    b_weight = tl.load(weight + d, mask=d < D, other=0.0)
    b_dweight = tl.zeros([BN, BD], tl.float32)
    for t in tl.range(0, tl.cdiv(tl.cdiv(N, BN) - p, programs), num_stages=STAGES):
        start = (p + t * programs) * BN
        n = start + tl.arange(0, BN)
        b_dy = load_tile(dy, dy_n, start, 0, N, D, BN, BD, True).to(tl.float32)  # [BN, BD]
        if dy_2 is not None:
            b_dy += load_tile(dy_2, dy_2_n, start, 0, N, D, BN, BD, True).to(tl.float32)
        if dy_3 is not None:
            b_dy += load_tile(dy_3, dy_3_n, start, 0, N, D, BN, BD, True).to(tl.float32)
        b_rstd = tl.load(rstd + n, mask=n < N, other=0.0)[:, None]
        b_x = load_tile(h, h_n, start, 0, N, D, BN, BD, True).to(tl.float32) * b_rstd  # [BN, BD], normalised
        b_g = b_dy * b_weight.to(tl.float32)[None, :]
        b_dx = b_rstd * (b_g - b_x * (tl.sum(b_g * b_x, 1) / D)[:, None])
        b_dweight += b_dy * b_x  # last: before b_dx it spills by triton 3.9
        if dh is not None:
            b_dx += load_tile(dh, dh_n, start, 0, N, D, BN, BD, True).to(tl.float32)
        store_rows(dx, D, start, N, b_dx, BN, D, BD)
    tl.store(parts + p * D + d, tl.sum(b_dweight, 0), mask=d < D)


class Tiles(NamedTuple):
    """BN rows of BD columns; warps of the forward and the backward pass."""

    bn: int
    bd: int
    forward_warps: int
    backward_warps: int


ELEMENTS = 2048  # of a tile of several rows: two of 16 bytes for each thread of four warps, in 16 bits
ON_ITS_WAY = 98304  # bytes of a stage of the backward pass, of which large chips have two
REGISTERS = 32768  # bytes of the tiles of the backward pass that a multiprocessor has at a time, as float32


def tiles(d: int) -> Tiles:
    """Tiles for rows of `d` columns. Not tuned on a GPU."""
    bd = padded(d)
    return Tiles(max(1, min(128, ELEMENTS // bd)), bd, max(4, bd // 1024), max(4, bd // 512))


def forward(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x and residual [N, D], weight [D] -> y [N, D], h [N, D] = x + residual (empty without one), rstd [N] in float32."""
    n, d = x.shape
    y, rstd = x.new_empty(n, d), x.new_empty(n, dtype=torch.float32)
    h = x.new_empty(0 if residual is None else n, d)
    if n:
        with torch.cuda.device_of(x):
            forward_launch(x, weight, eps, residual, y, h, rstd).run()
    return y, h, rstd


def backward(dys: list[Tensor], dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """dx [N, D] and dweight [D] from the gradients of y, 1 to 3 to be added up, and of h. Deterministic on one chip."""
    dx, dweight = h.new_empty(h.shape), weight.new_empty(weight.shape)
    programs = backward_programs(h, multiprocessors(h.device))
    parts = h.new_empty(programs, h.size(1), dtype=torch.float32)
    if not programs:
        return dx, dweight.zero_()
    with torch.cuda.device_of(h):
        backward, add = backward_launches(dys, dh, h, weight, rstd, dx, dweight, parts, large_tiles(h.device))
        backward.run()
        aside(([add], [dweight]))
    return dx, dweight


def backward_programs(h: Tensor, processors: int) -> int:
    """How many programs of backward_kernel share the rows of h: as many as `processors` multiprocessors run at a time, but
    one for at least 16 rows unless multiprocessors would be idle: each writes a row of float32 for dweight."""
    n, (bn, bd, *_) = h.size(0), tiles(h.size(1))
    return min(triton.cdiv(n, bn), max(1, REGISTERS // (4 * bn * bd)) * processors, max(processors, n // 16))


def forward_launch(x, weight, eps, residual, y, h, rstd) -> Launch:
    """The launch that fills y, rstd and, where there is a residual, h; tensors may lie on the meta device."""
    x, weight = rows(x, weight)
    residual = None if residual is None else rows(residual)[0]
    (n, d), (bn, bd, warps, _) = x.shape, tiles(x.size(1))
    arguments = {
        "x": x, "residual": residual, "weight": weight, "y": y, "h": h, "rstd": rstd, "eps": eps, "x_n": x.stride(0),
        "residual_n": 0 if residual is None else residual.stride(0), "N": n, "D": d, "BD": bd, "BN": bn,
    }  # fmt: skip
    return Launch(forward_kernel, (triton.cdiv(n, bn),), arguments, options(warps), x.dtype.itemsize, 0)


def backward_launches(dys, dh, h, weight, rstd, dx, dweight, parts, large: int) -> list[Launch]:
    """The kernel that fills dx and parts [P, D], one program for each of its rows, and the one that adds the parts up."""
    h, weight = rows(h, weight)
    (n, d), (bn, bd, _, warps), programs = h.shape, tiles(h.size(1)), parts.size(0)
    arguments = {"h": h, "weight": weight, "rstd": rstd, "dx": dx, "parts": parts, "h_n": h.stride(0), "N": n, "D": d}
    arguments |= gradients_read(dys, dh)
    # What is on its way must fit into shared memory, of which some chips have 99 KB: float32's widest rows are not.
    fits = (len(dys) + (dh is not None) + 1) * bn * bd * h.element_size() <= ON_ITS_WAY
    stages = 1 + bool(large) + fits if programs < triton.cdiv(n, bn) else 1  # of one tile nothing else is on its way
    arguments |= {"BD": bd, "BN": bn, "STAGES": stages}
    return [
        Launch(backward_kernel, (programs,), arguments, options(warps, stages), h.dtype.itemsize, 0),
        sum_launch(parts, dweight),
    ]


EXAMPLES = {
    "500K": (8192, 128),
    "DeepSeek-V3": (4096, 7168),
    "DeepSeek-V3 latent": (4096, 512),
    "widest": (4096, NORM_WIDEST),
    "many narrow": (65536, 128),
}
"""N and D that are compiled ahead, with residual and without."""


def example_launches(size: str, dtype: torch.dtype, large: int) -> dict[str, Launch]:
    """Kernel and variant -> launch at EXAMPLES[size], on the meta device."""
    n, d = EXAMPLES[size]
    empty = on_meta(dtype)
    x, weight, rstd = empty(n, d), empty(d), empty(n, dtype=torch.float32)
    parts = x.new_empty(backward_programs(x, MULTIPROCESSORS), d, dtype=torch.float32)
    launches = [forward_launch(x, weight, 1e-6, x, x, x, rstd)]
    launches += backward_launches([x], x, x, weight, rstd, x, weight, parts, large)
    alone = [forward_launch(x, weight, 1e-6, None, x, x, rstd)]
    alone += backward_launches([x], None, x, weight, rstd, x, weight, parts, large)[:1]
    found = {launch.kernel.__name__: launch for launch in launches}
    found |= {f"{launch.kernel.__name__}, no residual": launch for launch in alone}
    for uses in (2, 3):
        shared = backward_launches([x] * uses, x, x, weight, rstd, x, weight, parts, large)[0]
        found[f"{shared.kernel.__name__}, {uses} uses"] = shared
    return found
