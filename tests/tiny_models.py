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

GROUPS = {"n_routed_experts": 9, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 3, "routed_scaling_factor": 2.5}
VARIANTS = {
    "tied": {},
    "q_lora": {"q_lora_rank": 9},
    "3 groups": GROUPS,
    "top-1 not normalised": {"num_experts_per_tok": 1, "norm_topk_prob": False, "n_routed_experts": 2},
    "untied": {"tie_word_embeddings": False},
    "dense first layer": {"first_k_dense_replace": 1, "num_hidden_layers": 3},
    "all layers dense": {"first_k_dense_replace": 2},
    "factorised": {"embedding_rank": 8},
    "factorised, untied": {"embedding_rank": 8, "tie_word_embeddings": False},
    "2 shared experts": {"n_shared_experts": 2},
    "yarn": {"rope_scaling": YARN},
    "yarn, mscale left out": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12}},
    "yarn, blended over several pairs": {
        "qk_rope_head_dim": 14, "rope_theta": 50.0, "rope_scaling": YARN | {"original_max_position_embeddings": 160},
    },
    "another theta": {"rope_theta": 500.0, "rms_norm_eps": 1e-2},
    "all at once": {
        **GROUPS, "q_lora_rank": 9, "rope_scaling": YARN, "embedding_rank": 8, "first_k_dense_replace": 1,
        "n_shared_experts": 2, "num_nextn_predict_layers": 2,
    },
}  # fmt: skip
MORE_VARIANTS = {
    **VARIANTS,
    "no shared expert, top-1 not normalised": {
        "n_shared_experts": 0, "num_experts_per_tok": 1, "norm_topk_prob": False, "n_routed_experts": 2,
    },
    "softmax scores, of few experts": {"scoring_func": "softmax", "norm_topk_prob": False},
    "softmax scores, of more than a vector holds, in groups": {
        "scoring_func": "softmax", "n_routed_experts": 20, "n_group": 5, "topk_group": 3, "num_experts_per_tok": 4,
        "routed_scaling_factor": 2.5,
    },
    "every expert chosen": {"num_experts_per_tok": 6, "rms_norm_eps": 1e-2, "q_lora_rank": 9},
    "widths above every block, more words than a chunk": {
        "hidden_size": 132, "kv_lora_rank": 131, "qk_nope_head_dim": 37, "qk_rope_head_dim": 34, "v_head_dim": 41,
        "intermediate_size": 141, "moe_intermediate_size": 35, "num_attention_heads": 5, "vocab_size": 1201,
        "q_lora_rank": 129, "num_hidden_layers": 3,
    },
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
