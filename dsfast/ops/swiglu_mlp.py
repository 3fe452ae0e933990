"""The gated MLP of dense layers and shared experts (Shazeer 2020, arXiv 2002.05202).

    y = (silu(x gate^T) * (x up^T)) down^T,    gate_up = [gate; up]

N tokens, D model width, I intermediate width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsfast.ops import native, triton
from dsfast.ops.dispatch import choose
from dsfast.ops.library import autograd, define, expect_dtype, expect_shape, rows


def swiglu_mlp_reference(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ down.T


def swiglu_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """x [N, D], gate_up [2I, D], down [D, I] -> [N, D].

    Raises ValueError for other shapes, TypeError for mixed dtypes or devices.
    """
    expect_shape("swiglu_mlp", "x", x, "N", "D")
    expect_shape("swiglu_mlp", "down", down, x.size(1), "I")
    expect_shape("swiglu_mlp", "gate_up", gate_up, 2 * down.size(1), x.size(1))
    expect_dtype("swiglu_mlp", x.dtype, x.device, gate_up=gate_up, down=down)
    if choose("swiglu_mlp", x, not_triton=not_triton(down)) == "reference":
        return swiglu_mlp_reference(x, gate_up, down)
    return torch.ops.dsfast.swiglu_mlp(x, gate_up, down)[0]


def not_triton(down: Tensor) -> str:
    """Why the Triton kernels do not take an MLP, or experts, with such a `down` [..., I], or ""."""
    return "" if down.size(-1) else "the Triton kernels take I from 1 on, got 0"


def _forward_cpu(x, gate_up, down):
    x, gate_up, down = rows(x), gate_up.contiguous(), down.contiguous()
    (n, d), i = x.shape, down.size(1)
    y, gu = x.new_empty(n, d), x.new_empty(n, 2 * i)
    native.products().swiglu_mlp_forward(
        x.data_ptr(), x.stride(0), gate_up.data_ptr(), down.data_ptr(), y.data_ptr(), gu.data_ptr(), n, d, i,
        torch.get_num_threads(),
    )  # fmt: skip
    return y, gu


def _backward_cpu(dy, x, gate_up, down, gu):
    dy, x, gate_up, down = rows(dy), rows(x), gate_up.contiguous(), down.contiguous()
    (n, d), i = x.shape, down.size(1)
    gradients = tuple(t.new_empty(t.shape) for t in (x, gate_up, down))
    native.products().swiglu_mlp_backward(
        dy.data_ptr(), dy.stride(0), x.data_ptr(), x.stride(0), gate_up.data_ptr(), down.data_ptr(), gu.data_ptr(),
        *(g.data_ptr() for g in gradients), n, d, i, torch.get_num_threads(),
    )  # fmt: skip
    return gradients


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, _):
    return torch.ops.dsfast.swiglu_mlp_backward(dy, *ctx.saved_tensors)


define(
    "swiglu_mlp(Tensor x, Tensor gate_up, Tensor down) -> (Tensor, Tensor)",
    cpu=_forward_cpu,
    fake=lambda x, gate_up, down: (x.new_empty(x.shape), x.new_empty(x.size(0), gate_up.size(0))),
    cuda=triton.launcher("swiglu_mlp", "forward"),
)
define(
    "swiglu_mlp_backward(Tensor dy, Tensor x, Tensor gate_up, Tensor down, Tensor gu) -> (Tensor, Tensor, Tensor)",
    cpu=_backward_cpu,
    fake=lambda dy, x, gate_up, down, gu: tuple(t.new_empty(t.shape) for t in (x, gate_up, down)),
    cuda=triton.launcher("swiglu_mlp", "backward"),
)
autograd("swiglu_mlp", _backward, _setup_context)
