"""The feed-forward half of a layer: a dense SwiGLU MLP, or DeepSeekMoE (arXiv 2412.19437, section 2.1.2).

Shapes: N tokens, D model width, E routed experts, K chosen per token, I width of an expert.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsfast import ops
from dsfast.config import ModelConfig
from dsfast.model.layers import Float32Buffers


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are the first and second half of `gate_up_proj`."""

    uses = 1
    """How often `forward` takes its x."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(hidden_size, intermediate_size))

    def forward(self, x: Tensor) -> Tensor:
        """[N, D] -> [N, D]."""
        return ops.swiglu_mlp(x, self.gate_up_proj, self.down_proj)


def choice_of(config: ModelConfig) -> tuple[int, int, int, bool, float, str]:
    """How a router of `config` chooses, as `ops.route_tokens` takes it behind the bias."""
    c = config
    return c.num_experts_per_tok, c.n_group, c.topk_group, c.norm_topk_prob, c.routed_scaling_factor, c.scoring_func


class Router(Float32Buffers):
    """Chooses K of E experts for each token and weighs them by their affinities, as `scoring_func` has them.

    `e_score_correction_bias` [E] takes part in the choice alone. It is outside the gradient: `ops.update_bias` moves it.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = config
        self.weight = nn.Parameter(torch.empty(c.n_routed_experts, c.hidden_size))
        self.choice = choice_of(c)
        self.register_buffer("e_score_correction_bias", torch.zeros(c.n_routed_experts, dtype=torch.float32))
        self.register_buffer("load", torch.zeros(c.n_routed_experts, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> ops.Routing:
        """x [N, D] -> the choice. Training mode sets `load` [E], in tokens."""
        routing = ops.route_tokens(x, self.weight, self.e_score_correction_bias, *self.choice)
        if self.training:
            self.load = routing.counts
        return routing


class DeepseekMoE(nn.Module):
    """Routed experts plus shared ones; the shared experts act on every token and are kept as one wide MLP."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = config
        self.gate = Router(c)
        self.experts = Experts(c)
        shared_width = c.n_shared_experts * c.moe_intermediate_size
        self.shared_experts = SwiGLU(c.hidden_size, shared_width) if shared_width else None
        self.uses = 3 if shared_width else 2

    def forward(self, x: Tensor, x_experts: Tensor, x_shared: Tensor | None = None) -> Tensor:
        """x of the router, of the routed and of the shared experts [N, D], the same numbers (see `ops.stream_norm`) -> [N, D]."""
        routing = self.gate(x)
        shared = None if self.shared_experts is None else self.shared_experts(x_shared)
        return self.experts(x_experts, routing, shared)


class Experts(nn.Module):
    """The routed experts' weights: gate_up_proj [E, 2I, D] (rows 0 .. I-1 are the gate), down_proj [E, D, I]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        e, i, d = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(e, 2 * i, d))
        self.down_proj = nn.Parameter(torch.empty(e, d, i))

    def forward(self, x: Tensor, routing: ops.Routing, base: Tensor | None = None) -> Tensor:
        """x [N, D] -> the weighted sum of the chosen experts' outputs [N, D], on top of `base` where there is one."""
        weights, indices, _, *slots = routing
        return ops.moe_experts(x, weights, indices, self.gate_up_proj, self.down_proj, tuple(slots), base)
