"""What stands before the attention of a layer, at once: norm, queries, and keys and values out of the latent (DeepSeek-V3, arXiv
2412.19437, equations 1 to 9, without a latent of the queries).

    h = delta + residual                  x = norm(h)
    q_nope, q_rope = x q^T by heads       latent, k_rope = x kv_a^T             both rope parts turned by the token's position
    k_nope, v      = norm(latent) kv_b^T by heads

N tokens, D model width, H heads, R latent rank, Dn / Dr / Dv widths of plain key, rotary key and value, P positions.

As operators these are 6 launches on a GPU and 12 backward, more where cuBLAS splits a product, each of which takes a microsecond
or two beside its work. Where a model is narrow, so that a tile and what it is multiplied by fit into one program, they are 1 and
4, of which the layers before wait for one (dsfast.ops.narrow): the model calls it where `projects_at_once` says that the GPU's
kernel takes it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from dsfast.ops import triton
from dsfast.ops.library import autograd, define, expect_dtype, expect_shape
from dsfast.ops.narrow import at_once
from dsfast.ops.rms_norm import rms_norm_reference
from dsfast.ops.rope import rope_reference
from dsfast.triton_kernels.launch import padded

INSTEAD_OF = ("rms_norm", "rope", "mla_attention")
"""The operators whose choice it follows: it runs where all of them run as Triton kernels."""

WIDEST = {"D": 128, "R": 32, "H Dn": 128, "H Dr": 64, "H Dv": 128}
"""What one program takes, each width and H rounded up to a power of two and widths to at least 16."""


def mla_project_reference(
    delta, residual, norm, eps, q, kv_a, latent_norm, latent_eps, kv_b, heads, cos, sin, positions
):
    h, (r, dn, dr, dv) = delta if residual is None else delta + residual, _widths(q, latent_norm, kv_b, heads, cos)
    x = rms_norm_reference(h, norm, eps)
    q_nope, q_rope = linear(x, q).unflatten(-1, (heads, -1)).split([dn, dr], dim=-1)
    latent, k_rope = linear(x, kv_a).split([r, dr], dim=-1)
    latent = rms_norm_reference(latent, latent_norm, latent_eps)
    k_nope, v = linear(latent, kv_b).unflatten(-1, (heads, -1)).split([dn, dv], dim=-1)
    k_rope = rope_reference(k_rope.unsqueeze(1), cos, sin, positions).expand(-1, heads, -1)
    return h, q_nope, rope_reference(q_rope, cos, sin, positions), k_nope, k_rope, v


def mla_project(
    delta: Tensor, residual: Tensor | None, norm: Tensor, eps: float, q: Tensor, kv_a: Tensor, latent_norm: Tensor,
    latent_eps: float, kv_b: Tensor, heads: int, cos: Tensor, sin: Tensor, positions: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> h [N, D] and what `mla_attention` takes: q_nope [N, H, Dn], q_rope [N, H, Dr], k_nope [N, H, Dn], k_rope, one for all
    heads, expanded to [N, H, Dr], v [N, H, Dv].

    delta [N, D], residual [N, D] (None counts as 0), norm [D], q [H (Dn + Dr), D], kv_a [R + Dr, D], latent_norm [R],
    kv_b [H (Dn + Dv), R], heads H, cos and sin [P, Dr / 2] (no gradient), positions [N] int64 in 0..P-1. A position that is none
    makes NaN of its token's rope parts on a GPU, elsewhere PyTorch raises IndexError. ValueError for other shapes, TypeError for
    mixed dtypes or devices. In plain PyTorch where `projects_at_once` says no.
    """
    weights = q, kv_a, latent_norm, kv_b
    _check(delta, residual, norm, *weights, heads, cos, sin, positions)
    arguments = delta, residual, norm, eps, q, kv_a, latent_norm, latent_eps, kv_b, heads, cos, sin, positions
    if not projects_at_once(delta, *weights, heads, cos):
        return mla_project_reference(*arguments)
    return torch.ops.dsfast.mla_project(*arguments)


def projects_at_once(
    delta: Tensor, q: Tensor, kv_a: Tensor, latent_norm: Tensor, kv_b: Tensor, heads: int, cos: Tensor
) -> bool:
    """Whether `mla_project` takes such arguments, which are to fit together, in one launch (dsfast.ops.narrow)."""
    r, dn, dr, dv = _widths(q, latent_norm, kv_b, heads, cos)
    h, (d, r, dn, dr, dv) = 1 << (heads - 1).bit_length(), map(padded, (kv_a.size(1), r, dn, dr, dv))
    widths = {"D": d, "R": r, "H Dn": h * dn, "H Dr": h * dr, "H Dv": h * dv}
    return at_once(delta, widths, WIDEST, INSTEAD_OF)


def _widths(q: Tensor, latent_norm: Tensor, kv_b: Tensor, heads: int, cos: Tensor) -> tuple[int, int, int, int]:
    """R, Dn, Dr, Dv."""
    dr = 2 * cos.size(1)
    dn = q.size(0) // heads - dr
    return latent_norm.size(0), dn, dr, kv_b.size(0) // heads - dn


def _check(delta, residual, norm, q, kv_a, latent_norm, kv_b, heads, cos, sin, positions) -> None:
    expect_shape("mla_project", "delta", delta, "N", "D")
    expect_shape("mla_project", "norm", norm, delta.size(1))
    expect_shape("mla_project", "latent_norm", latent_norm, "R")
    expect_shape("mla_project", "cos", cos, "P", "Dr / 2")
    expect_shape("mla_project", "sin", sin, *cos.shape)
    expect_shape("mla_project", "positions", positions, delta.size(0))
    expect_shape("mla_project", "q", q, "H (Dn + Dr)", delta.size(1))
    expect_shape("mla_project", "kv_b", kv_b, "H (Dn + Dv)", latent_norm.size(0))
    if heads < 1:
        raise ValueError(f"mla_project: heads must be from 1 on, got {heads}")
    r, dn, dr, dv = _widths(q, latent_norm, kv_b, heads, cos)
    expect_shape("mla_project", "kv_a", kv_a, r + dr, delta.size(1))
    if min(dn, dr, dv) < 1 or q.size(0) % heads or kv_b.size(0) % heads:
        raise ValueError(
            f"mla_project: the rows of q, {q.size(0)}, must be {heads} heads of Dn + {dr}, those of kv_b, {kv_b.size(0)}, "
            f"{heads} heads of Dn + Dv"
        )
    if residual is not None:
        expect_shape("mla_project", "residual", residual, *delta.shape)
    tensors = {"norm": norm, "q": q, "kv_a": kv_a, "latent_norm": latent_norm, "kv_b": kv_b, "cos": cos, "sin": sin}
    expect_dtype("mla_project", delta.dtype, delta.device, residual=residual, **tensors)
    expect_dtype("mla_project", torch.int64, delta.device, positions=positions)


def _shapes(h: Tensor, q: Tensor, latent_norm: Tensor, kv_b: Tensor, heads: int, cos: Tensor) -> list[tuple[int, ...]]:
    """The shapes of q_nope, q_rope, k_nope, k_rope and v."""
    n, (_, dn, dr, dv) = h.size(0), _widths(q, latent_norm, kv_b, heads, cos)
    return [(n, heads, dn), (n, heads, dr), (n, heads, dn), (n, heads, dr), (n, heads, dv)]


def _fake(delta, residual, norm, eps, q, kv_a, latent_norm, latent_eps, kv_b, heads, cos, sin, positions):
    shapes = [tuple(delta.shape), *_shapes(delta, q, latent_norm, kv_b, heads, cos)]
    h, q_nope, q_rope, k_nope, k_rope, v = (delta.new_empty(shape) for shape in shapes)
    return h, q_nope, q_rope, k_nope, k_rope[:, :1].contiguous().expand(k_rope.shape), v


def _backward_fake(
    dh, dq_nope, dq_rope, dk_nope, dk_rope, dv, h, norm, eps, q, kv_a, latent_norm, latent_eps, kv_b, *_
):
    return h.new_empty(h.shape), h.new_empty(sum(w.numel() for w in (q, kv_a, kv_b, latent_norm, norm)))


def _setup_context(ctx, inputs, output):
    _, residual, norm, ctx.eps, q, kv_a, latent_norm, ctx.latent_eps, kv_b, ctx.heads, cos, sin, positions = inputs
    ctx.save_for_backward(output[0], norm, q, kv_a, latent_norm, kv_b, cos, sin, positions)
    ctx.has_residual = residual is not None
    ctx.set_materialize_grads(False)


def _backward(ctx, dh, *gradients):
    h, norm, q, kv_a, latent_norm, kv_b, cos, sin, positions = ctx.saved_tensors
    shapes = _shapes(h, q, latent_norm, kv_b, ctx.heads, cos)
    gradients = (h.new_zeros(s) if g is None else g for g, s in zip(gradients, shapes, strict=True))
    weights = q, kv_a, kv_b, latent_norm, norm
    dx, dweights = torch.ops.dsfast.mla_project_backward(
        dh, *gradients, h, norm, ctx.eps, q, kv_a, latent_norm, ctx.latent_eps, kv_b, ctx.heads, cos, sin, positions
    )
    parts = dweights.split([weight.numel() for weight in weights])
    dq, dkv_a, dkv_b, dlatent_norm, dnorm = (part.view_as(w) for part, w in zip(parts, weights, strict=True))
    dresidual = dx if ctx.has_residual else None
    return dx, dresidual, dnorm, None, dq, dkv_a, dlatent_norm, None, dkv_b, None, None, None, None


_SHARED = (
    "Tensor norm, float eps, Tensor q, Tensor kv_a, Tensor latent_norm, float latent_eps, Tensor kv_b, int heads, Tensor cos,"
    " Tensor sin, Tensor positions"
)
define(
    f"mla_project(Tensor delta, Tensor? residual, {_SHARED}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=None,
    fake=_fake,
    cuda=triton.launcher("mla_project", "forward"),
)
define(
    "mla_project_backward(Tensor? dh, Tensor dq_nope, Tensor dq_rope, Tensor dk_nope, Tensor dk_rope, Tensor dv, Tensor h,"
    f" {_SHARED}) -> (Tensor, Tensor)",
    cpu=None,
    fake=_backward_fake,
    cuda=triton.launcher("mla_project", "backward"),
)
autograd("mla_project", _backward, _setup_context)
