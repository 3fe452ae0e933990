"""Branches without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from dsfast.triton_kernels.branches import Branches, Stage
from dsfast.triton_kernels.launch import Launch


class Postponed(Branches):
    """What is started aside runs when it is waited for, as late as it can. `launches`: how many were."""

    def __init__(self) -> None:
        super().__init__((), None)
        self.launches = 0

    def _beside(self, stages: Sequence[Stage], urgent: bool) -> list[Callable[[], None]]:
        """What runs the launches of each stage and of those before it, unless they ran."""
        waiting, ends = [], []
        for launches, _ in stages:
            self.launches += len(launches)
            waiting.append(list(launches))
            ends.append(partial(_run, waiting, len(waiting)))
        return ends

    def _join(self, end: Callable[[], None]) -> None:
        end()


class LastFirst(Postponed):
    """Where all are waited for, the last one runs first."""

    def _wait_for_all(self) -> None:
        for end in reversed(list(self._open)):
            self._wait(end)


def _run(stages: list[list[Launch]], count: int) -> None:
    for launches in stages[:count]:
        while launches:
            launches.pop(0).run()
