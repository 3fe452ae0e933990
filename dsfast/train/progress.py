"""What is seen while training: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn

from dsfast.ops.triton import kernel_cache

_REFRESH_SECONDS = 0.25
_BAR = 20  # columns; behind the figures, which a narrow terminal is to show first


class TrainingProgress:
    """Shows step, loss, learning rate, tokens per second and time left on standard output.

    On a terminal it is a bar, redrawn between steps (no thread takes time from the kernels); elsewhere, or with
    `quiet`, a line every `log_every` steps and after the last, or nothing.
    """

    def __init__(self, done: int, steps: int, log_every: int, quiet: bool = False):
        self.first, self.steps, self.log_every, self.quiet = done, steps, log_every, quiet
        self.started = self.drawn = time.perf_counter()
        self.bar: Progress | None = None
        if not quiet and sys.stdout.isatty():
            columns = (TextColumn("training"), TextColumn("{task.description}"), BarColumn(_BAR))
            self.bar = Progress(*columns, auto_refresh=False)
            self.task = self.bar.add_task("", total=steps, completed=done)

    def __enter__(self) -> TrainingProgress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def prepared(self, seconds: float | None) -> None:
        """What had to be done before the first step is done; None where that was nothing."""
        if seconds is not None and not self.quiet:
            kernels = f"kernels compiled or read from {kernel_cache()}"
            self._print(f"prepared in {seconds:.1f} s: batches loaded, {kernels}, the step recorded")

    def update(self, step: int, loss: float, lr: float, tokens_per_second: float) -> None:
        """`step` steps are done (counted from 1)."""
        if self.quiet:
            return
        now = time.perf_counter()
        if self.bar is None:
            if step % self.log_every == 0 or step == self.steps:
                self._print(self.line(step, loss, lr, tokens_per_second, now))
        else:
            due = now - self.drawn >= _REFRESH_SECONDS or step == self.steps
            self.drawn = now if due else self.drawn
            description = self.line(step, loss, lr, tokens_per_second, now)
            self.bar.update(self.task, completed=step, description=description, refresh=due)

    def _print(self, text: str) -> None:
        if self.bar is None:
            print(text, flush=True)
        else:
            self.bar.console.print(text, markup=False, highlight=False)

    def line(self, step: int, loss: float, lr: float, tokens_per_second: float, now: float) -> str:
        left = (now - self.started) / max(1, step - self.first) * (self.steps - step)
        width = len(str(self.steps))
        return (
            f"step {step:>{width}}/{self.steps}  loss {loss:.4f}  lr {lr:.2e}  "
            f"{tokens_per_second:,.0f} tokens/s  {_clock(left)} left"
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
