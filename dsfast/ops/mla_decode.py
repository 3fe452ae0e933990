"""One query per sequence against its cached latents, kv_b absorbed (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).

    q_latent[b, h] = q_nope[b, h] up_key[h]                                           up[h] = [up_key[h]; up_value[h]]
    s[b, h, j]     = scale (q_latent[b, h] . latent[b, j] + q_rope[b, h] . k_rope[b, j])         j < lengths[b]
    o[b, h]        = up_value[h] (sum_j softmax_j(s[b, h, :])[j] latent[b, j])

q . (up_key c) = (up_key^T q) . c: keys and values are never rebuilt, the cache is read as it lies.
B sequences, C places in the cache, H heads, R latent rank, Dn and Dr width of the part without and with position, Dv value
width. In a paged cache (vLLM, arXiv 2309.06180) place j of sequence b is place j % S of page pages[b, j // S], S places a page.
For inference: it has no derivative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsfast.ops import native, triton
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
from dsfast.triton_kernels.launch import padded
from dsfast.triton_kernels.limits import DECODE_WIDEST


def mla_decode_reference(q_nope, q_rope, latent, k_rope, lengths, up, scale, pages=None):
    if pages is not None:
        latent, k_rope = gathered(latent, k_rope, lengths, pages)
    up_key, up_value = up[:, : q_nope.size(2)], up[:, q_nope.size(2) :]
    absent = torch.arange(latent.size(1), device=latent.device) >= lengths[:, None]  # [B, C]
    q_latent = torch.einsum("bhn,hnr->bhr", q_nope, up_key)
    s = torch.einsum("bhr,bcr->bhc", q_latent, latent) + torch.einsum("bhr,bcr->bhc", q_rope, k_rope)
    s = s.to(torch.promote_types(s.dtype, torch.float32)) * scale
    p = s.masked_fill(absent[:, None], float("-inf")).softmax(-1).to(latent.dtype)
    # What absent places hold, and the softmax over none, may be NaN, and 0 times NaN is NaN.
    p, latent = p.masked_fill(absent[:, None], 0), latent.masked_fill(absent[..., None], 0)
    return torch.einsum("bhr,hvr->bhv", torch.einsum("bhc,bcr->bhr", p, latent), up_value)


def gathered(latent: Tensor, k_rope: Tensor, lengths: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
    """latent [B, C, R] and k_rope [B, C, Dr] of a paged cache; what lies behind a sequence's last page is any page.

    Raises ValueError, on the CPU, where a sequence needs a page that is not there.
    """
    begins = torch.arange(pages.size(1), device=pages.device) * latent.size(1)
    needed = pages.where(begins < lengths[:, None], 0)  # [B, P]
    expect_range("mla_decode", "pages", needed, latent.size(0))
    return latent[needed].flatten(1, 2), k_rope[needed].flatten(1, 2)


def mla_decode(
    q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, lengths: Tensor, up: Tensor, scale: float,
    pages: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """q_nope [B, H, Dn], q_rope [B, H, Dr], latent [B, C, R], k_rope [B, C, Dr], lengths [B] int64, up [H, Dn + Dv, R]
    -> [B, H, Dv], contiguous.

    With `pages` [B, P], int32 or int64, the cache is paged: latent [pages, S, R], k_rope [pages, S, Dr], C = P S. The C++ kernel
    takes it gathered: the pages are copied first.

    Sequence b holds the places 0 .. lengths[b] - 1; what lies behind, also in `pages`, is not read and may be anything. Length 0
    gives zeros. Views whose last dimension is contiguous are read in place. Raises ValueError for other shapes, lengths
    or pages, TypeError for mixed dtypes or devices, and in a backward pass NotImplementedError. A GPU is not waited for: there a
    sequence whose length is outside 0..C, or that needs a page that is not there, gets NaN, and no other memory is read.
    """
    _check(q_nope, q_rope, latent, k_rope, lengths, up, pages)
    if choose("mla_decode", q_nope, not_triton=_not_triton(latent, k_rope)) == "reference":
        expect_range("mla_decode", "lengths", lengths, _capacity(latent, pages) + 1)
        return mla_decode_reference(q_nope, q_rope, latent, k_rope, lengths, up, scale, pages)
    return torch.ops.dsfast.mla_decode(q_nope, q_rope, latent, k_rope, lengths, up, scale, pages)


def _not_triton(latent: Tensor, k_rope: Tensor) -> str:
    """Why the Triton kernels do not take such a cache, or ""."""
    width = padded(latent.size(-1)) + padded(k_rope.size(-1))
    if width <= DECODE_WIDEST:
        return ""
    return f"the Triton kernels take R + Dr, each rounded up to a power of two, up to {DECODE_WIDEST}, got {width}"


def _capacity(latent: Tensor, pages: Tensor | None) -> int:
    """Places of each sequence, C."""
    return latent.size(1) * (1 if pages is None else pages.size(1))


def _check(q_nope, q_rope, latent, k_rope, lengths, up, pages) -> None:
    expect_shape("mla_decode", "q_nope", q_nope, "B", "H", "Dn")
    b, h, dn = q_nope.shape
    expect_shape("mla_decode", "q_rope", q_rope, b, h, "Dr")
    if pages is None:
        expect_shape("mla_decode", "latent", latent, b, "C", "R")
    else:
        expect_shape("mla_decode", "latent", latent, "pages", "S", "R")
        expect_shape("mla_decode", "pages", pages, b, "P")
        if pages.dtype not in (torch.int32, torch.int64) or pages.device != q_nope.device:
            expected = f"torch.int32 or torch.int64 on {q_nope.device}"
            raise TypeError(f"mla_decode: pages must be {expected}, got {pages.dtype} on {pages.device}")
        if pages.size(1) and not latent.size(0):
            raise ValueError("mla_decode: latent must hold a page, got none")
    expect_shape("mla_decode", "k_rope", k_rope, *latent.shape[:2], q_rope.size(2))
    expect_shape("mla_decode", "lengths", lengths, b)
    expect_shape("mla_decode", "up", up, h, f"{dn} + Dv", latent.size(2))
    if up.size(1) < dn:
        raise ValueError(f"mla_decode: up must have shape [{h}, {dn} + Dv, {latent.size(2)}], got {list(up.shape)}")
    floats = {"q_rope": q_rope, "latent": latent, "k_rope": k_rope, "up": up}
    expect_dtype("mla_decode", q_nope.dtype, q_nope.device, **floats)
    expect_dtype("mla_decode", torch.int64, q_nope.device, lengths=lengths)


def _cpu(q_nope, q_rope, latent, k_rope, lengths, up, scale, pages=None):
    if pages is not None:
        expect_range("mla_decode", "lengths", lengths, _capacity(latent, pages) + 1)
        latent, k_rope = gathered(latent, k_rope, lengths, pages)
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


def _fake(q_nope, q_rope, latent, k_rope, lengths, up, scale, pages=None):
    b, h, dn = q_nope.shape
    return q_nope.new_empty(b, h, up.size(1) - dn)


define(
    "mla_decode(Tensor q_nope, Tensor q_rope, Tensor latent, Tensor k_rope, Tensor lengths, Tensor up, float scale,"
    " Tensor? pages=None) -> Tensor",
    cpu=_cpu,
    fake=_fake,
    cuda=triton.launcher("mla_decode", "forward"),
)
refuse_derivative("mla_decode")
