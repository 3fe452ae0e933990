"""Triton kernels of dsfast.ops.moe_route, whose module has the maths.

N tokens, E experts in G groups of S, K chosen experts; GP, SP, KP: G, S, K rounded up to powers of two. A tile holds BN tokens
by GP x SP places; place g SP + s is expert g S + s, so the lowest place is the lowest expert, and places with g >= G or s >= S
are empty. Of groups T are taken, TP rounded up; the experts are then chosen in a tile of BN x TP x SP places, with the keys made
again. Values are compared as integers in the same order (_key): a maximum over 32-bit integers is one instruction
of a warp where the chip has one, NaN has a rank, and nothing has the two lowest numbers, which stand for places that may not be
chosen (OUT) or were (TAKEN).

The slots are sorted by a counting sort: every place follows from integer sums, so it is exact and the same on every run, and
there are no atomics in memory. The slots of B tiles, PER each (BS with the padding), are counted one by one, in EP bins, of which
bin e is expert e and the last may be one for indices that name none; TILES of them are a block, whose slots one program brings to
their places. The choice's kernel counts its own tiles; for indices from elsewhere there is a kernel that does nothing else.

The logits are float32: near ties decide the choice, so dsfast routes in float32 whatever it computes in. A layer's router starts
from its tokens x [N, D] and its matrix w [E, D]. Up to FEW places the choice's kernel makes the logits too, BK columns of x in a
step, and the gradients of x and w, BD columns in a program, are made where the logits' are, which are not written; the parts of
w's are added up by another kernel. With more places the products are cuBLAS's, that of 16-bit tokens with a float32 result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from dsfast.triton_kernels.launch import Launch, aside, on_meta, padded, rows
from dsfast.triton_kernels.pieces import LN2, LOG2E, options, splits, sum_launch
from torch import Tensor

LOG2E_LOW = tl.constexpr(1.925963033500888e-08)  # log2 e less its float32
OUT = tl.constexpr(-(2**31))
TAKEN = tl.constexpr(-(2**31) + 1)
FEW = 16  # places: the narrowest product
SORTED = 128  # slots in a block, with the padding, if not fewer
SUMMED = 4096  # bins of all tiles that the last kernel adds up itself
FEW_TILES = 16  # such as one step of generation has: for fewer the last kernel is no other one
SCANNED = 2048  # tiles whose counts are summed at once, MOST_TILES or more
MOST_TILES = 32  # of a block: each slot looks up the counts of those before its own
_UNSPECIALIZED = ("N", "B", "SLOTS", "STEPS")  # change from batch to batch and must not cause a new compilation


@triton.jit
def _exp(x):
    """exp(x) of a finite x as exact as eager's: exp2 of a rounded product would be |x| / 2 ulp off, and might turn near ties."""
    t = x * LOG2E
    rest = tl.fma(x, LOG2E, -t) + x * LOG2E_LOW
    return tl.exp2(t) * (1.0 + rest * LN2)


@triton.jit
def _sigmoid(x):
    x = tl.clamp(x, -104.0, 104.0, propagate_nan=tl.PropagateNan.ALL)  # infinities would give inf - inf
    return tl.div_rn(1.0, 1.0 + _exp(-x))


@triton.jit
def _power(x):
    """exp(x) of x <= 0, of -inf 0. On NVIDIA 0 below 2^-126 as well: experts so far behind the first are taken to be alike."""
    return _exp(tl.where(x < -150.0, -150.0, x))


@triton.jit
def _highest_and_sum(b_logits, m_e):
    """The highest of each token's logits [BN, PLACES], and the sum of exp(logit - highest), both [BN, 1]."""
    b_high = tl.max(tl.where(m_e, b_logits, float("-inf")), 1, keep_dims=True)
    return b_high, tl.sum(tl.where(m_e, _power(b_logits - b_high), 0.0), 1, keep_dims=True)


@triton.jit
def _score(b_logits, b_high, b_sum, SOFTMAX: tl.constexpr):
    """Scores of logits [BN, ...], with softmax by what `_highest_and_sum` gave for their tokens."""
    if SOFTMAX:
        return tl.div_rn(_power(b_logits - b_high), b_sum)
    return _sigmoid(b_logits)


@triton.jit
def _key(x):
    """float32 -> int32 in the same order, NaN (of any sign) the largest. Its own inverse is _value."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def _keys(b_logits, b_bias, m_e, b_high, b_sum, SOFTMAX: tl.constexpr):
    """What experts are chosen by, [BN, ...]; b_high and b_sum as of `_score`."""
    return tl.where(m_e, _key(_score(b_logits, b_high, b_sum, SOFTMAX) + b_bias), OUT)


@triton.jit
def _value(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _first_of_largest(b_key, number, AXIS: tl.constexpr):
    """(largest key, lowest of the numbers of those that have it) along AXIS, which stays with size 1."""
    b_best = tl.max(b_key, AXIS, keep_dims=True)
    return b_best, tl.min(tl.where(b_key == b_best, number, 0x7FFFFFFF), AXIS, keep_dims=True)


@triton.jit
def _best_groups(b_key, BN: tl.constexpr, G: tl.constexpr, S: tl.constexpr, GP: tl.constexpr, SP: tl.constexpr,
                 TP: tl.constexpr):  # fmt: skip
    """The TP groups of keys [BN, GP SP] whose two best values sum highest, [BN, TP, 1], the best one first."""
    b_key = tl.reshape(b_key, [BN, GP, SP])
    s = tl.arange(0, SP)[None, None, :]
    b_first, b_at = _first_of_largest(b_key, s, 2)  # [BN, GP, 1]
    b_sum = _value(b_first)
    if S > 1:
        b_sum += _value(tl.max(tl.where(s == b_at, OUT, b_key), 2, keep_dims=True))
    # Each against each: there are few, and rounds of maxima would wait for one another.
    g, other = tl.arange(0, GP)[None, None, :], tl.arange(0, GP)[None, :, None]
    b_group = tl.reshape(tl.where(other < G, _key(b_sum + 0.0), OUT), [BN, GP])
    b_one, b_other = b_group[:, None, :], b_group[:, :, None]
    b_rank = tl.sum(((b_other > b_one) | ((b_other == b_one) & (other < g))).to(tl.int32), 1)  # [BN, GP]
    return tl.sum(tl.where(b_rank[None, :, :] == tl.arange(0, TP)[:, None, None], g, 0), 2, keep_dims=True)


@triton.jit
def _in_row(x, BN: tl.constexpr, PLACES: tl.constexpr):
    """[TP, BN, SP] -> [BN, TP SP]."""
    return tl.reshape(tl.permute(x, (1, 0, 2)), [BN, PLACES])


@triton.jit
def _scores_before(x, x_n, w, n, N, e, m_e, D: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, PLACES: tl.constexpr):
    """x[n] w[e]^T, [BN, PLACES], 0 where there is no such token or expert."""
    d = tl.arange(0, BK)
    p_x, p_w = x + n.to(tl.int64) * x_n + d[None, :], w + e * D + d[:, None]
    b_logits = tl.zeros([BN, PLACES], tl.float32)
    for k in range(tl.cdiv(D, BK)):
        m_d = k * BK + d < D
        b_x = tl.load(p_x + k * BK, mask=(n < N) & m_d[None, :], other=0.0)  # [BN, BK]
        b_w = tl.load(p_w + k * BK, mask=m_e & m_d[:, None], other=0.0)  # [BK, PLACES]
        b_logits = tl.dot(b_x, b_w, b_logits, input_precision="ieee")
    return b_logits


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def forward_kernel(
    logits, x, w, bias, weights, indices, parts, scaling, logits_n, x_n, N, D: tl.constexpr, BK: tl.constexpr,
    G: tl.constexpr, S: tl.constexpr, GP: tl.constexpr, SP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    T: tl.constexpr, TP: tl.constexpr, EP: tl.constexpr, norm_topk_prob: tl.constexpr, SOFTMAX: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """weights and indices [N, K] of one tile of tokens, and how many of them each expert got: a row of parts [B, E].

    Where there are x and w, from them, and logits [N, E] as well.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)[:, None]  # [BN, 1]
    g, s = tl.arange(0, GP * SP)[None, :] // SP, tl.arange(0, GP * SP)[None, :] % SP
    e, m_e = g * S + s, (g < G) & (s < S)  # [1, GP SP]
    p_logits = logits + n.to(tl.int64) * logits_n
    if x is None:
        b_logits = tl.load(p_logits + e, mask=(n < N) & m_e, other=0.0)
    else:
        b_logits = _scores_before(x, x_n, w, n, N, e, m_e, D, BK, BN, GP * SP)
        tl.store(p_logits + e, b_logits, mask=(n < N) & m_e)
        tl.debug_barrier()  # other threads read those of the chosen
    b_high, b_sum = 0.0, 1.0
    if SOFTMAX:
        b_high, b_sum = _highest_and_sum(b_logits, m_e)
    b_bias = tl.load(bias + e, mask=m_e, other=0.0)
    b_key = _keys(b_logits, b_bias, m_e, b_high, b_sum, SOFTMAX)  # [BN, GP SP]
    if T < G:  # the keys of the groups taken, made again: fewer places in each of the rounds below
        t, s = tl.arange(0, TP)[:, None, None], tl.arange(0, SP)[None, None, :]
        b_e = _best_groups(b_key, BN, G, S, GP, SP, TP) * S + s  # [TP, BN, SP]
        m_e = tl.broadcast_to((t < T) & (s < S), [TP, BN, SP])
        b_logits = tl.load(p_logits[None, :] + b_e, mask=(n < N)[None, :] & m_e, other=0.0)
        b_bias = tl.load(bias + b_e, mask=m_e, other=0.0)
        e, m_e = _in_row(b_e, BN, TP * SP), _in_row(m_e, BN, TP * SP)
        b_logits, b_bias = _in_row(b_logits, BN, TP * SP), _in_row(b_bias, BN, TP * SP)
        b_key = _keys(b_logits, b_bias, m_e, b_high, b_sum, SOFTMAX)

    k = tl.arange(0, KP)[None, :]
    b_chosen = tl.zeros([BN, KP], tl.int32)
    for rank in tl.static_range(K):
        _, b_at = _first_of_largest(b_key, e, 1)  # [BN, 1]
        b_chosen = tl.where(k == rank, b_at, b_chosen)
        b_key = tl.where(e == b_at, TAKEN, b_key)

    m_k = (n < N) & (k < K)
    # The scores of the chosen, made again: cheaper than to look them up across the threads.
    b_w = _score(tl.load(p_logits + b_chosen, mask=m_k, other=0.0), b_high, b_sum, SOFTMAX)
    b_w = tl.where(k < K, b_w, 0.0)
    if norm_topk_prob:
        b_w = tl.div_rn(b_w, tl.sum(b_w, 1, keep_dims=True) + 1e-20)
    p_out = n.to(tl.int64) * K + k
    tl.store(weights + p_out, (b_w * scaling).to(weights.dtype.element_ty), mask=m_k)
    tl.store(indices + p_out, b_chosen.to(tl.int64), mask=m_k)
    p_parts = parts + tl.program_id(0).to(tl.int64) * (G * S)
    if T < G:  # each token has experts of its own in a column
        # No mask: each of the two would be reshaped as suits itself, and another place's. What is none counts for expert 0.
        nowhere = BN * KP - K * tl.minimum(N - tl.program_id(0) * BN, BN)
        bins = tl.arange(0, EP)
        b_count = tl.histogram(tl.reshape(tl.where(m_k, b_chosen, 0), [BN * KP]), EP)
        b_count -= tl.where(bins == 0, nowhere, 0)
        tl.store(p_parts + bins, b_count.to(tl.int8), mask=bins < G * S)
    else:
        b_count = tl.sum(((b_key == TAKEN) & (n < N)).to(tl.int32), 0, keep_dims=True)
        tl.store(p_parts + e, b_count.to(tl.int8), mask=m_e)


@triton.jit
def _gradient(
    dweights, logits, indices, scaling, dweights_n, logits_n, n, N, E: tl.constexpr, EP: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, norm_topk_prob: tl.constexpr, SOFTMAX: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """For the tokens n [BN, 1]: the gradient of the logits of experts that are not chosen [BN, EP]; which experts are chosen,
    and the gradient of their logits, both [BN, KP], -1 and 0 from column K on.

    With s the chosen scores and T their sum: w = scaling s / T gives ds = scaling (dw - sum(dw s) / T) / T. Of a sigmoid that is
    ds s (1 - s), and 0 for an expert that was not chosen; of a softmax s (ds - sum(ds s)) for all experts.
    """
    n_64 = n.to(tl.int64)
    p_logits = logits + n_64 * logits_n
    k = tl.arange(0, KP)[None, :]
    m_k = (n < N) & (k < K)
    b_chosen = tl.load(indices + n_64 * K + k, mask=m_k, other=-1)
    b_logits = tl.load(p_logits + b_chosen, mask=m_k, other=0.0)
    b_ds = tl.load(dweights + n_64 * dweights_n + k, mask=m_k, other=0.0).to(tl.float32)
    b_high, b_sum = 0.0, 1.0
    if SOFTMAX:
        e = tl.arange(0, EP)[None, :]
        b_all = tl.load(p_logits + e, mask=(n < N) & (e < E), other=0.0)
        b_high, b_sum = _highest_and_sum(b_all, e < E)
    b_s = tl.where(k < K, _score(b_logits, b_high, b_sum, SOFTMAX), 0.0)
    if norm_topk_prob:
        b_total = tl.sum(b_s, 1, keep_dims=True) + 1e-20  # [BN, 1]
        b_ds = tl.div_rn(b_ds - tl.div_rn(tl.sum(b_ds * b_s, 1, keep_dims=True), b_total), b_total)
    b_part = scaling * b_ds * b_s
    b_others = tl.zeros([BN, EP], tl.float32)
    if SOFTMAX:
        b_dot = tl.sum(b_part, 1, keep_dims=True)
        b_others -= b_dot * _score(b_all, b_high, b_sum, SOFTMAX)
        b_part -= b_dot * b_s
    else:
        b_part *= 1.0 - b_s
    return b_others, b_chosen, b_part


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def backward_kernel(
    dweights, logits, indices, dlogits, scaling, dweights_n, logits_n, N,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, norm_topk_prob: tl.constexpr, SOFTMAX: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """dlogits [N, E] of one tile of tokens."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)[:, None]  # [BN, 1]
    e, k = tl.arange(0, EP)[None, :], tl.arange(0, KP)[None, :]
    b_others, b_chosen, b_dlogits = _gradient(
        dweights, logits, indices, scaling, dweights_n, logits_n, n, N, E, EP, K, KP, norm_topk_prob, SOFTMAX, BN
    )
    p_dlogits = dlogits + n.to(tl.int64) * E
    tl.store(p_dlogits + e, b_others.to(dlogits.dtype.element_ty), mask=(n < N) & (e < E))
    tl.debug_barrier()  # other threads write those of the chosen
    tl.store(p_dlogits + b_chosen, b_dlogits.to(dlogits.dtype.element_ty), mask=(n < N) & (k < K))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def tokens_backward_kernel(
    dweights, x, w, logits, indices, dx, parts, scaling, dweights_n, x_n, logits_n, N, STEPS,
    D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    norm_topk_prob: tl.constexpr, SOFTMAX: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BD columns of dx [N, D] for STEPS tiles of tokens, and their part of the gradient of w: one of parts [P, E, D]."""
    share, block = tl.program_id(0) // tl.cdiv(D, BD), tl.program_id(0) % tl.cdiv(D, BD)
    d = (block * BD + tl.arange(0, BD))[None, :]
    e = tl.arange(0, EP)[:, None]
    m_w, p_w = (e < E) & (d < D), e * D + d
    b_w = tl.load(w + p_w, mask=m_w, other=0.0)  # [EP, BD]
    b_dw = tl.zeros([EP, BD], tl.float32)
    for step in range(STEPS):
        n = (share * STEPS + step) * BN + tl.arange(0, BN)[:, None]  # [BN, 1]
        m_x, n_64 = (n < N) & (d < D), n.to(tl.int64)
        b_x = tl.load(x + n_64 * x_n + d, mask=m_x, other=0.0)  # [BN, BD]
        b_others, b_chosen, b_dlogits = _gradient(
            dweights, logits, indices, scaling, dweights_n, logits_n, n, N, E, EP, K, KP, norm_topk_prob, SOFTMAX, BN
        )
        m_chosen = b_chosen[:, :, None] == tl.arange(0, EP)[None, None, :]  # [BN, KP, EP]
        b_dlogits = tl.sum(tl.where(m_chosen, b_dlogits[:, :, None], 0.0), 1)
        b_dlogits = tl.where(tl.max(m_chosen.to(tl.int32), 1) > 0, b_dlogits, b_others).to(x.dtype.element_ty)
        b_dx = tl.dot(b_dlogits, b_w, input_precision="ieee")
        tl.store(dx + n_64 * D + d, b_dx.to(dx.dtype.element_ty), mask=m_x)
        b_dw = tl.dot(tl.trans(b_dlogits), b_x, b_dw, input_precision="ieee")
    tl.store(parts + tl.cast(share, tl.int64) * (E * D) + p_w, b_dw, mask=m_w)


@triton.jit
def _load_bins(indices, slot, m_slot, E):
    """The experts of slots, as int32; E for an index that names none and outside of m_slot."""
    b_e = tl.load(indices + slot, mask=m_slot, other=-1)
    return tl.where(b_e.to(tl.uint64, bitcast=True) < E, b_e, E).to(tl.int32)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def histogram_kernel(indices, parts, SLOTS, E, EP: tl.constexpr, BS: tl.constexpr):
    """Slots of each bin in one tile: a row of parts [B, EP]."""
    tile = tl.program_id(0)
    slot = tile * BS + tl.arange(0, BS)
    b_e = _load_bins(indices, slot, slot < SLOTS, E)
    tl.store(parts + tile.to(tl.int64) * EP + tl.arange(0, EP), tl.histogram(b_e, EP))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def scan_kernel(
    parts, before, B, BINS: tl.constexpr, EP: tl.constexpr, TILES: tl.constexpr, BB: tl.constexpr, BE: tl.constexpr
):
    """For BE bins before [B / TILES + 1, EP], the sums of the rows of parts [B, BINS] before each block, and of all of them."""
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    b, t = tl.arange(0, BB)[:, None, None], tl.arange(0, TILES)[None, :, None]
    b_before = tl.zeros([1, BE], tl.int32)
    blocks = tl.cdiv(B, TILES)
    for start in range(0, blocks, BB):
        tile = ((start + b) * TILES + t).to(tl.int64)
        b_parts = tl.load(parts + tile * BINS + e[None, None, :], mask=(tile < B) & (e < BINS)[None, None, :], other=0)
        b_part = tl.sum(b_parts.to(tl.int32), 1)  # [BB, BE]
        b_sum = b_before + tl.cumsum(b_part, 0) - b_part
        block = start + tl.arange(0, BB)[:, None]
        tl.store(before + block.to(tl.int64) * EP + e[None, :], b_sum, mask=block < blocks)
        b_before += tl.sum(b_part, 0, keep_dims=True)
    tl.store(before + blocks.to(tl.int64) * EP + e[None, :], b_before)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def scatter_kernel(
    indices, parts, before, order, offsets, counts, SLOTS, B, E, BINS: tl.constexpr, EP: tl.constexpr, TILES: tl.constexpr,
    PER: tl.constexpr, BS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The slots of one block to their places in order, and from the first block offsets [E + 1] and counts [E] int64 (None: not).

    What stands before a block comes from `before`, what scan_kernel left; where that is None from parts [B <= ROWS, BINS], the
    counts of all tiles; where that is None too there is but this block.
    """
    block = tl.program_id(0)
    bins, i = tl.arange(0, EP), tl.arange(0, TILES * BS)
    slot = (block * TILES + i // BS) * PER + i % BS
    m_slot = (i % BS < PER) & (slot < SLOTS)
    b_e = _load_bins(indices, slot, m_slot, E)  # [TILES BS]
    if before is not None:
        b_total = tl.load(before + tl.num_programs(0).to(tl.int64) * EP + bins)
        b_before = tl.load(before + block.to(tl.int64) * EP + bins)
    elif parts is not None:
        tile = tl.arange(0, ROWS)[:, None]
        m_parts = (tile < B) & (bins[None, :] < BINS)
        b_parts = tl.load(parts + tile * BINS + bins[None, :], mask=m_parts, other=0).to(tl.int32)
        b_total = tl.sum(b_parts, 0)
        b_before = tl.sum(tl.where(tile < block * TILES, b_parts, 0), 0)
    else:
        b_total = tl.histogram(b_e, EP)
        b_before = tl.zeros([EP], tl.int32)
    b_end = tl.cumsum(b_total, 0)  # [EP]
    if block == 0:
        tl.store(offsets, 0)
        tl.store(offsets + 1 + bins, b_end, mask=bins < E)
        if counts is not None:
            tl.store(counts + bins, b_total.to(tl.int64), mask=bins < E)

    # A slot's rank among those of its bin in the tile, as many as stand before it: with one number c for (bin, i) these
    # are the c' for which c' - (bin, 0) lies in 0 .. i - 1, one unsigned comparison.
    j, b_bin = tl.arange(0, BS), tl.reshape(b_e, [TILES, BS])
    b_ahead = (b_bin * BS + j[None, :])[:, :, None] - (b_bin * BS)[:, None, :]  # [TILES, BS, BS]
    b_rank = tl.sum((b_ahead.to(tl.uint32, bitcast=True) < j.to(tl.uint32)[None, None, :]).to(tl.int32), 1)
    b_rank = tl.reshape(b_rank, [TILES * BS])
    if TILES > 1:  # and those of the block's tiles before it
        t = tl.arange(0, TILES)[None, :]
        p_parts = parts + (block * TILES + t).to(tl.int64) * BINS + b_e[:, None]
        b_rank += tl.sum(tl.load(p_parts, mask=m_slot[:, None] & (t < i[:, None] // BS), other=0).to(tl.int32), 1)
    b_first = tl.gather(b_end - b_total + b_before, tl.minimum(b_e, EP - 1), 0)
    tl.store(order + b_first + b_rank, slot, mask=m_slot)


def forward(
    logits, bias, top_k, n_group, topk_group, norm_topk_prob, scaling, scoring_func
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logits [N, E], bias [E] float32 -> weights, indices, counts, order and offsets, as dsfast.ops.moe_route.Routing.

    A NaN counts as the largest value, so a broken router shows in the weights; the indices lie in 0..E-1 whatever the logits.
    """
    choice = top_k, n_group, topk_group, norm_topk_prob, scaling, scoring_func
    return _forward(logits, None, bias, logits.dtype, *choice)


def forward_tokens(
    x, weight, bias, top_k, n_group, topk_group, norm_topk_prob, scaling, scoring_func
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [N, D], weight [E, D], bias [E] float32 -> what `forward` returns, weights in the dtype of x, and logits [N, E]."""
    few = _places(weight.size(0), n_group) <= FEW
    logits = x.new_empty(len(x), len(weight), dtype=torch.float32) if few else _float32_product(x, weight)
    tokens = (x, weight) if few else None
    choice = top_k, n_group, topk_group, norm_topk_prob, scaling, scoring_func
    return *_forward(logits, tokens, bias, x.dtype, *choice), logits


def _forward(logits, tokens, bias, dtype, top_k, *choice) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = _outputs(logits, top_k, dtype)
    with torch.cuda.device_of(logits):
        aside((forward_launches(logits, bias, top_k, *choice, *outputs, tokens), (logits, *outputs)), urgent=True)
    return outputs


def _outputs(logits: Tensor, top_k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, e = logits.shape
    weights, indices = logits.new_empty(n, top_k, dtype=dtype), logits.new_empty(n, top_k, dtype=torch.int64)
    return weights, indices, logits.new_empty(e, dtype=torch.int64), *_sorted(indices, e)


def _sorted(indices: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """What order and offsets are to be written to."""
    return indices.new_empty(indices.numel(), dtype=torch.int32), indices.new_empty(experts + 1, dtype=torch.int32)


def _float32_product(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T. Products of two 16-bit numbers are exact in float32, in which the matrix units add them up."""
    if x.is_cuda and x.dtype.itemsize == 2:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return x.float() @ weight.float().T


def backward(dweights, logits, indices, norm_topk_prob, scaling, scoring_func) -> Tensor:
    """The gradient of the logits [N, E] from that of the weights [N, K]."""
    dlogits = logits.new_empty(logits.shape)
    with torch.cuda.device_of(logits):
        backward_launch(dweights, logits, indices, norm_topk_prob, scaling, scoring_func, dlogits).run()
    return dlogits


def backward_tokens(
    dweights, x, weight, logits, indices, n_group, norm_topk_prob, scaling, scoring_func
) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight from that of the weights [N, K]. Deterministic.

    That of the logits is rounded to x's dtype.
    """
    few = _places(weight.size(0), n_group) <= FEW
    with torch.cuda.device_of(x):
        if not few:
            dlogits = logits.new_empty(logits.shape, dtype=x.dtype)
            backward_launch(dweights, logits, indices, norm_topk_prob, scaling, scoring_func, dlogits).run()
            return dlogits @ weight, dlogits.T @ x
        dx, dweight = x.new_empty(x.shape), weight.new_empty(weight.shape)
        backward, add = tokens_backward_launches(
            dweights, x, weight, logits, indices, norm_topk_prob, scaling, scoring_func, dx, dweight
        )
        backward.run()
        aside(([add], [dweight]))
    return dx, dweight


def _tile(places: int, together: int) -> int:
    """Tokens in a tile of at most `together` places. Not tuned on a GPU. No more than 64: a count is one byte."""
    return max(1, min(64, together // places))


def _places(experts: int, n_group: int) -> int:
    return triton.next_power_of_2(n_group) * triton.next_power_of_2(experts // n_group)


def forward_launches(
    logits,
    bias,
    top_k,
    n_group,
    topk_group,
    norm_topk_prob,
    scaling,
    scoring_func,
    weights,
    indices,
    counts,
    order,
    offsets,
    tokens=None,
) -> list[Launch]:
    """The choice, and what sorts the slots; tensors may lie on the meta device.

    tokens: x and the router's matrix, for up to FEW places: the first kernel then makes the logits too.
    """
    (logits,) = rows(logits)
    n, e = logits.shape
    size = e // n_group
    gp, sp = triton.next_power_of_2(n_group), triton.next_power_of_2(size)
    # One warp, so that no search along a token crosses warps: each would cost a barrier. The tokens' searches overlap.
    bn = _tile(gp * sp, 1024)
    itemsize, product_rows, source = 4, 0, {"x": None, "w": None, "x_n": 0, "D": 0, "BK": 0}
    if tokens is not None:
        (x,), w = rows(tokens[0]), tokens[1].contiguous()
        gp, bn = FEW // sp, 16
        itemsize, product_rows, d = x.itemsize, bn, x.size(1)
        source = {"x": x, "w": w, "x_n": x.stride(0), "D": d, "BK": min(padded(d), 256 // itemsize)}
    blocks = triton.cdiv(n, bn)
    parts = logits.new_empty(blocks, e, dtype=torch.int8)
    arguments = source | {
        "logits": logits, "bias": bias.contiguous(), "weights": weights, "indices": indices, "parts": parts,
        "scaling": float(scaling), "logits_n": logits.stride(0), "N": n, "G": n_group, "S": size, "GP": gp, "SP": sp,
        "K": top_k, "KP": triton.next_power_of_2(top_k), "T": topk_group, "TP": triton.next_power_of_2(topk_group),
        "EP": max(32, triton.next_power_of_2(e)), "norm_topk_prob": bool(norm_topk_prob), "SOFTMAX": scoring_func == "softmax",
        "BN": bn,
    }  # fmt: skip
    choose = Launch(forward_kernel, (blocks,), arguments, options(1), itemsize, product_rows)
    if bn * top_k > SORTED:  # too many slots in a tile for one program to sort
        return [choose, *sort_launches(indices, e, order, offsets, counts)]
    return [choose, *_place_launches(indices, parts, bn * top_k, order, offsets, counts)]


def backward_launch(dweights, logits, indices, norm_topk_prob, scaling, scoring_func, dlogits) -> Launch:
    """The launch that fills dlogits; tensors may lie on the meta device."""
    dweights, logits = rows(dweights, logits)
    (n, e), top_k = logits.shape, indices.size(1)
    ep = triton.next_power_of_2(e)
    bn = _tile(ep, 4096)
    arguments = {
        "dweights": dweights, "logits": logits, "indices": indices.contiguous(), "dlogits": dlogits,
        "scaling": float(scaling), "dweights_n": dweights.stride(0), "logits_n": logits.stride(0), "N": n, "E": e,
        "EP": ep, "K": top_k, "KP": triton.next_power_of_2(top_k), "norm_topk_prob": bool(norm_topk_prob),
        "SOFTMAX": scoring_func == "softmax", "BN": bn,
    }  # fmt: skip
    return Launch(backward_kernel, (triton.cdiv(n, bn),), arguments, options(4), 4, 0)


def tokens_backward_launches(
    dweights, x, weight, logits, indices, norm_topk_prob, scaling, scoring_func, dx, dweight
) -> list[Launch]:
    """The kernel that fills dx, and parts of dweight, and the one that adds these up; tensors may lie on the meta device."""
    dweights, x, weight = *rows(dweights, x), weight.contiguous()
    (n, d), (e, top_k) = x.shape, (weight.size(0), indices.size(1))
    kp = triton.next_power_of_2(top_k)
    widest = 64 if x.itemsize == 2 else 32
    bn, bd = min(widest, max(16, 128 // kp)), min(widest, padded(d))  # bn KP FEW: 16 numbers for a thread, up to KP = 8
    blocks = triton.cdiv(d, bd)
    shares, steps = splits(blocks, triton.cdiv(n, bn))
    parts = x.new_empty(shares, e, d, dtype=torch.float32)
    arguments = {
        "dweights": dweights, "x": x, "w": weight, "logits": logits, "indices": indices, "dx": dx, "parts": parts,
        "scaling": float(scaling), "dweights_n": dweights.stride(0), "x_n": x.stride(0), "logits_n": logits.stride(0),
        "N": n, "STEPS": steps, "D": d, "BD": bd, "E": e, "EP": FEW, "K": top_k, "KP": kp,
        "norm_topk_prob": bool(norm_topk_prob), "SOFTMAX": scoring_func == "softmax", "BN": bn,
    }  # fmt: skip
    return [
        Launch(tokens_backward_kernel, (shares * blocks,), arguments, options(4), x.itemsize, bn),
        sum_launch(parts, dweight),
    ]


def sort_slots(indices: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """indices [N, K] int64 -> order and offsets, as `forward`. Slots whose index lies outside 0..E-1 come last, from
    order[offsets[E]] on.
    """
    order, offsets = _sorted(indices, experts)
    with torch.cuda.device_of(indices):
        for launch in sort_launches(indices, experts, order, offsets):
            launch.run()
    return order, offsets


def sort_launches(indices: Tensor, experts: int, order: Tensor, offsets: Tensor, counts=None) -> list[Launch]:
    """The launches that fill order, offsets and, if not None, counts; tensors may lie on the meta device."""
    indices = indices.contiguous()
    tiles, bins = triton.cdiv(indices.numel(), SORTED), _bins(experts)
    if tiles <= 1:
        return _place_launches(indices, None, SORTED, order, offsets, counts)
    parts = order.new_empty(tiles, bins)
    counting = {"indices": indices, "parts": parts, "SLOTS": indices.numel(), "E": experts, "EP": bins, "BS": SORTED}
    histogram = Launch(histogram_kernel, (tiles,), counting, options(4), 4, 0)
    return [histogram, *_place_launches(indices, parts, SORTED, order, offsets, counts)]


def _bins(experts: int) -> int:
    """Bins for indices from elsewhere: the last one is for those that name no expert."""
    return max(32, triton.next_power_of_2(experts + 1))


def _place_launches(indices, parts, slots: int, order, offsets, counts) -> list[Launch]:
    """The launches that make of the tiles' counts, parts [B, bins], the places of all slots; None, or no tiles: there is one
    block, still to be counted. Where the counts are many their sums are taken by a kernel before.
    """
    experts = offsets.numel() - 1
    if parts is not None and not len(parts):
        parts, slots = None, SORTED
    tiles, bins = (1, _bins(experts)) if parts is None else parts.shape
    bs = triton.next_power_of_2(slots)
    together = min(MOST_TILES, SORTED // bs)
    blocks = triton.cdiv(tiles, together)
    ep = triton.next_power_of_2(bins)
    be = min(2, ep)
    few = parts is None or triton.next_power_of_2(tiles) * ep <= SUMMED
    before = None if few else order.new_empty(blocks + 1, ep)
    arguments = {
        "indices": indices, "parts": parts, "before": before, "order": order, "offsets": offsets, "counts": counts,
        "SLOTS": indices.numel(), "B": tiles, "E": experts, "BINS": bins, "EP": ep, "TILES": together,
        "PER": slots, "BS": bs,
        "ROWS": max(FEW_TILES, triton.next_power_of_2(tiles)), "BB": SCANNED // together, "BE": be,
    }  # fmt: skip
    scatter = Launch(scatter_kernel, (blocks,), arguments, options(4), 4, 0)
    return [scatter] if few else [Launch(scan_kernel, (ep // be,), arguments, options(8), 4, 0), scatter]


EXAMPLES = {
    "500K": (8192, 2, 1, 1, 1, False, "sigmoid"),
    "DeepSeek-V3": (8192, 256, 8, 8, 4, True, "sigmoid"),
    "DeepSeek-V2": (8192, 160, 6, 8, 3, False, "softmax"),
    "Qwen-like": (32768, 128, 8, 1, 1, True, "softmax"),
    "uneven groups": (1000, 60, 6, 5, 3, True, "sigmoid"),
    "few tokens": (16, 256, 8, 8, 4, True, "sigmoid"),
    "few experts": (4096, 12, 4, 3, 2, True, "sigmoid"),
    "few experts, softmax": (4096, 8, 2, 1, 1, True, "softmax"),
    "half of few experts": (4096, 16, 8, 1, 1, True, "softmax"),
    "all of few experts": (4096, 16, 16, 1, 1, True, "sigmoid"),
}
"""N, E, K, groups, groups taken, whether the weights are normalised and how scores are made, that are compiled ahead."""
OF_TOKENS = {
    "500K": 128, "few experts": 7168, "few experts, softmax": 4096, "half of few experts": 1024, "all of few experts": 1024,
}  # fmt: skip
"""The width of x in those compiled from the tokens on as well."""


def example_launches(size: str, dtype: torch.dtype, large: int) -> dict[str, Launch]:
    """Kernel -> launch at EXAMPLES[size], on the meta device. One set of tiles whatever `large`; `dtype` is that of x alone."""
    empty = on_meta(torch.float32)
    n, e, k, *groups, norm_topk_prob, scoring_func = EXAMPLES[size]
    choice = *groups, norm_topk_prob, 2.5, scoring_func
    logits = empty(n, e)
    weights, indices, *others = _outputs(logits, k, torch.float32)
    launches = [
        *forward_launches(logits, empty(e), k, *choice, weights, indices, *others),
        backward_launch(weights, logits, indices, *choice[2:], empty(n, e)),
    ]
    found = {launch.kernel.__name__: launch for launch in launches}
    found |= {f"{x.kernel.__name__}, of indices": x for x in sort_launches(indices, e, *others[1:])}
    if size in OF_TOKENS:
        x, w, weights = (empty(*shape, dtype=dtype) for shape in ((n, OF_TOKENS[size]), (e, OF_TOKENS[size]), (n, k)))
        first = forward_launches(logits, empty(e), k, *choice, weights, indices, *others, (x, w))[0]
        launches = tokens_backward_launches(weights, x, w, logits, indices, *choice[2:], x, w)
        found |= {"forward_kernel, from tokens": first} | {launch.kernel.__name__: launch for launch in launches}
    return found
