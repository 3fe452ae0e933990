"""Interleaved timing: what is compared takes turns, so that a drift of the machine meets all sides alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsfast.ops.checks import as_tuple

Call = Callable[[], object]

BUDGET = 30.0
"""Seconds after which no more samples are taken, so that one slow variant does not take minutes."""
FEWEST = 3
"""Samples that are taken whatever they cost, unless fewer are asked for."""


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


def gradients_call(run: Call, leaves: Sequence[Tensor]) -> Call:
    """The call that runs `run` and computes the gradient of every leaf, from gradients given for the results."""

    def results() -> list[Tensor]:
        return [x for x in as_tuple(run()) if x.requires_grad]

    given = [torch.ones_like(x) for x in results()]
    return lambda: torch.autograd.grad(results(), leaves, given)


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


def take_turns(
    groups: Mapping[str, Sequence[Call]], repeats: int, budget: float = BUDGET,
    timer: Callable[[Call], float] | None = None,
) -> dict[str, list[tuple[float, ...]]]:  # fmt: skip
    """Seconds of the calls of each group, for each time it had its turn: a a' b b' ..., and that `repeats` times over.

    A group that has taken `budget` seconds has no further turn, but for the first FEWEST. timer: in place of `seconds`.
    """
    timer = timer or seconds
    taken: dict[str, list[tuple[float, ...]]] = {name: [] for name in groups}
    spent = dict.fromkeys(groups, 0.0)
    for turn in range(repeats):
        for name, calls in groups.items():
            if turn < FEWEST or spent[name] < budget:
                taken[name].append(tuple(timer(call) for call in calls))
                spent[name] += sum(taken[name][-1])
    return taken


def repeat(
    calls: Sequence[Call], repeats: int, budget: float = BUDGET, timer: Callable[[Call], float] | None = None
) -> list[tuple[float, ...]]:
    """Seconds of each of `calls`, all of them in turn, as `take_turns` does for one group."""
    return take_turns({"": calls}, repeats, budget, timer)[""]


def compare(first: Call, others: Mapping[str, Call], repeats: int, warmup: int = 2) -> dict[str, Comparison]:
    """Time `first` against each of `others`, pair by pair: first a, first b, ..., and that `repeats` times over.

    A pair that has taken BUDGET seconds has no further turn (see take_turns): its `count` is then below `repeats`.
    Before, each is called `warmup` times untimed.
    """
    for call in (first, *others.values()):
        for _ in range(warmup):
            call()
    pairs = take_turns({name: (first, other) for name, other in others.items()}, repeats)
    return {name: summarise(samples) for name, samples in pairs.items()}


def summarise(pairs: Sequence[tuple[float, float]]) -> Comparison:
    """The comparison that (first, other) samples taken side by side amount to."""
    first, other = (spread(side) for side in zip(*pairs, strict=True))
    ratios = [b / a for a, b in pairs]
    return Comparison(first, other, other.median / first.median, statistics.median(ratios))
