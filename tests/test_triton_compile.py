"""Every launch of the Triton kernels, compiled for chips that are not here, keeps the limits of dsfast.triton_kernels.limits."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from dsfast.triton_kernels import mla_attention
from dsfast.triton_kernels.ahead import compile_launch
from dsfast.triton_kernels.limits import CHIPS

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MODEL_500K, MIDDLE, DEEPSEEK_V3, WIDEST = (32, 16, 32), (64, 64, 64), (128, 64, 128), (192, 64, 256)
KERNELS = ("forward", "backward_q", "backward_kv")


def mla_attention_launches(widths, dtype, large):
    """Kernel -> launch, for views as the model's projections leave them."""

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    (dn, dr, dv), n, h = widths, 4096, 16
    k_nope, v = empty(n, h, dn + dv).split([dn, dv], -1)
    inputs = (*empty(n, h, dn + dr).split([dn, dr], -1), k_nope, empty(n, dr), v, empty(4, dtype=torch.int32), 0.1)
    o, softmax = empty(n, h, dv), empty(2, h, n, dtype=torch.float32)
    forward = mla_attention.forward_launch(*inputs, o, softmax, large)
    gradients = (
        empty(n, h, dn),
        empty(n, h, dr),
        empty(n, h, dn),
        empty(h, n, dr, dtype=torch.float32),
        empty(n, h, dv),
    )
    backward = mla_attention.backward_launches(o, *inputs, o, softmax, softmax[0], *gradients, large)
    return dict(zip(KERNELS, (forward, *backward), strict=True))


def assert_within_limits(kernel, chip, widths, dtype):
    launch = mla_attention_launches(widths, dtype, CHIPS[chip].large)[kernel]
    compiled = compile_launch(launch, chip)
    assert not compiled.faults(launch), compiled


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("chip", CHIPS)
def test_mla_attention_of_deepseek_v3(chip, kernel):
    assert_within_limits(kernel, chip, DEEPSEEK_V3, BF16)


@pytest.mark.slow
@pytest.mark.parametrize("widths", [MODEL_500K, MIDDLE, WIDEST], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("chip", CHIPS)
def test_mla_attention_of_other_widths(chip, kernel, widths):
    assert_within_limits(kernel, chip, widths, BF16)


@pytest.mark.slow
@pytest.mark.parametrize(("widths", "dtype"), [(MODEL_500K, FP32), (DEEPSEEK_V3, FP32), (DEEPSEEK_V3, FP16)], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("chip", CHIPS)
def test_mla_attention_of_other_dtypes(chip, kernel, widths, dtype):
    assert_within_limits(kernel, chip, widths, dtype)


def test_limits_find_what_breaks_them():
    launch = mla_attention_launches(DEEPSEEK_V3, BF16, large=True)["forward"]
    kept = compile_launch(launch, "sm_90")
    assert kept.matrix > 0
    broken = type(kept)("k", "sm_90", registers=255, spills=8, shared=232_449, matrix=0, copies=0)
    assert [fault.split(": ")[1].split()[0] for fault in broken.faults(launch)] == ["8", "232449", "no", "the"]


def test_blocks_divide_tiles():
    """What the kernels' loops rest on: blocks of keys fill a tile of queries, blocks of queries a tile of keys."""
    for table in (mla_attention._FLOAT32, mla_attention._LARGE, mla_attention._SMALL):
        for kernel, by_width in table.items():
            for bt, bs, _, _ in by_width.values():
                assert (bs % bt if kernel == "backward_kv" else bt % bs) == 0
