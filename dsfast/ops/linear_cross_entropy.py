"""The output head and its loss without the logits in memory (as cut cross-entropy does: Wijmans et al. 2024, arXiv 2411.09009).

    loss = 1/M sum over the M rows whose label is not ignore_index of
        ( logsumexp(z_n) - z_n[label_n] + z_loss logsumexp(z_n)^2 ),   z_n = weight hidden_n

The last term, off by default, keeps the logits from drifting (PaLM: Chowdhery et al. 2022, arXiv 2204.02311, section 5).
N tokens, R width of the head's input, V vocabulary. Only a strip of logits for a few rows exists at any time; where
gradients are wanted they are made while the strip is at hand, so that it is neither stored nor computed again. For wide heads a
GPU has strips of a gigabyte: where one holds all logits, it is kept for the backward pass instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsfast.ops import native, triton
from dsfast.ops.dispatch import choose
from dsfast.ops.library import (
    autograd,
    define,
    expect_dtype,
    expect_range,
    expect_shape,
    raise_out_of_range,
    rows,
)


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = -100, z_loss: float = 0.0
) -> Tensor:
    logits = hidden @ weight.T
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))  # sums over thousands of words
    total = torch.nn.functional.cross_entropy(wide, labels, ignore_index=ignore_index, reduction="sum")
    counted = labels != ignore_index
    if z_loss:
        total = total + z_loss * torch.where(counted, wide.logsumexp(1).square(), 0.0).sum()
    return total / counted.sum().clamp(min=1)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = -100, z_loss: float = 0.0
) -> Tensor:
    """hidden [N, R], weight [V, R], labels [N] int64 in 0..V-1 or ignore_index -> mean loss, a scalar (0 without labels).

    It is float32 where the inputs have 16 bits. The C++ kernel has no z_loss: with one, the CPU runs the reference. Raises
    ValueError for other shapes or a label out of range, TypeError for mixed dtypes or devices. On a GPU, which the host does
    not wait for, a label out of range makes the loss NaN, and with it that row of hidden's gradient and all of weight's.
    """
    expect_shape("linear_cross_entropy", "hidden", hidden, "N", "R")
    expect_shape("linear_cross_entropy", "weight", weight, "V", hidden.size(1))
    expect_shape("linear_cross_entropy", "labels", labels, hidden.size(0))
    expect_dtype("linear_cross_entropy", hidden.dtype, hidden.device, weight=weight)
    expect_dtype("linear_cross_entropy", torch.int64, hidden.device, labels=labels)
    not_native = "the C++ kernel has no z_loss" if z_loss else ""
    empty = f"the Triton kernels take R and V from 1 on, got {hidden.size(1)} and {weight.size(0)}"
    if choose("linear_cross_entropy", hidden, not_native, "" if weight.numel() else empty) == "reference":
        expect_range("linear_cross_entropy", "labels", labels, weight.size(0), ignore_index)
        return linear_cross_entropy_reference(hidden, weight, labels, ignore_index, z_loss)
    with_grads = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return torch.ops.dsfast.linear_cross_entropy(hidden, weight, labels, ignore_index, with_grads, z_loss)[0]


def _cpu(hidden, weight, labels, ignore_index, with_grads, z_loss):
    if z_loss:
        raise NotImplementedError("dsfast::linear_cross_entropy has no z_loss on a CPU; ops.use('reference') has")
    hidden, weight, labels = rows(hidden), weight.contiguous(), labels.contiguous()
    (n, r), v = hidden.shape, weight.size(0)
    loss, (dhidden, dweight) = hidden.new_empty(()), _gradients(hidden, weight, with_grads)
    bad = native.products().linear_cross_entropy(
        hidden.data_ptr(), hidden.stride(0), weight.data_ptr(), labels.data_ptr(), ignore_index, loss.data_ptr(),
        dhidden.data_ptr(), dweight.data_ptr(), n, r, v, with_grads, torch.get_num_threads(),
    )  # fmt: skip
    raise_out_of_range("linear_cross_entropy", "labels", bad, n, v, ignore_index)
    return loss, dhidden, dweight


def _gradients(hidden, weight, with_grads):
    return hidden.new_empty(hidden.shape if with_grads else (0, 0)), weight.new_empty(
        weight.shape if with_grads else (0, 0)
    )


def _fake(hidden, weight, labels, ignore_index, with_grads, z_loss):
    kept = triton.launcher("linear_cross_entropy", "kept") if triton.runs_on(hidden) else _gradients
    loss = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    return loss, *kept(hidden, weight, with_grads)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.ignore_index, _, ctx.z_loss = inputs
    ctx.save_for_backward(*output[1:], *tensors)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss, *_):
    gradients = torch.ops.dsfast.linear_cross_entropy_backward(dloss, *ctx.saved_tensors, ctx.ignore_index, ctx.z_loss)
    return *gradients, None, None, None, None


def _cpu_backward(dloss, dhidden, dweight, hidden, weight, labels, ignore_index, z_loss):
    return (dloss * dhidden).to(hidden.dtype), (dloss * dweight).to(weight.dtype)


def _fake_backward(dloss, kept_1, kept_2, hidden, weight, labels, ignore_index, z_loss):
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor labels, int ignore_index, bool with_grads, float z_loss)"
    " -> (Tensor, Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
    cuda=triton.launcher("linear_cross_entropy", "forward"),
)
define(
    "linear_cross_entropy_backward(Tensor dloss, Tensor kept_1, Tensor kept_2, Tensor hidden, Tensor weight, Tensor labels,"
    " int ignore_index, float z_loss) -> (Tensor, Tensor)",
    cpu=_cpu_backward,
    fake=_fake_backward,
    cuda=triton.launcher("linear_cross_entropy", "backward"),
)
autograd("linear_cross_entropy", _backward, _setup_context)
