"""Triton kernels of dsfast.ops.mla_decode, whose module has the maths. Split-KV as in Flash-Decoding, with DeepSeek-V2's
absorbed kv_b (arXiv 2405.04434).

B sequences, H heads, C places; R, Dn, Dr, Dv widths of the latent, the part without position, the rope part, the value; RP, DR,
DV the same rounded up to powers of two; BH heads and BN places in a tile; b a sequence, h a head, j a place.

All heads read one key, so a program takes BH heads of a sequence as the rows of its products and each tile of latents serves
twice, as keys and as values. Where there are too few sequences to fill the chip, the places of each are divided among
`splits` programs; a second kernel combines their sums. The number of splits follows from sizes alone, what each of them gets
from the length, which only the device knows. Partial results are kept unnormalised beside the maximum m and the sum l of
their softmax, apart: m + log2 l would be rounded, which shows in float32 at large scores.

Narrow models are bound by launches: there the products with `up` are done inside (ABSORB), and one kernel does it all. Wide ones
have torch.bmm before and after.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from dsfast.triton_kernels.launch import Launch, large_tiles, multiprocessors, on_meta, padded
from dsfast.triton_kernels.limits import MULTIPROCESSORS
from dsfast.triton_kernels.pieces import BY_3_7, LOG2E, UNSEEN, opaque, options
from torch import Tensor

_UNSPECIALIZED = ("C", "SPLITS", "PAGES")  # change from batch to batch and must not cause a new compilation


@triton.jit
def _length(lengths, b, C):
    """(length of sequence b, whether it is one): 0 in place of one outside 0 .. C."""
    length = tl.load(lengths + b)
    good = (length >= 0) & (length <= C)
    return tl.where(good, length, 0).to(tl.int32), good


@triton.jit
def _share(length, SPLITS, BN: tl.constexpr):
    """Places of each split, whole tiles; the last splits may get fewer or none."""
    return tl.cdiv(tl.cdiv(length, BN), SPLITS) * BN


@triton.jit
def _load_heads(x, x_h, h, H, D: tl.constexpr, DP: tl.constexpr):
    """Rows `h` of x as [BH, DP]; 0 from column D on, and from head H on the last head, whose results are not stored."""
    d = tl.arange(0, DP)[None, :]
    p_x = x + tl.minimum(h, H - 1)[:, None].to(tl.int64) * x_h + d
    if D < DP:
        return tl.load(p_x, mask=d < D, other=0.0)
    return tl.load(p_x)


@triton.jit
def _load_places(x, page, place, x_p, x_c: tl.constexpr, m_j, D: tl.constexpr, DP: tl.constexpr, ONE: tl.constexpr):
    """A tile of the cache, [BN, DP]: row n is place `place[n]` of page `page[n]`, where ONE of the page `page`."""
    d = tl.arange(0, DP)[None, :]
    if ONE:
        p_x = x + tl.cast(page, tl.int64) * x_p + place.to(tl.int64)[:, None] * x_c + d
    else:
        p_x = x + (page.to(tl.int64) * x_p + place.to(tl.int64) * x_c)[:, None] + d
    if D < DP:
        return tl.load(p_x, mask=m_j[:, None] & (d < D), other=0.0)
    return tl.load(p_x, mask=m_j[:, None], other=0.0)


@triton.jit
def _normalised(b_o, b_l, length, good):
    """b_o / b_l; zeros for an empty sequence and NaN where the length is none."""
    return tl.where(length > 0, b_o / tl.where(length > 0, b_l, 1.0), tl.where(good, 0.0, float("nan")))


@triton.jit
def _absorb(q, up, q_h, up_h, up_n, h, H, Dn: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BU: tl.constexpr):
    """q_nope up_key of heads `h`: [BH, RP], float32. BU rows of `up` at a time."""
    r = tl.arange(0, RP)[None, None, :]
    b_q = tl.zeros([h.shape[0], RP], tl.float32)
    for start in tl.range(0, Dn, BU, loop_unroll_factor=2):
        n = start + tl.arange(0, BU)
        b_x = tl.load(
            q + h[:, None].to(tl.int64) * q_h + n[None, :], mask=(h[:, None] < H) & (n[None, :] < Dn), other=0.0
        )
        m_up = (h[:, None, None] < H) & (n[None, :, None] < Dn) & (r < R)
        b_up = tl.load(up + h[:, None, None].to(tl.int64) * up_h + n[None, :, None] * up_n + r, mask=m_up, other=0.0)
        b_q += tl.sum(b_x[:, :, None].to(tl.float32) * b_up.to(tl.float32), 1)
    return b_q


@triton.jit
def _store_values(
    o, up, o_h, up_h, up_n, b_o, h, H,
    Dn: tl.constexpr, Dv: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BU: tl.constexpr,
):  # fmt: skip
    """up_value of the mixed latents b_o [BH, RP], for heads `h`, to o. BU rows of `up` at a time."""
    r = tl.arange(0, RP)[None, None, :]
    for start in tl.range(0, Dv, BU, loop_unroll_factor=2):
        v = start + tl.arange(0, BU)
        m_up = (h[:, None, None] < H) & (v[None, :, None] < Dv) & (r < R)
        b_up = tl.load(
            up + h[:, None, None].to(tl.int64) * up_h + (Dn + v)[None, :, None] * up_n + r, mask=m_up, other=0.0
        )
        b_v = tl.sum(b_o[:, None, :] * b_up.to(tl.float32), 2)  # [BH, BU]
        m_o = (h[:, None] < H) & (v[None, :] < Dv)
        tl.store(o + h[:, None].to(tl.int64) * o_h + v[None, :], b_v.to(o.dtype.element_ty), mask=m_o)


@triton.jit
def _add_scores(
    b_s, q, latent, q_h, page, place, latent_p, latent_c: tl.constexpr, h, H, m_j, D: tl.constexpr, SLICE: tl.constexpr,
    ONE: tl.constexpr,
):  # fmt: skip
    """b_s and the first D <= SLICE columns of q . latent more."""
    b_q = _load_heads(q, q_h, h, H, D, SLICE)
    b_c = _load_places(latent, page, place, latent_p, latent_c, m_j, D, SLICE, ONE)
    return tl.dot(b_q, tl.trans(b_c), b_s, input_precision="ieee")


@triton.jit
def _scores(
    q, latent, b_q, b_c, q_h, page, place, latent_p, latent_c: tl.constexpr, h, H, m_j, BN: tl.constexpr, R: tl.constexpr,
    SLICE: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """q_latent . latent of a tile, [BH, BN]. Where SLICE is not 0, operands are read again, SLICE columns at a time."""
    if SLICE:
        b_s = tl.zeros([h.shape[0], BN], tl.float32)
        whole: tl.constexpr = R // SLICE * SLICE
        for r in tl.range(0, whole, SLICE):  # unrolled, all slices would be loaded at once: too many registers
            b_s = _add_scores(
                b_s, q + r, latent + r, q_h, page, place, latent_p, latent_c, h, H, m_j, SLICE, SLICE, ONE
            )
        if whole < R:
            rest: tl.constexpr = R - whole
            b_s = _add_scores(
                b_s, q + whole, latent + whole, q_h, page, place, latent_p, latent_c, h, H, m_j, rest, SLICE, ONE
            )  # fmt: skip
    else:
        b_s = tl.dot(b_q, tl.trans(b_c), input_precision="ieee")
    return b_s


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def attend_kernel(
    q, q_rope, latent, k_rope, lengths, pages, up, out, sums, scale,
    q_b, q_h, q_rope_b, q_rope_h, latent_p, k_rope_p, pages_b, up_h, up_n, out_b, out_s, out_h,
    sums_b, sums_plane, H, C, SPLITS, PAGES,
    Dn: tl.constexpr, Dr: tl.constexpr, Dv: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, DR: tl.constexpr,
    latent_c: tl.constexpr, k_rope_c: tl.constexpr, PAGE: tl.constexpr,
    BH: tl.constexpr, BN: tl.constexpr, SLICE: tl.constexpr, BU: tl.constexpr,
    ABSORB: tl.constexpr, SPLIT: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """BH heads of one sequence over its places, or one split of them.

    q is q_nope [B, H, Dn] where ABSORB, else q_latent [B, H, R]. `out` becomes, where SPLIT, the unnormalised sums of latents
    [B, SPLITS, H, R] in float32, and `sums` [2, B, SPLITS, H] m and l; else the mixed latents [B, H, R], where ABSORB the
    values [B, H, Dv]. PAGE is 0 for a cache [B, C, ...]: then a sequence is its only page. AHEAD: None, or the stages of a loop
    that has the next tile on its way during both products and not the second alone; they read it in shared memory.
    """
    blocks = tl.cdiv(H, BH)
    pid = tl.program_id(0)
    block, split, b = pid % blocks, pid // blocks % SPLITS, pid // blocks // SPLITS
    length, good = _length(lengths, b, C)
    share = _share(length, SPLITS, BN)
    begin = split * share
    end = tl.minimum(begin + share, length)
    if SPLIT:  # noqa: SIM102  (a constant of the compilation, the other condition is not)
        if opaque(split) * share >= length:
            return
    b = b.to(tl.int64)
    h = block * BH + tl.arange(0, BH)  # [BH]
    q += b * q_b
    if ABSORB:
        b_q = _absorb(q, up, q_h, up_h, up_n, h, H, Dn, R, RP, BU).to(q_rope.dtype.element_ty)  # [BH, RP]
    else:
        b_q = _load_heads(q, q_h, h, H, R, RP)  # [BH, RP]
    b_q_rope = _load_heads(q_rope + b * q_rope_b, q_rope_h, h, H, Dr, DR)  # [BH, DR]
    b_o = tl.zeros([BH, RP], tl.float32)
    b_m = tl.full([BH], UNSEEN, tl.float32)
    b_l = tl.zeros([BH], tl.float32)
    factor = scale * LOG2E
    ONE: tl.constexpr = PAGE == 0 or PAGE % BN == 0

    if begin < end:  # else ptxas makes every product wait for the one before it, see mla_attention
        for s in tl.range(begin, end, BN, num_stages=AHEAD):
            j = s + tl.arange(0, BN)  # [BN]
            m_j = j < length
            page, place, m_c = b, j, m_j
            if PAGE:
                if ONE:
                    page, place = tl.load(pages + b * pages_b + s // PAGE), s % PAGE + tl.arange(0, BN)
                else:
                    page, place = tl.load(pages + b * pages_b + j // PAGE, mask=m_j, other=0), j % PAGE
                m_c = j < tl.where((page >= 0) & (page < PAGES), length, 0)
            b_c = _load_places(latent, page, place, latent_p, latent_c, m_c, R, RP, ONE)  # [BN, RP]
            if AHEAD:
                b_k = tl.trans(_load_places(k_rope, page, place, k_rope_p, k_rope_c, m_c, Dr, DR, ONE))  # [DR, BN]
            # Always so. Triton puts loads for the next round behind this one's products, but before those under a condition.
            if not AHEAD or s < end:
                b_s_latent = _scores(
                    q, latent, b_q, b_c, q_h, page, place, latent_p, latent_c, h, H, m_c, BN, R, SLICE, ONE
                )
                if not AHEAD:  # not before: there are chips on which it would spill
                    b_k = tl.trans(_load_places(k_rope, page, place, k_rope_p, k_rope_c, m_c, Dr, DR, ONE))  # [DR, BN]
                b_s_rope = tl.dot(b_q_rope, b_k, input_precision="ieee")  # [BH, BN]
                b_s = b_s_latent * factor + b_s_rope * factor  # scaled apart: a plain sum would be made a chain
                # Always so. Triton takes two products for a chain unless the first one's result passes a condition, and of a
                # chain it gives both warp groups of sm_90 the same 64 rows of scores: all of them would be computed twice. The
                # maximum is taken after it: inside, triton 3.6 does not compile it for gfx942.
                if s < length:
                    if PAGE:
                        b_s = tl.where(m_c[None, :], b_s, tl.where(m_j, float("nan"), float("-inf"))[None, :])
                    else:
                        b_s = tl.where(m_j[None, :], b_s, float("-inf"))
                b_m_new = tl.maximum(b_m, tl.max(b_s, 1))
                b_p = tl.exp2(b_s - b_m_new[:, None])
                decay = tl.exp2(b_m - b_m_new)
                b_l = b_l * decay + tl.sum(b_p, 1)
                b_o = tl.dot(b_p.to(b_c.dtype), b_c, b_o * decay[:, None], input_precision="ieee")
                b_m = b_m_new

    out += b * out_b
    h = opaque(block) * BH + tl.arange(0, BH)
    if SPLIT:
        p_sums = sums + b * sums_b + split * H + h
        tl.store(p_sums, b_m, mask=h < H)
        tl.store(p_sums + sums_plane, b_l, mask=h < H)
        out += split * out_s
    else:
        b_o = _normalised(b_o, b_l[:, None], length, good)
    if ABSORB and not SPLIT:
        _store_values(out, up, out_h, up_h, up_n, b_o, h, H, Dn, Dv, R, RP, BU)
    else:
        r = tl.arange(0, RP)[None, :]
        m_o = (h[:, None] < H) & (r < R)
        tl.store(out + h[:, None].to(tl.int64) * out_h + r, b_o.to(out.dtype.element_ty), mask=m_o)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def combine_kernel(
    part, sums, lengths, up, out, part_b, part_s, part_h, sums_b, sums_plane, up_h, up_n, out_b, out_h, H, C, SPLITS,
    Dn: tl.constexpr, Dv: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, SP: tl.constexpr, BS: tl.constexpr,
    BR: tl.constexpr, BN: tl.constexpr, BU: tl.constexpr, ABSORB: tl.constexpr,
):  # fmt: skip
    """The splits of one head of one sequence put together, BR columns of them, BS splits at a time: to the mixed latents
    [B, H, R], where ABSORB (and BR = RP) the values [B, H, Dv]. What a split without places would have written is not read."""
    chunks: tl.constexpr = (RP + BR - 1) // BR
    pid = tl.program_id(0)
    chunk, h, b = pid % chunks, pid // chunks % H, pid // chunks // H
    length, good = _length(lengths, b, C)
    b, h = b.to(tl.int64), h.to(tl.int64)
    share = _share(length, SPLITS, BN)
    p_sums = sums + b * sums_b + h
    s = tl.arange(0, SP)  # [SP]
    m_s = s * share < length
    b_m = tl.load(p_sums + s * H, mask=m_s, other=UNSEEN)
    b_l = tl.load(p_sums + sums_plane + s * H, mask=m_s, other=0.0)
    m = tl.max(b_m, 0)
    r = chunk * BR + tl.arange(0, BR)  # [BR]
    p_part = part + b * part_b + h * part_h + r[None, :]
    b_o = tl.zeros([BR], tl.float32)
    for start in tl.static_range(0, SP, BS):
        t = start + tl.arange(0, BS)  # [BS]
        m_t = t * share < length
        weight = tl.exp2(tl.load(p_sums + t * H, mask=m_t, other=UNSEEN) - m)
        b_part = tl.load(p_part + t[:, None] * part_s, mask=m_t[:, None] & (r[None, :] < R), other=0.0)  # [BS, BR]
        b_o += tl.sum(weight[:, None] * b_part, 0)
    b_o = _normalised(b_o, tl.sum(tl.exp2(b_m - m) * b_l, 0), length, good)
    out += b * out_b
    if ABSORB:
        _store_values(out, up, out_h, up_h, up_n, b_o[None, :], h + tl.arange(0, 1), H, Dn, Dv, R, RP, BU)
    else:
        tl.store(out + h * out_h + r, b_o.to(out.dtype.element_ty), mask=r < R)


class Tiles(NamedTuple):
    """BN places at a time; `slice` columns of the latent at a time in scores (0: all, the tile is then read once);
    `resident` programs that a multiprocessor is thought to hold; `ahead` as AHEAD of `attend_kernel`."""

    bn: int
    warps: int
    stages: int
    slice: int
    resident: int
    ahead: bool = False


# Rows of heads -> widest RP + DR that a row serves -> tiles. Starting values: they keep the limits of
# tests/test_triton_compile.py and are not tuned. With 16 heads the cache's bandwidth is the bound: few registers, several
# programs side by side. From 64 on it is the products: on sm_90 each warp group takes half of the keys in scores and half of
# the latent in sums.
_FLOAT32 = {16: {96: Tiles(32, 4, 1, 0, 2), 192: Tiles(32, 4, 1, 32, 2), 1152: Tiles(16, 8, 1, 32, 1)}}
_LARGE = {
    16: {
        96: Tiles(64, 4, 2, 0, 3),
        192: Tiles(64, 4, 2, 0, 3),
        576: Tiles(32, 4, 3, 0, 2),
        1152: Tiles(16, 8, 2, 0, 1),
    },
    32: {
        96: Tiles(64, 4, 2, 0, 3),
        192: Tiles(64, 4, 2, 0, 3),
        576: Tiles(32, 8, 3, 0, 1),
        1152: Tiles(16, 8, 2, 0, 1),
    },
    64: {
        48: Tiles(64, 8, 2, 0, 1),
        96: Tiles(128, 8, 2, 0, 1),  # of 64 places and a latent of 64 ptxas makes every product wait
        192: Tiles(64, 4, 2, 0, 3),
        576: Tiles(64, 8, 2, 0, 1, ahead=True),
    },
}
# sm_100 keeps three tiles of latents in shared memory where sm_90 keeps two: of 64 places they are too many.
_SM_100 = _LARGE | {64: _LARGE[64] | {192: Tiles(32, 4, 2, 0, 3), 576: Tiles(32, 8, 2, 0, 1)}}
_SMALL = {
    16: {
        96: Tiles(64, 4, 2, 0, 3),
        192: Tiles(32, 4, 2, 0, 3),
        576: Tiles(32, 4, 2, 0, 1),
        1152: Tiles(16, 8, 1, 128, 1),
    },
    32: {96: Tiles(64, 4, 2, 0, 3), 192: Tiles(32, 4, 2, 0, 3), 576: Tiles(16, 8, 2, 0, 1)},
}
ABSORBED_WIDTH = 64  # widest R, Dn and Dv whose products with `up` are done inside the kernel
MOST_SPLITS = 512
LEAST_SHARE = 128  # places of a split
COMBINED = 8192  # numbers of partial results that a program takes at a time
SPLIT_COST = 128  # of a program beyond its places, in places: its queries, its partial result
COMBINE_COST = 512  # of a second launch, in places


class Plan(NamedTuple):
    """absorb: products with `up` inside the kernel; `bh` heads of a program; `splits` of a sequence's places."""

    absorb: bool
    bh: int
    tiles: Tiles
    splits: int


def plan(
    b: int, h: int, c: int, widths: tuple[int, int, int, int], page: int, dtype: torch.dtype, large: int, processors: int
) -> Plan:  # fmt: skip
    """How b sequences with c places and h heads of `widths` (R, Dn, Dr, Dv) are shared out among `processors`; `page` is the
    places of a page, 0 if the cache is contiguous.
    """
    r, dn, dr, dv = widths
    by_rows = _FLOAT32 if dtype.itemsize == 4 else _SM_100 if large == 10 else _LARGE if large else _SMALL
    width = padded(r) + padded(dr)
    fitting = [rows for rows, by_width in by_rows.items() if max(by_width) >= width]
    bh = min((rows for rows in fitting if rows >= h), default=max(fitting))
    tiles = by_rows[bh][min(w for w in by_rows[bh] if w >= width)]
    if page % tiles.bn and width > 192:  # addresses for each row: beside so many sums there are no registers for 64
        tiles = tiles._replace(bn=min(32, tiles.bn))
    if page and BY_3_7:  # 40 bytes spill where places are AHEAD
        tiles = tiles._replace(ahead=False)
    splits = _splits(b * triton.cdiv(h, bh), c, processors * tiles.resident)
    absorb = max(r, dn, dv) <= ABSORBED_WIDTH
    return Plan(absorb, bh, tiles._replace(slice=0) if absorb else tiles, splits)


@lru_cache(maxsize=4096)
def _splits(programs: int, c: int, slots: int) -> int:
    """The number of splits with the least estimated time, the fewest of equals: rounds of programs times what one takes.

    Beyond one program for each of the slots, more splits would only wait for each other.
    """

    def cost(n: int) -> int:
        return triton.cdiv(programs * n, slots) * (triton.cdiv(c, n) + SPLIT_COST) + (COMBINE_COST if n > 1 else 0)

    return min(range(1, max(1, min(MOST_SPLITS, slots, c // LEAST_SHARE)) + 1), key=cost)


def forward(q_nope, q_rope, latent, k_rope, lengths, up, scale, pages=None, splits=None) -> Tensor:
    """Shapes as dsfast.ops.mla_decode -> o [B, H, Dv], contiguous. `splits` in place of the number that `plan` chooses.

    Lengths and pages lie on the device, and looking would make the host wait: a sequence whose length is outside 0..C, or
    that needs a page which is not there, gets NaN, and nothing outside the cache is read.
    """
    (b, h, dn), r, dr, dv = q_nope.shape, latent.size(2), q_rope.size(2), up.size(1) - q_nope.size(2)
    page = 0 if pages is None else latent.size(1)
    c = page * pages.size(1) if page else latent.size(1)
    device = q_nope.device
    chosen = plan(b, h, c, (r, dn, dr, dv), page, q_nope.dtype, large_tiles(device), multiprocessors(device))
    chosen = chosen if splits is None else chosen._replace(splits=splits)
    o = q_nope.new_empty(b, h, dv)
    if not o.numel():
        return o
    by_head = o.transpose(0, 1)  # [H, B, Dv]
    q, out = q_nope, o
    if not chosen.absorb:
        q = torch.bmm(q_nope.transpose(0, 1), up[:, :dn]).transpose(0, 1)  # [B, H, R]
        out = torch.empty_like(q)
    with torch.cuda.device_of(q_nope):
        for launch in launches(chosen, q, q_rope, latent, k_rope, lengths, up, scale, pages, out):
            launch.run()
    if not chosen.absorb:
        torch.bmm(out.transpose(0, 1), up[:, dn:].mT, out=by_head)
    return o


def launches(chosen: Plan, q, q_rope, latent, k_rope, lengths, up, scale, pages, out) -> list[Launch]:
    """What fills `out`; tensors may lie on the meta device. q is q_nope [B, H, Dn] and out [B, H, Dv] where the plan absorbs,
    else both [B, H, R]."""
    absorb, bh, tiles, splits = chosen
    (b, h, _), (_, c, r), dr = q.shape, latent.shape, q_rope.size(2)
    q, q_rope, latent, k_rope, up = (_readable(x) for x in (q, q_rope, latent, k_rope, up))
    page = 0 if pages is None else c
    pages = lengths.contiguous()[:, None] if pages is None else _readable(pages)
    dn = q.size(2) if absorb else 0
    dv = out.size(2) if absorb else 0
    rp = padded(r)
    shared = {
        "lengths": lengths.contiguous(), "up": up, "up_h": up.stride(0), "up_n": up.stride(1), "H": h,
        "C": c * (pages.size(1) if page else 1), "SPLITS": splits, "Dn": dn, "Dv": dv, "R": r, "RP": rp, "BN": tiles.bn,
        "ABSORB": absorb, "sums_b": splits * h, "sums_plane": b * splits * h,
    }  # fmt: skip
    part = out if splits == 1 else q.new_empty(b, splits, h, r, dtype=torch.float32)
    sums = lengths if splits == 1 else q.new_empty(2, b, splits, h, dtype=torch.float32)
    attend = shared | {
        "q": q, "q_b": q.stride(0), "q_h": q.stride(1), "q_rope": q_rope, "q_rope_b": q_rope.stride(0),
        "q_rope_h": q_rope.stride(1), "latent": latent, "latent_p": latent.stride(0), "latent_c": latent.stride(1),
        "k_rope": k_rope, "k_rope_p": k_rope.stride(0), "k_rope_c": k_rope.stride(1), "pages": pages,
        "pages_b": pages.stride(0), "PAGES": latent.size(0), "PAGE": page, "scale": scale, "Dr": dr, "DR": padded(dr),
        "BH": bh, "SLICE": tiles.slice, "BU": max(1, 8192 // (bh * rp)), "SPLIT": splits > 1,
        "AHEAD": tiles.stages if tiles.ahead else None, "out": part, "out_b": part.stride(0), "out_h": part.stride(-2),
        "out_s": part.stride(1), "sums": sums,
    }  # fmt: skip
    grid = (b * splits * triton.cdiv(h, bh),)
    compiler = options(tiles.warps, tiles.stages)
    found = [Launch(attend_kernel, grid, attend, compiler, q.dtype.itemsize, bh)]
    if splits > 1:
        sp = triton.next_power_of_2(splits)
        br = rp if absorb else min(rp, max(32, COMBINED // sp))
        combine = shared | {
            "part": part, "part_b": part.stride(0), "part_s": part.stride(1), "part_h": part.stride(2), "sums": sums,
            "out": out, "out_b": out.stride(0), "out_h": out.stride(1), "SP": sp, "BS": min(sp, COMBINED // br),
            "BR": br, "BU": padded(dv),
        }  # fmt: skip
        grid = (b * h * triton.cdiv(rp, br),)
        found.append(Launch(combine_kernel, grid, combine, options(4), 4, 0))
    return found


def _readable(x: Tensor) -> Tensor:
    """`x` itself where its last dimension is contiguous, with any strides before it (a long cache is not copied); else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


EXAMPLES = {
    "500K": (32, 256, 4, (32, 32, 16, 32), 64),
    "5M": (32, 256, 8, (64, 32, 16, 32), 64),
    "one long sequence, narrow": (1, 131072, 8, (64, 32, 16, 32), 64),
    "narrow, no power of two": (32, 256, 8, (48, 48, 16, 48), 64),
    "many narrow heads": (32, 256, 64, (32, 32, 16, 32), 64),
    "many narrow heads, latents of 64": (32, 256, 128, (64, 64, 32, 64), 64),
    "32 narrow heads": (32, 256, 32, (32, 32, 16, 32), 64),
    "middle": (128, 4096, 64, (128, 64, 64, 64), 64),
    "middle, 32 heads": (128, 4096, 32, (128, 64, 64, 64), 64),
    "middle, 16 heads": (128, 4096, 16, (128, 64, 64, 64), 64),
    "16 heads": (128, 4096, 16, (512, 128, 64, 128), 64),
    "one long sequence": (1, 131072, 16, (512, 128, 64, 128), 64),
    "16 heads, small pages": (128, 4096, 16, (512, 128, 64, 128), 8),
    "32 heads": (128, 4096, 32, (512, 128, 64, 128), 64),
    "DeepSeek-V3": (128, 4096, 128, (512, 128, 64, 128), 64),
    "DeepSeek-V3, small pages": (128, 4096, 128, (512, 128, 64, 128), 8),
    "widest": (8, 4096, 16, (1024, 128, 64, 128), 64),
    "widest, 32 heads": (8, 4096, 32, (1024, 128, 64, 128), 64),
}
"""B, C, H, (R, Dn, Dr, Dv) and the places of a page that are compiled ahead."""


def example_launches(size: str, dtype: torch.dtype, large: int) -> dict[str, Launch]:
    """Name -> launch at EXAMPLES[size], on the meta device: all of a contiguous cache at once, and a paged one in splits.
    The cache and the queries are views of one tensor each."""
    empty = on_meta(dtype)
    b, c, h, (r, dn, dr, dv), page = EXAMPLES[size]
    q, q_rope = empty(b, h, dn + dr).split([dn, dr], -1)
    out = empty(b, h, dv)
    if max(r, dn, dv) > ABSORBED_WIDTH:
        q, out = empty(h, b, r).transpose(0, 1), empty(h, b, r).transpose(0, 1)
    found = {}
    for places, pages in ((c, None), (page, empty(b, c // page, dtype=torch.int32))):
        chosen = plan(b, h, c, (r, dn, dr, dv), 0 if pages is None else page, dtype, large, MULTIPROCESSORS)
        latent, k_rope = empty(b * c // places, places, r + dr).split([r, dr], -1)
        inputs = (q, q_rope, latent, k_rope, empty(b, dtype=torch.int64), empty(h, dn + dv, r), 0.1, pages, out)
        splits = 1 if pages is None else max(8, chosen.splits)
        for launch in launches(chosen._replace(splits=splits), *inputs):
            found[f"{launch.kernel.__name__}, {'contiguous' if pages is None else 'paged'}"] = launch
    return found
