"""Muon over all matrices in one call (K. Jordan, "Muon", 2024; arXiv 2502.16982).

Each matrix W [rows, cols], with its gradient and its momentum M:

    G = clip_scale grad
    M = m M + (1 - m) G
    U = m M + (1 - m) G                                        Nesterov's look ahead
    W = (1 - lr w) W - lr 0.2 sqrt(max(rows, cols)) O          O: `newton_schulz` of U, the shorter side first

The factor 0.2 sqrt(max(rows, cols)) gives the update the root mean square of AdamW's (arXiv 2502.16982, equation 4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from dsfast.ops import native, triton
from dsfast.ops.device_numbers import expect_on_device, only_if_finite, or_number, or_tensor
from dsfast.ops.dispatch import choose
from dsfast.ops.library import define, expect_contiguous, expect_dtype, expect_shape
from dsfast.ops.newton_schulz import EPS, ITERATIONS, A, B, C, Shape, newton_schulz, orthogonal_reference, too_large

RMS = 0.2
"""Root mean square of an update of AdamW's, by experience."""


def muon_reference(params, grads, momenta, parts, lr, weight_decay, momentum, clip_scale, lr_scale, dtype) -> None:
    for w, grad, m, n in zip(params, grads, momenta, parts, strict=True):
        g = torch.zeros_like(w) if grad is None else grad * clip_scale
        m.mul_(momentum).add_(g * (1 - momentum))
        matrices, rows, cols = size_of(w.shape, n)
        u = (momentum * m + (1 - momentum) * g).reshape(matrices, rows, cols).to(dtype)
        o = orthogonal_reference(u) if rows <= cols else orthogonal_reference(u.mT).mT
        rate = lr * lr_scale
        w.mul_(1 - rate * weight_decay).sub_(rate * _length(rows, cols) * o.reshape(w.shape).to(w.dtype))


def size_of(shape: Sequence[int], parts: int) -> Shape:
    """Number, rows and columns of the matrices that a parameter is."""
    return math.prod(shape[:-2]) * parts, shape[-2] // parts, shape[-1]


def _length(rows: int, cols: int) -> float:
    return RMS * math.sqrt(max(rows, cols))


@torch.no_grad()
def muon(
    params: Sequence[Tensor], grads: Sequence[Tensor | None], momenta: Sequence[Tensor], parts: Sequence[int], lr: float,
    weight_decay: float, momentum: float, clip_scale: float | Tensor = 1.0, lr_scale: float | Tensor = 1.0,
    dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Update `params` and `momenta`, of the same shapes and contiguous, in place: one step of Muon, all matrices in one call.

    A parameter [..., R, cols] is matrices [R / parts, cols] one above the other. A gradient that is None counts as zero. dtype:
    what `newton_schulz` iterates in, None: the parameters' own, which all else is in.

    clip_scale and lr_scale may lie on the device, as in `adamw`, and what stands there of capturing CUDA graphs is true here.
    Raises ValueError or TypeError for lists that do not fit together and for rows that cannot be parted.
    """
    if not len(params) == len(grads) == len(momenta) == len(parts):
        raise ValueError("muon: params, grads, momenta and parts must be equally long")
    if not params:
        return
    _expect_matrices(params, grads, momenta, parts)
    expect_on_device("muon", params[0].device, clip_scale=clip_scale, lr_scale=lr_scale)
    dtype = dtype or params[0].dtype
    only = "" if dtype == torch.float32 else f"the C++ kernels iterate in float32, asked for was {dtype}"
    if choose("muon", params[0], not_native=only) == "reference":
        with only_if_finite(clip_scale, [*params, *momenta]):
            muon_reference(params, grads, momenta, parts, lr, weight_decay, momentum, clip_scale, lr_scale, dtype)
    else:
        scales = *or_tensor(clip_scale), *or_tensor(lr_scale)
        torch.ops.dsfast.muon(params, grads, momenta, parts, lr, weight_decay, momentum, *scales, dtype)
        torch.autograd.graph.increment_version([*params, *momenta])  # the kernels wrote where autograd cannot see


def _expect_matrices(params, grads, momenta, parts) -> None:
    for w, grad, m, n in zip(params, grads, momenta, parts, strict=True):
        if w.dim() < 2 or n < 1 or w.size(-2) % n:
            raise ValueError(
                f"muon: params must have two dimensions or more, and rows to part by {n}, got {list(w.shape)}"
            )
        for name, x in (("grads", grad), ("momenta", m)):
            if x is not None and x.shape != w.shape:
                expect_shape("muon", name, x, *w.shape)
        expect_dtype("muon", params[0].dtype, params[0].device, params=w, grads=grad, momenta=m)
        expect_contiguous("muon", params=w, momenta=m)


class Layout(NamedTuple):
    """Where the matrices of parameters stand in one flat tensor as `newton_schulz` takes it, the most costly first.

    order: the parameters' numbers in that order; sizes: matrices, rows and cols of each parameter, begins: where they begin,
    lengths: of an update; stacks: the shapes.
    """

    order: list[int]
    sizes: list[Shape]
    begins: list[int]
    lengths: list[float]
    stacks: list[Shape]


@cache
def layout(shapes: tuple[tuple[int, ...], ...], parts: tuple[int, ...]) -> Layout:
    """Where parameters of these shapes stand in the flat tensor."""
    sizes = [size_of(shape, n) for shape, n in zip(shapes, parts, strict=True)]
    sides = [(min(rows, cols), max(rows, cols)) for _, rows, cols in sizes]
    cost = [short * short * (2 * long + short) for short, long in sides]
    order = sorted(range(len(sizes)), key=lambda i: (cost[i], sides[i]), reverse=True)
    begins, stacks, end = [0] * len(sizes), [], 0
    for i in order:
        matrices = sizes[i][0]
        begins[i], end = end, end + math.prod(sizes[i])
        together = matrices + (stacks.pop()[0] if stacks and stacks[-1][1:] == sides[i] else 0)
        stacks.append((together, *sides[i]))
    return Layout(order, sizes, begins, [_length(rows, cols) for _, rows, cols in sizes], stacks)


def _layout_of(params: Sequence[Tensor], parts: Sequence[int]) -> Layout:
    return layout(tuple(tuple(w.shape) for w in params), tuple(parts))


def _muon_cpu(
    params, grads, momenta, parts, lr, weight_decay, momentum, clip_scale, device_clip_scale, lr_scale, device_lr_scale, dtype
) -> None:  # fmt: skip
    clip_scale, rate = or_number(clip_scale, device_clip_scale), lr * or_number(lr_scale, device_lr_scale)
    if device_clip_scale is not None and not math.isfinite(clip_scale):
        return
    order, sizes, _, lengths, _ = _layout_of(params, parts)
    grads = [None if g is None else g.contiguous() for g in grads]
    native.products().muon(
        [params[i].data_ptr() for i in order], [0 if grads[i] is None else grads[i].data_ptr() for i in order],
        [momenta[i].data_ptr() for i in order], [size for i in order for size in sizes[i]],
        [rate * lengths[i] for i in order], 1 - rate * weight_decay, momentum, clip_scale, A, B, C, EPS, ITERATIONS,
        torch.get_num_threads(),
    )  # fmt: skip


def _muon_cuda(
    params, grads, momenta, parts, lr, weight_decay, momentum, clip_scale, device_clip_scale, lr_scale, device_lr_scale, dtype
) -> None:  # fmt: skip
    _, sizes, begins, lengths, stacks = _layout_of(params, parts)
    grads = [None if g is None else g.contiguous() for g in grads]
    table = triton.launcher("muon", "table_for")(params, grads, momenta, sizes, begins, lengths)
    like = params[0].new_empty(0, dtype=dtype)
    choose("newton_schulz", like, not_triton=too_large(like, stacks))  # raises, if it does, before anything is changed
    update = triton.launcher("muon", "momentum")(table, momentum, clip_scale, device_clip_scale, dtype)
    direction = newton_schulz(update, stacks)  # of large matrices PyTorch's, said aloud
    triton.launcher("muon", "apply")(table, direction, lr, lr_scale, device_lr_scale, weight_decay, device_clip_scale)


define(
    "muon(Tensor(a!)[] params, Tensor?[] grads, Tensor(b!)[] momenta, int[] parts, float lr, float weight_decay,"
    " float momentum, float clip_scale, Tensor? device_clip_scale, float lr_scale, Tensor? device_lr_scale,"
    " ScalarType dtype) -> ()",
    cpu=_muon_cpu,
    fake=lambda *_: None,
    cuda=_muon_cuda,
)
