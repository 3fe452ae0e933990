"""The Triton kernels of moe_route against the float64 reference; the contract of every operator's is in
tests/triton_contract.py."""

from __future__ import annotations

import pytest
import torch
from triton_contract import (
    DEVICE,
    DRAWS,
    DTYPES,
    TritonContract,
    assert_passed,
    drawn,
    in_the_interpreter,
    on_device,
    on_the_device,
    poisoned,
)

from dsfast import ops
from dsfast.errors import UserError
from dsfast.ops.cases import moe_route_case, route_tokens_case
from dsfast.ops.checks import check_draws, compare


class TestMoeRoute(TritonContract):
    cases = (
        moe_route_case("no tokens", 0, 4, 2),
        moe_route_case("no tokens, more experts than the last kernel adds up", 0, 4097, 2),
        moe_route_case("the 500K model: top 1 of 2, one token above a tile", 65, 2, 1),
        moe_route_case("one token", 1, 5, 2),
        moe_route_case("all experts chosen", 13, 7, 7),
        moe_route_case("normalised top 1: the weight is constant, the gradient 0", 11, 6, 1, norm_topk_prob=True),
        moe_route_case("2 of 3 groups of 7: neither is a power of two", 41, 21, 4, 3, 2, True),
        moe_route_case("1 of 8 groups: no power of two of choices, three tiles", 41, 64, 5, 8, 1),
        moe_route_case("groups of one expert: a group's score is one value", 23, 8, 2, 8, 3),
        moe_route_case("all experts of the groups taken", 19, 15, 6, 5, 2),
        moe_route_case("all groups: no limit", 17, 12, 5, 4, 4),
        moe_route_case("DeepSeek-V3's 256 experts, one token below a tile", 3, 256, 8, 8, 4, True),
        moe_route_case("as before, one above two tiles", 9, 256, 8, 8, 4, True),
        moe_route_case("softmax, no tokens", 0, 4, 2, 1, 1, False, "softmax"),
        moe_route_case("softmax, one expert: the score is constant, the gradient 0", 7, 1, 1, 1, 1, False, "softmax"),
        moe_route_case("softmax, top 1 of 2, one token above a tile", 65, 2, 1, 1, 1, False, "softmax"),
        moe_route_case("softmax, 2 of 3 groups of 7, normalised", 41, 21, 4, 3, 2, True, "softmax"),
        moe_route_case(
            "softmax, DeepSeek-V2's 160 experts: blocks of 120 slots, two", 21, 160, 6, 8, 3, False, "softmax"
        ),
    )
    tiny = moe_route_case("tiny", 3, 6, 2, 3, 2, True)
    registered = ("moe_route", "moe_route_backward", "sort_slots")


class TestRouteTokens(TritonContract):
    # Up to 16 places, with the padding, one kernel makes the logits and chooses: 16 tokens in a tile, 64 columns of x in a step.
    # Their gradients: 32 tokens in a tile, 32 columns in a program.
    cases = (
        route_tokens_case("no tokens", 0, 5, 4, 2),
        route_tokens_case("the 500K model: top 1 of 2, one token above a tile", 33, 128, 2, 1),
        route_tokens_case("one token, one column", 1, 1, 5, 2),
        route_tokens_case("no columns", 3, 0, 5, 2),
        route_tokens_case("one expert", 7, 9, 1, 1, norm_topk_prob=True),
        route_tokens_case("16 experts: no place is empty; one column above a step", 33, 65, 16, 5, norm_topk_prob=True),
        route_tokens_case("2 of 3 groups of 4, all of which fit", 41, 19, 12, 4, 3, 2, True),
        route_tokens_case("12 experts in groups of 6: the last place is empty", 19, 15, 12, 6, 2, 2),
        route_tokens_case("2 of 4 groups of 2, no power of two of choices", 41, 5, 8, 3, 4, 2),
        route_tokens_case("groups of one expert", 23, 7, 8, 2, 8, 3),
        route_tokens_case("one expert too many for one kernel", 21, 33, 17, 3),
        route_tokens_case("3 groups of 7: 32 places", 41, 20, 21, 4, 3, 2, True),
        route_tokens_case("softmax, 2 of 3 groups of 4: empty places", 41, 19, 12, 4, 3, 2, False, "softmax"),
        route_tokens_case(
            "softmax, one expert: the score is constant, the gradient 0", 7, 9, 1, 1, 1, 1, False, "softmax"
        ),
        route_tokens_case("softmax, no power of two of choices", 19, 7, 6, 3, 1, 1, False, "softmax"),
        route_tokens_case("softmax, of one expert too many for one kernel", 21, 33, 17, 3, 1, 1, True, "softmax"),
    )
    tiny = route_tokens_case("tiny", 3, 5, 6, 2, 3, 2)  # normalised, a sum of weights has no gradient
    registered = ("moe_route_tokens", "moe_route_tokens_backward")


@on_device
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("experts", "groups"), [(4, 2), (24, 4)], ids=["one kernel", "matrix products"])
def test_tokens_of_16_bits_have_scores_in_float32(experts, groups, dtype):
    """The bias is float32 as well. Weights and gradients have the tokens' dtype, the choice is that of float32 scores."""
    case = route_tokens_case("", 37, 40, experts, 2, groups, 2, True)
    draws = [on_the_device(drawn(case, seed)) for seed in range(DRAWS)]
    with poisoned():
        assert_passed(check_draws("moe_route", case.function, draws, case.differentiable, ["triton"], dtype))
        x, weight = (t.to(dtype) for t in draws[0][:2])
        weights, indices, *_ = case.function(x, weight, *draws[0][2:])
    assert weights.dtype == dtype
    arguments = x, weight, *draws[0][2:], "sigmoid"
    torch.library.opcheck(torch.ops.dsfast.moe_route_tokens, arguments, test_utils=("test_schema", "test_faketensor"))
    logits = x.double() @ weight.double().T
    with ops.use("reference"):
        _, expected, *_ = ops.moe_route(logits, draws[0][2].double(), *draws[0][3:])
    assert torch.equal(indices, expected)


@on_device
def test_programs_with_several_tiles_of_tokens(monkeypatch):
    """As where there are many tokens: two programs for each block of columns, two tiles each."""
    from dsfast.triton_kernels import pieces

    monkeypatch.setattr(pieces, "PROGRAMS", 4)
    with poisoned():
        assert_passed(compare(route_tokens_case("4 tiles", 97, 64, 4, 2), ["triton"], DEVICE))


def route(logits, bias, *choice):
    with poisoned(), ops.use("triton", "moe_route"):
        return ops.moe_route(torch.tensor(logits, device=DEVICE), torch.tensor(bias, device=DEVICE), *choice)


@on_device
def test_equal_values_go_to_the_lower_index():
    _, indices, counts, *_ = route([[0.5] * 6] * 3, [0.0] * 6, 4, 3, 2, False, 1.0)
    assert indices.tolist() == [[0, 1, 2, 3]] * 3
    assert counts.tolist() == [3, 3, 3, 3, 0, 0]


@on_device
def test_equal_values_among_many():
    """Half the experts are equal, in a random order: a stable sort says which come first."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randint(-2, 3, (40, 60), generator=random).float()
    bias = torch.randint(0, 2, (60,), generator=random) / 8
    arguments = (7, 5, 3, False, 1.0)
    with ops.use("reference"):
        _, expected, *_ = ops.moe_route(logits, bias, *arguments)
    _, indices, *_ = route(logits.tolist(), bias.tolist(), *arguments)
    assert torch.equal(indices.cpu(), expected)


@on_device
def test_a_group_counts_by_its_two_best():
    # group 0 has the single best expert, group 1 the two best together
    _, indices, *_ = route([[3.0, -9.0, -9.0, 1.0, 1.5, -9.0]], [0.0] * 6, 2, 2, 1, False, 1.0)
    assert indices.tolist() == [[4, 3]]


@on_device
@pytest.mark.parametrize("bias", [[-9.0, -9.0, -20.0, -20.0], [-3e38, -3e38, float("-inf"), float("-inf")]], ids=str)
def test_negative_biased_scores_still_beat_the_groups_left_out(bias):
    _, indices, *_ = route([[1.0, 0.0, 2.0, 2.0]], bias, 2, 2, 1, False, 1.0)
    assert sorted(indices[0].tolist()) == [0, 1]


@on_device
def test_experts_that_a_bias_forbids_are_taken_before_those_of_other_groups():
    _, indices, counts, *_ = route([[0.5] * 6] * 5, [0.0, 0.0, 0.0, float("-inf"), 1.0, 1.0], 3, 2, 1, False, 1.0)
    assert indices.tolist() == [[4, 5, 3]] * 5
    assert counts.tolist() == [0, 0, 0, 5, 5, 5]


@on_device
@pytest.mark.parametrize("nan", [float("nan"), -float("nan")], ids=["nan", "-nan"])
def test_nan_is_chosen_so_that_it_shows(nan):
    """The lowest of two NaN, also where a group is chosen for it; the other tokens are as they would be."""
    logits = [[1.0, 3.0, 2.0, 0.0, 1.0, 1.0], [0.0, 1.0, nan, nan, 0.0, 2.0], [nan] * 6]
    weights, indices, counts, *_ = route(logits, [0.0] * 6, 1, 3, 2, False, 1.0)
    assert indices.tolist() == [[1], [2], [0]]
    assert weights.isnan().flatten().tolist() == [False, True, True]
    assert counts.tolist() == [1, 1, 1, 0, 0, 0]


@on_device
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_indices_stay_in_range(value):
    """Also of tokens without a single number, where places beyond the last expert and group stand beside them."""
    _, indices, counts, *_ = route([[value] * 21] * 5, [0.0] * 21, 6, 3, 2, True, 1.0)
    assert indices.tolist() == [[0, 1, 2, 3, 4, 5]] * 5
    assert counts.sum() == 30


@on_device
@pytest.mark.parametrize("size", [20.0, 80.0, 200.0])
def test_saturated_scores(size):
    """Small scores keep their digits, nothing overflows. 1e-5 on a machine without fused multiply-add (the interpreter)."""
    logits = torch.linspace(-size, size, 34).view(2, 17)
    weights, indices, *_ = route(logits.tolist(), [0.0] * 17, 17, 1, 1, False, 1.0)
    found = torch.zeros(2, 17).scatter(1, indices.cpu(), weights.cpu()).double()
    exact = logits.double().sigmoid()
    torch.testing.assert_close(found, exact, rtol=1e-6 if DEVICE == "cuda" else 1e-5, atol=1e-36)


@on_device
@pytest.mark.parametrize("size", [20.0, 80.0, 200.0])
def test_softmax_of_large_logits(size):
    """Nothing overflows; what is less than float32 holds is 0."""
    logits = torch.linspace(-size, size, 34).view(2, 17)
    weights, indices, *_ = route(logits.tolist(), [0.0] * 17, 17, 1, 1, False, 1.0, "softmax")
    found = torch.zeros(2, 17).scatter(1, indices.cpu(), weights.cpu()).double()
    torch.testing.assert_close(found, logits.double().softmax(1), rtol=1e-5, atol=1e-37)


@on_device
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_softmax_of_what_is_no_number(value):
    """NaN and inf make NaN of all scores of their token, -inf is never chosen while others are left."""
    logits = [[0.0, 1.0, value, 2.0], [3.0, 1.0, 2.0, 0.0]]
    weights, indices, *_ = route(logits, [0.0] * 4, 2, 1, 1, False, 1.0, "softmax")
    lowest = value == float("-inf")
    assert indices.tolist() == [[3, 1] if lowest else [0, 1], [0, 2]]
    assert weights.isnan().tolist() == [[not lowest] * 2, [False] * 2]


# Tokens, experts, choices, groups, groups taken; a tile has 64, 16, 4, 4 and 1 tokens, a block 2, 4, 4, 32 and 32 tiles.
MANY_TILES = [
    (64 * 16 + 1, 3, 1, 1, 1),
    (70, 40, 2, 1, 1),
    (145, 160, 6, 8, 3),
    (150, 256, 1, 8, 1),
    pytest.param((70, 1024, 1, 1, 1), marks=pytest.mark.slow),
]


@on_device
@pytest.mark.parametrize("sizes", MANY_TILES, ids=str)
@pytest.mark.parametrize("summed", [0, 128, 4096], ids=["scanned", "summed, as many as can be", "summed"])
def test_many_tiles_are_sorted(sizes, summed, monkeypatch):
    """By the last kernel itself, and by one before that takes 32 tiles at once; counts and places say the same as the choice."""
    from dsfast.triton_kernels import moe_route as kernels

    monkeypatch.setattr(kernels, "SUMMED", summed)
    monkeypatch.setattr(kernels, "SCANNED", 32)
    tokens, experts, *choice = sizes
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0))
    _, indices, counts, order, offsets = route(logits.tolist(), [0.0] * experts, *choice, False, 1.0)
    chosen = indices.flatten()
    assert torch.equal(counts, torch.bincount(chosen, minlength=experts))
    assert torch.equal(order, chosen.argsort(stable=True).int())
    assert offsets.tolist() == [0, *counts.cumsum(0).tolist()]


@on_device
@pytest.mark.parametrize("k", [1, 3])
def test_scores_that_are_all_zero_in_float32(k):
    """Their sum, which the weights are divided by, is none: weights and gradients are 0 and no NaN."""
    arguments = on_the_device([torch.full((3, 6), -200.0), torch.zeros(6), k, 1, 1, True, 2.5])
    assert_passed(check_draws("moe_route", ops.moe_route, [arguments], (0,), ["triton"]))


@on_device
@pytest.mark.parametrize("experts", [2, 40])
def test_all_tokens_go_to_one_expert(experts):
    """As many of a tile as there can be: a count of them is one byte."""
    bias = [0.0, 9.0, *[0.0] * (experts - 2)]
    _, indices, counts, order, offsets = route([[0.0] * experts] * 300, bias, 1, 1, 1, False, 1.0)
    assert (indices == 1).all()
    assert counts.tolist() == [0, 300, *[0] * (experts - 2)]
    assert torch.equal(order.cpu(), torch.arange(300).int())
    assert offsets.tolist() == [0, 0, *[300] * (experts - 1)]


@on_device
def test_other_dtypes_are_refused():
    with (
        pytest.raises(UserError, match=r"moe_route: .* the Triton kernels take float32, got float16"),
        ops.use("triton"),
    ):
        ops.moe_route(torch.ones(2, 4).half().to(DEVICE), torch.ones(4).half().to(DEVICE), 1, 1, 1, False, 1.0)
    x, w = (torch.ones(n, 3, dtype=torch.float64, device=DEVICE) for n in (2, 4))
    with pytest.raises(UserError, match=r"moe_route: .* take tokens in float32, .*, got float64"), ops.use("triton"):
        ops.route_tokens(x, w, torch.ones(4, device=DEVICE), 1, 1, 1, False, 1.0)


def sort(indices, experts):
    from dsfast.triton_kernels.moe_route import sort_slots

    with poisoned():
        order, offsets = sort_slots(indices.to(DEVICE), experts)
    return order.cpu(), offsets.cpu()


# Slots, experts, with the reason. A block has 128 slots; up to 128 blocks of up to 31 experts need no scan, 8 of up to 511.
SORTS = {
    "no slot": (0, 5),
    "one slot": (1, 2),
    "one block less one": (127, 3),
    "one block": (128, 31),
    "one above a block": (129, 32),
    "two experts": (1100, 2),
    "three experts": (300, 3),
    "four experts": (300, 4),
    "one expert": (1000, 1),
    "one above the blocks of 256 experts that need no scan": (128 * 8 + 1, 256),
    "more experts than slots": (200, 511),
    "more experts than a block has slots": (200, 600),
}


@on_device
@pytest.mark.parametrize(("slots", "experts"), SORTS.values(), ids=SORTS)
def test_sort_is_stable_and_indices_of_no_expert_come_last(slots, experts):
    random = torch.Generator().manual_seed(0)
    indices = torch.randint(-1, experts + 1, (slots, 1), generator=random)
    indices[::7] = experts // 2
    indices[3::50] = 2**62
    bins = torch.where((indices >= 0) & (indices < experts), indices, experts).flatten()
    order, offsets = sort(indices, experts)
    assert order.dtype == offsets.dtype == torch.int32
    assert order.tolist() == bins.argsort(stable=True).tolist()
    assert offsets.tolist() == [0, *torch.bincount(bins, minlength=experts + 1).cumsum(0)[:-1].tolist()]


@on_device
def test_sort_of_all_to_one_and_of_views():
    order, offsets = sort(torch.tensor([[1, 3]]).expand(300, 2).T.contiguous().T, 5)
    assert order.tolist() == [*range(0, 600, 2), *range(1, 600, 2)]
    assert offsets.tolist() == [0, 0, 300, 300, 600, 600]


@on_device
def test_scan_of_more_blocks_than_it_holds(monkeypatch):
    from dsfast.triton_kernels import moe_route as kernels

    monkeypatch.setattr(kernels, "SCANNED", 16)  # with 16 bins an element for each thread
    indices = torch.randint(0, 600, (128 * 33 + 1, 1), generator=torch.Generator().manual_seed(0))
    order, _ = sort(indices, 600)
    assert torch.equal(order, indices.flatten().argsort(stable=True).int())


test_in_the_interpreter = in_the_interpreter(__file__)
