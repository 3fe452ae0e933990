"""The training step that all variants of `bench step` and all rows of `bench growth` take."""

from __future__ import annotations

import torch
from torch import Tensor

from dsfast.config import Config, ModelConfig
from dsfast.errors import UserError


def comparable(config: Config) -> Config:
    """`config` for a fair comparison: AdamW at a constant rate on both sides, and no layer that starts at zero.

    Raises UserError for MTP modules, which the peers do not have and matrix_flops does not count.
    """
    if config.model.num_nextn_predict_layers:
        depths = config.model.num_nextn_predict_layers
        raise UserError(
            f"bench: the peers and the count of FLOPs have no MTP; expected model.num_nextn_predict_layers 0, got {depths}"
        )
    changes = {"train.optimizer": "adamw", "train.decay": "constant", "train.warmup_steps": 0}
    # Were the output projections zero, the first loss would agree whatever the layers compute.
    return config.replace(**changes, **{"model.zero_init_output": False})


def random_batch(config: Config, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """input_ids and labels [batch, length], every row one document. Raises UserError for a length that does not fit."""
    limit = config.model.max_position_embeddings
    if length > limit:
        raise UserError(f"--length: expected at most model.max_position_embeddings {limit}, got {length}")
    generator = torch.Generator().manual_seed(config.seed)
    tokens = torch.randint(config.model.vocab_size, (batch, length + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def matrix_flops(c: ModelConfig, batch: int, length: int) -> int:
    """FLOPs of the matrix products of one step, forward and backward; attention's are those below the diagonal.

    The backward pass of a product takes two of the same size. The peers do at least as much.
    """
    heads, tokens = c.num_attention_heads, batch * length
    head_width, key_value = c.qk_head_dim, c.qk_nope_head_dim + c.v_head_dim
    queries = (
        c.q_lora_rank * (c.hidden_size + heads * head_width) if c.q_lora_rank else c.hidden_size * heads * head_width
    )
    latent = c.hidden_size * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank * heads * key_value
    attention = (
        queries + latent + heads * c.v_head_dim * c.hidden_size + (length + 1) / 2 * heads * (head_width + c.v_head_dim)
    )
    experts = (c.num_experts_per_tok + c.n_shared_experts) * c.moe_intermediate_size
    sparse = c.hidden_size * (c.n_routed_experts + 3 * experts)
    dense = 3 * c.hidden_size * c.intermediate_size
    layers = c.num_hidden_layers * attention + c.first_k_dense_replace * dense
    layers += (c.num_hidden_layers - c.first_k_dense_replace) * sparse
    rank = c.embedding_rank or 0
    embedding = rank * c.hidden_size
    head = embedding + rank * c.vocab_size if rank and c.tie_word_embeddings else c.hidden_size * c.vocab_size
    return round(6 * tokens * (layers + embedding + head))
