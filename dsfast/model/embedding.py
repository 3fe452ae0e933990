"""Token embedding, dense [V, D] or factorised as E [V, R] P [R, D] (ALBERT, arXiv 1909.11942, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsfast import ops
from dsfast.config import ModelConfig


class Embedding(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        v, d, r = config.vocab_size, config.hidden_size, config.embedding_rank
        self.weight = nn.Parameter(torch.empty(v, r or d))
        self.projection = nn.Parameter(torch.empty(r, d)) if r else None

    def forward(self, input_ids: Tensor, tied: bool = False) -> Tensor | tuple[Tensor, tuple[Tensor | None, Tensor]]:
        """[N] int64 -> [N, D]; and, if `tied`, projection and weight for a head that is tied to them (`ops.tied_embedding`)."""
        if not tied:
            return ops.embedding(input_ids, self.weight, self.projection)
        y, weight, projection = ops.tied_embedding(input_ids, self.weight, self.projection)
        return y, (projection, weight)

    def merged(self) -> Tensor:
        """The embedding as one matrix [V, D]."""
        return self.weight if self.projection is None else self.weight @ self.projection
