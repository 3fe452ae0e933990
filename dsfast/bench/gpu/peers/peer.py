"""What a peer is, and how most of them are prepared."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dsfast import ops
from dsfast.bench.gpu.cases import identity
from dsfast.bench.gpu.replaced import replaced
from dsfast.ops import triton


class RefusedError(Exception):
    """The peer does not take these inputs."""


@dataclass(frozen=True)
class Prepared:
    """run(): the forward pass; leaves: what gradients are wanted for; result: what `run` returns as the operator's outputs."""

    run: Callable[[], Any]
    leaves: tuple[Tensor, ...]
    result: Callable[[Any], Any] = identity


@dataclass(frozen=True)
class GpuPeer:
    """prepare(arguments of the operator, positions that want gradients) -> Prepared; missing(): why it cannot run, or "".

    compiled: whether torch.compile makes it, for each size anew.
    """

    what: str
    prepare: Callable[[list, Sequence[int]], Prepared]
    missing: Callable[[], str] = lambda: ""
    compiled: bool = False


def direct(function: Callable, arguments: list, differentiable: Sequence[int]) -> Prepared:
    """`function` on the operator's own arguments."""
    inputs = list(arguments)
    for position in differentiable:
        inputs[position] = arguments[position].detach().clone().requires_grad_()
    return Prepared(partial(function, *inputs), tuple(inputs[position] for position in differentiable))


def plain(what: str, function: Callable, missing: Callable[[], str] = lambda: "") -> GpuPeer:
    return GpuPeer(what, partial(direct, function), missing)


def compiled(what: str, function: Callable) -> GpuPeer:
    def prepare(arguments: list, differentiable: Sequence[int]) -> Prepared:
        return direct(torch.compile(function), arguments, differentiable)

    return compiled_by(f"torch.compile of {what}", prepare)


def compiled_by(what: str, prepare: Callable[[list, Sequence[int]], Prepared]) -> GpuPeer:
    return GpuPeer(what, prepare, no_gpu, compiled=True)


def no_gpu() -> str:
    """Why what is compiled for a GPU cannot run."""
    return "" if torch.cuda.is_available() else "compiled for a GPU, and torch finds none"


def no_liger() -> str:
    return ("" if importlib.util.find_spec("liger_kernel") else "liger-kernel is not installed") or no_gpu()


def with_maximum(kernels: str, raw: Callable[..., bool], function: Callable) -> GpuPeer:
    """dsfast's `function` with a maximum in the softmax of `kernels`, a module of dsfast.triton_kernels; raw(arguments): whether
    it has none else."""

    def run(*arguments):
        with replaced(import_module(f"dsfast.triton_kernels.{kernels}"), "takes_raw", lambda dtype, large: False):
            return function(*arguments)

    def prepare(arguments: list, differentiable: Sequence[int]) -> Prepared:
        if not raw(arguments):
            raise RefusedError("dsfast has a maximum here too")
        return direct(run, arguments, differentiable)

    return GpuPeer("dsfast's kernels with a maximum in the softmax", prepare, triton.missing)


def reference(operator: str, function: Callable) -> Callable:
    def run(*arguments):
        with ops.use("reference", operator):
            return function(*arguments)

    return run
