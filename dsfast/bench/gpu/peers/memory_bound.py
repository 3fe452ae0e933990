"""Peers of what moves more than it computes: norm, rope, embedding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsfast.bench.gpu.peers.peer import GpuPeer, Prepared, compiled, direct, no_liger, plain
from dsfast.bench.peers import huggingface
from dsfast.bench.peers import operators as eager


def _transformers_norm(arguments: list, differentiable: Sequence[int]) -> Prepared:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

    norm = DeepseekV3RMSNorm(arguments[1].size(0), arguments[2])

    def run(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
        h = x + residual
        return torch.func.functional_call(norm, {"weight": weight}, (h,)), h

    return direct(run, arguments, differentiable)


def _liger_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    h = x + residual
    return LigerRMSNormFunction.apply(h, weight, eps), h


def _for_halves(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> list[Tensor]:
    """cos and sin [1, N, Dr], of x's dtype, for rotations that leave a pair's halves apart."""
    return [table[positions].to(x.dtype).repeat(1, 2)[None] for table in (cos, sin)]


def _pairs(halves: Tensor) -> Tensor:
    """Each pair's two side by side again."""
    return halves.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def _transformers_rope(arguments: list, differentiable: Sequence[int]) -> Prepared:
    """transformers' rotation, which leaves a pair's halves apart; it is given no heads of keys."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave

    x, (cos, sin) = arguments[0], _for_halves(*arguments)
    leaf = x.detach().clone().requires_grad_()

    def run() -> Tensor:
        return apply_rotary_pos_emb_interleave(leaf[None], leaf[None, :, :0], cos, sin, unsqueeze_dim=2)[0]

    return Prepared(run, (leaf,), lambda y: _pairs(y[0]))


def _liger_rope(arguments: list, differentiable: Sequence[int]) -> Prepared:
    """Liger's rotation turns halves: pairs are rearranged before the clock starts, and back after it."""
    from liger_kernel.ops.rope import LigerRopeFunction

    x, (cos, sin) = arguments[0], _for_halves(*arguments)
    halves = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2).transpose(0, 1)[None]
    leaf, none = halves.detach().clone().requires_grad_(), halves[:, :1].detach().clone()

    def run() -> Tensor:
        return LigerRopeFunction.apply(leaf, none, cos, sin)[0]  # in place: what is turned already takes as long

    return Prepared(run, (leaf,), lambda y: _pairs(y[0].transpose(0, 1)))


PEERS: dict[str, dict[str, GpuPeer]] = {
    "norm": {
        "eager": plain("add and functional.rms_norm", eager.rms_norm),
        "compile": compiled("it", eager.rms_norm),
        "transformers": GpuPeer("add and DeepseekV3RMSNorm", _transformers_norm, huggingface.missing),
        "liger": plain("LigerRMSNormFunction", _liger_norm, no_liger),
    },
    "rope": {
        "eager": plain("stack of two rotations", eager.rope),
        "compile": compiled("it", eager.rope),
        "transformers": GpuPeer("apply_rotary_pos_emb_interleave", _transformers_rope, huggingface.missing),
        "liger": GpuPeer("LigerRopeFunction, halves given, in place", _liger_rope, no_liger),
    },
    "embedding": {"eager": plain("embedding, matmul", eager.embedding), "compile": compiled("it", eager.embedding)},
}
