"""Rotary position embedding: the tables of cosines and sines, with YaRN (arXiv 2309.00071) for longer contexts.

Pair j of a head of width Dr turns by position * f_j, f_j = theta^(-2j / Dr). YaRN divides by `factor` the frequencies
that turn less than `beta_slow` times over the original context, keeps those above `beta_fast` turns and blends between.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dsfast.config import ModelConfig
from dsfast.model.layers import Float32Buffers

Tables = tuple[Tensor, Tensor]
"""(cos, sin), each [P, Dr / 2]."""


class RotaryTables(Float32Buffers):
    """`cos` and `sin` [P, Dr / 2], kept in float32, one row per position 0 .. max_position_embeddings - 1."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self._config = config
        for name, table in zip(("cos", "sin"), _tables(config), strict=True):
            self.register_buffer(name, table, persistent=False)
        self._cast: dict[tuple[torch.dtype, torch.device], _Cast] = {}

    def _apply(self, fn, recurse: bool = True):
        """Where a model leaves the meta device its tables are made: no checkpoint has them."""
        unmade = self.cos.is_meta
        super()._apply(fn, recurse)
        if unmade and not self.cos.is_meta:
            with torch.device("cpu"):
                made = _tables(self._config)
            self.cos, self.sin = (table.to(self.cos.device) for table in made)
        return self

    def forward(self, dtype: torch.dtype) -> Tables:
        """(cos, sin) in the dtype of what they will turn; the same tensors in every call: a CUDA graph keeps their addresses.
        Where `cos` and `sin` have changed they are filled anew."""
        own, key = (self.cos, self.sin), (dtype, self.cos.device)
        if dtype == self.cos.dtype:
            return own
        cast = self._cast.get(key)
        if cast is None or not cast.is_of(own):
            with torch.inference_mode(False):  # else a first use in generation would forbid later ones in training
                tables = tuple(x.to(dtype) for x in own)
                if cast is not None and cast.tables[0].shape == self.cos.shape:
                    tables = tuple(old.copy_(new) for old, new in zip(cast.tables, tables, strict=True))
            cast = self._cast[key] = _Cast(own, _versions(own), tables)
        return cast.tables


class _Cast(NamedTuple):
    """`tables` in another dtype than those they are `of`, and what version of these."""

    of: Tables
    versions: tuple[int | None, ...]
    tables: Tables

    def is_of(self, tables: Tables) -> bool:
        """Whether they are of `tables` as these are now."""
        return self.versions == _versions(tables) and all(a is b for a, b in zip(self.of, tables, strict=True))


def _versions(tables: Tables) -> tuple[int | None, ...]:
    """How often each was written to; None where PyTorch does not count."""
    return tuple(None if x.is_inference() else x._version for x in tables)


def _tables(config: ModelConfig) -> Tables:
    """In float32, of angles in float64."""
    angles, factor = _positions(config) * _frequencies(config), _table_factor(config)
    return (angles.cos() * factor).float(), (angles.sin() * factor).float()


def softmax_scale(config: ModelConfig) -> float:
    """What the attention scores are multiplied by: 1 / sqrt(key width), times YaRN's squared mscale."""
    scaling = _yarn(config)
    mscale = _mscale(scaling["factor"], scaling.get("mscale_all_dim", 0.0)) if scaling else 1.0
    return config.qk_head_dim**-0.5 * mscale**2


def _positions(config: ModelConfig) -> Tensor:
    return torch.arange(config.max_position_embeddings, dtype=torch.float64)[:, None]


def _frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each pair, [Dr / 2] float64."""
    width, theta = config.qk_rope_head_dim, config.rope_theta
    plain = theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    scaling = _yarn(config)
    if not scaling:
        return plain
    context = scaling.get("original_max_position_embeddings", config.max_position_embeddings)

    def pair_turning(turns: float) -> float:
        """The (fractional) pair that makes `turns` turns over the original context."""
        return width * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(scaling.get("beta_fast", 32.0))), 0)
    high = min(math.ceil(pair_turning(scaling.get("beta_slow", 1.0))), width - 1)
    pairs = torch.arange(width // 2, dtype=torch.float64)
    slowed = ((pairs - low) / (high - low or 1e-3)).clamp(0, 1)  # falling where high < low, as in transformers
    return plain * (1 - slowed) + plain / scaling["factor"] * slowed


def _table_factor(config: ModelConfig) -> float:
    """What YaRN multiplies both tables by; 1 where mscale equals mscale_all_dim, as in DeepSeek-V3."""
    scaling = _yarn(config)
    if not scaling:
        return 1.0
    if "attention_factor" in scaling:
        return scaling["attention_factor"]
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return _mscale(scaling["factor"], scaling["mscale"]) / _mscale(scaling["factor"], scaling["mscale_all_dim"])
    return _mscale(scaling["factor"], 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn(config: ModelConfig) -> dict[str, float]:
    """The numbers of `rope_scaling`; empty without scaling."""
    return {name: value for name, value in (config.rope_scaling or {}).items() if isinstance(value, float)}
