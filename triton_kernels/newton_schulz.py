"""Triton kernel of dsfast.ops.newton_schulz, whose module has the maths: all matrices in one launch, a program for each.

R rows, C columns. Where all matrices are small, X stays in registers from the first iteration to the last: what an iteration
would else wait for is memory, not products. Else a program holds X X^T alone, all of it, and takes X a block of columns at a
time: the polynomial of X X^T multiplies each block by itself, so that a new block replaces the old one in the result, which is
all the memory there is, and at once gives its part of the next X X^T. X is read and written once for an iteration, and columns
may be any number.

Products multiply numbers of x's dtype: bfloat16 as Muon's authors do, whose five iterations bear its rounding, and who keep X
in it as well; float32 is at full precision. All sums are float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from dsfast.triton_kernels.launch import Launch, large_tiles, padded
from dsfast.triton_kernels.pieces import BY_3_7, options
from torch import Tensor

COLUMNS = {2: 64, 4: 32}
"""Of a block, by bytes of a number."""
IN_REGISTERS = {4: 2**14, 8: 2**15}
"""Numbers of 16 bits, those of a matrix with the padding, that stay in the registers of so many warps; only on sm_90 and sm_100:
sm_80 and gfx942 would spill."""


@triton.jit
def _offsets(j, R, C, BR: tl.constexpr, BC: tl.constexpr):
    """Block j of a matrix: offsets from its begin [BR, BC], and which of them are in it."""
    row, col = tl.arange(0, BR)[:, None], tl.arange(0, BC)[None, :] + j * BC
    return row * C + col, (row < R) & (col < C)


@triton.jit
def _polynomial(b_gram, a, b, c, BR: tl.constexpr, dtype: tl.constexpr):
    """a + b G + c G^2 [BR, BR]: with a on the diagonal X needs no second layout, to be added to its own product."""
    b_g = b_gram.to(dtype)
    b_p = c * tl.dot(b_g, b_g, b / c * b_gram, input_precision="ieee")
    diagonal = tl.arange(0, BR)[:, None] == tl.arange(0, BR)[None, :]
    return tl.where(diagonal, b_p + a, b_p).to(dtype)


@triton.jit
def _step(out, j, R, C, b_poly, BR: tl.constexpr, BC: tl.constexpr):
    """Block j of X becomes that of poly X; returns it."""
    at, mask = _offsets(j, R, C, BR, BC)
    b_x = tl.load(out + at, mask=mask, other=0.0)  # [BR, BC]
    b_x = tl.dot(b_poly, b_x, input_precision="ieee").to(b_x.dtype)
    tl.store(out + at, b_x, mask=mask)
    return b_x


@triton.jit
def _norm(b_squares, eps):
    """The root of their sum, eps at least."""
    norm = tl.sqrt(tl.sum(tl.sum(b_squares, 1), 0))
    return tl.where(norm < eps, eps, norm)  # not tl.maximum: NaN stays


@triton.jit
def _in_registers(x, out, R, C, a, b, c, eps, ITERATIONS, BR: tl.constexpr, BC: tl.constexpr):
    """One matrix of up to BC columns."""
    dtype: tl.constexpr = x.dtype.element_ty
    at, mask = _offsets(0, R, C, BR, BC)
    b_first = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    b_x = (b_first / _norm(b_first * b_first, eps)).to(dtype)
    zero = 0
    for i in range(ITERATIONS):
        b_gram = tl.dot(b_x, tl.trans(b_x), input_precision="ieee")
        b_x = tl.dot(_polynomial(b_gram, a, b, c, BR, dtype), b_x, input_precision="ieee").to(dtype)
        zero = i * BC
    # The offsets made again, from a zero that the compiler does not know: kept over the loop they are registers that triton 3.6
    # does not have on sm_90.
    zero = tl.minimum(zero, 0) * 16
    row, col = tl.arange(0, BR)[:, None] + zero, tl.arange(0, BC)[None, :] + zero
    tl.store(out + (row * C + col), b_x, mask=(row < R) & (col < C))


@triton.jit
def _by_blocks(x, out, R, C, a, b, c, eps, ITERATIONS, BR: tl.constexpr, BC: tl.constexpr):
    """One matrix, BC columns at a time."""
    dtype: tl.constexpr = x.dtype.element_ty
    blocks = tl.cdiv(C, BC)
    b_squares = tl.zeros([BR, BC], tl.float32)
    for j in range(blocks):
        at, mask = _offsets(j, R, C, BR, BC)
        b_x = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        b_squares += b_x * b_x
    norm = _norm(b_squares, eps)

    b_gram = tl.zeros([BR, BR], tl.float32)
    for j in range(blocks):
        at, mask = _offsets(j, R, C, BR, BC)
        b_x = (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) / norm).to(dtype)
        tl.store(out + at, b_x, mask=mask)
        b_gram = tl.dot(b_x, tl.trans(b_x), b_gram, input_precision="ieee")
    for _ in range(ITERATIONS - 1):
        b_poly = _polynomial(b_gram, a, b, c, BR, dtype)
        b_gram = tl.zeros([BR, BR], tl.float32)
        tl.debug_barrier()  # a thread may read what another has written
        for j in range(blocks):
            b_x = _step(out, j, R, C, b_poly, BR, BC)
            b_gram = tl.dot(b_x, tl.trans(b_x), b_gram, input_precision="ieee")
    b_poly = _polynomial(b_gram, a, b, c, BR, dtype)
    tl.debug_barrier()
    for j in range(blocks):
        _step(out, j, R, C, b_poly, BR, BC)


@triton.jit(do_not_specialize=["ITERATIONS"])
def newton_schulz_kernel(
    x, out, a, b, c, eps, ITERATIONS, STACKS: tl.constexpr, COUNT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """STACKS: COUNT times number of the first matrix, its begin in x, R and C. WHOLE: none has more than BC columns."""
    pid = tl.program_id(0)
    # Chosen among constants only, R and C stay known to be multiples of 16 where all are: memory is read 16 bytes at a time.
    R, C, begin = STACKS[2], STACKS[3], tl.cast(pid, tl.int64) * (STACKS[2] * STACKS[3])
    for s in tl.static_range(1, COUNT):
        here = pid >= STACKS[4 * s]
        R, C = tl.where(here, STACKS[4 * s + 2], R), tl.where(here, STACKS[4 * s + 3], C)
        begin = tl.where(here, STACKS[4 * s + 1] + tl.cast(pid - STACKS[4 * s], tl.int64) * (R * C), begin)
    if WHOLE:
        _in_registers(x + begin, out + begin, R, C, a, b, c, eps, ITERATIONS, BR, BC)
    else:
        _by_blocks(x + begin, out + begin, R, C, a, b, c, eps, ITERATIONS, BR, BC)


def newton_schulz(
    x: Tensor, shapes: Sequence[int], abc: tuple[float, float, float], eps: float, iterations: int
) -> Tensor:
    """As dsfast.ops.newton_schulz; shapes: n, R and C of one stack after the other. iterations is 1 at least."""
    x, out = x.contiguous(), x.new_empty(x.shape)
    with torch.cuda.device_of(x):
        launch(x, out, shapes, abc, eps, iterations, large_tiles(x.device)).run()
    return out


def launch(x: Tensor, out: Tensor, shapes: Sequence[int], abc, eps: float, iterations: int, large: int) -> Launch:
    """The launch that fills out; tensors may lie on the meta device."""
    stacks, matrices, begin, rows, columns = [], 0, 0, 0, 0
    for n, r, c in zip(*(shapes[i::3] for i in range(3)), strict=True):
        if n * r * c:
            stacks += matrices, begin, r, c
            matrices, begin, rows, columns = matrices + n, begin + n * r * c, max(rows, r), max(columns, c)
    a, b, c = abc
    numbers = {"a": a, "b": b, "c": c, "eps": eps, "ITERATIONS": iterations}
    br, bc = padded(rows), padded(columns)
    warps = 8 if br > 64 else 4
    whole = bool(large) and x.element_size() == 2 and br * bc <= IN_REGISTERS[warps]
    # On sm_100 triton 3.6 wants 640 columns of its tensor memory for these, which has 512.
    whole = whole and not (large == 10 and warps == 8 and BY_3_7)
    bc = bc if whole else COLUMNS[x.element_size()]
    sizes = {"STACKS": tuple(stacks), "COUNT": len(stacks) // 4, "BR": br, "BC": bc, "WHOLE": whole}
    arguments = {"x": x, "out": out, **numbers, **sizes}
    return Launch(newton_schulz_kernel, (matrices,), arguments, options(warps), x.element_size(), br)


EXAMPLES = {
    "500K": ((2, 128, 192), (2, 128, 128), (18, 64, 128), (2, 48, 128), (2, 32, 256), (1, 32, 128)),
    "64 rows": ((18, 64, 128),),
    "64 rows, as many columns as stay in registers": ((2, 64, 256),),
    "64 rows, one column more": ((2, 64, 257),),
    "16 rows, as many columns as stay in registers": ((2, 16, 1024),),
    "32 rows, any columns": ((2, 32, 256), (5, 17, 1031)),
    "rows that do not begin at 16 bytes": ((3, 127, 1031),),
}
"""n, R and C of the stacks in launches that are compiled ahead."""


def example_launches(size: str, dtype: torch.dtype, large: int) -> dict[str, Launch]:
    """Kernel -> launch at EXAMPLES[size], on the meta device; in float32 of those matrices that it takes, if there are any."""
    shapes = [shape for shape in EXAMPLES[size] if dtype.itemsize == 2 or shape[1] <= 32]
    x = torch.empty(sum(n * r * c for n, r, c in shapes), dtype=dtype, device="meta")
    flat = [number for shape in shapes for number in shape]
    return {"newton_schulz_kernel": launch(x, x, flat, (3.4445, -4.7750, 2.0315), 1e-7, 5, large)} if shapes else {}
