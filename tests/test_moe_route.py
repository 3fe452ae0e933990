from __future__ import annotations

import math

import pytest
import torch
from operator_cases import OperatorContract, assert_passed, bad, drawn, edges, needs_native, run_native

from dsfast import ops
from dsfast.ops.cases import moe_route_case, route_tokens_case
from dsfast.ops.checks import check


class TestMoeRoute(OperatorContract):
    cases = (
        *edges(moe_route_case, "n", e=5, k=2),
        *edges(moe_route_case, "e", n=7, k=1),
        moe_route_case("no tokens", 0, 4, 2),
        moe_route_case("the 500K model: top 1 of 2", 61, 2, 1),
        moe_route_case("all experts chosen", 13, 7, 7),
        moe_route_case("normalised", 37, 9, 3, norm_topk_prob=True),
        moe_route_case("normalised top 1: the weight is constant, the gradient 0", 11, 6, 1, norm_topk_prob=True),
        moe_route_case("2 of 3 groups, normalised", 41, 21, 4, 3, 2, True),
        moe_route_case("1 of 4 groups", 29, 12, 3, 4, 1),
        moe_route_case("all groups: no limit", 17, 12, 5, 4, 4),
        moe_route_case("groups of one expert: a group's score is one value", 23, 8, 2, 8, 3),
        moe_route_case("all experts of the groups taken", 19, 15, 6, 5, 2),
        moe_route_case("DeepSeek-V3's 256 experts, 4 of 8 groups, top 8", 31, 256, 8, 8, 4, True),
        moe_route_case("softmax, no tokens", 0, 4, 2, 1, 1, False, "softmax"),
        moe_route_case("softmax, one expert: the score is constant, the gradient 0", 7, 1, 1, 1, 1, False, "softmax"),
        moe_route_case("softmax, top 1 of 2", 61, 2, 1, 1, 1, False, "softmax"),
        moe_route_case(
            "softmax, top 1 normalised: the weight is constant, the gradient 0", 11, 6, 1, 1, 1, True, "softmax"
        ),
        moe_route_case("softmax, all experts normalised", 33, 9, 9, 1, 1, True, "softmax"),
        moe_route_case("softmax, 2 of 3 groups, normalised", 41, 21, 4, 3, 2, True, "softmax"),
        moe_route_case("softmax, DeepSeek-V2's 160 experts, 3 of 8 groups, top 6", 31, 160, 6, 8, 3, False, "softmax"),
    )
    tiny = moe_route_case("tiny", 3, 6, 2, 3, 2, True)
    bad_arguments = (
        bad(r"moe_route: logits must have shape \[N, E\], got \[3\]", logits=lambda x: x[:, 0]),
        bad(r"moe_route: bias must have shape \[6\], got \[5\]", bias=lambda b: b[:5]),
        bad("moe_route: bias must be torch.float32 on cpu, got torch.float64", TypeError, bias=torch.Tensor.double),
        bad("moe_route: cannot take 2 of 4 equal groups of 6 experts", n_group=4),
        bad("moe_route: cannot take 2 of 0 equal groups of 6 experts", n_group=0),
        bad("moe_route: cannot take 4 of 3 equal groups of 6 experts", topk_group=4),
        bad("moe_route: cannot take 0 of 3 equal groups of 6 experts", topk_group=0),
        bad(r"moe_route: top_k must be 1..4, got 5", top_k=5),
        bad(r"moe_route: top_k must be 1..4, got 0", top_k=0),
        bad("moe_route: scoring_func must be one of sigmoid, softmax, got 'tanh'", scoring_func="tanh"),
    )

    @staticmethod
    def independent(logits, bias, top_k, n_group, topk_group, norm_topk_prob, scaling, scoring_func="sigmoid"):
        scores, (n, e) = 1 / (1 + torch.exp(-logits)), logits.shape
        if scoring_func == "softmax":
            scores = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
        indices = torch.zeros(n, top_k, dtype=torch.int64)
        for token in range(n):
            value = dict(enumerate((scores[token] + bias).tolist()))
            groups = [range(e * g // n_group, e * (g + 1) // n_group) for g in range(n_group)]
            groups.sort(key=lambda group: sum(sorted((value[i] for i in group), reverse=True)[:2]), reverse=True)
            allowed = [i for group in groups[:topk_group] for i in group]
            indices[token] = torch.tensor(sorted(allowed, key=value.get, reverse=True)[:top_k])
        weights = torch.stack([scores[t, indices[t]] for t in range(n)]) if n else scores[:, :top_k]
        weights = weights / weights.sum(1, keepdim=True) if norm_topk_prob else weights
        slots = [[s for s, i in enumerate(indices.flatten().tolist()) if i == expert] for expert in range(e)]
        order = torch.tensor([s for of_expert in slots for s in of_expert], dtype=torch.int32)
        counts = torch.tensor([len(of_expert) for of_expert in slots])
        offsets = torch.tensor([sum(map(len, slots[:expert])) for expert in range(e + 1)], dtype=torch.int32)
        return weights * scaling, indices, counts, order, offsets


class TestRouteTokens(OperatorContract):
    cases = (
        route_tokens_case("no tokens", 0, 5, 4, 2),
        route_tokens_case("the 500K model: top 1 of 2", 61, 128, 2, 1),
        route_tokens_case("2 of 3 groups, normalised", 41, 20, 21, 4, 3, 2, True),
        route_tokens_case("softmax", 41, 20, 21, 4, 3, 2, False, "softmax"),
    )
    tiny = route_tokens_case("tiny", 3, 5, 6, 2, 3, 2)
    dtypes_not_named = frozenset({"bias"})  # the case casts it
    bad_arguments = (
        bad(r"moe_route: x must have shape \[N, D\], got \[3\]", x=lambda x: x[:, 0]),
        bad(r"moe_route: weight must have shape \[E, 5\], got \[6, 4\]", weight=lambda w: w[:, :4]),
        bad("moe_route: weight must be torch.float32 on cpu, got torch.bf", TypeError, weight=torch.Tensor.bfloat16),
        bad(r"moe_route: bias must have shape \[6\], got \[5\]", bias=lambda b: b[:5]),
        bad("moe_route: cannot take 2 of 4 equal groups of 6 experts", n_group=4),
        bad(r"moe_route: top_k must be 1..4, got 5", top_k=5),
    )

    @staticmethod
    def independent(x, weight, *others):
        return TestMoeRoute.independent(x @ weight.T, *others)

    def test_nan_is_not_swallowed(self):
        """It makes NaN of all scores of a token: the experts chosen show it, eager's gradient has it for the others as well."""
        needs_native()
        arguments = drawn(self.tiny)
        arguments[0][1, 2] = float("nan")
        found = run_native(self.tiny, arguments)
        weights, indices, x, weight = (found[name] for name in ("output 0", "output 1", "grad x", "grad weight"))
        assert weights.isnan().any(1).tolist() == [False, True, False]
        assert x.isnan().all(1).tolist() == [False, True, False]
        assert sorted(weight.isnan().all(1).nonzero().flatten().tolist()) == sorted(indices[1].tolist())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_bias_that_is_not_float32_is_refused_whatever_the_tokens_are(dtype):
    x, weight, bias, *choice = drawn(route_tokens_case("", 3, 5, 6, 2))
    with pytest.raises(TypeError, match=f"^moe_route: bias must be torch.float32 on cpu, got {dtype} on cpu$"):
        ops.route_tokens(x.to(dtype), weight.to(dtype), bias.to(dtype), *choice)


def test_tokens_of_another_dtype_are_routed_by_float32_scores():
    needs_native()
    x, weight, *others = drawn(route_tokens_case("", 33, 20, 5, 2))
    x, weight = x.bfloat16(), weight.bfloat16()
    weights, *found = ops.route_tokens(x, weight, *others)
    expected, *choice = ops.moe_route(x.float() @ weight.float().T, *others)
    assert weights.dtype == torch.bfloat16
    assert torch.equal(weights, expected.bfloat16())
    assert all(torch.equal(a, b) for a, b in zip(found, choice, strict=True))


@pytest.mark.parametrize("implementation", ["reference", "native"])
class TestChoice:
    def route(self, implementation, logits, bias, *choice):
        if implementation == "native":
            needs_native()
        with ops.use(implementation):
            return ops.moe_route(torch.tensor(logits), torch.tensor(bias), *choice)

    def test_equal_values_go_to_the_lower_index(self, implementation):
        _, indices, counts, *_ = self.route(implementation, [[0.5] * 6] * 3, [0.0] * 6, 4, 3, 2, False, 1.0)
        assert indices.tolist() == [[0, 1, 2, 3]] * 3
        assert counts.tolist() == [3, 3, 3, 3, 0, 0]

    def test_bias_steers_the_choice_and_is_not_in_the_weights(self, implementation):
        weights, indices, *_ = self.route(implementation, [[2.0, 0.0, -2.0]], [0.0, 0.0, 5.0], 2, 1, 1, False, 1.0)
        assert indices.tolist() == [[2, 0]]
        torch.testing.assert_close(weights, torch.tensor([[-2.0, 2.0]]).sigmoid())

    def test_a_group_counts_by_its_two_best(self, implementation):
        # group 0 has the single best expert, group 1 the two best together
        _, indices, *_ = self.route(implementation, [[3.0, -9.0, -9.0, 1.0, 1.5, -9.0]], [0.0] * 6, 2, 2, 1, False, 1.0)
        assert indices.tolist() == [[4, 3]]

    def test_negative_biased_scores_still_beat_the_groups_left_out(self, implementation):
        _, indices, *_ = self.route(
            implementation, [[1.0, 0.0, 2.0, 2.0]], [-9.0, -9.0, -20.0, -20.0], 2, 2, 1, False, 1.0
        )
        assert indices.tolist() == [[0, 1]]

    @pytest.mark.parametrize(("forbidden", "choice", "expected"), [
        ([1], (2, 1, 1), [0, 1]),  # too few are left: no expert twice
        ([0, 1, 2, 3, 4, 5, 6, 7, 8], (3, 1, 1), [9, 0, 1]),
        ([0, 2, 3], (1, 2, 1), [1]),  # the two best of both groups sum to -inf: the first is kept
        ([0, 1, 3], (1, 2, 1), [0]),
    ])  # fmt: skip
    def test_experts_that_a_bias_forbids(self, implementation, forbidden, choice, expected):
        experts = {(2, 1, 1): 2, (3, 1, 1): 10}.get(choice, 4)
        bias = [-math.inf if e in forbidden else 0.0 for e in range(experts)]
        _, indices, counts, *_ = self.route(implementation, [[0.5] * experts] * 20, bias, *choice, False, 1.0)
        assert indices.tolist() == [expected] * 20
        assert counts.tolist() == [20 * (e in expected) for e in range(experts)]

    def test_experts_that_a_bias_forbids_are_taken_before_those_of_other_groups(self, implementation):
        bias = [0.0, 0.0, 0.0, -math.inf, 1.0, 1.0]
        _, indices, *_ = self.route(implementation, [[0.5] * 6] * 20, bias, 3, 2, 1, False, 1.0)
        assert indices.tolist() == [[4, 5, 3]] * 20

    @pytest.mark.parametrize("at", range(4))
    def test_nan_is_chosen_so_that_it_shows(self, implementation, at):
        logits = [1.0, 3.0, 2.0, 0.0]
        logits[at] = float("nan")
        weights, _, counts, *_ = self.route(implementation, [logits], [0.0] * 4, 1, 1, 1, False, 1.0)
        assert weights.isnan().all()
        assert counts[at] == 1


def chosen_one_by_one(logits, bias, top_k, n_group, topk_group):
    """Experts of each token by comparing Python numbers: NaN is the largest, of equals the lowest comes first."""

    def rank(value):
        return (1, 0.0) if math.isnan(value) else (0, value)

    def largest(values, count):
        return sorted(values, key=lambda i: rank(values[i]), reverse=True)[:count]  # a stable sort

    size, indices = logits.size(1) // n_group, []
    for token in (logits.sigmoid() + bias).tolist():
        values = dict(enumerate(token))
        if topk_group < n_group:
            two_best = {}
            for group in range(n_group):
                own = {e: values[e] for e in range(group * size, (group + 1) * size)}
                pair = [torch.tensor(own[e]) for e in largest(own, 2)]
                two_best[group] = float(sum(pair[1:], pair[0]))  # in float32
            kept = largest(two_best, topk_group)
            values = {e: value for e, value in values.items() if e // size in kept}
        indices.append(largest(values, top_k))
    return indices


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 37])
@pytest.mark.parametrize("choice", [(2, 1, 1, 1), (8, 2, 1, 1), (8, 3, 4, 2), (21, 4, 3, 2), (40, 5, 8, 3)])
def test_ties_and_nan_in_every_lane(tokens, choice):
    """Few different values: ties in all lanes, each token its own; partly filled vectors of tokens and experts; any group."""
    needs_native()
    experts, top_k, n_group, topk_group = choice
    generator = torch.Generator().manual_seed(experts + tokens)
    values = torch.tensor([0.0, -0.0, 90.0, 90.0, math.nan])  # whose scores, 1/2 and 1, PyTorch has exactly as well
    logits = values[torch.randint(0, 5, (tokens, experts), generator=generator)]
    bias = torch.tensor([0.0, 0.25, -0.5, -math.inf])[torch.randint(0, 4, (experts,), generator=generator)]
    with ops.use("reference"):
        of_reference = ops.moe_route(logits, bias, top_k, n_group, topk_group, False, 1.0).indices
    with ops.use("native"):
        weights, indices, counts, *_ = ops.moe_route(logits, bias, top_k, n_group, topk_group, False, 1.0)
        alone = [ops.moe_route(row[None], bias, top_k, n_group, topk_group, False, 1.0)[1][0] for row in logits]
    assert indices.tolist() == of_reference.tolist() == chosen_one_by_one(logits, bias, top_k, n_group, topk_group)
    assert torch.equal(indices, torch.stack(alone))
    assert torch.equal(counts, torch.bincount(indices.flatten(), minlength=experts))
    torch.testing.assert_close(weights, logits.sigmoid().gather(1, indices), equal_nan=True)


@pytest.mark.parametrize("size", [20.0, 80.0, 88.5, 200.0])
def test_saturated_scores(size):
    """sigmoid near 0 and 1: small ones keep their digits, nothing overflows. (Which of two scores rounded to 1 comes first
    differs from float64, so all experts are chosen and put back in their order.)
    """
    needs_native()

    def scores(logits):
        weights, indices, *_ = ops.moe_route(logits, torch.zeros(17).to(logits), 17, 1, 1, False, 1.0)
        return torch.zeros_like(weights).scatter(1, indices, weights)

    logits = torch.linspace(-size, size, 34).view(2, 17)
    assert_passed(check("moe_route", scores, (logits,), (0,), ["native"]))
    with ops.use("native"):
        found = scores(logits).double()
    torch.testing.assert_close(found, logits.double().sigmoid(), rtol=1e-6, atol=1e-36)


@pytest.mark.parametrize(("scoring_func", "below"), [("sigmoid", 25), ("softmax", 25), ("softmax", 1000)])
def test_small_scores_are_normalised_like_others(scoring_func, below):
    """Scores of 1e-9, of experts that a bias chooses: what keeps their sum from 0 counts only where they are 0."""
    needs_native()
    logits, *others = drawn(moe_route_case("", 37, 9, 3, 1, 1, True, scoring_func))
    logits[:, 5:] -= below
    bias = torch.tensor([-2.0] * 5 + [0.0] * 4)

    def weights(logits):
        return ops.moe_route(logits, bias.to(logits), *others[1:])[0].sort(1).values

    assert_passed(check("moe_route", weights, (logits,), (0,), ["reference", "native"]))


@pytest.mark.parametrize("size", [20.0, 80.0, 200.0])
@pytest.mark.parametrize("implementation", ["reference", "native"])
def test_softmax_of_large_logits(implementation, size):
    """Nothing overflows; what is less than float32 holds is 0."""
    needs_native()
    logits = torch.linspace(-size, size, 34).view(2, 17).requires_grad_()
    with ops.use(implementation):
        weights, indices, *_ = ops.moe_route(logits, torch.zeros(17), 17, 1, 1, False, 1.0, "softmax")
    found = torch.zeros(2, 17).scatter(1, indices, weights)
    torch.testing.assert_close(found.double(), logits.double().softmax(1), rtol=1e-5, atol=1e-37)
    (gradient,) = torch.autograd.grad(weights[:, :3].sum(), logits)
    (expected,) = torch.autograd.grad(logits.double().softmax(1).gather(1, indices[:, :3]).sum(), logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("at", [0, 2, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("implementation", ["reference", "native"])
def test_softmax_of_what_is_no_number(implementation, value, at):
    """NaN and inf make NaN of all scores of their token, -inf is never chosen while others are left."""
    needs_native()
    finite = [0.0, 1.0, 2.0]
    logits = torch.tensor([[*finite[:at], value, *finite[at:]], [3.0, 1.0, 2.0, 0.0]])
    second, best = (i + (i >= at) for i in (1, 2))
    with ops.use(implementation):
        weights, indices, *_ = ops.moe_route(logits, torch.zeros(4), 2, 1, 1, False, 1.0, "softmax")
    assert indices.tolist() == [[best, second] if value == -math.inf else [0, 1], [0, 2]]
    assert weights.isnan().tolist() == [[value != -math.inf] * 2, [False] * 2]


def test_softmax_against_transformers():
    """The router of a model whose scores are softmaxes, top 2 of 8 normalised, without a bias."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    needs_native()
    config = transformers.Qwen3MoeConfig(num_experts=8, num_experts_per_tok=2, norm_topk_prob=True, hidden_size=16)
    router = Qwen3MoeTopKRouter(config)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 16, generator=generator) for n in (37, 8))
    with torch.no_grad():
        router.weight.copy_(weight)
        _, expected, chosen = router(x)
    weights, indices, *_ = ops.route_tokens(x, weight, torch.zeros(8), 2, 1, 1, True, 1.0, "softmax")
    assert torch.equal(indices, chosen)
    torch.testing.assert_close(weights, expected)
