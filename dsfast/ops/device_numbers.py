"""Numbers of an optimizer's step that may lie on the device, so that nothing waits for them and a CUDA graph takes new ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dsfast.ops.library import expect_dtype, expect_shape

_OF_THE_DEVICE = {"step": torch.int64, "clip_scale": torch.float32, "lr_scale": torch.float64}


def expect_on_device(operator: str, device: torch.device, **numbers: float | Tensor) -> None:
    """Check those numbers of an optimizer that are tensors: without dimension, on `device`, of the dtype each has there."""
    for name, x in numbers.items():
        if isinstance(x, Tensor):
            expect_shape(operator, name, x)
            expect_dtype(operator, _OF_THE_DEVICE[name], device, **{name: x})


def or_tensor(x: float | Tensor) -> tuple[float, Tensor | None]:
    """A number as the registered operators take it: itself, or a tensor that stands for it."""
    return (1, x) if isinstance(x, Tensor) else (x, None)


def or_number(x: float, on_device: Tensor | None) -> float:
    """The number again, where the device may be asked."""
    return x if on_device is None else on_device.item()


@contextmanager
def only_if_finite(clip_scale: float | Tensor, updated: Sequence[Tensor]) -> Iterator[None]:
    """What is done inside to `updated` is undone where clip_scale is a tensor that is not finite; nothing waits for it."""
    before = [x.clone() for x in updated] if isinstance(clip_scale, Tensor) else []
    yield
    for x, old in zip(updated, before, strict=False):
        x.copy_(torch.where(clip_scale.isfinite(), x, old))
