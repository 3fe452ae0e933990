"""Triton kernels of dsfast.ops.embedding, whose module has the maths.

N tokens, V vocabulary, R rank of the table, D model width; BN tokens, BR and BD columns in a tile.

Forward: a product whose left operand is gathered from the table as it is loaded, or without a projection a copy of rows.
Backward, x being the gradient of the looked-up rows (dy, or dy projection^T in float32), dtable[w] is the sum of x over the
tokens that are word w. Tokens are sorted by word, which keeps their order, so a word's tokens are a segment of the sorted
ones. Sorted tokens are cut into blocks of BLOCK; a block that is one word from end to end is summed by a program of its own,
that of the product dy projection^T where there is one, which makes x in the sorted order.
Then one program for each word adds up the blocks inside its segment and the tokens before and after them, fewer than
2 BLOCK: a word that is a quarter of all tokens costs little more than others, and every sum has one order. Words that do
not occur get zeros from the same program.

Few tokens are sorted in one launch, each compared with every other: 2^26 comparisons for 8192 tokens are microseconds, where
torch.sort is some eight launches. A comparison is the sign of a difference, shifted and added: two instructions. Nothing of the
sorting needs dy: it is done in the forward pass, aside.

An id outside 0..V-1 gives a row of NaN and takes no part in the backward pass; it sorts behind all words.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from dsfast.triton_kernels.launch import Launch, aside, large_tiles, on_meta, padded, rows
from dsfast.triton_kernels.pieces import load_tile, options, splits, sum_launch
from torch import Tensor

BLOCK = 64  # sorted tokens in a block, where there is no projection
_ELEMENTS = 4096  # of a tile that is only copied or summed
_KEYS = 1024  # ids in a program of keys_kernel, words in one of starts_kernel
MOST_COMPARED = 2**14  # tokens that are sorted by comparing each with every other
_UNSPECIALIZED = ("N", "STEPS")


@triton.jit
def _gather(table, table_v, input_ids, n, r, N, V, R: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):
    """(rows of the table that tokens n .. n + BN - 1 look up, columns r .. r + BR - 1, else 0; which tokens have one [BN])."""
    i = n + tl.arange(0, BN)
    w = tl.load(input_ids + i, mask=i < N, other=-1)
    known = (w >= 0) & (w < V)
    col = r + tl.arange(0, BR)[None, :]
    p_table = table + tl.where(known, w, 0)[:, None] * table_v + col
    return tl.load(p_table, mask=known[:, None] & (col < R), other=0.0), known


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def copy_kernel(input_ids, table, y, table_v, N, V, R: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):
    """One tile of y [N, R], without a projection."""
    n, r = tl.program_id(0) * BN, tl.program_id(1) * BR
    b_y, known = _gather(table, table_v, input_ids, n, r, N, V, R, BN, BR)
    b_y = tl.where(known[:, None], b_y, float("nan"))
    i, col = (n + tl.arange(0, BN)).to(tl.int64)[:, None], r + tl.arange(0, BR)[None, :]
    tl.store(y + i * R + col, b_y, mask=(i < N) & (col < R))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def forward_kernel(
    input_ids, table, projection, y, table_v, projection_r, N, V, R: tl.constexpr, D: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One tile of y [N, D]."""
    n, d = tl.program_id(0) * BN, tl.program_id(1) * BD
    i = n + tl.arange(0, BN)
    w = tl.load(input_ids + i, mask=i < N, other=-1)
    known = (w >= 0) & (w < V)
    row = tl.where(known, w, 0)[:, None] * table_v
    b_y = tl.zeros([BN, BD], tl.float32)
    for k in range(tl.cdiv(R, BR)):
        r = k * BR + tl.arange(0, BR)[None, :]
        b_taken = tl.load(table + row + r, mask=known[:, None] & (r < R), other=0.0)  # [BN, BR]
        b_p = load_tile(projection, projection_r, k * BR, d, R, D, BR, BD, True)  # [BR, BD]
        b_y = tl.dot(b_taken, b_p, b_y, input_precision="ieee")
    b_y = tl.where(known[:, None], b_y, float("nan"))
    col = d + tl.arange(0, BD)[None, :]
    p_y = y + i.to(tl.int64)[:, None] * D + col
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=(i[:, None] < N) & (col < D))


@triton.jit
def _are_one_word(keys, first, N, V, BLOCK: tl.constexpr):
    """Whether a block of sorted tokens, from the first one on, is whole and one word's."""
    key = tl.load(keys + first)
    return (first + BLOCK <= N) & (key == tl.load(keys + tl.minimum(first + BLOCK, N) - 1)) & (key < V)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def taken_kernel(
    dy, projection, keys, order, x, blocks, dy_n, projection_r, N, V, R: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One tile of x [N, R] = dy projection^T in the sorted order, and of blocks [N // BLOCK, R], as blocks_kernel's."""
    first, r = tl.program_id(0) * BLOCK, tl.program_id(1) * BR
    place, col = first + tl.arange(0, BLOCK), r + tl.arange(0, BR)
    i = tl.load(order + place, mask=place < N, other=0)[:, None]
    b_x = tl.zeros([BLOCK, BR], tl.float32)
    for k in range(tl.cdiv(D, BD)):
        d = k * BD + tl.arange(0, BD)[None, :]
        b_dy = tl.load(dy + i * dy_n + d, mask=(place[:, None] < N) & (d < D), other=0.0)  # [BLOCK, BD]
        b_p = load_tile(projection, projection_r, r, k * BD, R, D, BR, BD, True)  # [BR, BD]
        b_x = tl.dot(b_dy, tl.trans(b_p), b_x, input_precision="ieee")
    tl.store(x + place.to(tl.int64)[:, None] * R + col[None, :], b_x, mask=(place[:, None] < N) & (col[None, :] < R))
    if _are_one_word(keys, first, N, V, BLOCK):
        tl.store(blocks + tl.program_id(0).to(tl.int64) * R + col, tl.sum(b_x, 0), mask=col < R)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def dprojection_kernel(
    dy, input_ids, table, dprojection_parts, dy_n, table_v, N, V, STEPS, R: tl.constexpr, D: tl.constexpr,
    BR: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One tile of dprojection_parts [S, R, D] = taken^T dy over one of S shares of the tokens, STEPS tiles of them."""
    r, d, s = tl.program_id(0) * BR, tl.program_id(1) * BD, tl.program_id(2)
    b_dp = tl.zeros([BR, BD], tl.float32)
    for tile in range(s * STEPS, tl.minimum((s + 1) * STEPS, tl.cdiv(N, BN))):
        n = tile * BN
        b_taken, known = _gather(table, table_v, input_ids, n, r, N, V, R, BN, BR)  # [BN, BR]
        col = d + tl.arange(0, BD)[None, :]
        p_dy = dy + (n + tl.arange(0, BN)).to(tl.int64)[:, None] * dy_n + col
        b_dy = tl.load(p_dy, mask=known[:, None] & (col < D), other=0.0)  # [BN, BD]
        b_dp = tl.dot(tl.trans(b_taken), b_dy, b_dp, input_precision="ieee")
    row, col = r + tl.arange(0, BR)[:, None], d + tl.arange(0, BD)[None, :]
    p_dp = dprojection_parts + (tl.cast(s, tl.int64) * R + row) * D + col
    tl.store(p_dp, b_dp.to(dprojection_parts.dtype.element_ty), mask=(row < R) & (col < D))


@triton.jit
def _key(input_ids, i, N, V):
    """What tokens are sorted by: the word, or V where there is none."""
    w = tl.load(input_ids + i, mask=i < N, other=0)
    return tl.where((w >= 0) & (w < V), w, V)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def keys_kernel(input_ids, keys, N, V, KEYS: tl.constexpr):
    """keys [N], in the tokens' order."""
    i = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    tl.store(keys + i, _key(input_ids, i, N, V).to(keys.dtype.element_ty), mask=i < N)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def sort_kernel(input_ids, keys, order, N, V, BN: tl.constexpr, BM: tl.constexpr):
    """Put BN tokens at their places in keys and order [N]: as many as come before them. V N < 2^31."""
    i = tl.program_id(0) * BN + tl.arange(0, BN)
    key = _key(input_ids, i, N, V)
    rank = (key.to(tl.int32) * N + i)[:, None]
    b_before = tl.zeros([BN, BM], tl.int32)
    for m in range(0, N, BM):
        j = m + tl.arange(0, BM)
        other = tl.where(j < N, _key(input_ids, j, N, V).to(tl.int32) * N + j, 2**31 - 1)[None, :]
        b_before += (other - rank) >> 31
    place = -tl.sum(b_before, 1)
    tl.store(keys + place, key.to(keys.dtype.element_ty), mask=i < N)
    tl.store(order + place, i.to(tl.int64), mask=i < N)


@triton.jit
def _starts(keys, w, N, BITS):
    """How many of the sorted keys are below each of the words w, by bisection. BITS > log2 N."""
    below = w * 0
    for bit in range(BITS):
        more = below + (1 << (BITS - 1 - bit))
        key = tl.load(keys + tl.minimum(more, N) - 1)
        below = tl.where((more <= N) & (key < w), more, below)
    return below


@triton.jit(do_not_specialize=("N", "BITS"))
def starts_kernel(keys, starts, N, BITS, V, KEYS: tl.constexpr):
    """starts [V + 1], of each word."""
    w = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    tl.store(starts + w, _starts(keys, w, N, BITS), mask=w <= V)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def blocks_kernel(
    x, keys, order, blocks, x_n, N, V, R: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr
):
    """One tile of blocks [N // BLOCK, R]: the sum of x over a block of sorted tokens, if they are one word; else nothing."""
    first, r = tl.program_id(0) * BLOCK, tl.program_id(1) * BR
    if _are_one_word(keys, first, N, V, BLOCK):
        col = r + tl.arange(0, BR)[None, :]
        b_sum = tl.zeros([BN, BR], tl.float32)
        for k in range(BLOCK // BN):
            i = tl.load(order + first + k * BN + tl.arange(0, BN))
            b_sum += tl.load(x + i[:, None] * x_n + col, mask=col < R, other=0.0).to(tl.float32)
        col = r + tl.arange(0, BR)
        tl.store(blocks + tl.program_id(0).to(tl.int64) * R + col, tl.sum(b_sum, 0), mask=col < R)


@triton.jit
def words_kernel(
    x, order, starts, blocks, head_dtable, dtable, x_n, R: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One tile of dtable [V, R]: one word, head_dtable added where there is one. x [N, R]: of the tokens, or where no order is
    given of the sorted ones."""
    w, r = tl.program_id(0), tl.program_id(1) * BR
    begin, end = tl.load(starts + w), tl.load(starts + w + 1)
    first = tl.cdiv(begin, BLOCK)
    whole = tl.maximum(end // BLOCK - first, 0)
    single = end - begin - whole * BLOCK
    col = r + tl.arange(0, BR)[None, :]
    row = tl.arange(0, BN)
    d = r + tl.arange(0, BR)
    b_head = tl.zeros([BR], tl.float32)
    if head_dtable is not None:  # here, so that it is not waited for after all else
        b_head = tl.load(head_dtable + w.to(tl.int64) * R + d, mask=d < R, other=0.0).to(tl.float32)
    b_sum = tl.zeros([BN, BR], tl.float32)
    for k in range(tl.cdiv(whole, BN)):
        block = k * BN + row
        p_blocks = blocks + (first + block).to(tl.int64)[:, None] * R + col
        b_sum += tl.load(p_blocks, mask=(block[:, None] < whole) & (col < R), other=0.0)
    for k in range(tl.cdiv(single, BN)):
        token = k * BN + row
        place = begin + token
        # Behind the whole blocks, of which there may be none.
        place += tl.where(place < first * BLOCK, 0, whole * BLOCK)
        i = place.to(tl.int64) if order is None else tl.load(order + place, mask=token < single, other=0)
        b_x = tl.load(x + i[:, None] * x_n + col, mask=(token[:, None] < single) & (col < R), other=0.0)
        b_sum += b_x.to(tl.float32)
    b_dtable = tl.sum(b_sum, 0) + b_head
    tl.store(dtable + w.to(tl.int64) * R + d, b_dtable.to(dtable.dtype.element_ty), mask=d < R)


def forward(input_ids, table, projection, with_grads) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes as dsfast.ops.embedding -> y, and what `backward` needs, as `kept` has it. An id outside 0..V-1 gives a row of NaN:
    the host does not wait to raise."""
    n, v = input_ids.size(0), table.size(0)
    y = table.new_empty(n, table.size(1) if projection is None else projection.size(1))
    sorting = kept(input_ids, table, with_grads)
    if y.numel():
        with torch.cuda.device_of(table):
            forward_launch(input_ids, table, projection, y, large_tiles(table.device)).run()
            if with_grads:
                _sort(input_ids, v, *sorting)
    return y, *sorting


def kept(input_ids, table, with_grads: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What `forward` keeps, yet to be filled: the words [N] in their order, the tokens [N] int64 in that order, and where each
    word's begin there [V + 1] int32; without gradients nothing."""
    n, v = (input_ids.size(0), table.size(0)) if with_grads else (0, -1)
    empty = input_ids.new_empty
    return empty(n, dtype=key_dtype(v)), empty(n), empty(v + 1, dtype=torch.int32)


def backward(
    dy, input_ids, table, projection, keys, order, starts, head_dtable, head_dprojection
) -> tuple[Tensor, Tensor]:
    """The gradients of table and projection ([0, 0] without one) from that of y, and what `forward` kept; those that a head found
    for them, unless None, are added. Deterministic: no atomics."""
    dtable = table.new_empty(table.shape)
    dprojection = table.new_empty((0, 0) if projection is None else projection.shape)
    if not (dy.numel() and table.numel()):
        of_the_head = (dtable, head_dtable), (dprojection, head_dprojection)
        return tuple(mine.zero_() if head is None else mine.copy_(head) for mine, head in of_the_head)
    large = large_tiles(table.device)
    with torch.cuda.device_of(table):
        if projection is not None:
            of_projection = dprojection_launches(dy, input_ids, table, head_dprojection, dprojection, large)
            aside((of_projection.values(), [dprojection]), urgent=True)  # else behind all programs of words_kernel
        for launch in dtable_launches(dy, projection, keys, order, starts, head_dtable, dtable, large).values():
            launch.run()
    return dtable, dprojection


def _sort(input_ids, v: int, keys, order, starts) -> None:
    """Fill keys, order and starts; aside, but for what PyTorch sorts."""
    n, find = keys.size(0), starts_launch(keys, starts)
    if n > MOST_COMPARED or (v + 1) * n >= 2**31:
        unsorted = torch.empty_like(keys)
        keys_launch(input_ids, unsorted, v).run()
        torch.sort(unsorted, stable=True, out=(keys, order))
        aside(([find], [starts]))
    else:
        aside(([sort_launch(input_ids, keys, order, v), find], [keys, order, starts]))


def key_dtype(v: int) -> torch.dtype:
    """The narrowest that holds 0..v: a radix sort goes over the keys once for every byte."""
    return torch.int16 if v < 2**15 else torch.int32


def _tiles(wanted: tuple[int, int, int], dtype: torch.dtype, large: int) -> tuple[int, int, int, int]:
    """(rows, columns, depth, warps) of a product's tile, not larger than needed for its sizes (rows, columns, depth).

    Starting values: they keep the limits of tests/test_triton_compile.py and are not tuned.
    """
    most = (32, 32, 32) if dtype.itemsize == 4 else (64, 128, 64) if large else (64, 64, 32)
    return *(min(size, padded(want)) for size, want in zip(most, wanted, strict=True)), 4


def _stages(steps: int) -> int:
    return 3 if steps > 2 else 1


def _launch(kernel, grid, arguments: dict, resources, itemsize: int, rows_in_products: int = 0) -> Launch:
    return Launch(kernel, grid, arguments, options(*resources), itemsize, rows_in_products)


def forward_launch(input_ids, table, projection, y, large: int) -> Launch:
    """The launch that fills y; tensors may lie on the meta device."""
    (table,) = rows(table)
    (n, d), (v, r) = y.shape, table.shape
    arguments = {
        "input_ids": input_ids.contiguous(),
        "table": table,
        "y": y,
        "table_v": table.stride(0),
        "N": n,
        "V": v,
        "R": r,
    }
    itemsize = table.dtype.itemsize
    if projection is None:
        bn, br = _strip(r)
        arguments |= {"BN": bn, "BR": br}
        return _launch(copy_kernel, (triton.cdiv(n, bn), triton.cdiv(r, br)), arguments, (4,), itemsize)
    (projection,) = rows(projection)
    bn, bd, br, warps = _tiles((_ELEMENTS, d, r), table.dtype, large)
    arguments |= {"projection": projection, "projection_r": projection.stride(0), "D": d, "BN": bn, "BD": bd, "BR": br}
    grid = (triton.cdiv(n, bn), triton.cdiv(d, bd))
    return _launch(forward_kernel, grid, arguments, (warps, _stages(r // br)), itemsize, bn)


def dprojection_launches(dy, input_ids, table, head_dprojection, dprojection, large: int) -> dict[str, Launch]:
    """Name -> launch, in their order: they fill dprojection."""
    dy, table = rows(dy, table)
    (n, d), (v, r) = dy.shape, table.shape
    br, bd, bn, warps = _tiles((r, d, _ELEMENTS), dy.dtype, large)
    tiles = triton.cdiv(r, br), triton.cdiv(d, bd)
    parts, steps = splits(tiles[0] * tiles[1], triton.cdiv(n, bn))
    at_once = parts == 1 and head_dprojection is None
    target = dprojection if at_once else dy.new_empty(parts, r, d, dtype=torch.float32)
    arguments = {
        "dy": dy, "input_ids": input_ids.contiguous(), "table": table, "dprojection_parts": target, "dy_n": dy.stride(0),
        "table_v": table.stride(0), "N": n, "V": v, "STEPS": steps, "R": r, "D": d, "BR": br, "BD": bd, "BN": bn,
    }  # fmt: skip
    launches = {
        "dprojection": _launch(dprojection_kernel, (*tiles, parts), arguments, (warps, 1), dy.dtype.itemsize, br)
    }
    base = None if head_dprojection is None else head_dprojection.contiguous()
    return launches if at_once else launches | {"sum": sum_launch(target, dprojection, base)}


def keys_launch(input_ids, keys, v: int) -> Launch:
    """The launch that fills keys."""
    n = keys.size(0)
    arguments = {"input_ids": input_ids.contiguous(), "keys": keys, "N": n, "V": v, "KEYS": _KEYS}
    return _launch(keys_kernel, (triton.cdiv(n, _KEYS),), arguments, (4,), 4)


def sort_launch(input_ids, keys, order, v: int) -> Launch:
    """The launch that fills keys and order; tensors may lie on the meta device. Not tuned on a GPU."""
    n, bn, bm = keys.size(0), 32, 128
    arguments = {
        "input_ids": input_ids.contiguous(), "keys": keys, "order": order, "N": n, "V": v, "BN": bn, "BM": bm,
    }  # fmt: skip
    return _launch(sort_kernel, (triton.cdiv(n, bn),), arguments, (4,), 4)


def starts_launch(keys, starts) -> Launch:
    """The launch that fills starts [V + 1] from the sorted keys."""
    n, v = keys.size(0), starts.size(0) - 1
    arguments = {"keys": keys, "starts": starts, "N": n, "BITS": n.bit_length(), "V": v, "KEYS": _KEYS}
    return _launch(starts_kernel, (triton.cdiv(v + 1, _KEYS),), arguments, (4,), 4)


def dtable_launches(dy, projection, keys, order, starts, head_dtable, dtable, large: int) -> dict[str, Launch]:
    """Name -> launch, in their order: they fill dtable from the gradient of y and what was sorted."""
    (dy,), (n, d), (v, r) = rows(dy), dy.shape, dtable.shape
    x, block, (bn, br), itemsize = dy, BLOCK, _strip(r), dtable.dtype.itemsize
    if projection is not None:
        block, columns, depth, warps = _tiles((_ELEMENTS, r, d), dy.dtype, large)
        x = dy.new_empty(n, r, dtype=torch.float32)
    arguments = {
        "dy": dy, "keys": keys, "order": order, "starts": starts, "x": x, "dtable": dtable, "dy_n": dy.stride(0),
        "x_n": x.stride(0), "blocks": dy.new_empty(n // block, r, dtype=torch.float32), "N": n, "V": v, "R": r, "BLOCK": block,
        "BN": min(bn, 16), "BR": br, "head_dtable": None if head_dtable is None else head_dtable.contiguous(),
    }  # fmt: skip
    resources, strips, launches = (1,) if br <= 64 else (4,), triton.cdiv(r, br), {}
    if projection is not None:
        (projection,) = rows(projection)
        product = {"projection": projection, "projection_r": projection.stride(0), "D": d, "BR": columns, "BD": depth}
        grid, stages = (triton.cdiv(n, block), triton.cdiv(r, columns)), _stages(d // depth)
        launches["taken"] = _launch(taken_kernel, grid, arguments | product, (warps, stages), dy.dtype.itemsize, block)
        arguments["order"] = None  # of x
    elif n >= block:
        launches["blocks"] = _launch(blocks_kernel, (n // block, strips), arguments, resources, itemsize)
    return launches | {"words": _launch(words_kernel, (v, strips), arguments, resources, itemsize)}


def _strip(r: int) -> tuple[int, int]:
    """(rows, columns) of a tile that is only copied or summed."""
    br = min(1024, triton.next_power_of_2(r))
    return max(1, min(64, _ELEMENTS // br)), br


EXAMPLES = {
    "500K": (8192, 8000, 32, 128),
    "projection wide": (8192, 30000, 256, 4096),
    "DeepSeek-V3": (4096, 129280, 7168, None),
}
"""N, V, R and D (None: no projection) that are compiled ahead."""


def example_launches(size: str, dtype: torch.dtype, large: int) -> dict[str, Launch]:
    """Name -> launch at EXAMPLES[size], on the meta device."""
    empty = on_meta(dtype)
    n, v, r, d = EXAMPLES[size]
    input_ids, table = empty(n, dtype=torch.int64), empty(v, r)
    projection = None if d is None else empty(r, d)
    dy, (keys, order, starts) = empty(n, d or r), kept(input_ids, table, True)
    launches = {
        "forward": forward_launch(input_ids, table, projection, dy, large),
        "keys": keys_launch(input_ids, keys, v),
        "sort": sort_launch(input_ids, keys, order, v),
        "starts": starts_launch(keys, starts),
    }
    if projection is not None:
        launches |= dprojection_launches(dy, input_ids, table, projection, projection, large)
    launches |= dtable_launches(dy, projection, keys, order, starts, None, table, large)
    tied = dtable_launches(dy, projection, keys, order, starts, table, table, large)
    return launches | {"words, tied head": tied["words"]}
