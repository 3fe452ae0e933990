"""Sequences that grow by a token at a time: their latent cache, and the choice of each next token.

Shapes: B sequences, N tokens of all prompts end to end, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from dsfast.errors import UserError
from dsfast.model.cache import LatentCache
from dsfast.model.deepseek_v3 import DeepseekV3

NOT_FINITE = "the model's logits are not finite: there is nothing to sample from"


@dataclass(frozen=True)
class Prompts:
    """Prompts packed end to end: ids [N], the row [N] and position [N] of each token, the prompts' lengths [B]; int64."""

    ids: Tensor
    rows: Tensor
    positions: Tensor
    lengths: Tensor

    @classmethod
    def pack(cls, prompts: list[list[int]], device: torch.device) -> Prompts:
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        rows = torch.repeat_interleave(torch.arange(len(prompts), device=device), lengths)
        begins = lengths.cumsum(0) - lengths
        return cls(ids, rows, torch.arange(len(ids), device=device) - begins[rows], lengths)


class OperatorDecoder:
    """One operator after the other, on any device and in any dtype; what NativeDecoder is held against.

    `start` fills the cache with the prompts, each `step` appends `chosen` [B], the tokens chosen last. Both return the next
    choice, made from `logits` [B, V]: with temperature 0 the likeliest token, the lowest of equals; above, the first whose
    probability, added to those before it, exceeds a uniform number, one drawn for each sequence at each step. They raise
    UserError where there is nothing to sample from. A sequence that has filled its `capacity` overwrites its last place.
    """

    def __init__(self, model: DeepseekV3, batch: int, capacity: int, temperature: float, generator: Generator):
        weight = model.embed_tokens.weight
        self._model, self._temperature, self._generator = model, temperature, generator
        self._cache = LatentCache(model.config, batch, capacity, weight.device, weight.dtype)
        self._rows = torch.arange(batch, device=weight.device)

    def start(self, prompts: Prompts) -> list[int]:
        model, ends = self._model, prompts.lengths.cumsum(0)
        self._cache.place(prompts.rows, prompts.positions)
        cu_seqlens = torch.cat([ends.new_zeros(1), ends]).int()
        hidden = model.hidden(model.embed_tokens(prompts.ids), prompts.positions, cu_seqlens, self._cache)
        return self._choose(model.logits(hidden[ends - 1]))

    def step(self) -> list[int]:
        model, positions = self._model, self._cache.lengths.clamp(max=self._cache.capacity - 1)
        self._cache.place(self._rows, positions)
        return self._choose(model.logits(model.hidden(model.embed_tokens(self.chosen), positions, None, self._cache)))

    def _choose(self, logits: Tensor) -> list[int]:
        self.logits = logits
        if self._temperature == 0:
            self.chosen = logits.argmax(-1)
            return self.chosen.tolist()
        below_best = logits.double() - logits.amax(-1, keepdim=True)  # no temperature, however small, makes 0 overflow
        reached = (below_best / self._temperature).exp().cumsum(-1)
        total = reached[:, -1:]
        uniform = torch.rand(len(logits), dtype=torch.float64, device=logits.device, generator=self._generator)
        if not total.isfinite().all():
            raise UserError(NOT_FINITE)
        self.chosen = (reached <= uniform[:, None] * total).sum(-1).clamp(max=logits.size(-1) - 1)
        return self.chosen.tolist()
