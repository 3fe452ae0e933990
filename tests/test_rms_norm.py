from __future__ import annotations

import pytest
import torch
from operator_cases import OperatorContract, assert_passed, bad, drawn, edges, needs_native

from dsfast import ops
from dsfast.ops.cases import rms_norm_case
from dsfast.ops.checks import check


class TestRmsNorm(OperatorContract):
    cases = (
        *edges(rms_norm_case, "n", d=5),
        *edges(rms_norm_case, "d", n=19),
        rms_norm_case("no tokens", 0, 7),
        rms_norm_case("no residual", 13, 31, residual=False),
        rms_norm_case("a sum over 641 tokens", 641, 17),
        rms_norm_case("a sum over 5003 tokens", 5003, 3),
    )
    tiny = rms_norm_case("tiny", 3, 5)
    summed_over_threads = frozenset({"grad weight"})
    bad_arguments = (
        bad(r"rms_norm: x must have shape \[N, D\], got \[3\]", x=lambda x: x[:, 0]),
        bad(r"rms_norm: weight must have shape \[5\], got \[4\]", weight=lambda w: w[:4]),
        bad(r"rms_norm: residual must have shape \[3, 5\], got \[2, 5\]", residual=lambda r: r[:2]),
        bad("rms_norm: weight must be torch.float32 on cpu, got torch.float64", TypeError, weight=torch.Tensor.double),
        bad("rms_norm: residual must be torch.float32 on cpu, got torch.bf", TypeError, residual=torch.Tensor.bfloat16),
    )

    @staticmethod
    def independent(x, weight, eps, residual=None):
        h = x if residual is None else x + residual
        y = torch.nn.functional.rms_norm(h, weight.shape, weight, eps)
        return y if residual is None else (y, h)


@pytest.mark.parametrize("only", [0, 1], ids=["the norm", "the sum"])
def test_gradient_where_only_one_output_is_used(only):
    needs_native()
    case = rms_norm_case("one output", 7, 19)

    def function(x, weight, eps, residual):
        return ops.rms_norm(x, weight, eps, residual)[only]

    differentiable = (0, 1, 3) if only == 0 else (0, 3)
    assert_passed(check("rms_norm", function, drawn(case), differentiable, ["native"]))


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("uses", [1, 2, 3])
def test_a_stream_read_several_times(uses, residual):
    """All gradients count, those of the stream too; the norms are one memory, and the stream is x where nothing is added."""
    needs_native()
    case = rms_norm_case("read several times", 7, 19, residual)

    def function(x, weight, eps, residual=None):
        return ops.stream_norm(x, weight, eps, residual, uses)

    assert_passed(check("rms_norm", function, drawn(case), case.differentiable, ["reference", "native"]))
    arguments = drawn(case)
    *y, h = function(*arguments)
    assert len(y) == uses
    assert len({tensor.data_ptr() for tensor in y}) == 1
    assert (h.data_ptr() == arguments[0].data_ptr()) != residual


@pytest.mark.parametrize("used", [0, 1, 2, 3])
def test_gradient_where_only_one_reader_of_a_stream_has_one(used):
    needs_native()
    case = rms_norm_case("one reader", 7, 19)

    def function(x, weight, eps, residual):
        return ops.stream_norm(x, weight, eps, residual, 3)[used]

    differentiable = (0, 1, 3) if used < 3 else (0, 3)
    assert_passed(check("rms_norm", function, drawn(case), differentiable, ["native"]))


@pytest.mark.parametrize("uses", [0, 4])
def test_so_many_readers_are_refused(uses):
    x, weight = torch.ones(2, 3), torch.ones(3)
    with pytest.raises(ValueError, match=f"rms_norm: uses must be 1 .. 3, got {uses}"):
        ops.stream_norm(x, weight, 1e-6, uses=uses)


def test_zero_and_tiny_rows_are_held_up_by_eps():
    needs_native()
    x = torch.tensor([[0.0, 0.0], [1e-20, -1e-20], [1e15, 1.0]])
    assert_passed(check("rms_norm", ops.rms_norm, (x, torch.ones(2), 1e-6), (0,), ["reference", "native"]))
