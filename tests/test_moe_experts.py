from __future__ import annotations

from functools import partial

import pytest
import torch
from operator_cases import OperatorContract, assert_passed, bad, drawn, edges, needs_native, run_native

from dsfast import ops
from dsfast.ops.cases import moe_experts_case
from dsfast.ops.checks import check, evaluate


class TestMoeExperts(OperatorContract):
    cases = (
        *edges(moe_experts_case, "n", d=5, k=2, e=3, i=3),
        *edges(moe_experts_case, "d", n=29, k=1, e=2, i=3),
        *edges(moe_experts_case, "i", n=29, k=1, e=2, d=3),
        moe_experts_case("no tokens", 0, 5, 2, 3, 7),
        moe_experts_case("one expert", 13, 7, 1, 1, 5),
        moe_experts_case("all tokens to the last expert", 113, 7, 1, 4, 5, used=(3,)),
        moe_experts_case("all tokens to the first expert", 113, 7, 1, 4, 5, used=(0,)),
        moe_experts_case("wide: read transposed as they lie", 29, 270, 2, 3, 260),
        moe_experts_case("wide: rows more than a page apart", 61, 1031, 1, 3, 67),
        moe_experts_case("wide: more tokens than a block", 801, 270, 1, 2, 260, used=(1,)),
        moe_experts_case("experts without a token, first, last and between", 37, 7, 1, 6, 5, used=(1, 4)),
        moe_experts_case("every expert chosen by every token", 29, 11, 4, 4, 6),
        moe_experts_case("many experts, a token or none each", 17, 6, 3, 61, 4),
        moe_experts_case("sums over 641 tokens", 641, 7, 1, 2, 5),
        moe_experts_case("weights too large to be packed beforehand", 13, 521, 1, 2, 512),
    )
    tiny = moe_experts_case("tiny", 4, 3, 2, 3, 2)
    summed_over_threads = frozenset({"grad gate_up", "grad down"})
    bad_arguments = (
        bad(r"moe_experts: x must have shape \[N, D\], got \[4\]", x=lambda x: x[:, 0]),
        bad(r"moe_experts: weights must have shape \[4, K\], got \[3, 2\]", weights=lambda w: w[:3]),
        bad(r"moe_experts: indices must have shape \[4, 2\], got \[4, 1\]", indices=lambda i: i[:, :1]),
        bad(r"moe_experts: down must have shape \[E, 3, I\], got \[3, 2, 2\]", down=lambda d: d[:, :2]),
        bad(r"moe_experts: gate_up must have shape \[3, 4, 3\], got \[2, 4, 3\]", gate_up=lambda g: g[:2]),
        bad(r"moe_experts: gate_up must have shape \[3, 4, 3\], got \[3, 3, 3\]", gate_up=lambda g: g[:, :3]),
        bad("moe_experts: weights must be torch.float32 on cpu, got", TypeError, weights=torch.Tensor.double),
        bad("moe_experts: indices must be torch.int64 on cpu, got torch.int32", TypeError, indices=torch.Tensor.int),
        bad(r"moe_experts: indices must lie in 0..2, 1 of 8 do not", indices=torch.tensor([[0, 1]] * 3 + [[3, 1]])),
        bad(
            r"moe_experts: indices must lie in 0..2, 2 of 8 do not", indices=torch.tensor([[0, 1]] * 3 + [[-1, 2**62]])
        ),
    )

    @staticmethod
    def independent(x, weights, indices, gate_up, down):
        """All experts on all tokens, most of it thrown away."""
        gate, up = torch.einsum("nd,eid->eni", x, gate_up).chunk(2, -1)
        every = torch.einsum("eni,edi->end", gate / (1 + torch.exp(-gate)) * up, down)
        share = torch.nn.functional.one_hot(indices, len(down)).to(x).mul(weights[..., None]).sum(1)
        return torch.einsum("ne,end->nd", share, every)


def test_no_expert_for_a_token_is_refused():
    tokens, experts = torch.randn(5, 64), (torch.randn(3, 8, 64), torch.randn(3, 64, 4))
    with pytest.raises(
        ValueError, match=r"moe_experts: expected at least one expert for each token, got weights \[N, 0\]"
    ):
        ops.moe_experts(tokens, torch.randn(5, 0), torch.zeros(5, 0, dtype=torch.int64), *experts)


def test_weights_of_an_expert_without_tokens_are_not_read():
    needs_native()
    case = moe_experts_case("two unused", 19, 5, 1, 4, 3, used=(0, 2))
    arguments = drawn(case)
    clean = run_native(case, arguments)
    arguments[3][[1, 3]] = float("nan")
    arguments[4][[1, 3]] = float("nan")
    found = run_native(case, arguments)
    assert all(torch.equal(found[quantity], clean[quantity]) for quantity in clean)
    assert not found["grad gate_up"][[1, 3]].any()
    assert not found["grad down"][[1, 3]].any()


def test_an_expert_chosen_twice_by_a_token_counts_twice():
    needs_native()
    x, weights, _, gate_up, down = drawn(moe_experts_case("twice", 5, 7, 2, 3, 4))
    once = torch.ones(5, 1, dtype=torch.int64)
    with ops.use("native"):
        twice = ops.moe_experts(x, weights, once.expand(5, 2), gate_up, down)
        together = ops.moe_experts(x, weights.sum(1, keepdim=True), once, gate_up, down)
    torch.testing.assert_close(twice, together, rtol=1e-6, atol=1e-6)


def test_agrees_with_swiglu_mlp_where_there_is_one_expert():
    needs_native()
    x, _, _, gate_up, down = drawn(moe_experts_case("one", 101, 19, 1, 1, 13))
    with ops.use("native"):
        routed = ops.moe_experts(x, torch.ones(101, 1), torch.zeros(101, 1, dtype=torch.int64), gate_up, down)
        assert torch.equal(routed, ops.swiglu_mlp(x, gate_up[0], down[0]))


def on_top(k: int, i: int) -> tuple:
    """`moe_experts` of x, weights, indices, gate_up, down and base, and these, the rows of base within a wider tensor."""
    base = torch.randn(35, 66, generator=torch.Generator().manual_seed(9))[:, 33:]
    arguments = *drawn(moe_experts_case("", 35, 33, k, 3, i)), base

    def based(x, weights, indices, gate_up, down, base):
        return ops.moe_experts(x, weights, indices, gate_up, down, base=base)

    return based, arguments


@pytest.mark.parametrize("k", [1, 2])
def test_on_top_of_a_base(k):
    needs_native()
    function, arguments = on_top(k, 7)
    assert_passed(check("moe_experts", function, arguments, (0, 1, 3, 4, 5), ["reference", "native"]))


def test_a_base_of_another_shape_or_dtype_is_refused():
    function, (*arguments, base) = on_top(2, 7)
    with pytest.raises(ValueError, match=r"moe_experts: base must have shape \[35, 33\], got \[35, 32\]"):
        function(*arguments, base[:, 1:])
    with pytest.raises(TypeError, match=r"moe_experts: base must be torch.float32 on cpu, got torch.float64"):
        function(*arguments, base.double())


def with_slots():
    """(arguments, slots) of a case, as a router gives them."""
    x, weights, indices, gate_up, down = drawn(moe_experts_case("slots", 29, 5, 2, 4, 3))
    with ops.use("reference"):
        *_, order, offsets = ops.moe_route(
            torch.zeros(29, 4).scatter(1, indices, 1.0), torch.zeros(4), 2, 1, 1, False, 1.0
        )
    indices = indices.sort(1).values  # of equal scores the lower comes first
    return (x, weights, indices, gate_up, down), (order, offsets)


@pytest.mark.parametrize("apart", [False, True], ids=["contiguous", "apart"])
def test_slots_that_were_sorted_before_change_nothing(apart):
    needs_native()
    arguments, slots = with_slots()
    if apart:
        slots = tuple(torch.stack([s, -s], 1)[:, 0] for s in slots)
    expected = evaluate(ops.moe_experts, arguments, (0, 1, 3, 4))
    found = evaluate(partial(ops.moe_experts, slots=slots), arguments, (0, 1, 3, 4))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda order, offsets: (order[:-1], offsets), r"order must have shape \[58\], got \[57\]"),
        (lambda order, offsets: (order, offsets[:-1]), r"offsets must have shape \[5\], got \[4\]"),
        (lambda order, offsets: (order + 1, offsets), "slots must be order and offsets of 58 slots"),
        (lambda order, offsets: (order - 1, offsets), "slots must be order and offsets of 58 slots"),
        (lambda order, offsets: (order, offsets + 1), "slots must be order and offsets of 58 slots"),
        (lambda order, offsets: (order, offsets.flip(0)), "slots must be order and offsets of 58 slots"),
        # One of them alone wrong: the first, the last, one between below the first, two between exchanged.
        (lambda order, offsets: (order, offsets.clamp(min=1)), "slots must be order and offsets of 58 slots"),
        (lambda order, offsets: (order, offsets.clamp(max=57)), "slots must be order and offsets of 58 slots"),
        (lambda order, offsets: (order, offsets.where(offsets != offsets[1], -1)), "slots must be order and offsets"),
        (lambda order, offsets: (order, offsets[[0, 2, 1, 3, 4]]), "slots must be order and offsets of 58 slots"),
    ],
)
def test_slots_of_other_sizes_are_refused(change, complaint):
    needs_native()
    arguments, slots = with_slots()
    with pytest.raises(ValueError, match=f"moe_experts: {complaint}"):
        ops.moe_experts(*arguments, change(*slots))


@pytest.mark.parametrize("which", ["order", "offsets"])
def test_slots_of_another_dtype_are_refused(which):
    arguments, (order, offsets) = with_slots()
    slots = {"order": order, "offsets": offsets}
    slots[which] = slots[which].long()
    with pytest.raises(TypeError, match=f"moe_experts: {which} must be torch.int32 on cpu, got torch.int64"):
        ops.moe_experts(*arguments, tuple(slots.values()))
