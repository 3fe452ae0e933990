"""Triton kernels of dsfast.ops.adamw, whose module has the maths: all tensors in one launch.

T tensors, cut into B blocks (dsfast.triton_kernels.tables); P programs of the norm, of which the one that is done last adds up
what all of them found, always in the same order. What changes from step to step (the scale of the learning rates, step, clip
factor) may lie in device memory, so that a captured CUDA graph stays valid: then a launch holds nothing that the host computes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from dsfast.triton_kernels.launch import Launch, multiprocessors, on_meta
from dsfast.triton_kernels.limits import MULTIPROCESSORS
from dsfast.triton_kernels.pieces import options
from dsfast.triton_kernels.tables import BLOCK, as_float, elements, float_bits, is_finite, table_of
from torch import Tensor

MOST_PARTS = 2048  # of the norm
COLUMNS = 8  # of the update's table: elements, first, param, grad, exp_avg, exp_avg_sq, bits of learning rate and weight decay
NORM_COLUMNS = 3  # elements, first, grad


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
    first = tl.load(row + 1)
    p_p = elements(tl.load(row + 2), first, BLOCK, ALIGNED)
    p_g = elements(tl.load(row + 3), first, BLOCK, ALIGNED)
    p_m = elements(tl.load(row + 4), first, BLOCK, ALIGNED)
    p_v = elements(tl.load(row + 5), first, BLOCK, ALIGNED)
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
    table, device_lr_scale, device_step, device_clip_scale, lr_scale, correction1, correction2, clip_scale, beta1, rest1,
    log2_beta1, beta2, rest2, log2_beta2, eps, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Updates one block in place. A device_step replaces both corrections, the other device_... the number of that name."""
    row = table + tl.program_id(0).to(tl.int64) * COLUMNS
    count, lr, decay = tl.load(row), as_float(tl.load(row + 6)), as_float(tl.load(row + 7))
    if device_lr_scale is not None:
        lr_scale = tl.load(device_lr_scale).to(tl.float32)
    lr *= lr_scale
    if device_step is not None:
        n = tl.load(device_step)
        correction1, correction2 = _correction(n, log2_beta1), _correction(n, log2_beta2)
    if device_clip_scale is not None:
        clip_scale = tl.load(device_clip_scale)
        count = tl.where(is_finite(clip_scale), count, 0)  # not finite: nothing is read or written
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
def norm_kernel(
    table, parts, loss, norm, scale, max_norm, B, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
    BP: tl.constexpr,
):  # fmt: skip
    """One of P parts of the sum of squares, in float64: blocks p, p + P, p + 2 P ... From the program that is done last norm, and
    the factor that makes it max_norm at most: NaN where norm or loss (None: none) is not finite.

    The table's last row is of no tensor: in the place of an address it counts the programs of all launches that are done.
    """
    p, programs = tl.program_id(0), tl.num_programs(0)
    b_sum = tl.zeros([BLOCK], tl.float64)
    for t in range(tl.cdiv(B - p, programs)):
        row = table + (p + t * programs).to(tl.int64) * COLUMNS
        p_g, count = elements(tl.load(row + 2), tl.load(row + 1), BLOCK, ALIGNED), tl.load(row)
        if count == BLOCK:  # noqa: SIM108 (two loads, not one under a mask)
            b_g = tl.load(p_g)
        else:
            b_g = tl.load(p_g, mask=tl.arange(0, BLOCK) < count, other=0.0)
        b_sum += b_g.to(tl.float64) * b_g.to(tl.float64)
    tl.store(parts + p, tl.sum(b_sum, 0))
    tl.debug_barrier()
    done = tl.atomic_add(table + tl.cast(B, tl.int64) * COLUMNS + 2, 1, sem="acq_rel", scope="gpu")
    if done % programs == programs - 1:
        part = tl.arange(0, BP)
        b_norm = tl.sqrt(tl.sum(tl.load(parts + part, mask=part < programs, other=0.0), 0))
        b_scale = tl.where(b_norm > max_norm, max_norm / b_norm, 1.0)
        good = b_norm < float("inf")
        if loss is not None:
            good = good & is_finite(tl.load(loss).to(tl.float32))
        tl.store(norm, b_norm)
        tl.store(scale, tl.where(good, b_scale, float("nan")).to(tl.float32))


def adamw(
    params, grads, exp_avgs, exp_avg_sqs, lrs, weight_decays, beta1, beta2, eps, lr_scale, device_lr_scale, step, device_step,
    clip_scale, device_clip_scale,
) -> None:  # fmt: skip
    """As dsfast.ops.adamw: a device_... that is not None stands for the number before it.

    Raises RuntimeError as `DeviceCache.get` during the capture of a CUDA graph.
    """
    grads = [g.contiguous() for g in grads]
    with torch.cuda.device_of(params[0]):
        table, aligned = table_of(
            (params, grads, exp_avgs, exp_avg_sqs), [p.numel() for p in params], (float_bits(lrs), float_bits(weight_decays)),
            params[0].device,
        )  # fmt: skip
        adamw_launch(
            table,
            aligned,
            beta1,
            beta2,
            eps,
            lr_scale,
            device_lr_scale,
            step,
            device_step,
            clip_scale,
            device_clip_scale,
        ).run()


def grad_clip(grads: Sequence[Tensor], max_norm: float, loss: Tensor | None) -> tuple[Tensor, Tensor]:
    """Norm (float64) and clip_scale (float32), both without dimension; as dsfast.ops.grad_clip. Errors as `adamw`.

    Not for the same gradients in two streams at once: both would count in one place, and their norms could be wrong.
    """
    grads, device = [g.contiguous() for g in grads], grads[0].device
    norm, scale = grads[0].new_empty((), dtype=torch.float64), grads[0].new_empty(())
    with torch.cuda.device_of(norm):
        table, aligned = table_of(([*grads, None],), [*(g.numel() for g in grads), 1], (), device)
        parts = norm.new_empty(max(1, min(table.size(0) - 1, MOST_PARTS, 8 * multiprocessors(device))))
        grad_clip_launch(table, aligned, max_norm, loss, parts, norm, scale).run()
    return norm, scale


def adamw_launch(
    table, aligned, beta1, beta2, eps, lr_scale, device_lr_scale, step, device_step, clip_scale, device_clip_scale
) -> Launch:
    """The launch for a table [B, COLUMNS]; tensors may lie on the meta device."""
    numbers = {"beta1": beta1, "rest1": 1 - beta1, "beta2": beta2, "rest2": 1 - beta2, "eps": eps}
    arguments = {
        "table": table, "device_lr_scale": device_lr_scale, "device_step": device_step, "device_clip_scale": device_clip_scale,
        "lr_scale": lr_scale, "correction1": 1 - beta1**step, "correction2": 1 - beta2**step, "clip_scale": clip_scale,
        **numbers, "log2_beta1": _log2(beta1), "log2_beta2": _log2(beta2), "COLUMNS": COLUMNS, "BLOCK": BLOCK,
        "ALIGNED": aligned,
    }  # fmt: skip
    return Launch(adamw_kernel, (table.size(0),), arguments, options(4), 4, 0)


def grad_clip_launch(table, aligned, max_norm: float, loss, parts, norm, scale) -> Launch:
    """The launch that fills norm and scale, by a program for each of parts; table [B + 1, NORM_COLUMNS]; any device."""
    arguments = {
        "table": table, "parts": parts, "loss": loss, "norm": norm, "scale": scale, "max_norm": float(max_norm),
        "B": table.size(0) - 1, "COLUMNS": NORM_COLUMNS, "BLOCK": BLOCK, "ALIGNED": aligned, "BP": MOST_PARTS,
    }  # fmt: skip
    return Launch(norm_kernel, (parts.size(0),), arguments, options(4), 4, 0)


def _log2(beta: float) -> float:
    return math.log2(beta) if beta > 0 else -math.inf


EXAMPLES = {
    "500K": ((8000 * 32, 32 * 128, *[128] * 5, 128 * 192, 128 * 48, 32 * 256, 128 * 128, 2 * 128 * 192), True),
    "DeepSeek-V3": ((2**31 + 1,), True),
    "unaligned": ((3, 2049), False),
}
"""Elements of each tensor, and whether all begin at a multiple of 16 bytes, in launches that are compiled ahead."""


def example_launches(size: str, dtype: torch.dtype, large: int) -> dict[str, Launch]:
    """Kernel and variant -> launch at EXAMPLES[size], on the meta device; float32 whatever the dtype."""
    empty = on_meta(torch.float32)
    sizes, aligned = EXAMPLES[size]
    blocks, settings = sum(triton.cdiv(n, BLOCK) for n in sizes), (0.9, 0.95, 1e-8)
    table, of_norm = (empty(*size, dtype=torch.int64) for size in ((blocks, COLUMNS), (blocks + 1, NORM_COLUMNS)))
    parts, number = empty(min(blocks, 8 * MULTIPROCESSORS), dtype=torch.float64), empty((), dtype=torch.float64)
    numbers = adamw_launch(table, aligned, *settings, 0.5, None, 3, None, 0.7, None)
    tensors = adamw_launch(table, aligned, *settings, 1.0, number, 1, empty((), dtype=torch.int64), 1.0, empty(()))
    return {
        "adamw_kernel": numbers,
        "adamw_kernel, scale, step and clip on the device": tensors,
        "norm_kernel": grad_clip_launch(of_norm, aligned, 1.0, empty(()), parts, number, empty(())),
    }
