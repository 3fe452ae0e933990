from __future__ import annotations

import pytest
import torch
from operator_cases import OperatorContract, bad, drawn, edges, needs_native, run_native

from dsfast import ops
from dsfast.ops.cases import rope_case, split_and_turn_case


class TestRope(OperatorContract):
    cases = (
        *edges(rope_case, "n", h=2, dr=6, p=11),
        *(rope_case(f"width {dr}", 5, 3, dr, 7) for dr in (2, 14, 16, 18, 30, 32, 34, 64)),
        rope_case("no tokens", 0, 3, 4, 5),
        rope_case("one head, as the shared key has", 17, 1, 16, 17),
        rope_case("one position", 9, 2, 4, 1),
    )
    tiny = rope_case("tiny", 3, 2, 4, 5)
    linear = True
    bad_arguments = (
        bad(r"rope: x must have shape \[N, H, Dr\], got \[3, 4\]", x=lambda x: x[:, 0]),
        bad("rope: the last dimension of x holds pairs and must be even, got 3", x=lambda x: x[..., :3]),
        bad(r"rope: cos must have shape \[P, 2\], got \[5, 1\]", cos=lambda c: c[:, :1]),
        bad(r"rope: sin must have shape \[5, 2\], got \[4, 2\]", sin=lambda s: s[:4]),
        bad(r"rope: positions must have shape \[3\], got \[2\]", positions=lambda p: p[:2]),
        bad("rope: positions must be torch.int64 on cpu, got torch.int32", TypeError, positions=torch.Tensor.int),
        bad("rope: sin must be torch.float32 on cpu, got torch.float64", TypeError, sin=torch.Tensor.double),
        bad(r"rope: positions must lie in 0..4, 1 of 3 do not", positions=torch.tensor([0, 5, 1])),
        bad(r"rope: positions must lie in 0..4, 2 of 3 do not", positions=torch.tensor([-1, 0, -(2**62)])),
    )

    @staticmethod
    def independent(x, cos, sin, positions):
        turns = torch.complex(cos[positions], sin[positions])[:, None]
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)


class TestSplitAndTurn(OperatorContract):
    cases = (
        split_and_turn_case("no tokens", 0, 2, 3, 5, 4, 7),
        split_and_turn_case("the 500K model", 37, 4, 32, 32, 16, 41),
        split_and_turn_case("nothing beside what is turned", 9, 2, 0, 0, 6, 5),
    )
    tiny = split_and_turn_case("tiny", 3, 2, 3, 5, 4, 5)
    linear = True
    bad_arguments = (
        bad(r"rope: q must have shape \[N, H, Dn \+ Dr\], got \[3, 7\]", q=lambda q: q[:, 0]),
        bad(r"rope: kv must have shape \[3, R \+ Dr\], got \[2, 9\]", kv=lambda kv: kv[:2]),
        bad("rope: q must have rows of at least Dr = 4 columns, got 3", q=lambda q: q[..., :3]),
        bad("rope: kv must have rows of at least Dr = 4 columns, got 2", kv=lambda kv: kv[:, :2]),
        bad(r"rope: sin must have shape \[5, 2\], got \[4, 2\]", sin=lambda s: s[:4]),
        bad(r"rope: positions must lie in 0..4, 1 of 3 do not", positions=torch.tensor([0, 5, 1])),
    )

    @staticmethod
    def independent(q, kv, *tables):
        dr = 2 * tables[0].size(1)
        turned = [TestRope.independent(x[..., x.size(-1) - dr :].clone(), *tables) for x in (q, kv[:, None])]
        return q[..., : q.size(-1) - dr], turned[0], kv[:, : kv.size(1) - dr], turned[1].squeeze(1)


@pytest.mark.parametrize("width", [6, 16])
def test_score_depends_on_the_distance_alone(width):
    """What rotary embedding is for: q at p + 5 and k at p have one product, wherever p is."""
    q, cos, sin, _ = drawn(rope_case("same query everywhere", 1, 1, width, 64))
    k = drawn(rope_case("same key everywhere", 1, 1, width, 64), seed=1)[0]
    positions = torch.arange(50)
    turned = [
        run_native(rope_case("", 50, 1, width, 64), (x.expand(50, 1, width), cos, sin, p), ())["output"]
        for x, p in ((q, positions + 5), (k, positions))
    ]
    scores = (turned[0] * turned[1]).sum((1, 2))
    torch.testing.assert_close(scores, scores[:1].expand(50), rtol=0, atol=4e-6)


@pytest.mark.parametrize("implementation", ["reference", "native"])
class TestInPlace:
    def turned(self, implementation, x, *others):
        if implementation == "native":
            needs_native()
        with ops.use(implementation):
            return ops.rope_(x, *others)

    @pytest.mark.parametrize("width", [2, 6, 16, 64])
    def test_the_same_in_its_own_memory(self, implementation, width):
        """A part of wider rows, as the model has it; the rest stays."""
        x, *others = drawn(rope_case("", 37, 3, width, 41))
        wide = torch.randn(37, 3, width + 5)
        wide[..., 5:] = x
        before = wide.clone()
        view = wide[..., 5:]
        with ops.use(implementation):
            expected = ops.rope(x, *others)
        assert self.turned(implementation, view, *others) is view
        assert torch.equal(wide[..., 5:], expected)
        assert torch.equal(wide[..., :5], before[..., :5])

    def test_a_position_out_of_range_changes_nothing(self, implementation):
        x, cos, sin, positions = drawn(rope_case("", 3, 2, 4, 5))
        positions[1] = 5
        before = x.clone()
        with pytest.raises(ValueError, match=r"rope: positions must lie in 0..4, 1 of 3 do not"):
            self.turned(implementation, x, cos, sin, positions)
        assert torch.equal(x, before)

    def test_what_is_not_legal(self, implementation):
        x, *others = drawn(rope_case("", 3, 2, 4, 5))
        for shared in (x[:, :1].expand(3, 2, 4), x[:1].expand(3, 2, 4), x.repeat(1, 1, 2)[..., ::2]):
            with pytest.raises(
                ValueError, match=r"rope_: x must have memory of its own and pairs side by side, got strides"
            ):
                self.turned(implementation, shared, *others)
        with pytest.raises(ValueError, match="rope_: a gradient of x is wanted; use rope"):
            self.turned(implementation, x.requires_grad_(), *others)
        with torch.no_grad():
            self.turned(implementation, x, *others)

    def test_one_token_shares_its_memory_with_no_other(self, implementation):
        """Its stride may be anything, also the 0 of the expanded ones that it is taken from."""
        x, cos, sin, positions = drawn(rope_case("", 1, 2, 4, 5))
        one = x.clone().expand(3, 2, 4)[:1]
        assert one.stride(0) == 0
        with ops.use(implementation):
            expected = ops.rope(x, cos, sin, positions)
        assert torch.equal(self.turned(implementation, one, cos, sin, positions), expected)

    def test_split_and_turn_where_no_gradient_is_wanted(self, implementation):
        case = split_and_turn_case("", 37, 4, 32, 32, 16, 41)
        q, kv, *others = drawn(case)
        with ops.use(implementation):
            expected = ops.split_and_turn(q, kv, *others)
            found = ops.split_and_turn(q, kv, *others, in_place=True)
            assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
            assert torch.equal(q[..., 32:], expected[1])
            q, kv, *others = drawn(case)
            before = q.clone()
            found = ops.split_and_turn(q.requires_grad_(), kv, *others, in_place=True)
        assert torch.equal(q, before)
        assert torch.equal(found[1], expected[1])

    def test_split_and_turn_where_the_gradient_of_the_key_alone_is_wanted(self, implementation):
        q, kv, *others = drawn(split_and_turn_case("", 5, 2, 3, 5, 4, 7))
        before = kv.clone()
        with ops.use(implementation):
            *_, k_rope = ops.split_and_turn(q, kv.requires_grad_(), *others, in_place=True)
        k_rope.square().sum().backward()
        assert torch.equal(kv, before)
        # A rotation keeps lengths: half the gradient is the key itself.
        torch.testing.assert_close(kv.grad / 2, torch.cat([torch.zeros(5, 5), before[:, 5:]], 1))


def test_autograd_sees_what_is_turned_in_place():
    leaf, (_, *rest) = torch.randn(4, 2, 6, requires_grad=True), drawn(rope_case("", 4, 2, 6, 5))
    x = leaf * 1
    z = (x * x).sum()
    with torch.no_grad():
        ops.rope_(x, *rest)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward()
