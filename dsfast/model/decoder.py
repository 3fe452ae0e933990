"""A decoder layer, and the multi-token prediction module made of one (arXiv 2412.19437, sections 2.1 and 2.2).

Shapes: N tokens, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsfast import ops
from dsfast.config import ModelConfig
from dsfast.model.attention import MultiHeadLatentAttention
from dsfast.model.cache import LatentCache
from dsfast.model.layers import RMSNorm, StreamNorm, is_plain, is_unchanged
from dsfast.model.moe import DeepseekMoE, SwiGLU
from dsfast.model.rope import Tables

_ATTENTION = frozenset({MultiHeadLatentAttention})


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward. Its output is added to the stream by the norm that comes next."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        dense = layer < config.first_k_dense_replace
        self.input_layernorm = StreamNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MultiHeadLatentAttention(config)
        self.post_attention_layernorm = StreamNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size) if dense else DeepseekMoE(config)

    def forward(
        self,
        delta: Tensor,
        residual: Tensor | None,
        rope: Tables,
        positions: Tensor,
        cu_seqlens: Tensor | None,
        cache: LatentCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(delta, residual) [N, D], whose sum is the stream (None counts as 0) -> the same pair, one layer on."""
        values, residual = self._attend(delta, residual, rope, positions, cu_seqlens, cache)
        x, residual = self._project_and_norm(values, residual, cache)
        return self.mlp(*x), residual

    def _attend(
        self, delta: Tensor, residual: Tensor | None, rope: Tables, positions: Tensor, cu_seqlens: Tensor | None,
        cache: LatentCache | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """-> the values that attention of the normed stream gives, [N, H Dv], and the stream."""
        attn, norm = self.self_attn, self.input_layernorm
        if cache is not None or not self._projects_at_once(delta, rope):
            x, h = norm(delta, residual, attn.uses)
            return attn(*x, rope, positions, cu_seqlens, cache), h
        h, *projected = ops.mla_project(
            delta, residual, norm.weight, norm.eps, attn.q_proj.weight, attn.kv_a_proj_with_mqa.weight,
            attn.kv_a_layernorm.weight, attn.kv_a_layernorm.eps, attn.kv_b_proj.weight, attn.heads, *rope, positions,
        )  # fmt: skip
        return ops.mla_attention(*projected, cu_seqlens, attn.scale).flatten(1), h

    def _projects_at_once(self, delta: Tensor, rope: Tables) -> bool:
        attn = self.self_attn
        if not is_unchanged(attn, _ATTENTION) or not hasattr(attn, "q_proj"):
            return False
        own = attn.q_proj, attn.kv_a_proj_with_mqa, attn.kv_a_layernorm, attn.kv_b_proj, self.input_layernorm
        return all(map(is_plain, own)) and ops.projects_at_once(
            delta, attn.q_proj.weight, attn.kv_a_proj_with_mqa.weight, attn.kv_a_layernorm.weight, attn.kv_b_proj.weight,
            attn.heads, rope[0],
        )  # fmt: skip

    def _project_and_norm(
        self, values: Tensor, residual: Tensor, cache: LatentCache | None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """values [N, H Dv] -> the normed stream [N, D], once for each of the MLP's uses, and the stream: residual and what the
        values add to it."""
        o_proj, norm = self.self_attn.o_proj, self.post_attention_layernorm
        own = cache is None and all(map(is_plain, (o_proj, norm)))
        if not own or not ops.outputs_at_once(values, o_proj.weight):
            return norm(o_proj(values), residual, self.mlp.uses)
        *y, h = ops.mla_output(values, o_proj.weight, residual, norm.weight, norm.eps, self.mlp.uses)
        return tuple(y), h


class MultiTokenPrediction(nn.Module):
    """One further prediction depth (section 2.2): from the state at i and the token k ahead, the token k + 1 ahead.

    The projection takes [embedding; state], the order of the published weights (the paper writes them the other way).
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = DecoderLayer(config, layer)
        self.norm = StreamNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, ahead: Tensor, rope: Tables, positions: Tensor, cu_seqlens: Tensor) -> Tensor:
        """hidden [N, D] of the depth before, ahead [N, D] the embedding of the token k ahead -> hidden [N, D]."""
        joined = self.eh_proj(torch.cat([self.enorm(ahead), self.hnorm(hidden)], dim=-1))
        (y,), _ = self.norm(*self.block(joined, None, rope, positions, cu_seqlens))
        return y
