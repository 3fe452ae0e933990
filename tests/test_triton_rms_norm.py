"""The Triton kernels of rms_norm; the contract of every operator's is in tests/triton_contract.py."""

from __future__ import annotations

import pytest
import torch
from triton_contract import DEVICE, DTYPES, TritonContract, assert_passed, in_the_interpreter, on_device, poisoned

from dsfast import ops
from dsfast.errors import UserError
from dsfast.ops.cases import rms_norm_case
from dsfast.ops.checks import check


class TestRmsNorm(TritonContract):
    # Tiles hold 2048 elements, rows of 16 columns at least; at D 128 that is 16 rows. The interpreter has 2 programs
    # for the backward pass, more only from 48 rows on.
    cases = (
        rms_norm_case("no tokens", 0, 7),
        rms_norm_case("one token, one column", 1, 1),
        rms_norm_case("one row below a tile", 15, 128),
        rms_norm_case("a tile, without residual", 16, 128, residual=False),
        rms_norm_case("one row above a tile, one column above a power of two", 17, 65),
        rms_norm_case("more tiles than programs", 65, 128),
        rms_norm_case("a row is a tile, several for each program", 5, 1025, residual=False),
        rms_norm_case("one row above many tiles of the narrowest", 129, 3),
    )
    tiny = rms_norm_case("tiny", 3, 5)
    registered = ("rms_norm", "rms_norm_backward")


@on_device
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [7168, 8192])
def test_widest(d, dtype):
    case = rms_norm_case("DeepSeek-V3's width and the widest", 9, d)
    with poisoned():
        arguments = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in case.make_inputs(torch.Generator())]
        assert_passed(check("rms_norm", ops.rms_norm, arguments, (0, 1, 3), ["triton"], dtype))


@on_device
@pytest.mark.parametrize("only", [0, 1], ids=["the norm", "the sum"])
def test_gradient_where_only_one_output_is_used(only):
    case = rms_norm_case("one output", 7, 19)

    def function(x, weight, eps, residual):
        return ops.rms_norm(x, weight, eps, residual)[only]

    arguments = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in case.make_inputs(torch.Generator())]
    assert_passed(check("rms_norm", function, arguments, (0, 1, 3) if only == 0 else (0, 3), ["triton"]))


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("uses", [1, 2, 3])
def test_a_stream_read_several_times(uses, residual, dtype):
    """One kernel adds up the gradients of all readers; some of them rows of a wider tensor."""
    case = rms_norm_case("more tiles than programs", 65, 128, residual)

    def function(x, weight, eps, residual=None):
        *y, h = ops.stream_norm(x, weight, eps, residual, uses)
        return *(torch.cat((y_i.detach(), y_i), 1) if i == 1 else y_i for i, y_i in enumerate(y)), h

    arguments = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in case.make_inputs(torch.Generator())]
    with poisoned():
        assert_passed(check("rms_norm", function, arguments, case.differentiable, ["triton"], dtype))


@on_device
def test_zero_tiny_and_large_rows():
    """eps holds up what has no size; squares are summed in float32 also where float16 would overflow."""
    x = torch.tensor([[0.0, 0.0], [1e-20, -1e-20], [1e15, 1.0]], device=DEVICE)
    weight = torch.ones(2, device=DEVICE)
    assert_passed(check("rms_norm", ops.rms_norm, (x, weight, 1e-6), (0,), ["triton"]))
    large = torch.tensor([[3e4, -3e4]], device=DEVICE)
    assert_passed(check("rms_norm", ops.rms_norm, (large, weight, 1e-6), (0,), ["triton"], torch.float16))


@on_device
def test_half_precision_norm_has_a_float32_reciprocal():
    x, weight = torch.randn(3, 8, device=DEVICE).half(), torch.ones(8, device=DEVICE).half()
    with ops.use("triton", "rms_norm"):
        rstd = torch.ops.dsfast.rms_norm(x, weight, 1e-6, None)[2]
    assert rstd.dtype == torch.float32
    arguments = x, weight, 1e-6, None
    torch.library.opcheck(torch.ops.dsfast.rms_norm, arguments, test_utils=("test_schema", "test_faketensor"))
    torch.testing.assert_close(rstd, x.float().square().mean(1).add(1e-6).rsqrt(), rtol=1e-6, atol=0)


@on_device
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 3, dtype=torch.float64), "take float32, float16, bfloat16, got float64"),
        (torch.ones(2, 8193), "take D from 1 to 8192, got 8193"),
    ],
    ids=["float64", "too wide"],
)
def test_refused_before_launch(x, message):
    x = x.to(DEVICE)
    with ops.use("triton", "rms_norm"), pytest.raises(UserError, match=message):
        ops.rms_norm(x, x[0], 1e-6)


test_in_the_interpreter = in_the_interpreter(__file__)
