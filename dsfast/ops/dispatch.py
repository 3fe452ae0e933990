"""Which implementation an operator takes: "reference" (PyTorch), "native" (C++, CPU) or "triton" (GPU).

"auto", the default, takes the device's own kernels where they support the input and otherwise the reference; such a
fall-back warns once, with the reason, and is listed by `fallbacks()`. Asking for an implementation by name never falls back.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import get_args

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad

from dsfast.config import OPERATORS, Implementation
from dsfast.errors import UserError, expect_known
from dsfast.ops import native, triton
from dsfast.triton_kernels.launch import DTYPES, compiling, dtype_name

IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)
_OF_DEVICE = {"cpu": "triton" if triton.INTERPRETED else "native", "cuda": "triton"}

_selection: ContextVar[Mapping[str, str]] = ContextVar("dsfast_ops_selection", default=MappingProxyType({}))
_fallbacks: dict[tuple[str, str], str] = {}


class FallbackWarning(UserWarning):
    """An operator runs in plain PyTorch although kernels exist for this device."""


@contextmanager
def use(implementation: str, *operators: str) -> Iterator[None]:
    """Run `operators` (all of them if none is named) with `implementation` inside the block.

    Raises UserError for an unknown implementation or operator; running an operator raises UserError where the
    implementation named cannot run on the tensor's device. What torch.compile has traced keeps what was selected then.
    """
    _check_names(implementation, operators)
    with _select(dict.fromkeys(operators or OPERATORS, implementation)):
        yield


@contextmanager
def configured(kernels: Mapping[str, str], device: str = "cpu") -> Iterator[None]:
    """Run as a config's `runtime.kernels` says (operator or "default" -> implementation) inside the block.

    Operators that neither an entry nor "default" covers keep what is selected outside. Raises UserError for unknown names,
    and at once where an implementation named cannot run on `device`.
    """
    for operator, implementation in kernels.items():
        _check_names(implementation, () if operator == "default" else (operator,))
    selection = dict.fromkeys(OPERATORS, kernels["default"]) if "default" in kernels else {}
    selection |= {operator: implementation for operator, implementation in kernels.items() if operator != "default"}
    for operator, implementation in selection.items():
        _resolve(operator, device, torch.float32, implementation)
    with _select(selection):
        yield


@contextmanager
def _select(selection: Mapping[str, str]) -> Iterator[None]:
    token = _selection.set({**_selection.get(), **selection})
    try:
        yield
    finally:
        _selection.reset(token)


def choose(operator: str, x: Tensor, not_native: str = "", not_triton: str = "") -> str:
    """The implementation `operator` takes for `x`'s device and dtype; notes and warns of a fall-back.

    `not_native` and `not_triton`, where not empty, say why the C++ and the Triton kernels do not take this call's arguments.
    Raises TypeError where x does not hold floating-point numbers.
    """
    if not x.is_floating_point():
        raise TypeError(f"{operator}: expected floating-point numbers, got {x.dtype}")
    return _choose(operator, x.device.type, x.dtype, not_native, not_triton)


IN_FLOAT32 = ("moe_route", "adamw", "muon")
"""What a model runs in float32 whatever it computes in: near ties decide the choice of experts; the weights are masters."""


def _choose(operator: str, device: str, dtype: torch.dtype, not_native: str, not_triton: str) -> str:
    refused = _derived_otherwise() or (not_triton if _OF_DEVICE.get(device) == "triton" else not_native)
    implementation, reason = _resolve(operator, device, dtype, refused=refused)
    if implementation == "reference" and reason:
        note_fallback(operator, device, "runs in plain PyTorch", reason, stacklevel=5)
    if implementation == "reference" and compiling.get():
        raise triton.NotCompiledError(f"{operator} runs in plain PyTorch")
    return implementation


# torch.compile makes the choice, and gives its warning, when it traces. This is what torch.compiler.assume_constant_result
# does, but that imports torch._dynamo: 2.6 s and 160 MB for everyone who imports dsfast.
_choose._dynamo_marked_constant = True


_DERIVING = (TransformType.Grad, TransformType.Jvp)


def _derived_otherwise() -> str:
    """Why the kernels are not for a derivative that is made here but by no backward pass, or "": without their part it would
    silently be wrong."""
    levels = get_interpreter_stack()
    if forward_ad._current_level < 0 and not (levels and any(level.key() in _DERIVING for level in levels)):
        return ""
    return "the kernels have derivatives for a backward pass, not for forward mode or torch.func's transforms"


def note_fallback(operator: str, device: str, what: str, reason: str, stacklevel: int = 2) -> None:
    """Warn, the first time, of `what` runs in place of the device's own kernel and why; `fallbacks()` lists it."""
    if (operator, reason) not in _fallbacks:
        _fallbacks[operator, reason] = device
        warnings.warn(f"{operator} {what}: {reason}", FallbackWarning, stacklevel=stacklevel)


def fallbacks() -> list[dict[str, str]]:
    """The fall-backs of this process so far: operator, device, reason."""
    return [{"operator": op, "device": device, "reason": reason} for (op, reason), device in _fallbacks.items()]


def report(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[dict[str, str]]:
    """For each operator the implementation it takes on `device` now, and why."""
    rows = []
    for operator in OPERATORS:
        own = torch.float32 if device == "cuda" and operator in IN_FLOAT32 else dtype
        implementation, reason = _resolve(operator, device, own)
        why = reason or ("asked for" if implementation == "reference" else _available(implementation, operator, own)[1])
        rows.append({"operator": operator, "implementation": implementation, "reason": why})
    return rows


def _resolve(
    operator: str, device: str, dtype: torch.dtype, wanted: str | None = None, refused: str = ""
) -> tuple[str, str]:
    """(implementation, reason of a fall-back or ""); `wanted` in place of what is selected; refused: why the device's own
    kernels do not take the arguments."""
    wanted = wanted or _selection.get().get(operator, "auto")
    own = _OF_DEVICE.get(device)
    if wanted == "reference" or (own is None and wanted == "auto"):
        return "reference", ""
    if wanted not in ("auto", own):
        there = ", ".join(filter(None, ("reference", own)))
        raise UserError(f"{operator}: implementation {wanted!r} does not run on {device}; there: {there}")
    available, reason = _available(own, operator, dtype)
    if available and refused:
        available, reason = False, refused
    if available:
        return own, ""
    if wanted == "auto":
        return "reference", reason
    raise UserError(f"{operator}: implementation {wanted!r} cannot run: {reason}")


def only_in(known: Collection[torch.dtype], dtype: torch.dtype, what: str = "") -> str:
    """Why the Triton kernels do not take `dtype`, `what` they take in `known` alone; empty where it is one of these."""
    if dtype in known:
        return ""
    return f"the Triton kernels take {what}{', '.join(map(dtype_name, known))}, got {dtype_name(dtype)}"


def _available(implementation: str, operator: str, dtype: torch.dtype) -> tuple[bool, str]:
    if implementation == "triton":
        known = (torch.float32,) if operator in IN_FLOAT32 else DTYPES
        if reason := only_in(known, dtype):
            return False, reason
        return triton.available(operator)
    module, reason = native.status()
    if module is None:
        return False, reason
    if dtype is not torch.float32:
        return False, f"the C++ kernels compute in float32, the input is {dtype_name(dtype)}"
    return True, native.how(operator)


def _check_names(implementation: str, operators: tuple[str, ...]) -> None:
    expect_known("implementation", [implementation], IMPLEMENTATIONS)
    expect_known("operator", operators, OPERATORS)
