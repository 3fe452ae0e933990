"""A step recorded as one CUDA graph, and which of two recordings of it is taken."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from statistics import median
from typing import Protocol

import torch
from torch import Tensor
from torch.cuda import CUDAGraph

from dsfast import ops
from dsfast.errors import first_line
from dsfast.ops import triton

COMPARED, CONSECUTIVE, COMPARED_BYTES = 16, 4, 2**30
"""How often two recordings are compared, by how many replays, and the most state of a step that this is done for: it is copied
three times, in the memory of the GPU."""


class Step(Protocol):
    """A function of device memory alone. `state`: every tensor that a call changes for later ones to see.

    When its kernels are compiled a call finds memory that none has written: it must not fail for what is in there.
    """

    name: str
    consecutive: int
    """How many calls may follow one another from here; of a step that is to be recorded with branches."""

    def __call__(self) -> None: ...

    def state(self) -> list[Tensor]: ...


def captured(step: Step, branched: bool = False) -> Callable[[], None]:
    """The whole step as one CUDA graph; `step` itself, with a warning, where it cannot be captured.

    branched: as the faster of two graphs, one of them branched as in `record`, if both leave the same bits behind; with a warning
    where they do not. A step that is called once, or has more state than COMPARED_BYTES, has one graph: the kernels of models so
    large fill a GPU one by one.
    Kernels are compiled on the way, first of all as many at a time as there are processors; nothing that a step changes is
    changed.
    """
    gc.collect()  # an earlier recording may hold memory until then
    with torch.cuda.device_of(step.state()[0]):
        return _captured(step, branched)


def _captured(step: Step, branched: bool) -> Callable[[], None]:
    """`captured` on the current device: what a step launches on another one a capture would leave out without a word."""
    with unchanged(step.state()) as restore, _side_stream():
        triton.compile_together(step)
        restore()
        step()  # libraries allocate their working memory
        restore()
    with unchanged(step.state()):
        try:
            chain = record(step)
        except RuntimeError as error:
            if isinstance(cause := _cause(error), torch.OutOfMemoryError):
                raise cause from None
            reason = f"capture as a CUDA graph failed: {first_line(cause)}"
            ops.note_fallback(step.name, "cuda", "is launched operator by operator", reason)
            return step
    if branched and _is_small(step.state()) and step.consecutive > 1:
        return _chain_or_branches(step, chain).replay
    return chain.replay


def _chain_or_branches(step: Step, chain: CUDAGraph) -> CUDAGraph:
    """The step recorded with branches, if that leaves what its recording as a chain leaves, and sooner; else `chain`."""
    try:
        with unchanged(step.state()):
            branches = record(step, branched=True, beside=chain)
        seconds = _compared(step, chain, branches)
    except RuntimeError as error:
        reason = f"its recording with branches failed: {first_line(_cause(error))}"
    else:
        if seconds is not None:
            return branches if seconds[1] < seconds[0] else chain
        reason = "recorded with branches it leaves other numbers behind"
    ops.note_fallback(step.name, "cuda", "is recorded as one chain", reason)
    return chain


def _compared(step: Step, *recordings: CUDAGraph) -> list[float] | None:
    """Median seconds of some replays of each, in turns from the same state; None if they do not always leave the same bits.

    One alone would tell little: memory holds what the replay before left, of the same state, and what is read too early is right.
    """
    state, expected = step.state(), None
    taken: list[list[float]] = [[] for _ in recordings]
    with unchanged(state) as restore:
        for _ in range(COMPARED):
            for recording, seconds in zip(recordings, taken, strict=True):
                restore()
                seconds.append(_seconds(recording.replay, min(step.consecutive, CONSECUTIVE)))
                if expected is None:
                    expected = _bits(state)
                elif not torch.equal(_bits(state), expected):
                    return None
    return [median(seconds) for seconds in taken]


def _seconds(call: Callable[[], None], times: int) -> float:
    """Seconds that `call` takes, by the GPU's clock."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _bits(tensors: list[Tensor]) -> Tensor:
    """All of them as one tensor of bytes: each comparison has the host wait."""
    return torch.cat([x.detach().reshape(-1).view(torch.uint8) for x in tensors])


def _cause(error: RuntimeError) -> Exception:
    """What went wrong in a capture, not that the capture could not be ended, which is raised on top of it. Raises it where it is
    no error: Ctrl-C."""
    cause = error.__context__ or error
    if not isinstance(cause, Exception):
        raise cause
    return cause


def _is_small(state: list[Tensor]) -> bool:
    return sum(x.nbytes for x in state) <= COMPARED_BYTES


@contextmanager
def unchanged(tensors: list[Tensor]) -> Iterator[Callable[[], None]]:
    """Yields a function that puts back the tensors' present values; it is called at the end in any case.

    Where they are large the values wait in the host's memory: a model that just fits into the GPU's is not to fail for a copy.
    """
    small = _is_small(tensors)
    before = [tensor.clone() if small else tensor.to("cpu", copy=True) for tensor in tensors]

    def restore() -> None:
        with torch.no_grad():
            for dtype in {x.dtype for x in tensors}:  # of several at once PyTorch would copy one after the other
                torch._foreach_copy_(*([x for x in side if x.dtype == dtype] for side in (tensors, before)))

    try:
        yield restore
    finally:
        restore()


@cache
def _stream(device: int, priority: int = 0) -> torch.cuda.Stream:
    """The same for all recordings: of a new one for each cuBLAS would keep 32 MiB, for as long as the process lives."""
    return torch.cuda.Stream(device, priority=priority)


@contextmanager
def _side_stream() -> Iterator[None]:
    """Work inside runs on another stream than the default one, which cannot be captured."""
    stream = _stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        torch.cuda.current_stream().wait_stream(stream)


def record(call: Callable[[], object], branched: bool = False, beside: CUDAGraph | None = None) -> CUDAGraph:
    """`call` as a CUDA graph. It is called once more before, in the same way, on a stream of its own.

    branched: with `triton.branches`; for one that calls no compiled function, which PyTorch would not run as such inside.
    beside: another graph, in whose memory this one may lie, as neither is replayed while the other runs.
    Raises RuntimeError where it makes the host wait for the device. That is found out before the capture: one that fails leaves
    torch 2.11 unable to capture another, and to give memory back, for as long as the process lives.
    """
    # A backward pass on a GPU has else a thread of its own, in which context variables have their first values.
    with torch.autograd.set_multithreading_enabled(False):
        way = triton.branches if branched else nullcontext
        with _side_stream(), _waiting_refused(), way():
            call()
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        stream = _stream(torch.cuda.current_device(), triton.CHAIN)
        pool = beside.pool() if beside else None
        branches = way()
        try:
            with _nothing_collected(), torch.cuda.graph(graph, pool=pool, stream=stream), branches:
                call()
        finally:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own behind
    return graph


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """A graph that is given back in the middle of a capture would break it. To collect all garbage before takes longer: a process
    that has torch and a peer or two has a million objects."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def _waiting_refused() -> Iterator[None]:
    former = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(former)
