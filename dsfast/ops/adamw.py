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

from dsfast.ops import native
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
    lrs: Sequence[float], weight_decays: Sequence[float], beta1: float, beta2: float, eps: float, step: int,
    clip_scale: float = 1.0,
) -> None:  # fmt: skip
    """Update `params`, `exp_avgs` and `exp_avg_sqs` in place; one learning rate and weight decay for each tensor.

    step counts from 1. Gradients are multiplied by clip_scale, see `clip_scale`. Tensors of one position have one shape;
    params and both averages must be contiguous. Raises ValueError or TypeError for lists that do not fit together.
    """
    if not len(params) == len(grads) == len(exp_avgs) == len(exp_avg_sqs) == len(lrs) == len(weight_decays):
        raise ValueError("adamw: params, grads, exp_avgs, exp_avg_sqs, lrs and weight_decays must be equally long")
    if step < 1:
        raise ValueError(f"adamw: step counts from 1, got {step}")
    if not params:
        return
    for p, grad, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        for name, x in (("grads", grad), ("exp_avgs", m), ("exp_avg_sqs", v)):
            expect_shape("adamw", name, x, *p.shape)
        expect_dtype("adamw", params[0].dtype, params[0].device, params=p, grads=grad, exp_avgs=m, exp_avg_sqs=v)
        if not (p.is_contiguous() and m.is_contiguous() and v.is_contiguous()):
            raise ValueError("adamw: params, exp_avgs and exp_avg_sqs are updated in place and must be contiguous")
    arguments = (params, grads, exp_avgs, exp_avg_sqs, lrs, weight_decays, beta1, beta2, eps, step, clip_scale)
    if choose("adamw", params[0]) == "reference":
        adamw_reference(*arguments)
    else:
        torch.ops.dsfast.adamw(*arguments)
        # C++ wrote where autograd cannot see.
        torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs])


@torch.no_grad()
def grad_norm(grads: Sequence[Tensor]) -> float:
    """The L2 norm over all gradients together; inf or nan where one of them is not finite."""
    if not grads:
        return 0.0
    if choose("adamw", grads[0]) == "reference":
        return math.sqrt(sum(float(g.double().square().sum()) for g in grads))
    return float(torch.ops.dsfast.grad_norm(grads))


def clip_scale(norm: float, max_norm: float) -> float:
    """What gradients of L2 norm `norm` are multiplied with so that it is at most `max_norm`."""
    return min(1.0, max_norm / norm) if norm > 0 else 1.0


def _adamw_cpu(params, grads, exp_avgs, exp_avg_sqs, lrs, weight_decays, beta1, beta2, eps, step, clip_scale):
    grads = [g.contiguous() for g in grads]
    native.module().adamw(
        *([x.data_ptr() for x in tensors] for tensors in (params, grads, exp_avgs, exp_avg_sqs)),
        [p.numel() for p in params], list(lrs), list(weight_decays), beta1, beta2, eps,
        1 - beta1**step, 1 - beta2**step, clip_scale, torch.get_num_threads(),
    )  # fmt: skip


def _grad_norm_cpu(grads: Sequence[Tensor]) -> Tensor:
    grads = [g.contiguous() for g in grads]
    norm = native.module().grad_norm([g.data_ptr() for g in grads], [g.numel() for g in grads], torch.get_num_threads())
    return torch.tensor(norm, dtype=torch.float64)


define(
    "adamw(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, float[] lrs,"
    " float[] weight_decays, float beta1, float beta2, float eps, int step, float clip_scale) -> ()",
    cpu=_adamw_cpu,
    fake=lambda *_: None,
)
define(
    "grad_norm(Tensor[] grads) -> Tensor",
    cpu=_grad_norm_cpu,
    fake=lambda grads: grads[0].new_empty((), dtype=torch.float64),
)
