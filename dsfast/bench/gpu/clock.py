"""How long a call takes on a GPU: by events, with the L2 cache flushed before and the host ahead; and by replay of a CUDA graph
of many calls."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch

from dsfast.bench.timing import Call, seconds
from dsfast.files import Json
from dsfast.model.capture import record

FLUSH_BYTES = 2**28
"""Written before each timed call: several times any L2."""
HEAD_START = 4_000_000
"""Cycles, some 2 ms, that the device waits while the host launches what is timed: else a call of few microseconds would show the
time that Python takes to launch it, which a user hides in a CUDA graph, and no kernel could be told from another."""
GRAPH_CALLS = 20
REPLAYS = 5


class GpuClock:
    """event: makes what records a time on the stream; flush: empties the L2 of what is timed; wait: gives the host its head
    start, by default of HEAD_START cycles. Without one (`GpuClock.from_the_host`) a call's launches are part of its time."""

    on_gpu = True

    def __init__(self, event: Callable | None = None, flush: Call | None = None, wait: Call | None = None):
        self._event = event or partial(torch.cuda.Event, enable_timing=True)
        self._flush = flush or torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda").zero_
        self._wait = wait or partial(torch.cuda._sleep, HEAD_START)

    @classmethod
    def from_the_host(cls) -> GpuClock:
        return cls(wait=lambda: None)

    def seconds(self, call: Call) -> float:
        """Seconds from the start of the first kernel of `call` to the end of its last."""
        begin, end = self._event(), self._event()
        self._flush()
        self._wait()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def graph_seconds(self, call: Call) -> float:
        """A call's share of a graph of GRAPH_CALLS, which is launched at once: no launch overhead, caches warm.

        The median of REPLAYS. Raises what the capture raises, where `call` cannot be captured.
        """

        def calls() -> None:
            for _ in range(GRAPH_CALLS):
                call()

        replay = record(calls).replay
        replay()
        return statistics.median(self.seconds(replay) for _ in range(REPLAYS)) / GRAPH_CALLS

    def kernels(self, call: Call) -> list[Json]:
        """The kernels and copies that `call` starts, in the order in which they begin: name, and in microseconds `begin`, since
        the first one's, and `time`, from its own to its end."""
        activity = torch.profiler.ProfilerActivity.CUDA
        with torch.profiler.profile(activities=[activity]) as profile:
            call()
            torch.cuda.synchronize()
        events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        spans = sorted((event.time_range.start, event.time_range.end, event.name) for event in events)
        return [{"name": name, "begin": begin - spans[0][0], "time": end - begin} for begin, end, name in spans]


class HostClock:
    """Wall time on the CPU, for a rehearsal without a GPU: no figure of it is one of a GPU."""

    on_gpu = False
    seconds = staticmethod(seconds)
