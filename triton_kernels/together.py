"""Compiles all kernels of a step at the same time, which its first call would compile one after the other."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import torch
import triton
from dsfast.triton_kernels.launch import compiling
from triton.runtime import driver


def compile_together(call: Callable[[], object]) -> None:
    """Call it and start no kernel: those not compiled yet are compiled instead, in a thread for each processor.

    Returns when all are compiled. Raises what `call` raises, and what the first compilation that fails does.
    """
    copy_context().run(_compile, call)  # its own context: after an error Triton 3.6 leaves its mode switched on


def _compile(call: Callable[[], object]) -> None:
    compiling.set(True)
    with (
        _Compilers(len(os.sched_getaffinity(0))) as threads,
        triton.AsyncCompileMode(threads),
        torch.autograd.set_multithreading_enabled(False),  # a GPU's backward pass has else a thread of its own
    ):
        call()


class _Compilers(ThreadPoolExecutor):
    """Threads that make of what Triton gives them a kernel and what launches it.

    In threads and not in processes: they hold Python's lock a fifth of the time, and a process would import torch first.
    """

    def submit(self, compile_kernel: Callable[[], Any]) -> Future:
        return super().submit(_with_launcher, compile_kernel)


def _with_launcher(compile_kernel: Callable[[], Any]) -> Any:
    """The kernel. Triton 3.6 has the C of its launcher compiled at the first launch; made here, it is found in the cache then."""
    kernel = compile_kernel()
    driver.active.launcher_cls(kernel.src, kernel.metadata)
    return kernel
