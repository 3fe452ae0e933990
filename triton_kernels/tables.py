"""Tables in device memory that say where many tensors lie, so that one launch takes them all.

T tensors of float32, cut into B blocks of up to BLOCK elements. A table is int64 [B, columns], a row for each block: how many
elements it has, the first of them, the address of each tensor the block is of, and what else a kernel wants to know of it.
It is made from addresses and sizes alone, and kept for the next call with the same ones.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Elements of a block: sixteen for each thread of four warps. Not tuned on a GPU."""
NOWHERE = 0
"""The address of a tensor that is not there."""


@triton.jit
def elements(address, first, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to BLOCK float32 of the tensor at `address`, from element `first` on; ALIGNED: it is a multiple of 16 bytes."""
    p = address.to(tl.pointer_type(tl.float32)) + first
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p + tl.arange(0, BLOCK)


@triton.jit
def as_float(bits):
    """The float32 that `float_bits` wrote."""
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


def float_bits(values: Sequence[float]) -> list[int]:
    """float32 numbers as a table holds them."""
    return list(memoryview(array("f", values)).cast("B").cast("i"))


def build_table(sizes: Sequence[int], *columns: Sequence[int]) -> Tensor:
    """[B, 2 + columns] of T tensors with `sizes` elements; columns: a number of each tensor, such as an address."""
    counts = torch.tensor(sizes, dtype=torch.int64)
    blocks = (counts + BLOCK - 1) // BLOCK
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), blocks)  # [B]
    first = (torch.arange(len(tensor)) - (blocks.cumsum(0) - blocks)[tensor]) * BLOCK
    values = [torch.tensor(column, dtype=torch.int64)[tensor] for column in columns]
    return torch.stack([(counts[tensor] - first).clamp(max=BLOCK), first, *values], 1)


def table_of(
    tensors: Sequence[Sequence[Tensor | None]],
    sizes: Sequence[int],
    columns: Sequence[Sequence[int]],
    device: torch.device,
) -> tuple[Tensor, bool]:
    """The table of `tensors` (for each of their addresses a column, None: NOWHERE) and further `columns`, on `device`; and
    whether all of them begin at a multiple of 16 bytes. Raises RuntimeError as `DeviceCache.get`."""
    addresses = tuple(tuple(NOWHERE if x is None else x.data_ptr() for x in column) for column in tensors)
    sizes, columns = tuple(sizes), tuple(map(tuple, columns))
    aligned = not any(a % 16 for column in addresses for a, size in zip(column, sizes, strict=True) if size)
    table = _kept.get((device, sizes, addresses, columns), lambda: build_table(sizes, *addresses, *columns), device)
    return table, aligned


class Entry(NamedTuple):
    """A tensor in device memory, and what its copy is waited for by (None without a GPU)."""

    tensor: Tensor
    copied: torch.cuda.Event | None


class DeviceCache:
    """Small tensors that launches read, in device memory, by what they were made from; beyond `most` the oldest go.

    A captured graph reads them at each replay. So nothing is made during a capture, whose copy would not have run, and what
    a capture has read is kept for as long as the process lives: 64 bytes for 2048 parameters.
    """

    def __init__(self, most: int):
        self.most = most
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._captured: dict[Hashable, Entry] = {}

    def get(self, key: Hashable, make: Callable[[], Tensor], device: torch.device) -> Tensor:
        """What `make` returned for `key`, on `device`; the host does not wait for the copy.

        Raises RuntimeError during the capture of a CUDA graph if it was not made before.
        """
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        entry = self._captured.get(key) or self._entries.get(key)
        if capturing:
            if entry is None:
                raise RuntimeError(
                    "a CUDA graph is being captured, and what the kernels need to know of these tensors must be in device memory"
                    " before: make the same call once ahead of the capture, with the same numbers and tensors and contiguous"
                    " gradients"
                )
            self._captured[key] = entry  # its copy has run: torch.cuda.graph waits for the device before it captures
        elif entry is None:
            entry = self._entries[key] = _copy(make(), device)
        elif entry.copied is not None:
            stream = torch.cuda.current_stream(device)
            stream.wait_event(entry.copied)  # another stream may have made the copy
            entry.tensor.record_stream(stream)
        if key in self._entries:
            self._entries.move_to_end(key)
        if len(self._entries) > self.most:
            self._entries.popitem(last=False)
        return entry.tensor


def _copy(x: Tensor, device: torch.device) -> Entry:
    if device.type != "cuda":
        return Entry(x.to(device), None)
    with torch.cuda.device(device):
        moved, copied = x.pin_memory().to(device, non_blocking=True), torch.cuda.Event()
        copied.record()
    return Entry(moved, copied)


_kept = DeviceCache(most=16)
