"""The cache of latent attention: per token and layer, the normalised latent [R] and the rotated key [Dr]."""

from __future__ import annotations

import torch
from torch import Tensor

from dsfast.config import ModelConfig


class LatentCache:
    """Room for `capacity` tokens of each of `batch` sequences in every one of a model's `layers`, always in the same memory.

    A forward pass is announced with `place` or `append`, which say where its tokens go; in it the layer whose place in the model
    is `layer` then writes its own.
    """

    def __init__(
        self, config: ModelConfig, layers: int, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ):  # fmt: skip
        shape = (layers, batch, capacity)
        self.latent = torch.empty(*shape, config.kv_lora_rank, device=device, dtype=dtype)
        self.k_rope = torch.empty(*shape, config.qk_rope_head_dim, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.capacity, self.layer = capacity, 0
        self._sequences = torch.arange(batch, device=device)

    def place(self, rows: Tensor, positions: Tensor) -> None:
        """Announce N tokens: token n is number `positions[n]`, counted from 0, of sequence `rows[n]`."""
        self._rows, self._positions = rows, positions
        self.lengths.scatter_reduce_(0, rows, positions + 1, "amax")

    def append(self) -> Tensor:
        """Announce one token more for each sequence; their positions [B]. A full sequence gets its last place again."""
        self._rows, self._positions = self._sequences, self.lengths.clamp(max=self.capacity - 1)
        torch.add(self._positions, 1, out=self.lengths)
        return self._positions

    def write(self, latent: Tensor, k_rope: Tensor) -> None:
        """latent [N, R], k_rope [N, Dr] of the tokens last announced."""
        self.latent[self.layer, self._rows, self._positions] = latent
        self.k_rope[self.layer, self._rows, self._positions] = k_rope

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """latent [B, C, R], k_rope [B, C, Dr] and how many tokens of each sequence they hold, lengths [B]."""
        return self.latent[self.layer], self.k_rope[self.layer], self.lengths
