"""One query per sequence against its cached latents, kv_b absorbed (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).

    q_latent[b, h] = q_nope[b, h] up_key[h]                                           up[h] = [up_key[h]; up_value[h]]
    s[b, h, j]     = scale (q_latent[b, h] . latent[b, j] + q_rope[b, h] . k_rope[b, j])         j < lengths[b]
    o[b, h]        = up_value[h] (sum_j softmax_j(s[b, h, :])[j] latent[b, j])

q . (up_key c) = (up_key^T q) . c: keys and values are never rebuilt, the cache is read as it lies.
B sequences, C places in the cache, H heads, R latent rank, Dn and Dr width of the part without and with position, Dv value
width. For inference: it has no derivative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsfast.ops import native
from dsfast.ops.dispatch import choose
from dsfast.ops.library import (
    define,
    expect_dtype,
    expect_range,
    expect_shape,
    raise_out_of_range,
    refuse_derivative,
    rows,
)


def mla_decode_reference(q_nope, q_rope, latent, k_rope, lengths, up, scale):
    up_key, up_value = up[:, : q_nope.size(2)], up[:, q_nope.size(2) :]
    absent = torch.arange(latent.size(1), device=latent.device) >= lengths[:, None]  # [B, C]
    q_latent = torch.einsum("bhn,hnr->bhr", q_nope, up_key)
    s = torch.einsum("bhr,bcr->bhc", q_latent, latent) + torch.einsum("bhr,bcr->bhc", q_rope, k_rope)
    s = s.to(torch.promote_types(s.dtype, torch.float32)) * scale
    p = s.masked_fill(absent[:, None], float("-inf")).softmax(-1).to(latent.dtype)
    # What absent places hold, and the softmax over none, may be NaN, and 0 times NaN is NaN.
    p, latent = p.masked_fill(absent[:, None], 0), latent.masked_fill(absent[..., None], 0)
    return torch.einsum("bhr,hvr->bhv", torch.einsum("bhc,bcr->bhr", p, latent), up_value)


def mla_decode(
    q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, lengths: Tensor, up: Tensor, scale: float
) -> Tensor:
    """q_nope [B, H, Dn], q_rope [B, H, Dr], latent [B, C, R], k_rope [B, C, Dr], lengths [B] int64, up [H, Dn + Dv, R]
    -> [B, H, Dv], contiguous.

    Sequence b holds the places 0 .. lengths[b] - 1; what lies behind is not read and may be anything. Length 0 gives zeros.
    Views whose last dimension is contiguous are read in place. Raises ValueError for other shapes or lengths, TypeError for
    mixed dtypes or devices, and in a backward pass NotImplementedError.
    """
    _check(q_nope, q_rope, latent, k_rope, lengths, up)
    if choose("mla_decode", q_nope) == "reference":
        expect_range("mla_decode", "lengths", lengths, latent.size(1) + 1)
        return mla_decode_reference(q_nope, q_rope, latent, k_rope, lengths, up, scale)
    return torch.ops.dsfast.mla_decode(q_nope, q_rope, latent, k_rope, lengths, up, scale)


def _check(q_nope, q_rope, latent, k_rope, lengths, up) -> None:
    expect_shape("mla_decode", "q_nope", q_nope, "B", "H", "Dn")
    b, h, dn = q_nope.shape
    expect_shape("mla_decode", "q_rope", q_rope, b, h, "Dr")
    expect_shape("mla_decode", "latent", latent, b, "C", "R")
    expect_shape("mla_decode", "k_rope", k_rope, b, latent.size(1), q_rope.size(2))
    expect_shape("mla_decode", "lengths", lengths, b)
    expect_shape("mla_decode", "up", up, h, f"{dn} + Dv", latent.size(2))
    if up.size(1) < dn:
        raise ValueError(f"mla_decode: up must have shape [{h}, {dn} + Dv, {latent.size(2)}], got {list(up.shape)}")
    floats = {"q_rope": q_rope, "latent": latent, "k_rope": k_rope, "up": up}
    expect_dtype("mla_decode", q_nope.dtype, q_nope.device, **floats)
    expect_dtype("mla_decode", torch.int64, q_nope.device, lengths=lengths)


def _cpu(q_nope, q_rope, latent, k_rope, lengths, up, scale):
    q_nope, q_rope, latent, k_rope = (rows(x) for x in (q_nope, q_rope, latent, k_rope))
    lengths, up = lengths.contiguous(), up.contiguous()
    (b, h, dn), (_, c, r) = q_nope.shape, latent.shape
    o = q_nope.new_empty(b, h, up.size(1) - dn)
    strided = (number for x in (q_nope, q_rope, latent, k_rope) for number in (x.data_ptr(), *x.stride()[:2]))
    bad = native.module().mla_decode(
        *strided, lengths.data_ptr(), up.data_ptr(), scale, o.data_ptr(), b, c, h, r, dn, q_rope.size(2), o.size(2),
        torch.get_num_threads(),
    )  # fmt: skip
    raise_out_of_range("mla_decode", "lengths", bad, b, c + 1)
    return o


def _fake(q_nope, q_rope, latent, k_rope, lengths, up, scale):
    b, h, dn = q_nope.shape
    return q_nope.new_empty(b, h, up.size(1) - dn)


define(
    "mla_decode(Tensor q_nope, Tensor q_rope, Tensor latent, Tensor k_rope, Tensor lengths, Tensor up, float scale)"
    " -> Tensor",
    cpu=_cpu,
    fake=_fake,
)
refuse_derivative("mla_decode")
