"""For tests of what stands for several operators in a narrow model (dsfast.ops.narrow), in the interpreter or on a GPU: what each
is held to, and a decoder layer of the 500K model's attention with it and without."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from guard import GraphGuard
from operator_cases import RecordCalls
from torch import Tensor
from triton_contract import DEVICE, DRAWS, INTERPRETED, assert_passed, drawn, on_device, on_the_device, poisoned

from dsfast import ops
from dsfast.config import default_config
from dsfast.model.decoder import DecoderLayer
from dsfast.ops.cases import Case
from dsfast.ops.checks import check_draws, evaluate, judge


def half(arguments: list) -> list:
    """On the device, in a dtype that models take."""
    cast = (x.half() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments)
    return on_the_device(list(cast))


def few_programs(monkeypatch):
    """For the sums of the parts: hundreds of them, for a GPU's sake, take the interpreter a second each time."""
    from dsfast.triton_kernels import pieces

    monkeypatch.setattr(pieces, "PROGRAMS", 8)


def assert_passed_where_used(case: Case, places: tuple[int, ...]) -> None:
    """Outputs `places` alone are gone on with: the others have no gradient."""

    def function(*arguments):
        found = case.function(*arguments)
        return tuple(found[place] for place in places)

    function.__signature__ = inspect.signature(case.function)
    draws = [half(drawn(case, seed)) for seed in range(DRAWS)]
    with poisoned():
        assert_passed(check_draws("mla_attention", function, draws, case.differentiable, ["triton"], torch.float16))


def assert_passed_without_eps(case: Case, places: tuple[int, ...]) -> None:
    """`places`: of the arguments that are an eps. What fills up a tile has zeros, whose norm is 0 / 0 then."""
    draws = [half(drawn(case, seed)) for seed in range(DRAWS)]
    for arguments in draws:
        for place in places:
            arguments[place] = 0.0
    with poisoned():
        assert_passed(
            check_draws("mla_attention", case.function, draws, case.differentiable, ["triton"], torch.float16)
        )


def assert_weights_are_summed_in_float32(case: Case, of_tokens: tuple[int, ...], weights: tuple[int, ...]) -> None:
    """The gradients of `weights` where all tokens but the last one, given twice, cancel: beside each half's part of 64 times its
    size that one would be lost in float16. `of_tokens`: the arguments that have a row for each token."""
    arguments = half(drawn(case))
    for place in of_tokens:
        arguments[place] = torch.cat((arguments[place], arguments[place]))
    leaves = [arguments[place].requires_grad_() for place in weights]
    outputs = case.function(*arguments)
    n = len(outputs[0]) // 2
    one = torch.arange(2 * n) == n - 1
    cancelling = torch.where(one, 1.0, torch.cat((torch.full((n,), 64.0), torch.full((n,), -64.0))))
    cancelling[-1] = 0.0
    random = torch.Generator().manual_seed(1)
    drawn_once = [torch.randn(n, *x.shape[1:], generator=random) for x in outputs]

    def gradients(factor: Tensor) -> tuple[Tensor, ...]:
        given = [torch.cat((x, x)) * factor.view(-1, *[1] * (x.dim() - 1)) for x in drawn_once]
        return torch.autograd.grad(outputs, leaves, half(given), retain_graph=True)

    for found, expected in zip(gradients(cancelling), gradients(one), strict=True):
        assert (found - expected).abs().max() <= 4 * torch.finfo(torch.float16).eps * expected.abs().max()


def under_the_guard(case: Case) -> None:
    """Both passes, where it is an error to wait for the host."""
    arguments = half(drawn(case))
    leaves = [x.requires_grad_() if i in case.differentiable else x for i, x in enumerate(arguments)]
    with GraphGuard(), ops.use("triton"):
        outputs = case.function(*leaves)
        torch.autograd.grad(outputs, [leaves[i] for i in case.differentiable], [torch.ones_like(x) for x in outputs])


def assert_same_in_float64(case: Case, composed: Callable[..., tuple[Tensor, ...]]) -> None:
    """The case's function gives what `composed` gives of operators in plain PyTorch."""
    arguments = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in drawn(case)]
    with ops.use("reference"):
        expected = evaluate(composed, arguments, case.differentiable)
    found = evaluate(case.function, arguments, case.differentiable)
    assert found.keys() == expected.keys()
    for quantity, values in expected.items():
        torch.testing.assert_close(found[quantity], values, rtol=1e-13, atol=1e-13)


class TakenContract:
    """`taken(dtype, device=...)` says whether such arguments go through the kernel, which stands for `instead_of`."""

    taken: ClassVar[Callable[..., bool]]
    instead_of: ClassVar[tuple[str, ...]]

    @on_device
    def test_not_where_one_it_stands_for_is_plain_pytorch(self):
        for operator in self.instead_of:
            with ops.use("reference", operator):
                assert not self.taken(), operator

    @pytest.mark.skipif(INTERPRETED, reason="there the CPU's kernels are the GPU's")
    @pytest.mark.filterwarnings("ignore:.*runs in plain PyTorch")
    def test_not_on_a_cpu(self):
        assert not self.taken(torch.bfloat16, device="cpu")
        assert not self.taken(torch.float32, device="cpu")


def layer_of(dtype: torch.dtype, **changes) -> DecoderLayer:
    """A dense layer of the 500K model's attention, whose weights are the same numbers in every dtype."""
    config = default_config("cpu").replace(**{"model.first_k_dense_replace": 1, **changes}).model
    generator = torch.Generator().manual_seed(0)
    layer = DecoderLayer(config, 0)
    with torch.no_grad():
        for parameter in layer.parameters():
            scale = 0.2 if parameter.dim() == 1 else parameter.size(-1) ** -0.5
            parameter.copy_((parameter.dim() == 1) + scale * torch.randn(parameter.shape, generator=generator))
    return layer.half().to(DEVICE, dtype)


def layer_quantities(dtype: torch.dtype, seed: int, **changes) -> dict[str, Tensor]:
    """Outputs of a layer for two documents, and the gradients of its input and weights."""
    layer = layer_of(dtype, **changes)
    generator = torch.Generator().manual_seed(seed)
    angles = torch.rand(40, 8, generator=generator) * 6
    rope = tuple(x.half().to(DEVICE, dtype) for x in (angles.cos(), angles.sin()))
    positions = torch.cat((torch.arange(30), torch.arange(40))).to(DEVICE)
    cu_seqlens = torch.tensor([0, 30, 70], dtype=torch.int32, device=DEVICE)
    stream = [torch.randn(70, 128, generator=generator).half().to(DEVICE, dtype).requires_grad_() for _ in range(2)]

    outputs = layer(*stream, rope, positions, cu_seqlens)
    weights = [torch.randint(-8, 9, x.shape, generator=generator).to(x) / 8 for x in outputs]
    names, parameters = zip(*layer.named_parameters(), strict=True)
    gradients = torch.autograd.grad(outputs, [*stream, *parameters], weights)
    return dict(zip(("delta", "h", "grad delta", "grad residual", *names), (*outputs, *gradients), strict=True))


def layer_against_apart(at_once: str, monkeypatch) -> set[str]:
    """The operators that a layer calls, after its outputs and gradients were held to at most twice the error, in float16, that
    they have where `ops.<at_once>` says no."""

    def drawn_twice(dtype):
        found = [layer_quantities(dtype, seed) for seed in range(2)]
        return {name: torch.stack([values[name].detach() for values in found]) for name in found[0]}

    with ops.use("reference"):
        expected = drawn_twice(torch.float64)
    with RecordCalls() as record:
        found = drawn_twice(torch.float16)
    monkeypatch.setattr(ops, at_once, lambda *_: False)
    apart = drawn_twice(torch.float16)
    judged = {name: judge(expected[name], apart[name], found[name], torch.float16, "triton") for name in expected}
    assert not {name: row for name, row in judged.items() if not row["passed"]}
    return {str(operator).split(".")[1] for operator in record.calls}
