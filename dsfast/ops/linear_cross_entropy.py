"""The output head and its loss without the logits in memory (as cut cross-entropy does: Wijmans et al. 2024, arXiv 2411.09009).

    loss = 1/M sum over the M rows whose label is not ignore_index of
        ( logsumexp(z_n) - z_n[label_n] + z_loss logsumexp(z_n)^2 ),   z_n = weight hidden_n

A factorised head has a projection before it: hidden is then [N, D], and its product with projection^T takes its place.
The last term, off by default, keeps the logits from drifting (PaLM: Chowdhery et al. 2022, arXiv 2204.02311, section 5).
N tokens, D model width, R width of the head's input, V vocabulary. Only a strip of logits for a few rows exists at any time. On a
CPU gradients are made while the strip is at hand, so that it is neither stored nor computed again; on a GPU a narrow head makes
it once more for the weight's gradient. For wide heads a GPU has strips of a gigabyte: where one holds all logits, it is kept for
the backward pass instead.
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
    wants_gradients,
)
from dsfast.triton_kernels.launch import padded

WIDEST_R, WIDEST_D, ONE_TILE = 128, 256, 128 * 128
"""R, D and numbers, all padded, of a projection that the Triton kernels take."""


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
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = -100, z_loss: float = 0.0,
    projection: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """hidden [N, R], or with a projection [R, D] hidden [N, D], weight [V, R], labels [N] int64 in 0..V-1 or ignore_index -> mean
    loss, a scalar (0 without labels).

    It is float32 where the inputs have 16 bits. The C++ kernel has no z_loss: with one, the CPU runs the reference. Raises
    ValueError for other shapes or a label out of range, TypeError for mixed dtypes or devices. On a GPU, which the host does
    not wait for, a label out of range makes the loss NaN, and with it that row of hidden's gradient and all of the others.
    """
    expect_shape("linear_cross_entropy", "hidden", hidden, "N", "R" if projection is None else "D")
    if projection is not None:
        expect_shape("linear_cross_entropy", "projection", projection, "R", hidden.size(1))
    r = hidden.size(1) if projection is None else projection.size(0)
    expect_shape("linear_cross_entropy", "weight", weight, "V", r)
    expect_shape("linear_cross_entropy", "labels", labels, hidden.size(0))
    expect_dtype("linear_cross_entropy", hidden.dtype, hidden.device, weight=weight, projection=projection)
    expect_dtype("linear_cross_entropy", torch.int64, hidden.device, labels=labels)
    not_native = "the C++ kernel has no z_loss" if z_loss else ""
    empty = f"the Triton kernels take R and V from 1 on, got {r} and {weight.size(0)}"
    chosen = choose("linear_cross_entropy", hidden, not_native, "" if weight.numel() else empty)
    if projection is not None and not (chosen == "triton" and _takes(projection)):
        hidden, projection = torch.nn.functional.linear(hidden, projection), None
    if chosen == "reference":
        expect_range("linear_cross_entropy", "labels", labels, weight.size(0), ignore_index)
        return linear_cross_entropy_reference(hidden, weight, labels, ignore_index, z_loss)
    leaves = hidden, weight, projection
    with_grads = wants_gradients(*leaves)
    return torch.ops.dsfast.linear_cross_entropy(*leaves, labels, ignore_index, with_grads, z_loss)[0]


def _takes(projection: Tensor) -> bool:
    """Whether the Triton kernels take the projection as well: in 16 bits, where a program holds all of it."""
    r, d = map(padded, projection.shape)
    return projection.dtype.itemsize == 2 and r <= WIDEST_R and d <= WIDEST_D and r * d <= ONE_TILE


def _cpu(hidden, weight, projection, labels, ignore_index, with_grads, z_loss):
    if z_loss or projection is not None:
        raise NotImplementedError("dsfast::linear_cross_entropy has no z_loss and no projection on a CPU")
    hidden, weight, labels = rows(hidden), weight.contiguous(), labels.contiguous()
    (n, r), v = hidden.shape, weight.size(0)
    loss, (dhidden, dweight) = hidden.new_empty(()), _gradients(hidden, weight, with_grads)
    bad = native.products().linear_cross_entropy(
        hidden.data_ptr(), hidden.stride(0), weight.data_ptr(), labels.data_ptr(), ignore_index, loss.data_ptr(),
        dhidden.data_ptr(), dweight.data_ptr(), n, r, v, with_grads, torch.get_num_threads(),
    )  # fmt: skip
    raise_out_of_range("linear_cross_entropy", "labels", bad, n, v, ignore_index)
    return loss, dhidden, dweight, hidden.new_empty(0, 0)


def _gradients(hidden, weight, with_grads):
    return hidden.new_empty(hidden.shape if with_grads else (0, 0)), weight.new_empty(
        weight.shape if with_grads else (0, 0)
    )


def _fake(hidden, weight, projection, labels, ignore_index, with_grads, z_loss):
    kept = triton.launcher("linear_cross_entropy", "kept") if triton.runs_on(hidden) else _gradients
    loss = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    reduced = hidden.new_empty((0, 0) if projection is None else (hidden.size(0), projection.size(0)))
    return loss, *kept(hidden if projection is None else reduced, weight, with_grads), reduced


def _setup_context(ctx, inputs, output):
    *tensors, ctx.ignore_index, _, ctx.z_loss = inputs
    ctx.save_for_backward(*output[1:], *tensors)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss, *_):
    *kept, projection, labels = ctx.saved_tensors  # once: checkpointing unpacks them
    dhidden, dweight, dprojection = torch.ops.dsfast.linear_cross_entropy_backward(
        dloss, *kept, projection, labels, ctx.ignore_index, ctx.z_loss
    )
    return dhidden, dweight, None if projection is None else dprojection, None, None, None, None


def _cpu_backward(dloss, dhidden, dweight, reduced, hidden, weight, projection, labels, ignore_index, z_loss):
    return (dloss * dhidden).to(hidden.dtype), (dloss * dweight).to(weight.dtype), hidden.new_empty(0, 0)


def _fake_backward(dloss, kept_1, kept_2, reduced, hidden, weight, projection, labels, ignore_index, z_loss):
    dprojection = hidden.new_empty((0, 0) if projection is None else projection.shape)
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape), dprojection


define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? projection, Tensor labels, int ignore_index, bool with_grads,"
    " float z_loss) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
    cuda=triton.launcher("linear_cross_entropy", "forward"),
)
define(
    "linear_cross_entropy_backward(Tensor dloss, Tensor kept_1, Tensor kept_2, Tensor reduced, Tensor hidden, Tensor weight,"
    " Tensor? projection, Tensor labels, int ignore_index, float z_loss) -> (Tensor, Tensor, Tensor)",
    cpu=_cpu_backward,
    fake=_fake_backward,
    cuda=triton.launcher("linear_cross_entropy", "backward"),
)
autograd("linear_cross_entropy", _backward, _setup_context)
