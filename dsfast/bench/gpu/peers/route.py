"""Peers of routing: the choice and the permutation that sorts the slots by expert."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

from torch import Tensor

from dsfast.bench.gpu.peers.peer import GpuPeer, Prepared, compiled, plain
from dsfast.bench.gpu.replaced import replaced
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
        with replaced(hf, "F", SimpleNamespace(linear=lambda x, weight: x)):  # the logits are given
            _, weights, indices = router(leaf)
        return _with_permutation(weights, indices, eager.counted(indices, logits.size(1)))

    return Prepared(run, (leaf,))


PEERS: dict[str, dict[str, GpuPeer]] = {
    "route": {
        "transformers": GpuPeer(
            "DeepseekV3TopkRouter without its product, argsort", _transformers_route, huggingface.missing
        ),
        "eager": plain("topk, gather, argsort", _eager_route),
        "compile": compiled("it", _eager_route),
    },
}
