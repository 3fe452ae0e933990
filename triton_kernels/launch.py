"""A kernel with all it needs to run: the launchers build it, `run` starts it, dsfast.triton_kernels.ahead compiles it for a
chip that is not here, dsfast.triton_kernels.together all of a step at once. So what is checked without a GPU is what runs on
one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dsfast.triton_kernels.branches import Branches

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

INTERPRETED_AS = 9
"""Whose tiles Triton's interpreter runs: what `large_tiles` says of that chip. The tests go through all."""

compiling: ContextVar[bool] = ContextVar("dsfast_launch_compiling", default=False)
"""Where it is True kernels are compiled and not started: what they should write keeps the values it had."""

branches: ContextVar[Branches | None] = ContextVar("dsfast_branches", default=None)
"""Where they are, `aside` starts launches beside those that follow."""


@dataclass(frozen=True)
class Launch:
    """`kernel` over `grid` programs with `arguments` by name, others of them left out, and the compiler's `options`."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int | bool]
    itemsize: int  # bytes of an element of the matrices
    rows: int  # of the products' left operand in one program

    def tensors(self) -> list[Tensor]:
        """The tensors that the kernel takes."""
        return [x for name in self.kernel.arg_names if isinstance(x := self.arguments[name], Tensor)]

    def run(self) -> None:
        """Start it, if there is a program to start; only compile it where `compiling` says so."""
        if 0 in self.grid:
            return
        arguments = (self.arguments[name] for name in self.kernel.arg_names)
        if compiling.get():
            self.kernel.warmup(*arguments, grid=self.grid, **self.options)
        else:
            self.kernel[self.grid](*arguments, **self.options)


def aside(*stages: tuple[Iterable[Launch], Sequence[Tensor]], urgent: bool = False) -> None:
    """Run every stage's launches, in order. While a step is recorded with branches they run beside what follows: the first
    operator that takes one of a stage's results, the tensors given with it, waits for it. urgent: that is soon for the first one.

    Nothing else that they fill may be read by others, and nothing that they read may be changed in place.
    """
    now = branches.get()
    if now is not None:
        now.start(stages, urgent)
        return
    for launches, _ in stages:
        for launch in launches:
            launch.run()


def interpreted() -> bool:
    """Whether Triton, asked in this process, takes its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def dtype_name(dtype: torch.dtype) -> str:
    """The name without "torch.": float32."""
    return str(dtype).removeprefix("torch.")


def rows(*tensors: Tensor) -> list[Tensor]:
    """Each tensor itself where its last dimension is contiguous, else a contiguous copy.

    Strides before it may be any below 2^23: offsets inside a tile, of at most 256 rows, are 32-bit. Wider ones are copied too.
    """
    return [x if x.stride(-1) == 1 and max(x.stride()) < 2**23 else x.contiguous() for x in tensors]


def large_tiles(device: torch.device) -> int:
    """The major compute capability of `device` where it is a data-centre chip with warp-group products and 227 KB of shared
    memory (sm_90, sm_100), else 0.

    Without a device (Triton's interpreter) INTERPRETED_AS.
    """
    if device.type != "cuda":
        return INTERPRETED_AS
    major = 0 if torch.version.hip else torch.cuda.get_device_capability(device)[0]
    return major if major in (9, 10) else 0


@cache
def multiprocessors(device: torch.device) -> int:
    """How many of them `device` has. Without a device (Triton's interpreter) few, so that loops over tiles go round."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def padded(width: int) -> int:
    """The power of two that a width is rounded up to in a tile: 16 at least, a product's narrowest."""
    return max(16, 1 << (width - 1).bit_length())


def on_meta(dtype: torch.dtype) -> Callable[..., Tensor]:
    """torch.empty on the meta device, of `dtype` if no other is given: for launches that are only compiled."""
    return partial(torch.empty, dtype=dtype, device="meta")
