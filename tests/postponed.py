"""Branches without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from dsfast.triton_kernels.branches import Branches
from dsfast.triton_kernels.launch import Launch


class Postponed(Branches):
    """What is started aside runs when it is waited for, as late as it can. `launches`: how many were."""

    def __init__(self) -> None:
        super().__init__(())
        self.launches = 0

    def _beside(self, launches: Sequence[Launch]) -> Callable[[], None]:
        launches = list(launches)
        self.launches += len(launches)
        return partial(_run, launches)

    def _join(self, end: Callable[[], None]) -> None:
        end()


class LastFirst(Postponed):
    """Where all are waited for, the last one runs first."""

    def _wait_for_all(self) -> None:
        for end in reversed(list(self._open)):
            self._wait(end)


def _run(launches: list[Launch]) -> None:
    for launch in launches:
        launch.run()
