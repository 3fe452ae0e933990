"""Interleaved timing: what is compared takes turns, so that a drift of the machine meets all sides alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Call = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """Seconds of `count` calls: their median and quartiles."""

    median: float
    lower: float
    upper: float
    count: int


@dataclass(frozen=True)
class Comparison:
    """Two variants that took turns. Both ratios are other / first: how many times as fast the first is."""

    first: Spread
    other: Spread
    ratio_of_medians: float
    median_of_ratios: float


def seconds(call: Call) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def spread(samples: Sequence[float]) -> Spread:
    """The summary of at least one sample; quartiles by linear interpolation between the samples."""
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0], 1)
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(median, lower, upper, len(samples))


def compare(first: Call, others: Mapping[str, Call], repeats: int, warmup: int = 2) -> dict[str, Comparison]:
    """Time `first` against each of `others`, pair by pair: first a, first b, ..., and that `repeats` times over.

    Before, each is called `warmup` times untimed.
    """
    for call in (first, *others.values()):
        for _ in range(warmup):
            call()
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in others}
    for _ in range(repeats):
        for name, other in others.items():
            pairs[name].append((seconds(first), seconds(other)))
    return {name: summarise(samples) for name, samples in pairs.items()}


def summarise(pairs: Sequence[tuple[float, float]]) -> Comparison:
    """The comparison that (first, other) samples taken side by side amount to."""
    first, other = (spread(side) for side in zip(*pairs, strict=True))
    ratios = [b / a for a, b in pairs]
    return Comparison(first, other, other.median / first.median, statistics.median(ratios))
