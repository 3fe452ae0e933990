"""Peers of routing: the choice and the permutation that sorts the slots by expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dsfast.bench.gpu.peers.peer import GpuPeer, Prepared, compiled, plain
from dsfast.bench.peers import huggingface
from dsfast.bench.peers import operators as eager


def _with_permutation(weights: Tensor, indices: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
    return weights, indices, counts, indices.flatten().argsort(stable=True)


def _eager_route(*arguments) -> tuple[Tensor, ...]:
    return _with_permutation(*eager.choose_experts(*arguments))


def _transformers_route(arguments: list, differentiable: Sequence[int]) -> Prepared:
    """The router on hidden states that are the logits (its weight the identity), whose product is not timed."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as hf

    logits, bias, top_k, n_group, topk_group, norm, scaling = arguments
    config = hf.DeepseekV3Config(
        hidden_size=logits.size(1), n_routed_experts=logits.size(1), num_experts_per_tok=top_k, n_group=n_group,
        topk_group=topk_group, norm_topk_prob=norm, routed_scaling_factor=scaling,
    )  # fmt: skip
    router = hf.DeepseekV3TopkRouter(config).to(logits.device)
    router.e_score_correction_bias.copy_(bias)
    leaf = logits.detach().clone().requires_grad_()

    def run() -> tuple[Tensor, ...]:
        with _linear_skipped(hf):
            _, weights, indices = router(leaf)
        return _with_permutation(weights, indices, eager.counted(indices, logits.size(1)))

    return Prepared(run, (leaf,))


class _linear_skipped:  # noqa: N801
    """transformers' `F.linear` in the router returns its input: the logits are given."""

    def __init__(self, module: Any):
        self.module = module

    def __enter__(self) -> None:
        self.kept, self.module.F = self.module.F, self

    def __exit__(self, *_) -> None:
        self.module.F = self.kept

    @staticmethod
    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return x


PEERS: dict[str, dict[str, GpuPeer]] = {
    "route": {
        "transformers": GpuPeer(
            "DeepseekV3TopkRouter without its product, argsort", _transformers_route, huggingface.missing
        ),
        "eager": plain("topk, gather, argsort", _eager_route),
        "compile": compiled("it", _eager_route),
    },
}
