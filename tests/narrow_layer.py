"""A decoder layer of the 500K model's attention on a GPU, with what stands for several operators and without. For tests of those,
in the interpreter or on a GPU."""

from __future__ import annotations

import torch
from operator_cases import RecordCalls
from torch import Tensor
from triton_contract import DEVICE, on_the_device

from dsfast import ops
from dsfast.config import default_config
from dsfast.model.decoder import DecoderLayer
from dsfast.ops.checks import judge


def half(arguments: list) -> list:
    """On the device, in a dtype that models take."""
    cast = (x.half() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments)
    return on_the_device(list(cast))


def few_programs(monkeypatch):
    """For the sums of the parts: hundreds of them, for a GPU's sake, take the interpreter a second each time."""
    from dsfast.triton_kernels import pieces

    monkeypatch.setattr(pieces, "PROGRAMS", 8)


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
