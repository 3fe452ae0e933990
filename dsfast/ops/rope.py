"""Rotary position embedding on interleaved pairs (Su et al. 2021, arXiv 2104.09864, section 3.4.2).

    y[2i]     = x[2i] cos[p, i] - x[2i+1] sin[p, i]
    y[2i + 1] = x[2i] sin[p, i] + x[2i+1] cos[p, i]         p the token's position

N tokens, H heads, Dr rotary width (even), P positions in the tables; Dn, R widths of what is not turned.
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
    refuse_derivative,
    wants_gradients,
)
from dsfast.triton_kernels.limits import ROPE_WIDEST


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    cos, sin = cos[positions, None], sin[positions, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """x [N, H, Dr], cos and sin [P, Dr/2] (no gradient), positions [N] int64 in 0..P-1 -> [N, H, Dr], contiguous.

    A position outside 0..P-1 is a ValueError on a CPU; on a GPU, which is not waited for, that token becomes NaN. Raises
    ValueError for other shapes or an odd Dr, TypeError for mixed dtypes or devices.
    """
    _check(x, cos, sin, positions)
    if choose("rope", x, not_triton=_not_triton(x.size(2))) == "reference":
        expect_range("rope", "positions", positions, cos.size(0))
        return rope_reference(x, cos, sin, positions)
    return torch.ops.dsfast.rope(x, cos, sin, positions, False)


def rope_(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """`rope` in the memory of x, which is returned: for inference, without a gradient.

    Tokens and heads of x may lie anywhere, its pairs side by side. Errors as `rope`, and ValueError where they do not, where
    tokens or heads are expanded, all in one place, and where a gradient of x is wanted.
    """
    _check(x, cos, sin, positions)
    shared = any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True))
    if shared or (x.size(2) and x.stride(2) != 1):
        raise ValueError(f"rope_: x must have memory of its own and pairs side by side, got strides {list(x.stride())}")
    if wants_gradients(x):
        raise ValueError("rope_: a gradient of x is wanted; use rope, or torch.no_grad()")
    if choose("rope", x, not_triton=_not_triton(x.size(2))) == "reference":
        expect_range("rope", "positions", positions, cos.size(0))
        return x.copy_(rope_reference(x, cos, sin, positions))
    torch.ops.dsfast.rope_(x, cos, sin, positions)
    _note_written(x)
    return x


def _note_written(*tensors: Tensor) -> None:
    """Tell autograd, which does not see what the kernels write, that what it may have saved of them is gone."""
    if not torch.compiler.is_compiling():  # which sees it
        torch.autograd.graph.increment_version([x for x in tensors if not x.is_inference()])


def _not_triton(dr: int) -> str:
    """Why the Triton kernels do not take pairs of that width, or ""."""
    return "" if dr <= ROPE_WIDEST else f"the Triton kernel takes Dr up to {ROPE_WIDEST}, got {dr}"


def _check(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    expect_shape("rope", "x", x, "N", "H", "Dr")
    if x.size(2) % 2:
        raise ValueError(f"rope: the last dimension of x holds pairs and must be even, got {x.size(2)}")
    expect_shape("rope", "cos", cos, "P", x.size(2) // 2)
    expect_shape("rope", "sin", sin, *cos.shape)
    expect_shape("rope", "positions", positions, x.size(0))
    expect_dtype("rope", x.dtype, x.device, cos=cos, sin=sin)
    expect_dtype("rope", torch.int64, x.device, positions=positions)


def split_and_turn(
    q: Tensor, kv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, in_place: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [N, H, Dn + Dr], kv [N, R + Dr], the others as `rope` -> q_nope [N, H, Dn], q_rope [N, H, Dr], latent [N, R], k_rope
    [N, Dr]: the first of each pair as it is (a view), the second turned, k_rope as one head.

    in_place: nobody else needs q and kv, which are contiguous; where no gradient is wanted, what is turned replaces what was.
    On a GPU one launch, and one in the backward pass, which makes the gradients of q and kv whole. Errors as `rope`.
    """
    in_place = in_place and not wants_gradients(q, kv)
    dr = 2 * cos.size(-1)
    expect_shape("rope", "q", q, "N", "H", "Dn + Dr")
    expect_shape("rope", "kv", kv, q.size(0), "R + Dr")
    expect_dtype("rope", q.dtype, q.device, kv=kv)
    for argument, x in (("q", q), ("kv", kv)):
        if x.size(-1) < dr:
            raise ValueError(f"rope: {argument} must have rows of at least Dr = {dr} columns, got {x.size(-1)}")
    (q_nope, q_rope), (latent, k_rope) = _parts(dr, q, kv)
    if choose("rope", q, not_triton=_not_triton(dr)) != "triton" or not q_rope.numel():
        turn = rope_ if in_place else rope
        k_rope = turn(k_rope.unsqueeze(1), cos, sin, positions).squeeze(1)
        return q_nope, turn(q_rope, cos, sin, positions), latent, k_rope
    _check(q_rope, cos, sin, positions)
    if not in_place:
        return _SplitAndTurn.apply(q, kv, cos, sin, positions)
    torch.ops.dsfast.rope_pair_(q_rope, k_rope, cos, sin, positions)
    _note_written(q_rope, k_rope)
    return q_nope, q_rope, latent, k_rope


def _parts(dr: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Each tensor's columns that are not turned, and its last `dr`, which are."""
    return [x.split([x.size(-1) - dr, dr], -1) for x in tensors]


class _SplitAndTurn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, kv, cos, sin, positions):
        dr = 2 * cos.size(1)
        (q_nope, q_rope), (latent, k_rope) = _parts(dr, q.detach(), kv.detach())
        ctx.save_for_backward(cos, sin, positions)
        q_rope, k_rope = torch.ops.dsfast.rope_pair(q_rope, k_rope, cos, sin, positions)
        return q_nope, q_rope, latent, k_rope

    @staticmethod
    def backward(ctx, *gradients):
        return *torch.ops.dsfast.rope_pair_backward(*gradients, *ctx.saved_tensors), None, None, None


def _cpu(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, inverse: bool) -> Tensor:
    y = x.new_empty(x.shape)
    _turn(x if x.stride(2) == 1 else x.contiguous(), cos, sin, positions, y, inverse)
    return y


def _turn(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, y: Tensor, inverse: bool) -> None:
    """x into y, which may be x; ValueError, and nothing written, for a position out of range."""
    cos, sin, positions = cos.contiguous(), sin.contiguous(), positions.contiguous()
    bad = native.module().rope(
        x.data_ptr(), x.stride(0), x.stride(1), cos.data_ptr(), sin.data_ptr(), positions.data_ptr(), y.data_ptr(),
        y.stride(0), y.stride(1), *x.shape, cos.size(0), inverse, torch.get_num_threads(),
    )  # fmt: skip
    raise_out_of_range("rope", "positions", bad, x.size(0), cos.size(0))


def _setup_context(ctx, inputs, output):
    _, cos, sin, positions, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx, dy):
    # A rotation's transpose is the rotation back.
    return torch.ops.dsfast.rope(dy, *ctx.saved_tensors, not ctx.inverse), None, None, None, None


define(
    "rope(Tensor x, Tensor cos, Tensor sin, Tensor positions, bool inverse) -> Tensor",
    cpu=_cpu,
    fake=lambda x, cos, sin, positions, inverse: x.new_empty(x.shape),
    cuda=triton.launcher("rope", "rope"),
)
autograd("rope", _backward, _setup_context)

define(
    "rope_(Tensor(a!) x, Tensor cos, Tensor sin, Tensor positions) -> ()",
    cpu=lambda x, cos, sin, positions: _turn(x, cos, sin, positions, x, False),
    fake=lambda *_: None,
    cuda=triton.launcher("rope", "rope_"),
)
define(
    "rope_pair_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, Tensor positions) -> ()",
    cpu=None,
    fake=lambda *_: None,
    cuda=triton.launcher("rope", "pair_"),
)
define(
    "rope_pair(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor positions) -> (Tensor, Tensor)",
    cpu=None,
    fake=lambda q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)),
    cuda=triton.launcher("rope", "pair"),
)
define(
    "rope_pair_backward(Tensor dq_plain, Tensor dq, Tensor dk_plain, Tensor dk, Tensor cos, Tensor sin, Tensor positions)"
    " -> (Tensor, Tensor)",
    cpu=None,
    fake=lambda dq_plain, dq, dk_plain, dk, *_: (torch.cat((dq_plain, dq), -1), torch.cat((dk_plain, dk), -1)),
    cuda=triton.launcher("rope", "pair_backward"),
)
refuse_derivative("rope_pair")
refuse_derivative("rope_pair_backward")
