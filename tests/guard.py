"""A guard over a step of training or generation: what a CUDA graph cannot record is an error, on a CPU too."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsfast.config import OPERATORS
from dsfast.model import DeepseekV3
from dsfast.ops.triton import INTERPRETED
from dsfast.train.device_step import DeviceStep

WAITING = {"_local_scalar_dense", "item", "equal", "is_nonzero", "allclose"}
"""Operators of aten that look at values on the host."""
METHODS = ("item", "tolist", "numpy", "cpu", "to", "__bool__", "__int__", "__float__", "__index__", "is_pinned")
"""Those of a tensor that do; some of them are not seen by a dispatch mode on a CPU, where there is nothing to copy."""
FROM_THE_HOST = ("tensor", "as_tensor", "from_numpy")
"""Functions of torch that take the host's numbers: on a GPU a copy of memory that is not pinned."""
SHAPED_BY_DATA = {
    "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "repeat_interleave", "histc",
}  # fmt: skip
LAUNCHERS = str(Path(__file__).parents[1] / "triton_kernels")


class NotCapturableError(AssertionError):
    """Something that waits for the device, or whose shape depends on what is in memory."""


class GraphGuard(TorchDispatchMode):
    """Inside, what waits for the device, copies to or from the host or takes its shape from data raises NotCapturableError.

    Of an operator of dsfast's what a GPU runs is held to it: in the interpreter's process the operators of PyTorch's that it
    calls, and the launchers of its Triton kernels, but not what interprets a kernel; elsewhere C++ takes its place, and nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._in_operator, self._former, self.seen = False, {}, []

    def __enter__(self):
        watched = [(Tensor, name, self._watched) for name in METHODS]
        watched += [(torch, name, self._refused) for name in FROM_THE_HOST] + [(Tensor, "new_tensor", self._refused)]
        self._former = {(owner, name): getattr(owner, name) for owner, name, _ in watched}
        for owner, name, watch in watched:
            setattr(owner, name, watch(name, self._former[owner, name]))
        return super().__enter__()

    def __exit__(self, *error):
        for (owner, name), function in self._former.items():
            setattr(owner, name, function)
        return super().__exit__(*error)

    def _held(self) -> bool:
        """Whether what calls the caller is held to it, and not what stands in for a kernel."""
        return not self._in_operator or sys._getframe(2).f_code.co_filename.startswith(LAUNCHERS)

    def _refused(self, name: str, function):
        @wraps(function)
        def refused(*args, **kwargs):
            if self._held():
                raise NotCapturableError(f"{name} copies from the host")
            return function(*args, **kwargs)

        return refused

    def _watched(self, name: str, method):
        @wraps(method)
        def watched(x, *args, **kwargs):
            if self._held() and (
                name != "to" or "cpu" in (str(a) for a in (*args, *kwargs.values()) if not isinstance(a, Tensor))
            ):
                raise NotCapturableError(f"Tensor.{name} waits for the device")
            return method(x, *args, **kwargs)

        return watched

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in WAITING:
            raise NotCapturableError(f"{func} waits for the device")
        if name in SHAPED_BY_DATA:
            raise NotCapturableError(f"{func} has a shape that depends on data")
        if name in ("index", "index_put", "index_put_") and any(
            isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1])
        ):
            raise NotCapturableError(f"{func} with a mask has a shape that depends on data")
        if name == "_to_copy" and str(kwargs.get("device", "")) == "cpu":
            raise NotCapturableError(f"{func} copies to the CPU")
        if name == "_to_copy" and args[0].is_cpu and str(kwargs.get("device") or "cpu") != "cpu":
            raise NotCapturableError(f"{func} copies from the host")
        if len({x.device for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}) > 1:
            raise NotCapturableError(f"{func} takes a tensor from the host")
        self.seen.append(func.name())
        former, self._in_operator = self._in_operator, True
        try:
            if func.namespace == "dsfast" and INTERPRETED:
                with _Inside(self):
                    return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
            return func(*args, **kwargs)
        finally:
            self._in_operator = former


class _Inside(TorchDispatchMode):
    """Hands what an operator calls to the guard."""

    def __init__(self, guard: GraphGuard):
        super().__init__()
        self._guard = guard

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self._guard.__torch_dispatch__(func, types, args, kwargs)


def living_tensors() -> list[Tensor]:
    """All on the CPU that have memory."""
    found = [x for x in gc.get_objects() if type(x) in (Tensor, torch.nn.Parameter)]
    return [x for x in found if x.is_cpu and x.layout == torch.strided and _has_memory(x)]


def _has_memory(x: Tensor) -> bool:
    """Not where torch.compile has made it while tracing."""
    try:
        x.untyped_storage().data_ptr()
    except RuntimeError:
        return False
    return True


def kept_memory(call: Callable[[], object]) -> list[Tensor]:
    """The tensors that are alive after `call` in memory that none had before it."""

    def places() -> dict[int, Tensor]:
        gc.collect()
        return {x.untyped_storage().data_ptr(): x for x in living_tensors()}

    before = set(places())
    call()
    return [x for place, x in places().items() if place not in before]


def kept_by_step(step: Callable[[], object], model: DeepseekV3) -> list[tuple[int, ...]]:
    """Shapes of what `kept_memory` finds, but for what each step makes anew and no other reads: the routers' loads, and where in
    a cache its tokens lie."""
    kept = kept_memory(step)
    anew = [router.load for router in model.routers()] + ([step.cache._positions] if hasattr(step, "cache") else [])
    return [tuple(x.shape) for x in kept if x.data_ptr() not in [y.data_ptr() for y in anew]]


def operators_called(seen: list[str]) -> set[str]:
    """Those of dsfast, in any of their forms, among the names that a guard has seen."""
    return {op for op in OPERATORS for name in seen if re.match(rf"dsfast::{op}(_|$)", name)}


def addresses(step: DeviceStep) -> list[int]:
    """Where everything lies that a captured step reads or writes again: state, batches, rates, gradients, cast weights."""
    gradients = [p.grad for p in step.parameters if p.grad is not None]
    assert len(gradients) == len(step.gradients)
    cast = list((step.weights.cast or {}).values())
    return [x.data_ptr() for x in [*step.state(), step.batches.rows, *step.gradients, *gradients, *cast]]
