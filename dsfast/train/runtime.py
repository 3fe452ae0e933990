"""What the process is made ready for: the config's device, threads and kernels, a GPU's errors in one line, memory's peak.

How steps are carried out on each device is in dsfast.train.steps; the kernels' own knowledge of devices in dsfast.ops.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dsfast import ops
from dsfast.config import Config
from dsfast.errors import UserError
from dsfast.model import DeepseekV3, any_native_products, gpu, gpu_has_bfloat16, precision_of
from dsfast.ops import native, triton

if TYPE_CHECKING:
    from dsfast.train.loop import Trainer


def prepare(config: Config) -> torch.device:
    """Apply config.runtime to the process; returns the device. Raises UserError for what is not there."""
    runtime = config.runtime
    _check_memory(config)
    if runtime.device == "cuda":
        with gpu.gpu_errors_while("being asked what it can do"):
            _check_gpu(config)
        triton.get_ready()
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    products = precision_of(runtime).products
    if products == torch.bfloat16 and not any_native_products(runtime):
        raise UserError(
            "runtime.dtype is 'bfloat16', which on a CPU is what the C++ kernels' products compute in, and runtime.kernels leaves"
            " none of them; set runtime.dtype to 'float32'"
        )
    compiled, reason = native.status()
    if products == torch.bfloat16 and compiled is None:
        raise UserError(
            f"runtime.dtype is 'bfloat16', which on a CPU takes the C++ kernels ({reason}); set it to 'auto'"
        )
    try:
        with ops.configured(runtime.kernels, runtime.device), native.products_in(products):
            pass  # what cannot run is noticed before anything is built
    except UserError as error:
        raise UserError(f"runtime: {error}") from None
    if products == torch.bfloat16 and not native.fast_bfloat16():
        why = "this processor has no fast instruction for it, float32 takes less time"
        ops.note_fallback("runtime.dtype", runtime.device, "'bfloat16' is slower here", why)
    if compiled is not None:
        compiled.keep_freed_memory()
    return torch.device(runtime.device)


@contextmanager
def answering(model: DeepseekV3, config: Config, asked: str | None) -> Iterator[None]:
    """Inside, a checkpoint's model is on the device that is `asked` for; None: on the one it was trained on, or with a warning on
    the CPU where that is not here. It computes in float32, with the kernels that the config names for that device.

    Raises UserError where "cuda" is asked for and is not here, and GpuError where the GPU fails or has no room for it.
    """
    here = torch.cuda.is_available()
    if asked == "cuda" and not here:
        raise UserError("--device cuda: torch finds no GPU here; known here: cpu")
    if asked is None and config.runtime.device == "cuda" and not here:
        warnings.warn("the model was trained on a GPU, and torch finds none here: it answers on the CPU", stacklevel=3)
    device = asked or (config.runtime.device if here else "cpu")
    kernels = config.runtime.kernels if device == config.runtime.device else {}
    with gpu.gpu_errors_while("loading the model", "it takes a GPU with room, or --device cpu"):
        model.to(device)
    with ops.configured(kernels, device):
        yield


def _check_memory(config: Config) -> None:
    """Raise UserError where the weights, and on a CPU their gradients and a moment, cannot fit: a process that asks for more
    memory than there is may get it, and be killed when it is used."""
    model, copies = config.model, 3 if config.runtime.device == "cpu" else 1
    needed = 4 * (copies * model.matrix_elements + model.max_position_embeddings * model.qk_rope_head_dim)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(
            f"model: {model.matrix_elements:,} parameters and {model.max_position_embeddings:,} positions take at least"
            f" {needed / 1e9:,.1f} GB to train; this machine has {there / 1e9:,.1f}"
        )


def _check_gpu(config: Config) -> None:
    if not torch.cuda.is_available():
        raise UserError("runtime.device is 'cuda', but torch finds no GPU here; known here: cpu")
    if precision_of(config.runtime).tensors == torch.bfloat16 and not gpu_has_bfloat16():
        major, minor = torch.cuda.get_device_capability()
        raise UserError(
            f"runtime.dtype is 'bfloat16', but {torch.cuda.get_device_name()} (compute capability {major}.{minor}) cannot "
            "multiply it, 8.0 or newer can; set runtime.dtype to 'float32', and in runtime.kernels nothing to 'triton'"
        )


def gpu_errors_in_training(trainer: Trainer) -> AbstractContextManager[None]:
    """Make one line of what a GPU cannot do: GpuError for memory that is not there, and for a GPU that fails."""
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
    """The most memory held so far: of the process, resident, on the CPU; what torch has taken of a GPU's.

    That is more than its tensors need: a recorded step keeps memory of its own. The driver's own is not in it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    # Not getrusage, whose peak survives exec: a child of a large process would show its parent's.
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
