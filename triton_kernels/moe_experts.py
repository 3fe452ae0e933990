"""Triton kernels of dsfast.ops.moe_experts, whose module has the maths, and of swiglu_mlp, which is one expert for all tokens.

N tokens, D model width, K chosen experts, E experts, I intermediate width. Slots are worked on sorted by expert: there are R
places in that order, and order[r] = n K + k is the slot at place r. A tile holds BM places of one expert; whose it is, each
program finds from the offsets, so the grid follows from the number of slots alone. All products are rows of one expert times
that expert's matrix or, for the gradients of the matrices, rows transposed times rows.

    up               gu = x[n] gate_up^T, h = silu(gate) * up        rows gathered from the tokens; where I is small, y_slot too
    project          y_slot = w h down^T,  dx_slot = dgu gate_up     rows scattered to the slots
                     dh = dy[n] down                                 rows gathered from the tokens
    swiglu_backward  dgu, w h and dw from dh and gu                  not in the product before it, whose tiles would get smaller
    matrix           dgate_up = dgu^T x[n],  ddown^T = (w h)^T dy[n] sums over an expert's slots
    sum              y = sum over k of y_slot                        and over the parts of a split sum

Where D and I are small the backward pass is, in 16 bits, three launches, of which the layers before wait for the first:

    narrow_backward  dx_slot, dw                                     dgu stays in the program
    narrow_matrix    of each tile dgate_up, ddown                    dgu, made again, and w h stay in the program
    add_tiles        dgate_up, ddown                                 sums over an expert's tiles

With K = 1 a slot is its token: nothing is left to add up and project writes y itself. Without `order` (swiglu_mlp) a place is
its token and there is one expert. An index that names no expert makes everything of its slot NaN: the token's row of y and of
dx, and its weight's gradient. The gradients of the matrices leave it out.
"""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from dsfast.triton_kernels.launch import Launch, aside, large_tiles, on_meta, padded, rows
from dsfast.triton_kernels.limits import MULTIPROCESSORS
from dsfast.triton_kernels.pieces import opaque, options, sum_launch, swizzle
from torch import Tensor

TILES_TOGETHER = 8  # tiles of rows whose programs run side by side, block after block of columns: for the L2 cache
FULL = 2 * MULTIPROCESSORS  # programs
FUSED = 64  # widest I at which a program goes on to y with its tile of h: a launch less, and h is not written
NARROW = 128  # widest D at which, where I is no wider than FUSED too, the backward pass is that of narrow experts
FEW = 32  # rows of narrow experts' tiles where there are no more of 64 than multiprocessors
ADDED = 64  # tiles whose parts of the matrices' gradients are added up at once
SHARE = 256  # places of an expert from which on the sum over them is split
_UNSPECIALIZED = ("R",)  # changes from batch to batch and must not cause a new compilation


@triton.jit
def _tiles_of_bins(offsets, R, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr):
    """Tiles of BM places that each expert has [EP]; the last one's, at E, are those of the places of no expert."""
    bins = tl.arange(0, EP)
    b_first = tl.load(offsets + bins, mask=bins <= E, other=R)
    b_last = tl.load(offsets + bins + 1, mask=bins < E, other=R)
    return (b_last - b_first + BM - 1) // BM


@triton.jit
def _find(offsets, tile, R, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr):
    """(expert, its first place in the tile, the place after its last); E for places of no expert, an empty range beyond all."""
    b_tiles = tl.cumsum(_tiles_of_bins(offsets, R, E, EP, BM), 0)  # of this bin and those before
    b_before = b_tiles <= tile
    e = tl.sum(b_before.to(tl.int32), 0)
    within = tile - tl.max(tl.where(b_before, b_tiles, 0), 0)
    first = tl.load(offsets + e, mask=e <= E, other=R) + within * BM  # e > E: beyond all
    return tl.minimum(e, E), first, tl.load(offsets + e + 1, mask=e < E, other=R)


@triton.jit
def _tile(order, offsets, tile, R, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, ROUTED: tl.constexpr):
    """(expert, first place, the others relative to it [BM], their slots [BM] int64, whether [BM] they are there) of a tile.

    Also where a place is not there its slot is one, so that tokens may be read without a mask.
    """
    e, first, end = 0, tile * BM, R
    if ROUTED:
        e, first, end = _find(offsets, tile, R, E, EP, BM)
    m = tl.arange(0, BM)
    m_r = m < end - first
    slot = tl.load(order + first + m, mask=m_r, other=0) if ROUTED else tl.minimum(first + m, R - 1)
    return e, tl.cast(first, tl.int64), m, slot.to(tl.int64), m_r


@triton.jit
def _load(p, k, DEPTH: tl.constexpr, BK: tl.constexpr, n, WIDTH: tl.constexpr, BN: tl.constexpr):
    """The tile at `p`, 0 where k >= DEPTH or n >= WIDTH. No mask where blocks fill the matrix."""
    if DEPTH % BK == 0 and WIDTH % BN == 0:
        return tl.load(p)
    return tl.load(p, mask=(k < DEPTH) & (n < WIDTH), other=0.0)


@triton.jit
def _steps(DEPTH: tl.constexpr, BK: tl.constexpr, R):
    """Blocks of BK in DEPTH; more than two are a number that LLVM does not know. It else unrolls 8 to 20 of them, and beside a
    wide tile's sums sm_90 has no registers for their addresses."""
    if DEPTH <= 2 * BK:
        return tl.cdiv(DEPTH, BK)
    return tl.cdiv(DEPTH, BK) + tl.minimum(R, 0)


@triton.jit
def _scatter(out, weights, base, slot, m_r, n, WIDTH: tl.constexpr, b_out, WEIGHTED: tl.constexpr):
    """Rows `slot` and columns n of out [R, WIDTH] = b_out, times the slot's weight if WEIGHTED, plus base where there is one."""
    m_out = m_r[:, None] & (n < WIDTH)
    if WEIGHTED:
        b_out *= tl.load(weights + slot)[:, None].to(tl.float32)
    if base is not None:
        # Rounded before: beside a wide tile's float32 sums there is no room on sm_100.
        b_out = b_out.to(out.dtype.element_ty) + tl.load(base + (slot * WIDTH)[:, None] + n, mask=m_out, other=0.0)
    tl.store(out + (slot * WIDTH)[:, None] + n, b_out.to(out.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def up_kernel(
    x, gate_up, gu, h, down, weights, base, out, order, offsets, x_n, R,
    D: tl.constexpr, I: tl.constexpr, K: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, G: tl.constexpr, ROUTED: tl.constexpr,
    FUSED: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """gu [R, 2I] and h [R, I] for one tile of places and BN columns of the gate and of the up half, side by side.

    FUSED, where the BN columns are all: the tile goes on to out [R, D] by slot, on top of base, and there is no h.
    """
    blocks = tl.cdiv(I, BN)
    tile, block = swizzle(tl.num_programs(0) // blocks, blocks, G)
    e, first, m, slot, m_r = _tile(order, offsets, tile, R, E, EP, BM, ROUTED)
    if e == E:
        if FUSED:
            for start in tl.static_range(0, D, BD):
                n = (start + tl.arange(0, BD))[None, :]
                _scatter(out, weights, None, slot, m_r, n, D, tl.full([BM, BD], float("nan"), tl.float32), False)
        return
    i = (block * BN + tl.arange(0, BN))[None, :]  # [1, BN]
    d = tl.arange(0, BK)
    p_x = x + (slot // K * x_n)[:, None] + d[None, :]
    p_gate = gate_up + tl.cast(e, tl.int64) * (2 * I * D) + i * D + d[:, None]
    b_gate = tl.zeros([BM, BN], tl.float32)
    b_up = tl.zeros([BM, BN], tl.float32)
    for k in range(tl.cdiv(D, BK)):
        b_x = _load(p_x + k * BK, k * BK + d[None, :], D, BK, 0, 1, 1)  # [BM, BK]
        b_w = _load(p_gate + k * BK, k * BK + d[:, None], D, BK, i, I, BN)  # [BK, BN]
        b_gate = tl.dot(b_x, b_w, b_gate, input_precision="ieee")
        b_w = _load(p_gate + I * D + k * BK, k * BK + d[:, None], D, BK, i, I, BN)
        b_up = tl.dot(b_x, b_w, b_up, input_precision="ieee")
    # Made again: kept over the loop they are registers that sm_90 lacks. With `opaque` 8 bytes spill by triton 3.9.
    i = (block % blocks * BN + tl.arange(0, BN))[None, :]
    m_out = m_r[:, None] & (i < I)
    b_h = (b_gate * tl.sigmoid(b_gate) * b_up).to(gu.dtype.element_ty)
    if FUSED:
        for start in tl.static_range(0, D, BD):
            n = (start + tl.arange(0, BD))[None, :]
            p_down = down + tl.cast(e, tl.int64) * (D * I) + n * I + tl.arange(0, BN)[:, None]
            b_down = _load(p_down, tl.arange(0, BN)[:, None], I, BN, n, D, BD)  # [BN, BD]
            b_out = tl.dot(b_h, b_down, input_precision="ieee")
            _scatter(out, weights, base, slot, m_r, n, D, b_out, WEIGHTED)
    else:
        tl.store(h + first * I + m[:, None] * I + i, b_h, mask=m_out)
    p_gu = gu + first * (2 * I) + m[:, None] * (2 * I) + i
    tl.store(p_gu, b_gate.to(gu.dtype.element_ty), mask=m_out)
    tl.store(p_gu + I, b_up.to(gu.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def project_kernel(
    a, b, weights, base, out, order, offsets, a_n, R,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, b_k: tl.constexpr, b_n: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
    EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, G: tl.constexpr, ROUTED: tl.constexpr,
    GATHER: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """a row times b_e [DEPTH, WIDTH], which has the strides b_k and b_n, for one tile of places and BN columns.

    Without GATHER a row of a [R, DEPTH] by place becomes one of out [R, WIDTH] by slot, times the slot's weight if WEIGHTED, plus
    that of base where there is one.
    With GATHER a row of a [N, DEPTH] by token becomes one of out [R, WIDTH] by place.
    """
    blocks = tl.cdiv(WIDTH, BN)
    tile, block = swizzle(tl.num_programs(0) // blocks, blocks, G)
    e, first, m, slot, m_r = _tile(order, offsets, tile, R, E, EP, BM, ROUTED)
    n = (block * BN + tl.arange(0, BN))[None, :]  # [1, BN]
    d = tl.arange(0, BK)
    if GATHER:
        p_a = a + (slot // K * a_n)[:, None] + d[None, :]
        slot = first + m
    else:
        p_a = a + first * DEPTH + tl.minimum(m, R - 1 - first.to(tl.int32))[:, None] * DEPTH + d[None, :]
    if e == E:
        _scatter(out, weights, None, slot, m_r, n, WIDTH, tl.full([BM, BN], float("nan"), tl.float32), False)
        return
    p_b = b + tl.cast(e, tl.int64) * (DEPTH * WIDTH) + d[:, None] * b_k + n * b_n
    b_out = tl.zeros([BM, BN], tl.float32)
    if first < R:  # always, but ptxas else has each product wait for the one before it
        for k in range(_steps(DEPTH, BK, R)):
            b_a = _load(p_a + k * BK, k * BK + d[None, :], DEPTH, BK, 0, 1, 1)  # [BM, BK]
            b_b = _load(p_b + k * BK * b_k, k * BK + d[:, None], DEPTH, BK, n, WIDTH, BN)  # [BK, BN]
            b_out = tl.dot(b_a, b_b, b_out, input_precision="ieee")
    if ROUTED and not GATHER:  # read again: kept over the loop they are registers that sm_90 lacks
        slot = tl.load(order + opaque(first.to(tl.int32)) + m, mask=m_r, other=0).to(tl.int64)
    _scatter(out, weights, base, slot, m_r, n, WIDTH, b_out, WEIGHTED)


@triton.jit
def _swiglu_backward(b_dh, b_gate, b_up):
    """(h, dgate, dup) of h = silu(gate) * up, all float32."""
    b_s = tl.sigmoid(b_gate)
    b_silu = b_gate * b_s
    return b_silu * b_up, b_dh * b_up * b_s * (1.0 + b_gate * (1.0 - b_s)), b_dh * b_silu


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def swiglu_backward_kernel(
    dh, gu, weights, dgu, dweights, order, offsets, R,
    I: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ROUTED: tl.constexpr,
):  # fmt: skip
    """dgu [R, 2I] and dweights by slot, for BM places; dh [R, I] = dy down becomes the weight times h."""
    r = tl.program_id(0) * BM + tl.arange(0, BM)  # [BM]
    m_r = r < R
    r_64 = r.to(tl.int64)
    if ROUTED:
        slot = tl.load(order + r, mask=m_r, other=0)
        b_weight = tl.load(weights + slot, mask=m_r, other=0.0).to(tl.float32)[:, None]
        b_dw = tl.where(r < tl.load(offsets + E), 0.0, float("nan"))  # NaN for the places of no expert
    for block in range(tl.cdiv(I, BN)):
        i = (block * BN + tl.arange(0, BN))[None, :]
        m_i = m_r[:, None] & (i < I)
        p_h, tile_gu = dh + (r_64 * I)[:, None] + i, (r_64 * (2 * I))[:, None] + i
        b_dh = tl.load(p_h, mask=m_i, other=0.0).to(tl.float32)
        b_gate = tl.load(gu + tile_gu, mask=m_i, other=0.0).to(tl.float32)
        b_up = tl.load(gu + tile_gu + I, mask=m_i, other=0.0).to(tl.float32)
        b_h, b_dgate, b_dup = _swiglu_backward(b_dh, b_gate, b_up)
        if ROUTED:
            b_dw += tl.sum(b_dh * b_h, 1)
            b_h, b_dgate, b_dup = b_h * b_weight, b_dgate * b_weight, b_dup * b_weight
        tl.store(p_h, b_h.to(dh.dtype.element_ty), mask=m_i)
        tl.store(dgu + tile_gu, b_dgate.to(dgu.dtype.element_ty), mask=m_i)
        tl.store(dgu + tile_gu + I, b_dup.to(dgu.dtype.element_ty), mask=m_i)
    if ROUTED:
        tl.store(dweights + slot, b_dw.to(dweights.dtype.element_ty), mask=m_r)


@triton.jit
def _rows(p, r, c, end, WIDTH: tl.constexpr, COLS: tl.constexpr, MASKED: tl.constexpr):
    """Rows at p [BK, 1] and columns c [COLS], 0 from column WIDTH on, and where MASKED for places r from `end` on."""
    if MASKED:
        return tl.load(p + c[None, :], mask=(r < end)[:, None] & (c < WIDTH)[None, :], other=0.0)
    if WIDTH % COLS:
        return tl.load(p + c[None, :], mask=(c < WIDTH)[None, :], other=0.0)
    return tl.load(p + c[None, :])


@triton.jit
def _add_places(
    b_out, p, q, order, start, end, i, j, q_n,
    P: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ROUTED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """b_out [BM, BN] and the places start .. start + BK - 1 more, where MASKED those before `end`."""
    r = start + tl.arange(0, BK)  # [BK]
    slot = r
    if ROUTED:
        slot = tl.load(order + r, mask=r < end, other=0) if MASKED else tl.load(order + r)
    b_p = _rows(p + (r.to(tl.int64) * P)[:, None], r, i, end, P, BM, MASKED)  # [BK, BM]
    b_q = _rows(q + (slot.to(tl.int64) // K * q_n)[:, None], r, j, end, Q, BN, MASKED)  # [BK, BN]
    return tl.dot(tl.trans(b_p), b_q, b_out, input_precision="ieee")


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def matrix_kernel(
    p, q, out, order, offsets, q_n, R,
    P: tl.constexpr, Q: tl.constexpr, out_p: tl.constexpr, out_q: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, ROUTED: tl.constexpr,
):  # fmt: skip
    """out_e [P, Q] = sum over the places r of expert e of p[r]^T q[token of r], one tile of it; p [R, P], q [N, Q].

    Strides of out_e out_p and out_q. Each of SPLITS programs takes an equal share of the places, out is then [SPLITS, E, ...].
    """
    pid = tl.program_id(0)
    split, pid = pid % SPLITS, pid // SPLITS
    block_q, pid = pid % tl.cdiv(Q, BN), pid // tl.cdiv(Q, BN)
    block_p, e = pid % tl.cdiv(P, BM), pid // tl.cdiv(P, BM)
    if ROUTED:
        begin, end = tl.load(offsets + e), tl.load(offsets + e + 1)
    else:
        begin, end = 0, R
    share = tl.cdiv(tl.cdiv(end - begin, BK), SPLITS) * BK
    begin += split * share
    end = tl.minimum(end, begin + share)
    i = block_p * BM + tl.arange(0, BM)  # [BM]
    j = block_q * BN + tl.arange(0, BN)  # [BN]
    b_out = tl.zeros([BM, BN], tl.float32)
    whole = begin + tl.maximum(end - begin, 0) // BK * BK
    for start in range(begin, whole, BK):
        b_out = _add_places(b_out, p, q, order, start, end, i, j, q_n, P, Q, K, BM, BN, BK, ROUTED, False)
    if whole < end:  # the last places, fewer than a block
        b_out = _add_places(b_out, p, q, order, whole, end, i, j, q_n, P, Q, K, BM, BN, BK, ROUTED, True)
    p_out = out + (split * E + e).to(tl.int64) * (P * Q) + i[:, None] * out_p + j[None, :] * out_q
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=(i < P)[:, None] & (j < Q)[None, :])


@triton.jit
def _narrow_dgu(
    p_dy, p_gu, down, weights, e, slot, m_r, i,
    D: tl.constexpr, I: tl.constexpr, IP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, ROUTED: tl.constexpr,
):  # fmt: skip
    """(dgate, dup [BM, IP] times the slots' weights, in the dtype of dy; dweights [BM], 0 unless ROUTED) of a tile of places."""
    d, m_row = tl.arange(0, BK), m_r[:, None]
    p_down = down + tl.cast(e, tl.int64) * (D * I) + d[:, None] * I + i
    b_dh = tl.zeros([BM, IP], tl.float32)
    for k in range(0, D, BK):
        b_dy = tl.load(p_dy + k + d[None, :], mask=m_row & (k + d[None, :] < D), other=0.0)  # [BM, BK]
        b_w = _load(p_down + k * I, k + d[:, None], D, BK, i, I, IP)  # [BK, IP]
        b_dh = tl.dot(b_dy, b_w, b_dh, input_precision="ieee")
    b_gate = tl.load(p_gu, mask=m_row & (i < I), other=0.0).to(tl.float32)  # [BM, IP]
    b_up = tl.load(p_gu + I, mask=m_row & (i < I), other=0.0).to(tl.float32)
    _, b_dgate, b_dup = _swiglu_backward(b_dh, b_gate, b_up)
    b_dw = tl.zeros([BM], tl.float32)
    if ROUTED:
        b_dw = tl.sum(b_dup * b_up, 1)  # of dh h
        b_weight = tl.load(weights + slot, mask=m_r, other=0.0).to(tl.float32)[:, None]
        b_dgate, b_dup = b_dgate * b_weight, b_dup * b_weight
    return b_dgate.to(p_dy.dtype.element_ty), b_dup.to(p_dy.dtype.element_ty), b_dw


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def narrow_backward_kernel(
    dy, gu, weights, gate_up, down, out, dweights, order, offsets, dy_n, R,
    D: tl.constexpr, I: tl.constexpr, IP: tl.constexpr, K: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ROUTED: tl.constexpr,
):  # fmt: skip
    """dx to out [R, D] by slot for one tile of places and BN columns, and dweights by slot. IP: I, padded.

    All programs of a tile make dgu, from BK columns of dy at a time.
    """
    columns: tl.constexpr = (D + BN - 1) // BN
    tile, block = tl.program_id(0) // columns, tl.program_id(0) % columns
    e, first, m, slot, m_r = _tile(order, offsets, tile, R, E, EP, BM, ROUTED)
    n = (block * BN + tl.arange(0, BN))[None, :]
    if e == E:
        _scatter(out, weights, None, slot, m_r, n, D, tl.full([BM, BN], float("nan"), tl.float32), False)
        if ROUTED:
            tl.store(dweights + slot, tl.full([BM], float("nan"), dweights.dtype.element_ty), mask=m_r)
        return
    i, i_col = tl.arange(0, IP)[None, :], tl.arange(0, IP)[:, None]
    p_dy, p_gu = dy + (slot // K * dy_n)[:, None], gu + first * (2 * I) + m[:, None] * (2 * I) + i
    b_dgate, b_dup, b_dw = _narrow_dgu(p_dy, p_gu, down, weights, e, slot, m_r, i, D, I, IP, BM, BK, ROUTED)
    if ROUTED:  # noqa: SIM102
        if block == 0:
            tl.store(dweights + slot, b_dw.to(dweights.dtype.element_ty), mask=m_r)
    p_gate_up = gate_up + tl.cast(e, tl.int64) * (2 * I * D) + i_col * D + n
    b_dx = tl.dot(b_dgate, _load(p_gate_up, i_col, I, IP, n, D, BN), input_precision="ieee")  # [BM, BN]
    b_dx = tl.dot(b_dup, _load(p_gate_up + I * D, i_col, I, IP, n, D, BN), b_dx, input_precision="ieee")
    _scatter(out, weights, None, slot, m_r, n, D, b_dx, False)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def narrow_matrix_kernel(
    dy, x, gu, weights, down, parts, order, offsets, dy_n, x_n, R,
    D: tl.constexpr, I: tl.constexpr, IP: tl.constexpr, K: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ROUTED: tl.constexpr,
):  # fmt: skip
    """A row of parts: what one tile of places adds to dgate_up [2I, D] and ddown [D, I], BN columns of D at a time; letters as
    in narrow_backward_kernel, and dgu made as there: nothing of it needs to be waited for."""
    tile = tl.program_id(0)
    e, first, m, slot, m_r = _tile(order, offsets, tile, R, E, EP, BM, ROUTED)
    if e == E:
        return
    i, m_row = tl.arange(0, IP)[None, :], m_r[:, None]
    p_dy, p_gu = dy + (slot // K * dy_n)[:, None], gu + first * (2 * I) + m[:, None] * (2 * I) + i
    b_dgate, b_dup, _ = _narrow_dgu(p_dy, p_gu, down, weights, e, slot, m_r, i, D, I, IP, BM, BK, ROUTED)
    # Transposed is what comes from memory, the left operand: what was made here would need more registers for that.
    p_parts, p_x = parts + tl.cast(tile, tl.int64) * (3 * I * D), x + (slot // K * x_n)[:, None]
    for start in tl.static_range(0, D, BN):
        n, n_col = (start + tl.arange(0, BN))[None, :], (start + tl.arange(0, BN))[:, None]
        m_parts = (n_col < D) & (i < I)
        b_x = tl.load(p_x + n, mask=m_row & (n < D), other=0.0)  # [BM, BN]
        b_part = tl.dot(tl.trans(b_x), b_dgate, input_precision="ieee")  # [BN, IP]
        tl.store(p_parts + i * D + n_col, b_part, mask=m_parts)
        b_part = tl.dot(tl.trans(b_x), b_dup, input_precision="ieee")
        tl.store(p_parts + I * D + i * D + n_col, b_part, mask=m_parts)
    # h from gate and up anew: kept, and in the layout of dh, it would need registers that sm_90 lacks.
    b_gate = tl.load(p_gu, mask=m_row & (i < I), other=0.0).to(tl.float32)
    b_up = tl.load(p_gu + I, mask=m_row & (i < I), other=0.0).to(tl.float32)
    b_h = b_gate * tl.sigmoid(b_gate) * b_up
    if ROUTED:
        b_h *= tl.load(weights + slot, mask=m_r, other=0.0).to(tl.float32)[:, None]
    b_h = b_h.to(x.dtype.element_ty)
    for start in tl.static_range(0, D, BN):
        n, n_col = (start + tl.arange(0, BN))[None, :], (start + tl.arange(0, BN))[:, None]
        b_dy = tl.load(p_dy + n, mask=m_row & (n < D), other=0.0)  # [BM, BN]
        b_part = tl.dot(tl.trans(b_dy), b_h, input_precision="ieee")
        tl.store(p_parts + 2 * I * D + n_col * I + i, b_part, mask=(n_col < D) & (i < I))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def add_tiles_kernel(
    parts, dgate_up, ddown, offsets, R,
    D: tl.constexpr, I: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
    ROUTED: tl.constexpr,
):  # fmt: skip
    """BN elements of one expert's dgate_up and ddown, as in narrow_matrix_kernel: the sum over its tiles of BM places, BT of
    them at a time, always in the same order."""
    blocks: tl.constexpr = (3 * I * D + BN - 1) // BN
    e, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    first, tiles = 0, tl.cdiv(R, BM)
    if ROUTED:
        bins, b_tiles = tl.arange(0, EP), _tiles_of_bins(offsets, R, E, EP, BM)
        first, tiles = tl.sum(tl.where(bins < e, b_tiles, 0), 0), tl.sum(tl.where(bins == e, b_tiles, 0), 0)
    n, t = block * BN + tl.arange(0, BN)[None, :], tl.arange(0, BT)[:, None]
    p_parts = parts + (first + t).to(tl.int64) * (3 * I * D) + n
    b_sum = tl.zeros([BT, BN], tl.float32)
    for start in range(0, tiles, BT):
        m_parts = (start + t < tiles) & (n < 3 * I * D)
        b_sum += tl.load(p_parts + tl.cast(start, tl.int64) * (3 * I * D), mask=m_parts, other=0.0)
    b_sum = tl.sum(b_sum, 0, keep_dims=True).to(dgate_up.dtype.element_ty)
    e_64 = tl.cast(e, tl.int64)
    tl.store(dgate_up + e_64 * (2 * I * D) + n, b_sum, mask=n < 2 * I * D)
    tl.store(ddown + e_64 * (D * I) + n - 2 * I * D, b_sum, mask=(n >= 2 * I * D) & (n < 3 * I * D))


class Tiles(NamedTuple):
    """BM rows by BN columns, in steps of BK."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int


# Kernel -> rows of a tile -> tiles. Starting values: they keep the limits of tests/test_triton_compile.py and are not
# tuned. Products of full float32 precision hold both operands in registers, hence their small tiles on every chip; 16 bits have
# large ones (sm_90, sm_100) and small ones.
_FLOAT32 = {
    "up": {16: Tiles(16, 32, 16, 4, 1), 64: Tiles(32, 32, 16, 4, 1)},
    "project": {16: Tiles(16, 32, 16, 4, 1), 64: Tiles(32, 32, 16, 4, 1)},
    "matrix": {64: Tiles(32, 32, 16, 4, 1)},
}
_LARGE = {
    "up": {
        16: Tiles(16, 64, 128, 4, 3),
        FEW: Tiles(32, 64, 64, 8, 3),
        64: Tiles(64, 128, 64, 8, 3),
        128: Tiles(128, 128, 64, 8, 3),
    },
    "project": {16: Tiles(16, 128, 128, 4, 3), 64: Tiles(64, 128, 64, 4, 4), 128: Tiles(128, 256, 64, 8, 4)},
    "matrix": {64: Tiles(64, 64, 64, 4, 3), 128: Tiles(128, 256, 64, 8, 3)},
    "narrow": {FEW: Tiles(32, 128, 128, 8, 1), 128: Tiles(128, 64, 128, 8, 1)},
}
_SMALL = {
    "up": {16: Tiles(16, 64, 64, 4, 2), 64: Tiles(64, 64, 32, 4, 2)},
    "project": {16: Tiles(16, 64, 64, 4, 2), 64: Tiles(64, 128, 64, 4, 2)},
    "matrix": {64: Tiles(64, 64, 32, 4, 2)},
    "narrow": {64: Tiles(64, 32, 32, 4, 1)},
}


def _table(dtype: torch.dtype, large: int) -> dict[str, dict[int, Tiles]]:
    return _FLOAT32 if dtype.itemsize == 4 else _LARGE if large else _SMALL


def _tiles(kernel: str, dtype: torch.dtype, large: int, size: int, width: int, depth: int) -> Tiles:
    """The tiles with the most rows up to `size`, no wider and no deeper than the matrix."""
    by_rows = _table(dtype, large)[kernel]
    bm, bn, bk, warps, stages = by_rows[max(rows for rows in by_rows if rows <= size)]
    bn, bk = (min(block, padded(n)) for block, n in ((bn, width), (bk, depth)))
    if bm == bn == 64:  # which two warp groups would share badly
        warps = 4
    return Tiles(bm, bn, bk, warps, min(stages, max(1, triton.cdiv(depth, bk))))


def _size(places: int, experts: int, width: int) -> int:
    """Rows of a tile: few where an expert has few places, and where large tiles would leave half of the chip idle."""
    if places < 24 * experts:
        return 16
    return 128 if places >= 256 * experts and places // 128 * triton.cdiv(width, 128) >= FULL // 2 else 64


def forward(x, weights, order, offsets, gate_up, down, base) -> tuple[Tensor, Tensor]:
    """Shapes as dsfast.ops.moe_experts -> y [N, D], gu [N K, 2I] by place.

    Slots from order[offsets[E]] on have no expert. That is no error here, where nobody waits for the device: y is NaN for their
    tokens.
    """
    (n, d), k = x.shape, weights.size(1)
    y, gu = x.new_empty(n, d), x.new_empty(n * k, gate_up.size(1))
    with torch.cuda.device_of(x):
        for launch in forward_launches(x, weights, gate_up, down, order, offsets, y, gu, large_tiles(x.device), base):
            launch.run()
    return y, gu


def backward(dy, x, weights, gate_up, down, gu, order, offsets) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weights, gate_up, down from that of y. Deterministic: no atomics. An expert without a token has zeros;
    an index outside 0..E-1 makes its token's dx and its own dweights NaN."""
    gradients = tuple(t.new_empty(t.shape) for t in (x, weights, gate_up, down))
    with torch.cuda.device_of(x):
        first, of_matrices = backward_launches(
            dy, x, weights, gate_up, down, gu, order, offsets, *gradients, large_tiles(x.device)
        )
        # Beside the shared experts' backward pass.
        aside((first, gradients[:2]), (of_matrices, gradients[2:]), urgent=True)
    return gradients


def forward_launches(x, weights, gate_up, down, order, offsets, y, gu, large: int, base=None) -> list[Launch]:
    """The launches that fill y and gu; tensors may lie on the meta device. swiglu_mlp's have no weights, order and offsets."""
    (x,) = rows(x)
    base = None if base is None else base.contiguous()
    make = _Launches(x, weights, gate_up, down, order, offsets, large)
    slots, below = (x.new_empty(make.places, make.d), None) if make.k != 1 else (y, base)
    tiles, bd = make.tiles("up", make.i, make.d), min(64, make.tiles("project", make.d, make.i).bn)
    fused = make.i <= min(FUSED, tiles.bn) and make.d <= 4 * bd
    h = None if fused else x.new_empty(make.places, make.i)
    up = make.rows(
        "up", up_kernel, make.i, make.d, x=x, x_n=x.stride(0), gu=gu, h=h, out=slots, BD=bd, FUSED=fused,
        WEIGHTED=weights is not None, base=below,
    )  # fmt: skip
    project = [] if fused else [make.project(h, make.down, slots, make.weights, 1, make.i, base=below)]
    return [up, *project, *make.combine(slots, y, base)]


def backward_launches(
    dy, x, weights, gate_up, down, gu, order, offsets, dx, dweights, dgate_up, ddown, large: int
) -> tuple[list[Launch], list[Launch]]:
    """The launches that fill dx and dweights, and those behind them that fill dgate_up and ddown; as `forward_launches`."""
    dy, x = rows(dy, x)
    make = _Launches(x, weights, gate_up, down, order, offsets, large)
    slots = x.new_empty(make.places, make.d) if make.k != 1 else dx
    if make.narrow():
        of_x, *of_matrices = make.narrow_backward(dy, gu, slots, dweights, dgate_up, ddown)
        return [of_x, *make.combine(slots, dx)], of_matrices
    dh, dgu = x.new_empty(make.places, make.i), torch.empty_like(gu)
    first = [
        make.project(dy, make.down, dh, None, make.i, 1, gather=True),
        make.swiglu_backward(dh=dh, gu=gu, dgu=dgu, dweights=dweights),
        make.project(dgu, make.gate_up, slots, None, make.d, 1),
        *make.combine(slots, dx),
    ]
    return first, [*make.matrix(dgu, x, dgate_up, make.d, 1), *make.matrix(dh, dy, ddown, 1, make.i)]


class _Launches:
    """Builds the launches of one call: sizes, and the arguments that kernels share."""

    def __init__(self, x, weights, gate_up, down, order, offsets, large: int):
        self.x, self.large, self.order = x, large, order
        self.gate_up, self.down = gate_up.contiguous(), down.contiguous()
        self.weights = None if weights is None else weights.contiguous()
        (n, self.d), self.i = x.shape, down.size(-1)
        self.k = 1 if weights is None else weights.size(1)
        self.e = 1 if order is None else down.size(0)
        self.places = n * self.k
        self.shared = {
            "order": order, "offsets": offsets, "weights": self.weights, "gate_up": self.gate_up, "down": self.down,
            "R": self.places, "D": self.d, "I": self.i, "K": self.k, "E": self.e,
            "EP": triton.next_power_of_2(self.e + 1), "G": TILES_TOGETHER, "ROUTED": order is not None,
        }  # fmt: skip

    def launch(self, kernel, programs: int, tiles: Tiles, arguments: dict) -> Launch:
        arguments = self.shared | {"BM": tiles.bm, "BN": tiles.bn, "BK": tiles.bk} | arguments
        rows_in_products = tiles.bm if "BK" in kernel.arg_names else 0
        compiler = options(tiles.warps, tiles.stages)
        return Launch(kernel, (programs,), arguments, compiler, self.x.element_size(), rows_in_products)

    def tiles(self, name: str, width: int, depth: int) -> Tiles:
        size = FEW if name == "up" and self.few() else _size(self.places, self.e, width)
        return _tiles(name, self.x.dtype, self.large, size, width, depth)

    def rows(self, name: str, kernel, width: int, depth: int, **arguments) -> Launch:
        """A kernel whose programs have a tile of places each."""
        tiles = self.tiles(name, width, depth)
        return self.launch(kernel, self.tiles_of(tiles.bm) * triton.cdiv(width, tiles.bn), tiles, arguments)

    def tiles_of(self, bm: int) -> int:
        """Tiles of bm places. As many as there can be: every expert may end in a tile begun."""
        if self.order is None:
            return triton.cdiv(self.places, bm)
        return self.places // bm + min(self.e + 1, self.places)

    def project(self, a, b, out, weights, b_k: int, b_n: int, gather: bool = False, base=None) -> Launch:
        depth, width = a.size(1), out.size(1)
        return self.rows(
            "project", project_kernel, width, depth, a=a, a_n=a.stride(0), b=b, b_k=b_k, b_n=b_n, out=out, weights=weights,
            DEPTH=depth, WIDTH=width, GATHER=gather, WEIGHTED=weights is not None, base=base,
        )  # fmt: skip

    def swiglu_backward(self, **arguments) -> Launch:
        bn = min(512, triton.next_power_of_2(self.i))
        tiles = Tiles(2048 // bn, bn, 0, 4, 1)
        return self.launch(swiglu_backward_kernel, triton.cdiv(self.places, tiles.bm), tiles, arguments)

    def combine(self, slots, out, base=None) -> list[Launch]:
        """The sum over each token's slots, and base; none where a slot is its token."""
        return [sum_launch(slots.view(len(out), self.k, self.d).transpose(0, 1), out, base)] if self.k != 1 else []

    def few(self) -> bool:
        """Whether narrow experts have no more tiles of 64 places than there are multiprocessors. A program alone on one waits for
        each of its own loads and products: then the fewer instructions a warp has, the less time it takes."""
        known = self.narrow() and FEW in _table(self.x.dtype, self.large)["narrow"]
        return known and 24 * self.e <= self.places <= 64 * MULTIPROCESSORS

    def narrow(self) -> bool:
        """Whether experts are narrow enough for dgu to stay in the programs of the backward pass.

        Not in float32, where products take longer than launches and would be made several times.
        """
        return self.d <= NARROW and self.i <= FUSED and "narrow" in _table(self.x.dtype, self.large)

    def narrow_backward(self, dy, gu, out, dweights, dgate_up, ddown) -> list[Launch]:
        sizes = FEW if self.few() else 128, 128
        of_x, tiles = (_tiles("narrow", self.x.dtype, self.large, size, self.d, self.d) for size in sizes)
        programs = self.tiles_of(of_x.bm) * triton.cdiv(self.d, of_x.bn)
        most, size = self.tiles_of(tiles.bm), 3 * self.i * self.d
        arguments = {
            "dy": dy, "dy_n": dy.stride(0), "x": self.x, "x_n": self.x.stride(0), "gu": gu, "out": out, "dweights": dweights,
            "parts": self.x.new_empty(most, size, dtype=torch.float32), "dgate_up": dgate_up, "ddown": ddown,
            "IP": padded(self.i), "BT": ADDED,
        }  # fmt: skip
        added = Tiles(tiles.bm, 64, 0, 4, 1)
        return [
            self.launch(narrow_backward_kernel, programs, of_x, arguments),
            self.launch(narrow_matrix_kernel, most, tiles, arguments),
            self.launch(add_tiles_kernel, self.e * triton.cdiv(size, added.bn), added, arguments),
        ]

    def matrix(self, p, q, out, out_p: int, out_q: int) -> list[Launch]:
        """The gradient of a matrix of every expert: split over the places where its tiles are few, then added up."""
        size, (width_p, width_q) = 128, (p.size(1), q.size(1))
        if self.e * triton.cdiv(width_p, 128) * triton.cdiv(width_q, 128) < FULL // 4:
            size = 64
        tiles = _tiles("matrix", self.x.dtype, self.large, size, width_q, self.places)
        tiles = tiles._replace(bm=min(tiles.bm, padded(width_p)))
        if self.order is not None:  # a gathered tile waits for its indices: Triton gives every second stage to these
            tiles = tiles._replace(stages=2 * tiles.stages - 1)
        programs = self.e * triton.cdiv(width_p, tiles.bm) * triton.cdiv(width_q, tiles.bn)
        splits = 1
        while 2 * splits * programs <= FULL and 2 * splits * SHARE * self.e <= self.places:
            splits *= 2
        parts = p.new_empty(splits, *out.shape, dtype=torch.float32) if splits > 1 else out
        arguments = {
            "p": p,
            "q": q,
            "out": parts,
            "q_n": q.stride(0),
            "P": width_p,
            "Q": width_q,
            "out_p": out_p,
            "out_q": out_q,
        }
        launch = self.launch(matrix_kernel, programs * splits, tiles, arguments | {"SPLITS": splits})
        return [launch] if splits == 1 else [launch, sum_launch(parts, out)]


EXAMPLES = {
    "500K": (8192, 128, 1, 2, 64),
    "500K, many tokens": (16384, 128, 1, 2, 64),
    "DeepSeek-V3": (4096, 7168, 8, 256, 2048),
    "Qwen-like": (32768, 2048, 8, 128, 768),
    "two wide experts, top 1": (8192, 1024, 1, 2, 512),
    "no power of two": (4096, 2000, 8, 64, 1000),
    "few tokens": (16, 7168, 8, 256, 2048),
    "narrow": (4096, 64, 2, 8, 48),
    "5M": (8192, 256, 2, 8, 128),
    "narrower than a tile": (4096, 64, 2, 8, 96),
}
"""N, D, K, E and I that are compiled ahead."""


def example_launches(size: str, dtype: torch.dtype, large: int) -> dict[str, Launch]:
    """Kernel, with what it computes where that is not its name, -> launch at EXAMPLES[size], on the meta device."""
    n, d, k, e, i = EXAMPLES[size]
    empty = on_meta(dtype)
    x, weights, gate_up, down, gu = empty(n, d), empty(n, k), empty(e, 2 * i, d), empty(e, d, i), empty(n * k, 2 * i)
    places = (empty(n * k, dtype=torch.int32), empty(e + 1, dtype=torch.int32))
    inputs = (x, weights, gate_up, down)
    return named(
        forward_launches(*inputs, *places, empty(n, d), gu, large, x),
        *backward_launches(x, *inputs, gu, *places, *inputs, large),
    )


def named(forward: list[Launch], *backward: list[Launch]) -> dict[str, Launch]:
    """Each launch by its kernel's name, its pass and its number there."""
    numbered = [("forward", *item) for item in enumerate(forward)] + [
        ("backward", *item) for item in enumerate(chain(*backward))
    ]
    return {f"{launch.kernel.__name__}, {name} {number}": launch for name, number, launch in numbered}
