"""What the Triton kernels do not take runs in plain PyTorch, and one line says so; asked for by name it is an error."""

from __future__ import annotations

import importlib

import pytest
import torch
from triton_contract import DEVICE, in_the_interpreter, on_device, on_the_device

from dsfast import ops
from dsfast.errors import UserError
from dsfast.ops.cases import (
    Case,
    embedding_case,
    linear_cross_entropy_case,
    mla_attention_case,
    mla_decode_case,
    moe_experts_case,
    moe_route_case,
    rms_norm_case,
    rope_case,
    split_and_turn_case,
    swiglu_mlp_case,
)
from dsfast.ops.checks import evaluate

HALF, SINGLE, DOUBLE = torch.float16, torch.float32, torch.float64
BEYOND = {
    "attention, wide": (mla_attention_case("", (5,), 1, 256, 128, 256), SINGLE, "up to 576, got 640"),
    "attention, wider": (mla_attention_case("", (5,), 1, 256, 64, 320), HALF, "up to 576, got 832"),
    "attention without rope": (mla_attention_case("", (5,), 1, 8, 0, 8), SINGLE, "Dn, Dr and Dv from 1 on, got 0"),
    "decode": (mla_decode_case("", (2, 3), 3, 1, 1536, 16, 64, 16), HALF, "up to 1152, got 2112"),
    "experts without a width": (moe_experts_case("", 3, 4, 2, 2, 0), SINGLE, "take I from 1 on, got 0"),
    "an MLP without a width": (swiglu_mlp_case("", 3, 4, 0), SINGLE, "take I from 1 on, got 0"),
    "norm": (rms_norm_case("", 2, 8193), SINGLE, "take D from 1 to 8192, got 8193"),
    "rope": (rope_case("", 2, 1, 4098, 3), SINGLE, "takes Dr up to 4096, got 4098"),
    "both": (split_and_turn_case("", 2, 1, 3, 5, 4098, 3), SINGLE, "takes Dr up to 4096, got 4098"),
    **{
        f"float64 {case.operator}": (case, DOUBLE, "take float32, float16, bfloat16, got float64")
        for case in (
            mla_attention_case("", (5,), 1, 8, 4, 8), rms_norm_case("", 2, 8), rope_case("", 2, 1, 4, 3),
            embedding_case("", 3, 5, 4, 6), linear_cross_entropy_case("", 3, 4, 5), moe_experts_case("", 3, 4, 1, 2, 5),
            swiglu_mlp_case("", 3, 4, 5), mla_decode_case("", (2, 3), 3, 1, 16, 16, 16, 16),
        )
    },
    "float16 moe_route": (moe_route_case("", 3, 4, 2), HALF, "take float32, got float16"),
}  # fmt: skip


def arguments_of(case: Case, dtype: torch.dtype) -> list:
    drawn = case.make_inputs(torch.Generator().manual_seed(0))
    cast = (x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in drawn)
    return on_the_device(list(cast))


@on_device
@pytest.mark.parametrize(("case", "dtype", "reason"), BEYOND.values(), ids=BEYOND)
def test_plain_pytorch_takes_over_and_says_why(case, dtype, reason):
    arguments = arguments_of(case, dtype)
    with ops.use("reference"):
        expected = evaluate(case.function, arguments, case.differentiable)
    with pytest.warns(ops.FallbackWarning, match=f"{case.operator} runs in plain PyTorch: .*{reason}"):
        found = evaluate(case.function, arguments, case.differentiable)
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    (row,) = ops.fallbacks()
    assert row["operator"] == case.operator


@on_device
@pytest.mark.parametrize(("case", "dtype", "reason"), BEYOND.values(), ids=BEYOND)
def test_asked_for_by_name_it_is_an_error(case, dtype, reason):
    with ops.use("triton", case.operator), pytest.raises(UserError, match=f"'triton' cannot run: .*{reason}"):
        case.function(*arguments_of(case, dtype))


@on_device
def test_more_experts_than_a_block_of_a_table():
    bias, loads = torch.zeros(2049, device=DEVICE), torch.arange(2049, device=DEVICE)[None]
    with pytest.warns(ops.FallbackWarning, match="up to 2048 experts, got 2049"):
        ops.update_bias([bias], loads, 0.5)
    assert bias[0] > 0 > bias[-1]


def test_what_just_reaches_a_limit_is_taken_and_nothing_is_not():
    names = ("mla_attention", "mla_decode", "newton_schulz", "rms_norm", "rope")
    at = {name: importlib.import_module(f"dsfast.ops.{name}") for name in names}

    def wide(*widths: int, dtype: torch.dtype = SINGLE) -> list[torch.Tensor]:
        return [torch.empty(1, 1, width, dtype=dtype, device="meta") for width in widths]

    assert at["mla_attention"]._not_triton(*wide(192, 64, 256), 1.0) == ""
    for widths in ((0, 16, 16), (16, 0, 16), (16, 16, 0)):
        assert "from 1 on, got 0" in at["mla_attention"]._not_triton(*wide(*widths), 1.0)
    for scale in (0.0, -1.0, float("nan")):
        assert "take a positive scale, got" in at["mla_attention"]._not_triton(*wide(16, 16, 16), scale)
    assert at["mla_decode"]._not_triton(*wide(1000, 128)) == ""
    for x, rows in ((wide(1)[0], 32), (wide(1, dtype=HALF)[0], 128)):
        assert at["newton_schulz"].too_large(x, [(1, rows, 200)]) == ""
        assert f"up to {rows} rows" in at["newton_schulz"].too_large(x, [(1, 2, 3), (1, rows + 1, 200)])
    assert at["rms_norm"]._not_triton(wide(8192)[0][0]) == ""
    assert "from 1 to 8192, got 0" in at["rms_norm"]._not_triton(wide(0)[0][0])
    assert at["rope"]._not_triton(4096) == ""


def test_the_limits_are_those_of_the_kernels_tables():
    from dsfast.triton_kernels import mla_decode, tables
    from dsfast.triton_kernels.limits import DECODE_WIDEST

    for table in (mla_decode._FLOAT32, mla_decode._LARGE, mla_decode._SM_100, mla_decode._SMALL):
        assert max(max(by_width) for by_width in table.values()) == DECODE_WIDEST
    assert ops.after_step.MOST_EXPERTS == tables.BLOCK


test_in_the_interpreter = in_the_interpreter(__file__)
