"""Triton kernels of dsfast.ops.linear_cross_entropy, whose module has the maths.

N tokens, R width of the head's input, V vocabulary; RP: R rounded up to a power of two; z logits; BT tokens, BV words in a tile.
D, DP: width of the model, and padded.

Two ways, by R and dtype alone:

- Narrow heads (R <= NARROW), the factorised one among them: the products are small beside the exponentials, so that logits are
  made again rather than stored. With P the softmax, dhidden = (P weight - weight[label]) / count has the form of attention
  over the words (arXiv 2205.14135): one sweep of online softmax gives loss and dhidden together. The gradient of the weight
  is the mirror image, a tile of words over all tokens, from the maximum and the sum of each token. Two exponentials for each
  logit in all. Both sweeps are split over programs until these fill a chip. The parts are added up by the next kernel, always
  in the same order. The second sweep is made in the backward pass, and aside: nothing there waits for a weight's gradient. Where
  the head has a projection, to R from the model's width D, each program of the first sweep makes its tokens' input itself, and
  dhidden goes through it in the kernel that multiplies it by dloss.
- Wide heads, DeepSeek-V3's among them: making logits again would cost a third more. The three products are cuBLAS's. Logits
  of up to WORKSPACE bytes are kept for the backward pass, and one kernel turns them into their gradient, times dloss. More
  tokens are taken in chunks of that size, whose gradients are made at once, the logits' in place; dloss follows. Beside the
  chunk there is, for 16-bit inputs, a float32 sum [V, R] of the chunks' parts of dweight.

Logits are taken in units of log 2: exp2 of one multiply-add is half the instructions of exp. Of each token's softmax the second
sweep gets the maximum m, or m = 0 (`pieces.nothing`), and a factor, (1 + 2 z_loss logsumexp) / sum of exp2(z - m), apart:
rounding m + log2 sum would show in float32 at large logits. In 16 bits it does not, and where there is no z-loss either (FOLDED)
they are one number, m + log2 sum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from dsfast.triton_kernels.launch import Launch, aside, large_tiles, on_meta, padded, rows
from dsfast.triton_kernels.limits import MULTIPROCESSORS
from dsfast.triton_kernels.narrow import outer_launches
from dsfast.triton_kernels.pieces import (
    LN2,
    LOG2E,
    UNSEEN,
    fits,
    load_tile,
    nothing,
    opaque,
    options,
    splits,
    store_rows,
    sum_launch,
    takes_raw,
)
from torch import Tensor

# Widest R of the first way, by bytes of an element: about there the work of more products and that of stored logits are equal.
# Products of full float32 precision hold both operands in registers, and wider ones no longer fit.
NARROW = {2: 256, 4: 128}
WORKSPACE = 2**30  # bytes of a chunk of logits in the second way
IGNORED = tl.constexpr(-1)  # in place of a word: a token that does not count
OUTSIDE = tl.constexpr(-2)  # in place of a word: a label that is none
COUNTED = tl.constexpr(256)  # tiles of tokens in a step of combine_kernel
# Programs that dweight_kernel's tiles are split into where they are fewer: half of a chip where R is small, the other half is for
# what runs beside it.
ASIDE = 2 * MULTIPROCESSORS
_UNSPECIALIZED = ("N", "S", "STEPS", "TILES", "ignore_index")
_ALIGNMENT = 16  # elements that rows of logits are padded to: cuBLAS and vector loads want them aligned
_STRIP = 1024  # words of dweight whose float32 product is to stay in the L2 cache until it is added


@triton.jit
def _words(labels, i, N, V, ignore_index):
    """The words that tokens i are to be, IGNORED or OUTSIDE; IGNORED from token N on."""
    label = tl.load(labels + i, mask=i < N, other=0)
    word = tl.where((label >= 0) & (label < V), label, OUTSIDE).to(tl.int32)
    return tl.where((label == ignore_index) | (i >= N), IGNORED, word)


@triton.jit
def _of_token(m, l, z_label, word, z_loss):
    """(loss, factor of exp2(z - m) in the gradient) of tokens: 0 where IGNORED, NaN where OUTSIDE. m is in units of log 2.

    Where the softmax is NaN so is the factor, of IGNORED tokens too: eager's gradient has it so.
    """
    log_l = tl.log2(l)
    lse = (m + log_l) * LN2
    loss = (log_l - tl.fma(z_label, LOG2E, -m)) * LN2 + z_loss * lse * lse
    factor = (1 + 2 * z_loss * lse) / l
    loss = tl.where(word >= 0, loss, tl.where(word == IGNORED, 0.0, float("nan")))
    return loss, tl.where(word >= 0, factor, tl.where(word == IGNORED, 0 * factor, float("nan")))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def count_kernel(labels, count, N, ignore_index, BLOCK: tl.constexpr):
    """count [1], float32: the tokens that count, at least 1. One program."""
    b_count = tl.zeros([BLOCK], tl.int32)
    for k in range(tl.cdiv(N, BLOCK)):
        i = k * BLOCK + tl.arange(0, BLOCK)
        b_count += (tl.load(labels + i, mask=i < N, other=ignore_index) != ignore_index).to(tl.int32)
    tl.store(count, tl.maximum(tl.sum(b_count, 0), 1).to(tl.float32))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def loss_kernel(losses, count, loss, N, BLOCK: tl.constexpr):
    """loss, a scalar: the sum of losses [N] over count. One program."""
    b_loss = tl.zeros([BLOCK], tl.float32)
    for k in range(tl.cdiv(N, BLOCK)):
        i = k * BLOCK + tl.arange(0, BLOCK)
        b_loss += tl.load(losses + i, mask=i < N, other=0.0)
    tl.store(loss, tl.sum(b_loss, 0) / tl.load(count))


@triton.jit
def scale_kernel(x, dloss, y, SIZE, BLOCK: tl.constexpr):
    """y [SIZE] = x dloss, in float32."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(x + i, mask=i < SIZE, other=0.0).to(tl.float32)
    tl.store(y + i, (b_x * tl.load(dloss)).to(y.dtype.element_ty), mask=i < SIZE)


@triton.jit(do_not_specialize=["N"])
def project_kernel(
    x, dloss, projection, y, dhidden, N,
    R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """y [N, R] = x dloss, rounded, and dhidden [N, D] = y projection, for one tile of tokens."""
    t = tl.program_id(0) * BT
    b_y = (load_tile(x, R, t, 0, N, R, BT, RP, True) * tl.load(dloss)).to(y.dtype.element_ty)  # [BT, RP]
    b_p = load_tile(projection, D, 0, 0, R, D, RP, DP, True)  # [RP, DP]
    store_rows(y, R, t, N, b_y, BT, R, RP)
    store_rows(dhidden, D, t, N, tl.dot(b_y, b_p, input_precision="ieee"), BT, D, DP)


@triton.jit
def _take_in(
    b_o, b_m, b_l, b_h, weight, weight_v, v, V,
    R: tl.constexpr, RP: tl.constexpr, BV: tl.constexpr, GRADS: tl.constexpr, RAW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of words, from v on, in the softmax of a tile of tokens [BT]: m, which is 0 where RAW and else the maximum so
    far, the sum of exp2(z - m), b_l [BT], and b_o [BT, RP], that of exp2(z - m) weight."""
    b_w = load_tile(weight, weight_v, v, 0, V, R, BV, RP, MASKED)  # [BV, RP]
    b_z = tl.dot(b_h, tl.trans(b_w), input_precision="ieee")  # [BT, BV]
    if MASKED:
        b_z = tl.where(v + tl.arange(0, BV)[None, :] < V, b_z, float("-inf"))
    if not RAW:
        b_m_new = tl.maximum(b_m, tl.max(b_z, 1) * LOG2E)
        decay = tl.exp2(b_m - b_m_new)
        b_m, b_o, b_l = b_m_new, b_o * decay[:, None], b_l * decay
    b_p = tl.exp2(b_z * LOG2E - b_m[:, None])
    if GRADS:
        b_o = tl.dot(b_p.to(b_w.dtype), b_w, b_o, input_precision="ieee")
    return b_o, b_m, b_l + tl.sum(b_p, 1)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def forward_kernel(
    x, projection, hidden, weight, labels, softmax_parts, o_parts, counts, x_n, hidden_n, weight_v, N, V, S, STEPS, ignore_index,
    R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, UNIT: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
    GRADS: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """softmax_parts [2, S, N] (m, sum of exp2(z - m)) and o_parts [S, N, R] for one tile of tokens and one of S shares of the
    words, STEPS tiles of them; from the first share, how many of the tile's tokens count: one of counts [TILES], float32. Where
    there is a projection [R, D], hidden [N, R] is made too, x [N, D] projection^T."""
    t, s = tl.program_id(0) * BT, tl.program_id(1)
    hidden_n, weight_v = hidden_n * UNIT, weight_v * UNIT
    i = t + tl.arange(0, BT)  # [BT]
    if projection is None:
        b_h = load_tile(hidden, hidden_n, t, 0, N, R, BT, RP, True)  # [BT, RP]
    else:
        b_x = load_tile(x, x_n, t, 0, N, D, BT, DP, True)  # [BT, DP]
        b_projection = load_tile(projection, D, 0, 0, R, D, RP, DP, True)  # [RP, DP]
        b_h = tl.dot(b_x, tl.trans(b_projection), input_precision="ieee").to(hidden.dtype.element_ty)  # [BT, RP]
        if s == 0:
            store_rows(hidden, hidden_n, t, N, b_h, BT, R, RP)
    begin, end = s * STEPS, tl.minimum((s + 1) * STEPS, tl.cdiv(V, BV))
    whole = tl.minimum(end, V // BV)
    b_o, b_m, b_l = nothing(BT, RP, RAW)
    for tile in range(begin, whole):
        b_o, b_m, b_l = _take_in(b_o, b_m, b_l, b_h, weight, weight_v, tile * BV, V, R, RP, BV, GRADS, RAW, False)
    if whole < end:  # the last tile of words is cut off
        b_o, b_m, b_l = _take_in(b_o, b_m, b_l, b_h, weight, weight_v, whole * BV, V, R, RP, BV, GRADS, RAW, True)
    if RAW:  # noqa: SIM102 (known when it is compiled)
        if not fits(b_l):
            b_o, b_m, b_l = nothing(BT, RP, False)
            for tile in range(opaque(begin), end):
                b_o, b_m, b_l = _take_in(
                    b_o, b_m, b_l, b_h, weight, weight_v, tile * BV, V, R, RP, BV, GRADS, False, True
                )

    if s == 0:
        b_counts = tl.load(labels + i, mask=i < N, other=ignore_index) != ignore_index
        tl.store(counts + tl.program_id(0), tl.sum(b_counts.to(tl.int32), 0).to(tl.float32))
    part = tl.cast(s, tl.int64) * N
    every = tl.cast(S, tl.int64) * N
    p_softmax = softmax_parts + part + i
    tl.store(p_softmax, b_m, mask=i < N)
    tl.store(p_softmax + every, b_l, mask=i < N)
    if GRADS:
        store_rows(o_parts + part * R, R, t, N, b_o, BT, R, RP)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def combine_kernel(
    softmax_parts, o_parts, hidden, weight, labels, counts, count, losses, softmax, dhidden, z_loss, hidden_n, weight_v,
    N, V, S, TILES, ignore_index, R: tl.constexpr, RP: tl.constexpr, UNIT: tl.constexpr, BT: tl.constexpr, GRADS: tl.constexpr,
    FOLDED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """losses [N], and where GRADS softmax [4, N] (m and factor, where FOLDED m stands for both; the bits of the word; count) and
    dhidden [N, R], from the shares, for one tile of tokens; and from the first program count [1], as count_kernel's.

    The label's row of the weight is subtracted last: where it is infinite the result is NaN and eager's may be infinite.
    """
    i = tl.program_id(0) * BT + tl.arange(0, BT)  # [BT]
    hidden_n, weight_v = hidden_n * UNIT, weight_v * UNIT
    b_word = _words(labels, i, N, V, ignore_index)
    every = tl.cast(S, tl.int64) * N
    b_m = tl.full([BT], UNSEEN, tl.float32)
    b_l = tl.zeros([BT], tl.float32)
    b_o = tl.zeros([BT, RP], tl.float32)
    row, d = i.to(tl.int64)[:, None], tl.arange(0, RP)[None, :]
    m_o = (row < N) & (d < R)
    for s in tl.range(0, S, num_stages=STAGES):
        part = tl.cast(s, tl.int64) * N
        p_softmax = softmax_parts + part + i
        b_m_part = tl.load(p_softmax, mask=i < N, other=0.0)
        b_m_new = tl.maximum(b_m, b_m_part)
        before, now = tl.exp2(b_m - b_m_new), tl.exp2(b_m_part - b_m_new)
        b_l = b_l * before + tl.load(p_softmax + every, mask=i < N, other=1.0) * now
        if GRADS:
            b_o_part = tl.load(o_parts + (part + row) * R + d, mask=m_o, other=0.0)  # [BT, RP]
            b_o = b_o * before[:, None] + b_o_part * now[:, None]
        b_m = b_m_new
    p_w = weight + tl.maximum(b_word, 0).to(tl.int64)[:, None] * weight_v + d
    b_w = tl.load(p_w, mask=(b_word[:, None] >= 0) & (d < R), other=0.0).to(tl.float32)  # [BT, RP]
    b_h = tl.load(hidden + row * hidden_n + d, mask=m_o, other=0.0).to(tl.float32)
    b_loss, b_factor = _of_token(b_m, b_l, tl.sum(b_h * b_w, 1), b_word, z_loss)
    tl.store(losses + i, b_loss, mask=i < N)
    b_counts = tl.zeros([COUNTED], tl.float32)
    for k in range(0, TILES, COUNTED):
        tile = k + tl.arange(0, COUNTED)
        b_counts += tl.load(counts + tile, mask=tile < TILES, other=0.0)
    number = tl.maximum(tl.sum(b_counts, 0), 1)
    if tl.program_id(0) == 0:
        tl.store(count, number)
    if GRADS:
        if FOLDED:  # factor 0 is exp2(-inf); NaN stays
            b_m = tl.where(b_factor > 0, b_m + tl.log2(b_l), tl.where(b_factor == 0, float("inf"), float("nan")))
        p_softmax = softmax + i
        tl.store(p_softmax, b_m, mask=i < N)
        tl.store(p_softmax + N, b_factor, mask=i < N)
        tl.store(p_softmax + 2 * N, b_word.to(tl.float32, bitcast=True), mask=i < N)
        tl.store(p_softmax + 3 * N, tl.full([BT], 0.0, tl.float32) + number, mask=i < N)
        b_dh = (b_o * b_factor[:, None] - b_w) / number
        tl.store(dhidden + row * R + d, b_dh.to(dhidden.dtype.element_ty), mask=m_o)


@triton.jit
def _add_tokens(
    b_dw, b_w, word, hidden, softmax, hidden_n, t, N,
    R: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr, FOLDED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """b_dw [BV, RP] and one tile of tokens more, from t on."""
    i = t + tl.arange(0, BT)  # [BT]
    mask = i < N if MASKED else None
    b_h = load_tile(hidden, hidden_n, t, 0, N, R, BT, RP, MASKED)  # [BT, RP]
    b_m = tl.load(softmax + i, mask=mask)
    b_word = tl.load(softmax + 2 * N + i, mask=mask).to(tl.int32, bitcast=True)
    b_z = tl.dot(b_w, tl.trans(b_h), input_precision="ieee")  # [BV, BT]
    b_g = tl.exp2(b_z * LOG2E - b_m[None, :])
    if not FOLDED:
        b_g *= tl.load(softmax + N + i, mask=mask)[None, :]
    b_g = tl.where(word[:, None] == b_word[None, :], b_g - 1, b_g)
    if MASKED:
        b_g = tl.where(mask[None, :], b_g, 0.0)
    return tl.dot(b_g.to(b_h.dtype), b_h, b_dw, input_precision="ieee")


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def dweight_kernel(
    hidden, weight, softmax, dloss, dweight_parts, hidden_n, weight_v, N, V, STEPS,
    R: tl.constexpr, RP: tl.constexpr, UNIT: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    """dweight_parts [S, V, R], times dloss, for one tile of words and one of S shares of the tokens, STEPS tiles of them."""
    v, s = tl.program_id(0) * BV, tl.program_id(1)
    hidden_n, weight_v = hidden_n * UNIT, weight_v * UNIT
    word = v + tl.arange(0, BV)  # [BV]
    b_w = load_tile(weight, weight_v, v, 0, V, R, BV, RP, True)  # [BV, RP]
    b_dw = tl.zeros([BV, RP], tl.float32)
    end = tl.minimum((s + 1) * STEPS, tl.cdiv(N, BT))
    whole = tl.minimum(end, N // BT)
    for tile in range(s * STEPS, whole):
        b_dw = _add_tokens(b_dw, b_w, word, hidden, softmax, hidden_n, tile * BT, N, R, RP, BT, FOLDED, False)
    if whole < end:  # the last tile of tokens is cut off
        b_dw = _add_tokens(b_dw, b_w, word, hidden, softmax, hidden_n, whole * BT, N, R, RP, BT, FOLDED, True)
    b_dw *= tl.load(dloss) / tl.load(softmax + 3 * N)
    store_rows(dweight_parts + tl.cast(s, tl.int64) * V * R, R, v, V, b_dw, BV, R, RP)


@triton.jit
def _write_gradient(z, g, v, m, factor, word, scale, V):
    """g, the gradient of words v of one token's logits z; g may be z."""
    b_z = tl.load(z + v, mask=v < V, other=0.0).to(tl.float32)
    b_g = tl.exp2(b_z * LOG2E - m) * factor
    b_g = tl.where(v == word, b_g - 1, b_g) * scale
    tl.store(g + v, b_g.to(g.dtype.element_ty), mask=v < V)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def softmax_kernel(
    logits,
    labels,
    count,
    losses,
    softmax,
    z_loss,
    logits_n,
    N,
    V,
    ignore_index,
    BLOCK: tl.constexpr,
    GRADS: tl.constexpr,
):
    """losses of one token; softmax [3, N] (m, factor, 1 / count) if there is one; where GRADS the gradient in place of its
    logits. One maximum a block, one sum at the end."""
    i = tl.program_id(0)
    z = logits + tl.cast(i, tl.int64) * logits_n
    word = _words(labels, i, i + 1, V, ignore_index)
    z_label = tl.load(z + tl.maximum(word, 0)).to(tl.float32)
    m = tl.full([], UNSEEN, tl.float32)
    b_l = tl.zeros([BLOCK], tl.float32)
    for k in range(tl.cdiv(V, BLOCK)):
        v = k * BLOCK + tl.arange(0, BLOCK)
        b_z = tl.load(z + v, mask=v < V, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(b_z, 0) * LOG2E)
        b_l = b_l * tl.exp2(m - m_new) + tl.exp2(b_z * LOG2E - m_new)
        m = m_new
    loss, factor = _of_token(m, tl.sum(b_l, 0), z_label, word, z_loss)
    tl.store(losses + i, loss)
    scale = 1 / tl.load(count)
    if softmax is not None:
        tl.store(softmax + i, m)
        tl.store(softmax + N + i, factor)
        tl.store(softmax + 2 * N + i, scale)
    if GRADS:
        tl.debug_barrier()  # every thread has read its label's logit
        blocks = tl.cdiv(V, BLOCK)
        for k in range(blocks):  # the words last read first: they are still in the L2 cache
            v = (blocks - 1 - k) * BLOCK + tl.arange(0, BLOCK)
            _write_gradient(z, z, v, m, factor, word, scale, V)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def gradient_kernel(logits, labels, softmax, dloss, dlogits, logits_n, N, V, ignore_index, BLOCK: tl.constexpr):
    """dlogits [N, V], with the strides of logits, for one block of words of one token."""
    i, v = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word = _words(labels, i, N, V, ignore_index)
    m, factor, scale = tl.load(softmax + i), tl.load(softmax + N + i), tl.load(softmax + 2 * N + i)
    row = tl.cast(i, tl.int64) * logits_n
    _write_gradient(logits + row, dlogits + row, v, m, factor, word, scale * tl.load(dloss), V)


class Tiles(NamedTuple):
    """`rows` of what a program keeps (forward: tokens, dweight: words) by `columns` of what it goes through."""

    rows: int
    columns: int
    warps: int
    stages: int


# Kernel -> widest RP served -> tiles. Starting values: they keep the limits of tests/test_triton_compile.py and are not
# tuned.
_FLOAT32 = {
    "forward": {16: Tiles(64, 32, 4, 1), 32: Tiles(32, 16, 4, 1), 64: Tiles(32, 32, 8, 1), 128: Tiles(16, 16, 8, 1)},
    "dweight": {32: Tiles(64, 32, 8, 1), 64: Tiles(32, 32, 8, 1), 128: Tiles(16, 16, 8, 1)},
}
# With 8 warps 128 rows: of 64 both warp groups of sm_90 would compute all logits. Narrow ones have 4, and four programs on a
# multiprocessor that do not wait for each other: exponentials of one beside products of another.
_LARGE = {
    "forward": {64: Tiles(64, 64, 4, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(128, 64, 8, 2)},
    "dweight": {64: Tiles(64, 64, 4, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(128, 32, 8, 3)},
}
_SM_100 = {  # its warp groups share rows out as they should
    "forward": {128: Tiles(128, 64, 8, 3), 256: Tiles(64, 64, 8, 2)},
    "dweight": {128: Tiles(128, 64, 8, 3), 256: Tiles(128, 64, 8, 2)},
}
_SMALL = {
    "forward": {64: Tiles(64, 64, 4, 2), 128: Tiles(32, 32, 4, 2), 256: Tiles(32, 32, 8, 2)},
    "dweight": {64: Tiles(64, 32, 4, 2), 128: Tiles(64, 32, 8, 1), 256: Tiles(16, 32, 4, 1)},
}
_COMBINED = 512  # elements of dhidden in a program of combine_kernel
_TOKENS = 4096  # labels and losses in a step of count_kernel and loss_kernel
_SCALED = 2048  # elements in a program of scale_kernel
_PROJECTED = 64  # tokens in a program of project_kernel
_WORDS = 8192  # logits in a step of softmax_kernel


def narrow(r: int, dtype: torch.dtype) -> bool:
    """Whether a head of width r goes the first way."""
    return r <= NARROW[dtype.itemsize]


def tiles(kernel: str, dtype: torch.dtype, rp: int, large: int) -> Tiles:
    """Tiles for `kernel` ("forward", "dweight") at padded width rp."""
    by_width = (_FLOAT32 if dtype.itemsize == 4 else _SM_100 if large == 10 else _LARGE if large else _SMALL)[kernel]
    return by_width[min(width for width in by_width if width >= rp)]


def keeps_logits(hidden, weight) -> bool:
    """Whether the logits of a wide head are kept for the backward pass. Else what is kept are gradients, which are then read once
    more to be multiplied by dloss: dweight is for few tokens the largest of all tensors."""
    n, v = hidden.size(0), weight.size(0)
    return not narrow(hidden.size(1), hidden.dtype) and n * _aligned(v) * hidden.dtype.itemsize <= WORKSPACE


def forward(
    hidden, weight, projection, labels, ignore_index, with_grads, z_loss
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes as dsfast.ops.linear_cross_entropy -> loss, a float32 scalar, and what `backward` needs: two as `kept` has it, and
    where there is a projection, which is as dsfast.ops.linear_cross_entropy takes it here, the head's input [N, R].

    A label outside 0..V-1 that is not ignore_index cannot raise here: the host does not wait. The loss becomes NaN, and so do
    its token's row of dhidden and all of dweight and dprojection. Deterministic: no atomics. R and V are 1 at least.
    """
    x, reduced = None, hidden.new_empty((0, 0) if projection is None else (len(hidden), len(projection)))
    if projection is not None:
        x, hidden = hidden, reduced
    n, r = hidden.shape
    hidden, weight, labels = *rows(hidden, weight), labels.contiguous()
    kept_1, kept_2 = kept(hidden, weight, with_grads)
    if not n:
        return hidden.new_zeros((), dtype=torch.float32), kept_1, kept_2.zero_(), reduced
    loss, count, losses = (hidden.new_empty(shape, dtype=torch.float32) for shape in ((), 1, n))
    with torch.cuda.device_of(hidden):
        if narrow(r, hidden.dtype):
            for launch in narrow_launches(
                x, projection, hidden, weight, labels, ignore_index, z_loss, count, losses, kept_1, kept_2,
                large_tiles(hidden.device),
            ).values():  # fmt: skip
                launch.run()
        else:
            count_launch(labels, ignore_index, count).run()
            way = _with_kept_logits if with_grads and keeps_logits(hidden, weight) else _by_chunks
            way(hidden, weight, labels, ignore_index, z_loss, count, losses, kept_1, kept_2)
        aside(([loss_launch(losses, count, loss)], [loss]))
    return loss, kept_1, kept_2, reduced


def backward(
    dloss, kept_1, kept_2, reduced, hidden, weight, projection, labels, ignore_index, z_loss
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and projection ([0, 0] without one) from dloss, a float32 scalar, and what `forward` kept.

    By chunks they were made when dloss was not known: in float16, what is too small for it there stays lost, however large a
    loss scale.
    """
    dprojection = hidden.new_empty((0, 0) if projection is None else projection.shape)
    with torch.cuda.device_of(hidden):
        if narrow(weight.size(1), hidden.dtype):
            dweight = _narrow_dweight(dloss, kept_2, hidden if projection is None else reduced, weight, z_loss)
            if projection is None:
                return _scaled(kept_1, dloss, hidden), dweight, dprojection
            return _through(dloss, kept_1, hidden, projection, dprojection), dweight, dprojection
        if keeps_logits(hidden, weight):
            dlogits = torch.empty_like(kept_1)
            if dlogits.numel():
                gradient_launch(kept_1, labels.contiguous(), ignore_index, kept_2, dloss, dlogits, weight.size(0)).run()
            dlogits = dlogits[:, : weight.size(0)]
            return torch.mm(dlogits, weight), torch.mm(dlogits.t(), hidden), dprojection
        return _scaled(kept_1, dloss, hidden), _scaled(kept_2, dloss, weight), dprojection


def _narrow_dweight(dloss, softmax, hidden, weight, z_loss) -> Tensor:
    dweight = weight.new_empty(weight.shape)
    if not hidden.size(0):
        return dweight.zero_()
    launches = dweight_launches(hidden, weight, softmax, dloss, dweight, z_loss, large_tiles(hidden.device))
    aside((launches.values(), [dweight]))
    return dweight


def _through(dloss, gradient, hidden, projection, dprojection) -> Tensor:
    """The gradient of hidden [N, D], and dprojection, from that of the head's input without dloss."""
    dhidden, scaled = hidden.new_empty(hidden.shape), hidden.new_empty(gradient.shape)
    if not hidden.size(0):
        dprojection.zero_()
        return dhidden
    of_hidden, *of_projection = projection_launches(gradient, dloss, projection, scaled, hidden, dhidden, dprojection)
    of_hidden.run()
    aside((of_projection, [dprojection]))
    return dhidden


def _scaled(gradient: Tensor, dloss: Tensor, x: Tensor) -> Tensor:
    """gradient dloss, like x."""
    y = x.new_empty(x.shape)
    scale_launch(gradient, dloss, y).run()
    return y


def kept(hidden, weight, with_grads: bool) -> tuple[Tensor, Tensor]:
    """What `forward` keeps, yet to be filled. Of a narrow head dhidden [N, R] in float32, which `backward` rounds, and softmax
    [4, N], as combine_kernel has it; of others, if `keeps_logits`, logits [N, V and padding] and softmax [3, N] in float32, else
    dhidden and dweight."""
    if not with_grads:
        return hidden.new_empty(0, 0), weight.new_empty(0, 0)
    if keeps_logits(hidden, weight):
        n = hidden.size(0)
        return hidden.new_empty(n, _aligned(weight.size(0))), hidden.new_empty(3, n, dtype=torch.float32)
    if narrow(hidden.size(1), hidden.dtype):
        n = hidden.size(0)
        return hidden.new_empty(hidden.shape, dtype=torch.float32), hidden.new_empty(4, n, dtype=torch.float32)
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def narrow_launches(
    x, projection, hidden, weight, labels, ignore_index, z_loss, count, losses, dhidden, softmax, large: int
) -> dict[str, Launch]:
    """Name -> launch, in their order: they fill count, losses and, unless softmax is empty, dhidden and softmax; and hidden,
    contiguous, from x, unless x and projection are None. Any device."""
    n, r, grads = *hidden.shape, softmax.numel() > 0
    inputs = _narrow_arguments(hidden, weight, z_loss) | {
        "labels": labels, "count": count, "losses": losses, "dhidden": dhidden, "softmax": softmax, "z_loss": z_loss,
        "ignore_index": ignore_index, "GRADS": grads, "RAW": takes_raw(hidden.dtype, large),
    }  # fmt: skip
    bt, bv, *resources = tiles("forward", hidden.dtype, inputs["RP"], large)
    blocks = triton.cdiv(n, bt)
    parts, steps = splits(blocks, triton.cdiv(inputs["V"], bv))
    inputs |= {"TILES": blocks, "counts": hidden.new_empty(blocks, dtype=torch.float32)}
    inputs["softmax_parts"] = hidden.new_empty(2, parts, n, dtype=torch.float32)
    inputs["o_parts"] = hidden.new_empty((parts, n, r) if grads else 0, dtype=torch.float32)
    launches, of_sweep = {}, _projected(x, projection) | {"S": parts, "STEPS": steps, "BT": bt, "BV": bv}
    name = "forward" if grads else "forward without gradients"
    launches[name] = _launch(forward_kernel, (blocks, parts), inputs, resources, bt, **of_sweep)
    name = "combine" if grads else "combine without gradients"
    block = max(1, _COMBINED // inputs["RP"])
    stages = 3 if parts > 2 else 1  # else a program waits for the parts one by one
    launches[name] = _launch(
        combine_kernel, (triton.cdiv(n, block),), inputs, (4, stages), 0, S=parts, BT=block, STAGES=stages
    )
    return launches


def _projected(x: Tensor | None, projection: Tensor | None) -> dict[str, Any]:
    """forward_kernel's arguments of what makes its input."""
    if projection is None:
        return {"x": None, "projection": None, "x_n": 0, "D": 0, "DP": 0}
    (x,), d = rows(x), projection.size(1)
    return {"x": x, "projection": projection.contiguous(), "x_n": x.stride(0), "D": d, "DP": padded(d)}


def dweight_launches(hidden, weight, softmax, dloss, dweight, z_loss, large: int) -> dict[str, Launch]:
    """Name -> launch, in their order: they fill dweight from softmax and dloss. Any device."""
    hidden, weight = rows(hidden, weight)
    inputs = _narrow_arguments(hidden, weight, z_loss) | {"softmax": softmax, "dloss": dloss}
    bv, bt, *resources = tiles("dweight", hidden.dtype, inputs["RP"], large)
    blocks = triton.cdiv(len(weight), bv)
    parts, steps = splits(blocks, triton.cdiv(len(hidden), bt), ASIDE)
    added = dweight if parts == 1 else dweight.new_empty(parts, *dweight.shape, dtype=torch.float32)
    others = {"dweight_parts": added, "STEPS": steps, "BT": bt, "BV": bv}
    launches = {"dweight": _launch(dweight_kernel, (blocks, parts), inputs, resources, bv, **others)}
    return launches if parts == 1 else launches | {"sum": sum_launch(added, dweight)}


def projection_launches(gradient, dloss, projection, scaled, hidden, dhidden, dprojection) -> list[Launch]:
    """The launch that fills scaled [N, R] and dhidden [N, D], and those that fill dprojection from scaled. Any device."""
    (n, r), d = gradient.shape, projection.size(1)
    arguments = {
        "x": gradient, "dloss": dloss, "projection": projection.contiguous(), "y": scaled, "dhidden": dhidden, "N": n, "R": r,
        "RP": padded(r), "D": d, "DP": padded(d), "BT": _PROJECTED,
    }  # fmt: skip
    launch = Launch(project_kernel, (triton.cdiv(n, _PROJECTED),), arguments, options(4), hidden.itemsize, _PROJECTED)
    return [launch, *outer_launches(scaled, hidden, dprojection)]


def _narrow_arguments(hidden, weight, z_loss) -> dict[str, Any]:
    """Arguments of the kernels of both passes."""
    (n, r), strides = hidden.shape, (hidden.stride(0), weight.stride(0))
    # Triton looks for multiples of 16 only, and copies what may be unaligned element by element, not beside the products.
    unit = 8 if any(stride % 16 for stride in strides) and not any(stride % 8 for stride in strides) else 1
    return {
        "hidden": hidden, "weight": weight, "hidden_n": strides[0] // unit, "weight_v": strides[1] // unit, "UNIT": unit,
        "N": n, "V": len(weight), "R": r, "RP": padded(r), "FOLDED": hidden.dtype.itemsize == 2 and not z_loss,
    }  # fmt: skip


def _launch(kernel, grid, inputs, resources, rows_in_products: int, **others) -> Launch:
    return Launch(kernel, grid, inputs | others, options(*resources), inputs["hidden"].dtype.itemsize, rows_in_products)


def _with_kept_logits(hidden, weight, labels, ignore_index, z_loss, count, losses, logits, softmax) -> None:
    z = logits[:, : weight.size(0)]
    torch.mm(hidden, weight.t(), out=z)
    softmax_launch(z, labels, ignore_index, z_loss, count, losses, softmax, False).run()


def _by_chunks(hidden, weight, labels, ignore_index, z_loss, count, losses, dhidden, dweight) -> None:
    n, v, grads = hidden.size(0), weight.size(0), dweight.numel() > 0
    chunk, width = chunk_shape(n, v, hidden.dtype.itemsize)
    logits = hidden.new_empty(chunk, width)[:, :v]
    several = chunk < n and grads and hidden.dtype.itemsize == 2
    total = dweight.new_empty(dweight.shape, dtype=torch.float32) if several else dweight
    for start in range(0, n, chunk):
        part = slice(start, start + chunk)
        z = logits[: min(chunk, n - start)]
        torch.mm(hidden[part], weight.t(), out=z)
        softmax_launch(z, labels[part], ignore_index, z_loss, count, losses[part], None, grads).run()
        if grads:
            torch.mm(z, weight, out=dhidden[part])
            _add_product(total, z, hidden[part], first=start == 0)
    if several:
        dweight.copy_(total)


def _add_product(total: Tensor, z: Tensor, hidden: Tensor, first: bool) -> None:
    """Set total [V, R], or where not `first` add to it, z^T hidden, of the chunk's gradient z [C, V].

    Where total is float32 and the inputs are not, so that chunks are not rounded one by one, it goes strip by strip: a product
    with float32 output that also adds in place is not to be had from every PyTorch.
    """
    if total.dtype == z.dtype:
        torch.addmm(total, z.t(), hidden, beta=0 if first else 1, out=total)
        return
    for strip, z_strip in zip(total.split(_STRIP), z.split(_STRIP, 1), strict=True):
        product = (
            torch.mm(z_strip.t(), hidden, out_dtype=torch.float32)
            if z.is_cuda
            else z_strip.t().float() @ hidden.float()
        )
        strip.copy_(product) if first else strip.add_(product)


def chunk_shape(n: int, v: int, itemsize: int) -> tuple[int, int]:
    """(tokens of a chunk, elements from one row of its logits to the next): equal chunks of WORKSPACE bytes at most."""
    width = _aligned(v)
    most = max(1, WORKSPACE // (width * itemsize))
    return triton.cdiv(n, triton.cdiv(n, most)), width


def _aligned(v: int) -> int:
    return (v + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


def softmax_launch(logits, labels, ignore_index, z_loss, count, losses, softmax, grads: bool) -> Launch:
    """The launch that fills losses [N] and softmax [3, N], if there is one, and where `grads` turns logits [N, V] into their
    gradient."""
    arguments = _row_arguments(logits, labels, ignore_index, logits.size(1)) | {
        "count": count, "losses": losses, "softmax": softmax, "z_loss": z_loss, "GRADS": grads,
    }  # fmt: skip
    return Launch(softmax_kernel, (len(logits),), arguments, options(16), logits.dtype.itemsize, 0)


def gradient_launch(logits, labels, ignore_index, softmax, dloss, dlogits, v: int) -> Launch:
    """The launch that fills the first v columns of dlogits [N, v and padding] from logits of that shape."""
    arguments = _row_arguments(logits, labels, ignore_index, v) | {
        "softmax": softmax,
        "dloss": dloss,
        "dlogits": dlogits,
    }
    grid = (len(logits), triton.cdiv(v, arguments["BLOCK"]))
    return Launch(gradient_kernel, grid, arguments, options(16), logits.dtype.itemsize, 0)


def _row_arguments(logits, labels, ignore_index, v: int) -> dict:
    """Arguments of the kernels that go along rows of v logits."""
    return {
        "logits": logits, "labels": labels, "logits_n": logits.stride(0), "N": len(logits), "V": v,
        "ignore_index": ignore_index, "BLOCK": min(_WORDS, triton.next_power_of_2(v)),
    }  # fmt: skip


def count_launch(labels, ignore_index, count) -> Launch:
    """The launch that fills count."""
    arguments = {
        "labels": labels, "count": count, "N": labels.size(0), "ignore_index": ignore_index, "BLOCK": _TOKENS,
    }  # fmt: skip
    return Launch(count_kernel, (1,), arguments, options(8), 4, 0)


def loss_launch(losses, count, loss) -> Launch:
    """The launch that fills loss."""
    arguments = {"losses": losses, "count": count, "loss": loss, "N": losses.size(0), "BLOCK": _TOKENS}
    return Launch(loss_kernel, (1,), arguments, options(8), 4, 0)


def scale_launch(gradient, dloss, y) -> Launch:
    """The launch that fills y, contiguous as the `gradient` that was kept is."""
    arguments = {"x": gradient, "dloss": dloss, "y": y, "SIZE": y.numel(), "BLOCK": _SCALED}
    return Launch(scale_kernel, (triton.cdiv(y.numel(), _SCALED),), arguments, options(4), y.dtype.itemsize, 0)


EXAMPLES = {
    "500K": (8192, 32, 8000, 128),
    "rank 16": (8192, 16, 8000, 96),
    "5M": (8192, 64, 8000, 256),
    "rank 128": (8192, 128, 16000, 128),
    "widest in the first way": (2048, 256, 129280, None),
    "a multiple of 8, not of 16": (2048, 200, 32001, None),
    "DeepSeek-V3": (2048, 7168, 129280, None),
}
"""N, R, V and D (None: no projection) that are compiled ahead."""


def example_launches(size: str, dtype: torch.dtype, large: int) -> dict[str, Launch]:
    """Name -> launch at EXAMPLES[size], on the meta device."""
    empty = on_meta(dtype)
    n, r, v, d = EXAMPLES[size]
    hidden, weight, labels = empty(n, r), empty(v, r), empty(n, dtype=torch.int64)
    count, losses, loss = (empty(shape, dtype=torch.float32) for shape in (1, n, ()))
    launches = {"count": count_launch(labels, -100, count), "loss": loss_launch(losses, count, loss)}
    if narrow(r, dtype):
        for grads in (True, False):
            dhidden, softmax = kept(hidden, weight, grads)
            inputs, outputs = (hidden, weight, labels, -100, 0.0), (count, losses, dhidden, softmax)
            launches |= narrow_launches(None, None, *inputs, *outputs, large)
            if grads:
                launches["scale"] = scale_launch(dhidden, loss, hidden)
                launches |= dweight_launches(hidden, weight, softmax, loss, weight, 0.0, large)
            if d and dtype.itemsize == 2:
                x, projection = empty(n, d), empty(r, d)
                name, first = next(iter(narrow_launches(x, projection, *inputs, *outputs, large).items()))
                launches[f"{name}, projected"] = first
                if grads:
                    found = projection_launches(dhidden, loss, projection, hidden, x, x, projection)
                    launches |= dict(zip(("project", "outer", "sum of dprojection"), found, strict=True))
        return launches
    logits, softmax = empty(n, v), empty(3, n, dtype=torch.float32)
    launches["scale"] = scale_launch(weight, loss, weight)
    for name, *wanted in (
        ("softmax", softmax, False),
        ("softmax by chunks", None, True),
        ("softmax alone", None, False),
    ):
        launches[name] = softmax_launch(logits, labels, -100, 0.0, count, losses, *wanted)
    launches["gradient"] = gradient_launch(logits, labels, -100, softmax, loss, logits, v)
    return launches
