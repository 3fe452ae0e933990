"""The Triton kernels (dsfast.triton_kernels): which operators have one that can run here, and how to call it."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

OLDEST = (3, 6)  # version of triton
OLDEST_CHIP = (8, 0)  # compute capability: bfloat16 products and asynchronous copies
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
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
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"triton {version} is too old, 3.6 or newer is needed; run `pip install -U dsfast[gpu]`"
    return ""


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
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_CHIP:
        return False, f"the GPU has compute capability {capability[0]}.{capability[1]}, 8.0 or newer is needed"
    return True, "Triton kernel"


def launcher(operator: str, function: str) -> Callable:
    """`function` of dsfast.triton_kernels.`operator`, imported when first called: triton is not installed everywhere."""

    def launch(*arguments):
        return getattr(importlib.import_module(f"dsfast.triton_kernels.{operator}"), function)(*arguments)

    return launch
