"""Ctrl-C, SIGTERM and a terminal that is closed as a wish to stop: the step is finished and saved first."""

from __future__ import annotations

import signal
import threading
from types import TracebackType

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """While open, the first SIGINT, SIGTERM or SIGHUP only sets `received`; a second one acts as it did before.

    What is ignored, as SIGHUP is under nohup, stays ignored.

    The former handlers are back on leaving. Python gives signals to the main thread alone; elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._former: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]
            self._former = {number: signal.signal(number, self._catch) for number in heeded}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _catch(self, number: int, frame: object) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}
