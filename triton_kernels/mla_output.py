"""Triton kernels of dsfast.ops.mla_output, whose module has the maths.

N tokens, D model width, C = H Dv what attention gives for a token; DP and CP are those padded, BN tokens make a tile.

    forward    a tile from attention's values to the stream and its norm
    backward   a tile's gradients of stream and values, and its part of that of norm
    sum        the gradient of norm: the sum over the tiles' parts

What the layers before wait for is the second kernel; the sum runs aside, and so does the gradient of o, `outer_launches` of
dsfast.triton_kernels.narrow.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from dsfast.triton_kernels.launch import Launch, aside, on_meta, padded, rows
from dsfast.triton_kernels.narrow import (
    load_vector,
    norm_backward,
    normalised,
    outer_launches,
)
from dsfast.triton_kernels.pieces import gradients_read, load_tile, options, store_rows, sum_launch
from torch import Tensor


@triton.jit(do_not_specialize=["N"])
def forward_kernel(
    values, o, residual, norm, y, h, eps, values_n, residual_n, N,
    C: tl.constexpr, CP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y and h of one tile of tokens. What the separate operators round is rounded."""
    start = tl.program_id(0) * BN
    dtype = h.dtype.element_ty
    b_o = load_tile(o, C, 0, 0, D, C, DP, CP, True)  # [DP, CP]
    b_v = load_tile(values, values_n, start, 0, N, C, BN, CP, True)  # [BN, CP]
    b_h = tl.dot(b_v, tl.trans(b_o), input_precision="ieee").to(dtype).to(tl.float32)  # [BN, DP]
    b_h = (b_h + load_tile(residual, residual_n, start, 0, N, D, BN, DP, True).to(tl.float32)).to(dtype)
    store_rows(h, D, start, N, b_h, BN, D, DP)
    b_x, _ = normalised(b_h.to(tl.float32), start, N, eps, BN, D)
    store_rows(y, D, start, N, b_x * load_vector(norm, D, DP), BN, D, DP)


@triton.jit(do_not_specialize=["N"])
def backward_kernel(
    dy, dy_2, dy_3, dh, h, o, norm, dx, dvalues, parts, eps, dy_n, dy_2_n, dy_3_n, dh_n, N,
    C: tl.constexpr, CP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dx [N, D], dvalues [N, C], and in a row of parts [tiles, D] what a tile adds to the gradient of norm."""
    tile = tl.program_id(0)
    start = tile * BN
    b_dy = load_tile(dy, dy_n, start, 0, N, D, BN, DP, True).to(tl.float32)  # [BN, DP]
    if dy_2 is not None:
        b_dy += load_tile(dy_2, dy_2_n, start, 0, N, D, BN, DP, True).to(tl.float32)
    if dy_3 is not None:
        b_dy += load_tile(dy_3, dy_3_n, start, 0, N, D, BN, DP, True).to(tl.float32)
    b_h = load_tile(h, D, start, 0, N, D, BN, DP, True).to(tl.float32)
    b_x, b_rstd = normalised(b_h, start, N, eps, BN, D)
    d = tl.arange(0, DP)
    tl.store(parts + tl.cast(tile, tl.int64) * D + d, tl.sum(b_dy * b_x, 0), mask=d < D)
    b_dx = norm_backward(b_dy, b_x, b_rstd, load_vector(norm, D, DP), D)
    if dh is not None:
        b_dx += load_tile(dh, dh_n, start, 0, N, D, BN, DP, True).to(tl.float32)
    b_dx = b_dx.to(dx.dtype.element_ty)
    store_rows(dx, D, start, N, b_dx, BN, D, DP)

    b_o = load_tile(o, C, 0, 0, D, C, DP, CP, True)  # [DP, CP]
    store_rows(dvalues, C, start, N, tl.dot(b_dx, b_o, input_precision="ieee"), BN, C, CP)


class Tiles(NamedTuple):
    """BN tokens."""

    bn: int
    warps: int


# Starting values: they keep the limits of tests/test_triton_compile.py and are not tuned.
_FORWARD, _BACKWARD = Tiles(32, 8), Tiles(32, 8)


def forward(values: Tensor, o: Tensor, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Shapes as dsfast.ops.mla_output -> y and h [N, D]."""
    y, h = residual.new_empty(residual.shape), residual.new_empty(residual.shape)
    with torch.cuda.device_of(values):
        forward_launch(values, o, residual, norm, eps, y, h).run()
    return y, h


def backward(
    dys: list[Tensor], dh: Tensor | None, h: Tensor, values: Tensor, o: Tensor, norm: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Given the gradients of y, 1 to 3 to be added up, and of h: dx [N, D], the gradient of residual, dvalues [N, C], and those
    of o and norm, flat, one after the other. Deterministic: no atomics, and the same sums on every chip."""
    gradients = h.new_empty(h.shape), h.new_empty(values.shape), h.new_empty(o.numel() + norm.numel())
    if not h.numel():
        return *gradients[:2], gradients[2].zero_()
    with torch.cuda.device_of(h):
        backward, *of_weights = backward_launches(dys, dh, h, values, o, norm, eps, *gradients)
        backward.run()
        aside((of_weights, gradients[2:]))
    return gradients


def forward_launch(values, o, residual, norm, eps, y, h) -> Launch:
    """The launch that fills y and h; tensors may lie on the meta device."""
    (values, residual), (bn, warps) = rows(values, residual), _FORWARD
    arguments = _arguments(values, o, norm, eps) | {
        "residual": residual, "residual_n": residual.stride(0), "y": y, "h": h, "BN": bn,
    }  # fmt: skip
    return Launch(forward_kernel, (triton.cdiv(len(values), bn),), arguments, options(warps), values.itemsize, bn)


def backward_launches(dys, dh, h, values, o, norm, eps, dx, dvalues, dweights) -> list[Launch]:
    """The kernel that fills dx, dvalues and parts of norm's gradient, and those that make dweights of these and of dx. Tensors
    may lie on the meta device."""
    (values,), n, (bn, warps) = rows(values), len(h), _BACKWARD
    do, dnorm = dweights.split([o.numel(), norm.numel()])
    parts = h.new_empty(triton.cdiv(n, bn), norm.numel(), dtype=torch.float32)
    arguments = _arguments(values, o, norm, eps) | gradients_read(dys, dh)
    arguments |= {"h": h, "dx": dx, "dvalues": dvalues, "parts": parts, "BN": bn}
    return [
        Launch(backward_kernel, (len(parts),), arguments, options(warps), h.itemsize, bn),
        *outer_launches(dx, values, do.view_as(o)),
        sum_launch(parts, dnorm),
    ]


def _arguments(values: Tensor, o: Tensor, norm: Tensor, eps: float) -> dict:
    """Arguments of the kernels of both passes."""
    d, c = o.shape
    return {
        "values": values, "values_n": values.stride(0), "o": o.contiguous(), "norm": norm.contiguous(), "eps": eps,
        "N": len(values), "C": c, "CP": padded(c), "D": d, "DP": padded(d),
    }  # fmt: skip


EXAMPLES = {"500K": (8192, 128, 128), "odd": (8192, 112, 96)}
"""N, D and C that are compiled ahead."""


def example_launches(size: str, dtype: torch.dtype, large: int) -> dict[str, Launch]:
    """Kernel and variant -> launch at EXAMPLES[size], on the meta device. In float32 there is none."""
    if dtype.itemsize != 2:
        return {}
    n, d, c = EXAMPLES[size]
    empty = on_meta(dtype)
    x, values, o, norm, dweights = empty(n, d), empty(n, c), empty(d, c), empty(d), empty(d * c + d)

    def backward_of(uses: int, dh: Tensor | None = x) -> list[Launch]:
        return backward_launches([x] * uses, dh, x, values, o, norm, 1e-6, x, values, dweights)

    return {
        "forward_kernel": forward_launch(values, o, x, norm, 1e-6, x, x),
        **{f"backward_kernel, {uses} uses": backward_of(uses)[0] for uses in (2, 3)},
        "backward_kernel, no gradient of h": backward_of(1, None)[0],
        **dict(zip(("backward_kernel", "outer_kernel", "sum_kernel", "sum_kernel, norm"), backward_of(1), strict=True)),
    }
