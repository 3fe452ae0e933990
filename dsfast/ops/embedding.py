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
    expect_shape("embedding", "input_ids", input_ids, "N")
    expect_shape("embedding", "table", table, "V", "R")
    if projection is not None:
        expect_shape("embedding", "projection", projection, table.size(1), "D")
    expect_dtype("embedding", torch.int64, table.device, input_ids=input_ids)
    expect_dtype("embedding", table.dtype, table.device, projection=projection)
    if choose("embedding", table) == "reference":
        expect_range("embedding", "input_ids", input_ids, table.size(0))
        return embedding_reference(input_ids, table, projection)
    return torch.ops.dsfast.embedding(input_ids, table, projection, wants_gradients(table, projection))[0]


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


def _backward_cpu(dy: Tensor, input_ids: Tensor, table: Tensor, projection: Tensor | None, *kept: Tensor):
    dy, input_ids, table = rows(dy), input_ids.contiguous(), rows(table)
    projection = None if projection is None else projection.contiguous()
    dtable, dprojection = _backward_fake(dy, input_ids, table, projection)
    native.products().embedding_backward(
        dy.data_ptr(), dy.stride(0), input_ids.data_ptr(), table.data_ptr(), table.stride(0),
        0 if projection is None else projection.data_ptr(), dtable.data_ptr(), dprojection.data_ptr(),
        input_ids.size(0), *table.shape, _width(table, projection), torch.get_num_threads(),
    )  # fmt: skip
    return dtable, dprojection


def _backward_fake(dy, input_ids, table, projection, *kept):
    dprojection = table.new_empty(0, 0) if projection is None else projection.new_empty(projection.shape)
    return table.new_empty(table.shape), dprojection


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, *_):
    saved = ctx.saved_tensors  # once: checkpointing unpacks them
    dtable, dprojection = torch.ops.dsfast.embedding_backward(dy, *saved)
    return None, dtable, None if saved[2] is None else dprojection, None


define(
    "embedding(Tensor input_ids, Tensor table, Tensor? projection, bool with_grads)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_forward_cpu,
    fake=_forward_fake,
    cuda=triton.launcher("embedding", "forward"),
)
define(
    "embedding_backward(Tensor dy, Tensor input_ids, Tensor table, Tensor? projection, Tensor keys, Tensor order,"
    " Tensor starts) -> (Tensor, Tensor)",
    cpu=_backward_cpu,
    fake=_backward_fake,
    cuda=triton.launcher("embedding", "backward"),
)
autograd("embedding", _backward, _setup_context)
