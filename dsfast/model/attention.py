"""Multi-head latent attention (arXiv 2412.19437, section 2.1.1).

Keys and values are rebuilt from a latent of R numbers per token; a separate key of Dr numbers, shared by all heads,
carries the position. Both together are all that a cache has to hold.
Shapes: N tokens, H heads, D model width, R latent rank, Dn / Dr / Dv widths of the plain key, rotary key and value.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsfast import ops
from dsfast.config import ModelConfig
from dsfast.errors import UserError
from dsfast.model.cache import LatentCache
from dsfast.model.layers import RMSNorm, is_plain
from dsfast.model.rope import Tables, softmax_scale

# Fixed in the published model and in transformers, whatever rms_norm_eps says.
LATENT_NORM_EPS = 1e-6


class MultiHeadLatentAttention(nn.Module):
    uses = 2
    """How often `forward` takes its x: for the queries, and for keys and values."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = config
        self.heads, self.scale = c.num_attention_heads, softmax_scale(c)
        self.key_value_widths = [c.qk_nope_head_dim, c.v_head_dim]
        if c.q_lora_rank is None:
            self.q_proj = nn.Linear(c.hidden_size, self.heads * c.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(c.hidden_size, c.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(c.q_lora_rank, self.heads * c.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(c.kv_lora_rank, self.heads * sum(self.key_value_widths), bias=False)
        self.o_proj = nn.Linear(self.heads * c.v_head_dim, c.hidden_size, bias=False)

    def forward(
        self, x_q: Tensor, x_kv: Tensor, rope: Tables, positions: Tensor, cu_seqlens: Tensor | None,
        cache: LatentCache | None,
    ) -> Tensor:  # fmt: skip
        """x_q and x_kv [N, D], the same numbers (see `ops.stream_norm`) -> values [N, H Dv], which `o_proj` takes to the stream.

        `cu_seqlens` None: one new token for each sequence of `cache`, which then is required.
        """
        q, kv = self._queries(x_q), self.kv_a_proj_with_mqa(x_kv)
        ours = is_plain(self._query_proj()) and is_plain(self.kv_a_proj_with_mqa)  # others may keep what they made
        # [N, H, Dn], [N, H, Dr], [N, R], [N, Dr]
        q_nope, q_rope, latent, k_rope = ops.split_and_turn(q, kv, *rope, positions, in_place=ours)
        latent = self.kv_a_layernorm(latent)
        if cache is not None:
            cache.write(latent, k_rope)
        if cu_seqlens is None:
            values = ops.mla_decode(q_nope, q_rope, *cache.read(), self._absorbed(latent), self.scale)
        else:
            key_values = self.kv_b_proj(latent).unflatten(-1, (self.heads, -1))
            k_nope, v = key_values.split(self.key_value_widths, dim=-1)  # [N, H, Dn], [N, H, Dv]
            values = ops.mla_attention(q_nope, q_rope, k_nope, k_rope, v, cu_seqlens, self.scale)
        return values.flatten(1)

    def _queries(self, x: Tensor) -> Tensor:
        """[N, D] -> [N, H, Dn + Dr]."""
        if not hasattr(self, "q_proj"):
            x = self.q_a_layernorm(self.q_a_proj(x))
        return self._query_proj()(x).unflatten(-1, (self.heads, -1))

    def _query_proj(self) -> nn.Module:
        """What makes the queries, of x or of the compressed x."""
        return self.q_proj if hasattr(self, "q_proj") else self.q_b_proj

    def _absorbed(self, latent: Tensor) -> Tensor:
        """What `kv_b_proj` multiplies by, [H, Dn + Dv, R]: its weight, or what a module in its place makes of unit vectors.

        Raises UserError where that does not tell what it makes of `latent` [N, R].
        """
        proj = self.kv_b_proj
        if is_plain(proj):
            return proj.weight.unflatten(0, (self.heads, -1))
        weight = proj(torch.eye(latent.size(1), dtype=latent.dtype, device=latent.device)).T.contiguous()
        expected = proj(latent)
        if (latent @ weight.T - expected).norm() > torch.finfo(latent.dtype).eps ** 0.5 * expected.norm():
            raise UserError("kv_b_proj: decoding multiplies by it, so what replaces it must be linear, without a bias")
        return weight.unflatten(0, (self.heads, -1))
