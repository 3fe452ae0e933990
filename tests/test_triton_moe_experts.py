"""The Triton kernels of moe_experts against the float64 reference; the contract of every operator's is in
tests/triton_contract.py."""

from __future__ import annotations

import pytest
import torch
from operator_cases import assert_bitwise_equal, assert_passed, drawn
from triton_contract import (
    DEVICE,
    DTYPES,
    TritonContract,
    in_the_interpreter,
    on_device,
    on_the_device,
    poisoned,
    run_triton,
)  # fmt: skip

from dsfast import ops
from dsfast.ops.cases import moe_experts_case
from dsfast.ops.checks import check, compare


class TestMoeExperts(TritonContract):
    cases = (
        moe_experts_case("no tokens", 0, 5, 2, 3, 7),
        moe_experts_case("two experts, top 1: a slot is its token; one above two tiles", 33, 4, 1, 2, 3),
        moe_experts_case(
            "experts without a token, first, last and between; no power of two", 5, 7, 3, 6, 5, used=(1, 3, 4)
        ),
        moe_experts_case("more experts than tokens, widths one above a block", 2, 33, 2, 5, 17),
    )
    tiny = moe_experts_case("tiny", 4, 3, 2, 3, 2)
    registered = ("moe_experts", "moe_experts_backward")


@on_device
def test_weights_of_an_expert_without_tokens_are_not_read():
    case = moe_experts_case("two unused", 5, 5, 2, 4, 3, used=(0, 2))
    arguments = drawn(case)
    clean = run_triton(case, arguments)
    arguments[3][[1, 3]] = float("nan")
    arguments[4][[1, 3]] = float("nan")
    found = run_triton(case, arguments)
    assert_bitwise_equal(found, clean)
    assert not found["grad gate_up"][[1, 3]].any()
    assert not found["grad down"][[1, 3]].any()


@on_device
@pytest.mark.parametrize("k", [1, 2])
def test_an_index_of_no_expert_makes_its_token_nan(k):
    """And its weight's gradient; the other tokens and the matrices' gradients are as without that slot."""
    case = moe_experts_case("bad", 17, 3, k, 2, 2)
    arguments = drawn(case)
    bad = torch.zeros(17, k, dtype=torch.bool)
    for token, choice, index in ((0, 0, 2), (9, k - 1, -1), (16, 0, 2**62)):
        arguments[2][token, choice], bad[token, choice] = index, True
    found = run_triton(case, arguments)
    rows, bad = bad.any(1).to(DEVICE), bad.to(DEVICE)
    for quantity in ("output", "grad x"):
        assert found[quantity][rows].isnan().all()
    assert torch.equal(found["grad weights"].isnan(), bad)

    arguments[1][bad.cpu()], arguments[2][bad.cpu()] = 0.0, 0
    without = run_triton(case, arguments)
    for quantity in ("output", "grad x"):
        torch.testing.assert_close(found[quantity][~rows], without[quantity][~rows], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["grad weights"][~bad], without["grad weights"][~bad], rtol=1e-6, atol=1e-6)
    for quantity in ("grad gate_up", "grad down"):
        torch.testing.assert_close(found[quantity], without[quantity], rtol=1e-6, atol=1e-6)


@on_device
def test_no_index_names_an_expert():
    case = moe_experts_case("all bad", 5, 3, 1, 2, 2)
    arguments = drawn(case)
    arguments[2].fill_(7)
    found = run_triton(case, arguments)
    assert found["output"].isnan().all()
    assert not found["grad gate_up"].any()
    assert not found["grad down"].any()


@on_device
def test_nan_stays_with_its_token():
    """Tiles are filled up with other tokens' rows, whose results are not to show."""
    case = moe_experts_case("nan", 9, 5, 1, 2, 3)
    arguments = drawn(case)
    arguments[0][0] = float("nan")
    nan = run_triton(case, arguments)["output"].isnan()
    assert nan[0].all()
    assert not nan[1:].any()


@on_device
def test_an_expert_chosen_twice_by_a_token_counts_twice():
    x, weights, _, gate_up, down = on_the_device(drawn(moe_experts_case("twice", 5, 7, 2, 3, 4)))
    once = torch.ones(5, 1, dtype=torch.int64, device=DEVICE)
    with poisoned(), ops.use("triton"):
        twice = ops.moe_experts(x, weights, once.expand(5, 2), gate_up, down)
        together = ops.moe_experts(x, weights.sum(1, keepdim=True), once, gate_up, down)
    torch.testing.assert_close(twice, together, rtol=1e-6, atol=1e-6)


@on_device
def test_agrees_with_swiglu_mlp_where_there_is_one_expert():
    x, _, _, gate_up, down = on_the_device(drawn(moe_experts_case("one", 33, 5, 1, 1, 3)))
    weights, indices = torch.ones(33, 1, device=DEVICE), torch.zeros(33, 1, dtype=torch.int64, device=DEVICE)
    with poisoned(), ops.use("triton"):
        routed = ops.moe_experts(x, weights, indices, gate_up, down)
        assert torch.equal(routed, ops.swiglu_mlp(x, gate_up[0], down[0]))


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_over_many_places_are_split(monkeypatch, dtype):
    """An expert's share of 1 place or more each; one of the experts has fewer places than there are shares."""
    from dsfast.triton_kernels import moe_experts as kernels

    monkeypatch.setattr(kernels, "SHARE", 4)
    case = moe_experts_case("split", 17, 5, 1, 2, 3)
    arguments = drawn(case)
    arguments[2].fill_(1)
    arguments[2][7] = 0
    with poisoned():
        assert_passed(
            check(case.operator, case.function, on_the_device(arguments), case.differentiable, ["triton"], dtype)
        )


@on_device
@pytest.mark.parametrize("k", [1, 2])
def test_in_two_products_as_in_one(monkeypatch, k):
    """A narrow I goes through both products in one program. The other way gives the same, a slot of no expert included."""
    from dsfast.triton_kernels import moe_experts as kernels

    case = moe_experts_case("narrow", 9, 20, k, 3, 6)
    arguments = drawn(case)
    arguments[2][4, k - 1] = 3
    fused = run_triton(case, arguments)
    monkeypatch.setattr(kernels, "FUSED", 0)
    found = run_triton(case, arguments)
    assert fused["output"].isnan().any(1).nonzero().tolist() == [[4]]
    for quantity in fused:
        torch.testing.assert_close(found[quantity], fused[quantity], rtol=1e-6, atol=1e-6, equal_nan=True)


@on_device
@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tile(monkeypatch, dtype, size):
    """The tiles of few, some and many places for an expert, whatever the case's own would be."""
    from dsfast.triton_kernels import moe_experts as kernels

    monkeypatch.setattr(kernels, "_size", lambda *_: size)
    monkeypatch.setattr(kernels, "FUSED", 0)
    case = moe_experts_case("tiles", 70, 20, 2, 3, 18, used=(0, 2))
    with poisoned():
        assert_passed(compare(case, ["triton"], DEVICE, dtype))


LARGER = (
    moe_experts_case("many experts, a token or none each", 17, 6, 3, 61, 4),
    moe_experts_case("tiles of one expert, and as many columns of blocks: grouped order", 33 * 9, 70, 1, 1, 35),
    moe_experts_case("widths that fill blocks: no masks", 40, 64, 2, 2, 32),
    moe_experts_case("all to the first expert", 150, 7, 2, 4, 5, used=(0, 1)),
)


@on_device
@pytest.mark.slow
@pytest.mark.parametrize("case", LARGER, ids=[case.name for case in LARGER])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_larger(case, dtype):
    with poisoned():
        assert_passed(compare(case, ["triton"], DEVICE, dtype))


@on_device
def test_other_dtypes_are_refused():
    arguments = on_the_device(drawn(TestMoeExperts.tiny))
    arguments = [x.double() if x.is_floating_point() else x for x in arguments]
    with pytest.raises(TypeError, match=r"moe_experts: the Triton kernels take float32, .*, got float64"):  # noqa: SIM117
        with ops.use("triton"):
            ops.moe_experts(*arguments)


test_in_the_interpreter = in_the_interpreter(__file__)
