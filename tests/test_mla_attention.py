from __future__ import annotations

import itertools

import pytest
import torch
from operator_cases import (
    DRAWS,
    EDGES,
    OperatorContract,
    assert_passed,
    attention_by_heads,
    bad,
    drawn,
    edges,
    needs_native,
    run_native,
)

from dsfast import ops
from dsfast.ops.cases import mla_attention_case
from dsfast.ops.checks import check_draws

NAN = float("nan")


class TestMlaAttention(OperatorContract):
    cases = (
        *(mla_attention_case(f"one document of {n}", (n,), h=2, dn=3, dr=2, dv=5) for n in EDGES),
        *edges(mla_attention_case, "dn", lengths=(19,), h=2, dr=2, dv=3),
        *edges(mla_attention_case, "dv", lengths=(19,), h=2, dn=2, dr=3),
        mla_attention_case("no document", (), 2, 3, 2, 5),
        mla_attention_case("only empty documents", (0, 0), 2, 3, 2, 5),
        mla_attention_case("a document of one token before one of 13", (1, 13), 2, 3, 2, 5),
        mla_attention_case("empty documents at both ends and between", (0, 13, 0, 0, 35, 0), 3, 5, 2, 7),
        mla_attention_case("boundaries inside every block", (31, 1, 33, 15, 17), 2, 7, 4, 11),
        mla_attention_case("the 500K model's widths", (67, 61), 4, 32, 16, 32),
        mla_attention_case("several blocks of queries and of keys", (149, 203), 2, 8, 4, 8),
        mla_attention_case("one head", (41,), 1, 8, 8, 8),
        mla_attention_case("a value wider than the key", (23,), 2, 2, 2, 37),
        mla_attention_case("one head of keys and values for three of queries", (19, 0, 51), 6, 7, 4, 5, 2),
        mla_attention_case("one head of keys and values for all", (35, 9), 4, 8, 6, 16, 1),
        mla_attention_case("a rope key expanded to the heads", (35, 0, 9), 3, 5, 4, 7, function=attention_by_heads),
    )
    tiny = mla_attention_case("tiny", (2, 0, 3), 2, 3, 2, 3)
    not_expanded = (3,)  # k_rope
    bad_arguments = (
        bad(r"mla_attention: q_nope must have shape \[N, H, Dn\], got \[5, 3\]", q_nope=lambda q: q[:, 0]),
        bad(r"mla_attention: q_rope must have shape \[5, 2, Dr\], got \[4, 2, 2\]", q_rope=lambda q: q[:4]),
        bad(r"mla_attention: k_nope must have shape \[5, Hk, 3\], got \[5, 2, 2\]", k_nope=lambda k: k[..., :2]),
        bad(
            "mla_attention: 2 heads of queries cannot be shared out among 0 of keys and values",
            k_nope=lambda k: k[:, :0],
            v=lambda v: v[:, :0],
        ),
        bad(
            "mla_attention: 2 heads of queries cannot be shared out among 4 of keys and values",
            k_nope=lambda k: k.repeat(1, 2, 1),
            v=lambda v: v.repeat(1, 2, 1),
        ),
        bad(r"mla_attention: k_rope must have shape \[5, 2\], got \[5, 1\]", k_rope=lambda k: k[:, :1]),
        bad(
            r"mla_attention: k_rope must have shape \[5, 2, 2\], got \[5, 1, 2\]",
            k_rope=lambda k: k[:, None],
        ),
        bad(
            r"mla_attention: k_rope \[N, H, Dr\] must be one for all heads, expanded: their stride 0, got 2",
            k_rope=lambda k: k[:, None].repeat(1, 2, 1),
        ),
        bad(r"mla_attention: v must have shape \[5, 2, Dv\], got \[5, 1, 3\]", v=lambda v: v[:, :1]),
        bad(r"mla_attention: cu_seqlens must have shape \[S \+ 1\], got \[1, 4\]", cu_seqlens=lambda c: c[None]),
        bad(
            "mla_attention: cu_seqlens must be torch.int32 on cpu, got torch.int64",
            TypeError,
            cu_seqlens=lambda c: c.long(),
        ),
        bad("mla_attention: v must be torch.float32 on cpu, got torch.float64", TypeError, v=torch.Tensor.double),
        *(
            bad(
                rf"mla_attention: cu_seqlens must rise from 0 to 5, got \[{', '.join(map(str, boundaries))}\]",
                cu_seqlens=torch.tensor(boundaries, dtype=torch.int32),
            )
            for boundaries in ([], [0], [0, 4], [1, 5], [0, 6], [0, 3, 2, 5], [0, 2**31 - 1, 5], [0, -1, 5])
        ),
        bad(  # the first twenty are shown
            rf"cu_seqlens must rise from 0 to 5, got \[{', '.join(map(str, range(20)))}\]$",
            cu_seqlens=torch.arange(10**5, dtype=torch.int32),
        ),
    )

    @staticmethod
    def independent(q_nope, q_rope, k_nope, k_rope, v, cu_seqlens, scale):
        n, h = q_nope.shape[:2]
        k_nope, v = (x[:, torch.arange(h) * x.size(1) // h] for x in (k_nope, v))
        document = torch.arange(n)[:, None].ge(cu_seqlens[1:]).sum(1)
        seen = (document[:, None] == document) & torch.ones(n, n, dtype=torch.bool).tril()
        query = torch.cat((q_nope, q_rope), -1)
        key = torch.cat((k_nope, k_rope[:, None].expand(n, h, -1)), -1)
        heads_first = (x.transpose(0, 1) for x in (query, key, v))
        o = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=seen, scale=scale)
        return o.transpose(0, 1)

    @pytest.mark.parametrize("argument", range(5), ids=["q_nope", "q_rope", "k_nope", "k_rope", "v"])
    def test_nan_is_not_swallowed(self, argument):
        """Eager spreads a NaN to tokens it must not reach (0 times NaN behind the mask), so the maths is what counts here:
        from a query to its own output, from a key or value to every later one of its document, and to no other document.
        """
        needs_native()
        case = mla_attention_case("three documents", (19, 40, 21), 2, 3, 2, 4)
        token, later = 30, slice(30, 59)
        arguments = drawn(case)
        arguments[argument][token] = NAN
        found = run_native(case, arguments)
        reached = slice(token, token + 1) if argument < 2 else later
        assert found["output"][reached].isnan().all()
        # Every score of the token is NaN, so are the gradients of all that was multiplied with it.
        assert found["grad q_nope"][reached].isnan().all() or argument == 4
        for quantity in found.values():
            assert quantity[:19].isfinite().all()
            assert quantity[59:].isfinite().all()


@pytest.mark.parametrize("implementation", ["reference", "native"])
def test_a_rope_key_of_the_only_head_may_lie_anywhere(implementation):
    """It is one for all heads whatever the distance to a second would be."""
    needs_native()
    q_nope, q_rope, k_nope, k_rope, *others = drawn(mla_attention_case("", (5, 3), 1, 4, 2, 3))
    with ops.use(implementation):
        expected = ops.mla_attention(q_nope, q_rope, k_nope, k_rope, *others)
        assert torch.equal(ops.mla_attention(q_nope, q_rope, k_nope, k_rope[:, None].clone(), *others), expected)


def test_documents_of_one_token_hand_on_their_value():
    """The softmax over one key is 1 whatever the score: the output is the value, queries and keys have no gradient."""
    needs_native()
    arguments = drawn(mla_attention_case("", (1,) * 17, 2, 3, 2, 5))
    found = run_native(mla_attention_case("", (1,) * 17, 2, 3, 2, 5), arguments)
    assert torch.equal(found["output"], arguments[4])
    assert not any(found[f"grad {name}"].any() for name in ("q_nope", "q_rope", "k_nope", "k_rope"))


def test_scores_all_far_below_0():
    needs_native()
    low, high, none = torch.full((5, 1, 1), -1e3), torch.full((5, 1, 1), 1e3), torch.zeros(5, 1, 0)
    value = torch.arange(5.0)[:, None, None]
    with ops.use("native", "mla_attention"):
        mean = ops.mla_attention(low, none, high, none[:, 0], value, torch.tensor([0, 5], dtype=torch.int32), 1.0)
    assert mean.flatten().tolist() == [0, 0.5, 1, 1.5, 2]


def test_heads_and_documents_do_not_mix():
    """Each document by itself, each head by itself: the same bits."""
    needs_native()
    lengths = (5, 33, 1, 18)
    case = mla_attention_case("together", lengths, 3, 5, 4, 7)
    q_nope, q_rope, k_nope, k_rope, v, _, scale = drawn(case)
    together = run_native(case, drawn(case), ())["output"]
    ends = list(itertools.accumulate(lengths))
    for begin, end in zip([0, *ends], ends, strict=False):
        for head in range(3):
            at = (slice(begin, end), slice(head, head + 1))
            parts = (q_nope[at], q_rope[at], k_nope[at], k_rope[begin:end], v[at])
            boundaries = torch.tensor([0, end - begin], dtype=torch.int32)
            with ops.use("native"):
                assert torch.equal(ops.mla_attention(*parts, boundaries, scale), together[at])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0])
def test_small_and_large_scores(scale):
    """Scores of a hundred: exp must neither overflow nor lose the sum, and all weight may fall on one key."""
    needs_native()
    case = mla_attention_case("scores", (37,), 2, 5, 4, 3)
    draws = [[*drawn(case, seed)[:-1], scale] for seed in range(DRAWS)]
    assert_passed(check_draws("mla_attention", ops.mla_attention, draws, (0, 1, 2, 3, 4), ["native"]))
