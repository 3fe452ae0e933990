"""The same model as a straightforward PyTorch module: the peer that dsfast's training step is timed against.

Parameters and buffers carry dsfast's names, with the experts one by one, so that its weights load here.
Shapes: B rows (each one document), T tokens per row, D model width, H heads, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsfast.bench.peers.operators import causal_attention, choose_experts, embedding, rotate
from dsfast.config import ModelConfig
from dsfast.model import DeepseekV3
from dsfast.model.attention import LATENT_NORM_EPS
from dsfast.model.moe import choice_of
from dsfast.model.rope import softmax_scale


class Embedding(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        width = c.embedding_rank or c.hidden_size
        self.weight = nn.Parameter(torch.empty(c.vocab_size, width))
        self.projection = nn.Parameter(torch.empty(width, c.hidden_size)) if c.embedding_rank else None

    def forward(self, input_ids: Tensor) -> Tensor:
        return embedding(input_ids, self.weight, self.projection)

    def logits(self, hidden: Tensor) -> Tensor:
        hidden = hidden if self.projection is None else functional.linear(hidden, self.projection)
        return functional.linear(hidden, self.weight)


class Attention(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.heads, self.scale = c.num_attention_heads, softmax_scale(c)
        self.widths = (c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.kv_lora_rank)
        nope, rope, value, rank = self.widths
        if c.q_lora_rank is None:
            self.q_proj = nn.Linear(c.hidden_size, self.heads * (nope + rope), bias=False)
        else:
            self.q_a_proj = nn.Linear(c.hidden_size, c.q_lora_rank, bias=False)
            self.q_a_layernorm = nn.RMSNorm(c.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(c.q_lora_rank, self.heads * (nope + rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(c.hidden_size, rank + rope, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(rank, LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(rank, self.heads * (nope + value), bias=False)
        self.o_proj = nn.Linear(self.heads * value, c.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, T, D], cos and sin [T, Dr / 2] -> [B, T, D]."""
        nope, rope, value, rank = self.widths
        q = self.q_proj(x) if hasattr(self, "q_proj") else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_rope = self._heads(q).split((nope, rope), -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((rank, rope), -1)
        k_nope, v = self._heads(self.kv_b_proj(self.kv_a_layernorm(latent))).split((nope, value), -1)
        k_rope = rotate(k_rope, cos, sin)[:, None].expand(-1, self.heads, -1, -1)
        q = torch.cat((q_nope, rotate(q_rope, cos, sin)), -1)
        o = causal_attention(q, torch.cat((k_nope, k_rope), -1), v, self.scale)
        return self.o_proj(o.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, H d] -> [B, H, T, d]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, c: ModelConfig, width: int):
        super().__init__()
        self.gate_up_proj = nn.Linear(c.hidden_size, 2 * width, bias=False)
        self.down_proj = nn.Linear(width, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(functional.silu(gate) * up)


class Gate(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(c.n_routed_experts, c.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(c.n_routed_experts))
        self.choice = choice_of(c)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, D] -> weights and expert numbers, [N, K]."""
        logits = functional.linear(x, self.weight)
        weights, indices, _ = choose_experts(logits, self.e_score_correction_bias, *self.choice)
        return weights, indices


class MoE(nn.Module):
    """`static`: every expert works on all tokens, those of others weighted by 0. No shape depends on the data then and nothing
    waits for a GPU, which a CUDA graph needs; with few experts that costs less than finding out whose tokens are whose."""

    static = False

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate = Gate(c)
        self.experts = nn.ModuleList(MLP(c, c.moe_intermediate_size) for _ in range(c.n_routed_experts))
        shared = c.n_shared_experts * c.moe_intermediate_size
        self.shared_experts = MLP(c, shared) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights, indices = self.gate(flat)
        y = torch.zeros_like(flat) if self.shared_experts is None else self.shared_experts(flat)
        if self.static:
            for e, expert in enumerate(self.experts):
                weight = (weights * (indices == e)).sum(1, keepdim=True)
                y = y + (expert(flat) * weight).to(y.dtype)
            return y.view_as(x)
        for e, expert in enumerate(self.experts):
            token, choice = (indices == e).nonzero(as_tuple=True)
            out = expert(flat.index_select(0, token)) * weights[token, choice, None]
            y = y.index_add(0, token, out.to(y.dtype))
        return y.view_as(x)


class Layer(nn.Module):
    def __init__(self, c: ModelConfig, number: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c, c.intermediate_size) if number < c.first_k_dense_replace else MoE(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class EagerDeepseekV3(nn.Module):
    """A copy of `model`, which must have no MTP modules: the same architecture with the same weights."""

    def __init__(self, model: DeepseekV3):
        super().__init__()
        c = model.config
        self.embed_tokens = Embedding(c)
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = None if c.tie_word_embeddings else nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.register_buffer("cos", model.rope.cos.clone(), persistent=False)
        self.register_buffer("sin", model.rope.sin.clone(), persistent=False)
        self.load_state_dict(rename(model.state_dict()))

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, T] -> logits [B, T, V]."""
        x = self.embed_tokens(input_ids)
        cos, sin = self.cos[: input_ids.size(1)], self.sin[: input_ids.size(1)]
        for layer in self.layers:
            x = layer(x, cos, sin)
        x = self.norm(x)
        return self.embed_tokens.logits(x) if self.lm_head is None else self.lm_head(x)

    def loss(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """labels [B, T], -100 where nothing is predicted -> mean cross-entropy."""
        return functional.cross_entropy(self(input_ids).flatten(0, 1), labels.flatten())


def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """dsfast's state (or gradients) by name -> the same under this module's names: its MLPs are made of nn.Linear."""
    renamed = {}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if leaf not in ("gate_up_proj", "down_proj"):
            renamed[name] = tensor
        elif tensor.ndim == 2:
            renamed[f"{name}.weight"] = tensor
        else:
            renamed |= {f"{owner}.{e}.{leaf}.weight": expert for e, expert in enumerate(tensor)}
    return renamed
