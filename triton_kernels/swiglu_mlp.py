"""Launchers of dsfast.ops.swiglu_mlp, whose module has the maths: the kernels of moe_experts with one expert for all tokens.

Without a permutation a place is its token, so nothing is gathered, scattered, weighed or added up.
"""

from __future__ import annotations

import torch
from dsfast.triton_kernels.launch import Launch, aside, large_tiles, on_meta
from dsfast.triton_kernels.moe_experts import backward_launches, forward_launches, named
from torch import Tensor


def forward(x, gate_up, down) -> tuple[Tensor, Tensor]:
    """Shapes as dsfast.ops.swiglu_mlp -> y [N, D] and gu = x gate_up^T [N, 2I]."""
    y, gu = x.new_empty(x.shape), x.new_empty(x.size(0), gate_up.size(0))
    with torch.cuda.device_of(x):
        for launch in forward_launches(x, None, gate_up, down, None, None, y, gu, large_tiles(x.device)):
            launch.run()
    return y, gu


def backward(dy, x, gate_up, down, gu) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, gate_up and down from that of y. Deterministic: no atomics."""
    dx, dgate_up, ddown = gradients = tuple(t.new_empty(t.shape) for t in (x, gate_up, down))
    with torch.cuda.device_of(x):
        first, of_matrices = backward_launches(
            dy, x, None, gate_up, down, gu, None, None, dx, None, dgate_up, ddown, large_tiles(x.device)
        )
        for launch in first:
            launch.run()
        aside((of_matrices, gradients[1:]))
    return gradients


EXAMPLES = {
    "500K": (8192, 128, 64),
    "500K, many tokens": (16384, 128, 64),
    "5M": (8192, 256, 128),
    "DeepSeek-V3": (4096, 7168, 2048),
    "DeepSeek-V3, dense layer": (4096, 7168, 18432),
}
"""N, D and I that are compiled ahead: a shared expert, and the MLP of the layers without experts."""


def example_launches(size: str, dtype: torch.dtype, large: int) -> dict[str, Launch]:
    """Kernel, with its pass and its number there, -> launch at EXAMPLES[size], on the meta device."""
    n, d, i = EXAMPLES[size]
    x, gate_up, down, gu = map(on_meta(dtype), ((n, d), (2 * i, d), (d, i), (n, 2 * i)))
    return named(
        forward_launches(x, None, gate_up, down, None, None, x, gu, large),
        *backward_launches(x, x, None, gate_up, down, gu, None, None, x, None, gate_up, down, large),
    )
