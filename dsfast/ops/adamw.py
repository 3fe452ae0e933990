"""AdamW over all tensors in one call, gradient clip included (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2).

g = clip_scale * grad
m = beta1 m + (1 - beta1) g,    v = beta2 v + (1 - beta2) g^2
p = p (1 - lr weight_decay) - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dsfast.ops import native, triton
from dsfast.ops.dispatch import choose
from dsfast.ops.library import define, expect_dtype, expect_shape


def adamw_reference(
    params, grads, exp_avgs, exp_avg_sqs, lrs, weight_decays, beta1, beta2, eps, step, clip_scale=1.0
) -> None:
    for p, grad, m, v, lr, decay in zip(params, grads, exp_avgs, exp_avg_sqs, lrs, weight_decays, strict=True):
        g = grad * clip_scale
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.mul_(1 - lr * decay)
        p.sub_(lr * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps))


@torch.no_grad()
def adamw(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    lrs: Sequence[float] | Tensor, weight_decays: Sequence[float], beta1: float, beta2: float, eps: float,
    step: int | Tensor, clip_scale: float | Tensor = 1.0,
) -> None:  # fmt: skip
    """Update `params`, `exp_avgs` and `exp_avg_sqs` in place; one learning rate and weight decay for each tensor.

    step counts from 1. Gradients are multiplied by clip_scale, see `clip_scale`. Tensors of one position have one shape;
    params and both averages must be contiguous. Raises ValueError or TypeError for lists that do not fit together.

    What changes from step to step may lie on the device of params, so that nothing waits for it and a captured CUDA graph
    takes new values: lrs float32 [T] for T tensors, step int64 [], clip_scale float32 []. Where such a clip_scale is not finite
    (see `grad_clip`) nothing is updated. A step below 1 on a GPU, which is not waited for, makes params NaN.

    On a GPU params are float32, and what the kernel knows of the tensors is kept from call to call. During the capture of a
    CUDA graph that must be there: RuntimeError unless the same tensors (and the same lrs, where they are numbers) were
    updated before; and gradients are contiguous.
    """
    if not len(params) == len(grads) == len(exp_avgs) == len(exp_avg_sqs) == len(lrs) == len(weight_decays):
        raise ValueError("adamw: params, grads, exp_avgs, exp_avg_sqs, lrs and weight_decays must be equally long")
    if not isinstance(step, Tensor):
        _expect_counted(step)
    if not params:
        return
    if not _fit(params, grads, exp_avgs, exp_avg_sqs):
        _refuse(params, grads, exp_avgs, exp_avg_sqs)
    _expect_on_device(params, lrs, step, clip_scale)
    tensors, settings = (params, grads, exp_avgs, exp_avg_sqs), (weight_decays, beta1, beta2, eps)
    if choose("adamw", params[0]) == "reference":
        _reference(tensors, lrs, settings, step, clip_scale)
    else:
        _run(tensors, lrs, settings, step, clip_scale)
        # The kernels wrote where autograd cannot see.
        torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs])


def _fit(params, grads, exp_avgs, exp_avg_sqs) -> bool:
    """Whether `_refuse` has nothing to say, in a quarter of its time: this is asked in every step."""
    shapes, dtype, device = [p.shape for p in params], params[0].dtype, params[0].device
    updated = [*params, *exp_avgs, *exp_avg_sqs]
    return (
        all([x.shape for x in tensors] == shapes for tensors in (grads, exp_avgs, exp_avg_sqs))
        and all(x.dtype == dtype and x.device == device for x in (*updated, *grads))
        and all(x.is_contiguous() for x in updated)
    )


def _refuse(params, grads, exp_avgs, exp_avg_sqs) -> None:
    """Raise the error that says what does not fit."""
    for p, grad, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        for name, x in (("grads", grad), ("exp_avgs", m), ("exp_avg_sqs", v)):
            expect_shape("adamw", name, x, *p.shape)
        expect_dtype("adamw", params[0].dtype, params[0].device, params=p, grads=grad, exp_avgs=m, exp_avg_sqs=v)
        if not (p.is_contiguous() and m.is_contiguous() and v.is_contiguous()):
            raise ValueError("adamw: params, exp_avgs and exp_avg_sqs are updated in place and must be contiguous")


def _expect_on_device(params, lrs, step, clip_scale) -> None:
    """Check those that are tensors."""
    float32, int64 = torch.float32, torch.int64
    expected = {
        "lrs": (lrs, float32, (len(params),)),
        "step": (step, int64, ()),
        "clip_scale": (clip_scale, float32, ()),
    }
    for name, (x, dtype, shape) in expected.items():
        if isinstance(x, Tensor):
            expect_shape("adamw", name, x, *shape)
            expect_dtype("adamw", dtype, params[0].device, **{name: x})


def _expect_counted(step: int) -> None:
    if step < 1:
        raise ValueError(f"adamw: step counts from 1, got {step}")


def _reference(tensors, lrs, settings, step, clip_scale) -> None:
    """`adamw_reference`, numbers on the device included; only a CPU is asked what they are."""
    if isinstance(step, Tensor):
        if step.is_cpu:
            _expect_counted(int(step))
        step = step.double()  # 1 - beta2^step would cancel in float32
    if not isinstance(clip_scale, Tensor):
        return adamw_reference(*tensors, lrs, *settings, step, clip_scale)
    params, _, exp_avgs, exp_avg_sqs = tensors
    updated = [*params, *exp_avgs, *exp_avg_sqs]
    before = [x.clone() for x in updated]
    adamw_reference(*tensors, lrs, *settings, step, clip_scale)
    for x, old in zip(updated, before, strict=True):
        x.copy_(torch.where(clip_scale.isfinite(), x, old))
    return None


def _run(tensors, lrs, settings, step, clip_scale) -> None:
    """The registered operator, which takes each of the three as a number and as a tensor that stands for it."""
    device_lrs, lrs = (lrs, []) if isinstance(lrs, Tensor) else (None, lrs)
    device_step, step = (step, 1) if isinstance(step, Tensor) else (None, step)
    device_clip_scale, clip_scale = (clip_scale, 1.0) if isinstance(clip_scale, Tensor) else (None, clip_scale)
    torch.ops.dsfast.adamw(*tensors, lrs, device_lrs, *settings, step, device_step, clip_scale, device_clip_scale)


@torch.no_grad()
def grad_norm(grads: Sequence[Tensor]) -> float:
    """The L2 norm over all gradients together; inf or nan where one of them is not finite. Waits for a GPU."""
    return float(grad_clip(grads, 1.0)[0])


@torch.no_grad()
def grad_clip(grads: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    """The L2 norm over all gradients, float64 [], and the clip_scale that makes it max_norm at most, float32 [].

    Both lie on the gradients' device, which is not waited for; without gradients they are 0 and 1 on the CPU. Where a
    gradient is not finite the norm is inf or nan and the clip_scale nan, with which `adamw` updates nothing. On a GPU the
    gradients are float32; for the capture of a CUDA graph as in `adamw`.
    """
    if not grads:
        return torch.zeros((), dtype=torch.float64), torch.ones(())
    if choose("adamw", grads[0]) == "reference":
        return grad_clip_reference(grads, max_norm)
    return torch.ops.dsfast.grad_clip(grads, max_norm)


def grad_clip_reference(grads: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    norm = sum(g.double().square().sum() for g in grads).sqrt()
    scale = torch.where(norm > max_norm, max_norm / norm, torch.ones_like(norm))
    return norm, scale.where(norm.isfinite(), math.nan).float()


def clip_scale(norm: float, max_norm: float) -> float:
    """What gradients of L2 norm `norm` are multiplied with so that it is at most `max_norm`. On the device: `grad_clip`."""
    return min(1.0, max_norm / norm) if norm > 0 else 1.0


def _adamw_cpu(
    params, grads, exp_avgs, exp_avg_sqs, lrs, device_lrs, weight_decays, beta1, beta2, eps, step, device_step,
    clip_scale, device_clip_scale,
):  # fmt: skip
    if device_step is not None:
        step = int(device_step)
        _expect_counted(step)
    if device_clip_scale is not None:
        clip_scale = float(device_clip_scale)
        if not math.isfinite(clip_scale):
            return
    lrs = list(lrs) if device_lrs is None else device_lrs.tolist()
    grads = [g.contiguous() for g in grads]
    native.module().adamw(
        *([x.data_ptr() for x in tensors] for tensors in (params, grads, exp_avgs, exp_avg_sqs)),
        [p.numel() for p in params], lrs, list(weight_decays), beta1, beta2, eps, 1 - beta1**step, 1 - beta2**step,
        clip_scale, torch.get_num_threads(),
    )  # fmt: skip


def _grad_clip_cpu(grads: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    grads = [g.contiguous() for g in grads]
    norm = native.module().grad_norm([g.data_ptr() for g in grads], [g.numel() for g in grads], torch.get_num_threads())
    scale = clip_scale(norm, max_norm) if math.isfinite(norm) else math.nan
    return torch.tensor(norm, dtype=torch.float64), torch.tensor(scale, dtype=torch.float32)


define(
    "adamw(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, float[] lrs,"
    " Tensor? device_lrs, float[] weight_decays, float beta1, float beta2, float eps, int step, Tensor? device_step,"
    " float clip_scale, Tensor? device_clip_scale) -> ()",
    cpu=_adamw_cpu,
    fake=lambda *_: None,
    cuda=triton.launcher("adamw", "adamw"),
)
define(
    "grad_clip(Tensor[] grads, float max_norm) -> (Tensor, Tensor)",
    cpu=_grad_clip_cpu,
    fake=lambda grads, max_norm: (
        grads[0].new_empty((), dtype=torch.float64),
        grads[0].new_empty((), dtype=torch.float32),
    ),
    cuda=triton.launcher("adamw", "grad_clip"),
)
