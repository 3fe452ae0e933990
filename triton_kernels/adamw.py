"""Triton kernels of dsfast.ops.adamw, whose module has the maths: all tensors in one launch.

T tensors, cut into B blocks of up to BLOCK elements; P programs of the norm.

A table in device memory has a row for each block: where its part of each tensor lies, how many elements it has, which
tensor's learning rate it takes, the weight decay. It is made from addresses and sizes, and kept for the next call with the
same ones. What changes from step to step (learning rates, step, clip factor) may lie in device memory, so that a captured
CUDA graph stays valid: then a launch holds nothing that the host computes.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from dsfast.triton_kernels.launch import Launch, multiprocessors, on_meta
from dsfast.triton_kernels.pieces import options
from torch import Tensor

BLOCK = 2048  # elements of a block: sixteen for each thread of four warps. Nobody has measured it
MOST_PARTS = 2048  # of the norm
COLUMNS = 7  # of the update's table: param, grad, exp_avg, exp_avg_sq, elements, tensor, bits of the weight decay
NORM_COLUMNS = 2  # grad, elements


@triton.jit
def _elements(address, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to the BLOCK float32 from `address` on; ALIGNED: it is a multiple of 16 bytes."""
    p = address.to(tl.pointer_type(tl.float32))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p + tl.arange(0, BLOCK)


@triton.jit
def _correction(n, log2_beta):
    """1 - beta^n for n >= 1, else NaN. In float64: beta^n is near 1 in the first steps, and float32 would cancel."""
    power = tl.exp2(n.to(tl.float64) * log2_beta)
    return tl.where(n >= 1, 1.0 - power, float("nan")).to(tl.float32)


@triton.jit
def _update(
    row, count, rate, shrink, clip_scale, beta1, rest1, beta2, rest2, by_correction2, eps,
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block: all BLOCK elements, or where MASKED the first `count`."""
    p_p = _elements(tl.load(row), BLOCK, ALIGNED)
    p_g = _elements(tl.load(row + 1), BLOCK, ALIGNED)
    p_m = _elements(tl.load(row + 2), BLOCK, ALIGNED)
    p_v = _elements(tl.load(row + 3), BLOCK, ALIGNED)
    mask = tl.arange(0, BLOCK) < count if MASKED else None
    b_p, b_g = tl.load(p_p, mask=mask), tl.load(p_g, mask=mask) * clip_scale
    b_m, b_v = tl.load(p_m, mask=mask), tl.load(p_v, mask=mask)
    b_m = beta1 * b_m + rest1 * b_g
    b_v = beta2 * b_v + rest2 * (b_g * b_g)
    b_p = b_p * shrink - rate * b_m / (tl.sqrt(b_v * by_correction2) + eps)
    tl.store(p_p, b_p, mask=mask)
    tl.store(p_m, b_m, mask=mask)
    tl.store(p_v, b_v, mask=mask)


@triton.jit
def adamw_kernel(
    table, lrs, device_step, device_clip_scale, correction1, correction2, clip_scale, beta1, rest1, log2_beta1,
    beta2, rest2, log2_beta2, eps, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Updates one block in place. A device_step replaces both corrections, a device_clip_scale the clip_scale."""
    row = table + tl.program_id(0).to(tl.int64) * COLUMNS
    count = tl.load(row + 4)
    lr = tl.load(lrs + tl.load(row + 5))
    decay = tl.load(row + 6).to(tl.int32).to(tl.float32, bitcast=True)
    if device_step is not None:
        n = tl.load(device_step)
        correction1, correction2 = _correction(n, log2_beta1), _correction(n, log2_beta2)
    if device_clip_scale is not None:
        clip_scale = tl.load(device_clip_scale)
        count = tl.where(tl.abs(clip_scale) < float("inf"), count, 0)  # not finite: nothing is read or written
    if count == BLOCK:  # without a mask memory is read 16 bytes at a time
        _update(
            row, count, lr / correction1, 1 - lr * decay, clip_scale, beta1, rest1, beta2, rest2, 1 / correction2, eps,
            BLOCK, ALIGNED, False,
        )  # fmt: skip
    else:
        _update(
            row, count, lr / correction1, 1 - lr * decay, clip_scale, beta1, rest1, beta2, rest2, 1 / correction2, eps,
            BLOCK, ALIGNED, True,
        )  # fmt: skip


@triton.jit(do_not_specialize=["B"])
def norm_kernel(table, parts, B, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """This program's part of the sum of squares, in float64: blocks p, p + P, p + 2 P ..."""
    p, programs = tl.program_id(0), tl.num_programs(0)
    b_sum = tl.zeros([BLOCK], tl.float64)
    for t in range(tl.cdiv(B - p, programs)):
        row = table + (p + t * programs).to(tl.int64) * COLUMNS
        p_g, count = _elements(tl.load(row), BLOCK, ALIGNED), tl.load(row + 1)
        if count == BLOCK:  # noqa: SIM108 (two loads, not one under a mask)
            b_g = tl.load(p_g)
        else:
            b_g = tl.load(p_g, mask=tl.arange(0, BLOCK) < count, other=0.0)
        b_sum += b_g.to(tl.float64) * b_g.to(tl.float64)
    tl.store(parts + p, tl.sum(b_sum, 0))


@triton.jit(do_not_specialize=["P"])
def clip_kernel(parts, norm, scale, max_norm, P, BP: tl.constexpr):
    """norm from its P parts, and the factor that makes it max_norm at most: NaN where the norm is not finite."""
    p = tl.arange(0, BP)
    b_norm = tl.sqrt(tl.sum(tl.load(parts + p, mask=p < P, other=0.0), 0))
    b_scale = tl.where(b_norm > max_norm, max_norm / b_norm, 1.0)
    tl.store(norm, b_norm)
    tl.store(scale, tl.where(b_norm < float("inf"), b_scale, float("nan")).to(tl.float32))


class Entry(NamedTuple):
    """A tensor in device memory, and what its copy is waited for by (None without a GPU)."""

    tensor: Tensor
    copied: torch.cuda.Event | None


class Kept:
    """Small tensors that launches read, in device memory, by what they were made from; beyond `most` the oldest go.

    A captured graph reads them at each replay. So nothing is made during a capture, whose copy would not have run, and what
    a capture has read is kept for as long as the process lives: 56 bytes for 2048 parameters.
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
                    "adamw: a CUDA graph is being captured, and what the kernels need to know of these tensors must be in device"
                    " memory before: make the same call once ahead of the capture, with the same tensors, contiguous gradients,"
                    " and learning rates that are a tensor or the same numbers"
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


_kept = Kept(most=16)


def adamw(
    params, grads, exp_avgs, exp_avg_sqs, lrs, device_lrs, weight_decays, beta1, beta2, eps, step, device_step,
    clip_scale, device_clip_scale,
) -> None:  # fmt: skip
    """As dsfast.ops.adamw: a device_... that is not None stands for the number, or list of numbers, before it.

    Raises TypeError unless all tensors are float32, and RuntimeError as `Kept.get` during the capture of a CUDA graph.
    """
    _check(params)
    grads, device = [g.contiguous() for g in grads], params[0].device
    with torch.cuda.device_of(params[0]):
        table, blocks, aligned = _table((params, grads, exp_avgs, exp_avg_sqs), weight_decays)
        if not blocks:
            return
        if device_lrs is None:
            device_lrs = _kept.get((device, *lrs), lambda: torch.tensor(lrs, dtype=torch.float32), device)
        adamw_launch(
            table, blocks, aligned, device_lrs, beta1, beta2, eps, step, device_step, clip_scale, device_clip_scale
        ).run()


def grad_clip(grads: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    """Norm (float64) and clip_scale (float32), both without dimension; as dsfast.ops.grad_clip. Errors as `adamw`."""
    _check(grads)
    grads, device = [g.contiguous() for g in grads], grads[0].device
    norm, scale = grads[0].new_empty((), dtype=torch.float64), grads[0].new_empty(())
    with torch.cuda.device_of(norm):
        table, blocks, aligned = _table((grads,))
        parts = norm.new_empty(min(blocks, MOST_PARTS, 8 * multiprocessors(device)))
        for launch in grad_clip_launches(table, blocks, aligned, max_norm, parts, norm, scale):
            launch.run()
    return norm, scale


def adamw_launch(
    table, blocks, aligned, lrs, beta1, beta2, eps, step, device_step, clip_scale, device_clip_scale
) -> Launch:
    """The launch for a table [B, COLUMNS]; tensors may lie on the meta device."""
    numbers = {"beta1": beta1, "rest1": 1 - beta1, "beta2": beta2, "rest2": 1 - beta2, "eps": eps}
    arguments = {
        "table": table, "lrs": lrs.contiguous(), "device_step": device_step, "device_clip_scale": device_clip_scale,
        "correction1": 1 - beta1**step, "correction2": 1 - beta2**step, "clip_scale": clip_scale, **numbers,
        "log2_beta1": _log2(beta1), "log2_beta2": _log2(beta2), "COLUMNS": COLUMNS, "BLOCK": BLOCK, "ALIGNED": aligned,
    }  # fmt: skip
    return Launch(adamw_kernel, (blocks,), arguments, options(4), 4, 0)


def grad_clip_launches(table, blocks, aligned, max_norm: float, parts, norm, scale) -> list[Launch]:
    """The kernel that fills parts, a program for each (none without blocks), and the one that fills norm and scale."""
    sums = {"table": table, "parts": parts, "B": blocks, "COLUMNS": NORM_COLUMNS, "BLOCK": BLOCK, "ALIGNED": aligned}
    clip = {
        "parts": parts, "norm": norm, "scale": scale, "max_norm": float(max_norm), "P": parts.size(0), "BP": MOST_PARTS,
    }  # fmt: skip
    launches = [Launch(norm_kernel, (parts.size(0),), sums, options(4), 4, 0)] if blocks else []
    return [*launches, Launch(clip_kernel, (1,), clip, options(4), 4, 0)]


def _check(tensors: Sequence[Tensor]) -> None:
    for x in tensors:
        if x.dtype != torch.float32 or x.device != tensors[0].device:
            raise TypeError(
                f"adamw: the Triton kernels take float32 on one device, got {str(x.dtype).removeprefix('torch.')} on {x.device}"
            )


def _table(columns: Sequence[Sequence[Tensor]], decays: Sequence[float] | None = None) -> tuple[Tensor, int, bool]:
    """Table of the tensors of each column, in device memory; its number of blocks; whether all blocks are aligned."""
    sizes = tuple(x.numel() for x in columns[0])
    addresses = tuple(tuple(x.data_ptr() for x in tensors) for tensors in columns)
    decays = None if decays is None else tuple(decays)
    aligned = not any(a % 16 for column in addresses for a, size in zip(column, sizes, strict=True) if size)
    device = columns[0][0].device
    table = _kept.get((device, sizes, addresses, decays), lambda: build_table(addresses, sizes, decays), device)
    return table, table.size(0), aligned


def build_table(addresses: Sequence[Sequence[int]], sizes: Sequence[int], decays: Sequence[float] | None) -> Tensor:
    """int64 [B, columns], see COLUMNS and, without `decays`, NORM_COLUMNS: each column's tensors begin at `addresses`."""
    elements = torch.tensor(sizes, dtype=torch.int64)
    blocks = (elements + BLOCK - 1) // BLOCK
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), blocks)  # [B]
    before = (torch.arange(len(tensor)) - (blocks.cumsum(0) - blocks)[tensor]) * BLOCK
    columns = [torch.tensor(column, dtype=torch.int64)[tensor] + 4 * before for column in addresses]
    columns.append((elements[tensor] - before).clamp(max=BLOCK))
    if decays is not None:
        bits = torch.tensor(decays, dtype=torch.float32).view(torch.int32).long()
        columns += [tensor, bits[tensor]]
    return torch.stack(columns, 1)


def _log2(beta: float) -> float:
    return math.log2(beta) if beta > 0 else -math.inf


EXAMPLES = {
    "500K": ((8000 * 32, 32 * 128, *[128] * 5, 128 * 192, 128 * 48, 32 * 256, 128 * 128, 2 * 128 * 192), True),
    "DeepSeek-V3": ((2**31 + 1,), True),
    "unaligned": ((3, 2049), False),
}
"""Elements of each tensor, and whether all begin at a multiple of 16 bytes, in launches that are compiled ahead."""


def example_launches(size: str, dtype: torch.dtype, large: bool) -> dict[str, Launch]:
    """Kernel and variant -> launch at EXAMPLES[size], on the meta device; float32 whatever the dtype."""
    empty = on_meta(torch.float32)
    sizes, aligned = EXAMPLES[size]
    blocks, settings = sum(triton.cdiv(n, BLOCK) for n in sizes), (0.9, 0.95, 1e-8)
    table, lrs = empty(blocks, COLUMNS, dtype=torch.int64), empty(len(sizes))
    parts, norm = empty(min(blocks, 8 * 132), dtype=torch.float64), empty((), dtype=torch.float64)
    numbers = adamw_launch(table, blocks, aligned, lrs, *settings, 3, None, 0.7, None)
    tensors = adamw_launch(table, blocks, aligned, lrs, *settings, 1, empty((), dtype=torch.int64), 1.0, empty(()))
    others = grad_clip_launches(table, blocks, aligned, 1.0, parts, norm, empty(()))
    found = {"adamw_kernel": numbers, "adamw_kernel, step and clip on the device": tensors}
    return found | {launch.kernel.__name__: launch for launch in others}
