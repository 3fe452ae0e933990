"""How the steps of a run are carried out on its device: one by one on a CPU, as one CUDA graph on a GPU.

This is where the training loop's knowledge of devices stands; the kernels' own is in dsfast.ops.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsfast import ops
from dsfast.config import Config
from dsfast.errors import UserError
from dsfast.model import captured, gpu, gpu_has_bfloat16, precision_of
from dsfast.ops import native
from dsfast.train.device_step import Batches, DeviceStep, row_elements
from dsfast.train.optimizer import learning_rate_scale

if TYPE_CHECKING:
    from dsfast.train.loop import StepReport, Trainer

RESIDENT_BYTES = 2**28
"""So much device memory, and no more, may hold batches; a longer run loads the next ones in between."""

Done = tuple["StepReport", list[Tensor]]
"""A step's report and, for each router, the tokens of its experts [E]."""


def prepare(config: Config) -> torch.device:
    """Apply config.runtime to the process; returns the device. Raises UserError for what is not there."""
    runtime = config.runtime
    if runtime.device == "cuda":
        _check_gpu(config)
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    products = precision_of(runtime).products
    with ops.configured(runtime.kernels, runtime.device), native.products_in(products):
        pass  # what cannot run is noticed before anything is built
    if products == torch.bfloat16 and not native.fast_bfloat16():
        why = "this processor has no fast instruction for it, float32 takes less time"
        ops.note_fallback("runtime.dtype", runtime.device, "'bfloat16' is slower here", why)
    compiled, _ = native.status()
    if compiled is not None:
        compiled.keep_freed_memory()
    return torch.device(runtime.device)


def _check_gpu(config: Config) -> None:
    if not torch.cuda.is_available():
        raise UserError("runtime.device is 'cuda', but torch finds no GPU here; known here: cpu")
    if precision_of(config.runtime).tensors == torch.bfloat16 and not gpu_has_bfloat16():
        major, minor = torch.cuda.get_device_capability()
        raise UserError(
            f"runtime.dtype is 'bfloat16', but {torch.cuda.get_device_name()} (compute capability {major}.{minor}) cannot "
            "multiply it, 8.0 or newer can; set runtime.dtype to 'float32'"
        )


def steps_of(trainer: Trainer) -> HostSteps | DeviceSteps:
    """The way the trainer's device does its steps."""
    return DeviceSteps(trainer, captured) if trainer.device.type == "cuda" else HostSteps(trainer)


class HostSteps:
    """One step after the other, each with its batch from the data set, its numbers known as it returns."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def run(self) -> Iterator[Done]:
        """The next step."""
        trainer, train = self.trainer, self.trainer.config.train
        report = trainer.train_batch(trainer.dataset.rows.batch(trainer.steps_done, train.batch_size))
        yield report, [router.load for router in trainer.model.routers()]


class DeviceSteps:
    """Steps by a `DeviceStep`: launched as far as the next log line or checkpoint, then read.

    launch: makes of the step what is called for each, such as `captured`. It is made at the first `run`.
    Counters of the trainer and the optimizer are the host's; they are set when steps are read.
    """

    def __init__(self, trainer: Trainer, launch: Callable[[DeviceStep], Callable[[], None]]):
        config, rows = trainer.config, trainer.dataset.rows
        self.trainer, self._launch, self._call = trainer, launch, None
        self.tokens = config.train.batch_size * config.data.sequence_length
        segments = rows.most_segments(config.train.batch_size)
        fit = RESIDENT_BYTES // (8 * row_elements(self.tokens, segments))
        places = max(1, min(config.train.steps - trainer.steps_done, fit))
        batches = Batches(places, self.tokens, segments, trainer.device)
        self.step = DeviceStep(trainer.model, trainer.optimizer, config.train, trainer.precision.tensors, batches)
        self.first = self.loaded = trainer.steps_done
        """Steps first .. loaded - 1 (from 0) have their batches in device memory."""

    def run(self) -> Iterator[Done]:
        """Some steps, at least one; `seconds` of each is its share."""
        trainer, started = self.trainer, perf_counter()
        with trainer.kernels():
            if trainer.steps_done == self.loaded:
                self._load()
            if self._call is None:
                trainer.model.train()
                self._call = self._launch(self.step)
            begin, end = trainer.steps_done - self.first, self._pause() - self.first
            for _ in range(begin, end):
                self._call()
            read = self.step.read(begin, end)
        seconds = (perf_counter() - started) / len(read)
        for loss, norm, scale, skipped, loads in read:
            trainer.optimizer.updates += not skipped
            yield trainer.count_step(loss, norm, scale, skipped, self.tokens, seconds), list(loads)

    def _load(self) -> None:
        trainer, train = self.trainer, self.trainer.config.train
        self.first = self.loaded
        self.loaded = min(train.steps, self.first + len(self.step.batches.rows))
        steps = range(self.first, self.loaded)
        batches = [trainer.dataset.rows.batch(step, train.batch_size) for step in steps]
        self.step.load(batches, [learning_rate_scale(step, train) for step in steps], trainer.optimizer.updates)

    def _pause(self) -> int:
        """The step after which the host looks: the next that is logged or saved, or the last with a batch."""
        train, done = self.trainer.config.train, self.trainer.steps_done
        every = [n for n in (train.log_every, train.checkpoint_every) if n]
        return min([self.loaded, *((done // n + 1) * n for n in every)])


def gpu_errors(trainer: Trainer) -> AbstractContextManager[None]:
    """Make one line of what a GPU cannot do: UserError for memory that is not there, and for a GPU that fails."""
    train, data = trainer.config.train, trainer.config.data
    return gpu.gpu_errors(
        lambda said: (
            f"out of GPU memory after step {trainer.steps_done} with train.batch_size {train.batch_size} and "
            f"data.sequence_length {data.sequence_length}: lower one of them; {_kept(trainer)} ({said})"
        ),
        lambda said: f"the GPU failed after step {trainer.steps_done}: {said}; {_kept(trainer)}",
    )


def _kept(trainer: Trainer) -> str:
    return f"the last checkpoint is {trainer.last_saved}" if trainer.last_saved else "no checkpoint was written"


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: of the process, resident, on the CPU; of torch's allocator on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # not getrusage, whose peak survives exec: a child of a large process would show its parent's
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
