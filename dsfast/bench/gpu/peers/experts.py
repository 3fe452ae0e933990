"""Peers of the routed experts and of the MLP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dsfast.bench.gpu.peers.peer import GpuPeer, Prepared, compiled, direct, no_liger, plain
from dsfast.bench.peers import huggingface
from dsfast.bench.peers import operators as eager


def grouped_experts(x: Tensor, weights: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Slots sorted by expert, two grouped products, the sum of each token's slots through the inverse permutation."""
    slots = indices.flatten()
    order = slots.argsort(stable=True)
    ends = eager.counted(slots, gate_up.size(0)).cumsum(0).to(torch.int32)
    taken = x[order // indices.size(1)]
    gate, up = torch._grouped_mm(taken, gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
    out = torch._grouped_mm(functional.silu(gate) * up, down.transpose(1, 2), offs=ends)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return (out[inverse].unflatten(0, indices.shape) * weights[..., None]).sum(1)


def _transformers_experts(arguments: list, differentiable: Sequence[int]) -> Prepared:
    """transformers' module, with its own grouped products."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as hf

    e, d, i = arguments[4].shape
    experts = hf.DeepseekV3Experts(hf.DeepseekV3Config(hidden_size=d, n_routed_experts=e, moe_intermediate_size=i))
    experts.config._experts_implementation = "grouped_mm"

    def run(x: Tensor, weights: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return torch.func.functional_call(experts, {"gate_up_proj": gate_up, "down_proj": down}, (x, indices, weights))

    return direct(run, arguments, differentiable)


def _liger_experts(x: Tensor, weights: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    from liger_kernel.ops import LigerFusedMoEFunction

    return LigerFusedMoEFunction.apply(x, gate_up, down, indices.int(), weights)


def _liger_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return functional.linear(LigerSiLUMulFunction.apply(*functional.linear(x, gate_up).chunk(2, -1)), down)


PEERS: dict[str, dict[str, GpuPeer]] = {
    "experts": {
        "grouped_mm": plain("sort, torch._grouped_mm twice, unsort", grouped_experts),
        "compile": compiled("grouped_mm", grouped_experts),
        "transformers": GpuPeer("DeepseekV3Experts by grouped_mm", _transformers_experts, huggingface.missing),
        "liger": plain("LigerFusedMoEFunction", _liger_experts, no_liger),
        "eager": plain("a loop over experts", eager.moe_experts),
    },
    "mlp": {
        "eager": plain("linear, silu, linear, as transformers'", eager.swiglu_mlp),
        "compile": compiled("it", eager.swiglu_mlp),
        "liger": plain("LigerSiLUMulFunction", _liger_mlp, no_liger),
    },
}
