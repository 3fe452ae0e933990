"""Registration with torch.library, and the checks every operator makes before a pointer crosses into C++."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsfast.ops.triton import INTERPRETED

_LIBRARY = torch.library.Library("dsfast", "DEF")


def define(schema: str, *, cpu: Callable | None, fake: Callable, cuda: Callable | None = None) -> None:
    """Register `dsfast::<schema>` with its shape function and the kernels there are of it: the CPU's, the GPU's."""
    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    on_cpu = cuda if INTERPRETED and cuda is not None else cpu
    if on_cpu is not None:
        _LIBRARY.impl(name, on_cpu, "CPU")
    if cuda is not None:
        _LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"dsfast::{name}", fake, lib=_LIBRARY)


def autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Register the derivative of `dsfast::name`; that of `dsfast::name_backward`, where there is one, is refused.

    backward is called where at least one output has a gradient: autograd may come without, from a function that gives none.
    """

    def backward_of_some(ctx, *gradients):
        if all(gradient is None for gradient in gradients):
            return (None,) * len(ctx.needs_input_grad)
        return backward(ctx, *gradients)

    torch.library.register_autograd(f"dsfast::{name}", backward_of_some, setup_context=setup_context, lib=_LIBRARY)
    if hasattr(torch.ops.dsfast, f"{name}_backward"):
        why = f"dsfast::{name} has first derivatives only; ops.use('reference') has second ones"
        _refuse(f"{name}_backward", why)


def refuse_derivative(name: str) -> None:
    """Make a backward pass through `dsfast::name`, an operator for inference, an error."""
    _refuse(name, f"dsfast::{name} has no derivative; ops.use('reference') has")


def _refuse(name: str, why: str) -> None:
    """A formula that raises: without one the derivative would silently be wrong."""

    def refuse(ctx, *_):
        raise NotImplementedError(why)

    torch.library.register_autograd(f"dsfast::{name}", refuse, lib=_LIBRARY)


def expect_shape(operator: str, argument: str, x: Tensor, *shape: int | str) -> None:
    """Raise ValueError unless `x` has `shape`; a letter stands for any size."""
    fits = x.dim() == len(shape) and all(isinstance(s, str) or s == n for s, n in zip(shape, x.shape, strict=True))
    if not fits:
        expected = ", ".join(str(s) for s in shape)
        raise ValueError(f"{operator}: {argument} must have shape [{expected}], got {list(x.shape)}")


def expect_dtype(operator: str, dtype: torch.dtype, device: torch.device, **tensors: Tensor | None) -> None:
    """Raise TypeError unless every tensor has `dtype` and lies on `device`."""
    for argument, x in tensors.items():
        if x is not None and (x.dtype != dtype or x.device != device):
            raise TypeError(f"{operator}: {argument} must be {dtype} on {device}, got {x.dtype} on {x.device}")


def expect_contiguous(operator: str, **tensors: Tensor) -> None:
    """Raise ValueError unless each tensor, which is written to, is contiguous."""
    for argument, x in tensors.items():
        if not x.is_contiguous():
            raise ValueError(f"{operator}: {argument}, written in place, must be contiguous, got strides {x.stride()}")


def expect_range(operator: str, argument: str, x: Tensor, limit: int, ignored: int | None = None) -> None:
    """Raise ValueError unless 0 <= x < limit (or x is `ignored`). The C++ kernels look themselves; a GPU is not waited for."""
    if x.is_cpu:
        bad = int(((x < 0) | (x >= limit) if ignored is None else ((x < 0) | (x >= limit)) & (x != ignored)).sum())
        raise_out_of_range(operator, argument, bad, x.numel(), limit, ignored)


def raise_out_of_range(
    operator: str, argument: str, bad: int, count: int, limit: int, ignored: int | None = None
) -> None:
    """The ValueError for `bad` (none: no error) of `count` indices outside 0..limit - 1."""
    if bad:
        other = "" if ignored is None else f" or be {ignored}"
        raise ValueError(f"{operator}: {argument} must lie in 0..{limit - 1}{other}, {bad} of {count} do not")


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may follow that asks for one of them."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def rows(x: Tensor) -> Tensor:
    """`x` itself where its last dimension is contiguous (any strides before it), else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.size(-1) == 1 else x.contiguous()
