"""The Triton kernels of swiglu_mlp against the float64 reference; the contract of every operator's is in
tests/triton_contract.py."""

from __future__ import annotations

import pytest
import torch
from operator_cases import assert_passed, drawn
from triton_contract import (
    DEVICE,
    TritonContract,
    in_the_interpreter,
    on_device,
    on_the_device,
    poisoned,
    small_tiles_of_narrow_experts,
)

from dsfast import ops
from dsfast.errors import UserError
from dsfast.ops.cases import swiglu_mlp_case
from dsfast.ops.checks import check, compare


class TestSwigluMlp(TritonContract):
    cases = (
        swiglu_mlp_case("no tokens", 0, 5, 3),
        swiglu_mlp_case("one token", 1, 5, 3),
        swiglu_mlp_case("tokens and widths one above a tile", 33, 17, 33),
        swiglu_mlp_case("widths that fill blocks: no masks", 9, 32, 16),
        swiglu_mlp_case("tokens that fill blocks of a sum, widths one above a tile", 32, 33, 33),
    )
    tiny = swiglu_mlp_case("tiny", 3, 5, 2)
    registered = ("swiglu_mlp", "swiglu_mlp_backward")


@on_device
def test_tiles_where_places_are_few():
    """Of the 500K model on a GPU, as in tests/test_triton_moe_experts.py."""
    case = swiglu_mlp_case("the 500K model's widths", 70, 128, 64)
    assert_passed(compare(case, ["triton"], DEVICE, torch.float16, draws=1))


class TestNarrow(TritonContract):
    """The backward pass in one kernel, which float32 would not take by itself."""

    cases = (
        swiglu_mlp_case("no tokens", 0, 5, 3),
        swiglu_mlp_case("one token", 1, 5, 3),
        swiglu_mlp_case("tokens and widths one below a tile", 15, 15, 15),
        swiglu_mlp_case("tokens and widths one above a tile", 17, 17, 17),
        swiglu_mlp_case("several tiles, prime widths", 67, 37, 23),
        swiglu_mlp_case("widths that fill blocks: no masks", 33, 32, 16),
    )
    tiny = TestSwigluMlp.tiny
    registered = TestSwigluMlp.registered

    @pytest.fixture(autouse=True)
    def _small_tiles(self, monkeypatch):
        small_tiles_of_narrow_experts(monkeypatch)


@on_device
@pytest.mark.parametrize("size", [10.0, 300.0])
def test_saturated_gates(size):
    """Gates far from 0: silu falls to 0 on one side and is its argument on the other, its exp must not overflow."""
    x, gate_up, down = on_the_device(drawn(swiglu_mlp_case("large", 13, 5, 7)))
    with poisoned():
        assert_passed(check("swiglu_mlp", ops.swiglu_mlp, (x, gate_up * size, down), (0, 1, 2), ["triton"]))


@on_device
def test_other_dtypes_are_refused():
    x, gate_up, down = (torch.ones(shape, dtype=torch.float64, device=DEVICE) for shape in ((2, 4), (6, 4), (4, 3)))
    with pytest.raises(UserError, match=r"swiglu_mlp: .* the Triton kernels take float32, .*, got float64"):  # noqa: SIM117
        with ops.use("triton"):
            ops.swiglu_mlp(x, gate_up, down)


test_in_the_interpreter = in_the_interpreter(__file__, ("sm_80",))
