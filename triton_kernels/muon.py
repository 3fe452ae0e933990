"""Triton kernels of dsfast.ops.muon, whose module has the maths: what comes before `newton_schulz` and what after it, a launch
each for all parameters, by a table (dsfast.triton_kernels.tables).

What newton_schulz takes lies matrix by matrix in one flat tensor, shorter side first: tall matrices are turned on the way there
and back.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from dsfast.triton_kernels.launch import Launch, on_meta
from dsfast.triton_kernels.pieces import options
from dsfast.triton_kernels.tables import BLOCK, NOWHERE, as_float, elements, float_bits, is_finite, table_of
from torch import Tensor

COLUMNS = 9  # elements, first, param, grad, momentum, begin, rows, cols, bits of an update's length
_MISSING = tl.constexpr(NOWHERE)


@triton.jit
def _begin(row, device_clip_scale, clip_scale, BLOCK: tl.constexpr):
    """A block's number of elements, none where the clip factor is not finite; where they stand in what newton_schulz
    takes; the clip factor."""
    count, first, begin = tl.load(row), tl.load(row + 1), tl.load(row + 5)
    rows, cols = tl.load(row + 6), tl.load(row + 7)
    if device_clip_scale is not None:
        clip_scale = tl.load(device_clip_scale)
        count = tl.where(is_finite(clip_scale), count, 0)
    at = first + tl.arange(0, BLOCK)
    if rows > cols:
        matrix = at // (rows * cols) * (rows * cols)
        at = matrix + (at - matrix) % cols * rows + (at - matrix) // cols
    return count, begin + at, clip_scale


@triton.jit
def momentum_kernel(
    table, update, device_clip_scale, clip_scale, momentum, rest,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One block of momenta, in place, and of `update`, what is to be orthogonalised. rest: 1 - momentum."""
    row = table + tl.program_id(0).to(tl.int64) * COLUMNS
    count, at, clip_scale = _begin(row, device_clip_scale, clip_scale, BLOCK)
    first, grad, i = tl.load(row + 1), tl.load(row + 3), tl.arange(0, BLOCK)
    mask = i < count
    p_m = elements(tl.load(row + 4), first, BLOCK, ALIGNED)
    m_g = i < tl.where(grad == _MISSING, 0, count)
    b_g = tl.load(elements(grad, first, BLOCK, ALIGNED), mask=m_g, other=0.0) * clip_scale
    b_m = momentum * tl.load(p_m, mask=mask) + rest * b_g
    tl.store(p_m, b_m, mask=mask)
    tl.store(update + at, (momentum * b_m + rest * b_g).to(update.dtype.element_ty), mask=mask)


@triton.jit
def apply_kernel(
    table, direction, device_clip_scale, device_lr_scale, lr, lr_scale, weight_decay,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One block of parameters, in place. device_lr_scale replaces lr_scale."""
    row = table + tl.program_id(0).to(tl.int64) * COLUMNS
    count, at, _ = _begin(row, device_clip_scale, 1.0, BLOCK)
    mask = tl.arange(0, BLOCK) < count
    if device_lr_scale is not None:
        lr_scale = tl.load(device_lr_scale).to(tl.float32)
    lr *= lr_scale
    p_w = elements(tl.load(row + 2), tl.load(row + 1), BLOCK, ALIGNED)
    b_o = tl.load(direction + at, mask=mask).to(tl.float32) * as_float(tl.load(row + 8))
    tl.store(p_w, tl.load(p_w, mask=mask) * (1 - lr * weight_decay) - lr * b_o, mask=mask)


def table_for(params, grads, momenta, sizes, begins, lengths) -> tuple[Tensor, bool, int]:
    """Table [B, COLUMNS] of the parameters, whether all of them are aligned, and how many elements they have together.

    sizes, begins, lengths: as dsfast.ops.muon.Layout. Raises RuntimeError as `tables.DeviceCache.get` during the capture
    of a CUDA graph.
    """
    with torch.cuda.device_of(params[0]):
        counts = [w.numel() for w in params]
        columns = begins, [rows for _, rows, _ in sizes], [cols for _, _, cols in sizes], float_bits(lengths)
        return *table_of((params, grads, momenta), counts, columns, params[0].device), sum(counts)


def momentum(
    table: tuple[Tensor, bool, int], momentum: float, clip_scale: float, device_clip_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """Update the momenta; what is to be orthogonalised, in `dtype`, as newton_schulz takes it."""
    update = table[0].new_empty(table[2], dtype=dtype)
    with torch.cuda.device_of(update):
        momentum_launch(*table[:2], update, momentum, clip_scale, device_clip_scale).run()
    return update


def apply(
    table: tuple[Tensor, bool, int], direction: Tensor, lr: float, lr_scale: float, device_lr_scale: Tensor | None,
    weight_decay: float, device_clip_scale: Tensor | None,
) -> None:  # fmt: skip
    """Update the parameters along `direction`; nothing where device_clip_scale is not finite."""
    with torch.cuda.device_of(direction):
        apply_launch(
            *table[:2], direction.contiguous(), lr, lr_scale, device_lr_scale, weight_decay, device_clip_scale
        ).run()


def momentum_launch(table, aligned: bool, update, momentum: float, clip_scale: float, device_clip_scale) -> Launch:
    """The launch that fills update; tensors may lie on the meta device."""
    numbers = {"clip_scale": clip_scale, "momentum": momentum, "rest": 1 - momentum}
    return _by_table(momentum_kernel, table, aligned, update=update, device_clip_scale=device_clip_scale, **numbers)


def apply_launch(
    table, aligned: bool, direction, lr: float, lr_scale: float, device_lr_scale, weight_decay: float, device_clip_scale
) -> Launch:
    """The launch that updates the parameters; tensors may lie on the meta device."""
    on_device = {"device_clip_scale": device_clip_scale, "device_lr_scale": device_lr_scale}
    numbers = {"lr": lr, "lr_scale": lr_scale, "weight_decay": weight_decay}
    return _by_table(apply_kernel, table, aligned, direction=direction, **on_device, **numbers)


def _by_table(kernel, table, aligned: bool, **arguments) -> Launch:
    arguments |= {"table": table, "COLUMNS": COLUMNS, "BLOCK": BLOCK, "ALIGNED": aligned}
    return Launch(kernel, (table.size(0),), arguments, options(4), 4, 0)


EXAMPLES = {"500K": (128 * 192 + 8 * 64 * 128, True), "DeepSeek-V3": (2**31 + 1, True), "unaligned": (2049, False)}
"""Elements of all parameters together, and whether each begins at a multiple of 16 bytes, in launches that are compiled ahead."""


def example_launches(size: str, dtype: torch.dtype, large: int) -> dict[str, Launch]:
    """Kernel -> launch at EXAMPLES[size], on the meta device; `dtype`: of what newton_schulz takes."""
    empty, (count, aligned) = on_meta(torch.float32), EXAMPLES[size]
    table, flat = empty(triton.cdiv(count, BLOCK), COLUMNS, dtype=torch.int64), empty(count, dtype=dtype)
    clip_scale, lr_scale = empty(()), empty((), dtype=torch.float64)
    return {
        "momentum_kernel": momentum_launch(table, aligned, flat, 0.95, 1.0, clip_scale),
        "apply_kernel": apply_launch(table, aligned, flat, 0.02, 1.0, lr_scale, 0.1, clip_scale),
    }
