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
from dsfast.ops.device_numbers import expect_on_device, only_if_finite, or_number, or_tensor
from dsfast.ops.dispatch import choose
from dsfast.ops.library import define, expect_contiguous, expect_dtype, expect_shape


def adamw_reference(
    params, grads, exp_avgs, exp_avg_sqs, lrs, weight_decays, beta1, beta2, eps, step, clip_scale=1.0, lr_scale=1.0
) -> None:
    for p, grad, m, v, peak, decay in zip(params, grads, exp_avgs, exp_avg_sqs, lrs, weight_decays, strict=True):
        g, lr = grad * clip_scale, peak * lr_scale
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.mul_(1 - lr * decay)
        p.sub_(lr * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps))


@torch.no_grad()
def adamw(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    lrs: Sequence[float], weight_decays: Sequence[float], beta1: float, beta2: float, eps: float,
    step: int | Tensor, clip_scale: float | Tensor = 1.0, lr_scale: float | Tensor = 1.0,
) -> None:  # fmt: skip
    """Update `params`, `exp_avgs` and `exp_avg_sqs` in place; one learning rate and weight decay for each tensor.

    step counts from 1. Gradients are multiplied by clip_scale, see `clip_factor`, learning rates by lr_scale. Tensors of one
    position have one shape; params and both averages must be contiguous. Raises ValueError or TypeError for lists that do not
    fit together.

    What changes from step to step may lie on the device of params, so that nothing waits for it and a captured CUDA graph
    takes new values: step int64 [], clip_scale float32 [], lr_scale float64 []. Where such a clip_scale is not finite (see
    `grad_clip`) nothing is updated. A step below 1 on a GPU, which is not waited for, makes params NaN.

    On a GPU params are float32, and what the kernel knows of the tensors is kept from call to call. During the capture of a
    CUDA graph that must be there: RuntimeError unless the same tensors were updated before, with the same lrs and
    weight_decays; and gradients are contiguous.
    """
    if not len(params) == len(grads) == len(exp_avgs) == len(exp_avg_sqs) == len(lrs) == len(weight_decays):
        raise ValueError("adamw: params, grads, exp_avgs, exp_avg_sqs, lrs and weight_decays must be equally long")
    if not isinstance(step, Tensor):
        _expect_counted(step)
    if not params:
        return
    if not _fit(params, grads, exp_avgs, exp_avg_sqs):
        _refuse(params, grads, exp_avgs, exp_avg_sqs)
    expect_on_device("adamw", params[0].device, step=step, clip_scale=clip_scale, lr_scale=lr_scale)
    tensors, settings = (params, grads, exp_avgs, exp_avg_sqs), (lrs, weight_decays, beta1, beta2, eps)
    if choose("adamw", params[0]) == "reference":
        _reference(tensors, settings, step, clip_scale, lr_scale)
    else:
        torch.ops.dsfast.adamw(*tensors, *settings, *or_tensor(lr_scale), *or_tensor(step), *or_tensor(clip_scale))
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
        expect_contiguous("adamw", params=p, exp_avgs=m, exp_avg_sqs=v)


def _expect_counted(step: int) -> None:
    if step < 1:
        raise ValueError(f"adamw: step counts from 1, got {step}")


def _reference(tensors, settings, step, clip_scale, lr_scale) -> None:
    """`adamw_reference`, numbers on the device included; only a CPU is asked what they are."""
    if isinstance(step, Tensor):
        if step.is_cpu:
            _expect_counted(int(step))
        step = step.double()  # 1 - beta2^step would cancel in float32
    params, _, exp_avgs, exp_avg_sqs = tensors
    with only_if_finite(clip_scale, [*params, *exp_avgs, *exp_avg_sqs]):
        adamw_reference(*tensors, *settings, step, clip_scale, lr_scale)


@torch.no_grad()
def grad_norm(grads: Sequence[Tensor]) -> float:
    """The L2 norm over all gradients together; inf or nan where one of them is not finite. Waits for a GPU."""
    return float(grad_clip(grads, 1.0)[0])


@torch.no_grad()
def grad_clip(grads: Sequence[Tensor], max_norm: float, loss: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The L2 norm over all gradients, float64 [], and the clip_scale that makes it max_norm at most, float32 [].

    Both lie on the gradients' device, which is not waited for; without gradients they are 0 and 1 on the CPU. Where a
    gradient is not finite the norm is inf or nan and the clip_scale nan, with which `adamw` and `muon` update nothing; so it
    is where `loss`, [] on that device, is not finite. On a GPU two calls for the same gradients must not run at once, in two
    streams; for the capture of a CUDA graph as in `adamw`. Raises TypeError unless all gradients have one dtype and device.
    """
    if not grads:
        return torch.zeros((), dtype=torch.float64), torch.ones(())
    for grad in grads:
        expect_dtype("grad_clip", grads[0].dtype, grads[0].device, grads=grad)
    if loss is not None:
        expect_shape("grad_clip", "loss", loss)
        expect_dtype("grad_clip", loss.dtype, grads[0].device, loss=loss)
    if choose("adamw", grads[0]) == "reference":
        return grad_clip_reference(grads, max_norm, loss)
    return torch.ops.dsfast.grad_clip(grads, max_norm, loss)


def grad_clip_reference(grads: Sequence[Tensor], max_norm: float, loss: Tensor | None = None) -> tuple[Tensor, Tensor]:
    norm = sum(g.double().square().sum() for g in grads).sqrt()
    scale = torch.where(norm > max_norm, max_norm / norm, torch.ones_like(norm))
    good = norm.isfinite() if loss is None else norm.isfinite() & loss.isfinite()
    return norm, scale.where(good, math.nan).float()


def clip_factor(norm: float, max_norm: float) -> float:
    """What gradients of L2 norm `norm` are multiplied with so that it is at most `max_norm`. On the device: `grad_clip`."""
    return min(1.0, max_norm / norm) if norm > 0 else 1.0


def _adamw_cpu(
    params, grads, exp_avgs, exp_avg_sqs, lrs, weight_decays, beta1, beta2, eps, lr_scale, device_lr_scale, step,
    device_step, clip_scale, device_clip_scale,
):  # fmt: skip
    step, clip_scale = or_number(step, device_step), or_number(clip_scale, device_clip_scale)
    lr_scale = or_number(lr_scale, device_lr_scale)
    _expect_counted(step)
    if device_clip_scale is not None and not math.isfinite(clip_scale):
        return
    grads = [g.contiguous() for g in grads]
    native.module().adamw(
        *([x.data_ptr() for x in tensors] for tensors in (params, grads, exp_avgs, exp_avg_sqs)),
        [p.numel() for p in params], [lr * lr_scale for lr in lrs], list(weight_decays), beta1, beta2, eps,
        1 - beta1**step, 1 - beta2**step, clip_scale, torch.get_num_threads(),
    )  # fmt: skip


def _grad_clip_cpu(grads: Sequence[Tensor], max_norm: float, loss: Tensor | None) -> tuple[Tensor, Tensor]:
    grads = [g.contiguous() for g in grads]
    norm = native.module().grad_norm([g.data_ptr() for g in grads], [g.numel() for g in grads], torch.get_num_threads())
    finite = math.isfinite(norm) and (loss is None or math.isfinite(loss.item()))
    scale = clip_factor(norm, max_norm) if finite else math.nan
    return torch.tensor(norm, dtype=torch.float64), torch.tensor(scale, dtype=torch.float32)


define(
    "adamw(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, float[] lrs,"
    " float[] weight_decays, float beta1, float beta2, float eps, float lr_scale, Tensor? device_lr_scale, int step,"
    " Tensor? device_step, float clip_scale, Tensor? device_clip_scale) -> ()",
    cpu=_adamw_cpu,
    fake=lambda *_: None,
    cuda=triton.launcher("adamw", "adamw"),
)
define(
    "grad_clip(Tensor[] grads, float max_norm, Tensor? loss) -> (Tensor, Tensor)",
    cpu=_grad_clip_cpu,
    fake=lambda grads, max_norm, loss: (
        grads[0].new_empty((), dtype=torch.float64),
        grads[0].new_empty((), dtype=torch.float32),
    ),
    cuda=triton.launcher("adamw", "grad_clip"),
)
