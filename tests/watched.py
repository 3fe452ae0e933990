"""Every launch in Triton's interpreter is watched for what breaks on a GPU alone.

The interpreter runs programs one after the other, and each instruction for all elements of a tile before the next one. So it
shows neither that programs or threads wait for nobody, nor that memory beside a tensor was read. `watch_launches` raises
LaunchError where a launch

- reads or writes outside of every tensor there is;
- has one program write what another one reads or writes;
- has a program write what it reads, or writes again, with no tl.debug_barrier between: its threads need not be at the same
  instruction. Exempt is what is read and then written by the same pointers, where each element has a thread of its own;
- writes different values to one address in one instruction;
- goes on with what a load with a mask has not read, where it names no value for it (it becomes NaN: the results show it);
- says tl.multiple_of of what is no multiple.

An atomic addition to one number, by every program of the launch once, lets the one that comes last read what all wrote before a
barrier and their addition; any other program that reads it is at fault. The number itself is for additions only. Other
atomics are no part of any kernel here, and refused. A barrier is taken for one of the whole program, as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from guard import living_tensors
from torch import Tensor
from triton._C.libtriton.ir import ATOMIC_OP, MEM_SEMANTIC, MEM_SYNC_SCOPE
from triton.runtime import interpreter

THREADS = 32  # of a warp
ADD = ATOMIC_OP.ADD


class LaunchError(AssertionError):
    """A launch that a GPU may run otherwise than the interpreter."""


class Addition(NamedTuple):
    """An atomic one. phase: how many barriers of its program were before it."""

    program: int
    phase: int
    address: int


class Access(NamedTuple):
    """One instruction of one program. phase: how many of its barriers, additions: how many of all programs' were before it."""

    store: bool
    program: int
    phase: int
    additions: int
    pointers: np.ndarray  # of the whole tile
    addresses: np.ndarray  # [n] of what is not masked
    itemsize: int
    line: str

    def __str__(self) -> str:
        return f"{'store' if self.store else 'load'} at {self.line}"


@dataclass
class Memory:
    """The storages of tensors: [begin, end) in bytes, sorted."""

    begins: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Memory:
        storages = {s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in tensors) if s.nbytes()}
        begins = np.array(sorted(storages), dtype=np.int64)
        return cls(begins, begins + np.array([storages[b] for b in begins.tolist()], dtype=np.int64))

    def holds(self, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Whether each [first, last) lies in one storage."""
        if not len(self.begins):
            return np.zeros(first.shape, dtype=bool)
        i = np.searchsorted(self.begins, first, "right") - 1
        return (i >= 0) & (last <= self.ends[i])

    def touched(self, addresses: np.ndarray) -> np.ndarray:
        """The storages [S] from that of the first address to that of the last."""
        return (self.begins <= addresses.max()) & (self.ends > addresses.min())


def _tensors(arguments: Iterable) -> list[Tensor]:
    found = []
    for x in arguments:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, tuple):
            found += _tensors(x)
    return found


def _line() -> str:
    """The innermost line that is neither triton's nor this file's."""
    frame = sys._getframe(1)
    while frame and ("/triton/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "?"


class Launch:
    """The accesses of the launch that runs."""

    def __init__(self, name: str, warps: int, tensors: list[Tensor]):
        self.name, self.warps = name, warps
        self.program = self.phase = -1
        self.accesses: list[Access] = []
        self.additions: list[Addition] = []
        self.memory, self.looked_everywhere = Memory.of(tensors), False

    def begin_program(self) -> None:
        self.program, self.phase = self.program + 1, 0

    def fault(self, what: str) -> LaunchError:
        return LaunchError(f"{self.name}: {what}")

    def access(self, store: bool, pointers: np.ndarray, mask: np.ndarray, itemsize: int) -> Access:
        """Note it down; raises LaunchError outside of all tensors, before it happens."""
        pointers = pointers.view(np.int64)
        mask = np.broadcast_to(mask, pointers.shape)
        addresses = pointers.ravel() if mask.all() else pointers[mask]
        access = self._here(store, pointers, addresses, itemsize)
        if len(addresses):
            self._expect_in_bounds(access)
            self.accesses.append(access)
        return access

    def _here(self, store: bool, pointers: np.ndarray, addresses: np.ndarray, itemsize: int) -> Access:
        return Access(store, self.program, self.phase, len(self.additions), pointers, addresses, itemsize, _line())

    def add(self, pointers: np.ndarray, mask: np.ndarray, itemsize: int, ordered: bool) -> None:
        """Note down an atomic addition; `ordered`: it acquires and releases."""
        pointers = pointers.view(np.int64)
        if pointers.size > 1 or not mask.all() or not ordered:
            raise self.fault(f"{_line()}: only one number is added to, by an addition that acquires and releases")
        self._expect_in_bounds(self._here(True, pointers, pointers.ravel(), itemsize))
        self.additions.append(Addition(self.program, self.phase, pointers.item()))

    def _expect_in_bounds(self, access: Access) -> None:
        span = access.addresses.min(keepdims=True), access.addresses.max(keepdims=True) + access.itemsize
        if self.memory.holds(*span).all():
            return
        inside = self.memory.holds(access.addresses, access.addresses + access.itemsize)
        if not inside.all() and not self.looked_everywhere:
            # kernels read the addresses of some from tables
            self.memory, self.looked_everywhere = Memory.of(living_tensors()), True
            inside = self.memory.holds(access.addresses, access.addresses + access.itemsize)
        if not inside.all():
            raise self.fault(
                f"program {self.program}: {access} of {np.count_nonzero(~inside)} elements outside of all tensors"
            )

    def expect_one_value(self, access: Access, values: np.ndarray, mask: np.ndarray) -> None:
        if len(access.addresses) < 2:
            return
        values = np.broadcast_to(values, access.pointers.shape)[np.broadcast_to(mask, access.pointers.shape)]
        order = np.argsort(access.addresses, kind="stable")
        addresses, values = access.addresses[order], values[order].view(f"u{values.itemsize}")
        if ((addresses[1:] == addresses[:-1]) & (values[1:] != values[:-1])).any():
            raise self.fault(f"program {self.program}: {access} writes different values to one address")

    def end(self) -> None:
        """Raises LaunchError for what programs, or the threads of one, do at the same time."""
        added_to = np.unique([addition.address for addition in self.additions])
        for access in self.accesses if len(added_to) else ():
            if np.isin(access.addresses, added_to).any():
                raise self.fault(f"program {access.program}: {access} of what programs add to")
        accesses = self._beside_stores()
        if not accesses:
            return
        address, index = _by_address(accesses)
        store = np.array([a.store for a in accesses])[index]
        program = np.array([a.program for a in accesses])[index]
        phase = np.array([a.phase for a in accesses])[index]
        starts = np.flatnonzero(np.r_[True, address[1:] != address[:-1]])
        written = np.repeat(np.logical_or.reduceat(store, starts), np.diff(np.r_[starts, len(address)]))
        address, index, store, program, phase = (x[written] for x in (address, index, store, program, phase))
        for distance in range(1, len(address)):
            first, second = slice(None, -distance), slice(distance, None)
            same = address[first] == address[second]
            if not same.any():
                return
            conflict = same & (store[first] | store[second]) & (index[first] != index[second])
            together = (program[first] != program[second]) | (phase[first] == phase[second])
            for a, b in np.unique(np.stack([index[first], index[second]])[:, conflict & together], axis=1).T:
                self._judge(accesses[a], accesses[b])

    def _beside_stores(self) -> list[Access]:
        """The accesses to storages that a store was to: most loads are of others."""
        touched = [self.memory.touched(a.addresses) for a in self.accesses]
        written = np.any([x for a, x in zip(self.accesses, touched, strict=True) if a.store], axis=0)
        return [a for a, x in zip(self.accesses, touched, strict=True) if (x & written).any()]

    def _judge(self, a: Access, b: Access) -> None:
        if a.program != b.program:
            if self._handed_over(*sorted((a, b), key=lambda access: access.additions)):
                return
            raise self.fault(f"programs {a.program} and {b.program} do not wait for each other: {a}, {b}")
        own_thread = self.warps == 1 or a.pointers.size >= self.warps * THREADS
        same_pointers = a.pointers.shape == b.pointers.shape and np.array_equal(a.pointers, b.pointers)
        if a.store or not (own_thread and same_pointers):
            raise self.fault(f"program {a.program}: no barrier between {a} and {b}")

    def _handed_over(self, a: Access, b: Access) -> bool:
        """Whether before b its program was the last of all to add to a number, once each; a's did so behind a and a barrier."""
        for address in {addition.address for addition in self.additions[: b.additions]}:
            before = [addition for addition in self.additions[: b.additions] if addition.address == address]
            all_once = len(before) == len({addition.program for addition in before}) == self.program + 1
            last = before[-1].program == b.program
            released = any((x.program, x.address) == (a.program, address) and x.phase > a.phase
                           for x in self.additions[a.additions :])  # fmt: skip
            if all_once and last and released:
                return True
        return False


def _by_address(accesses: list[Access]) -> tuple[np.ndarray, np.ndarray]:
    """Each address and the number of an access to it, sorted by both; by bytes where elements are of different sizes."""
    sizes = {a.itemsize for a in accesses}
    step = sizes.pop() if len(sizes) == 1 else 1
    bytes_of = [(a.addresses[:, None] + np.arange(0, a.itemsize, step)).ravel() for a in accesses]
    index = np.repeat(np.arange(len(accesses)), [len(x) for x in bytes_of])
    address = np.concatenate(bytes_of)
    order = np.argsort(address, kind="stable")
    return address[order], index[order]


_now: list[Launch] = []
"""The launch that runs, if one does."""


def watch_launches() -> None:
    """From now on, in this process."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    run, begin = executor.__call__, builder.set_grid_idx
    load, store, add = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw

    def watched_run(self, *arguments, **options):
        tensors = _tensors([*arguments, *options.values()])
        _now.append(Launch(self.fn.__name__, options.get("num_warps", 4), tensors))
        try:
            run(self, *arguments, **options)
            _now[-1].end()
        finally:
            _now.pop()

    def watched_begin(self, x, y, z):
        _now[-1].begin_program()
        begin(self, x, y, z)

    def watched_load(self, pointers, mask, other, *how, **options):
        _now[-1].access(False, pointers.data, _bools(mask), _itemsize(pointers))
        return load(self, pointers, mask, _anything(pointers) if other is None else other, *how, **options)

    def watched_store(self, pointers, value, mask, *how, **options):
        access = _now[-1].access(True, pointers.data, _bools(mask), _itemsize(pointers))
        _now[-1].expect_one_value(access, value.data, _bools(mask))
        return store(self, pointers, value, mask, *how, **options)

    def watched_barrier(self):
        _now[-1].phase += 1

    def watched_addition(self, operation, pointers, value, mask, sem, scope):
        ordered = operation == ADD and sem == MEM_SEMANTIC.ACQUIRE_RELEASE and scope == MEM_SYNC_SCOPE.GPU
        _now[-1].add(pointers.data, _bools(mask), _itemsize(pointers), ordered)
        return add(self, operation, pointers, value, mask, sem, scope)

    def refuse(self, *arguments):
        raise _now[-1].fault(f"{_line()}: compare and swap is not watched")

    executor.__call__, builder.set_grid_idx, builder.create_barrier = watched_run, watched_begin, watched_barrier
    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    builder.create_atomic_rmw, builder.create_atomic_cas = watched_addition, refuse
    interpreter.TensorHandle.set_attr = _set_attr


def _bools(mask) -> np.ndarray:
    """Integers, which the interpreter refuses in a moment, numpy would take for indices."""
    return mask.data.astype(bool)


def _anything(pointers) -> interpreter.TensorHandle:
    """In place of what a load with a mask does not read and has no value for: NaN, of integers the largest."""
    kind = pointers.get_element_ty()
    dtype = interpreter._get_np_dtype(kind)
    value = np.nan if dtype.kind == "f" else dtype.kind == "b" or np.iinfo(dtype).max
    return interpreter.TensorHandle(np.full(pointers.data.shape, value, dtype), kind)


def _itemsize(pointers) -> int:
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


def _set_attr(self, key, value) -> None:
    """tl.multiple_of, max_contiguous and max_constancy of a tensor."""
    self.attr[key] = value
    if key == "tt.divisibility" and (self.data.size > 1 or self.data.item() % value[0]):
        raise _now[-1].fault(f"{_line()}: no multiple of {value[0]}")
