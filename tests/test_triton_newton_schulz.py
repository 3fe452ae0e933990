"""The Triton kernel of newton_schulz against the float64 reference; the contract of every operator's is in
tests/triton_contract.py."""

from __future__ import annotations

import pytest
import torch
from operator_cases import drawn
from triton_contract import DEVICE, INTERPRETED, TritonContract, in_the_interpreter, on_device, on_the_device, poisoned

from dsfast import ops
from dsfast.errors import UserError
from dsfast.ops.cases import newton_schulz_case
from dsfast.ops.newton_schulz import ON_CHIP

SHAPES = ((2, 3, 5), (1, 4, 4))


class TestNewtonSchulz(TritonContract):
    cases = (
        newton_schulz_case("no stack"),
        newton_schulz_case(
            "stacks without a matrix or an element", (0, 3, 4), (1, 2, 3), (2, 0, 3), (2, 1, 2), (0, 1, 1)
        ),
        newton_schulz_case("one number", (3, 1, 1)),
        newton_schulz_case("rows and columns that fill tiles", (1, 32, 64)),
        newton_schulz_case("columns one below and above a block", (1, 16, 63), (1, 16, 64), (1, 16, 65)),
        newton_schulz_case("rows one above a tile, many columns", (2, 17, 301)),
        newton_schulz_case("stacks of unequal rows in one launch", (2, 29, 31), (3, 5, 7), (1, 1, 40)),
    )
    tiny = newton_schulz_case("tiny", *SHAPES)
    registered = ("newton_schulz",)


def keep_out_of_registers(monkeypatch):
    from dsfast.triton_kernels import newton_schulz as kernels

    monkeypatch.setattr(kernels, "IN_REGISTERS", {4: 0, 8: 0})


class TestByBlocks(TritonContract):
    """As sm_80 and gfx942 do, whatever the sizes."""

    cases, tiny, registered = TestNewtonSchulz.cases, TestNewtonSchulz.tiny, ()

    @pytest.fixture(autouse=True)
    def by_blocks(self, monkeypatch):
        keep_out_of_registers(monkeypatch)


@on_device
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_what_is_not_finite_or_zero_stays_in_its_matrix(value):
    x, shapes = on_the_device(drawn(TestNewtonSchulz.tiny))
    with poisoned(), ops.use("triton"):
        clean = ops.newton_schulz(x, shapes)
        x[15:30] = 0
        x[20] = value
        y = ops.newton_schulz(x, shapes)
    assert bool((y[15:30] == 0).all() if value == 0 else y[15:30].isnan().all())
    assert torch.equal(y[:15], clean[:15])
    assert torch.equal(y[30:], clean[30:])


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_more_rows_than_fit_are_plain_pytorchs_and_a_warning_says_so(dtype):
    rows = ON_CHIP[dtype.itemsize]
    x = torch.randn(2 * (rows + 1) ** 2, device=DEVICE).to(dtype)
    shapes = ((2, rows + 1, rows + 1),)
    with pytest.warns(
        ops.FallbackWarning, match=f"newton_schulz runs in plain PyTorch: .* up to {rows} rows .* has {rows + 1}"
    ):
        y = ops.newton_schulz(x, shapes)
    with ops.use("reference"):
        assert torch.equal(y, ops.newton_schulz(x, shapes))
    with (
        ops.use("triton"),
        pytest.raises(UserError, match=f"newton_schulz: implementation 'triton' cannot run: .* {rows} rows"),
    ):
        ops.newton_schulz(x, shapes)


@on_device
@pytest.mark.parametrize("whole", [True, False], ids=["in registers", "by blocks"])
def test_as_many_rows_as_fit(whole, monkeypatch):
    """At 128 rows, in 16 bits: what the 500K model has, the largest of it."""
    if not whole:
        keep_out_of_registers(monkeypatch)
    case = newton_schulz_case("largest", (1, 128, 192))
    (x, shapes), dtype = on_the_device(drawn(case)), torch.float16 if INTERPRETED else torch.bfloat16
    with poisoned(), ops.use("triton"):
        found = ops.newton_schulz(x.to(dtype), shapes)
    with ops.use("reference"):
        expected, eager = ops.newton_schulz(x.to(dtype).double(), shapes), ops.newton_schulz(x.to(dtype), shapes)
    assert (found - expected).norm() <= 2 * (eager - expected).norm()


@on_device
def test_other_dtypes_are_refused():
    x = torch.ones(6, dtype=torch.float64, device=DEVICE)
    with pytest.raises(UserError, match=r"newton_schulz: .* the Triton kernels take float32, .*, got float64"):  # noqa: SIM117
        with ops.use("triton"):
            ops.newton_schulz(x, ((1, 2, 3),))


test_in_the_interpreter = in_the_interpreter(__file__, ("sm_80",))
