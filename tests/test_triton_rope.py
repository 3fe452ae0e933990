"""The Triton kernel of rope; the contract of every operator's is in tests/triton_contract.py."""

from __future__ import annotations

import pytest
import torch
from triton_contract import (
    DEVICE,
    DTYPES,
    TritonContract,
    assert_passed,
    drawn,
    in_the_interpreter,
    on_device,
    poisoned,
)

from dsfast import ops
from dsfast.errors import UserError
from dsfast.ops.cases import rope_case, split_and_turn_case
from dsfast.ops.checks import check


class TestRope(TritonContract):
    # Tiles hold 2048 elements: at width 16 and 4 heads 32 tokens, at width 64 and 40 heads 32 of them for 1 token.
    cases = (
        rope_case("no tokens", 0, 3, 4, 5),
        rope_case("one token", 1, 1, 2, 1),
        rope_case("one token below a tile", 31, 4, 16, 7),
        rope_case("one token above a tile", 33, 4, 16, 7),
        rope_case("more heads than in a tile", 2, 40, 64, 7),
        rope_case("neither heads nor width a power of two", 37, 3, 6, 41),
        rope_case("one head, as the shared key has, one token above a tile", 129, 1, 8, 17),
    )
    tiny = rope_case("tiny", 3, 2, 4, 5)
    registered = ("rope",)


class TestSplitAndTurn(TritonContract):
    # 64 tokens of the queries and 128 of the key in a tile at width 8; the wider of what is turned and what is not counts.
    cases = (
        split_and_turn_case("no tokens", 0, 2, 3, 5, 4, 7),
        split_and_turn_case("one token", 1, 1, 1, 1, 2, 1),
        split_and_turn_case("one token above a tile of queries", 65, 4, 8, 8, 8, 17),
        split_and_turn_case("one token above a tile of keys", 129, 4, 8, 8, 8, 17),
        split_and_turn_case("wider beside what is turned, no power of two", 37, 3, 33, 70, 6, 41),
        split_and_turn_case("more heads than in a tile", 2, 40, 128, 512, 64, 7),
        split_and_turn_case("nothing beside what is turned", 9, 2, 0, 0, 6, 5),
    )
    tiny = split_and_turn_case("tiny", 3, 2, 3, 5, 4, 5)
    registered = ("rope_pair", "rope_pair_backward")


def inputs(case, dtype=torch.float32):
    return [x.to(DEVICE, dtype if x.is_floating_point() else x.dtype) for x in drawn(case)]


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_part_of_a_projection_is_read_in_place(dtype):
    """The rope part of a query: heads 48 apart, rows of 5 heads."""
    x, *tables = inputs(rope_case("", 19, 5, 16, 7), dtype)
    whole = torch.full((19, 5, 48), float("nan"), device=DEVICE, dtype=dtype)
    whole[..., 32:] = x
    with poisoned():
        assert_passed(check("rope", ops.rope, [whole[..., 32:], *tables], (0,), ["triton"], dtype))


@on_device
def test_position_out_of_range_makes_its_token_nan():
    """Also where the table would be passed by far. Nothing else is touched, and the gradient shows it too."""
    x, cos, sin, positions = inputs(rope_case("", 6, 2, 4, 5))
    expected = ops.rope(x, cos, sin, positions)
    positions[1:5] = torch.tensor([-1, 5, 2**62, -(2**63)])
    x.requires_grad_()
    with ops.use("triton", "rope"):
        found = ops.rope(x, cos, sin, positions)
    assert found[1:5].isnan().all()
    assert torch.equal(found[[0, 5]], expected[[0, 5]])
    (gradient,) = torch.autograd.grad(found, x, torch.ones_like(found))
    assert torch.equal(gradient.isnan(), found.isnan())


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "width"), [(1, 2), (3, 6), (5, 16), (40, 64)])
def test_in_place(heads, width, dtype):
    """As `rope`, in a part of wider rows; the rest stays."""
    x, *others = inputs(rope_case("", 37, heads, width, 41), dtype)
    wide = torch.randn(37, heads, width + 5).to(DEVICE, dtype)
    wide[..., 5:] = x
    before = wide.clone()
    with ops.use("triton", "rope"):
        expected = ops.rope(x, *others)
        ops.rope_(wide[..., 5:], *others)
    assert torch.equal(wide[..., 5:], expected)
    assert torch.equal(wide[..., :5], before[..., :5])
    torch.library.opcheck(torch.ops.dsfast.rope_, (x, *others), test_utils=("test_schema", "test_faketensor"))


@on_device
def test_both_in_place_where_no_gradient_is_wanted():
    case = split_and_turn_case("", 37, 3, 32, 32, 16, 41)
    q, kv, *others = inputs(case)
    with ops.use("triton", "rope"):
        expected = ops.split_and_turn(q, kv, *others)
        found = ops.split_and_turn(q.clone(), kv.clone(), *others, in_place=True)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
        assert found[1].stride(1) == 48  # in the rows of q
        before = q.clone(), kv.clone()
        ops.split_and_turn(q.requires_grad_(), kv, *others, in_place=True)
        ops.split_and_turn(q.detach(), kv.requires_grad_(), *others, in_place=True)
    assert torch.equal(q, before[0])
    assert torch.equal(kv, before[1])
    turned = q.detach()[..., 32:], kv.detach()[:, 32:]
    torch.library.opcheck(
        torch.ops.dsfast.rope_pair_, (*turned, *others), test_utils=("test_schema", "test_faketensor")
    )


@on_device
def test_turning_back_gives_the_input():
    x, cos, sin, positions = inputs(rope_case("", 9, 3, 16, 7))
    turned = torch.ops.dsfast.rope(x, cos, sin, positions, False)
    torch.testing.assert_close(torch.ops.dsfast.rope(turned, cos, sin, positions, True), x, rtol=0, atol=1e-6)


@on_device
@pytest.mark.parametrize(
    ("width", "dtype", "message"),
    [
        (4, torch.float64, "take float32, float16, bfloat16, got float64"),
        (4098, torch.float32, "takes Dr up to 4096, got 4098"),
    ],
)
def test_refused_before_launch(width, dtype, message):
    with ops.use("triton", "rope"), pytest.raises(UserError, match=message):
        ops.rope(*inputs(rope_case("", 2, 1, width, 3), dtype))


@on_device
def test_what_does_not_fit_together_is_refused_before_both_are_turned():
    q, kv, cos, sin, positions = inputs(TestSplitAndTurn.tiny)
    with ops.use("triton", "rope"):
        with pytest.raises(ValueError, match=r"rope: positions must have shape \[3\], got \[2\]"):
            ops.split_and_turn(q, kv, cos, sin, positions[1:])
        with pytest.raises(ValueError, match=r"rope: sin must have shape \[5, 2\], got \[4, 2\]"):
            ops.split_and_turn(q, kv, cos, sin[1:], positions)
        with pytest.raises(TypeError, match=r"rope: kv must be torch.float32 on .*, got torch.float64"):
            ops.split_and_turn(q, kv.double(), cos, sin, positions)


@on_device
@pytest.mark.parametrize(("heads", "width"), [(2, 0), (0, 4)])
def test_nothing_to_turn(heads, width):
    q, kv, *tables = inputs(split_and_turn_case("", 3, heads, 3, 5, width, 7))
    q.requires_grad_()
    kv.requires_grad_()
    with poisoned(), ops.use("triton", "rope"):
        outputs = ops.split_and_turn(q, kv, *tables)
        sum(x.sum() for x in outputs).backward()
    with ops.use("reference"):
        expected = ops.split_and_turn(q, kv, *tables)
        wanted = torch.autograd.grad(sum(x.sum() for x in expected), (q, kv))
    for found, right in zip((*outputs, q.grad, kv.grad), (*expected, *wanted), strict=True):
        torch.testing.assert_close(found, right)


test_in_the_interpreter = in_the_interpreter(__file__)
