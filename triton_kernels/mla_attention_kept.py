"""The backward pass of dsfast.ops.mla_attention for wide heads in 16 bits, which keeps what it would else make twice.

Letters as in dsfast.triton_kernels.mla_attention, whose backward pass makes the scores once for the gradient of the queries and
once for those of keys and values, and beside the sums of all three has few registers left for scores. Here `scores_kernel` makes
them once, adds up the gradient of the values alone and leaves the gradient of the scores in memory, ds; of that and the queries
`product_kernel` makes the gradient of the keys, of that and the keys the one of the queries: 1,664 FLOPs for a query and a key of
DeepSeek-V3's widths instead of 2,304. FlashAttention-3 (arXiv 2407.08608) makes as many, by adding to the queries' gradient
atomically, which is not deterministic.

ds has the SIDE x SIDE numbers of a tile of keys and one of queries side by side, key by key: tile a of keys and b of queries,
a <= b, are square b (b + 1) / 2 + a of a head. KEPT bytes bound it: as many heads as fit are done at once, then the others; where
not one fits, scores are made anew. Squares that no document reaches are neither written nor read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from dsfast.triton_kernels.attention_pieces import (
    UNSPECIALIZED,
    delta_of,
    documents_of,
    example_arguments,
    load_queries,
    measure,
    row_of,
    scores,
    widths_of,
    within,
)
from dsfast.triton_kernels.launch import Launch
from dsfast.triton_kernels.pieces import BY_3_7, LOG2E, load_tile, opaque, options, store_rows, swizzle
from torch import Tensor

KEPT = 2**31
"""Bytes of ds: 7 heads of 16,384 tokens."""
SIDE = 128
_ROWS = 64  # of a program of delta_kernel
_UNSPECIALIZED = (*UNSPECIALIZED, "FIRST", "HEADS")


@triton.jit
def _square(ds, a, b, SIDE: tl.constexpr):
    """Where the square of keys' tile a and queries' tile b begins."""
    return ds + (b * (b + 1) // 2 + a).to(tl.int64) * (SIDE * SIDE)


@triton.jit(do_not_specialize=("N",))
def delta_kernel(
    do, o, delta, do_n, do_h, PITCH, N, H, Dv: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, G: tl.constexpr
):
    """delta [H, PITCH] = sum of do o, for ROWS queries of one head."""
    h, tile = swizzle(H, tl.cdiv(N, ROWS), G)
    h, t = h.to(tl.int64), tile * ROWS
    b_do = load_tile(do + h * do_h, do_n, t, 0, N, Dv, ROWS, DV, True)  # [ROWS, DV]
    b_o = load_tile(o + h * Dv, H * Dv, t, 0, N, Dv, ROWS, DV, True)  # [ROWS, DV]
    i = t + tl.arange(0, ROWS)
    tl.store(delta + h * PITCH + i, delta_of(b_do, b_o), mask=i < N)


@triton.jit
def _part_of_square(ds, t, s, SIDE: tl.constexpr, BT: tl.constexpr):
    """Where ds is of the keys from token t on, which begin a square, and the queries from token s on: [SIDE, BT]."""
    p_ds = _square(ds, t // SIDE, s // SIDE, SIDE) + tl.multiple_of(s % SIDE, BT)
    return p_ds + (tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, BT)[None, :])


@triton.jit
def _attend_dv(
    b_dv, b_k_nope, b_k_rope, b_v, do, q_nope, q_rope, ds, softmax, delta, s, t, j, end, h,
    do_n, q_nope_n, q_rope_n, PITCH, factor, N,
    Dn: tl.constexpr, Dr: tl.constexpr, Dv: tl.constexpr, DN: tl.constexpr, DR: tl.constexpr, DV: tl.constexpr,
    BT: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Add one block of queries, from token s on, to the gradient of a tile of values, [SIDE, DV], and store their part of ds."""
    s = tl.multiple_of(opaque(s), BT)
    b_q_nope = load_tile(q_nope, q_nope_n, s, 0, N, Dn, BT, DN, True, True)  # [BT, DN]
    b_q_rope = load_tile(q_rope, q_rope_n, s, 0, N, Dr, BT, DR, True, True)  # [BT, DR]
    b_do = load_tile(do, do_n, s, 0, N, Dv, BT, DV, True, True)  # [BT, DV]
    i = s + tl.arange(0, BT)
    b_m = load_queries(softmax, h, i, N, PITCH, True)
    b_delta = load_queries(delta, h, i, N, PITCH, True)
    b_p = tl.exp2(scores(b_k_nope, b_k_rope, b_q_nope, b_q_rope, False) * factor - b_m[None, :])  # [SIDE, BT]
    b_p = tl.where(within(i[None, :], j[:, None], end[:, None]), b_p, 0.0)
    b_dv = tl.dot(b_p.to(b_v.dtype), b_do, b_dv)  # before dp is made: else not all fits the registers
    b_dp = tl.dot(b_v, tl.trans(b_do))  # [SIDE, BT]
    p_ds = _part_of_square(ds, t, s, SIDE, BT)
    tl.store(p_ds, (b_p * (b_dp - b_delta[None, :])).to(b_v.dtype))
    return b_dv


@triton.jit
def _attend_dv_ahead(
    b_dv, b_k_nope, b_k_rope, b_v, do, q_nope, q_rope, ds, softmax, delta, begin, end, t, h,
    do_n, q_nope_n, q_rope_n, PITCH, factor, N,
    Dn: tl.constexpr, Dr: tl.constexpr, Dv: tl.constexpr, DN: tl.constexpr, DR: tl.constexpr, DV: tl.constexpr,
    BT: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """`_attend_dv` for all blocks of queries from token begin, at least SIDE, to end - 1, none of them masked. The next block's
    scores, of the part without position, are asked for before this one's become ds.

    One round more, the first, only asks for them: p is 0, and nothing is stored. Asked for before the loop they would keep their
    block of queries in shared memory, of which nothing is left.
    """
    b_factor = tl.full([SIDE, BT], 1.0, tl.float32) * factor
    b_s_nope = tl.zeros([SIDE, BT], tl.float32)
    for start in range(begin - BT, end, BT):
        s = tl.multiple_of(opaque(start), BT)
        b_do = load_tile(do, do_n, s, 0, N, Dv, BT, DV, False, True)  # [BT, DV]
        i = s + tl.arange(0, BT)
        b_m = load_queries(softmax, h, i, N, PITCH, False)
        b_delta = load_queries(delta, h, i, N, PITCH, False)
        b_q_rope = load_tile(q_rope, q_rope_n, s, 0, N, Dr, BT, DR, False, True)  # [BT, DR]
        b_dp = tl.dot(b_v, tl.trans(b_do))  # [SIDE, BT]
        b_s = tl.dot(b_k_rope, tl.trans(b_q_rope), b_s_nope)
        b_s = tl.fma(b_s, b_factor, tl.where(start < begin, float("-inf"), -b_m)[None, :])
        following = opaque(tl.minimum(start + BT, end - BT))
        b_q_nope = load_tile(q_nope, q_nope_n, following, 0, N, Dn, BT, DN, False, True)  # [BT, DN]
        b_s_nope = tl.dot(b_k_nope, tl.trans(b_q_nope))
        b_p = tl.exp2(b_s)
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_v.dtype)
        tl.store(_part_of_square(ds, t, s, SIDE, BT), b_ds, mask=tl.max_constancy((i >= begin)[None, :], [1, BT]))
        b_dv = tl.dot(b_p.to(b_v.dtype), b_do, b_dv)
    return b_dv


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def scores_kernel(
    do, q_nope, q_rope, k_nope, k_rope, v, cu_seqlens, softmax, delta, ds, dv, scale, FIRST, HEADS,
    do_n, do_h, q_nope_n, q_nope_h, q_rope_n, q_rope_h, k_nope_n, k_nope_h, k_rope_n, v_n, v_h, ds_h, PITCH, N, H, S, STEPS,
    Dn: tl.constexpr, Dr: tl.constexpr, Dv: tl.constexpr, DN: tl.constexpr, DR: tl.constexpr, DV: tl.constexpr,
    BT: tl.constexpr, SIDE: tl.constexpr, G: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """dv [N, H, Dv] and ds of HEADS heads from FIRST on, for one tile of keys and one head of queries."""
    head, tile = swizzle(HEADS, tl.cdiv(N, SIDE), G)
    ds += head.to(tl.int64) * ds_h
    h = (FIRST + head).to(tl.int64)
    t = tile * SIDE  # the first tile of a document is the longest
    _, last = documents_of(cu_seqlens, tl.minimum(t + SIDE, N) - 1, S, STEPS)
    last = tl.minimum(last, N)
    do += h * do_h
    q_nope += h * q_nope_h
    q_rope += h * q_rope_h
    b_k_nope = load_tile(k_nope + h // SHARED * k_nope_h, k_nope_n, t, 0, N, Dn, SIDE, DN, True)  # [SIDE, DN]
    b_k_rope = load_tile(k_rope, k_rope_n, t, 0, N, Dr, SIDE, DR, True)  # [SIDE, DR]
    b_v = load_tile(v + h // SHARED * v_h, v_n, t, 0, N, Dv, SIDE, DV, True)  # [SIDE, DV]
    b_dv = tl.zeros([SIDE, DV], tl.float32)
    factor = scale * LOG2E

    # No mask for the tiles of queries behind this one that belong to one document together with it; then this one and the others.
    _, end_of_first = documents_of(cu_seqlens, t, S, STEPS)
    whole = tl.where(end_of_first >= last, tl.maximum(last // SIDE * SIDE, t + SIDE), t + SIDE)
    if t + SIDE < whole:
        b_dv = _attend_dv_ahead(
            b_dv, b_k_nope, b_k_rope, b_v, do, q_nope, q_rope, ds, softmax, delta, t + SIDE, whole, t, h,
            do_n, q_nope_n, q_rope_n, PITCH, factor, N, Dn, Dr, Dv, DN, DR, DV, BT, SIDE,
        )  # fmt: skip
    t = opaque(t)  # so that nothing of what follows is kept in registers from before the loop
    j = t + tl.arange(0, SIDE)  # [SIDE]
    _, end = documents_of(cu_seqlens, tl.minimum(j, N - 1), S, STEPS)
    behind = tl.maximum(tl.cdiv(last, SIDE) * SIDE - whole, 0)
    for n in range((SIDE + behind) // BT):
        s = tl.where(n < SIDE // BT, t, whole - SIDE) + n * BT
        b_dv = _attend_dv(
            b_dv, b_k_nope, b_k_rope, b_v, do, q_nope, q_rope, ds, softmax, delta, s, t, j, end, h,
            do_n, q_nope_n, q_rope_n, PITCH, factor, N, Dn, Dr, Dv, DN, DR, DV, BT, SIDE,
        )  # fmt: skip

    store_rows(dv + h * Dv, H * Dv, t, N, b_dv, SIDE, Dv, DV)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def product_kernel(
    ds, x_nope, x_rope, cu_seqlens, y_nope, y_rope, scale, FIRST, HEADS,
    x_nope_n, x_nope_h, x_rope_n, x_rope_h, y_nope_n, y_nope_h, y_rope_n, y_rope_h, ds_h, N, S, STEPS,
    Dn: tl.constexpr, Dr: tl.constexpr, DN: tl.constexpr, DR: tl.constexpr,
    BT: tl.constexpr, SIDE: tl.constexpr, G: tl.constexpr, SHARED: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    """y = scale ds x for two tiles of keys (x are the queries) or of queries (x are the keys), BT of x at a time, and one of
    HEADS heads from FIRST on. Two, as the L2 cache is what bounds it: one would read as much of x for half the products."""
    ROWS: tl.constexpr = 2 * SIDE
    tiles = tl.cdiv(N, ROWS)
    head, tile = swizzle(HEADS, tiles, G)
    tile = tile if OF_KEYS else tiles - 1 - tile  # a document's longest first: its first keys, its last queries
    ds += head.to(tl.int64) * ds_h
    h = (FIRST + head).to(tl.int64)
    t = tile * ROWS
    # Of both tiles the keys' last query or the queries' first key: what lies beyond is no square that was written.
    if OF_KEYS:
        _, reach = documents_of(cu_seqlens, tl.minimum(t + SIDE, N) - 1, S, STEPS)
        _, reach_of_second = documents_of(cu_seqlens, tl.minimum(t + ROWS, N) - 1, S, STEPS)
        begin, end = t, tl.cdiv(tl.minimum(reach_of_second, N), SIDE) * SIDE
    else:
        reach, _ = documents_of(cu_seqlens, t, S, STEPS)
        reach_of_second, _ = documents_of(cu_seqlens, tl.minimum(t + SIDE, N - 1), S, STEPS)
        begin, end = reach // SIDE * SIDE, tl.cdiv(tl.minimum(t + ROWS, N), SIDE) * SIDE
    x_nope += h // SHARED * x_nope_h
    x_rope += h // SHARED * x_rope_h
    b_y_nope = tl.zeros([ROWS, DN], tl.float32)
    b_y_rope = tl.zeros([ROWS, DR], tl.float32)
    row, other = tl.arange(0, ROWS), tl.arange(0, BT)

    if begin < end:
        for s in range(begin, end, BT):
            at, theirs = tl.multiple_of(s % SIDE, BT), s // SIDE
            own = 2 * tile + row // SIDE
            b_reach = tl.where(row < SIDE, reach, reach_of_second)
            if OF_KEYS:
                m_ds = (own <= theirs) & (s < b_reach)
                p_ds = _square(ds, own[:, None], theirs, SIDE) + ((row % SIDE)[:, None] * SIDE + (at + other)[None, :])
                b_ds = tl.load(p_ds, mask=m_ds[:, None], other=0.0)
            else:
                m_ds = (own >= theirs) & (theirs >= b_reach // SIDE) & (own * SIDE < N)
                p_ds = _square(ds, theirs, own[None, :], SIDE) + ((at + other)[:, None] * SIDE + (row % SIDE)[None, :])
                b_ds = tl.trans(tl.load(p_ds, mask=m_ds[None, :], other=0.0))
            b_x_nope = load_tile(x_nope, x_nope_n, s, 0, N, Dn, BT, DN, True)  # [BT, DN]
            b_x_rope = load_tile(x_rope, x_rope_n, s, 0, N, Dr, BT, DR, True)  # [BT, DR]
            b_y_nope = tl.dot(b_ds, b_x_nope, b_y_nope)
            b_y_rope = tl.dot(b_ds, b_x_rope, b_y_rope)

    store_rows(y_nope + h * y_nope_h, y_nope_n, t, N, b_y_nope * scale, ROWS, Dn, DN)
    store_rows(y_rope + h * y_rope_h, y_rope_n, t, N, b_y_rope * scale, ROWS, Dr, DR)


class Block(NamedTuple):
    """BT tokens of the other side at a time."""

    bt: int
    warps: int
    stages: int


_NARROWEST = 192  # `measure` up to which making scores anew takes few enough registers
# Kernel -> largest `measure` that a row serves -> block. Starting values: they keep the limits and are not tuned.
_LARGE = {"scores": {320: Block(64, 8, 3)}, "product": {320: Block(64, 16, 3)}}
# Sums lie in tensor memory; a thread of 16 warps has too few registers for the rest. Triton 3.6 spills with 64 queries.
_SM_100 = {
    "scores": {320: Block(32 if BY_3_7 else 64, 8, 3)},
    "product": {320: Block(64, 8, 3)},
}


def heads_at_once(arguments: dict, large: int) -> int:
    """How many heads are done at once; 0 where scores are to be made anew: in float32, on small chips (`large` as of
    `large_tiles`), at other widths, and where not a head fits KEPT. arguments: those of `attention_pieces.shared_arguments`."""
    heads, served = arguments["H"], _NARROWEST < measure(*widths_of(arguments)) <= max(_LARGE["scores"])
    if not (arguments["N"] and heads and served and large and arguments["v"].dtype.itemsize == 2):
        return 0
    fit = KEPT // (2 * _numbers(arguments["N"]))
    return triton.cdiv(heads, triton.cdiv(heads, fit)) if fit else 0


def launches(arguments: dict, heads: int, large: int) -> list[Launch]:
    """The launches that fill the results among `arguments`, of dk_rope the heads' shares, `heads` heads at once.
    arguments: those of `attention_pieces.backward_arguments`."""
    ds = arguments["dv"].new_empty(heads, _numbers(arguments["N"]))
    arguments = arguments | {"ds": ds, "ds_h": ds.stride(0), "SIDE": SIDE, "ROWS": _ROWS}
    grid = (triton.cdiv(arguments["N"], _ROWS) * arguments["H"],)
    found = [Launch(delta_kernel, grid, arguments, options(4), 2, 0)]
    table, widths = _SM_100 if large == 10 else _LARGE, widths_of(arguments)
    of_scores, of_product = (row_of(table[kernel], widths) for kernel in ("scores", "product"))
    for first in range(0, arguments["H"], heads):
        part = arguments | {"FIRST": first, "HEADS": min(heads, arguments["H"] - first)}
        found += [
            _launch(scores_kernel, part, of_scores, SIDE),
            _of_keys(part, of_product),
            _of_queries(part, of_product),
        ]
    return found


def _of_keys(arguments: dict, block: Block) -> Launch:
    x = {f"x_{name}": arguments[f"q_{name}"] for name in ("nope", "nope_n", "nope_h", "rope", "rope_n", "rope_h")}
    results = _results(arguments["dk_nope"], arguments["shares"].transpose(0, 1))
    return _launch(product_kernel, arguments | x | results | {"SHARED": 1, "OF_KEYS": True}, block, 2 * SIDE)


def _of_queries(arguments: dict, block: Block) -> Launch:
    x = {f"x_{name}": arguments[f"k_{name}"] for name in ("nope", "nope_n", "nope_h", "rope", "rope_n")}
    results = _results(arguments["dq_nope"], arguments["dq_rope"])
    return _launch(product_kernel, arguments | x | results | {"x_rope_h": 0, "OF_KEYS": False}, block, 2 * SIDE)


def _results(nope: Tensor, rope: Tensor) -> dict:
    """product_kernel's y, from [N, H, .] each."""
    return {
        "y_nope": nope, "y_nope_n": nope.stride(0), "y_nope_h": nope.stride(1),
        "y_rope": rope, "y_rope_n": rope.stride(0), "y_rope_h": rope.stride(1),
    }  # fmt: skip


def _launch(kernel, arguments: dict, block: Block, rows: int) -> Launch:
    grid = (triton.cdiv(arguments["N"], rows) * arguments["HEADS"],)
    return Launch(kernel, grid, arguments | {"BT": block.bt}, options(block.warps, block.stages), 2, rows)


def _numbers(n: int) -> int:
    """Numbers of ds for a head of n tokens."""
    tiles = triton.cdiv(n, SIDE)
    return tiles * (tiles + 1) // 2 * SIDE * SIDE


EXAMPLES = {
    "DeepSeek-V3": (128, 64, 128, 16),
    "DeepSeek-V3, 4 heads of keys": (128, 64, 128, 4),
    "narrow rope": (80, 16, 80, 16),
}
"""Dn, Dr, Dv and heads of keys and values, for 16 of queries, that are compiled ahead."""


def example_launches(size: str, dtype: torch.dtype, large: int) -> dict[str, Launch]:
    """Kernel -> launch at EXAMPLES[size], on the meta device; none where scores are made anew."""
    arguments = example_arguments(EXAMPLES[size], dtype)
    heads = heads_at_once(arguments, large)
    if not heads:
        return {}
    names = ("delta_kernel", "scores_kernel", "product_kernel of keys", "product_kernel of queries")
    return dict(zip(names, launches(arguments, heads, large), strict=True))
