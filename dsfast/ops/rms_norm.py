"""RMSNorm, with the residual addition that comes before it in every block (Zhang & Sennrich 2019, arXiv 1910.07467).

    h = x + residual
    y = h / sqrt(mean(h^2) + eps) * weight

N tokens, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsfast.ops import native, triton
from dsfast.ops.dispatch import choose
from dsfast.ops.library import autograd, define, expect_dtype, expect_shape, rows
from dsfast.triton_kernels.limits import NORM_WIDEST

MOST_USES = 3
"""Readers of a norm's result whose gradients its backward kernel takes."""


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None):
    h = x if residual is None else x + residual
    wide = h.to(torch.promote_types(h.dtype, torch.float32))  # a mean of squares in bfloat16 would be a rough one
    y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(h.dtype) * weight
    return y if residual is None else (y, h)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """x [N, D], weight [D], residual [N, D] -> y [N, D], or (y, x + residual) where a residual is given.

    Raises ValueError for other shapes and TypeError for mixed dtypes or devices.
    """
    _check(x, weight, residual)
    if choose("rms_norm", x, not_triton=_not_triton(x)) == "reference":
        return rms_norm_reference(x, weight, eps, residual)
    y, h, _ = torch.ops.dsfast.rms_norm(x, weight, eps, residual)
    return y if residual is None else (y, h)


def stream_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, uses: int = 1
) -> tuple[Tensor, ...]:
    """As `rms_norm` -> y [N, D] `uses` times, then h = x + residual, or x itself where no residual is given.

    One memory, and one gradient for each that reads it: the backward pass reads them all, and that of h, where autograd would
    add them up one after the other. Errors as `rms_norm`, and ValueError for `uses` not in 1 .. MOST_USES.
    """
    expect_uses("rms_norm", uses)
    _check(x, weight, residual)
    if choose("rms_norm", x, not_triton=_not_triton(x)) == "reference":
        found = rms_norm_reference(x, weight, eps, residual)
        y, h = (found, x) if residual is None else found
        return *[y] * uses, h
    return _StreamNorm.apply(x, weight, eps, residual, uses)


def _not_triton(x: Tensor) -> str:
    """Why the Triton kernels do not take it, or ""."""
    d = x.size(1)
    return "" if 0 < d <= NORM_WIDEST else f"the Triton kernels take D from 1 to {NORM_WIDEST}, got {d}"


def expect_uses(operator: str, uses: int) -> None:
    """Raise ValueError for `uses` not in 1 .. MOST_USES: so many gradients the kernels read."""
    if not 1 <= uses <= MOST_USES:
        raise ValueError(f"{operator}: uses must be 1 .. {MOST_USES}, got {uses}")


def _check(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    expect_shape("rms_norm", "x", x, "N", "D")
    expect_shape("rms_norm", "weight", weight, x.size(1))
    expect_dtype("rms_norm", x.dtype, x.device, weight=weight, residual=residual)
    if residual is not None:
        expect_shape("rms_norm", "residual", residual, *x.shape)


def _forward_cpu(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None):
    x, weight = rows(x), weight.contiguous()
    n, d = x.shape
    y, rstd = x.new_empty(n, d), x.new_empty(n)
    h = x.new_empty(0 if residual is None else n, d)
    residual = None if residual is None else rows(residual)
    native.module().rms_norm_forward(
        x.data_ptr(), x.stride(0), 0 if residual is None else residual.data_ptr(),
        0 if residual is None else residual.stride(0), weight.data_ptr(), eps, y.data_ptr(), h.data_ptr(),
        rstd.data_ptr(), n, d, torch.get_num_threads(),
    )  # fmt: skip
    return y, h, rstd


def _forward_fake(x, weight, eps, residual):
    n, d = x.shape
    rstd = x.new_empty(n, dtype=torch.float32 if triton.runs_on(x) else x.dtype)
    return x.new_empty(n, d), x.new_empty(0 if residual is None else n, d), rstd


def _backward_cpu(dys: list[Tensor], dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor):
    dy, h, weight = rows(sum(dys[1:], dys[0])), rows(h), weight.contiguous()
    dh = None if dh is None else rows(dh)
    n, d = h.shape
    dx, dweight = h.new_empty(n, d), torch.empty_like(weight)
    native.module().rms_norm_backward(
        dy.data_ptr(), dy.stride(0), 0 if dh is None else dh.data_ptr(), 0 if dh is None else dh.stride(0),
        h.data_ptr(), h.stride(0), weight.data_ptr(), rstd.data_ptr(), dx.data_ptr(), dweight.data_ptr(), n, d,
        torch.get_num_threads(),
    )  # fmt: skip
    return dx, dweight


def _setup_context(ctx, inputs, output):
    x, weight, _, residual = inputs
    _, h, rstd = output
    ctx.save_for_backward(x if residual is None else h, weight, rstd)
    ctx.has_residual = residual is not None
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dh, _):
    return _gradients(ctx, [dy], dh if ctx.has_residual else None)


def _gradients(ctx, dys: list[Tensor | None], dh: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, eps and residual."""
    h, weight, rstd = ctx.saved_tensors
    dys = [dy for dy in dys if dy is not None] or [torch.zeros_like(h)]
    dx, dweight = torch.ops.dsfast.rms_norm_backward(dys, dh, h, weight, rstd)
    return dx, dweight, None, dx if ctx.has_residual else None


class _StreamNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, residual, uses):
        output = y, h, _ = torch.ops.dsfast.rms_norm(x, weight, eps, residual)
        _setup_context(ctx, (x, weight, eps, residual), output)
        return *(y.detach() for _ in range(uses)), x if residual is None else h

    @staticmethod
    def backward(ctx, *gradients):
        *dys, dh = gradients
        return *_gradients(ctx, dys[::-1], dh), None


define(
    "rms_norm(Tensor x, Tensor weight, float eps, Tensor? residual) -> (Tensor, Tensor, Tensor)",
    cpu=_forward_cpu,
    fake=_forward_fake,
    cuda=triton.launcher("rms_norm", "forward"),
)
define(
    "rms_norm_backward(Tensor[] dys, Tensor? dh, Tensor h, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    cpu=_backward_cpu,
    fake=lambda dys, dh, h, weight, rstd: (h.new_empty(h.shape), torch.empty_like(weight)),
    cuda=triton.launcher("rms_norm", "backward"),
)
autograd("rms_norm", _backward, _setup_context)
