"""The routed experts: gather, two grouped matrix products with SwiGLU between, weighted sum (arXiv 2412.19437, eq. 12).

    y[n] = sum_k weights[n, k] expert_{indices[n, k]}(x[n]) (+ base[n])
    expert_e(x) = (silu(x gate_e^T) * (x up_e^T)) down_e^T,    gate_up_e = [gate_e; up_e]

N tokens, D model width, K chosen experts, E experts, I intermediate width. A slot is one (token, choice) pair; slots are
worked on sorted by expert, as dsfast.ops.moe_route sorts them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsfast.ops import native, triton
from dsfast.ops.dispatch import choose
from dsfast.ops.library import autograd, define, expect_dtype, expect_range, expect_shape, rows
from dsfast.ops.moe_route import sort_slots
from dsfast.ops.swiglu_mlp import not_triton, swiglu_mlp_reference


def moe_experts_reference(x: Tensor, weights: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for e in range(gate_up.size(0)):
        token, choice = (indices == e).nonzero(as_tuple=True)
        out = swiglu_mlp_reference(x[token], gate_up[e], down[e]) * weights[token, choice, None]
        y = y.index_add(0, token, out)
    return y


def moe_experts(
    x: Tensor, weights: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor, slots: tuple[Tensor, Tensor] | None = None,
    base: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [N, D], weights [N, K], indices [N, K] int64 in 0..E-1, gate_up [E, 2I, D], down [E, D, I] -> [N, D], plus base [N, D]
    where there is one.

    slots: order [N K] and offsets [E + 1] int32, as `moe_route` gave them with these indices, which then are not looked at;
    without them the indices are sorted here. Raises ValueError for other shapes or K = 0, and on a CPU for an index out of range
    or slots that are none of these sizes; TypeError for mixed dtypes or devices.
    """
    expect_shape("moe_experts", "x", x, "N", "D")
    expect_shape("moe_experts", "weights", weights, x.size(0), "K")
    expect_shape("moe_experts", "indices", indices, *weights.shape)
    if not weights.size(1):
        raise ValueError("moe_experts: expected at least one expert for each token, got weights [N, 0]")
    expect_shape("moe_experts", "down", down, "E", x.size(1), "I")
    expect_shape("moe_experts", "gate_up", gate_up, down.size(0), 2 * down.size(2), x.size(1))
    expect_dtype("moe_experts", x.dtype, x.device, weights=weights, gate_up=gate_up, down=down, base=base)
    if base is not None:
        expect_shape("moe_experts", "base", base, *x.shape)
    expect_dtype("moe_experts", torch.int64, x.device, indices=indices)
    if slots is not None:
        order, offsets = slots
        expect_shape("moe_experts", "order", order, indices.numel())
        expect_shape("moe_experts", "offsets", offsets, down.size(0) + 1)
        expect_dtype("moe_experts", torch.int32, x.device, order=order, offsets=offsets)
    if choose("moe_experts", x, not_triton=not_triton(down)) == "reference":
        expect_range("moe_experts", "indices", indices, down.size(0))
        y = moe_experts_reference(x, weights, indices, gate_up, down)
        return y if base is None else y + base
    order, offsets = sort_slots(indices, down.size(0)) if slots is None else (s.contiguous() for s in slots)
    return torch.ops.dsfast.moe_experts(x, weights, order, offsets, gate_up, down, base)[0]


def _sizes(x, weights, down):
    return (*x.shape, weights.size(1), down.size(0), down.size(2))


def _forward_cpu(x, weights, order, offsets, gate_up, down, base):
    x, weights, gate_up, down = rows(x), weights.contiguous(), gate_up.contiguous(), down.contiguous()
    n, d, k, *_ = sizes = _sizes(x, weights, down)
    y, gu = _forward_fake(x, weights, order, offsets, gate_up, down, base)
    slots = x.new_empty(n * k if k > 1 else 0, d)
    fits = native.products().moe_experts_forward(
        x.data_ptr(), x.stride(0), weights.data_ptr(), order.data_ptr(), offsets.data_ptr(), gate_up.data_ptr(),
        down.data_ptr(), y.data_ptr(), gu.data_ptr(), slots.data_ptr(), *sizes, torch.get_num_threads(),
    )  # fmt: skip
    if not fits:
        raise ValueError(f"moe_experts: slots must be order and offsets of {n * k} slots, as moe_route gives them")
    return y if base is None else y.add_(base), gu


def _forward_fake(x, weights, order, offsets, gate_up, down, base):
    n, d, k, _, i = _sizes(x, weights, down)
    return x.new_empty(n, d), x.new_empty(n * k, 2 * i)


def _backward_cpu(dy, x, weights, gate_up, down, gu, order, offsets):
    dy, x, weights, gate_up, down = rows(dy), rows(x), weights.contiguous(), gate_up.contiguous(), down.contiguous()
    n, d, k, *_ = sizes = _sizes(x, weights, down)
    gradients = tuple(t.new_empty(t.shape) for t in (x, weights, gate_up, down))
    slots = x.new_empty(n * k if k > 1 else 0, d)
    native.products().moe_experts_backward(
        dy.data_ptr(), dy.stride(0), x.data_ptr(), x.stride(0), weights.data_ptr(), gate_up.data_ptr(), down.data_ptr(),
        gu.data_ptr(), order.data_ptr(), offsets.data_ptr(), *(g.data_ptr() for g in gradients), slots.data_ptr(),
        *sizes, torch.get_num_threads(),
    )  # fmt: skip
    return gradients


def _setup_context(ctx, inputs, output):
    x, weights, order, offsets, gate_up, down, base = inputs
    ctx.has_base = base is not None
    ctx.save_for_backward(x, weights, gate_up, down, output[1], order, offsets)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, *_):
    dx, dweights, dgate_up, ddown = torch.ops.dsfast.moe_experts_backward(dy, *ctx.saved_tensors)
    return dx, dweights, None, None, dgate_up, ddown, dy if ctx.has_base else None


define(
    "moe_experts(Tensor x, Tensor weights, Tensor order, Tensor offsets, Tensor gate_up, Tensor down, Tensor? base)"
    " -> (Tensor, Tensor)",
    cpu=_forward_cpu,
    fake=_forward_fake,
    cuda=triton.launcher("moe_experts", "forward"),
)
define(
    "moe_experts_backward(Tensor dy, Tensor x, Tensor weights, Tensor gate_up, Tensor down, Tensor gu, Tensor order,"
    " Tensor offsets) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_backward_cpu,
    fake=lambda dy, x, weights, gate_up, down, *_: tuple(t.new_empty(t.shape) for t in (x, weights, gate_up, down)),
    cuda=triton.launcher("moe_experts", "backward"),
)
autograd("moe_experts", _backward, _setup_context)
