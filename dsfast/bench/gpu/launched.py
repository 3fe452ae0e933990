"""What an operator launches: each one's passes, called in the kernels' own modules, and their launches written down.

It imports kernels, so it is itself imported where triton is known to be installed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch._subclasses.fake_tensor import FakeTensorMode

from dsfast.bench.gpu.replaced import replaced
from dsfast.triton_kernels import (
    embedding,
    linear_cross_entropy,
    mla_attention,
    mla_decode,
    mla_output,
    mla_project,
    moe_experts,
    moe_route,
    newton_schulz,
    rms_norm,
    rope,
    swiglu_mlp,
)
from dsfast.triton_kernels.launch import Launch
from dsfast.triton_kernels.limits import MULTIPROCESSORS


def _attention(*inputs):
    o, softmax = mla_attention.forward(*inputs)
    mla_attention.backward(o, *inputs, o, softmax)


def _experts(x, weights, indices, gate_up, down):
    slots = moe_route.sort_slots(indices, down.size(0))
    y, gu = moe_experts.forward(x, weights, *slots, gate_up, down, None)
    moe_experts.backward(y, x, weights, gate_up, down, gu, *slots)


def _head(hidden, weight, labels):
    loss, *kept = linear_cross_entropy.forward(hidden, weight, None, labels, -100, True, 0.0)
    linear_cross_entropy.backward(loss, *kept, hidden, weight, None, labels, -100, 0.0)
    linear_cross_entropy.forward(hidden, weight, None, labels, -100, False, 0.0)


def _route(logits, bias, *choice):
    weights, indices, *_ = moe_route.forward(logits, bias, *choice, "sigmoid")
    moe_route.backward(weights, logits, indices, *choice[3:], "sigmoid")


def _norm(x, weight, eps, residual):
    y, h, rstd = rms_norm.forward(x, weight, eps, residual)
    rms_norm.backward([y], h, h, weight, rstd)


def _rope(x, cos, sin, positions):
    rope.rope(rope.rope(x, cos, sin, positions, False), cos, sin, positions, True)


def _newton_schulz(x, shapes):
    newton_schulz.newton_schulz(x, [size for shape in shapes for size in shape], (1.0, 2.0, 3.0), 1e-7, 5)


def _mlp(x, gate_up, down):
    y, gu = swiglu_mlp.forward(x, gate_up, down)
    swiglu_mlp.backward(y, x, gate_up, down, gu)


def _embedding(input_ids, table, projection):
    y, *kept = embedding.forward(input_ids, table, projection, True)
    embedding.backward(y, input_ids, table, projection, *kept, None, None)


def _project(delta, residual, *shared):
    h, *projected = mla_project.forward(delta, residual, *shared)
    mla_project.backward(h, *projected, h, *shared)


def _output(values, o, residual, norm, eps, uses):
    y, h = mla_output.forward(values, o, residual, norm, eps)
    mla_output.backward([y] * uses, h, h, values, o, norm, eps)


PASSES: dict[str, Callable[..., object]] = {
    "attention": _attention, "experts": _experts, "head": _head, "decode": mla_decode.forward, "route": _route, "norm": _norm,
    "rope": _rope, "newton_schulz": _newton_schulz, "mlp": _mlp, "embedding": _embedding, "project": _project,
    "output": _output,
}  # fmt: skip
"""Part -> both passes of its operator, on the inputs of its case."""


def launches(part: str, arguments: Sequence, start: bool) -> list[Launch]:
    """What the passes of `part` launch on `arguments`, in order. Where not `start` no kernel runs, and what one should write
    keeps the values it had."""
    found, run = [], Launch.run

    def note(launch: Launch) -> None:
        if 0 not in launch.grid:
            found.append(launch)
        if start:
            run(launch)

    with replaced(Launch, "run", note):
        PASSES[part](*arguments)
    return found


@contextmanager
def on_an_h100() -> Iterator[None]:
    """Inside, tensors have shapes alone, and launches are those for an H100."""
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        for name, module in list(sys.modules.items()):
            if name.startswith("dsfast.triton_kernels.") and hasattr(module, "multiprocessors"):
                stack.enter_context(replaced(module, "multiprocessors", lambda device: MULTIPROCESSORS))
        yield
