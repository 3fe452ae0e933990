"""Where the time of a training step goes, by operator, from torch's profiler."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

_OURS, _TORCH, _BACKWARD = "dsfast::", "aten::", "autograd::engine::evaluate_function"
REST = "Python and the rest"
MIN_SHARE = 0.005
"""Torch operators below this share of the step are put together."""


def split_by_operator(
    step: Callable[[], object], repeats: int, in_one_call: Callable[[], dict[str, tuple[float, float]]]
) -> list[dict[str, Any]]:
    """`operator`, `forward_seconds`, `backward_seconds` and `share` of the mean step, largest first.

    dsfast's operators include the torch calls they make; others count their own time alone. The profiler itself
    takes a few microseconds a call, which are in the shares. It does not see into a step taken in one native call:
    `in_one_call` says after each step where the time went there (see Gradients.seconds).
    """
    step()
    os.environ.setdefault("KINETO_LOG_LEVEL", "7")  # the profiler's own lines on stderr: none
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        wall, inside = 0.0, []
        for _ in range(repeats):
            begin = time.perf_counter()
            step()
            wall += time.perf_counter() - begin
            inside.append(in_one_call())
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for seconds in inside:
        for part, passes in seconds.items():
            for backward, taken in enumerate(passes):
                totals[_OURS + part][backward] += taken / repeats
    for event in profiler.events():
        above = _ancestors(event)
        if any(name.startswith(_OURS) for name in above) or not event.name.startswith((_OURS, _TORCH)):
            continue
        ours = event.name.startswith(_OURS)
        microseconds = event.cpu_time_total if ours else event.self_cpu_time_total
        backward = any(name.startswith(_BACKWARD) for name in above)
        totals[event.name.removesuffix("_backward") if ours else event.name][backward] += microseconds / 1e6 / repeats
    return _rows(totals, wall / repeats)


def _ancestors(event) -> list[str]:
    names, parent = [], event.cpu_parent
    while parent is not None:
        names.append(parent.name)
        parent = parent.cpu_parent
    return names


def _rows(totals: dict[str, list[float]], wall: float) -> list[dict[str, Any]]:
    kept, small = {}, [0.0, 0.0]
    for name, (forward, backward) in totals.items():
        if name.startswith(_OURS) or forward + backward >= MIN_SHARE * wall:
            kept[name] = (forward, backward)
        else:
            small = [small[0] + forward, small[1] + backward]
    kept["other aten::"] = tuple(small)
    kept[REST] = (max(wall - sum(map(sum, totals.values())), 0.0), 0.0)
    rows = [
        {"operator": n, "forward_seconds": f, "backward_seconds": b, "share": (f + b) / wall}
        for n, (f, b) in kept.items()
    ]
    return sorted(rows, key=lambda row: -row["share"])
