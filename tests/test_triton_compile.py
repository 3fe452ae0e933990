"""Every Triton kernel compiled ahead of time for chips that are not here, and held to dsfast.triton_kernels.limits."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch

pytest.importorskip("triton")

from dsfast.triton_kernels import mla_attention, pieces
from dsfast.triton_kernels.ahead import compile_launch
from dsfast.triton_kernels.limits import CHIPS

from dsfast.ops import OPERATORS

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MODULES = {
    operator: importlib.import_module(f"dsfast.triton_kernels.{operator}")
    for operator in OPERATORS
    if importlib.util.find_spec(f"dsfast.triton_kernels.{operator}")
}


def examples(dtypes, wanted):
    """(operator, size, kernel, dtype) of every example launch at the sizes `wanted` says yes to."""
    return [
        pytest.param(
            operator, size, kernel, dtype, id=f"{operator}-{size}-{kernel}-{str(dtype).removeprefix('torch.')}"
        )
        for operator, module in MODULES.items()
        for size in module.EXAMPLES
        if wanted(size)
        for dtype in dtypes
        for kernel in module.example_launches(size, dtype, large=True)
    ]


def assert_within_limits(operator, size, kernel, dtype, chip):
    launch = MODULES[operator].example_launches(size, dtype, CHIPS[chip].large)[kernel]
    compiled = compile_launch(launch, chip)
    assert not compiled.faults(launch), compiled


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(("operator", "size", "kernel", "dtype"), examples([BF16], lambda s: s == "DeepSeek-V3"))
def test_deepseek_v3(operator, size, kernel, dtype, chip):
    assert_within_limits(operator, size, kernel, dtype, chip)


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(("operator", "size", "kernel", "dtype"), examples([BF16], lambda s: s != "DeepSeek-V3"))
def test_other_sizes(operator, size, kernel, dtype, chip):
    assert_within_limits(operator, size, kernel, dtype, chip)


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    ("operator", "size", "kernel", "dtype"), examples([FP16, FP32], lambda s: s in ("500K", "DeepSeek-V3"))
)
def test_other_dtypes(operator, size, kernel, dtype, chip):
    assert_within_limits(operator, size, kernel, dtype, chip)


def kernels_of(module):
    return {name for name in vars(module) if name.endswith("_kernel")}


def launched_by(module):
    return {
        launch.kernel.__name__
        for size in module.EXAMPLES
        for launch in module.example_launches(size, BF16, large=True).values()
    }


@pytest.mark.parametrize("operator", MODULES)
def test_every_kernel_is_an_example(operator):
    """No kernel goes uncompiled: each @triton.jit function named ..._kernel is launched by an example."""
    module = MODULES[operator]
    assert kernels_of(module) <= launched_by(module) <= kernels_of(module) | kernels_of(pieces)


def test_every_shared_kernel_is_an_example():
    assert kernels_of(pieces) <= set().union(*(launched_by(module) for module in MODULES.values()))


def test_limits_find_what_breaks_them():
    launch = mla_attention.example_launches("DeepSeek-V3", BF16, large=True)["forward_kernel"]
    kept = compile_launch(launch, "sm_90")
    assert kept.matrix > 0
    broken = type(kept)("k", "sm_90", registers=255, spills=8, shared=232_449, matrix=0, copies=0)
    assert [fault.split(": ")[1].split()[0] for fault in broken.faults(launch)] == ["8", "232449", "no", "the"]


def test_blocks_divide_tiles():
    """What mla_attention's loops rest on: blocks of keys fill a tile of queries, blocks of queries a tile of keys."""
    for table in (mla_attention._FLOAT32, mla_attention._LARGE, mla_attention._SMALL):
        for kernel, by_width in table.items():
            for bt, bs, _, _ in by_width.values():
                assert (bs % bt if kernel == "backward_kv" else bt % bs) == 0
