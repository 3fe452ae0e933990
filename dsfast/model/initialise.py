"""The weights a model starts from: the one place that decides them."""

from __future__ import annotations

import torch
from torch import nn

from dsfast.config import ModelConfig
from dsfast.model.layers import RMSNorm

_OUTPUTS = ("o_proj.weight", "down_proj")


def initialise(model: nn.Module, config: ModelConfig) -> None:
    """Set every parameter of a DeepseekV3 from torch's default generator.

    - Norms keep the ones they are made with.
    - The embedding E is normal with embedding_initializer_range (default: initializer_range).
    - Its projection P gets orthonormal rows: P P^T = 1 keeps the lengths and angles of E both into the stream and, in
      a tied head, (h P^T) E^T, so that E's own scale alone sets how large the first logits are.
    - With zero_init_output the projections that write to the residual stream are zero: each layer begins as the
      identity and no layer's noise has to be unlearnt.
    - All other matrices, the router included, are normal with initializer_range.
    """
    norms = {id(module.weight) for module in model.modules() if isinstance(module, RMSNorm)}
    for name, parameter in model.named_parameters():
        if id(parameter) in norms:
            continue
        if name == "embed_tokens.projection":
            wide = torch.promote_types(parameter.dtype, torch.float32)  # PyTorch factorises none in 16 bits
            with torch.no_grad():
                parameter.copy_(nn.init.orthogonal_(torch.empty_like(parameter, dtype=wide)))
        elif config.zero_init_output and name.endswith(_OUTPUTS):
            nn.init.zeros_(parameter)
        elif name == "embed_tokens.weight" and config.embedding_initializer_range is not None:
            nn.init.normal_(parameter, std=config.embedding_initializer_range)
        else:
            nn.init.normal_(parameter, std=config.initializer_range)
