"""Small random models for the tests of the model, of generation and of the Hugging Face layout."""

from __future__ import annotations

import torch
from torch import Tensor

from dsfast.config import Config
from dsfast.model import DeepseekV3

# Odd and unequal wherever the architecture allows: a mixed-up dimension then cannot pass unseen.
SIZES = {
    "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "kv_lora_rank": 10,
    "qk_nope_head_dim": 7, "qk_rope_head_dim": 6, "v_head_dim": 5, "intermediate_size": 19, "moe_intermediate_size": 11,
    "n_routed_experts": 6, "n_shared_experts": 1, "num_experts_per_tok": 2, "max_position_embeddings": 263,
    "tie_word_embeddings": True,
}  # fmt: skip

YARN = {
    "type": "yarn", "factor": 8, "original_max_position_embeddings": 16, "beta_fast": 4, "beta_slow": 1, "mscale": 0.7,
    "mscale_all_dim": 1.0,
}  # fmt: skip


def tiny_config(**changes) -> Config:
    return Config.from_dict({"model": SIZES | changes, "data": {"sequence_length": 16}})


def random_model(seed: int = 0, **changes) -> DeepseekV3:
    """A model in evaluation mode in which no weight, norm or router bias has a value that hides a mistake (0 or 1)."""
    torch.manual_seed(seed)
    model = DeepseekV3(tiny_config(**changes).model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        for router in model.routers():
            router.e_score_correction_bias.normal_(std=0.3)
    return model.eval()


def random_ids(model: DeepseekV3, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def next_tokens(input_ids: Tensor) -> Tensor:
    """Labels [B, T]: the token that follows in the row; none after the last."""
    return torch.nn.functional.pad(input_ids[:, 1:], (0, 1), value=-100)
