"""How many launches a GPU's training step of the 500K model has, one after the other: each waits for the one before it."""

from __future__ import annotations

from math import prod

import torch
from fake_driver import in_its_own_process, on_the_fake_gpu
from launches import launches_aside, launches_of, training_step

from dsfast import ops
from dsfast.config import default_config
from dsfast.train.device_step import DeviceStep

TRITON, TORCH, ASIDE = 34, 4, 39
"""At most: in the chain of a recorded step, and on its branches. To be lowered with what takes launches away, never raised."""

test_on_a_gpu_that_is_not_there = in_its_own_process(__file__)


def step_500k() -> DeviceStep:
    return training_step(default_config("cpu"), 32, 256)


@on_the_fake_gpu
def test_of_a_training_step_of_the_500k_model():
    found = launches_of(step_500k())
    assert sum(row.startswith("triton") for row in found) <= TRITON
    assert sum(row.startswith("torch") for row in found) <= TORCH
    assert sum(row.startswith("aside") for row in found) <= ASIDE


@on_the_fake_gpu
def test_what_counts():
    """What computes, copies or casts; what an operator of dsfast's calls too; neither views nor memory nor empty grids."""
    x, y, weight = torch.ones(2, 16), torch.empty(16, 2), torch.ones(16)

    def step():
        x.view(16, 2).add_(torch.empty_like(y))
        ops.rms_norm(y.double().float().t()[:, ::2].repeat(1, 2)[:1], weight, 1e-6)
        ops.rms_norm(x[:0], weight, 1e-6)
        ops.rms_norm(torch.ones_like(y).t(), weight, 1e-6)

    expected = "add_ [[16, 2], [16, 2]]", "_to_copy [[16, 2]]", "_to_copy [[16, 2]]", "repeat [[2, 8]]"
    strided = ["torch ones_like [[16, 2]]", "torch contiguous [[2, 16]]", "triton rms_norm.forward_kernel"]
    assert launches_of(step) == [*(f"torch {row}" for row in expected), "triton rms_norm.forward_kernel", *strided]


@on_the_fake_gpu
def test_what_is_long_aside_leaves_half_of_the_chip():
    """Kernels with products, on an H200 of 132 multiprocessors with 2^16 registers each, given out by 8 for a thread."""
    from dsfast.triton_kernels.ahead import compile_launch

    long = {(launch.kernel.__name__, launch.grid): launch for launch in launches_aside(step_500k()) if launch.rows}
    assert {"dweight_kernel", "weights_kernel", "narrow_matrix_kernel"} <= {name for name, _ in long}
    for name, launch in long.items():
        of_a_thread = -(-compile_launch(launch, "sm_90").registers // 8) * 8
        of_a_program = of_a_thread * 32 * launch.options["num_warps"]
        programs = min(prod(launch.grid), 132 * (2**16 // of_a_program))
        assert programs * of_a_program <= 132 * 2**16 / 2, name
