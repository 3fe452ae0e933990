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
    tokens, rank = batch * length, c.embedding_rank or 0
    scores = (length + 1) / 2 * c.num_attention_heads * (c.qk_head_dim + c.v_head_dim)
    layers = c.layer_elements(c.num_experts_per_tok) + c.num_hidden_layers * scores
    embedding = rank * c.hidden_size
    head = embedding + rank * c.vocab_size if rank and c.tie_word_embeddings else c.hidden_size * c.vocab_size
    return round(6 * tokens * (layers + embedding + head))
