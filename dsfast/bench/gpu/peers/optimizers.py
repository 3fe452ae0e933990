"""Peers of the optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from dsfast import ops
from dsfast.bench.gpu.peers.peer import GpuPeer, Prepared, compiled, compiled_by, plain, reference
from dsfast.bench.peers import operators as eager


def _fused_adamw(clip: bool, arguments: list, differentiable: Sequence[int]) -> Prepared:
    """What torch.optim.AdamW(fused=True).step() calls, and before it the clip that leaves the gradients' scale in place."""
    params, grads, exp_avgs, exp_avg_sqs, lrs, decays, beta1, beta2, eps, step, _ = arguments
    steps = list(torch.full((len(params),), float(step), device=params[0].device).unbind())

    @torch.no_grad()
    def run() -> None:
        if clip:
            norm = torch.nn.utils.get_total_norm(grads)
            torch._foreach_mul_(grads, (1.0 / norm).clamp(max=1.0))
        torch._fused_adamw_(
            params, grads, exp_avgs, exp_avg_sqs, [], steps, lr=lrs[0], beta1=beta1, beta2=beta2,
            weight_decay=decays[0], eps=eps, amsgrad=False, maximize=False,
        )  # fmt: skip

    return Prepared(run, ())


def _compiled_adamw(arguments: list, differentiable: Sequence[int]) -> Prepared:
    params, grads, exp_avgs, exp_avg_sqs, lrs, decays, beta1, beta2, eps, step, _ = arguments
    leaves = [p.detach().requires_grad_() for p in params]  # which share their memory
    optimizer = torch.optim.AdamW(
        leaves, lr=lrs[0], betas=(beta1, beta2), eps=eps, weight_decay=decays[0], foreach=True, capturable=leaves[0].is_cuda
    )  # fmt: skip
    for leaf, grad, exp_avg, exp_avg_sq in zip(leaves, grads, exp_avgs, exp_avg_sqs, strict=True):
        leaf.grad = grad
        before = torch.tensor(step - 1.0, device=leaf.device)
        optimizer.state[leaf] = {"step": before, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    return Prepared(torch.compile(lambda: optimizer.step()), ())


def _eager_adamw(*arguments) -> None:
    with torch.no_grad():
        reference("adamw", ops.adamw)(*arguments)


def _eager_muon(params: list, *arguments) -> None:
    eager.muon(params, *arguments, dtype=torch.bfloat16 if params[0].is_cuda else None)


def adamw_peers(clip: bool) -> dict[str, GpuPeer]:
    """clip: for the update with the gradients' norm before it, which only one of them has."""
    fused = partial(_fused_adamw, clip)
    if clip:
        return {"torch fused": GpuPeer("total norm, foreach scaling, torch._fused_adamw_", fused)}
    return {
        "torch fused": GpuPeer("torch._fused_adamw_", fused),
        "eager": plain("tensor by tensor", _eager_adamw),
        "compile": compiled_by("torch.compile of torch.optim.AdamW(foreach=True).step", _compiled_adamw),
    }


PEERS: dict[str, dict[str, GpuPeer]] = {
    "muon": {"eager": plain("foreach, equal matrices by bmm", _eager_muon), "compile": compiled("it", _eager_muon)},
    "newton_schulz": {
        "eager": plain("bmm, baddbmm, baddbmm", eager.newton_schulz),
        "compile": compiled("it", eager.newton_schulz),
    },
}
