"""Triton kernels of dsfast.ops.after_step. L routers, E experts, P places of steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from dsfast.triton_kernels.launch import Launch, aside, on_meta
from dsfast.triton_kernels.pieces import options
from dsfast.triton_kernels.tables import is_finite, table_of
from torch import Tensor

COLUMNS = 3  # of the biases' table: elements, first, bias
COPIED = 1024  # numbers of the loads at a time


@triton.jit
def bias_kernel(table, loads, device_clip_scale, clip_scale, speed, E, COLUMNS: tl.constexpr, EP: tl.constexpr):
    """The bias of one router, in place: its row of loads [L, E]."""
    router = tl.program_id(0).to(tl.int64)
    if device_clip_scale is not None:
        clip_scale = tl.load(device_clip_scale)
    e = tl.arange(0, EP)
    p_bias = tl.load(table + router * COLUMNS + 2).to(tl.pointer_type(tl.float32)) + e
    b_load = tl.load(loads + router * E + e, mask=e < E, other=0)
    below = tl.sum(b_load, 0) - b_load * E  # E times how far: integers, as a mean would be rounded
    b_step = speed * ((below > 0).to(tl.float32) - (below < 0).to(tl.float32))
    mask = e < tl.where(is_finite(clip_scale), E, 0)
    tl.store(p_bias, tl.load(p_bias, mask=mask) + b_step, mask=mask)


@triton.jit(do_not_specialize=["P"])
def record_kernel(
    place, update, measured, loads, loss, norm, lr_scale, clip_scale, load, P, COUNT, BLOCK: tl.constexpr
):
    """One program. COUNT: loads of a step."""
    p, number = tl.load(place), tl.load(update)
    good = is_finite(tl.load(clip_scale))
    known = (p >= 0) & (p < P)
    row = measured + p * 4
    tl.store(row, tl.load(loss).to(tl.float64), mask=known)
    tl.store(row + 1, tl.load(norm), mask=known)
    tl.store(row + 2, tl.load(lr_scale), mask=known)
    tl.store(row + 3, good.to(tl.float64), mask=known)
    count = tl.where(known, COUNT, 0)
    for begin in range(0, count, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        tl.store(loads + p * COUNT + i, tl.load(load + i, mask=i < count), mask=i < count)
    tl.debug_barrier()  # every thread has read them
    tl.store(place, p + 1)
    tl.store(update, number + good.to(tl.int64))


def update_bias(
    biases: Sequence[Tensor], loads: Tensor, speed: float, clip_scale: float, device_clip_scale: Tensor | None
) -> None:
    """As dsfast.ops.update_bias. Raises RuntimeError as `tables.DeviceCache.get` during the capture of a CUDA graph."""
    experts = loads.size(1)
    with torch.cuda.device_of(loads):
        table, _ = table_of((biases,), [experts] * len(biases), (), loads.device)
        aside(([bias_launch(table, loads, speed, clip_scale, device_clip_scale)], biases))


def bias_launch(table, loads, speed: float, clip_scale: float, device_clip_scale) -> Launch:
    """The launch that updates the biases of `table` [L, COLUMNS]; tensors may lie on the meta device."""
    experts = loads.size(1)
    arguments = {
        "table": table, "loads": loads.contiguous(), "device_clip_scale": device_clip_scale, "clip_scale": clip_scale,
        "speed": speed, "E": experts, "COLUMNS": COLUMNS, "EP": triton.next_power_of_2(experts),
    }  # fmt: skip
    return Launch(bias_kernel, (table.size(0),), arguments, options(1), 4, 0)


def record_step(
    place: Tensor, update: Tensor, measured: Tensor, loads: Tensor, loss: Tensor, norm: Tensor, lr_scale: Tensor,
    clip_scale: Tensor, load: Tensor,
) -> None:  # fmt: skip
    """As dsfast.ops.record_step."""
    with torch.cuda.device_of(measured):
        record_launch(place, update, measured, loads, loss, norm, lr_scale, clip_scale, load).run()


def record_launch(place, update, measured, loads, loss, norm, lr_scale, clip_scale, load) -> Launch:
    """The launch that keeps and counts a step; tensors may lie on the meta device."""
    tensors = {
        "place": place, "update": update, "measured": measured, "loads": loads, "loss": loss, "norm": norm,
        "lr_scale": lr_scale, "clip_scale": clip_scale, "load": load.contiguous(),
    }  # fmt: skip
    sizes = {"P": measured.size(0), "COUNT": load.numel(), "BLOCK": COPIED}
    return Launch(record_kernel, (1,), tensors | sizes, options(4), 4, 0)


EXAMPLES = {"500K": (2, 2), "DeepSeek-V3": (58, 256)}
"""Routers and experts that are compiled ahead."""


def example_launches(size: str, dtype: torch.dtype, large: int) -> dict[str, Launch]:
    """Kernel -> launch at EXAMPLES[size], on the meta device; `dtype`: of the loss."""
    empty, (routers, experts), places = on_meta(torch.float32), EXAMPLES[size], 200
    place, update, load = (empty(s, dtype=torch.int64) for s in ((1,), (), (routers, experts)))
    number, measured = empty((), dtype=torch.float64), empty(places, 4, dtype=torch.float64)
    loads, table = empty(places, *load.shape, dtype=torch.int64), empty(routers, COLUMNS, dtype=torch.int64)
    return {
        "bias_kernel": bias_launch(table, load, 0.001, 1.0, empty(())),
        "record_kernel": record_launch(
            place, update, measured, loads, empty((), dtype=dtype), number, number, empty(()), load
        ),
    }
