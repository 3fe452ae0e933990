"""Triton kernels of dsfast.ops.mla_attention, whose module has the maths. FlashAttention-2's tiling (arXiv 2307.08691).

N tokens, H heads of queries, SHARED of them for each head of keys and values, S documents; Dn, Dr, Dv widths of the part
without position, the rope part, the value; DN, DR, DV the same rounded up to powers of two; BT queries and BS keys in a tile; i a
query's token, j a key's.

Tiles divide the flat tokens, whatever the documents: tile t holds tokens t BT .. (t + 1) BT - 1, so the grid follows from
N alone and nothing waits for the host. Every token's document is found by bisection of cu_seqlens. Keys in front of a
query tile concern only the rows of the document that the tile begins in: the loop over them runs without a mask, then the
rows of later documents are set back to empty, and only the blocks with a boundary or the diagonal in them are masked.
The kernel for keys is the mirror image. Scores are taken in units of log 2 (exp2 is one instruction). Of each query's softmax
the backward pass gets the maximum m, or m = 0 (`pieces.nothing`), and log2 of the sum l, in 16 bits m + log2 l: rounding it would
show in float32 at large scores. A head's row of these numbers has PITCH places, a multiple of 16, so that a kernel reads several
at a time. In 16 bits narrow heads' gradients are one kernel, in which those of keys and of queries wait for nothing of each
other, and wide heads have a backward pass of their own, mla_attention_kept's.

APART, for tiles of 64 rows and 8 warps on sm_90: scores reach the next product through a condition, s < N, and their two
parts are products apart. Triton takes two products for a chain unless the first one's result passes a condition, and of a
chain it gives both warp groups the same 64 rows of scores: all of them would be computed twice. Where s < N does not hold,
behind the last token, there is nothing to add. Triton 3.6 cannot pipeline such loops of the backward pass: there are none in it.

The loops without a mask stand under a condition that they have a round at all. Else sums that were never begun would meet those
of the loop's last products, which are still under way there, and ptxas would make every product wait for the one before it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from dsfast.triton_kernels import mla_attention_kept
from dsfast.triton_kernels.attention_pieces import (
    UNSPECIALIZED,
    backward_arguments,
    delta_of,
    documents_of,
    example_arguments,
    load_queries,
    load_softmax,
    measure,
    probabilities,
    row_of,
    scores,
    shared_arguments,
    softmax_shape,
    widths_of,
    within,
)
from dsfast.triton_kernels.launch import Launch, large_tiles
from dsfast.triton_kernels.pieces import (
    BY_3_7,
    LOG2E,
    UNSEEN,
    fits,
    load_tile,
    nothing,
    opaque,
    options,
    store_rows,
    sum_launch,
    swizzle,
    takes_raw,
)
from torch import Tensor


@triton.jit
def _softmax(b_s, b_m, m_s, factor, dtype: tl.constexpr, RAW: tl.constexpr):
    """(exp2(s - m) in `dtype`, m, the sum along the keys) of a block of scores, those where the mask m_s says so; None:
    all. Where RAW m is 0, else the maximum so far."""
    if m_s is not None:
        b_s = tl.where(m_s, b_s, float("-inf"))
    if not RAW:
        b_m = tl.maximum(b_m, tl.max(b_s, 1) * factor)
    b_p = tl.exp2(b_s * factor - b_m[:, None])
    return b_p.to(dtype), b_m, tl.sum(b_p, 1)


@triton.jit
def _attend(
    b_o, b_m, b_l, b_q_nope, b_q_rope, k_nope, k_rope, v, i, begin, s, k_nope_n, k_rope_n, v_n, factor, N,
    Dn: tl.constexpr, Dr: tl.constexpr, Dv: tl.constexpr, DN: tl.constexpr, DR: tl.constexpr, DV: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, APART: tl.constexpr, RAW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys, from token s on, in the softmax: output so far [BT, DV], its m [BT] and its sum [BT]."""
    b_k_nope = load_tile(k_nope, k_nope_n, s, 0, N, Dn, BS, DN, MASKED)  # [BS, DN]
    b_k_rope = load_tile(k_rope, k_rope_n, s, 0, N, Dr, BS, DR, MASKED)  # [BS, DR]
    b_s = scores(b_q_nope, b_q_rope, b_k_nope, b_k_rope, APART)  # [BT, BS]
    m_s = None
    if MASKED:
        j = s + tl.arange(0, BS)
        m_s = within(j[None, :], begin[:, None], i[:, None] + 1)
    if APART:
        b_p, b_m_new, b_sum = tl.zeros([BT, BS], v.dtype.element_ty), b_m, tl.zeros([BT], tl.float32)
        if s < N:
            b_p, b_m_new, b_sum = _softmax(b_s, b_m, m_s, factor, v.dtype.element_ty, RAW)
    else:
        b_p, b_m_new, b_sum = _softmax(b_s, b_m, m_s, factor, v.dtype.element_ty, RAW)
    if not RAW:
        decay = tl.exp2(b_m - b_m_new)
        b_o, b_l = b_o * decay[:, None], b_l * decay
    b_v = load_tile(v, v_n, s, 0, N, Dv, BS, DV, MASKED)  # [BS, DV]
    return tl.dot(b_p, b_v, b_o, input_precision="ieee"), b_m_new, b_l + b_sum


@triton.jit
def _attend_tile(
    b_q_nope, b_q_rope, k_nope, k_rope, v, begin, first, t, k_nope_n, k_rope_n, v_n, factor, N,
    Dn: tl.constexpr, Dr: tl.constexpr, Dv: tl.constexpr, DN: tl.constexpr, DR: tl.constexpr, DV: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, APART: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """All keys of the tile of queries from token t on, block by block, as `_attend`. begin [BT]: where the queries'
    documents do, first: the first of these."""
    b_o, b_m, b_l = nothing(BT, DV, RAW)
    i = t + tl.arange(0, BT)  # [BT]
    whole = tl.cdiv(first, BS) * BS
    if whole < t:
        for s in range(whole, t, BS):
            b_o, b_m, b_l = _attend(
                b_o, b_m, b_l, b_q_nope, b_q_rope, k_nope, k_rope, v, i, begin, s,
                k_nope_n, k_rope_n, v_n, factor, N, Dn, Dr, Dv, DN, DR, DV, BT, BS, APART, RAW, False,
            )  # fmt: skip
    own = begin == first  # the others begin with their own tile
    b_o, b_l = tl.where(own[:, None], b_o, 0.0), tl.where(own, b_l, 0.0)
    if not RAW:
        b_m = tl.where(own, b_m, UNSEEN)
    # The block the first document begins in, where it begins inside one before the tile; then the tile's own keys.
    head = first // BS * BS
    skip = tl.where((head < first) & (head < t), 0, 1)
    for n in range(skip, BT // BS + 1):
        s = tl.where(n == 0, head, t + (n - 1) * BS)
        b_o, b_m, b_l = _attend(
            b_o, b_m, b_l, b_q_nope, b_q_rope, k_nope, k_rope, v, i, begin, s,
            k_nope_n, k_rope_n, v_n, factor, N, Dn, Dr, Dv, DN, DR, DV, BT, BS, APART, RAW, True,
        )  # fmt: skip
    return b_o, b_m, b_l


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
    q_nope, q_rope, k_nope, k_rope, v, cu_seqlens, o, softmax, scale,
    q_nope_n, q_nope_h, q_rope_n, q_rope_h, k_nope_n, k_nope_h, k_rope_n, v_n, v_h, PITCH, N, H, S, STEPS,
    Dn: tl.constexpr, Dr: tl.constexpr, Dv: tl.constexpr, DN: tl.constexpr, DR: tl.constexpr, DV: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, G: tl.constexpr, SHARED: tl.constexpr, APART: tl.constexpr,
    RAW: tl.constexpr,
):  # fmt: skip
    """o [N, H, Dv] and softmax [1 or 2, H, PITCH] for one tile of queries and one head."""
    tiles = tl.cdiv(N, BT)
    h, tile = swizzle(H, tiles, G)
    h = h.to(tl.int64)
    t = (tiles - 1 - tile) * BT  # the last tile of a document is the longest: it goes first
    i = t + tl.arange(0, BT)  # [BT]
    begin, _ = documents_of(cu_seqlens, tl.minimum(i, N - 1), S, STEPS)
    # Not the minimum of begin: a loop from a reduction is not pipelined.
    first, _ = documents_of(cu_seqlens, t, S, STEPS)
    k_nope += h // SHARED * k_nope_h
    v += h // SHARED * v_h
    b_q_nope = load_tile(q_nope + h * q_nope_h, q_nope_n, t, 0, N, Dn, BT, DN, True)  # [BT, DN]
    b_q_rope = load_tile(q_rope + h * q_rope_h, q_rope_n, t, 0, N, Dr, BT, DR, True)  # [BT, DR]
    factor = scale * LOG2E
    b_o, b_m, b_l = _attend_tile(
        b_q_nope, b_q_rope, k_nope, k_rope, v, begin, first, t, k_nope_n, k_rope_n, v_n, factor, N,
        Dn, Dr, Dv, DN, DR, DV, BT, BS, APART, RAW,
    )  # fmt: skip
    if RAW:  # noqa: SIM102 (known when it is compiled)
        if not fits(b_l):
            b_o, b_m, b_l = nothing(BT, DV, False)
            for s in range(opaque(first // BS) * BS, t + BT, BS):
                b_o, b_m, b_l = _attend(
                    b_o, b_m, b_l, b_q_nope, b_q_rope, k_nope, k_rope, v, i, begin, s,
                    k_nope_n, k_rope_n, v_n, factor, N, Dn, Dr, Dv, DN, DR, DV, BT, BS, APART, False, True,
                )  # fmt: skip

    store_rows(o + h * Dv, H * Dv, t, N, b_o * (1.0 / b_l)[:, None], BT, Dv, DV)
    p_m, b_log_l = softmax + h * PITCH + i, tl.log2(b_l)
    if v.dtype.element_ty == tl.float32:
        tl.store(p_m + tl.cast(H, tl.int64) * PITCH, b_log_l, mask=i < PITCH)
    else:
        b_m += b_log_l
    tl.store(p_m, b_m, mask=i < PITCH)


@triton.jit
def _attend_dq(
    b_dq_nope, b_dq_rope, b_q_nope, b_q_rope, b_do, b_m, b_log_l, b_delta, k_nope, k_rope, v, i, begin, s,
    k_nope_n, k_rope_n, v_n, factor, N,
    Dn: tl.constexpr, Dr: tl.constexpr, Dv: tl.constexpr, DN: tl.constexpr, DR: tl.constexpr, DV: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, APART: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add one block of keys, from token s on, to the gradient of a tile of queries: [BT, DN] and [BT, DR]."""
    b_k_nope = load_tile(k_nope, k_nope_n, s, 0, N, Dn, BS, DN, MASKED)  # [BS, DN]
    b_k_rope = load_tile(k_rope, k_rope_n, s, 0, N, Dr, BS, DR, MASKED)  # [BS, DR]
    b_v = load_tile(v, v_n, s, 0, N, Dv, BS, DV, MASKED)  # [BS, DV]
    b_s = scores(b_q_nope, b_q_rope, b_k_nope, b_k_rope, APART)  # [BT, BS]
    # In this order: with dp or the mask made earlier not all fits the registers of sm_90.
    b_p, b_ds = tl.zeros([BT, BS], tl.float32), tl.zeros([BT, BS], b_v.dtype)
    if not APART or s < N:
        b_p = probabilities(b_s, b_m[:, None], b_log_l[:, None], factor, b_v.dtype == tl.float32)
        if MASKED:
            j = s + tl.arange(0, BS)
            b_p = tl.where(within(j[None, :], begin[:, None], i[:, None] + 1), b_p, 0.0)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")  # [BT, BS]
    if not APART or s < N:
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_v.dtype)
    b_dq_nope = tl.dot(b_ds, b_k_nope, b_dq_nope, input_precision="ieee")
    return b_dq_nope, tl.dot(b_ds, b_k_rope, b_dq_rope, input_precision="ieee")


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_q_kernel(
    do, q_nope, q_rope, k_nope, k_rope, v, cu_seqlens, o, softmax, dq_nope, dq_rope, delta, scale, number,
    do_n, do_h, q_nope_n, q_nope_h, q_rope_n, q_rope_h, k_nope_n, k_nope_h, k_rope_n, v_n, v_h, PITCH, N, H, S, STEPS,
    Dn: tl.constexpr, Dr: tl.constexpr, Dv: tl.constexpr, DN: tl.constexpr, DR: tl.constexpr, DV: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, G: tl.constexpr, SHARED: tl.constexpr, APART: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """For one tile and head, this program's or those of that `number`: dq_nope [N, H, Dn], dq_rope [N, H, Dr] and, where delta is
    not None, delta [H, PITCH]."""
    tiles = tl.cdiv(N, BT)
    h, tile = swizzle(H, tiles, G, number)
    h = h.to(tl.int64)
    t = (tiles - 1 - tile) * BT
    i = t + tl.arange(0, BT)  # [BT]
    begin, _ = documents_of(cu_seqlens, tl.minimum(i, N - 1), S, STEPS)
    # Not the minimum of begin: a loop from a reduction is not pipelined.
    first, _ = documents_of(cu_seqlens, t, S, STEPS)
    k_nope += h // SHARED * k_nope_h
    v += h // SHARED * v_h
    b_q_nope = load_tile(q_nope + h * q_nope_h, q_nope_n, t, 0, N, Dn, BT, DN, True)  # [BT, DN]
    b_q_rope = load_tile(q_rope + h * q_rope_h, q_rope_n, t, 0, N, Dr, BT, DR, True)  # [BT, DR]
    b_do = load_tile(do + h * do_h, do_n, t, 0, N, Dv, BT, DV, True)  # [BT, DV]
    b_o = load_tile(o + h * Dv, H * Dv, t, 0, N, Dv, BT, DV, True)  # [BT, DV]
    b_delta = delta_of(b_do, b_o)
    if delta is not None:
        tl.store(delta + h * PITCH + i, b_delta, mask=i < N)
    b_m, b_log_l = load_softmax(softmax, h, i, N, PITCH, H, v.dtype.element_ty == tl.float32, True)
    b_dq_nope = tl.zeros([BT, DN], tl.float32)
    b_dq_rope = tl.zeros([BT, DR], tl.float32)
    factor = scale * LOG2E

    whole = tl.cdiv(first, BS) * BS
    if whole < t:
        for s in tl.range(whole, t, BS, num_stages=STAGES):
            b_dq_nope, b_dq_rope = _attend_dq(
                b_dq_nope, b_dq_rope, b_q_nope, b_q_rope, b_do, b_m, b_log_l, b_delta, k_nope, k_rope, v, i, begin, s,
                k_nope_n, k_rope_n, v_n, factor, N, Dn, Dr, Dv, DN, DR, DV, BT, BS, APART, False,
            )  # fmt: skip
    own = (begin == first)[:, None]
    b_dq_nope = tl.where(own, b_dq_nope, 0.0)
    b_dq_rope = tl.where(own, b_dq_rope, 0.0)
    head = first // BS * BS
    skip = tl.where((head < first) & (head < t), 0, 1)
    for n in tl.range(skip, BT // BS + 1, num_stages=STAGES):
        s = tl.where(n == 0, head, t + (n - 1) * BS)
        b_dq_nope, b_dq_rope = _attend_dq(
            b_dq_nope, b_dq_rope, b_q_nope, b_q_rope, b_do, b_m, b_log_l, b_delta, k_nope, k_rope, v, i, begin, s,
            k_nope_n, k_rope_n, v_n, factor, N, Dn, Dr, Dv, DN, DR, DV, BT, BS, APART, True,
        )  # fmt: skip

    store_rows(dq_nope + h * Dn, H * Dn, t, N, b_dq_nope * scale, BT, Dn, DN)
    store_rows(dq_rope + h * Dr, H * Dr, t, N, b_dq_rope * scale, BT, Dr, DR)


@triton.jit
def _attend_dkv(
    b_dk_nope, b_dk_rope, b_dv, b_k_nope, b_k_rope, b_v, do, q_nope, q_rope, o, softmax, delta, j, end, s,
    h, do_n, q_nope_n, q_rope_n, PITCH, factor, N, H,
    Dn: tl.constexpr, Dr: tl.constexpr, Dv: tl.constexpr, DN: tl.constexpr, DR: tl.constexpr, DV: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, APART: tl.constexpr, OPAQUE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add one block of queries, from token s on, to the gradients of a tile of keys and values: [BS, DN], [BS, DR], [BS, DV]."""
    if OPAQUE:
        s = tl.multiple_of(opaque(s), BT)
    b_q_nope = load_tile(q_nope, q_nope_n, s, 0, N, Dn, BT, DN, MASKED, True)  # [BT, DN]
    b_q_rope = load_tile(q_rope, q_rope_n, s, 0, N, Dr, BT, DR, MASKED, True)  # [BT, DR]
    b_do = load_tile(do, do_n, s, 0, N, Dv, BT, DV, MASKED, True)  # [BT, DV]
    i = s + tl.arange(0, BT)
    b_m, b_log_l = load_softmax(softmax, h, i, N, PITCH, H, b_v.dtype == tl.float32, MASKED)
    if o is None:
        b_delta = load_queries(delta, h, i, N, PITCH, MASKED)
    else:
        b_o = load_tile(o, H * Dv, s, 0, N, Dv, BT, DV, MASKED, True)  # [BT, DV]
        b_delta = delta_of(b_do, b_o)
    b_s = scores(b_k_nope, b_k_rope, b_q_nope, b_q_rope, APART)  # [BS, BT]
    b_p, b_left, b_ds = tl.zeros([BS, BT], tl.float32), tl.zeros([BS, BT], b_v.dtype), tl.zeros([BS, BT], b_v.dtype)
    if not APART or s < N:
        b_p = probabilities(b_s, b_m[None, :], b_log_l[None, :], factor, b_v.dtype == tl.float32)
        if MASKED:
            b_p = tl.where(within(i[None, :], j[:, None], end[:, None]), b_p, 0.0)
        b_left = b_p.to(b_v.dtype)
    b_dv = tl.dot(b_left, b_do, b_dv, input_precision="ieee")
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")  # [BS, BT]
    if not APART or s < N:
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_v.dtype)
    b_dk_nope = tl.dot(b_ds, b_q_nope, b_dk_nope, input_precision="ieee")
    return b_dk_nope, tl.dot(b_ds, b_q_rope, b_dk_rope, input_precision="ieee"), b_dv


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_kv_kernel(
    do, q_nope, q_rope, k_nope, k_rope, v, cu_seqlens, o, softmax, delta, dk_nope, shares, dv, scale, number,
    do_n, do_h, q_nope_n, q_nope_h, q_rope_n, q_rope_h, k_nope_n, k_nope_h, k_rope_n, v_n, v_h, PITCH, N, H, S, STEPS,
    Dn: tl.constexpr, Dr: tl.constexpr, Dv: tl.constexpr, DN: tl.constexpr, DR: tl.constexpr, DV: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, G: tl.constexpr, SHARED: tl.constexpr, APART: tl.constexpr,
    STAGES: tl.constexpr, OPAQUE: tl.constexpr,
):  # fmt: skip
    """For one tile and head of queries, this program's or those of that `number`: dk_nope [N, H, Dn], dv [N, H, Dv] and the
    head's shares [H, N, Dr] of dk_rope. Where o is not None delta is made of it."""
    h, tile = swizzle(H, tl.cdiv(N, BS), G, number)
    h = h.to(tl.int64)
    t = tile * BS  # the first tile of a document is the longest
    j = t + tl.arange(0, BS)  # [BS]
    _, end = documents_of(cu_seqlens, tl.minimum(j, N - 1), S, STEPS)
    _, last = documents_of(cu_seqlens, tl.minimum(t + BS, N) - 1, S, STEPS)
    last = tl.minimum(last, N)
    do += h * do_h
    if o is not None:
        o += h * Dv
    q_nope += h * q_nope_h
    q_rope += h * q_rope_h
    b_k_nope = load_tile(k_nope + h // SHARED * k_nope_h, k_nope_n, t, 0, N, Dn, BS, DN, True)  # [BS, DN]
    b_k_rope = load_tile(k_rope, k_rope_n, t, 0, N, Dr, BS, DR, True)  # [BS, DR]
    b_v = load_tile(v + h // SHARED * v_h, v_n, t, 0, N, Dv, BS, DV, True)  # [BS, DV]
    b_dk_nope = tl.zeros([BS, DN], tl.float32)
    b_dk_rope = tl.zeros([BS, DR], tl.float32)
    b_dv = tl.zeros([BS, DV], tl.float32)
    factor = scale * LOG2E

    tail = last // BT * BT  # the block the last document ends in, if it ends inside one
    if t + BS < tail:
        for s in tl.range(t + BS, tail, BT, num_stages=STAGES):
            b_dk_nope, b_dk_rope, b_dv = _attend_dkv(
                b_dk_nope, b_dk_rope, b_dv, b_k_nope, b_k_rope, b_v, do, q_nope, q_rope, o, softmax, delta, j, end,
                s, h, do_n, q_nope_n, q_rope_n, PITCH, factor, N, H, Dn, Dr, Dv, DN, DR, DV, BT, BS, APART, OPAQUE,
                False,
            )  # fmt: skip
    own = (end >= last)[:, None]  # later queries concern only the keys of the document that the tile ends in
    b_dk_nope = tl.where(own, b_dk_nope, 0.0)
    b_dk_rope = tl.where(own, b_dk_rope, 0.0)
    b_dv = tl.where(own, b_dv, 0.0)
    blocks = BS // BT + tl.where((tail < last) & (tail >= t + BS), 1, 0)
    for n in tl.range(blocks, num_stages=STAGES):
        s = tl.where(n < BS // BT, t + n * BT, tail)
        b_dk_nope, b_dk_rope, b_dv = _attend_dkv(
            b_dk_nope, b_dk_rope, b_dv, b_k_nope, b_k_rope, b_v, do, q_nope, q_rope, o, softmax, delta, j, end,
            s, h, do_n, q_nope_n, q_rope_n, PITCH, factor, N, H, Dn, Dr, Dv, DN, DR, DV, BT, BS, APART, OPAQUE, True,
        )  # fmt: skip

    store_rows(dk_nope + h * Dn, H * Dn, t, N, b_dk_nope * scale, BS, Dn, DN)
    store_rows(shares + h * N * Dr, Dr, t, N, b_dk_rope * scale, BS, Dr, DR)
    store_rows(dv + h * Dv, H * Dv, t, N, b_dv, BS, Dv, DV)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_kernel(
    do, q_nope, q_rope, k_nope, k_rope, v, cu_seqlens, o, softmax, dq_nope, dq_rope, dk_nope, shares, dv, scale,
    do_n, do_h, q_nope_n, q_nope_h, q_rope_n, q_rope_h, k_nope_n, k_nope_h, k_rope_n, v_n, v_h, PITCH, N, H, S, STEPS,
    Dn: tl.constexpr, Dr: tl.constexpr, Dv: tl.constexpr, DN: tl.constexpr, DR: tl.constexpr, DV: tl.constexpr,
    QT: tl.constexpr, QS: tl.constexpr, KT: tl.constexpr, KS: tl.constexpr, G: tl.constexpr, SHARED: tl.constexpr,
    Q_STAGES: tl.constexpr, K_STAGES: tl.constexpr, OPAQUE: tl.constexpr,
):  # fmt: skip
    """All gradients of narrow heads: first a program for each tile of keys and head of queries, by blocks of KT and KS, which
    makes delta itself, then one for each tile of queries and head, by QT and QS. None waits for another."""
    of_keys = tl.cdiv(N, KS) * H
    number = tl.program_id(0)
    if number < of_keys:
        backward_kv_kernel(
            do, q_nope, q_rope, k_nope, k_rope, v, cu_seqlens, o, softmax, None, dk_nope, shares, dv, scale, number,
            do_n, do_h, q_nope_n, q_nope_h, q_rope_n, q_rope_h, k_nope_n, k_nope_h, k_rope_n, v_n, v_h, PITCH, N, H, S, STEPS,
            Dn, Dr, Dv, DN, DR, DV, KT, KS, G, SHARED, False, K_STAGES, OPAQUE,
        )  # fmt: skip
    else:
        backward_q_kernel(
            do, q_nope, q_rope, k_nope, k_rope, v, cu_seqlens, o, softmax, dq_nope, dq_rope, None, scale, number - of_keys,
            do_n, do_h, q_nope_n, q_nope_h, q_rope_n, q_rope_h, k_nope_n, k_nope_h, k_rope_n, v_n, v_h, PITCH, N, H, S, STEPS,
            Dn, Dr, Dv, DN, DR, DV, QT, QS, G, SHARED, False, Q_STAGES,
        )  # fmt: skip


class Tiles(NamedTuple):
    """BT queries by BS keys. Queries' kernels want BS to divide BT, the keys' kernel the other way round."""

    bt: int
    bs: int
    warps: int
    stages: int


_NARROW = 80  # `measure` up to which one kernel makes all gradients
_REST = 2048  # key of the row that serves all the rest
# Kernel -> largest `measure` that a row serves -> tiles. Starting values: they keep the limits of
# tests/test_triton_compile.py and are not tuned. Products of full float32 precision hold both operands in registers, hence their
# small tiles on every chip; 16 bits have large ones (sm_90, sm_100) and small ones. Narrow heads' are as small as a
# multiprocessor can hold four programs of: each waits for its loads, and does little between.
_FLOAT32 = {
    "forward": {96: Tiles(32, 32, 4, 1), 320: Tiles(16, 16, 8, 1), _REST: Tiles(16, 16, 8, 2)},
    "backward_q": {96: Tiles(32, 16, 4, 1), 320: Tiles(16, 16, 8, 1), _REST: Tiles(16, 16, 8, 2)},
    "backward_kv": {96: Tiles(16, 32, 4, 1), 320: Tiles(16, 16, 8, 1), _REST: Tiles(16, 16, 8, 2)},
}
_LARGE = {
    "forward": {
        96: Tiles(64, 64, 4, 3),
        192: Tiles(128, 64, 8, 3),
        320: Tiles(128, 64, 8, 3),
        576: Tiles(128, 32, 8, 2) if BY_3_7 else Tiles(64, 32, 8, 2),
        _REST: Tiles(32, 16, 8, 2),
    },
    "backward_q": {
        80: Tiles(64, 32, 4, 3),
        192: Tiles(128, 64, 8, 3),
        320: Tiles(128, 64, 8, 3),
        576: Tiles(32, 32, 8, 2) if BY_3_7 else Tiles(64, 16, 8, 2),
        _REST: Tiles(32, 16, 8, 2),
    },
    "backward_kv": {
        96: Tiles(32, 64, 4, 1),
        192: Tiles(32, 128, 8, 3),
        320: Tiles(32, 128, 8, 2) if BY_3_7 else Tiles(64, 64, 8, 3),
        _REST: Tiles(16, 32, 8, 2),
    },
}
# Where sums lie in tensor memory there is room for 128 keys, half as many of which its instruction takes no faster; and a thread
# of 8 warps may get 128 registers and no more.
_SM_100 = {
    "forward": _LARGE["forward"] | {576: Tiles(64, 32, 8, 3)},
    "backward_q": _LARGE["backward_q"] | {80: Tiles(64, 64, 4, 3), 320: Tiles(128, 32, 8, 2), 576: Tiles(64, 32, 8, 2)},
    "backward_kv": _LARGE["backward_kv"] | {320: Tiles(32, 128, 8, 2)},
}
_SMALL = {
    "forward": {
        96: Tiles(64, 64, 4, 2),
        192: Tiles(64, 32, 4, 2),
        320: Tiles(64, 32, 4, 2),
        _REST: Tiles(32, 16, 4, 2),
    },
    "backward_q": {
        96: Tiles(64, 32, 4, 2),
        192: Tiles(64, 32, 8, 2),
        320: Tiles(32, 32, 4, 2),
        _REST: Tiles(16, 16, 4, 2),
    },
    "backward_kv": {
        96: Tiles(32, 64, 4, 2),
        192: Tiles(16, 64, 4, 2),
        320: Tiles(32, 32, 4, 1),
        _REST: Tiles(16, 16, 4, 2),
    },
}


def tiles(kernel: str, dtype: torch.dtype, widths: tuple[int, int, int], large: int) -> Tiles:
    """Tiles for `kernel` ("forward", "backward_q", "backward_kv") at widths Dn, Dr, Dv."""
    by_measure = (_FLOAT32 if dtype.itemsize == 4 else _SM_100 if large == 10 else _LARGE if large else _SMALL)[kernel]
    return row_of(by_measure, widths)


def without_maximum(dtype: torch.dtype, widths: tuple[int, int, int], large: int) -> bool:
    """Whether the forward pass is RAW at widths Dn, Dr, Dv. Narrow heads would have fewer programs on a multiprocessor."""
    return takes_raw(dtype, large) and measure(*widths) > _NARROW


def forward(q_nope, q_rope, k_nope, k_rope, v, cu_seqlens, scale) -> tuple[Tensor, Tensor]:
    """Shapes as dsfast.ops.mla_attention -> o [N, H, Dv] contiguous, and softmax float32, of `softmax_shape`: each query's
    largest score in units of log 2, and log2 of the sum of its exponentials relative to that; in 16 bits their sum.

    Raises ValueError for cu_seqlens without a document. That it rises from 0 to N is not checked: it lies on the device, and
    looking would make the host wait.
    """
    _expect_documents(q_nope, cu_seqlens)
    (n, h, _), dv = q_nope.shape, v.size(2)
    o, softmax = q_nope.new_empty(n, h, dv), q_nope.new_empty(softmax_shape(q_nope), dtype=torch.float32)
    if o.numel():
        with torch.cuda.device_of(q_nope):
            forward_launch(
                q_nope, q_rope, k_nope, k_rope, v, cu_seqlens, scale, o, softmax, large_tiles(o.device)
            ).run()
    return o, softmax


def backward(do, q_nope, q_rope, k_nope, k_rope, v, cu_seqlens, scale, o, softmax) -> tuple[Tensor, ...]:
    """The gradients of q_nope, q_rope, k_nope, k_rope, v from that of o, those of k_nope, v and a k_rope [N, H, Dr] for each
    head of queries [N, H, .]. Deterministic: no atomics. Errors as `forward`."""
    _expect_documents(q_nope, cu_seqlens)
    with torch.cuda.device_of(q_nope):
        arguments = backward_arguments(do, q_nope, q_rope, k_nope, k_rope, v, cu_seqlens, scale, o, softmax)
        for launch in backward_launches(arguments, large_tiles(o.device)):
            launch.run()
    return tuple(arguments[name] for name in ("dq_nope", "dq_rope", "dk_nope", "dk_rope", "dv"))


def forward_launch(q_nope, q_rope, k_nope, k_rope, v, cu_seqlens, scale, o, softmax, large: int) -> Launch:
    """The launch that fills o and softmax; tensors may lie on the meta device."""
    arguments = shared_arguments(q_nope, q_rope, k_nope, k_rope, v, cu_seqlens, scale)
    return _launch(forward_kernel, large, arguments | {"o": o, "softmax": softmax})


def backward_launches(arguments: dict, large: int) -> list[Launch]:
    """The launches that fill the results among `arguments`, which are `backward_arguments`': those of mla_attention_kept where it
    serves them, else those that make scores anew; and where dk_rope is one for all heads, what adds up the heads' shares."""
    heads = mla_attention_kept.heads_at_once(arguments, large)
    launches = mla_attention_kept.launches(arguments, heads, large) if heads else _anew(arguments, large)
    if arguments["dk_rope"].dim() == 3:
        return launches
    return [*launches, sum_launch(arguments["shares"], arguments["dk_rope"])]


def _anew(arguments: dict, large: int) -> list[Launch]:
    """One kernel for narrow heads, else the one for queries, which also fills delta, and the one for keys, which reads it."""
    if arguments["v"].dtype.itemsize == 2 and measure(*widths_of(arguments)) <= _NARROW:
        return [_both(arguments, large)]
    return [
        _launch(backward_q_kernel, large, arguments | {"number": None}),
        _launch(backward_kv_kernel, large, arguments | {"number": None, "o": None}),
    ]


def _expect_documents(q_nope, cu_seqlens) -> None:
    if q_nope.size(0) and cu_seqlens.size(0) < 2:
        raise ValueError(
            f"mla_attention: cu_seqlens must hold 0 and the end of each document, got {cu_seqlens.size(0)} numbers"
        )


def _launch(kernel, large: int, arguments: dict) -> Launch:
    name = kernel.__name__.removesuffix("_kernel")
    bt, bs, warps, stages = tiles(name, arguments["v"].dtype, widths_of(arguments), large)
    tile = bs if name == "backward_kv" else bt
    itemsize = arguments["v"].dtype.itemsize
    # Below 64 rows a gradient no wider than it is high would make Triton give all products to the warps by rows, of which there
    # are too few: every warp would hold the same sums, whole rows, and spill.
    least = 2 * tile if itemsize == 2 and tile < 64 and name != "forward" else 0
    widths = {letters: max(arguments[letters], least) for letters in ("DN", "DR", "DV")}
    apart = not BY_3_7 and large == 9 and itemsize == 2 and warps == 8 and tile == 64
    tiling = {
        "BT": bt,
        "BS": bs,
        "STAGES": stages,
        "APART": apart,
        "RAW": without_maximum(arguments["v"].dtype, widths_of(arguments), large),
        "OPAQUE": _opaque(itemsize, large),
    }
    grid = (triton.cdiv(arguments["N"], tile) * arguments["H"],)
    return Launch(kernel, grid, arguments | widths | tiling, options(warps, stages), itemsize, tile)


def _opaque(itemsize: int, large: int) -> bool:
    """Whether the keys' kernel would spill without starts from pieces.opaque. Elsewhere they cost: loads know less of their
    addresses."""
    return itemsize == 4 or not large


def _both(arguments: dict, large: int) -> Launch:
    """The launch of backward_kernel: both kernels' tiles, which have as many warps."""
    dtype, widths = arguments["v"].dtype, widths_of(arguments)
    of_queries, of_keys = (tiles(name, dtype, widths, large) for name in ("backward_q", "backward_kv"))
    tiling = {"QT": of_queries.bt, "QS": of_queries.bs, "KT": of_keys.bt, "KS": of_keys.bs}
    tiling |= {"Q_STAGES": of_queries.stages, "K_STAGES": of_keys.stages, "OPAQUE": _opaque(2, large)}
    grid = ((triton.cdiv(arguments["N"], of_queries.bt) + triton.cdiv(arguments["N"], of_keys.bs)) * arguments["H"],)
    how = options(of_keys.warps, max(of_queries.stages, of_keys.stages))
    return Launch(backward_kernel, grid, arguments | tiling, how, 2, min(of_queries.bt, of_keys.bs))


EXAMPLES = {
    "500K": (32, 16, 32, 16),
    "middle": (64, 64, 64, 16),
    "DeepSeek-V3": (128, 64, 128, 16),
    "DeepSeek-V3, 4 heads of keys": (128, 64, 128, 4),
    "widest": (192, 64, 256, 16),
    "narrow rope": (80, 16, 80, 16),
    "three alike": (128, 128, 128, 16),
    "wide keys": (512, 32, 32, 16),
}
"""Dn, Dr, Dv and heads of keys and values, for 16 of queries, that are compiled ahead."""


def example_launches(size: str, dtype: torch.dtype, large: int) -> dict[str, Launch]:
    """Kernel and variant -> launch at EXAMPLES[size], on the meta device; of the backward pass those that make scores anew."""
    arguments = example_arguments(EXAMPLES[size], dtype)
    *makers, of_keys = _anew(arguments, large)
    launches = [
        _launch(forward_kernel, large, arguments), *makers, of_keys,
        sum_launch(arguments["shares"], arguments["dk_rope"]),
    ]  # fmt: skip
    found = {launch.kernel.__name__: launch for launch in launches}
    if dtype.itemsize == 4:  # where the heads' shares are of that dtype anyway
        return found
    by_heads = replace(of_keys, arguments=of_keys.arguments | {"shares": arguments["shares"].to(dtype)})
    return found | {f"{of_keys.kernel.__name__}, dk_rope by heads": by_heads}
