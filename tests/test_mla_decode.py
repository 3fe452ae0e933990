from __future__ import annotations

import pytest
import torch
from operator_cases import EDGES, OperatorContract, assert_passed, bad, drawn, edges, needs_native, run_native

from dsfast import ops
from dsfast.ops.cases import mla_decode_case
from dsfast.ops.checks import check

WIDTHS = {"h": 3, "r": 5, "dn": 4, "dr": 2, "dv": 3}
PAGES = torch.tensor([[2], [0], [1]])
RAGGED = (7, 0, 1, 12, 13)  # an empty cache, one token, a full one, one place left


def case(name: str, lengths=RAGGED, c: int = 13, **widths: int):
    return mla_decode_case(name, lengths, c, **{**WIDTHS, **widths})


class TestMlaDecode(OperatorContract):
    cases = (
        *(case(f"{n} sequences", [1 + i % 13 for i in range(n)]) for n in EDGES),
        *(case(f"{n} cached tokens", (n, n // 2, 0), c=n) for n in EDGES),
        *(build for size in WIDTHS if size != "dr" for build in edges(case, size)),
        *(case(f"rotary width {dr}", dr=dr) for dr in (2, 14, 16, 18, 30, 32, 34)),
        case("no sequence", ()),
        case("nothing cached anywhere", (0, 0, 0)),
        case("a cache without a place", (0, 0), c=0),
        case("no part with position", dr=0),
        case("the 500K model's widths", range(1, 256, 8), c=256, h=4, r=32, dn=32, dr=16, dv=32),
        case("sums over 641 tokens", (641, 513, 512), c=641),
        case("a latent above 512", (9, 3), c=9, r=641),
        *(case(f"pages of {page} places", RAGGED[:4], c=12, page=page) for page in (1, 3, 12)),
    )
    tiny = mla_decode_case("tiny", (2, 0, 3), 3, 2, 3, 3, 2, 2)
    bad_arguments = (
        bad(r"mla_decode: q_nope must have shape \[B, H, Dn\], got \[3, 3\]", q_nope=lambda q: q[:, 0]),
        bad(r"mla_decode: q_rope must have shape \[3, 2, Dr\], got \[2, 2, 2\]", q_rope=lambda q: q[:2]),
        bad(r"mla_decode: latent must have shape \[3, C, R\], got \[2, 3, 3\]", latent=lambda x: x[:2]),
        bad(r"mla_decode: k_rope must have shape \[3, 3, 2\], got \[3, 2, 2\]", k_rope=lambda x: x[:, :2]),
        bad(r"mla_decode: lengths must have shape \[3\], got \[2\]", lengths=lambda n: n[:2]),
        bad(r"mla_decode: up must have shape \[2, 3 \+ Dv, 3\], got \[2, 5, 2\]", up=lambda u: u[..., :2]),
        bad(r"mla_decode: up must have shape \[2, 3 \+ Dv, 3\], got \[2, 2, 3\]", up=lambda u: u[:, :2]),
        bad(
            "mla_decode: latent must be torch.float32 on cpu, got torch.float64", TypeError, latent=torch.Tensor.double
        ),
        bad("mla_decode: lengths must be torch.int64 on cpu, got torch.int32", TypeError, lengths=torch.Tensor.int),
        bad("mla_decode: lengths must lie in 0..3, 1 of 3 do not", lengths=torch.tensor([0, 4, 3])),
        bad("mla_decode: lengths must lie in 0..3, 2 of 3 do not", lengths=torch.tensor([-1, 2**62, 3])),
        bad(r"mla_decode: pages must have shape \[3, P\], got \[2, 1\]", pages=torch.zeros(2, 1, dtype=torch.int64)),
        bad(r"pages must be torch.int32 or torch.int64 on cpu, got torch.float32", TypeError, pages=torch.zeros(3, 1)),
        bad(
            r"pages must be torch.int32 or torch.int64 on cpu, got torch.int64 on m", TypeError, pages=PAGES.to("meta")
        ),
        bad(r"mla_decode: k_rope must have shape \[3, 3, 2\], got \[2, 3, 2\]", k_rope=lambda x: x[:2], pages=PAGES),
        bad(
            "mla_decode: latent must hold a page, got none",
            latent=lambda x: x[:0],
            k_rope=lambda x: x[:0],
            pages=PAGES,
        ),
        # What lies behind a sequence is no page that it needs: the second is empty.
        bad("mla_decode: pages must lie in 0..2, 1 of 3 do not", pages=torch.tensor([[0], [3], [-1]])),
        bad("mla_decode: pages must lie in 0..2, 2 of 3 do not", pages=torch.tensor([[3], [-1], [2**40]])),
        bad("mla_decode: lengths must lie in 0..3, 1 of 3 do not", lengths=torch.tensor([0, 4, 3]), pages=PAGES),
    )

    @staticmethod
    def independent(q_nope, q_rope, latent, k_rope, lengths, up, scale, pages=None):
        """Keys and values rebuilt, each sequence by itself."""
        (b, h, dn), dv = q_nope.shape, up.size(1) - q_nope.size(2)
        if pages is not None:
            latent, k_rope = (
                torch.stack([torch.cat([x[p] for p in row]) for row in pages.tolist()]) for x in (latent, k_rope)
            )
        o = q_nope.new_zeros(b, h, dv)
        for i, n in enumerate(lengths.tolist()):
            if n:
                key_value = torch.tensordot(latent[i, :n], up, ([1], [2])).transpose(0, 1)  # [H, n, Dn + Dv]
                key = torch.cat((key_value[..., :dn], k_rope[i, :n].expand(h, -1, -1)), -1)
                query = torch.cat((q_nope[i], q_rope[i]), -1)[:, None]
                o[i] = torch.nn.functional.scaled_dot_product_attention(query, key, key_value[..., dn:], scale=scale)[
                    :, 0
                ]
        return o

    test_gradcheck_of_reference = None  # for inference: see below for who asks all the same
    test_second_derivative = None


@pytest.mark.parametrize("argument", ["q_nope", "q_rope", "latent", "k_rope", "up"])
def test_a_backward_pass_is_refused_not_silently_zero(argument):
    needs_native()
    arguments = dict(
        zip(("q_nope", "q_rope", "latent", "k_rope", "lengths", "up", "scale"), drawn(case("")), strict=True)
    )
    arguments[argument].requires_grad_()
    with ops.use("native"):
        o = ops.mla_decode(**arguments)
    with pytest.raises(NotImplementedError, match=r"dsfast::mla_decode has no derivative; ops.use\('reference'\) has"):
        o.sum().backward()


@pytest.mark.parametrize("implementation", ["reference", "native"])
def test_what_lies_behind_a_sequence_is_not_read(implementation):
    needs_native()
    arguments, expected = drawn(case("")), drawn(case(""))
    behind = (torch.arange(13) >= torch.tensor(RAGGED)[:, None])[..., None]
    for i in (2, 3):
        arguments[i] = arguments[i].masked_fill(behind, float("nan"))
    with ops.use(implementation):
        assert torch.equal(ops.mla_decode(*arguments), ops.mla_decode(*expected))


@pytest.mark.parametrize("implementation", ["reference", "native"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_pages_behind_a_sequence_are_not_read(implementation, dtype):
    needs_native()
    paged = drawn(case("", RAGGED[:4], c=12, page=3))
    q_nope, q_rope, latent, k_rope, lengths, up, scale, pages = paged
    contiguous = (x[pages].flatten(1, 2) for x in (latent, k_rope))
    with ops.use(implementation):
        expected = ops.mla_decode(q_nope, q_rope, *contiguous, lengths, up, scale)
        unused = torch.arange(4) * 3 >= lengths[:, None]
        pages = pages.masked_fill(unused, -(2**31)).to(dtype)
        assert torch.equal(ops.mla_decode(*paged[:-1], pages), expected)


@pytest.mark.parametrize("implementation", ["reference", "native"])
def test_a_paged_cache_without_a_page_has_no_places(implementation):
    """No sequence holds anything then, and each has zeros."""
    needs_native()
    q_nope, q_rope, latent, k_rope, lengths, up, scale = drawn(case("", (1, 1)))
    nothing = latent[:0], k_rope[:0], torch.zeros_like(lengths), up, scale, torch.zeros(2, 0, dtype=torch.int64)
    with ops.use(implementation):
        o = ops.mla_decode(q_nope, q_rope, *nothing)
    assert torch.equal(o, torch.zeros(2, q_nope.size(1), up.size(1) - q_nope.size(2)))


@pytest.mark.parametrize("implementation", ["reference", "native"])
def test_values_may_have_no_width(implementation):
    needs_native()
    q_nope, q_rope, latent, k_rope, lengths, up, scale = drawn(case("", (1, 3)))
    with ops.use(implementation):
        o = ops.mla_decode(q_nope, q_rope, latent, k_rope, lengths, up[:, : q_nope.size(2)], scale)
    assert o.shape == (2, q_nope.size(1), 0)


@pytest.mark.parametrize("scale", [0.5, 1e3])
def test_one_cached_token_gives_its_value(scale):
    """The softmax over one token is 1 whatever the score, also one far below 0."""
    needs_native()
    one = case("", (1,) * 9)
    *arguments, _ = drawn(one)
    q_nope, _, latent, _, _, up = arguments
    value = torch.einsum("br,hvr->bhv", latent[:, 0], up[:, q_nope.size(2) :])
    torch.testing.assert_close(run_native(one, (*arguments, scale))["output"], value, rtol=1e-6, atol=1e-6)


def test_a_sequence_gives_the_same_bits_alone():
    needs_native()
    lengths = [1 + 5 * i % 13 for i in range(37)]
    together = run_native(case("", lengths), drawn(case("", lengths)))["output"]
    q_nope, q_rope, latent, k_rope, held, up, scale = drawn(case("", lengths))
    for b in range(37):
        alone = slice(b, b + 1)
        with ops.use("native"):
            o = ops.mla_decode(q_nope[alone], q_rope[alone], latent[alone], k_rope[alone], held[alone], up, scale)
        assert torch.equal(o, together[alone])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_small_and_large_scores(scale):
    """Scores of a hundred: exp must neither overflow nor lose the sum, and all weight may fall on one token."""
    needs_native()
    arguments = drawn(case("scores", (37, 20), c=37))
    arguments[-1] = scale
    assert_passed(check("mla_decode", ops.mla_decode, arguments, (), ["native"]))
