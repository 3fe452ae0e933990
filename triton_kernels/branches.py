"""Branches of a recorded step: what nothing of it needs soon runs beside what it goes on with.

A step's graph is else one chain, and the kernels of a small model leave most of a GPU idle. A launcher starts `aside`
(dsfast.triton_kernels.launch) what its caller does not wait for, such as the sum of a weight's gradient; `Branches` knows
which tensors that fills, and has the first operator that takes one of them wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle

import torch
from dsfast.triton_kernels.launch import Launch, branches
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HELD = 2**28
"""Bytes that branches may keep from being used again; beyond, all of them are waited for."""
NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "is_same_size"}
"""Operators of aten that make no view and yet launch nothing."""

Stage = tuple[Iterable[Launch], Sequence[Tensor]]
"""Launches, and what others take of all that they fill."""


class Branches(TorchDispatchMode):
    """Inside, in the thread that enters, `aside` starts launches on `streams`, in turn; those of one stream wait for each other.

    What they read and write is kept until it is waited for, so that no later tensor gets its memory. They must not read what is
    changed in place after them: tests/test_branches.py looks for it. All are waited for at the end, by the stream that is current
    there: that of the capture, on which all else has to run.
    """

    def __init__(self, streams: Sequence[torch.cuda.Stream]):
        super().__init__()
        self._streams = cycle(streams)
        self._open: dict[object, list[Tensor]] = {}
        """The end of each branch that nobody has waited for, and its tensors."""
        self._filled: dict[int, object] = {}
        """Where a storage that a branch fills lies, and the end of that branch."""

    def __enter__(self):
        self._token = branches.set(self)
        # A GPU's backward pass has else a thread of its own, which knows of no branches.
        self._threads = torch.autograd.set_multithreading_enabled(False)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._threads.__exit__(*error)
        branches.reset(self._token)
        if error[0] is None:
            self._wait_for_all()

    def start(self, stages: Sequence[Stage]) -> None:
        """Start the launches of all stages, in their order, beside what follows, which takes of what they fill only the tensors
        beside a stage."""
        stages = [(list(launches), results) for launches, results in stages]
        for end, (launches, results) in zip(self._beside(stages), stages, strict=True):
            self._open[end] = [x for launch in launches for x in launch.arguments.values() if isinstance(x, Tensor)]
            self._filled |= {_place(x): end for x in results}
        if sum(x.untyped_storage().nbytes() for tensors in self._open.values() for x in tensors) > HELD:
            self._wait_for_all()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._filled and launches_something(func):
            for x in tree_leaves((args, kwargs)):
                if isinstance(x, Tensor) and _place(x) in self._filled:
                    self._wait(self._filled[_place(x)])
        return func(*args, **kwargs)

    def _wait_for_all(self) -> None:
        for end in list(self._open):
            self._wait(end)

    def _wait(self, end: object) -> None:
        self._join(end)
        del self._open[end]
        self._filled = {place: other for place, other in self._filled.items() if other is not end}

    def _beside(self, stages: Sequence[Stage]) -> list[object]:
        """Start them behind all that was started so far; what tells when each is done."""
        stream, ends = next(self._streams), []
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for launches, _ in stages:
                for launch in launches:
                    launch.run()
                ends.append(stream.record_event())
        return ends

    def _join(self, end: torch.cuda.Event) -> None:
        torch.cuda.current_stream().wait_event(end)


def launches_something(func: torch._ops.OpOverload) -> bool:
    """Whether the operator does more than to make a view or to take memory."""
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return not view and func.overloadpacket.__name__ not in NOTHING


def _place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
