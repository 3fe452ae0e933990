"""The Triton kernels (dsfast.triton_kernels): which operators have one that can run here, how to call it, where it is kept."""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path

import numpy
import torch
from torch import Tensor

from dsfast.errors import UserError, first_line
from dsfast.files import cache_folder
from dsfast.triton_kernels.launch import interpreted
from dsfast.triton_kernels.ptxas import PtxasError, use_right_ptxas
from dsfast.triton_kernels.version import numbers

OLDEST = (3, 6)  # version of triton
OLDEST_CHIP = (8, 0)  # compute capability: bfloat16 products and asynchronous copies
BRANCHES, CHAIN = 4, -1  # streams of a capture beside its own; its own's priority, before that of branches
_NO_COMPILER = "needs a C compiler to start kernels and finds none; install gcc, or set CC"
INTERPRETED = interpreted()
"""Triton's interpreter runs the kernels on CPU tensors, slowly and one program after the other: to test them without a GPU. In
such a process the CPU's own implementation of an operator is its Triton kernel, where it has one."""


def runs_on(x: Tensor) -> bool:
    """Whether an operator's own kernel for `x`'s device is the Triton one."""
    return x.is_cuda or (INTERPRETED and x.is_cpu)


def missing() -> str:
    """What is wrong with the installed triton and how to mend it; empty if nothing is."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; run `pip install dsfast[gpu]`"
    version = importlib.import_module("triton").__version__
    if numbers(version) < OLDEST:
        return f"triton {version} is too old, 3.6 or newer is needed; run `pip install -U dsfast[gpu]`"
    return ""


def cannot_interpret() -> str:
    """Why this triton's interpreter fails; empty where it does not."""
    version = importlib.import_module("triton").__version__
    if numbers(version) > (3, 6) or numbers(numpy.__version__) < (2, 4):
        return ""
    return f"triton {version}'s interpreter fails with numpy 2.4 or newer; install triton 3.7 or newer"


def _no_launcher() -> str:
    """Why this triton cannot start kernels on a GPU: up to 3.6 a C compiler makes what does, for each kind of kernel. Later ones
    need it once, if what it made is not in the cache."""
    version = importlib.import_module("triton").__version__
    if numbers(version) > (3, 6) or os.environ.get("CC") or any(map(shutil.which, ("clang", "gcc"))):
        return ""
    return f"triton {version} {_NO_COMPILER}"


@cache
def available(operator: str) -> tuple[bool, str]:
    """Whether `operator` has a Triton kernel that can run here, and the reason."""
    if importlib.util.find_spec(f"dsfast.triton_kernels.{operator}") is None:
        return False, "dsfast has no Triton kernel for it yet"
    if reason := missing():
        return False, reason
    if INTERPRETED:
        return True, "Triton kernel, interpreted"
    if not torch.cuda.is_available():
        return False, "PyTorch finds no GPU"
    try:
        capability = torch.cuda.get_device_capability()
    except RuntimeError as error:
        return False, f"the GPU does not answer: {first_line(error)}"
    if capability < OLDEST_CHIP:
        return False, f"the GPU has compute capability {capability[0]}.{capability[1]}, 8.0 or newer is needed"
    if reason := _no_launcher():
        return False, reason
    return True, "Triton kernel"


def launcher(operator: str, function: str) -> Callable:
    """`function` of dsfast.triton_kernels.`operator`, imported when first called: triton is not installed everywhere."""

    def launch(*arguments):
        with kept_kernels():
            return getattr(importlib.import_module(f"dsfast.triton_kernels.{operator}"), function)(*arguments)

    return launch


def get_ready() -> None:
    """Have a thread hash Triton itself, which is part of a kernel's name in its cache: a third of a second without Python's lock,
    for which the first kernel would wait."""
    if not missing():
        threading.Thread(target=importlib.import_module("triton.runtime.cache").triton_key, daemon=True).start()


class NotCompiledError(RuntimeError):
    """Where kernels are compiled and not started, something was to compute with what they should have written."""


def compile_together(call: Callable[[], object]) -> None:
    """Call it and start no Triton kernel: those it would start are compiled instead, all at the same time.

    PyTorch's own operators run, on memory that no kernel has written. An operator of dsfast's that has no kernel here would as
    well, and may wait for what it reads or fail: there the call ends, and what it has not come to is not compiled.
    Raises what `call`, or the compilation of a kernel, raises otherwise.
    """
    if missing():
        return
    together = importlib.import_module("dsfast.triton_kernels.together")
    with kept_kernels(), suppress(NotCompiledError):
        together.compile_together(call)


def branches() -> AbstractContextManager:
    """For one capture, made before it: inside, kernels whose results nothing waits for are on branches of the graph."""
    if missing():
        return nullcontext()
    module = importlib.import_module("dsfast.triton_kernels.branches")
    return module.Branches(*_branch_streams(torch.cuda.current_device()))


@cache
def _branch_streams(device: int) -> tuple[list[torch.cuda.Stream], torch.cuda.Stream]:
    """The streams that all recordings share, and the one with the chain's priority: torch has 32 and hands them out in turns."""
    return [torch.cuda.Stream(device) for _ in range(BRANCHES)], torch.cuda.Stream(device, priority=CHAIN)


def kernel_cache() -> Path:
    """The folder in which Triton keeps compiled kernels: $TRITON_CACHE_DIR, else `triton` in dsfast's own cache folder."""
    return Path(os.environ.get("TRITON_CACHE_DIR") or cache_folder() / "triton")


@contextmanager
def kept_kernels() -> Iterator[None]:
    """Inside, kernels are compiled into `kernel_cache()`, or read from it.

    A folder that cannot be written to gives a warning, once, and kernels are kept until the process ends. One that fills up, or
    holds a kernel that cannot be read back, raises UserError, and so does a ptxas that compiles some kernels wrongly, or a C
    compiler that is missing or fails. What a compilation that was cut off left behind is compiled anew.
    """
    if INTERPRETED:
        yield
        return
    use_kernel_cache()
    try:
        _have_right_ptxas()
        yield
    except PtxasError as error:
        raise UserError(str(error)) from error
    except subprocess.CalledProcessError as error:
        if "-shared" not in error.cmd:  # another of triton's tools
            raise
        raise UserError(
            f"{error.cmd[0]} could not compile what starts GPU kernels (exit status {error.returncode}); it needs Python's"
            " headers (python3-dev); another C compiler may be named in CC"
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RuntimeError, KeyError) as error:
        if "Failed to find C compiler" in str(error):
            raise UserError(f"triton {_NO_COMPILER}") from error
        if not _is_of_the_cache(error):
            raise
        raise UserError(
            f"{kernel_cache()}: a compiled kernel could not be written or read back ({first_line(error)}); make room, or remove"
            " the folder: kernels are then compiled anew"
        ) from error


@cache
def _have_right_ptxas() -> None:
    """For every GPU that is here. Raises PtxasError."""
    for device in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(device)
        use_right_ptxas(10 * major + minor)


@cache
def use_kernel_cache() -> None:
    """Have `kernel_cache()` be a folder that can be written to, as `kept_kernels` says; here and in processes started later."""
    folder = kernel_cache()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        temporary = tempfile.TemporaryDirectory(prefix="dsfast-triton-")
        atexit.register(temporary.cleanup)
        named = next((f"{name} " for name in ("TRITON_CACHE_DIR", "DSFAST_CACHE") if os.environ.get(name)), "")
        warnings.warn(
            f"compiled GPU kernels are kept for this process alone: {named}{folder}: {error.strerror}; set TRITON_CACHE_DIR to a"
            " folder that can be written to",
            stacklevel=2,
        )
        folder = Path(temporary.name)
    os.environ["TRITON_CACHE_DIR"] = str(folder)  # Triton looks at each compilation, and so do processes started later


def _is_of_the_cache(error: Exception) -> bool:
    """Whether it is about a file of the cache or the room for one, or a kernel that the driver did not recognise."""
    if isinstance(error, OSError):
        return Path(error.filename or kernel_cache()).is_relative_to(kernel_cache())
    if isinstance(error, KeyError):
        return "Unknown key: " in str(error)  # Triton 3.7: a file of the kernel is gone
    return not isinstance(error, RuntimeError) or "device kernel image is invalid" in str(error)
