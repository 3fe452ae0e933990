"""Registration with torch.library, calls, and the checks every operator makes before a pointer crosses into C++."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import _C, Tensor

from dsfast.ops.triton import INTERPRETED

_LIBRARY = torch.library.Library("dsfast", "DEF")
_ON_CPU: dict[str, Callable] = {}
_DERIVATIVES: dict[str, type[torch.autograd.Function]] = {}
_PLAIN_TENSOR = _C._dispatch_keys(torch.empty(0))
"""The dispatch keys of a CPU tensor that is nothing else besides, a subclass or a lazily negated view."""
_PLAIN_THREAD = _C._dispatch_tls_local_include_set()
"""The dispatch keys of a thread without a mode, a transformation or a trace."""


def define(schema: str, *, cpu: Callable, fake: Callable, cuda: Callable | None = None) -> None:
    """Register `dsfast::<schema>` with its CPU kernel, its shape function and, where there is one, its GPU kernel."""
    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    _ON_CPU[name] = cuda if INTERPRETED and cuda is not None else cpu
    _LIBRARY.impl(name, _ON_CPU[name], "CPU")
    if cuda is not None:
        _LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"dsfast::{name}", fake, lib=_LIBRARY)


def call(name: str, *inputs):
    """`torch.ops.dsfast.name(*inputs)`, for inputs that are no lists.

    On CPU tensors that nothing else looks at, no compiler, mode, transformation or profiler, the kernel is called at once: the
    dispatcher, which comes back to Python twice, takes longer than a small kernel.
    """
    if torch.compiler.is_compiling() or _observed(inputs):
        return getattr(torch.ops.dsfast, name)(*inputs)
    return _run(name, _ON_CPU[name], inputs)


def _observed(inputs: tuple) -> bool:
    if _C._dispatch_tls_local_include_set() != _PLAIN_THREAD or _C._autograd._profiler_enabled():
        return True
    return any(isinstance(x, Tensor) and _C._dispatch_keys(x) != _PLAIN_TENSOR for x in inputs)


def _run(name: str, kernel: Callable, inputs: tuple):
    derivative = _DERIVATIVES.get(name)
    if derivative is None or not (torch.is_grad_enabled() and _C._any_requires_grad(*inputs)):
        return kernel(*inputs)
    return derivative.apply(kernel, *inputs)


def autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Register the derivative of `dsfast::name`; that of `dsfast::name_backward`, where there is one, is refused.

    As torch.library.register_autograd does, in half the time.
    """
    operator = getattr(torch.ops.dsfast, name).default

    def forward(ctx, kernel, *inputs):
        output = kernel(*inputs)
        setup_context(ctx, inputs, output)
        return output

    def with_kernel(ctx, *gradients):
        gradients = backward(ctx, *gradients)
        return None, *(gradients if isinstance(gradients, tuple) else (gradients,))

    def dispatched(keys, *inputs):
        def below_autograd(*inputs):
            with _C._AutoDispatchBelowAutograd():
                return operator.redispatch(keys & _C._after_autograd_keyset, *inputs)

        return _run(name, below_autograd, inputs)

    functions = {"forward": staticmethod(forward), "backward": staticmethod(with_kernel)}
    _DERIVATIVES[name] = type(f"dsfast_{name}", (torch.autograd.Function,), functions)
    _LIBRARY.impl(name, dispatched, "Autograd", with_keyset=True)
    if f"{name}_backward" in _ON_CPU:
        why = f"dsfast::{name} has first derivatives only; ops.use('reference') has second ones"
        _refuse(f"{name}_backward", why)


def refuse_derivative(name: str) -> None:
    """Make a backward pass through `dsfast::name`, an operator for inference, an error."""
    _refuse(name, f"dsfast::{name} has no derivative; ops.use('reference') has")


def _refuse(name: str, why: str) -> None:
    """A formula that raises: without one the derivative would silently be wrong."""

    def refuse(ctx, *_):
        raise NotImplementedError(why)

    autograd(name, refuse, lambda ctx, inputs, output: None)


def expect_shape(operator: str, argument: str, x: Tensor, *shape: int | str) -> None:
    """Raise ValueError unless `x` has `shape`; a letter stands for any size."""
    fits = x.dim() == len(shape)
    for expected, size in zip(shape, x.shape, strict=False):
        fits = fits and (isinstance(expected, str) or expected == size)
    if not fits:
        expected = ", ".join(str(s) for s in shape)
        raise ValueError(f"{operator}: {argument} must have shape [{expected}], got {list(x.shape)}")


def expect_dtype(operator: str, dtype: torch.dtype, device: torch.device, **tensors: Tensor | None) -> None:
    """Raise TypeError unless every tensor has `dtype` and lies on `device`."""
    for argument, x in tensors.items():
        if x is not None and (x.dtype != dtype or x.device != device):
            raise TypeError(f"{operator}: {argument} must be {dtype} on {device}, got {x.dtype} on {x.device}")


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


def rows(x: Tensor) -> Tensor:
    """`x` itself where its last dimension is contiguous (any strides before it), else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.size(-1) == 1 else x.contiguous()
