"""Runs what Triton compiles for an NVIDIA GPU, on CPU tensors: a machine for PTX, made of numpy.

The interpreter shows what a kernel says, this what the compiler made of it: which thread has what, and what threads hand each
other. All threads of a launch are lanes of arrays. Of a program's warps one runs, in all programs at once, until each of its
threads waits at a barrier or has ended; then another, drawn at random: what lacks a barrier reads what nobody has written yet.
Threads of a warp whose ways part run those furthest back first. A LaunchError is raised where a launch reads or writes outside
of every tensor or of its shared memory, or where threads of a warp that have to be together are not.

Asynchronous copies and products (wgmma) are done at once or not before they are waited for, as it falls out; until then what
they write is NaN. A warp does its quarter of a warp group's product by itself.

Not as on a GPU: exp2, log2 and square roots are numpy's, rounded once; sums of matrix products too. Fences order nothing: what
the compiler has to put in for the matrix units' sake is not looked for. It knows the instructions that the kernels here are
compiled to for an sm_80 and an sm_90, and stops at others.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import count
from typing import Any, NamedTuple

import numpy as np
from dsfast.triton_kernels import ahead
from dsfast.triton_kernels.launch import Launch
from guard import living_tensors
from torch import Tensor
from watched import THREADS, LaunchError, Memory

CHIP = os.environ.get("DSFAST_INTERPRETED_CHIP", "sm_80")
TYPES = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
REGISTERS = {"%p": np.bool_, "%rs": np.uint16, "%r": np.uint32, "%rd": np.uint64}
SMALLEST = np.float32(2**-126)  # of float32 that is not a denormal
COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "num": lambda a, b: (a == a) & (b == b), "nan": lambda a, b: (a != a) | (b != b),
    "equ": lambda a, b: ~((a < b) | (a > b)), "neu": np.not_equal, "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
}  # fmt: skip
WITHIN_A_WARP = {
    "add": np.add, "max": np.maximum, "min": np.minimum, "or": np.bitwise_or, "and": np.bitwise_and, "xor": np.bitwise_xor,
}  # fmt: skip
RUNS, WAITS, ENDED = range(3)
ROW, COLUMN = np.arange(THREADS) // 4, np.arange(THREADS) % 4 * 2


class Address(NamedTuple):
    """[base + offset]."""

    base: str
    offset: int


@dataclass(frozen=True)
class Instruction:
    """`name` and the `parts` of it behind dots, `operands` (a register, a number, the bits of one of floating point, an Address
    or a list of these), for the threads whose `guard`, a predicate, is true, where negated false."""

    text: str
    guard: str
    negated: bool
    name: str
    parts: tuple[str, ...]
    operands: tuple


@dataclass(frozen=True)
class Program:
    """The instructions of a kernel, where its labels stand, and the names of its parameters."""

    code: list[Instruction]
    labels: dict[str, int]
    parameters: list[str]

    @cached_property
    def joins(self) -> set[int]:
        return set(self.labels.values())


class Pending(NamedTuple):
    """What `lanes` have begun and wait for by its `group`; finish(rows) does it for those that were at these places among the
    lanes at work when it began."""

    lanes: np.ndarray
    group: np.ndarray
    rows: np.ndarray
    finish: Callable[[np.ndarray], None]


class Asynchronous:
    """What threads begin in groups and wait for later: copies or matrix products."""

    def __init__(self, lanes: int):
        self.groups = np.zeros(lanes, np.int64)
        """How many a lane has closed."""
        self.pending: list[Pending] = []

    def begin(self, lanes: np.ndarray, finish: Callable[[np.ndarray], None]) -> None:
        self.pending.append(Pending(lanes, self.groups[lanes], np.arange(len(lanes)), finish))

    def finished(self, lanes: np.ndarray, most: int) -> Iterator[tuple[np.ndarray, Callable[[], None]]]:
        """Which of `lanes` have to do what, in the order in which it began, so that at most so many closed groups are left."""
        here = np.zeros(len(self.groups), bool)
        here[lanes] = True
        begun, self.pending = self.pending, []
        for one in begun:
            due = here[one.lanes] & (one.group < self.groups[one.lanes] - most)
            if due.any():
                yield one.lanes[due], partial(one.finish, one.rows[due])
            if not due.all():
                self.pending.append(Pending(one.lanes[~due], one.group[~due], one.rows[~due], one.finish))


@cache
def parse(ptx: str) -> Program:
    """Raises LaunchError at what is no instruction."""
    entry = re.search(r"\.entry\s+\w+\((.*?)\)", ptx, re.DOTALL)
    code, labels = [], {}
    for statement in re.split(r"[;\n]", re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx[entry.end() :], flags=re.DOTALL)):
        text = statement.strip()
        if label := re.fullmatch(r"(\$\w+):", text):
            labels[label[1]] = len(code)
        elif text.strip("{}() ") and not re.match(r"[{}\s]*(@\s*)?\.", text):
            code.append(_instruction(re.sub(r"^\{\s*(?=[a-z@])", "", text)))
    return Program(code, labels, re.findall(r"\w+_param_\d+", entry[1]))


def _instruction(text: str) -> Instruction:
    found = re.fullmatch(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)", text, re.DOTALL)
    if found is None:
        raise LaunchError(f"no instruction: {text}")
    name, *parts = found[3].split(".")
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", found[4])
    return Instruction(text, found[2] or "", found[1] == "!", name, tuple(parts), tuple(map(_operand, operands)))


def _operand(text: str) -> Any:
    text = text.strip()
    if text[0] == "{":
        return [_operand(part) for part in text.strip("{} ").split(",")]
    if text[0] == "[":
        base, _, offset = text.strip("[] ").partition("+")
        return Address(base.strip(), int(offset or "0", 0))
    if number := re.fullmatch(r"0([fd])([0-9a-fA-F]+)", text):
        return BITS[4 if number[1] == "f" else 8](int(number[2], 16))
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return int(text.rstrip("U"), 0)
    return text


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounded to nearest, ties to even; NaN is 0x7fff."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return np.where(np.isnan(x), 0x7FFF, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def flushed(x: np.ndarray) -> np.ndarray:
    """Denormals become zeros."""
    return np.where(np.abs(x) < SMALLEST, np.copysign(np.float32(0), x), x) if x.dtype == np.float32 else x


def in_float64(function: Callable) -> Callable:
    """The same, rounded once to float32."""
    return lambda *values: function(*(x.astype(np.float64) for x in values))


def remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of a quotient rounded towards zero; what divides by zero is anything."""
    return np.fmod(a, np.where(b == 0, b.dtype.type(1), b))


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of integers rounded towards zero, likewise."""
    if a.dtype.kind == "f":
        return a / b
    return (a - remainder(a, b)) // np.where(b == 0, b.dtype.type(1), b)


ARITHMETIC = {
    "add": np.add, "sub": np.subtract, "neg": np.negative, "abs": np.abs, "div": quotient, "rem": remainder,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert, "sqrt": np.sqrt,
    "ex2": in_float64(np.exp2), "lg2": in_float64(np.log2), "rcp": in_float64(np.reciprocal),
    "rsqrt": in_float64(lambda x: 1 / np.sqrt(x)), "fma": in_float64(lambda a, b, c: a * b + c),
}  # fmt: skip
"""Instructions that compute one function of their operands; the others are methods of the machine."""


class Machine:
    """Runs `program` in `grid` programs of `threads` threads and `shared` bytes of shared memory each; `values`: of its first
    parameters, the others are 0. The seed says which warp runs when."""

    def __init__(
        self, program: Program, grid: Iterable[int], threads: int, shared: int, values: list, memory: Memory, seed: int
    ):
        self.program, self.threads, self.memory = program, threads, memory
        grid = (*grid, 1, 1)[:3]
        programs = int(np.prod(grid))
        lane = np.arange(programs * threads)
        self.block, thread = lane // threads, lane % threads
        self.warp = thread // THREADS
        self.registers: dict[str, np.ndarray] = {}
        self.special = {"%tid.x": thread, "%ctaid.x": self.block % grid[0], "%ctaid.y": self.block // grid[0] % grid[1]}
        self.special |= {"%ctaid.z": self.block // (grid[0] * grid[1]), "%ntid.x": np.full(len(lane), threads)}
        self.special |= {f"%nctaid.{axis}": np.full(len(lane), n) for axis, n in zip("xyz", grid, strict=True)}
        self.special = {name: value.astype(np.uint32) for name, value in self.special.items()}
        self.shared_size, self.shared_stride = shared, (shared + 63) // 64 * 64
        self.shared = np.full(programs * self.shared_stride, 0xFF, np.uint8)  # NaN until it is written
        self.parameters = dict(zip(program.parameters, [*values, *[0] * len(program.parameters)], strict=False))
        self.low = int(memory.begins.min()) // 64 * 64
        size = (int(memory.ends.max()) - self.low + 63) // 64 * 64
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.low))
        self.random = np.random.default_rng(seed)
        self.copies, self.products = Asynchronous(len(lane)), Asynchronous(len(lane))
        self.products_wait = bool(self.random.integers(2))
        self.sums: dict[str, np.ndarray] = {}
        """Of products, by the register that will have them."""
        self.unfinished: dict[str, np.ndarray] = {}
        """How many products of each lane a register waits for."""
        self.at = lane
        """The lanes at work."""
        self.next, self.state = np.zeros(len(lane), np.int64), np.full(len(lane), RUNS, np.int8)

    def run(self) -> None:
        """Until all threads have ended."""
        with np.errstate(all="ignore"):
            while len(running := np.flatnonzero(self.state == RUNS)) or np.any(self.state == WAITS):
                if not len(running):
                    self.state[self.state == WAITS] = RUNS
                    continue
                warp = self.random.choice(np.unique(self.warp[running]))
                while len(lanes := np.flatnonzero((self.state == RUNS) & (self.warp == warp))):
                    first = self.next[lanes].min()
                    self._go(lanes[self.next[lanes] == first], int(first))

    def _go(self, lanes: np.ndarray, at: int) -> None:
        """These lanes from the instruction `at` on, until their ways part, others may join them, or they wait or end."""
        while at < len(self.program.code):
            instruction = self.program.code[at]
            at += 1
            self.at = lanes
            if instruction.guard:
                self.at = lanes[self._predicate(instruction.guard) != instruction.negated]
            ends = instruction.name in ("bra", "ret") or (instruction.name, *instruction.parts) == ("bar", "sync")
            self.next[lanes] = at
            if instruction.name == "bra":
                self.next[self.at] = self.program.labels[instruction.operands[0]]
            elif ends:
                self.state[self.at] = ENDED if instruction.name == "ret" else WAITS
            elif len(self.at):
                self._do(instruction)
            if ends or at in self.program.joins:
                return
        self.state[lanes] = ENDED

    def _do(self, instruction: Instruction) -> None:
        if instruction.name in ARITHMETIC:
            function = partial(self._compute, ARITHMETIC[instruction.name])
        else:
            function = getattr(self, f"do_{instruction.name}", None)
        if function is None:
            raise LaunchError(f"the machine does not know {instruction.text}")
        try:
            function(instruction.parts, *instruction.operands)
        except (LaunchError, KeyError, TypeError, ValueError) as error:
            raise LaunchError(f"{instruction.text}: {error!r}") from error

    # operands, of the lanes at work

    def _register(self, name: str) -> np.ndarray:
        if name not in self.registers:
            kind = re.fullmatch(r"(%[a-z]+)\d+", name)
            if kind is None:
                raise LaunchError(f"the machine does not know {name}")
            self.registers[name] = np.zeros(len(self.warp), REGISTERS[kind[1]])
        return self.registers[name]

    def _predicate(self, operand: Any) -> np.ndarray:
        if isinstance(operand, int):
            return np.full(len(self.at), operand != 0)
        return self._register(operand)[self.at]

    def _bits(self, operand: Any, size: int) -> np.ndarray:
        """The lowest `size` bytes, as an unsigned integer."""
        if isinstance(operand, str):
            whole = self.special.get(operand)
            if whole is None:
                whole = np.zeros(len(self.warp), np.uint64) if operand == "global_smem" else self._register(operand)
            return whole[self.at].astype(BITS[size], copy=False)
        return np.full(len(self.at), int(operand) & (2 ** (8 * size) - 1), BITS[size])

    def _get(self, operand: Any, kind: str) -> np.ndarray:
        if kind == "pred":
            return self._predicate(operand)
        if kind == "bf16":
            return from_bfloat16(self._bits(operand, 2))
        return self._bits(operand, np.dtype(TYPES[kind]).itemsize).view(TYPES[kind])

    def _put(self, operand: str, value: np.ndarray) -> None:
        """Bits that a register has more of repeat the sign of a signed integer and are else zero. What is no register takes the
        part of a number that is not wanted."""
        if not operand.startswith("%"):
            return
        register = self._register(operand)
        if value.dtype.kind == "i":
            value = value.astype(f"i{register.itemsize}")
        if value.dtype != np.bool_:
            value = np.ascontiguousarray(value).view(BITS[value.itemsize])
        register[self.at] = value.astype(register.dtype, copy=False)

    def _cells(self, parts: tuple[str, ...], address: Address, size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(memory in cells of `size` bytes, the indices [lanes, count] of those that begin at `address`)."""
        at = self._bits(address.base, 8).astype(np.int64) + address.offset
        if np.any(at % (size * count)):
            raise LaunchError("an address is no multiple of what is read or written")
        if any(part.startswith("shared") for part in parts):
            if np.any((at < 0) | (at + size * count > self.shared_size)):
                raise LaunchError("outside of the shared memory")
            memory, at = self.shared, at + self.block[self.at] * self.shared_stride
        else:
            if not np.all(self.memory.holds(at, at + size * count)):
                raise LaunchError("outside of every tensor")
            memory, at = self.bytes, at - self.low
        return memory.view(BITS[size]), (at // size)[:, None] + np.arange(count)

    def _together(self) -> None:
        lanes = self.at.reshape(-1, THREADS) if len(self.at) % THREADS == 0 else np.zeros((1, 2))
        if np.any(lanes[:, 0] % THREADS) or np.any(np.diff(lanes, axis=1) != 1):
            raise LaunchError("not by all threads of a warp together")

    # memory

    def do_ld(self, parts, to, address):
        size, targets = np.dtype(TYPES[parts[-1]]).itemsize, to if isinstance(to, list) else [to]
        if "param" in parts:
            value = self.parameters[address.base]
            bits = np.float32(value).view(np.uint32) if isinstance(value, float) else value
            self._put(to, self._bits(bits, size).view(TYPES[parts[-1]]))
            return
        memory, cells = self._cells(parts, address, size, len(targets))
        values = memory[cells].view(TYPES[parts[-1]])
        for column, target in enumerate(targets):
            self._put(target, values[:, column])

    def do_st(self, parts, address, source):
        size, sources = np.dtype(TYPES[parts[-1]]).itemsize, source if isinstance(source, list) else [source]
        memory, cells = self._cells(parts, address, size, len(sources))
        for column, one in enumerate(sources):
            memory[cells[:, column]] = self._bits(one, size)

    def do_atom(self, parts, to, address, source):
        if "add" not in parts:
            raise LaunchError("no addition")
        memory, cells = self._cells(parts, address, np.dtype(TYPES[parts[-1]]).itemsize, 1)
        values, before = self._get(source, parts[-1]), []
        memory = memory.view(TYPES[parts[-1]])
        for cell, value in zip(cells[:, 0], values, strict=True):
            before.append(memory[cell])
            memory[cell] += value
        self._put(to, np.array(before, values.dtype))

    def do_cp(self, parts, to=None, source=None, size=0, wanted=None):
        """Asynchronous copies, where not `wanted` of zeros, and waiting for them."""
        if "commit_group" in parts:
            self.copies.groups[self.at] += 1
        elif "wait_group" in parts:
            self._finish(self.copies, to)
        else:
            cell = min(size, 8)
            memory, cells = self._cells(("shared",), to, cell, size // cell)
            values = self._copied(source, size, wanted)
            if self.random.integers(2):
                memory[cells] = values
                return

            def arrive(rows):
                memory[cells[rows]] = values[rows]

            memory[cells] = BITS[cell](2 ** (8 * cell) - 1)
            self.copies.begin(self.at, arrive)

    def _copied(self, source: Address, size: int, wanted: Any) -> np.ndarray:
        lanes, cell = self.at, min(size, 8)
        there = np.full(len(lanes), True) if wanted is None else self._bits(wanted, 4) != 0
        values = np.zeros((len(lanes), size // cell), BITS[cell])
        self.at = lanes[there]
        memory, places = self._cells(("global",), source, cell, size // cell)
        values[there] = memory[places]
        self.at = lanes
        return values

    def _finish(self, begun: Asynchronous, most: int) -> None:
        """For the lanes at work, until at most so many groups are left."""
        lanes = self.at
        for self.at, finish in begun.finished(lanes, most):
            finish()
        self.at = lanes

    def do_mov(self, parts, to, source):
        size = np.dtype(TYPES[parts[-1]]).itemsize if parts[-1] != "pred" else 0
        if isinstance(to, list):
            pieces = self._bits(source, size).view(BITS[size // len(to)]).reshape(-1, len(to))
            for column, target in enumerate(to):
                self._put(target, pieces[:, column])
        elif isinstance(source, list):
            pieces = np.stack([self._bits(one, size // len(source)) for one in source], 1)
            self._put(to, pieces.view(BITS[size])[:, 0])
        else:
            self._put(to, self._get(source, parts[-1]))

    # arithmetic

    def _compute(self, function: Callable, parts, to, *operands) -> None:
        """`function` of the operands in the type that `parts` end with, of both halves where it is one of two."""
        kind = parts[-1]
        if kind.endswith("x2"):
            halves = [self._bits(x, 4).view(TYPES.get(kind[:-2], np.uint16)) for x in operands]
            result = function(*(map(from_bfloat16, halves) if kind == "bf16x2" else halves))
            self._put(to, (to_bfloat16(result) if kind == "bf16x2" else result).view(np.uint32))
            return
        flush = flushed if "ftz" in parts else np.asarray
        result = function(*(flush(self._get(x, kind)) for x in operands))
        if kind == "bf16":
            result = to_bfloat16(result)
        self._put(to, flush(result.astype(TYPES[kind])) if kind in TYPES and kind != "bf16" else result)

    def do_min(self, parts, *operands):
        if "xorsign" in parts:  # of both without their signs, with the sign of the product
            self._compute(
                lambda a, b: np.copysign(np.minimum(abs(a), abs(b)), np.copysign(b, a) * np.copysign(1, b)),
                parts,
                *operands,
            )
            return
        self._compute(np.minimum if "NaN" in parts else np.fmin, parts, *operands)

    def do_max(self, parts, *operands):
        self._compute(np.maximum if "NaN" in parts else np.fmax, parts, *operands)

    def do_mul(self, parts, to, a, b):
        if "wide" in parts:
            self._put(to, self._wide_product(parts[-1], a, b))
        elif "hi" in parts:
            self._put(to, (self._wide_product(parts[-1], a, b) >> int(parts[-1][1:])).astype(TYPES[parts[-1]]))
        else:
            self._compute(np.multiply, parts, to, a, b)

    def do_mad(self, parts, to, a, b, c):
        if "wide" in parts:
            product = self._wide_product(parts[-1], a, b)
            self._put(to, product + self._bits(c, product.itemsize).view(product.dtype))
        else:
            self._compute(lambda a, b, c: a * b + c, parts, to, a, b, c)

    def _wide_product(self, kind: str, a: Any, b: Any) -> np.ndarray:
        """Of integers, in twice as many bits."""
        return np.multiply(*(self._get(x, kind).astype(TYPES[f"{kind[0]}{2 * int(kind[1:])}"]) for x in (a, b)))

    def _shift(self, function: Callable, parts, to, source, count) -> None:
        value, by = self._get(source, parts[-1]), self._bits(count, 4)
        bits = 8 * value.itemsize
        result = function(value, np.minimum(by, bits - 1).astype(value.dtype))
        keeps_sign = function is np.right_shift and value.dtype.kind == "i"
        self._put(to, result if keeps_sign else np.where(by < bits, result, value.dtype.type(0)))

    def do_shl(self, parts, *operands):
        self._shift(np.left_shift, parts, *operands)

    def do_shr(self, parts, *operands):
        self._shift(np.right_shift, parts, *operands)

    def do_bfe(self, parts, to, source, first, length):
        """`length` bits from `first` on, of a signed integer with their sign."""
        first, length = (self._bits(x, 1).astype(np.int64) for x in (first, length))
        part = self._get(source, parts[-1]).astype(np.int64) >> first & (1 << length) - 1
        negative = (parts[-1][0] == "s") & (length > 0) & (part >> np.maximum(length - 1, 0) & 1 == 1)
        self._put(to, np.where(negative, part - (1 << length), part).astype(TYPES[parts[-1]]))

    def do_popc(self, parts, to, source):
        size = np.dtype(TYPES[parts[-1]]).itemsize
        bits = np.unpackbits(self._bits(source, size).view(np.uint8).reshape(-1, size), 1)
        self._put(to, bits.sum(1, dtype=np.uint32))

    def do_prmt(self, parts, to, a, b, choice):
        """Four bytes of those of a and b, as many bits of `choice` each, of which the highest asks for a byte of its sign."""
        bytes_of = np.stack([self._bits(x, 4) for x in (a, b)], 1).view(np.int8)
        choice = self._bits(choice, 4)[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & 15
        taken = np.take_along_axis(bytes_of, (choice & 7).astype(np.int64), 1)
        self._put(to, np.where(choice & 8, taken >> 7, taken).astype(np.int8).view(np.uint32)[:, 0])

    def do_setp(self, parts, to, a, b, c=None):
        kind = parts[-1].replace("b", "u") if parts[-1] in TYPES else parts[-1]
        result = COMPARISONS[parts[0]](self._get(a, kind), self._get(b, kind))
        self._put(to, result if c is None else WITHIN_A_WARP[parts[1]](result, self._predicate(c)))

    def do_selp(self, parts, to, a, b, choice):
        self._put(to, np.where(self._predicate(choice), self._get(a, parts[-1]), self._get(b, parts[-1])))

    def do_cvt(self, parts, to, source, low=None):
        kind = parts[-2]
        if kind in ("bf16x2", "f16x2"):
            halves = [self._get(x, parts[-1]) for x in (low, source)]
            halves = [to_bfloat16(x) if kind == "bf16x2" else x.astype(np.float16).view(np.uint16) for x in halves]
            self._put(to, np.stack(halves, 1).view(np.uint32)[:, 0])
            return
        value = self._get(source, parts[-1])
        if value.dtype.kind == "f" and kind[0] != "f" and kind != "bf16":
            raise LaunchError("the machine makes no integers of floating point")
        self._put(to, to_bfloat16(value) if kind == "bf16" else value.astype(TYPES[kind]))

    # of a warp

    def do_shfl(self, parts, to, source, by, limit, members):
        self._together()
        lane, by, limit = self.at % THREADS, *(self._bits(x, 4).astype(np.int64) for x in (by, limit))
        segment = limit >> 8 & 31
        first, last = lane & segment, lane & segment | limit & 31 & ~segment
        other = {"bfly": lane ^ by, "up": lane - by, "down": lane + by, "idx": first | by & ~segment & 31}[parts[1]]
        there = other >= last if parts[1] == "up" else other <= last
        warp = np.arange(len(lane)) // THREADS * THREADS
        self._put(to, self._bits(source, 4)[warp + np.where(there, other, lane)])

    def do_redux(self, parts, to, source, members):
        self._together()
        values = self._get(source, parts[-1]).reshape(-1, THREADS)
        self._put(to, np.repeat(WITHIN_A_WARP[parts[1]].reduce(values, 1, values.dtype), THREADS))

    def do_vote(self, parts, to, source, members):
        self._together()
        if "ballot" not in parts:
            raise LaunchError("no ballot")
        votes = np.packbits(self._predicate(source).reshape(-1, THREADS), 1, bitorder="little")
        self._put(to, np.repeat(votes.view(np.uint32)[:, 0], THREADS))

    def do_bar(self, parts, members):
        """bar.warp.sync."""
        self._together()

    def do_ldmatrix(self, parts, to, address):
        """Matrices of 8 x 8 numbers of 16 bits, the rows' addresses in 8 threads each; a thread gets two neighbours of a row."""
        self._together()
        lanes = self.at
        for n, target in enumerate(to):
            self.at = lanes.reshape(-1, THREADS)[:, 8 * n : 8 * n + 8].reshape(-1)
            memory, cells = self._cells(("shared",), address, 2, 8)
            matrix = memory[cells].reshape(-1, 8, 8)
            self.at = lanes
            if "trans" in parts:
                matrix = np.ascontiguousarray(matrix.transpose(0, 2, 1))
            self._put(target, matrix.view(np.uint32).reshape(-1))

    def do_stmatrix(self, parts, address, sources):
        """The same back."""
        self._together()
        lanes = self.at
        for n, source in enumerate(sources):
            matrix = self._bits(source, 4).view(np.uint16).reshape(-1, 8, 8)
            self.at = lanes.reshape(-1, THREADS)[:, 8 * n : 8 * n + 8].reshape(-1)
            memory, cells = self._cells(("shared",), address, 2, 8)
            memory[cells] = (matrix.transpose(0, 2, 1) if "trans" in parts else matrix).reshape(-1, 8)
            self.at = lanes

    # matrix products. A thread's row is a quarter of its number, its columns are the rest's, two neighbours

    def do_mma(self, parts, to, a, b, c):
        """[16, 16] [16, 8] + [16, 8]."""
        self._together()
        _, _, shape, *_, kind, other, _ = parts
        if shape != "m16n8k16" or kind != other:
            raise LaunchError("the machine knows products of 16 bits alone")
        right = np.zeros((len(self.at) // THREADS, 16, 8))
        for n, operand in enumerate(b):
            for half in range(2):
                right[:, COLUMN + half + n * 8, ROW] = self._halves(operand, kind)[:, :, half]
        product = self._left(a, kind) @ right
        for n, target in enumerate(to):
            self._put(target, (self._get(c[n], "f32") + self._sums_of_a_thread(product, n)).astype(np.float32))

    def do_wgmma(self, parts, *operands):
        """[64, 16] [16, N] + [64, N] of four warps, begun or waited for."""
        self._together()
        if "commit_group" in parts:
            self.products.groups[self.at] += 1
        elif "wait_group" in parts:
            self._finish(self.products, *operands)
        elif "mma_async" in parts:
            self._begin_product(parts, *operands)

    def do_fence(self, parts):
        pass

    def _begin_product(self, parts, to, a, b, adds, sign_a, sign_b, *turned):
        """a: registers or a descriptor, b: a descriptor; `turned`: whether the descriptors' rows are the other dimension."""
        *_, shape, result, kind, other = parts
        if not re.fullmatch(r"m64n\d+k16", shape) or (result, kind, sign_a, sign_b) != ("f32", other, 1, 1):
            raise LaunchError("the machine knows products of 16 bits alone")
        adds = self._predicate(adds)
        first = 16 * (self.warp[self.at][::THREADS] % 4)
        left = None if isinstance(a, list) else self._described(a, first, 16, turned[0])
        right = self._described(b, 0 * first, 2 * len(to), turned[-1])
        for name in to:
            register = self._register(name)
            sums = self.sums.setdefault(name, np.zeros(len(register), np.float32))
            unfinished = self.unfinished.setdefault(name, np.zeros(len(register), np.int64))
            idle = self.at[unfinished[self.at] == 0]
            sums[idle] = register[idle].view(np.float32)
            unfinished[self.at] += 1
            register[self.at] = 2**32 - 1  # NaN

        def multiply(rows):
            warps = rows[::THREADS] // THREADS
            matrices = [self._shared_matrix(kind, cells[warps]) for cells in (left, right) if cells is not None]
            product = (self._left(a, kind) if left is None else matrices[0]) @ matrices[-1].transpose(0, 2, 1)
            for n, name in enumerate(to):
                before = np.where(adds[rows], self.sums[name][self.at], np.float32(0))
                self.sums[name][self.at] = before + self._sums_of_a_thread(product, n)

        def finish(rows):
            if self.products_wait:
                multiply(rows)
            for name in to:
                self.unfinished[name][self.at] -= 1
                done = self.at[self.unfinished[name][self.at] == 0]
                self._register(name)[done] = self.sums[name][done].view(np.uint32)

        if not self.products_wait:
            multiply(np.arange(len(self.at)))
        self.products.begin(self.at, finish)

    def _described(self, descriptor: str, first: np.ndarray, count: int, turned: int) -> np.ndarray:
        """Where a matrix lies in the shared memory: its rows from `first` on, one for each warp, 16 numbers each, as indices
        [warps, count, 16] of cells of 16 bits. A row is along the sum; `turned`: in memory its numbers are those of one column.
        Rows of memory are 32, 64 or 128 bytes, of which blocks of 16 change places by the row's number."""
        bits = self._bits(descriptor, 8).astype(np.int64)[::THREADS, None, None]
        begin, leading, stride = ((bits >> place & 0x3FFF) << 4 for place in (0, 16, 32))
        if np.any(bits >> 62 & 3 == 0) or np.any(bits >> 49 & 7):
            raise LaunchError("the machine knows matrices with swizzled rows alone, from a row's beginning on")
        width = 256 >> (bits >> 62 & 3)
        row, column = (first[:, None] + np.arange(count))[:, :, None], np.arange(16)
        if turned:
            at = begin + row * 2 // width * leading + row * 2 % width + column // 8 * stride + column % 8 * width
        else:
            at = begin + row // 8 * stride + row % 8 * width + column * 2
        at = at ^ (at >> 7 & width // 16 - 1) << 4
        if np.any((at < 0) | (at + 2 > self.shared_size)):
            raise LaunchError("outside of the shared memory")
        return (at + self.block[self.at][::THREADS, None, None] * self.shared_stride) // 2

    def _shared_matrix(self, kind: str, cells: np.ndarray) -> np.ndarray:
        return self._numbers(self.shared.view(np.uint16)[cells], kind).astype(np.float64)

    def _left(self, operands: list, kind: str) -> np.ndarray:
        """[warps, 16, 16]."""
        matrix = np.zeros((len(self.at) // THREADS, 16, 16))
        for n, operand in enumerate(operands):
            for half in range(2):
                matrix[:, ROW + n % 2 * 8, COLUMN + half + n // 2 * 8] = self._halves(operand, kind)[:, :, half]
        return matrix

    def _sums_of_a_thread(self, product: np.ndarray, n: int) -> np.ndarray:
        """What [warps, 16, N] has for each thread's register n."""
        return product[:, ROW + n % 4 // 2 * 8, COLUMN + n % 2 + n // 4 * 8].reshape(-1)

    def _halves(self, operand: str, kind: str) -> np.ndarray:
        """[warps, threads, 2]."""
        return self._numbers(self._bits(operand, 4).view(np.uint16).reshape(-1, THREADS, 2), kind)

    def _numbers(self, bits: np.ndarray, kind: str) -> np.ndarray:
        if kind not in ("bf16", "f16"):
            raise LaunchError("the machine knows products of 16 bits alone")
        return from_bfloat16(bits) if kind == "bf16" else bits.view(np.float16)


_seeds = count()


def run_launch(launch: Launch, seed: int | None = None, change: Callable[[str], str] = str, chip: str = CHIP) -> None:
    """What `Launch.run` does on a GPU, on CPU tensors. seed: another one each time, unless it is given. change: is given the
    kernel's PTX, and what it returns runs."""
    if 0 in launch.grid:
        return
    kernel, values = ahead.compiled_kernel(launch, chip), []
    for name, kind in kernel.src.signature.items():
        value = launch.arguments[name]
        if kind != "constexpr":
            values.append(
                value.data_ptr() if isinstance(value, Tensor) else float(value) if kind == "fp32" else int(value)
            )
    memory = Memory.of(living_tensors())
    threads, seed = THREADS * launch.options["num_warps"], next(_seeds) if seed is None else seed
    program = parse(change(kernel.asm["ptx"]))
    try:
        Machine(program, launch.grid, threads, kernel.metadata.shared, values, memory, seed).run()
    except LaunchError as error:
        raise LaunchError(f"{launch.kernel.__name__}: {error}") from error
