"""The Triton kernels of moe_experts against the float64 reference; the contract of every operator's is in
tests/triton_contract.py."""

from __future__ import annotations

import pytest
import torch
from operator_cases import assert_bitwise_equal, assert_passed, drawn
from test_moe_experts import on_top
from triton_contract import (
    DEVICE,
    DTYPES,
    TritonContract,
    in_the_interpreter,
    on_device,
    on_the_device,
    poisoned,
    run_triton,
    small_tiles_of_narrow_experts,
)  # fmt: skip

from dsfast import ops
from dsfast.errors import UserError
from dsfast.ops.cases import moe_experts_case
from dsfast.ops.checks import check, compare, evaluate
from dsfast.ops.moe_route import sort_slots


class TestMoeExperts(TritonContract):
    cases = (
        moe_experts_case("no tokens", 0, 5, 2, 3, 7),
        moe_experts_case("two experts, top 1: a slot is its token; one above two tiles", 33, 4, 1, 2, 3),
        moe_experts_case(
            "experts without a token, first, last and between; no power of two", 5, 7, 3, 6, 5, used=(1, 3, 4)
        ),
        moe_experts_case("more experts than tokens, widths one above a block", 2, 33, 2, 5, 17),
        moe_experts_case("too deep for one kernel to do the backward pass", 5, 129, 1, 2, 3),
        moe_experts_case("too wide for it", 5, 3, 2, 2, 65),
    )
    tiny = moe_experts_case("tiny", 4, 3, 2, 3, 2)
    registered = ("moe_experts", "moe_experts_backward")


class TestNarrowExperts(TritonContract):
    """The backward pass in one kernel, which float32 would not take by itself."""

    cases = (
        moe_experts_case("no tokens", 0, 5, 2, 3, 7),
        moe_experts_case("one token", 1, 5, 1, 2, 3),
        moe_experts_case("one below a tile, widths as well", 15, 15, 1, 1, 15),
        moe_experts_case("one above a tile, widths as well; all to one expert", 17, 17, 1, 3, 17, used=(1,)),
        moe_experts_case("two experts, top 1, several tiles of each, prime widths", 53, 37, 1, 2, 23),
        moe_experts_case(
            "two choices; experts without a token, first, last and between", 41, 17, 2, 6, 16, used=(1, 3, 4)
        ),
        moe_experts_case("widths that fill blocks: no masks", 40, 32, 2, 2, 16),
        moe_experts_case("more experts than tokens", 2, 5, 3, 9, 3),
    )
    tiny = TestMoeExperts.tiny
    registered = TestMoeExperts.registered

    @pytest.fixture(autouse=True)
    def _small_tiles(self, monkeypatch):
        small_tiles_of_narrow_experts(monkeypatch)


@pytest.fixture(params=["several kernels", "one kernel"])
def _either_backward(request, monkeypatch):
    if request.param == "one kernel":
        small_tiles_of_narrow_experts(monkeypatch)


either_backward = pytest.mark.usefixtures("_either_backward")


@on_device
@either_backward
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
@either_backward
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
@either_backward
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("width", [2, 65], ids=["one product after the other", "two kernels"])
def test_nan_of_an_index_of_no_expert_is_written(width, k, monkeypatch):
    """To memory that held other numbers: elsewhere here all is NaN before. As many tiles as there can be: all three ranges of
    places end in one begun."""
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)
    case = moe_experts_case("bad", 19, 3, k, 2, width)
    arguments = on_the_device(drawn(case))
    arguments[2].fill_(0)
    arguments[2][3, 0], arguments[2][9, k - 1] = 1, 2
    with ops.use("triton"):
        found = evaluate(case.function, arguments, case.differentiable)
    for quantity in ("output", "grad x"):
        assert found[quantity].isnan().all(1).nonzero().tolist() == [[9]]
    assert found["grad weights"].isnan().nonzero().tolist() == [[9, k - 1]]


@on_device
@either_backward
def test_no_index_names_an_expert():
    case = moe_experts_case("all bad", 5, 3, 1, 2, 2)
    arguments = drawn(case)
    arguments[2].fill_(7)
    found = run_triton(case, arguments)
    assert found["output"].isnan().all()
    assert not found["grad gate_up"].any()
    assert not found["grad down"].any()


@on_device
@either_backward
@pytest.mark.parametrize("quantity_of_token_0", [0, 1], ids=["x", "weight"])
def test_nan_stays_with_its_token(quantity_of_token_0):
    """Tiles are filled up with other tokens' rows, whose results are not to show; gradients of the other expert neither."""
    case = moe_experts_case("nan", 9, 5, 1, 2, 3)
    arguments = drawn(case)
    arguments[quantity_of_token_0][0] = float("nan")
    arguments[2][:, 0] = torch.arange(9) % 2
    found = run_triton(case, arguments)
    for quantity in ("output", "grad x"):
        nan = found[quantity].isnan()
        assert nan[0].all()
        assert not nan[1:].any()
    for quantity in ("grad gate_up", "grad down"):
        assert found[quantity][0].isnan().any()
        assert not found[quantity][1].isnan().any()


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
@pytest.mark.parametrize("width", [3, 65], ids=["by tiles of narrow experts", "by splits"])
def test_parts_of_a_sum_over_places_are_float32(width, monkeypatch):
    """What tokens far apart add to the matrices' gradients cancels: float16 parts would lose what others add."""
    from dsfast.triton_kernels import moe_experts as kernels

    monkeypatch.setattr(kernels, "SHARE", 4)
    x, weights, indices, gate_up, down = on_the_device(drawn(moe_experts_case("", 130, 5, 1, 1, width)))
    x[-1], weights[-1] = x[0], weights[0]
    x, weights, gate_up, down = (t.half() for t in (x, weights, gate_up, down))
    leaves = [gate_up.requires_grad_(), down.requires_grad_()]
    dy, found = torch.ones(130, 5, device=DEVICE).half(), []
    for size in (0.0, 1000.0):
        dy[0], dy[-1] = size, -size
        with poisoned(), ops.use("triton"):
            found.append(torch.autograd.grad(ops.moe_experts(x, weights, indices, gate_up, down), leaves, dy))
    for alone, beside in zip(*found, strict=True):
        torch.testing.assert_close(beside, alone, rtol=0, atol=2e-3 * alone.abs().max().item())


@on_device
@pytest.mark.parametrize(
    "case",
    [
        moe_experts_case("the 500K model's widths; no token for the last", 75, 128, 1, 3, 64, used=(0, 1)),
        moe_experts_case("no power of two, two slots a token", 49, 100, 2, 3, 50),
    ],
    ids=lambda case: case.name,
)
def test_tiles_where_places_are_few(monkeypatch, case):
    """Of the 500K model on a GPU: 32 rows forward and for dx, 128 for the matrices' gradients."""
    from dsfast.triton_kernels import moe_experts as kernels

    rows, launch = {}, kernels._Launches.launch
    monkeypatch.setattr(
        kernels._Launches, "launch", lambda self, kernel, programs, tiles, arguments: (
            rows.setdefault(kernel.__name__, tiles.bm), launch(self, kernel, programs, tiles, arguments))[1],
    )  # fmt: skip
    assert_passed(compare(case, ["triton"], DEVICE, torch.float16, draws=1))
    few = {"up_kernel": 32, "narrow_backward_kernel": 32, "narrow_matrix_kernel": 128}
    assert few.items() <= rows.items() or not kernels.large_tiles(torch.device(DEVICE))


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


@pytest.mark.parametrize(
    ("dtype", "d", "i", "k", "names"),
    [
        (torch.bfloat16, 128, 64, 1, ["narrow_backward", "narrow_matrix", "add_tiles"]),
        (torch.float16, 5, 3, 2, ["narrow_backward", "sum", "narrow_matrix", "add_tiles"]),
        (torch.bfloat16, 129, 64, 1, ["project", "swiglu_backward", "project", "matrix", "matrix"]),
        (torch.bfloat16, 128, 65, 1, ["project", "swiglu_backward", "project", "matrix", "matrix"]),
        (torch.float32, 128, 64, 1, ["project", "swiglu_backward", "project", "matrix", "matrix"]),
    ],
)
def test_what_the_backward_pass_launches(dtype, d, i, k, names):
    """For 9 tokens, whose sums are not split."""
    from dsfast.triton_kernels import moe_experts as kernels
    from dsfast.triton_kernels.launch import on_meta

    empty = on_meta(dtype)
    order, offsets = empty(9 * k, dtype=torch.int32), empty(3, dtype=torch.int32)
    inputs = (empty(9, d), empty(9, k), empty(2, 2 * i, d), empty(2, d, i))
    for large in (True, False):
        first, of_matrices = kernels.backward_launches(
            empty(9, d), *inputs, empty(9 * k, 2 * i), order, offsets, *inputs, large
        )
        found = [launch.kernel.__name__.removesuffix("_kernel") for launch in first + of_matrices]
        assert found == names


@on_device
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        pytest.param(dtype, size, marks=() if dtype is torch.float16 and size > 16 else pytest.mark.slow)
        for dtype in DTYPES
        for size in (16, 64, 128)
    ],
    ids=str,
)
def test_every_tile(monkeypatch, dtype, size):
    """The tiles of few, some and many places for an expert, whatever the case's own would be."""
    from dsfast.triton_kernels import moe_experts as kernels

    monkeypatch.setattr(kernels, "_size", lambda *_: size)
    monkeypatch.setattr(kernels, "FUSED", 0)
    case = moe_experts_case("tiles", 70, 20, 2, 3, 18, used=(0, 2))
    with poisoned():
        assert_passed(compare(case, ["triton"], DEVICE, dtype))


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("width", [7, 65], ids=["one kernel", "two kernels"])
def test_on_top_of_a_base(width, k, dtype):
    function, arguments = on_top(k, width)
    with poisoned():
        assert_passed(check("moe_experts", function, on_the_device([*arguments]), (0, 1, 3, 4, 5), ["triton"], dtype))


@on_device
def test_slots_apart_in_memory():
    """Sorted before, as views with other numbers between theirs."""
    arguments = on_the_device(drawn(moe_experts_case("slots", 70, 20, 2, 3, 18)))
    weights, gate_up = (arguments[position].requires_grad_() for position in (1, 3))
    order, offsets = sort_slots(arguments[2], 3)
    found = []
    with poisoned(), ops.use("triton"):
        for slots in (None, tuple(torch.stack([s, -s], 1)[:, 0] for s in (order, offsets))):
            y = ops.moe_experts(*arguments, slots)
            found.append((y, *torch.autograd.grad(y.sum(), (weights, gate_up))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


LARGER = (
    moe_experts_case("many experts, a token or none each", 17, 6, 3, 61, 4),
    moe_experts_case("tiles of one expert, and as many columns of blocks: grouped order", 33 * 9, 70, 1, 1, 35),
    moe_experts_case("widths that fill blocks: no masks", 40, 64, 2, 2, 32),
    moe_experts_case("all to the first expert", 150, 7, 2, 4, 5, used=(0, 1)),
    moe_experts_case(
        "narrow, all to the second of two: more tiles than are added up at once", 70 * 16, 17, 1, 2, 3, used=(1,)
    ),
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
    with pytest.raises(UserError, match=r"moe_experts: .* the Triton kernels take float32, .*, got float64"):  # noqa: SIM117
        with ops.use("triton"):
            ops.moe_experts(*arguments)


test_in_the_interpreter = in_the_interpreter(__file__, ("sm_80",))
