"""Triton kernels of dsfast.ops.mla_project, whose module has the maths.

N tokens, H heads, D model width, R latent rank, Dn / Dr / Dv widths of plain key, rotary key and value, P positions; HP, DP, RP,
DNP, DRP, DVP are those padded, BN tokens make a tile.

    forward    a tile from the stream to queries, keys and values: nothing between is written. One program of a tile makes the
               queries, one beside it keys and values: each waits for its weights one after the other
    backward   a tile's gradient of the stream, and its part of that of norm. It makes what was between anew from h
    weights    a tile's parts of the gradients of the others
    sum        the gradients of the weights: sums over the tiles' parts

What the layers before wait for is the second kernel; the others run aside.

All heads are one product: the columns of a tile are HP heads of a padded width, and which row of a weight is a column's is a
matter of its address.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from dsfast.triton_kernels.launch import Launch, aside, large_tiles, on_meta, padded, rows
from dsfast.triton_kernels.narrow import (
    load_tokens,
    load_vector,
    load_weight,
    norm_backward,
    normalised,
    store_tokens,
    store_weight,
)
from dsfast.triton_kernels.pieces import opaque, options, sum_launch
from torch import Tensor


@triton.jit
def _normed(b_x, weight, start, N, eps, BN: tl.constexpr, W: tl.constexpr, WP: tl.constexpr):
    """x / rms(x) weight of b_x [BN, WP], in its dtype."""
    b_y, _ = normalised(b_x.to(tl.float32), start, N, eps, BN, W)
    return (b_y * load_vector(weight, W, WP)).to(b_x.dtype)


@triton.jit
def _angles(cos, sin, positions, start, N, P, BN: tl.constexpr, Dr: tl.constexpr, DRP: tl.constexpr):
    """cos and sin [BN, DRP / 2] of a tile's tokens; NaN for a token whose position is none."""
    n, pair = start + tl.arange(0, BN), tl.arange(0, DRP // 2)[None, :]
    b_p = tl.load(positions + n, mask=n < N, other=0)
    known = ((b_p >= 0) & (b_p < P))[:, None]
    at = tl.where(known, b_p[:, None], 0) * (Dr // 2) + pair
    b_cos = tl.load(cos + at, mask=known & (pair < Dr // 2), other=0.0).to(tl.float32)
    b_sin = tl.load(sin + at, mask=known & (pair < Dr // 2), other=0.0).to(tl.float32)
    return tl.where(known, b_cos, float("nan")), tl.where(known, b_sin, float("nan"))


@triton.jit
def _turned(b_x, b_cos, b_sin, BN: tl.constexpr, HP: tl.constexpr, DRP: tl.constexpr):
    """The pairs of b_x [BN, HP DRP] turned by a token's angles, in the dtype of b_x."""
    even, odd = tl.split(tl.reshape(b_x.to(tl.float32), [BN, HP, DRP // 2, 2]))
    b_cos, b_sin = b_cos[:, None, :], b_sin[:, None, :]
    b_y = tl.join(even * b_cos - odd * b_sin, even * b_sin + odd * b_cos)
    return tl.reshape(b_y, [BN, HP * DRP]).to(b_x.dtype)


@triton.jit(do_not_specialize=["N", "P"])
def forward_kernel(
    delta, residual, norm, q, kv_a, latent_norm, kv_b, cos, sin, positions, h, q_nope, q_rope, k_nope, k_rope, v,
    eps, latent_eps, delta_n, residual_n, N, P,
    H: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    Dn: tl.constexpr, DNP: tl.constexpr, Dr: tl.constexpr, DRP: tl.constexpr, Dv: tl.constexpr, DVP: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """h, q_nope, q_rope, k_nope, k_rope and v. Two programs for each tile of tokens, the second for keys and values. What the
    separate operators round is rounded."""
    start = tl.program_id(0) // 2 * BN
    b_h = load_tokens(delta, start, delta_n, N, BN, 1, 1, D, DP)  # [BN, DP]
    if residual is not None:
        b_h = b_h.to(tl.float32) + load_tokens(residual, start, residual_n, N, BN, 1, 1, D, DP).to(tl.float32)
        b_h = b_h.to(h.dtype.element_ty)
    b_x = _normed(b_h, norm, start, N, eps, BN, D, DP)
    b_cos, b_sin = _angles(cos, sin, positions, start, N, P, BN, Dr, DRP)
    if tl.program_id(0) % 2 == 0:
        store_tokens(h, b_h, start, N, BN, 1, 1, D, DP)
        b_q = tl.dot(b_x, tl.trans(load_weight(q, H, HP, Dn, DNP, Dn + Dr, 0, D, DP)), input_precision="ieee")
        store_tokens(q_nope, b_q, start, N, BN, H, HP, Dn, DNP)
        b_q = tl.dot(b_x, tl.trans(load_weight(q, H, HP, Dr, DRP, Dn + Dr, Dn, D, DP)), input_precision="ieee")
        store_tokens(q_rope, _turned(b_q.to(b_x.dtype), b_cos, b_sin, BN, HP, DRP), start, N, BN, H, HP, Dr, DRP)
    else:
        b_l = tl.dot(
            b_x, tl.trans(load_weight(kv_a, 1, 1, R, RP, R + Dr, 0, D, DP)), input_precision="ieee"
        )  # [BN, RP]
        b_k = tl.dot(b_x, tl.trans(load_weight(kv_a, 1, 1, Dr, DRP, R + Dr, R, D, DP)), input_precision="ieee")
        store_tokens(k_rope, _turned(b_k.to(b_x.dtype), b_cos, b_sin, BN, 1, DRP), start, N, BN, 1, 1, Dr, DRP)
        b_l = _normed(b_l.to(b_x.dtype), latent_norm, start, N, latent_eps, BN, R, RP)
        b_k = tl.dot(b_l, tl.trans(load_weight(kv_b, H, HP, Dn, DNP, Dn + Dv, 0, R, RP)), input_precision="ieee")
        store_tokens(k_nope, b_k, start, N, BN, H, HP, Dn, DNP)
        b_v = tl.dot(b_l, tl.trans(load_weight(kv_b, H, HP, Dv, DVP, Dn + Dv, Dn, R, RP)), input_precision="ieee")
        store_tokens(v, b_v, start, N, BN, H, HP, Dv, DVP)


@triton.jit
def _latent_backward(
    dk_nope, dv, b_x, kv_a, latent_norm, kv_b, latent_eps, start, N,
    H: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    Dn: tl.constexpr, DNP: tl.constexpr, Dr: tl.constexpr, Dv: tl.constexpr, DVP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """(the normalised latent, its gradient before latent_norm, the gradient of what kv_a gave) of a tile, [BN, RP] each, and
    kv_a's rows of the latent [RP, DP]."""
    b_kv_a = load_weight(kv_a, 1, 1, R, RP, R + Dr, 0, D, DP)
    b_l = tl.dot(b_x, tl.trans(b_kv_a), input_precision="ieee").to(b_x.dtype)
    b_l, b_rstd = normalised(b_l.to(tl.float32), start, N, latent_eps, BN, R)
    b_dy = load_tokens(dk_nope, start, H * Dn, N, BN, H, HP, Dn, DNP)
    b_dl = tl.dot(b_dy, load_weight(kv_b, H, HP, Dn, DNP, Dn + Dv, 0, R, RP), input_precision="ieee")
    b_dy = load_tokens(dv, start, H * Dv, N, BN, H, HP, Dv, DVP)
    b_dl = tl.dot(b_dy, load_weight(kv_b, H, HP, Dv, DVP, Dn + Dv, Dn, R, RP), b_dl, input_precision="ieee")
    b_da = norm_backward(b_dl, b_l, b_rstd, load_vector(latent_norm, R, RP), R).to(b_x.dtype)
    return b_l, b_dl, b_da, b_kv_a


@triton.jit
def _key_backward(
    dk_rope, b_cos, b_sin, start, N, H: tl.constexpr, Dr: tl.constexpr, DRP: tl.constexpr, BN: tl.constexpr
):
    """The gradient of what kv_a gave for the rope key of a tile [BN, DRP], from that of the turned one, by heads [H, N, Dr]."""
    b_dk = tl.zeros([BN, DRP], tl.float32)
    for _ in tl.static_range(H):
        b_dk += load_tokens(dk_rope, start, Dr, N, BN, 1, 1, Dr, DRP).to(tl.float32)
        dk_rope += tl.cast(N, tl.int64) * Dr
    return _turned(b_dk, b_cos, -b_sin, BN, 1, DRP).to(dk_rope.dtype.element_ty)


@triton.jit(do_not_specialize=["N", "P"])
def backward_kernel(
    dh, dq_nope, dq_rope, dk_nope, dk_rope, dv, h, norm, q, kv_a, latent_norm, kv_b, cos, sin, positions, dx, parts,
    eps, latent_eps, dh_n, N, P,
    H: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    Dn: tl.constexpr, DNP: tl.constexpr, Dr: tl.constexpr, DRP: tl.constexpr, Dv: tl.constexpr, DVP: tl.constexpr,
    BN: tl.constexpr, HG: tl.constexpr,
):  # fmt: skip
    """dx [N, D], and in a row of parts [tiles, D] what a tile adds to the gradient of norm. q_nope: HG heads at a time."""
    tile = tl.program_id(0)
    start = tile * BN
    b_x = _normed(load_tokens(h, start, D, N, BN, 1, 1, D, DP), norm, start, N, eps, BN, D, DP)  # [BN, DP]
    _, _, b_dy, b_kv_a = _latent_backward(
        dk_nope, dv, b_x, kv_a, latent_norm, kv_b, latent_eps, start, N, H, HP, D, DP, R, RP, Dn, DNP, Dr, Dv, DVP, BN
    )
    b_dx = tl.dot(b_dy, b_kv_a, input_precision="ieee")  # [BN, DP]
    b_cos, b_sin = _angles(cos, sin, positions, start, N, P, BN, Dr, DRP)
    b_dy = _key_backward(dk_rope, b_cos, b_sin, start, N, H, Dr, DRP, BN)
    b_dx = tl.dot(b_dy, load_weight(kv_a, 1, 1, Dr, DRP, R + Dr, R, D, DP), b_dx, input_precision="ieee")
    b_dy = _turned(load_tokens(dq_rope, start, H * Dr, N, BN, H, HP, Dr, DRP), b_cos, -b_sin, BN, HP, DRP)
    b_dx = tl.dot(b_dy, load_weight(q, H, HP, Dr, DRP, Dn + Dr, Dn, D, DP), b_dx, input_precision="ieee")
    for head in tl.static_range(0, H, HG):
        b_dy = load_tokens(dq_nope + head * Dn, start, H * Dn, N, BN, H - head, HG, Dn, DNP)
        b_w = load_weight(q + head * (Dn + Dr) * D, H - head, HG, Dn, DNP, Dn + Dr, 0, D, DP)
        b_dx = tl.dot(b_dy, b_w, b_dx, input_precision="ieee")

    # x anew, and from addresses made anew: kept they would take registers all the way.
    start, d = opaque(start), tl.arange(0, DP)
    b_x, b_rstd = normalised(load_tokens(h, start, D, N, BN, 1, 1, D, DP).to(tl.float32), start, N, eps, BN, D)
    tl.store(parts + tl.cast(tile, tl.int64) * D + d, tl.sum(b_dx * b_x, 0), mask=d < D)
    b_dx = norm_backward(b_dx, b_x, b_rstd, load_vector(norm, D, DP), D)
    if dh is not None:
        b_dx += load_tokens(dh, start, dh_n, N, BN, 1, 1, D, DP).to(tl.float32)
    store_tokens(dx, b_dx, start, N, BN, 1, 1, D, DP)


@triton.jit(do_not_specialize=["N", "P"])
def weights_kernel(
    dq_nope, dq_rope, dk_nope, dk_rope, dv, h, norm, kv_a, latent_norm, kv_b, cos, sin, positions, parts,
    eps, latent_eps, N, P,
    H: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    Dn: tl.constexpr, DNP: tl.constexpr, Dr: tl.constexpr, DRP: tl.constexpr, Dv: tl.constexpr, DVP: tl.constexpr,
    TOTAL: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A row of parts [tiles, TOTAL]: what a tile adds to the gradients of q, kv_a, kv_b and latent_norm, in this order."""
    tile = tl.program_id(0)
    start = tile * BN
    parts += tl.cast(tile, tl.int64) * TOTAL
    b_x = _normed(load_tokens(h, start, D, N, BN, 1, 1, D, DP), norm, start, N, eps, BN, D, DP)  # [BN, DP]
    b_cos, b_sin = _angles(cos, sin, positions, start, N, P, BN, Dr, DRP)
    b_dy = load_tokens(dq_nope, start, H * Dn, N, BN, H, HP, Dn, DNP)
    b_part = tl.dot(tl.trans(b_dy), b_x, input_precision="ieee")
    store_weight(parts, b_part, H, HP, Dn, DNP, Dn + Dr, 0, D, DP)
    b_dy = _turned(load_tokens(dq_rope, start, H * Dr, N, BN, H, HP, Dr, DRP), b_cos, -b_sin, BN, HP, DRP)
    b_part = tl.dot(tl.trans(b_dy), b_x, input_precision="ieee")
    store_weight(parts, b_part, H, HP, Dr, DRP, Dn + Dr, Dn, D, DP)
    p_kv_a = parts + H * (Dn + Dr) * D
    b_dy = _key_backward(dk_rope, b_cos, b_sin, start, N, H, Dr, DRP, BN)
    b_part = tl.dot(tl.trans(b_dy), b_x, input_precision="ieee")  # [DRP, DP]
    store_weight(p_kv_a, b_part, 1, 1, Dr, DRP, R + Dr, R, D, DP)

    b_l, b_dl, b_da, _ = _latent_backward(
        dk_nope, dv, b_x, kv_a, latent_norm, kv_b, latent_eps, start, N, H, HP, D, DP, R, RP, Dn, DNP, Dr, Dv, DVP, BN
    )
    b_part = tl.dot(tl.trans(b_x), b_da, input_precision="ieee")  # [DP, RP]
    store_weight(p_kv_a, tl.trans(b_part), 1, 1, R, RP, R + Dr, 0, D, DP)
    p_kv_b, r = p_kv_a + (R + Dr) * D, tl.arange(0, RP)
    tl.store(p_kv_b + H * (Dn + Dv) * R + r, tl.sum(b_dl * b_l, 0), mask=r < R)
    b_l = (b_l * load_vector(latent_norm, R, RP)).to(b_x.dtype)
    b_dy = load_tokens(dk_nope, start, H * Dn, N, BN, H, HP, Dn, DNP)
    b_part = tl.dot(tl.trans(b_dy), b_l, input_precision="ieee")
    store_weight(p_kv_b, b_part, H, HP, Dn, DNP, Dn + Dv, 0, R, RP)
    b_dy = load_tokens(dv, start, H * Dv, N, BN, H, HP, Dv, DVP)
    b_part = tl.dot(tl.trans(b_dy), b_l, input_precision="ieee")
    store_weight(p_kv_b, b_part, H, HP, Dv, DVP, Dn + Dv, Dn, R, RP)


class Tiles(NamedTuple):
    """BN tokens; groups of heads whose queries are a product each in the backward pass."""

    bn: int
    warps: int
    groups: int


# Starting values: they keep the limits of tests/test_triton_compile.py and are not tuned.
# Without warp groups' instructions a product's operands lie in registers, all at once: hence few tokens. In the
# backward pass two groups everywhere: of one by triton 3.9 some spill.
_FORWARD, _BACKWARD, _WEIGHTS = Tiles(128, 8, 1), Tiles(32, 8, 2), Tiles(128, 8, 1)
_SMALL = Tiles(64, 8, 2)  # of all three, on other chips than sm_90 and sm_100


class Sizes(NamedTuple):
    """The letters of this module."""

    h: int
    d: int
    r: int
    dn: int
    dr: int
    dv: int

    @classmethod
    def of(cls, q, kv_a, latent_norm, kv_b, heads: int, cos) -> Sizes:
        r, dr = latent_norm.size(0), 2 * cos.size(1)
        dn = q.size(0) // heads - dr
        return cls(heads, kv_a.size(1), r, dn, dr, kv_b.size(0) // heads - dn)

    def outputs(self, n: int) -> list[tuple[int, ...]]:
        """Shapes of h, q_nope, q_rope, k_nope, k_rope, v."""
        h, d, _, dn, dr, dv = self
        return [(n, d), (n, h, dn), (n, h, dr), (n, h, dn), (n, dr), (n, h, dv)]

    def constants(self) -> dict[str, int]:
        """The kernels' tl.constexpr arguments; "...P" is what a size is padded to."""
        found = dict(zip(("H", "D", "R", "Dn", "Dr", "Dv"), self, strict=True)) | {"HP": triton.next_power_of_2(self.h)}
        return found | {f"{name.upper()}P": padded(found[name]) for name in ("D", "R", "Dn", "Dr", "Dv")}


def forward(
    delta: Tensor, residual: Tensor | None, norm: Tensor, eps: float, q: Tensor, kv_a: Tensor, latent_norm: Tensor,
    latent_eps: float, kv_b: Tensor, heads: int, cos: Tensor, sin: Tensor, positions: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Shapes as dsfast.ops.mla_project -> h, q_nope, q_rope, k_nope, k_rope, v. A token whose position is none has NaN in what is
    turned."""
    sizes = Sizes.of(q, kv_a, latent_norm, kv_b, heads, cos)
    outputs = tuple(delta.new_empty(shape) for shape in sizes.outputs(delta.size(0)))
    shared = norm, eps, q, kv_a, latent_norm, latent_eps, kv_b, heads, cos, sin, positions
    with torch.cuda.device_of(delta):
        forward_launch(delta, residual, shared, outputs, large_tiles(delta.device)).run()
    h, q_nope, q_rope, k_nope, k_rope, v = outputs
    return h, q_nope, q_rope, k_nope, k_rope[:, None].expand(q_rope.shape), v


def backward(
    dh: Tensor | None, dq_nope: Tensor, dq_rope: Tensor, dk_nope: Tensor, dk_rope: Tensor, dv: Tensor, h: Tensor, norm: Tensor,
    eps: float, q: Tensor, kv_a: Tensor, latent_norm: Tensor, latent_eps: float, kv_b: Tensor, heads: int, cos: Tensor,
    sin: Tensor, positions: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx [N, D], the gradient of delta and of residual, and those of q, kv_a, kv_b, latent_norm and norm, flat, one after the
    other. Deterministic: no atomics, and the same sums on every chip of one kind of tiles."""
    shared = norm, eps, q, kv_a, latent_norm, latent_eps, kv_b, heads, cos, sin, positions
    dx = h.new_empty(h.shape)
    dweights = h.new_empty(sum(weight.numel() for weight in (q, kv_a, kv_b, latent_norm, norm)))
    if not dx.numel():
        return dx, dweights.zero_()
    gradients = dh, dq_nope, dq_rope, dk_nope, dk_rope, dv
    with torch.cuda.device_of(h):
        *of_weights, backward, of_norm = backward_launches(gradients, h, shared, dx, dweights, large_tiles(h.device))
        aside((of_weights, [dweights]))  # first: at the end of a step little is left to hide them behind
        backward.run()
        aside(([of_norm], [dweights]))
    return dx, dweights


def forward_launch(delta, residual, shared, outputs, large: int) -> Launch:
    """The launch that fills h, q_nope, q_rope, k_nope, k_rope, v; tensors may lie on the meta device."""
    (delta,), n, (bn, warps, _) = rows(delta), delta.size(0), _FORWARD if large else _SMALL
    residual = None if residual is None else rows(residual)[0]
    arguments = _arguments(shared) | {
        "delta": delta, "delta_n": delta.stride(0), "residual": residual,
        "residual_n": 0 if residual is None else residual.stride(0), "N": n, "BN": bn,
    }  # fmt: skip
    arguments |= dict(zip(("h", "q_nope", "q_rope", "k_nope", "k_rope", "v"), outputs, strict=True))
    return Launch(forward_kernel, (2 * triton.cdiv(n, bn),), arguments, options(warps), delta.itemsize, bn)


def backward_launches(gradients, h, shared, dx, dweights, large: int) -> list[Launch]:
    """The kernel that fills parts of the weights' gradients and the one that adds them up to dweights; the one that fills dx and
    parts of norm's gradient, and the one that adds these up. Tensors may lie on the meta device."""
    (dh, dq_nope, dq_rope, dk_nope, dk_rope, dv), (n, d) = gradients, h.shape
    dh = None if dh is None else rows(dh)[0]
    given = {"dq_nope": dq_nope, "dq_rope": dq_rope, "dk_nope": dk_nope, "dv": dv}
    given["dk_rope"] = dk_rope.transpose(0, 1)  # by heads, as `mla_attention` leaves it
    arguments = (
        _arguments(shared) | {name: gradient.contiguous() for name, gradient in given.items()} | {"h": h, "N": n}
    )

    bn, warps, groups = _BACKWARD if large else _SMALL
    of_norm = h.new_empty(triton.cdiv(n, bn), d, dtype=torch.float32)
    stream = arguments | {
        "dh": dh, "dh_n": 0 if dh is None else dh.stride(0), "dx": dx, "parts": of_norm, "BN": bn,
        "HG": max(1, arguments["HP"] // groups),
    }  # fmt: skip
    backward = Launch(backward_kernel, (len(of_norm),), stream, options(warps), h.itemsize, bn)

    bn, warps, _ = _WEIGHTS if large else _SMALL
    parts = h.new_empty(triton.cdiv(n, bn), dweights.numel() - d, dtype=torch.float32)
    of_weights = arguments | {"parts": parts, "TOTAL": parts.size(1), "BN": bn}
    weights = Launch(weights_kernel, (len(parts),), of_weights, options(warps), h.itemsize, bn)
    return [weights, sum_launch(parts, dweights[:-d]), backward, sum_launch(of_norm, dweights[-d:])]


def _arguments(shared) -> dict[str, Any]:
    """Arguments of the kernels of both passes."""
    norm, eps, q, kv_a, latent_norm, latent_eps, kv_b, heads, cos, sin, positions = shared
    sizes = Sizes.of(q, kv_a, latent_norm, kv_b, heads, cos).constants()
    tensors = {
        "norm": norm, "q": q, "kv_a": kv_a, "latent_norm": latent_norm, "kv_b": kv_b, "cos": cos, "sin": sin,
        "positions": positions,
    }  # fmt: skip
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return tensors | sizes | {"eps": eps, "latent_eps": latent_eps, "P": cos.size(0)}


EXAMPLES = {"500K": (8192, 4, 128, 32, 32, 16, 32), "odd": (8192, 3, 112, 16, 32, 16, 32)}
"""N, H, D, R, Dn, Dr and Dv that are compiled ahead."""


def example_launches(size: str, dtype: torch.dtype, large: int) -> dict[str, Launch]:
    """Kernel and variant -> launch at EXAMPLES[size], on the meta device. In float32 there is none."""
    if dtype.itemsize != 2:
        return {}
    n, h, d, r, dn, dr, dv = EXAMPLES[size]
    empty = on_meta(dtype)
    q, kv_a, kv_b = empty(h * (dn + dr), d), empty(r + dr, d), empty(h * (dn + dv), r)
    table, positions = empty(4096, dr // 2), empty(n, dtype=torch.int64)
    shared = empty(d), 1e-6, q, kv_a, empty(r), 1e-6, kv_b, h, table, table, positions
    x, *parts = outputs = [empty(shape) for shape in Sizes(h, d, r, dn, dr, dv).outputs(n)]
    parts[3] = empty(h, n, dr).transpose(0, 1)  # each head's gradient of the one key
    dweights = empty(sum(weight.numel() for weight in (q, kv_a, kv_b)) + d + r)
    launches = backward_launches([x, *parts], x, shared, x, dweights, large)
    return {
        "forward_kernel": forward_launch(x, x, shared, outputs, large),
        "forward_kernel, no residual": forward_launch(x, None, shared, outputs, large),
        **dict(zip(("weights_kernel", "sum_kernel", "backward_kernel", "sum_kernel, norm"), launches, strict=True)),
        "backward_kernel, no gradient of h": backward_launches([None, *parts], x, shared, x, dweights, large)[2],
    }
