"""The factorised embedding (ALBERT, arXiv 1909.11942, section 3.1): a narrow table, then a projection to the model width.

    y[n] = table[input_ids[n]] projection

N tokens, V vocabulary, R rank of the table, D model width. Without a projection it is the ordinary look-up, R = D.
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


def embedding_reference(input_ids: Tensor, table: Tensor, projection: Tensor | None) -> Tensor:
    taken = table[input_ids]
    return taken if projection is None else taken @ projection


def embedding(input_ids: Tensor, table: Tensor, projection: Tensor | None = None) -> Tensor:
    """input_ids [N] int64 in 0..V-1, table [V, R], projection [R, D] or None -> [N, D].

    Raises ValueError for other shapes or an id out of range, TypeError for mixed dtypes or devices. On a GPU, which the host
    does not wait for, an id out of range gives a row of NaN and adds nothing to the gradients.
    """
    return _embedded(_choose(input_ids, table, projection), input_ids, table, projection)


def tied_embedding(
    input_ids: Tensor, table: Tensor, projection: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `embedding` -> [N, D], and table and projection for a head that is tied to them: where the Triton kernels run, the
    backward pass adds the gradients that the head found to its own, where autograd would do it afterwards."""
    chosen = _choose(input_ids, table, projection)
    if chosen == "triton" and wants_gradients(table, projection):
        return _Tied.apply(input_ids, table, projection)
    return _embedded(chosen, input_ids, table, projection), table, projection


def _embedded(chosen: str, input_ids: Tensor, table: Tensor, projection: Tensor | None) -> Tensor:
    if chosen == "reference":
        return embedding_reference(input_ids, table, projection)
    return torch.ops.dsfast.embedding(input_ids, table, projection, wants_gradients(table, projection))[0]


def _choose(input_ids: Tensor, table: Tensor, projection: Tensor | None) -> str:
    """The implementation that takes these arguments. Errors as `embedding`."""
    expect_shape("embedding", "input_ids", input_ids, "N")
    expect_shape("embedding", "table", table, "V", "R")
    if projection is not None:
        expect_shape("embedding", "projection", projection, table.size(1), "D")
    expect_dtype("embedding", torch.int64, table.device, input_ids=input_ids)
    expect_dtype("embedding", table.dtype, table.device, projection=projection)
    refused = "the kernels take no empty projection" if projection is not None and not projection.numel() else ""
    chosen = choose("embedding", table, not_native=refused, not_triton=refused)
    if chosen == "reference":
        expect_range("embedding", "input_ids", input_ids, table.size(0))
    return chosen


def _width(table: Tensor, projection: Tensor | None) -> int:
    return table.size(1) if projection is None else projection.size(1)


def _forward_cpu(input_ids: Tensor, table: Tensor, projection: Tensor | None, with_grads: bool):
    input_ids, table = input_ids.contiguous(), rows(table)
    projection = None if projection is None else projection.contiguous()
    y = table.new_empty(input_ids.size(0), _width(table, projection))
    bad = native.products().embedding_forward(
        input_ids.data_ptr(), table.data_ptr(), table.stride(0), 0 if projection is None else projection.data_ptr(),
        y.data_ptr(), input_ids.size(0), *table.shape, y.size(1), torch.get_num_threads(),
    )  # fmt: skip
    raise_out_of_range("embedding", "input_ids", bad, input_ids.size(0), table.size(0))
    return y, *_nothing_kept(input_ids, table, with_grads)


def _nothing_kept(input_ids: Tensor, table: Tensor, with_grads: bool) -> tuple[Tensor, ...]:
    return tuple(input_ids.new_empty(0) for _ in range(3))


def _forward_fake(input_ids: Tensor, table: Tensor, projection: Tensor | None, with_grads: bool):
    kept = triton.launcher("embedding", "kept") if triton.runs_on(table) else _nothing_kept
    return table.new_empty(input_ids.size(0), _width(table, projection)), *kept(input_ids, table, with_grads)


def _backward_cpu(dy, input_ids, table, projection, keys, order, starts, head_dtable, head_dprojection):
    if head_dtable is not None or head_dprojection is not None:
        raise NotImplementedError("dsfast::embedding_backward takes no gradients of a head's on a CPU")
    dy, input_ids, table = rows(dy), input_ids.contiguous(), rows(table)
    projection = None if projection is None else projection.contiguous()
    dtable, dprojection = _backward_fake(dy, input_ids, table, projection)
    native.products().embedding_backward(
        dy.data_ptr(), dy.stride(0), input_ids.data_ptr(), table.data_ptr(), table.stride(0),
        0 if projection is None else projection.data_ptr(), dtable.data_ptr(), dprojection.data_ptr(),
        input_ids.size(0), *table.shape, _width(table, projection), torch.get_num_threads(),
    )  # fmt: skip
    return dtable, dprojection


def _backward_fake(dy, input_ids, table, projection, *kept_and_of_the_head):
    dprojection = table.new_empty(0, 0) if projection is None else projection.new_empty(projection.shape)
    return table.new_empty(table.shape), dprojection


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, *_):
    return *_gradients(ctx, dy, None, None), None


def _gradients(ctx, dy: Tensor, *of_the_head: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of input_ids, table and projection."""
    saved = ctx.saved_tensors  # once: checkpointing unpacks them
    dtable, dprojection = torch.ops.dsfast.embedding_backward(dy, *saved, *of_the_head)
    return None, dtable, None if saved[2] is None else dprojection


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        _, table, projection = inputs
        output = torch.ops.dsfast.embedding(*inputs, True)
        ctx.save_for_backward(*inputs, *output[1:])
        ctx.set_materialize_grads(False)
        return output[0], table.detach(), None if projection is None else projection.detach()

    @staticmethod
    def backward(ctx, dy, dtable, dprojection):
        return (None, dtable, dprojection) if dy is None else _gradients(ctx, dy, dtable, dprojection)


define(
    "embedding(Tensor input_ids, Tensor table, Tensor? projection, bool with_grads)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_forward_cpu,
    fake=_forward_fake,
    cuda=triton.launcher("embedding", "forward"),
)
define(
    "embedding_backward(Tensor dy, Tensor input_ids, Tensor table, Tensor? projection, Tensor keys, Tensor order,"
    " Tensor starts, Tensor? head_dtable, Tensor? head_dprojection) -> (Tensor, Tensor)",
    cpu=_backward_cpu,
    fake=_backward_fake,
    cuda=triton.launcher("embedding", "backward"),
)
autograd("embedding", _backward, _setup_context)
