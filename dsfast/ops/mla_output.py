"""What stands behind the attention of a layer, at once: its projection, the residual addition and the norm that comes next
(DeepSeek-V3, arXiv 2412.19437, equation 11).

    h = residual + values o^T             y = norm(h)

N tokens, D model width, H heads of values of width Dv.

As operators these are 2 launches on a GPU and 4 backward, more where cuBLAS splits a product, each of which takes a microsecond
or two beside its work. Where a model is narrow they are 1 and 4, of which the layers before wait for one (dsfast.ops.narrow): the
model calls it where `outputs_at_once` says that the GPU's kernel takes it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from dsfast.ops import triton
from dsfast.ops.library import autograd, define, expect_dtype, expect_shape
from dsfast.ops.narrow import at_once
from dsfast.ops.rms_norm import expect_uses, rms_norm_reference
from dsfast.triton_kernels.launch import padded

INSTEAD_OF = ("rms_norm", "mla_attention")
"""The operators whose choice it follows: it runs where both run as Triton kernels."""

WIDEST = {"D": 128, "H Dv": 128}
"""What one program takes, each width rounded up to a power of two and to at least 16."""


def mla_output_reference(
    values: Tensor, o: Tensor, residual: Tensor, norm: Tensor, eps: float, uses: int
) -> tuple[Tensor, ...]:
    y, h = rms_norm_reference(linear(values, o), norm, eps, residual)
    return *[y] * uses, h


def mla_output(
    values: Tensor, o: Tensor, residual: Tensor, norm: Tensor, eps: float, uses: int = 1
) -> tuple[Tensor, ...]:
    """values [N, H Dv], o [D, H Dv], residual [N, D], norm [D] -> y [N, D] `uses` times, then h [N, D].

    y is one memory with one gradient for each that reads it, as in `stream_norm`. ValueError for other shapes and for `uses` not
    in 1 .. 3, TypeError for mixed dtypes or devices. In plain PyTorch where `outputs_at_once` says no.
    """
    expect_uses("mla_output", uses)
    expect_shape("mla_output", "values", values, "N", "H Dv")
    expect_shape("mla_output", "o", o, "D", values.size(1))
    expect_shape("mla_output", "residual", residual, values.size(0), o.size(0))
    expect_shape("mla_output", "norm", norm, o.size(0))
    expect_dtype("mla_output", values.dtype, values.device, o=o, residual=residual, norm=norm)
    if not outputs_at_once(values, o):
        return mla_output_reference(values, o, residual, norm, eps, uses)
    return ForEachUse.apply(values, o, residual, norm, eps, uses)


def outputs_at_once(values: Tensor, o: Tensor) -> bool:
    """Whether `mla_output` takes such arguments, which are to fit together, in one launch (dsfast.ops.narrow)."""
    d, c = o.shape
    return at_once(values, {"D": padded(d), "H Dv": padded(c)}, WIDEST, INSTEAD_OF)


def _fake(values, o, residual, norm, eps):
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape)


def _backward_fake(dys, dh, h, values, o, norm, eps):
    return h.new_empty(h.shape), h.new_empty(values.shape), h.new_empty(o.numel() + norm.numel())


def _setup_context(ctx, inputs, output):
    values, o, _, norm, ctx.eps = inputs
    ctx.save_for_backward(output[1], values, o, norm)
    ctx.set_materialize_grads(False)


def _backward(ctx, *gradients):
    *dys, dh = gradients
    h, values, o, norm = ctx.saved_tensors
    dys = [dy for dy in dys if dy is not None] or [torch.zeros_like(h)]
    dx, dvalues, dweights = torch.ops.dsfast.mla_output_backward(dys, dh, h, values, o, norm, ctx.eps)
    do, dnorm = dweights.split([o.numel(), norm.numel()])
    return dvalues, do.view_as(o), dx, dnorm, None


class ForEachUse(torch.autograd.Function):
    """`mla_output`, unchecked and by the kernel."""

    @staticmethod
    def forward(ctx, *arguments):
        *inputs, uses = arguments
        output = y, h = torch.ops.dsfast.mla_output(*inputs)
        _setup_context(ctx, inputs, output)
        return *(y.detach() for _ in range(uses)), h

    @staticmethod
    def backward(ctx, *gradients):
        return *_backward(ctx, *gradients), None


define(
    "mla_output(Tensor values, Tensor o, Tensor residual, Tensor norm, float eps) -> (Tensor, Tensor)",
    cpu=None,
    fake=_fake,
    cuda=triton.launcher("mla_output", "forward"),
)
define(
    "mla_output_backward(Tensor[] dys, Tensor? dh, Tensor h, Tensor values, Tensor o, Tensor norm, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    cpu=None,
    fake=_backward_fake,
    cuda=triton.launcher("mla_output", "backward"),
)
autograd("mla_output", _backward, _setup_context)
