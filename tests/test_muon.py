from __future__ import annotations

import math

import pytest
import torch
from operator_cases import OperatorContract, bad, drawn, needs_native

from dsfast import ops
from dsfast.ops.cases import muon_case, updated_by_muon
from dsfast.ops.muon import layout
from dsfast.ops.newton_schulz import ITERATIONS, A, B, C

IMPLEMENTATIONS = ["reference", "native"]
ARGUMENTS = ("params", "grads", "momenta", "parts", "lr", "weight_decay", "momentum", "clip_scale", "lr_scale")
MIXED = ((12, 20), (20, 12), (16, 16), (3, 12, 20), (24, 20), (3, 40, 12), (1, 7))
PARTS = (1, 1, 1, 1, 2, 2, 1)


class TestMuon(OperatorContract):
    cases = (
        *(muon_case(f"{rows} x {cols}", (rows, cols)) for rows, cols in ((1, 1), (1, 17), (17, 1), (16, 16), (31, 33))),
        muon_case("tall and wide, stacks and parts, equal shapes apart", *MIXED, parts=PARTS),
        muon_case("a gradient that is missing, first", *MIXED, parts=PARTS, missing=0),
        muon_case("and of a stack in parts", *MIXED, parts=PARTS, missing=5),
        muon_case("parameters without elements", (0, 5), (3, 2), (2, 0, 4)),
        muon_case("many small matrices", *[(1 + i % 5, 3) for i in range(41)]),
        muon_case("rows more than a page apart", (29, 1031), (1031, 3)),
        muon_case(
            "the 500K model's", (192, 128), (48, 128), (2, 128, 128), (2, 128, 64), (256, 32), parts=(1, 1, 2, 1, 1)
        ),
    )
    tiny = muon_case("tiny", (3, 5), (4, 2), parts=(1, 2))
    strided_arguments = (1,)  # the gradients: what is updated in place must be contiguous
    not_expanded = (1,)  # a gradient of equal rows leaves a momentum of them, with singular values of next to nothing
    bad_arguments = (
        bad("muon: params, grads, momenta and parts must be equally long", parts=[1]),
        *(bad("must be equally long", **{name: lambda x: x[:1]}) for name in ("grads", "momenta")),
        bad(r"muon: grads must have shape \[4, 2\], got \[2, 4\]", grads=lambda g: [g[0], g[1].T]),
        bad(r"muon: momenta must have shape \[3, 5\], got \[3, 4\]", momenta=lambda m: [m[0][:, :4], m[1]]),
        bad("muon: grads must be torch.float32 on cpu, got", TypeError, grads=lambda g: [g[0], g[1].double()]),
        bad("muon: params must be torch.float32 on cpu, got", TypeError, params=lambda p: [p[0], p[1].double()]),
        bad("muon: momenta must be torch.float32 on cpu, got", TypeError, momenta=lambda m: [m[0].double(), m[1]]),
        bad("muon: params, written in place, must be contiguous", params=lambda p: [torch.empty(5, 3).T, p[1]]),
        bad("muon: momenta, written in place, must be contiguous", momenta=lambda m: [torch.empty(5, 3).T, m[1]]),
        bad(r"two dimensions or more, and rows to part by 3, got \[4, 2\]", parts=[1, 3]),
        bad(r"two dimensions or more, and rows to part by 1, got \[5\]", params=lambda p: [torch.ones(5), p[1]]),
        bad(r"rows to part by 0, got \[3, 5\]", parts=[0, 1]),
    )

    @staticmethod
    def independent(params, grads, momenta, parts, lr, weight_decay, momentum, clip_scale):
        """Matrix by matrix; orthogonalised by singular values."""
        updated = []
        for w, g, m, n in zip(params, grads, momenta, parts, strict=True):
            g = torch.zeros_like(w) if g is None else clip_scale * g
            m = torch.lerp(g, m, momentum)
            matrices = math.prod(w.shape[:-2]) * n
            u = torch.lerp(g, m, momentum).reshape(matrices, w.size(-2) // n, w.size(-1))
            if u.numel():
                left, s, right = torch.linalg.svd(u, full_matrices=False)
                s = s / s.square().sum(1, keepdim=True).sqrt()
                for _ in range(ITERATIONS):
                    s = A * s + B * s**3 + C * s**5
                u = left * s[:, None] @ right
            step = lr * 0.2 * math.sqrt(max(u.shape[1:])) * u.reshape(w.shape)
            updated.append((w - lr * weight_decay * w - step, m))
        return tuple(torch.cat([x.flatten() for x in column]) for column in zip(*updated, strict=True))

    def call(self, **changes):
        arguments = dict(zip(ARGUMENTS, drawn(self.tiny), strict=False))
        for name, change in changes.items():
            arguments[name] = change(arguments[name]) if callable(change) else change
        ops.muon(**arguments)

    test_gradcheck_of_reference = None  # an update has no derivative
    test_second_derivative = None
    test_compile_full_graph = None  # and is not part of a compiled model
    test_compile_with_inductor = None


def test_layout_puts_the_most_costly_first_and_equal_shapes_together():
    found = layout(MIXED, PARTS)
    assert found.stacks == [(1, 16, 16), (13, 12, 20), (1, 1, 7)]
    sizes = [math.prod(size) for size in found.sizes]
    assert sorted(found.begins) == [found.begins[i] for i in found.order]
    ends = [found.begins[i] + sizes[i] for i in found.order]
    assert [found.begins[i] for i in found.order] == [0, *ends[:-1]]
    assert ends[-1] == sum(math.prod(shape) for shape in MIXED)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestInPlaceAndOnTheDevice:
    def prepared(self, implementation):
        if implementation == "native":
            needs_native()
        return drawn(TestMuon.tiny)

    def test_updates_the_tensors_given_and_leaves_gradients(self, implementation):
        arguments = self.prepared(implementation)
        before = [x.clone() for x in arguments[1]]
        with ops.use(implementation):
            expected = updated_by_muon(*arguments)
            ops.muon(*arguments)
        for tensors, flat in zip((arguments[0], arguments[2]), expected, strict=True):
            assert torch.equal(torch.cat([x.flatten() for x in tensors]), flat)
        assert all(torch.equal(g, old) for g, old in zip(arguments[1], before, strict=True))

    @pytest.mark.parametrize("updated", [0, 2], ids=["params", "momenta"])
    def test_autograd_notices_the_update(self, implementation, updated):
        arguments = self.prepared(implementation)
        loss = arguments[updated][0].requires_grad_().square().sum()
        with ops.use(implementation):
            ops.muon(*arguments)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_nothing_to_update(self, implementation):
        self.prepared(implementation)
        with ops.use(implementation):
            ops.muon([], [], [], [], 0.02, 0.1, 0.95)

    def test_tensors_give_what_numbers_give(self, implementation):
        *arguments, clip_scale = self.prepared(implementation)
        with ops.use(implementation):
            expected = updated_by_muon(*arguments, clip_scale, 0.5)
            arguments_of = {0: clip_scale, 1: torch.tensor(clip_scale)}, {0: 0.5, 1: torch.tensor(0.5).double()}
            for which in range(4):
                found = updated_by_muon(*arguments, arguments_of[0][which & 1], arguments_of[1][which >> 1])
                for x, y in zip(found, expected, strict=True):
                    torch.testing.assert_close(x, y, rtol=0, atol=1e-7)

    @pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
    def test_nothing_is_updated_by_a_factor_that_is_not_finite(self, implementation, value):
        *arguments, _ = self.prepared(implementation)
        before = [[x.clone() for x in column] for column in (arguments[0], arguments[2])]
        with ops.use(implementation):
            ops.muon(*arguments, torch.tensor(value))
        for now, then in zip((arguments[0], arguments[2]), before, strict=True):
            assert all(torch.equal(x, old) for x, old in zip(now, then, strict=True))

    def test_a_factor_of_the_hosts_is_taken_as_it_is(self, implementation):
        *arguments, _ = self.prepared(implementation)
        with ops.use(implementation):
            ops.muon(*arguments, math.nan)
        assert all(w.isnan().all() for w, grad in zip(arguments[0], arguments[1], strict=True) if grad is not None)

    @pytest.mark.parametrize("name", ["clip_scale", "lr_scale"])
    def test_bad_ones(self, implementation, name):
        *arguments, _ = self.prepared(implementation)
        with ops.use(implementation):
            with pytest.raises(ValueError, match=rf"muon: {name} must have shape \[\], got \[1\]"):
                ops.muon(*arguments, **{name: torch.ones(1)})
            with pytest.raises(TypeError, match=f"muon: {name} must be torch.float"):
                ops.muon(*arguments, **{name: torch.tensor(1)})


def test_iterating_in_bfloat16_is_said_to_be_plain_pytorchs():
    needs_native()
    with pytest.warns(ops.FallbackWarning, match="muon runs in plain PyTorch: the C.. kernels iterate in float32"):
        ops.muon(*drawn(TestMuon.tiny), dtype=torch.bfloat16)
