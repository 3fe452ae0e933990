"""The live check itself: it must pass what is right and catch what is slightly wrong."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from operator_cases import needs_bfloat16

from dsfast import ops
from dsfast.ops import cases, checks, native


@pytest.fixture(scope="module")
def rows():
    return ops.check_all("cpu")


def test_everything_available_is_checked_and_passes(rows):
    assert [row for row in rows if not row["passed"]] == []
    available = {row["operator"]: row["implementation"] for row in ops.report("cpu")}
    for operator in ops.OPERATORS:
        checked = {row["implementation"] for row in rows if row["operator"] == operator}
        assert checked == {"reference", available[operator]}
        assert {row["case"] for row in rows if row["operator"] == operator} == {"500K", "odd"}


def test_rows_are_plain_numbers_and_names(rows):
    for row in rows:
        assert list(row) == [
            "operator", "implementation", "case", "quantity", "max_abs_error", "eager_error", "tolerance", "passed",
        ]  # fmt: skip
        assert type(row["passed"]) is bool
        assert all(type(row[name]) is float for name in ("max_abs_error", "eager_error", "tolerance"))


def test_every_gradient_is_among_the_quantities(rows):
    quantities = {row["quantity"] for row in rows if row["operator"] == "mla_attention"}
    assert quantities == {"output", "grad q_nope", "grad q_rope", "grad k_nope", "grad k_rope", "grad v"}


def test_bfloat16_is_checked_where_the_model_computes_in_it():
    """As for a GPU run; on the CPU the float32 kernels do not take part, so the reference is what runs."""
    rows = ops.check_all("cpu", torch.bfloat16)
    assert [row for row in rows if not row["passed"]] == []
    assert {row["case"] for row in rows} == {"500K", "odd"}
    native_rows = {row["operator"] for row in rows if row["implementation"] == "native"}
    assert native_rows == (set() if native.status()[0] is None else set(checks.IN_FLOAT32))


def test_kernels_are_checked_in_float32_too_where_their_products_are_of_bfloat16(monkeypatch):
    """By which a result that is off by a thousandth is right."""
    needs_bfloat16()
    found = ops.check_all("cpu", products=torch.bfloat16, operators=("swiglu_mlp", "rope"))
    assert [row for row in found if not row["passed"]] == []
    by = Counter((row["operator"], row["implementation"]) for row in found)
    assert by["swiglu_mlp", checks.ROUNDED] == by["swiglu_mlp", "native"] > 0
    assert ("rope", checks.ROUNDED) not in by
    (spoilt,) = [case for case in checks.CASES if (case.operator, case.name) == ("swiglu_mlp", "500K")]

    def off(x, gate_up, down):
        y = ops.swiglu_mlp(x, gate_up, down)
        return y if ops.dispatch.choose("swiglu_mlp", x) == "reference" else 1.001 * y

    monkeypatch.setattr(checks, "CASES", (replace(spoilt, function=off),))
    found = ops.check_all("cpu", products=torch.bfloat16)
    wrong = {row["implementation"] for row in found if row["quantity"] == "output" and not row["passed"]}
    assert wrong == {"native"}


@pytest.mark.filterwarnings("ignore:.*runs in plain PyTorch")
@pytest.mark.parametrize("case", checks.IN_A_STEP, ids=lambda case: case.name)
def test_what_a_step_on_a_gpu_calls_can_be_checked(case):
    """Its kernels are, in Triton's interpreter, by the tests of these operators."""
    rows = checks.compare(case, ["reference"], dtype=torch.bfloat16)
    assert [row for row in rows if not row["passed"]] == []
    assert sum(row["quantity"].startswith("grad ") for row in rows) == len(case.differentiable)


def test_on_a_gpu_they_are_checked_in_16_bits(monkeypatch):
    seen = []
    monkeypatch.setattr(
        checks,
        "report",
        lambda device, dtype: [{"operator": c.operator, "implementation": "triton"} for c in checks.CASES],
    )
    monkeypatch.setattr(checks, "compare", lambda case, _, device, dtype: seen.append((case, dtype)) or [])
    ops.check_all("cuda", torch.bfloat16)
    assert seen[-len(checks.IN_A_STEP) :] == [(case, torch.bfloat16) for case in checks.IN_A_STEP]
    ops.check_all("cuda", torch.float32)
    assert seen[-1][0] is checks.CASES[-1]


def test_a_selection_does_not_keep_the_kernels_from_being_checked(rows):
    with ops.use("reference"):
        assert ops.check_all("cpu") == rows


def swiglu_rows(spoil, differentiable=(0,)):
    """The check's rows for a native swiglu_mlp whose output went through `spoil`."""
    if native.status()[0] is None:
        pytest.skip("the C++ kernels are not built")
    case = cases.swiglu_mlp_case("", 64, 32, 16)

    def function(x, gate_up, down):
        y = ops.swiglu_mlp(x, gate_up, down)
        return spoil(y) if ops.report("cpu")[ops.OPERATORS.index("swiglu_mlp")]["implementation"] == "native" else y

    arguments = case.make_inputs(torch.Generator().manual_seed(0))
    return checks.check("swiglu_mlp", function, arguments, differentiable, ["native"])


def ulps(count):
    return lambda y: y + count * torch.finfo(torch.float32).eps * y.detach().abs().max()


def put(value):
    def spoil(y):
        changed = y.clone()
        changed[3, 4] = value
        return changed

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        ulps(16),
        lambda y: y.bfloat16().float(),
        put(0.0),
        put(math.nan),
        put(math.inf),
        lambda y: y[:-1],
        lambda y: y * 1.00001,
    ],
    ids=[
        "16 ulp off",
        "rounded to bfloat16",
        "one value missing",
        "one NaN",
        "one inf",
        "one row short",
        "1e-5 too large",
    ],
)
def test_wrong_values_fail(spoil):
    assert not swiglu_rows(spoil, ())[0]["passed"]


def test_right_values_pass_and_a_wrong_gradient_fails():
    assert all(row["passed"] for row in swiglu_rows(lambda y: y))
    value, gradient = swiglu_rows(lambda y: y + 1e-4 * (y - y.detach()))
    assert value["passed"]
    assert not gradient["passed"]


def test_a_nan_that_eager_shows_and_the_implementation_hides_fails():
    found = {"output": torch.zeros(3)}
    expected = torch.tensor([0.0, math.nan, 0.0])
    assert not checks.judge(expected, expected, found["output"], torch.float32, "native")["passed"]
    assert checks.judge(expected, expected, expected.clone(), torch.float32, "native")["passed"]
    assert not checks.judge(expected, expected, -expected.nan_to_num(math.inf), torch.float32, "native")["passed"]
    infinite = torch.tensor([1.0, math.inf])
    assert checks.judge(infinite, infinite, infinite.clone(), torch.float32, "native")["passed"]
    assert not checks.judge(infinite, infinite, torch.tensor([1.0, -math.inf]), torch.float32, "native")["passed"]


@pytest.mark.parametrize("found", [[1.0, math.nan], [1.0, math.inf], [1.0, 1.1], [1.0]], ids=str)
def test_what_is_too_far_off_or_no_number_is_a_difference(found):
    expected = {"output": torch.ones(2)}
    assert checks.difference({"output": torch.tensor(found)}, expected, 0.05).startswith("output: error")
    assert checks.difference({"output": torch.tensor([1.0, 1.01])}, expected, 0.05) == ""


def test_products_of_bfloat16_are_held_to_eagers_of_the_same_numbers():
    """Eager's own error would else be that of rounding what it is given as well, and allow for more."""
    needs_bfloat16()
    case, seen = cases.swiglu_mlp_case("", 4, 3, 2), []

    def function(x, gate_up, down):
        seen.append(x.detach())
        return ops.swiglu_mlp(x, gate_up, down)

    arguments = case.make_inputs(torch.Generator().manual_seed(0))
    checks.check_draws("swiglu_mlp", function, [arguments], (), ["native"], products=torch.bfloat16)
    assert all(torch.equal(x, arguments[0].bfloat16().to(x.dtype)) for x in seen)
    assert [x.dtype for x in seen] == [torch.float64, torch.bfloat16, torch.float32]


@pytest.mark.parametrize(
    ("implementation", "eager_ulps", "ulps", "passed"),
    [
        ("reference", 60, 60, True),
        ("reference", 68, 68, False),
        ("native", 1000, 2000, True),
        ("native", 1000, 2012, False),
        ("native", 0, 3, True),
        ("native", 0, 5, False),
    ],
)
def test_an_error_of_twice_eagers_and_4_ulp_is_right_and_64_ulp_of_the_reference(
    implementation, eager_ulps, ulps, passed
):
    expected = torch.linspace(0.5, 1.0, 9, dtype=torch.float64)
    eager, found = ((expected + count * 2.0**-23).float() for count in (eager_ulps, ulps))
    assert checks.judge(expected, eager, found, torch.float32, implementation)["passed"] is passed


def test_a_reference_of_lower_precision_fails():
    case = cases.swiglu_mlp_case("", 64, 32, 16)

    def truncated(x, gate_up, down):
        return (
            ops.swiglu_mlp(x, gate_up, down)
            if x.dtype == torch.float64
            else ops.swiglu_mlp(x.bfloat16().float(), gate_up, down)
        )

    rows = checks.check("swiglu_mlp", truncated, case.make_inputs(torch.Generator().manual_seed(0)), (), ["reference"])
    assert not rows[0]["passed"]
