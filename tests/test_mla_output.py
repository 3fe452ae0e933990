"""What stands behind a layer's attention, at once, against the operators it stands for: in Triton's interpreter and on a GPU. The
contract of every operator's kernels is in tests/triton_contract.py."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from narrow_layer import (
    TakenContract,
    assert_passed_where_used,
    assert_passed_without_eps,
    assert_same_in_float64,
    assert_weights_are_summed_in_float32,
    few_programs,
    half,
    layer_against_apart,
    layer_of,
    under_the_guard,
)
from operator_cases import RecordCalls
from torch import Tensor
from triton_contract import (
    DEVICE,
    INTERPRETED,
    TritonContract,
    assert_bitwise_equal,
    drawn,
    in_the_interpreter,
    on_device,
    poisoned,
)

from dsfast import ops
from dsfast.config import default_config
from dsfast.model.cache import LatentCache
from dsfast.ops.cases import mla_output_case
from dsfast.ops.checks import evaluate
from dsfast.ops.mla_output import INSTEAD_OF, ForEachUse, mla_output_reference


def output(values, o, residual, norm, eps, uses) -> tuple[Tensor, ...]:
    """`ops.mla_output`, in the interpreter by the kernel in float32 as well: there errors have no rounding to hide in."""
    own = ops.dispatch.choose("mla_attention", values) == "triton" and (INTERPRETED or values.itemsize == 2)
    return (ForEachUse.apply if own else mla_output_reference)(values, o, residual, norm, eps, uses)


output_case = partial(mla_output_case, function=output)
sums_in_few_programs = pytest.fixture(autouse=True)(few_programs)


class TestMlaOutput(TritonContract):
    # A tile holds 64 tokens.
    cases = (
        output_case("no tokens", 0, 16, 16),
        output_case("one token", 1, 16, 16),
        output_case("one token below a tile, odd multiples of 16", 63, 112, 80, 2),
        output_case("a tile, three uses", 64, 48, 128, 3),
        output_case("one above a tile: the 500K model", 65, 128, 128, 3),
        output_case("several tiles, no width a power of two", 259, 33, 55, 2),
    )
    tiny = output_case("tiny", 3, 7, 9, 3)
    registered = ("mla_output", "mla_output_backward")

    def tiny_arguments(self) -> list:
        return half(drawn(self.tiny))


@pytest.mark.skipif(INTERPRETED, reason="the reference is held to the CPU's operators")
@pytest.mark.parametrize("uses", [1, 2, 3])
def test_reference_is_the_composition_of_the_operators(uses):
    """As dsfast/model/attention.py has it, each of them in plain PyTorch, in float64."""
    case = output_case("", 13, 24, 18, uses, function=ops.mla_output)

    def composed(values, o, residual, norm, eps, uses) -> tuple[Tensor, ...]:
        return ops.stream_norm(values @ o.T, norm, eps, residual, uses)

    assert_same_in_float64(case, composed)


@on_device
def test_public_function_calls_the_kernel():
    case = output_case("", 9, 16, 32, 2, function=ops.mla_output)
    arguments = half(drawn(case))
    with RecordCalls() as record, poisoned():
        found = evaluate(case.function, arguments, case.differentiable)
    assert {str(operator) for operator in record.calls} == {
        "dsfast.mla_output.default",
        "dsfast.mla_output_backward.default",
    }
    assert_bitwise_equal(found, evaluate(output, arguments, case.differentiable))


@on_device
def test_all_uses_are_one_memory():
    *y, h = output(*half(drawn(output_case("", 9, 16, 32, 3))))
    assert len({x.data_ptr() for x in y}) == 1
    assert h.data_ptr() != y[0].data_ptr()


@on_device
@pytest.mark.parametrize("used", [(0,), (2,), (3,), (0, 1), (1, 3), (0, 1, 2)], ids=str)
def test_gradients_where_some_outputs_are_not_used(used):
    """Outputs 0 to 2 are y, 3 is h."""
    case = output_case("", 70, 16, 32, 3)
    assert_passed_where_used(case, used)


@on_device
def test_what_fills_up_a_tile_does_not_show_where_eps_is_zero():
    assert_passed_without_eps(output_case("", 5, 16, 16), (4,))


@on_device
def test_gradients_of_weights_are_summed_in_float32():
    """A part of the gradient of o is the sum over 256 tokens."""
    assert_weights_are_summed_in_float32(output_case("", 256, 16, 16), (0, 2), (1, 3))


@on_device
def test_nothing_waits_for_the_host():
    under_the_guard(output_case("", 70, 16, 16, 2))


@on_device
def test_second_derivatives_are_refused():
    case = output_case("", 5, 16, 16)
    arguments = half(drawn(case))
    arguments[0].requires_grad_()
    (gradient,) = torch.autograd.grad(output(*arguments)[0].sum(), arguments[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="dsfast::mla_output has first derivatives only"):
        gradient.sum().backward()


def taken(dtype: torch.dtype = torch.float16, d=128, c=128, device=DEVICE) -> bool:
    empty = torch.empty(3, c, dtype=dtype, device=device)
    return ops.outputs_at_once(empty, empty.new_empty(d, c))


@on_device
def test_what_is_taken():
    assert taken()
    assert taken(torch.bfloat16)
    assert taken(d=97, c=3)
    assert not taken(torch.float32)
    assert not taken(d=129)
    assert not taken(c=129)


class TestWhereItIsTaken(TakenContract):
    taken = staticmethod(taken)
    instead_of = INSTEAD_OF


@pytest.mark.parametrize(
    ("position", "change", "kind", "message"),
    [
        (0, lambda x: x[0], ValueError, r"mla_output: values must have shape \[N, H Dv\], got \[32\]"),
        (1, lambda x: x[:, 1:], ValueError, r"mla_output: o must have shape \[D, 32\], got \[16, 31\]"),
        (1, lambda x: x.double(), TypeError, r"mla_output: o must be torch.float32 on"),
        (2, lambda x: x.double(), TypeError, r"mla_output: residual must be torch.float32 on"),
        (3, lambda x: x.double(), TypeError, r"mla_output: norm must be torch.float32 on"),
        (2, lambda x: x[1:], ValueError, r"mla_output: residual must have shape \[3, 16\], got \[2, 16\]"),
        (3, lambda x: x[1:], ValueError, r"mla_output: norm must have shape \[16\], got \[15\]"),
        (5, lambda _: 0, ValueError, r"mla_output: uses must be 1 .. 3, got 0"),
        (5, lambda _: 4, ValueError, r"mla_output: uses must be 1 .. 3, got 4"),
    ],
)
def test_bad_arguments(position, change, kind, message):
    arguments = drawn(output_case("", 3, 16, 32))
    arguments[position] = change(arguments[position])
    with ops.use("reference"), pytest.raises(kind, match=message):
        ops.mla_output(*arguments)


@on_device
def test_a_layer_against_the_layer_operator_by_operator(monkeypatch):
    called = layer_against_apart("outputs_at_once", monkeypatch)
    assert {"mla_output", "mla_output_backward"} <= called
    assert "rms_norm" not in called


@on_device
def test_decoding_goes_operator_by_operator():
    """A step of it has a cache, and its launches are counted in tests/test_device_decode.py."""
    layer, half_on_device = layer_of(torch.float16), {"device": DEVICE, "dtype": torch.float16}
    values, residual = torch.randn(2, 3, 128).to(**half_on_device)
    cache = LatentCache(default_config("cpu").model, 1, 3, 5, **half_on_device)
    with RecordCalls() as record, torch.no_grad():
        layer._project_and_norm(values, residual, cache)
    assert {str(operator) for operator in record.calls} == {"dsfast.rms_norm.default"}


test_in_the_interpreter = in_the_interpreter(__file__)
