"""Causal attention of multi-head latent attention, for training and prefill (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    s[h, i, j] = scale (q_nope[i, h] . k_nope[j, h] + q_rope[i, h] . k_rope[j])      j <= i, same document
    o[i, h]    = sum_j softmax_j(s[h, i, :])[j] v[j, h]

N tokens, H heads, Dn and Dr width of the part without and with position, Dv value width, S documents. Keys without position and
values may have fewer heads, Hk, each of which is that of H / Hk neighbouring heads of queries.
The rope key is shared by the heads and nothing is copied or concatenated: the parts are taken as the projections leave
them. Documents lie one behind the other; document s holds the tokens cu_seqlens[s] .. cu_seqlens[s + 1] - 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsfast.ops import native, triton
from dsfast.ops.dispatch import choose
from dsfast.ops.library import autograd, define, expect_dtype, expect_shape, rows
from dsfast.triton_kernels.launch import padded
from dsfast.triton_kernels.limits import ATTENTION_WIDEST


def mla_attention_reference(q_nope, q_rope, k_nope, k_rope, v, cu_seqlens, scale):
    k_rope = k_rope if k_rope.dim() == 3 else k_rope[:, None].expand(q_rope.shape)
    k_nope, v = (x.repeat_interleave(q_nope.size(1) // max(1, x.size(1)), 1) for x in (k_nope, v))
    outputs = [v[:0]]
    for begin, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        at = slice(begin, end)
        s = torch.einsum("ihd,jhd->hij", q_nope[at], k_nope[at]) + torch.einsum("ihd,jhd->hij", q_rope[at], k_rope[at])
        future = torch.ones(end - begin, end - begin, dtype=torch.bool, device=s.device).triu(1)
        p = (s * scale).masked_fill(future, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hij,jhd->ihd", p, v[at]))
    return torch.cat(outputs)


def mla_attention(
    q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float
) -> Tensor:
    """q_nope [N, H, Dn], q_rope [N, H, Dr], k_nope [N, Hk, Dn], k_rope [N, Dr], v [N, Hk, Dv], cu_seqlens [S + 1] int32
    -> [N, H, Dv].

    k_rope may also be that expanded to [N, H, Dr], as `mla_project` gives it: then its gradient is each head's, unsummed.
    cu_seqlens rises from 0 to N; equal neighbours are empty documents. Views whose last dimension is contiguous are read in
    place. Raises ValueError for other shapes or boundaries, TypeError for mixed dtypes or devices. On a GPU boundaries are not
    looked at, as that would wait for it: of wrong ones come wrong numbers, or NaN, but nothing outside the tensors is read.
    """
    _check(q_nope, q_rope, k_nope, k_rope, v)
    expect_shape("mla_attention", "cu_seqlens", cu_seqlens, "S + 1")
    expect_dtype("mla_attention", torch.int32, q_nope.device, cu_seqlens=cu_seqlens)
    if choose("mla_attention", q_nope, not_triton=_not_triton(q_nope, q_rope, v, scale)) == "reference":
        if cu_seqlens.is_cpu and not rises(cu_seqlens.tolist(), q_nope.size(0)):
            raise _bad_boundaries(cu_seqlens, q_nope.size(0))
        return mla_attention_reference(q_nope, q_rope, k_nope, k_rope, v, cu_seqlens, scale)
    return torch.ops.dsfast.mla_attention(q_nope, q_rope, k_nope, k_rope, v, cu_seqlens, scale)[0]


def _check(q_nope, q_rope, k_nope, k_rope, v) -> None:
    expect_shape("mla_attention", "q_nope", q_nope, "N", "H", "Dn")
    n, h, dn = q_nope.shape
    expect_shape("mla_attention", "q_rope", q_rope, n, h, "Dr")
    expect_shape("mla_attention", "k_nope", k_nope, n, "Hk", dn)
    expect_shape("mla_attention", "k_rope", k_rope, n, *([h] if k_rope.dim() == 3 else []), q_rope.size(2))
    if k_rope.dim() == 3 and h > 1 and k_rope.stride(1):
        raise ValueError(
            "mla_attention: k_rope [N, H, Dr] must be one for all heads, expanded: their stride 0, got "
            f"{k_rope.stride(1)}"
        )
    expect_shape("mla_attention", "v", v, n, k_nope.size(1), "Dv")
    if _shared(q_nope, k_nope) * k_nope.size(1) != h:
        raise ValueError(
            f"mla_attention: {h} heads of queries cannot be shared out among {k_nope.size(1)} of keys and values"
        )
    expect_dtype("mla_attention", q_nope.dtype, q_nope.device, q_rope=q_rope, k_nope=k_nope, k_rope=k_rope, v=v)


def _not_triton(q_nope: Tensor, q_rope: Tensor, v: Tensor, scale: float) -> str:
    """Why the Triton kernels do not take them, or ""."""
    widths = q_nope.size(2), q_rope.size(2), v.size(2)
    width = sum(map(padded, widths))
    if 0 in widths:
        return "the Triton kernels take Dn, Dr and Dv from 1 on, got 0"
    if not scale > 0:
        return f"the Triton kernels take a positive scale, got {scale}"
    if width > ATTENTION_WIDEST:
        return f"the Triton kernels take Dn + Dr + Dv, each rounded up to a power of two, up to {ATTENTION_WIDEST}, got {width}"
    return ""


def _one_for_all(k_rope: Tensor) -> Tensor:
    """k_rope [N, Dr], also of that expanded to all heads."""
    return k_rope[:, 0] if k_rope.dim() == 3 else k_rope


def _shared(q_nope: Tensor, k_nope: Tensor) -> int:
    """Heads of queries for each head of keys and values."""
    return q_nope.size(1) // max(1, k_nope.size(1))


def rises(boundaries: list[int], end: int) -> bool:
    """Whether they are boundaries of documents that are `end` tokens long together."""
    return bool(boundaries) and boundaries[0] == 0 and boundaries[-1] == end and boundaries == sorted(boundaries)


def _bad_boundaries(cu_seqlens: Tensor, end: int) -> ValueError:
    return ValueError(f"mla_attention: cu_seqlens must rise from 0 to {end}, got {cu_seqlens.tolist()[:20]}")


def _pointers(*tensors: Tensor) -> list[int]:
    """Address and leading strides of each tensor, in elements."""
    return [number for x in tensors for number in (x.data_ptr(), *x.stride()[:-1])]


# `softmax` is what the backward pass needs to know of each query's scores: their maximum [H, N] (C++), or that and the
# logarithm of the sum, or both in one (Triton: `softmax_shape`).
def _forward_cpu(q_nope, q_rope, k_nope, k_rope, v, cu_seqlens, scale):
    inputs = [rows(x) for x in (q_nope, q_rope, k_nope, _one_for_all(k_rope), v)]
    cu_seqlens = cu_seqlens.contiguous()
    (n, h, dn), dr, dv = q_nope.shape, q_rope.size(2), v.size(2)
    o, softmax = q_nope.new_empty(n, h, dv), q_nope.new_empty(h, n)
    good = native.products().mla_attention_forward(
        *_pointers(*inputs), cu_seqlens.data_ptr(), scale, o.data_ptr(), softmax.data_ptr(), n, h,
        _shared(q_nope, k_nope), dn, dr, dv, cu_seqlens.size(0) - 1, torch.get_num_threads(),
    )  # fmt: skip
    if not good:
        raise _bad_boundaries(cu_seqlens, n)
    return o, softmax


def _forward_fake(q_nope, q_rope, k_nope, k_rope, v, cu_seqlens, scale):
    n, h, _ = q_nope.shape
    shape = triton.launcher("mla_attention", "softmax_shape")(q_nope) if triton.runs_on(q_nope) else (h, n)
    return q_nope.new_empty(n, h, v.size(2)), q_nope.new_empty(shape, dtype=torch.float32)


def _backward_cpu(do, q_nope, q_rope, k_nope, k_rope, v, cu_seqlens, scale, o, softmax):
    inputs = [rows(x) for x in (do, q_nope, q_rope, k_nope, _one_for_all(k_rope), v)]
    cu_seqlens = cu_seqlens.contiguous()
    (n, h, dn), dr, dv = q_nope.shape, q_rope.size(2), v.size(2)
    gradients = [x.new_empty(x.shape) for x in (q_nope, q_rope, q_nope, q_rope.movedim(1, 0), do)]
    native.products().mla_attention_backward(
        *_pointers(*inputs), cu_seqlens.data_ptr(), scale, softmax.data_ptr(),
        *(g.data_ptr() for g in gradients), n, h, _shared(q_nope, k_nope), dn, dr, dv, cu_seqlens.size(0) - 1,
        torch.get_num_threads(),
    )  # fmt: skip
    of_heads = gradients[3]  # the rope key is shared: its gradient comes back for each head [H, N, Dr]
    gradients[3] = of_heads.movedim(0, 1) if k_rope.dim() == 3 else of_heads.sum(0)
    return tuple(gradients)


def _backward_fake(do, q_nope, q_rope, k_nope, k_rope, v, cu_seqlens, scale, o, softmax):
    n, h, dr = q_rope.shape
    dk_rope = q_rope.new_empty(h, n, dr).movedim(0, 1) if k_rope.dim() == 3 else q_rope.new_empty(n, dr)
    dq_nope, dq_rope, dk_nope, dv = (x.new_empty(x.shape) for x in (q_nope, q_rope, q_nope, do))
    return dq_nope, dq_rope, dk_nope, dk_rope, dv


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, do, _):
    *tensors, o, softmax = ctx.saved_tensors
    gradients = torch.ops.dsfast.mla_attention_backward(do, *tensors, ctx.scale, o, softmax)
    dq_nope, dq_rope, dk_nope, dk_rope, dv = gradients
    return dq_nope, dq_rope, _of_shared(dk_nope, tensors[2]), dk_rope, _of_shared(dv, tensors[4]), None, None


def _of_shared(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient of x [N, Hk, D] from those for each head of queries [N, H, D]."""
    return gradient if gradient.size(1) == x.size(1) else gradient.unflatten(1, (x.size(1), -1)).sum(2)


_TENSORS = "Tensor q_nope, Tensor q_rope, Tensor k_nope, Tensor k_rope, Tensor v, Tensor cu_seqlens, float scale"
define(
    f"mla_attention({_TENSORS}) -> (Tensor, Tensor)",
    cpu=_forward_cpu,
    fake=_forward_fake,
    cuda=triton.launcher("mla_attention", "forward"),
)
define(
    f"mla_attention_backward(Tensor do, {_TENSORS}, Tensor o, Tensor softmax) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=_backward_cpu,
    fake=_backward_fake,
    cuda=triton.launcher("mla_attention", "backward"),
)
autograd("mla_attention", _backward, _setup_context)
