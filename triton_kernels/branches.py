"""Branches of a recorded step: what nothing of it needs soon runs beside what it goes on with.

A step's graph is else one chain, and the kernels of a small model leave most of a GPU idle. A launcher starts `aside`
(dsfast.triton_kernels.launch) what its caller does not wait for, such as the sum of a weight's gradient; `Branches` knows
which tensors that fills, and has the first operator that takes one of them wait.

A kernel that runs aside for long should leave room: a program is not stopped for one of the chain's, so what fills every
multiprocessor holds the chain up for as long as it takes. Half of the chip is enough for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import cycle

import torch
from dsfast.triton_kernels.launch import Launch, branches
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HELD = 2**28
"""Bytes that branches may keep from being used again; beyond, the oldest of them are waited for."""
NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "is_same_size"}
"""Operators of aten that make no view and yet launch nothing."""

Stage = tuple[Iterable[Launch], Sequence[Tensor]]
"""Launches, and what others take of all that they fill."""


class Branches(TorchDispatchMode):
    """Inside, in the thread that enters, `aside` starts launches on `streams`, in turn, or where the chain needs them soon on
    `urgent`, which should have its priority. Those of one stream wait for each other. A GPU's backward pass has to stay in that
    thread too: `torch.autograd.set_multithreading_enabled(False)`.

    What they read and write is kept until it is waited for, so that no later tensor gets its memory. They must not read what is
    changed in place after them: tests/test_branches.py looks for it. All are waited for at the end, by the stream that is current
    there: that of the capture, on which all else has to run.
    """

    def __init__(self, streams: Sequence[torch.cuda.Stream], urgent: torch.cuda.Stream | None):
        super().__init__()
        self._streams, self._urgent = cycle(streams), urgent
        self._used: set[torch.cuda.Stream] = set()
        self._open: dict[object, dict[int, Tensor]] = {}
        """The end of each stage that nobody has waited for, and its tensors, one of each storage."""
        self._filled: dict[int, list[object]] = {}
        """Where a storage that stages fill lies, and the ends of these."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch would else import its compiler at the first operator, in the capture."""
        return False

    def __enter__(self):
        self._token = branches.set(self)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        branches.reset(self._token)
        if error[0] is None:
            self._wait_for_all()
        else:
            self._gather()

    def start(self, stages: Sequence[Stage], urgent: bool) -> None:
        """Start the launches of all stages, in their order, beside what follows, which takes of what they fill only the tensors
        beside a stage. urgent: it soon takes those of the first one."""
        stages = [(launches, results) for given, results in stages if (launches := list(given))]
        for end, (launches, results) in zip(self._beside(stages, urgent), stages, strict=True):
            self._open[end] = {_place(x): x for launch in launches for x in launch.tensors()}
            for place in {_place(x) for x in results}:
                self._filled.setdefault(place, []).append(end)
        while self.held() > HELD:
            self._wait(next(iter(self._open)))

    def held(self) -> int:
        """Bytes that are kept from being used again."""
        kept = {place: x for tensors in self._open.values() for place, x in tensors.items()}
        return sum(x.untyped_storage().nbytes() for x in kept.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._filled and (launches_something(func) or _is_composite(func)):
            for x in tree_leaves((args, kwargs)):
                if isinstance(x, Tensor):
                    for end in list(self._filled.get(_place(x), ())):
                        self._wait(end)
        return func(*args, **kwargs)

    def _wait_for_all(self) -> None:
        for end in list(self._open):
            self._wait(end)

    def _wait(self, end: object) -> None:
        self._join(end)
        del self._open[end]
        left = {place: [other for other in ends if other is not end] for place, ends in self._filled.items()}
        self._filled = {place: ends for place, ends in left.items() if ends}

    def _beside(self, stages: Sequence[Stage], urgent: bool) -> list[object]:
        """Start them behind all that was started so far; what tells when each is done."""
        before, ends = torch.cuda.current_stream().record_event(), []
        for number, (launches, _) in enumerate(stages):
            stream = self._urgent if urgent and not number else next(self._streams)
            self._used.add(stream)
            stream.wait_event(before)
            with torch.cuda.stream(stream):
                for launch in launches:
                    launch.run()
            before = stream.record_event()
            ends.append(before)
        return ends

    def _join(self, end: torch.cuda.Event) -> None:
        torch.cuda.current_stream().wait_event(end)

    def _gather(self) -> None:
        """After an error: have no stream be apart from the capture's, which could not be ended in an orderly way."""
        for stream in self._used:
            with suppress(RuntimeError):
                torch.cuda.current_stream().wait_stream(stream)


def launches_something(func: torch._ops.OpOverload) -> bool:
    """Whether the operator does more than to make a view or to take memory."""
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return not view and func.overloadpacket.__name__ not in NOTHING


def _is_composite(func: torch._ops.OpOverload) -> bool:
    """Whether it is made of others: in inference mode such ones come whole, and what looks like a view may be a copy."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
