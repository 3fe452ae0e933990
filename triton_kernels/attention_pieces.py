"""Pieces of attention's kernels: which documents tokens lie in, rows of its inputs, scores and probabilities, and the arguments
that all launches share. Letters as in dsfast.triton_kernels.mla_attention."""

from __future__ import annotations

from typing import TypeVar

import torch
import triton
import triton.language as tl
from dsfast.triton_kernels.launch import on_meta, padded, rows
from torch import Tensor

HEADS_TOGETHER = 8  # heads whose tiles run side by side: their keys and values are to stay in the L2 cache
UNSPECIALIZED = ("N", "S", "STEPS")
"""Arguments that change from batch to batch and must not cause a new compilation."""
_PITCHES = 16  # PITCH is a multiple of it

Row = TypeVar("Row")


@triton.jit
def documents_of(cu_seqlens, i, S, STEPS):
    """First token of each document that tokens `i` lie in, and the token after its last. STEPS >= log2 S. Of wrong boundaries
    none is in front of token 0: nothing is read there."""
    low = i * 0
    high = low + S
    for _ in range(STEPS):
        middle = (low + high) // 2
        # True for the empty documents before it too, so they are passed over.
        reached = tl.load(cu_seqlens + middle) <= i
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    return tl.maximum(tl.load(cu_seqlens + low), 0), tl.maximum(tl.load(cu_seqlens + low + 1), 0)


@triton.jit
def scores(a_nope, a_rope, b_nope, b_rope, APART: tl.constexpr):
    """a . b over both parts: [A, DN], [A, DR], [B, DN], [B, DR] -> [A, B]."""
    b_s = tl.dot(a_nope, tl.trans(b_nope), input_precision="ieee")
    if APART:  # by fma: of a plain sum Triton makes a product that adds to the first one, a chain again
        one = tl.full([a_nope.shape[0], b_nope.shape[0]], 1.0, tl.float32)
        return tl.fma(tl.dot(a_rope, tl.trans(b_rope), input_precision="ieee"), one, b_s)
    return tl.dot(a_rope, tl.trans(b_rope), b_s, input_precision="ieee")


@triton.jit
def load_queries(x, h, i, N, PITCH, MASKED: tl.constexpr):
    """One number of each query i of head h; where MASKED 0 from token N on."""
    p_x = x + h * PITCH + i
    return tl.load(p_x, mask=i < N, other=0.0) if MASKED else tl.load(p_x)


@triton.jit
def load_softmax(softmax, h, i, N, PITCH, H, EXACT: tl.constexpr, MASKED: tl.constexpr):
    """What `probabilities` needs of queries i: m and log2 l, unless EXACT their sum in place of both."""
    b_m = load_queries(softmax, h, i, N, PITCH, MASKED)
    return b_m, load_queries(softmax, H + h, i, N, PITCH, MASKED) if EXACT else b_m


@triton.jit
def probabilities(b_s, b_m, b_log_l, factor, EXACT: tl.constexpr):
    """exp2(s - m) / l; b_m and b_log_l as `load_softmax` returns them, broadcast along the keys."""
    return tl.exp2(b_s * factor - b_m - b_log_l) if EXACT else tl.exp2(b_s * factor - b_m)


@triton.jit
def delta_of(b_do, b_o):
    """delta = sum of do o, of queries' rows [., DV] each."""
    return tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)


@triton.jit
def within(x, begin, end):
    """begin <= x < end, of numbers from 0 on, by one comparison."""
    return (x - begin).to(tl.uint32, bitcast=True) < tl.maximum(end - begin, 0).to(tl.uint32, bitcast=True)


def measure(dn: int, dr: int, dv: int) -> int:
    """What the registers that widths take go by: DN + DR + DV, or more where one part is far wider than the others.

    A rope part as wide as the others costs more than the sum says, masks, of widths that are no power of two, a little more.
    """
    wide = padded(dn), padded(dr), padded(dv)
    masked = wide != (dn, dr, dv)
    return max(sum(wide), 2 * wide[0], 2 * wide[2], (4 if masked else 3) * wide[1])


def row_of(by_measure: dict[int, Row], widths: tuple[int, int, int]) -> Row:
    """The row of `by_measure` (by the largest `measure` that each serves) for `widths`, Dn, Dr and Dv."""
    least = measure(*widths)
    return by_measure[min(m for m in by_measure if m >= least)]


def softmax_shape(q: Tensor) -> tuple[int, int, int]:
    """Numbers of a query, heads and PITCH, from queries [N, H, ...]."""
    return 2 if q.dtype.itemsize == 4 else 1, q.size(1), triton.cdiv(q.size(0), _PITCHES) * _PITCHES


def shared_arguments(q_nope, q_rope, k_nope, k_rope, v, cu_seqlens, scale) -> dict:
    """What kernels of both passes take, by name: inputs and their strides, sizes, widths as they are and rounded up."""
    k_rope = k_rope[:, 0] if k_rope.dim() == 3 else k_rope  # one for all heads, also where it is given expanded to them
    q_nope, q_rope, k_nope, k_rope, v, cu_seqlens = rows(q_nope, q_rope, k_nope, k_rope, v, cu_seqlens)
    n, h, dn = q_nope.shape
    documents = cu_seqlens.size(0) - 1
    widths = {"Dn": dn, "Dr": q_rope.size(2), "Dv": v.size(2)}
    return {
        "q_nope": q_nope, "q_rope": q_rope, "k_nope": k_nope, "k_rope": k_rope, "v": v, "cu_seqlens": cu_seqlens,
        "scale": scale, "q_nope_n": q_nope.stride(0), "q_nope_h": q_nope.stride(1), "q_rope_n": q_rope.stride(0),
        "q_rope_h": q_rope.stride(1), "k_nope_n": k_nope.stride(0), "k_nope_h": k_nope.stride(1),
        "k_rope_n": k_rope.stride(0), "v_n": v.stride(0), "v_h": v.stride(1),
        "PITCH": softmax_shape(q_nope)[2], "N": n, "H": h, "S": documents, "STEPS": (documents - 1).bit_length(),
        "SHARED": max(1, h // max(1, k_nope.size(1))), "G": HEADS_TOGETHER, **widths,
        **{letters.upper(): padded(width) for letters, width in widths.items()},
    }  # fmt: skip


def widths_of(arguments: dict) -> tuple[int, int, int]:
    """Dn, Dr, Dv."""
    return arguments["Dn"], arguments["Dr"], arguments["Dv"]


def backward_arguments(do, q_nope, q_rope, k_nope, k_rope, v, cu_seqlens, scale, o, softmax) -> dict:
    """What kernels of the backward pass take: as `shared_arguments`, and what they fill, the gradients, delta [H, PITCH] and
    shares [H, N, Dr], the heads' of dk_rope: their sum is that of a k_rope [N, Dr], they themselves that of one [N, H, Dr]."""
    (do,) = rows(do)
    n, h, dr = q_rope.shape
    of_heads = k_rope.dim() == 3
    shares = q_rope.new_empty(h, n, dr, dtype=q_rope.dtype if of_heads else torch.float32)
    return shared_arguments(q_nope, q_rope, k_nope, k_rope, v, cu_seqlens, scale) | {
        "do": do, "do_n": do.stride(0), "do_h": do.stride(1), "o": o, "softmax": softmax,
        "delta": torch.empty_like(softmax[0]), "shares": shares,
        "dq_nope": q_nope.new_empty(q_nope.shape), "dq_rope": q_rope.new_empty(q_rope.shape),
        "dk_nope": q_nope.new_empty(q_nope.shape), "dv": o.new_empty(o.shape),
        "dk_rope": shares.transpose(0, 1) if of_heads else k_rope.new_empty(n, dr),
    }  # fmt: skip


def example_arguments(widths: tuple[int, int, int, int], dtype: torch.dtype) -> dict:
    """What all kernels take, on the meta device: Dn, Dr, Dv, heads of keys and values, 16 of queries, 4,096 tokens; views as the
    model's projections leave them."""
    empty = on_meta(dtype)
    (dn, dr, dv, hk), n, h = widths, 4096, 16
    q_nope, q_rope = empty(n, h, dn + dr).split([dn, dr], -1)
    k_nope, v = empty(n, hk, dn + dv).split([dn, dv], -1)
    o, softmax = empty(n, h, dv), empty(softmax_shape(q_nope), dtype=torch.float32)
    cu_seqlens = empty(4, dtype=torch.int32)
    return backward_arguments(o, q_nope, q_rope, k_nope, empty(n, dr), v, cu_seqlens, 0.1, o, softmax)
