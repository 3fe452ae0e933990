"""`bench gpu` checks the kernels that it times: compiled of the same source for the same constants, not others of its kind."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from dsfast.triton_kernels import (
    ahead,
    embedding,
    launch,
    linear_cross_entropy,
    mla_attention,
    mla_decode,
    moe_experts,
    moe_route,
    newton_schulz,
    rms_norm,
    rope,
    swiglu_mlp,
)

from dsfast.bench.cases import UPDATES
from dsfast.bench.gpu import cases
from dsfast.ops.triton import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels have no compiled kinds")
SUMS = {"sum_kernel", "combine_kernel", "scan_kernel", "scatter_kernel"}
"""Kernels whose tiles follow from how many parts or places there are: checked in other cases and in the tests."""


def attention(*inputs):
    o, softmax = mla_attention.forward(*inputs)
    mla_attention.backward(o, *inputs, o, softmax)


def experts(x, weights, indices, gate_up, down):
    y, *kept = moe_experts.forward(x, weights, indices, gate_up, down)
    moe_experts.backward(y, x, weights, gate_up, down, *kept)


def head(hidden, weight, labels):
    loss, *kept = linear_cross_entropy.forward(hidden, weight, labels, -100, True, 0.0)
    linear_cross_entropy.backward(loss, *kept, hidden, weight, labels, -100)
    linear_cross_entropy.forward(hidden, weight, labels, -100, False, 0.0)


def route(logits, bias, *choice):
    weights, indices, _ = moe_route.forward(logits, bias, *choice)
    moe_route.backward(weights, logits, indices, *choice[3:])
    moe_route.sort_slots(indices, logits.size(1))


def norm(x, weight, eps, residual):
    y, h, rstd = rms_norm.forward(x, weight, eps, residual)
    rms_norm.backward([y], h, h, weight, rstd)


def turned(x, cos, sin, positions):
    rope.rope(rope.rope(x, cos, sin, positions, False), cos, sin, positions, True)


def orthogonal(x, shapes):
    newton_schulz.newton_schulz(x, [size for shape in shapes for size in shape], (1.0, 2.0, 3.0), 1e-7, 5)


def mlp(x, gate_up, down):
    y, gu = swiglu_mlp.forward(x, gate_up, down)
    swiglu_mlp.backward(y, x, gate_up, down, gu)


def embedded(input_ids, table, projection):
    embedding.backward(embedding.forward(input_ids, table, projection), input_ids, table, projection)


PASSES = {
    "attention": attention, "experts": experts, "head": head, "decode": mla_decode.forward, "route": route, "norm": norm,
    "rope": turned, "newton_schulz": orthogonal, "mlp": mlp, "embedding": embedded,
}  # fmt: skip


@pytest.fixture
def kinds(monkeypatch):
    """What a part's passes would launch on an H100 at a case's inputs: kernel -> its signatures, constants and options."""
    found = {}

    def run(self):
        assert len(self.grid) == 1 or max(self.grid[1:]) < 2**16
        source = ahead._source(self)
        kind = (str(source.signature), str(source.constants), str(source.attrs), str(self.options))
        found.setdefault(self.kernel.__name__, set()).add(kind)

    monkeypatch.setattr(launch.Launch, "run", run)
    for module in (rms_norm, mla_decode):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 132)

    def launched(part: str, case, dtype: torch.dtype) -> dict[str, set]:
        found.clear()
        with FakeTensorMode(allow_non_fake_inputs=True):
            PASSES[part](*(cases._cast(x, dtype) for x in case.make_inputs(torch.Generator())))
        return dict(found)

    return launched


@pytest.mark.parametrize(("part", "name"), [(part, name) for part in PASSES for name in cases.SIZES[part]])
def test_what_is_timed_is_what_was_checked(part, name, kinds):
    case = cases.build(part, name)
    checked, timed = (kinds(part, which, case.dtype) for which in (case.checked, case.timed))
    assert timed.keys() - SUMS == checked.keys() - SUMS
    others = {kernel for kernel, kind in timed.items() if kind - checked.get(kernel, set())}
    assert others <= SUMS
    assert set(PASSES) | set(UPDATES) == set(cases.SIZES)  # these are checked at the size they are timed at
