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

NOT_FINITE = "the model's logits are not finite: there is no next token to choose"


@dataclass(frozen=True)
class Prompts:
    """Prompts packed end to end: ids [N], the row [N] and position [N] of each token, the prompts' lengths [B]; int64."""

    ids: Tensor
    rows: Tensor
    positions: Tensor
    lengths: Tensor

    @classmethod
    def pack(cls, prompts: list[list[int]]) -> Prompts:
        """On the CPU."""
        lengths = torch.tensor([len(prompt) for prompt in prompts], device="cpu")
        ids = torch.tensor([token for prompt in prompts for token in prompt], device="cpu")
        rows = torch.repeat_interleave(torch.arange(len(prompts), device="cpu"), lengths)
        begins = lengths.cumsum(0) - lengths
        return cls(ids, rows, torch.arange(len(ids), device="cpu") - begins[rows], lengths)

    def to(self, device: torch.device) -> Prompts:
        return Prompts(*(x.to(device) for x in (self.ids, self.rows, self.positions, self.lengths)))


def prompt_logits(model: DeepseekV3, cache: LatentCache, prompts: Prompts) -> Tensor:
    """Fill the empty `cache` with `prompts`, which lie on its device; the logits [B, V] after the last token of each."""
    ends = prompts.lengths.cumsum(0)
    cache.place(prompts.rows, prompts.positions)
    cu_seqlens = torch.cat([ends.new_zeros(1), ends]).int()
    hidden = model.hidden(model.embed_tokens(prompts.ids), prompts.positions, cu_seqlens, cache)
    return model.logits(hidden[ends - 1])


def next_logits(model: DeepseekV3, cache: LatentCache, chosen: Tensor) -> Tensor:
    """Append `chosen` [B], a token of each sequence; the logits [B, V] after them."""
    positions = cache.append()
    return model.logits(model.hidden(model.embed_tokens(chosen), positions, None, cache))


def sample(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens [B], what all tokens weigh together [B], not finite where logits are not) by logits [B, V] and uniform numbers [B],
    float64.

    The first token whose probability, added to those before it, exceeds the uniform number. On a GPU PyTorch refuses these sums
    where torch.use_deterministic_algorithms is on.
    """
    below_best = logits.double() - logits.amax(-1, keepdim=True)  # no temperature, however small, makes 0 overflow
    reached = (below_best / temperature).exp().cumsum(-1)
    total = reached[:, -1:]
    chosen = (reached <= uniform[:, None] * total).sum(-1).clamp(max=logits.size(-1) - 1)
    return chosen, total.squeeze(1)


class OperatorDecoder:
    """One operator after the other, on any device and in any dtype; what the other decoders are held against.

    `start` fills the cache with the prompts, each `step` appends `chosen` [B], the tokens chosen last. Both return the next
    choice, made from `logits` [B, V]: with temperature 0 the likeliest token, the lowest of equals; above, as `sample` does,
    with one uniform number drawn for each sequence at each step. They raise UserError where logits are not finite.
    A sequence that has filled its `capacity` overwrites its last place.
    """

    def __init__(self, model: DeepseekV3, batch: int, capacity: int, temperature: float, generator: Generator):
        weight = model.embed_tokens.weight
        self._model, self._temperature, self._generator = model, temperature, generator
        self._cache = LatentCache(model.config, len(model.layers), batch, capacity, weight.device, weight.dtype)

    def start(self, prompts: Prompts) -> list[int]:
        """The token of each of B prompts, wherever they lie."""
        return self._choose(prompt_logits(self._model, self._cache, prompts.to(self._cache.lengths.device)))

    def step(self) -> list[int]:
        """The next token of each of B sequences."""
        return self._choose(next_logits(self._model, self._cache, self.chosen))

    def _choose(self, logits: Tensor) -> list[int]:
        self.logits = logits
        if self._temperature == 0:
            weight, self.chosen = logits.max(-1)
        else:
            uniform = torch.rand(len(logits), dtype=torch.float64, device=logits.device, generator=self._generator)
            self.chosen, weight = sample(logits, self._temperature, uniform)
        if not weight.isfinite().all():
            raise UserError(NOT_FINITE)
        return self.chosen.tolist()
