"""How the steps of a run are carried out on its device: one by one on a CPU, as one CUDA graph on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dsfast.model import captured
from dsfast.model.changed import note_changed, note_hooked
from dsfast.train.device_step import Batches, DeviceStep, read, row_elements
from dsfast.train.optimizer import learning_rate_scale

if TYPE_CHECKING:
    from dsfast.train.loop import StepReport, Trainer

RESIDENT_BYTES = 2**28
"""So much device memory, and no more, may hold batches; a longer run loads the next ones in between."""

Done = tuple["StepReport", list[Tensor]]
"""A step's report and, for each router, the tokens of its experts [E]."""


def steps_of(trainer: Trainer) -> HostSteps | DeviceSteps:
    """The way the trainer's device does its steps."""
    if trainer.device.type != "cuda" or note_hooked(trainer.model):
        return HostSteps(trainer)
    if note_changed(trainer.model):  # what hooks do in Python is done as a step is recorded, not as it is replayed
        return DeviceSteps(trainer, lambda step: step)
    return DeviceSteps(trainer, partial(captured, branched=True))


class HostSteps:
    """One step after the other, each with its batch from the data set, its numbers known as it returns."""

    preparation_seconds = busy_seconds = None
    """There is nothing to prepare, and nothing beside which the host works."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def prepare(self) -> None:
        """Nothing."""

    def run(self) -> Iterator[Done]:
        """The next step."""
        trainer, train = self.trainer, self.trainer.config.train
        report = trainer.train_batch(trainer.dataset.rows.batch(trainer.steps_done, train.batch_size))
        yield report, [router.load for router in trainer.model.routers()]

    def finish(self) -> Iterator[Done]:
        """No step is under way between two calls of `run`."""
        return iter(())


class Block(NamedTuple):
    """Steps launched together, as far as step `end` (from 0, not in it), and what they have sent to the host.

    since: when they were launched, by the host's clock; begin and done: marks of the device's before and after.
    """

    end: int
    since: float
    begin: torch.cuda.Event | None
    done: torch.cuda.Event | None
    sent: tuple[Tensor, Tensor]


class DeviceSteps:
    """Steps by a `DeviceStep`, launched in blocks that end at a log line or a checkpoint.

    While the host reads a block the device does the next one, which is launched before; but not where the host needs the
    weights as they are after a block, or has to load batches. So the device is a block ahead of the trainer's and the optimizer's
    counters, which are set when steps are read; `finish` brings them together.

    launch: makes of the step what is called for each, such as `captured`; `prepare` calls it.
    """

    def __init__(self, trainer: Trainer, launch: Callable[[DeviceStep], Callable[[], None]]):
        config, rows = trainer.config, trainer.dataset.rows
        self.trainer, self._make_call = trainer, launch
        self.preparation_seconds = 0.0
        self.busy_seconds: float | None = None
        """By a GPU's own clock, from the first to the last work of each block that was read; None where that would not tell."""
        self.tokens = config.train.batch_size * config.data.sequence_length
        segments = rows.most_segments(config.train.batch_size)
        fit = RESIDENT_BYTES // (8 * row_elements(self.tokens, segments))
        places = max(1, min(config.train.steps - trainer.steps_done, fit))
        batches = Batches(places, self.tokens, segments, trainer.device)
        self.step = DeviceStep(trainer.model, trainer.optimizer, config.train, trainer.precision.tensors, batches)
        self.call: Callable[[], None] | None = None
        """Launches the next step whose batch is loaded; `prepare` makes it."""
        self.first = self.loaded = self.launched = trainer.steps_done
        """Steps first .. loaded - 1 (from 0) have their batches in device memory; those before `launched` are launched."""
        self._ahead: Block | None = None
        self._last_read = 0.0

    def prepare(self) -> None:
        """Load the first batches and make what is called for each step, in preparation_seconds; once, before `run`."""
        started = perf_counter()
        with self.trainer.kernels():
            self._load()
            self.trainer.model.train()
            self.call = self._make_call(self.step)
        self.preparation_seconds = perf_counter() - started

    def run(self) -> Iterator[Done]:
        """The next block's steps, at least one; `seconds` of each is its share."""
        with self.trainer.kernels():
            block = self._ahead or self._launch()
            self._ahead = None if self._host_is_needed(block.end) else self._launch()
        yield from self._read(block)

    def finish(self) -> Iterator[Done]:
        """The steps that were launched ahead; no others are."""
        block, self._ahead = self._ahead, None
        if block is not None:
            yield from self._read(block)

    def _launch(self) -> Block:
        since = perf_counter()
        if self.launched == self.loaded:
            self._load()
        begin, self.launched = self.launched, self._pause()
        first = mark(self.trainer.device)
        for _ in range(begin, self.launched):
            self.call()
        # A recorded step counts in memory of its own, of which the model knows one recording's.
        for router, load in zip(self.step.routers, self.step.loads[self.launched - 1 - self.first], strict=True):
            router.load = load
        sent = self.step.sent(begin - self.first, self.launched - self.first)
        return Block(self.launched, since, first, mark(self.trainer.device), sent)

    def _read(self, block: Block) -> Iterator[Done]:
        if block.done is not None:
            block.done.synchronize()
            if self.call is not self.step:  # launched one by one, kernels may leave the device idle in between
                self.busy_seconds = (self.busy_seconds or 0.0) + block.begin.elapsed_time(block.done) / 1e3
        measured, now = read(*block.sent), perf_counter()
        seconds = (now - max(block.since, self._last_read)) / len(measured)
        self._last_read = now
        for loss, norm, scale, skipped, loads in measured:
            self.trainer.optimizer.updates += not skipped
            yield self.trainer.count_step(loss, norm, scale, skipped, self.tokens, seconds), list(loads)

    def _host_is_needed(self, step: int) -> bool:
        """Whether nothing may be launched after `step` before the host has read it."""
        every = self.trainer.config.train.checkpoint_every
        return step == self.loaded or bool(every and step % every == 0)

    def _load(self) -> None:
        trainer, train = self.trainer, self.trainer.config.train
        self.first = self.loaded
        self.loaded = min(train.steps, self.first + len(self.step.batches.rows))
        steps = range(self.first, self.loaded)
        batches = [trainer.dataset.rows.batch(step, train.batch_size) for step in steps]
        self.step.load(batches, [learning_rate_scale(step, train) for step in steps], trainer.optimizer.updates)

    def _pause(self) -> int:
        """The step after which the host looks: the next that is logged or saved, or the last with a batch."""
        train = self.trainer.config.train
        every = [n for n in (train.log_every, train.checkpoint_every) if n]
        return min([self.loaded, *((self.launched // n + 1) * n for n in every)])


def mark(device: torch.device) -> torch.cuda.Event | None:
    """A moment of `device`'s own time, after all that was launched so far; None on a CPU, which is never behind."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
