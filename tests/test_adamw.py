from __future__ import annotations

import math

import pytest
import torch
from operator_cases import OperatorContract, bad, drawn, needs_native

from dsfast import ops
from dsfast.ops.cases import adamw_case, updated_by_adamw

IMPLEMENTATIONS = ["reference", "native"]


class TestAdamw(OperatorContract):
    cases = (
        *(adamw_case(f"one tensor of {n}", ((n,),), 3) for n in (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33)),
        *(adamw_case(f"one tensor of {n}: tasks of 16384", ((n,),), 3) for n in (16383, 16384, 16385, 40009)),
        adamw_case("the first step: both corrections are largest", ((7, 5),), 1),
        adamw_case("step 100000: both corrections are 1", ((7, 5),), 100000),
        adamw_case("tensors without elements, first, last and between", ((0,), (3, 5), (0, 4), (2,), (0,)), 2),
        adamw_case("many small tensors", tuple((1 + i % 7, 3) for i in range(61)), 5),
        adamw_case("a scalar", ((),), 2),
    )
    tiny = adamw_case("tiny", ((3, 2), (5,)), 3)
    strided_arguments = (1,)  # the gradients: what is updated in place must be contiguous
    bad_arguments = (
        bad("adamw: params, grads, exp_avgs, exp_avg_sqs, lrs and weight_decays must be equally long", lrs=[0.1]),
        *(
            bad("must be equally long", **{name: lambda x: x[:1]})
            for name in ("grads", "exp_avgs", "exp_avg_sqs", "weight_decays")
        ),
        bad("adamw: step counts from 1, got 0", step=0),
        bad(r"adamw: grads must have shape \[5\], got \[4\]", grads=lambda g: [g[0], g[1][:4]]),
        bad(r"adamw: exp_avgs must have shape \[5\], got \[4\]", exp_avgs=lambda m: [m[0], m[1][:4]]),
        bad(r"adamw: exp_avg_sqs must have shape \[3, 2\], got \[2, 3\]", exp_avg_sqs=lambda v: [v[0].T, v[1]]),
        bad("adamw: grads must be torch.float32 on cpu, got", TypeError, grads=lambda g: [g[0], g[1].double()]),
        bad("adamw: params must be torch.float32 on cpu, got", TypeError, params=lambda p: [p[0], p[1].double()]),
        bad("adamw: params, written in place, must be contiguous", params=lambda p: [torch.empty(2, 3).T, p[1]]),
        bad("adamw: exp_avgs, written in place, must be contiguous", exp_avgs=lambda m: [torch.empty(2, 3).T, m[1]]),
    )

    @staticmethod
    def independent(params, grads, exp_avgs, exp_avg_sqs, lrs, weight_decays, beta1, beta2, eps, step, clip_scale):
        groups = [
            {"params": [p.clone()], "lr": r, "weight_decay": d}
            for p, r, d in zip(params, lrs, weight_decays, strict=True)
        ]
        optimizer = torch.optim.AdamW(groups, betas=(beta1, beta2), eps=eps, foreach=False)
        state = []
        for group, g, m, v in zip(groups, grads, exp_avgs, exp_avg_sqs, strict=True):
            (p,) = group["params"]
            p.grad = g * clip_scale
            optimizer.state[p] = {"step": torch.tensor(step - 1.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
            state.append((p, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]))
        optimizer.step()
        norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads]).double())
        return *(torch.cat([x.flatten() for x in tensors]) for tensors in zip(*state, strict=True)), norm

    def call(self, **changes):
        arguments = dict(zip(ADAMW_ARGUMENTS, drawn(self.tiny), strict=True))
        for name, change in changes.items():
            arguments[name] = change(arguments[name]) if callable(change) else change
        ops.adamw(**arguments)

    test_gradcheck_of_reference = None  # an update has no derivative
    test_second_derivative = None
    test_compile_full_graph = None  # and is not part of a compiled model
    test_compile_with_inductor = None


ADAMW_ARGUMENTS = (
    "params", "grads", "exp_avgs", "exp_avg_sqs", "lrs", "weight_decays", "beta1", "beta2", "eps", "step", "clip_scale",
)  # fmt: skip


@pytest.mark.parametrize(
    ("implementation", "dtype"), [("reference", torch.float64), ("reference", torch.float32), ("native", torch.float32)]
)
def test_trains_like_torch_adamw(implementation, dtype):
    """20 steps of a least squares problem, each with its own gradient and clip."""
    if implementation == "native":
        needs_native()
    generator = torch.Generator().manual_seed(0)
    start, data, wanted = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((5, 3), (17, 5), (17, 3)))
    theirs = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=0.03, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    ours, m, v = start.clone().to(dtype), torch.zeros(5, 3, dtype=dtype), torch.zeros(5, 3, dtype=dtype)
    for step in range(1, 21):
        optimizer.zero_grad()
        (data @ theirs - wanted).square().mean().backward()
        torch.nn.utils.clip_grad_norm_([theirs], 0.5)
        optimizer.step()
        weights = ours.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((data.to(dtype) @ weights - wanted.to(dtype)).square().mean(), weights)
        with ops.use(implementation):
            scale = ops.clip_factor(ops.grad_norm([gradient]), 0.5)
            ops.adamw([ours], [gradient], [m], [v], [0.03], [0.1], 0.9, 0.95, 1e-8, step, scale)
    assert (theirs - start).abs().max() > 0.3
    # clip_grad_norm_ divides by norm + 1e-6, hence not 1e-12 in float64
    torch.testing.assert_close(ours.double(), theirs.detach(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestInPlace:
    def prepared(self, implementation):
        if implementation == "native":
            needs_native()
        return drawn(adamw_case("two", ((3, 2), (5,)), 3))

    def test_updates_the_tensors_given_and_leaves_gradients(self, implementation):
        arguments = self.prepared(implementation)
        before = [[x.clone() for x in tensors] for tensors in arguments[:4]]
        with ops.use(implementation):
            expected = updated_by_adamw(*arguments)
            ops.adamw(*arguments)
        for tensors, flat in zip((arguments[0], arguments[2], arguments[3]), expected[:3], strict=True):
            assert torch.equal(torch.cat([x.flatten() for x in tensors]), flat)
        assert all(torch.equal(g, old) for g, old in zip(arguments[1], before[1], strict=True))
        assert not torch.equal(arguments[0][0], before[0][0])

    @pytest.mark.parametrize("updated", [0, 2, 3], ids=["params", "exp_avgs", "exp_avg_sqs"])
    def test_autograd_notices_the_update(self, implementation, updated):
        """A backward pass through what was saved before the update must not silently use the new values."""
        arguments = self.prepared(implementation)
        loss = arguments[updated][0].requires_grad_().square().sum()
        with ops.use(implementation):
            ops.adamw(*arguments)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_nothing_to_update(self, implementation):
        self.prepared(implementation)
        with ops.use(implementation):
            ops.adamw([], [], [], [], [], [], 0.9, 0.95, 1e-8, 1)
            assert ops.grad_norm([]) == 0.0

    @pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e30])
    @pytest.mark.parametrize("at", [0, 16, 20000])
    def test_norm_of_large_and_bad_gradients(self, implementation, value, at):
        self.prepared(implementation)
        gradient = torch.zeros(20001)
        gradient[at] = value
        with ops.use(implementation):
            norm = ops.grad_norm([torch.ones(3), gradient])
        assert norm == pytest.approx(abs(torch.tensor(value).item()), rel=1e-6, nan_ok=True)


def as_tensors(step, clip_scale, lr_scale):
    return torch.tensor(step), torch.tensor(clip_scale), torch.tensor(lr_scale, dtype=torch.float64)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestNumbersOnTheDevice:
    """Step, clip factor and the scale of the learning rates as tensors: what a captured step reads."""

    def prepared(self, implementation):
        if implementation == "native":
            needs_native()
        *tensors, lrs, decays, beta1, beta2, eps, step, clip_scale = drawn(adamw_case("two", ((3, 2), (5,)), 3))
        return tensors, lrs, (decays, beta1, beta2, eps), step, clip_scale

    def test_give_what_numbers_give(self, implementation):
        tensors, lrs, settings, step, clip_scale = self.prepared(implementation)
        with ops.use(implementation):
            expected = updated_by_adamw(*tensors, [0.5 * lr for lr in lrs], *settings, step, clip_scale)
            given = (step, clip_scale, 0.5)
            for which in range(8):  # none, each alone, and together
                pairs = zip(as_tensors(*given), given, range(3), strict=True)
                numbers = (x if which >> i & 1 else number for x, number, i in pairs)
                found = updated_by_adamw(*tensors, lrs, *settings, *numbers)
                for x, y in zip(found, expected, strict=True):
                    torch.testing.assert_close(x, y, rtol=0, atol=1e-7)

    def test_a_first_step_loses_no_digits(self, implementation):
        """1 - beta2 of it is 1e-4: in float32 it would be 1.7e-4 off."""
        self.prepared(implementation)
        p, grad, *averages = torch.zeros(3), torch.ones(3), torch.zeros(3), torch.zeros(3)
        with ops.use(implementation):
            ops.adamw([p], [grad], *([x] for x in averages), [1.0], [0.0], 0.9, 0.9999, 0.0, torch.tensor(1))
        torch.testing.assert_close(p, -grad, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
    def test_nothing_is_updated_by_a_factor_that_is_not_finite(self, implementation, value):
        tensors, lrs, settings, step, _ = self.prepared(implementation)
        before = [[x.clone() for x in column] for column in tensors]
        with ops.use(implementation):
            ops.adamw(*tensors, lrs, *settings, step, torch.tensor(value))
        pairs = zip(tensors, before, strict=True)
        assert all(torch.equal(x, old) for now, then in pairs for x, old in zip(now, then, strict=True))

    def test_a_factor_of_the_hosts_is_taken_as_it_is(self, implementation):
        tensors, lrs, settings, step, _ = self.prepared(implementation)
        with ops.use(implementation):
            ops.adamw(*tensors, lrs, *settings, step, math.nan)
        assert all(p.isnan().all() for p in tensors[0])

    @pytest.mark.parametrize(
        ("name", "value", "error", "match"),
        [
            ("lr_scale", torch.ones(2).double(), ValueError, r"adamw: lr_scale must have shape \[\], got \[2\]"),
            (
                "lr_scale",
                torch.tensor(1.0),
                TypeError,
                "adamw: lr_scale must be torch.float64 on cpu, got torch.float32",
            ),
            ("step", torch.ones(1).long(), ValueError, r"adamw: step must have shape \[\], got \[1\]"),
            ("step", torch.tensor(1.0), TypeError, "adamw: step must be torch.int64 on cpu, got torch.float32"),
            ("step", torch.tensor(0), ValueError, "adamw: step counts from 1, got 0"),
            ("clip_scale", torch.ones(1), ValueError, r"adamw: clip_scale must have shape \[\], got \[1\]"),
            (
                "clip_scale",
                torch.tensor(1),
                TypeError,
                "adamw: clip_scale must be torch.float32 on cpu, got torch.int64",
            ),
        ],
    )
    def test_bad_ones(self, implementation, name, value, error, match):
        tensors, lrs, settings, step, clip_scale = self.prepared(implementation)
        given = {"step": step, "clip_scale": clip_scale, name: value}
        with ops.use(implementation), pytest.raises(error, match=match):
            ops.adamw(*tensors, lrs, *settings, **given)

    @pytest.mark.parametrize("max_norm", [0.5, 5.0, 1e9])
    def test_norm_and_factor_of_gradients(self, implementation, max_norm):
        grads = self.prepared(implementation)[0][1]
        with ops.use(implementation):
            norm, scale = ops.grad_clip(grads, max_norm)
            assert float(norm) == ops.grad_norm(grads)
        assert (norm.dtype, scale.dtype, norm.shape, scale.shape) == (torch.float64, torch.float32, (), ())
        assert float(scale) == pytest.approx(ops.clip_factor(float(norm), max_norm), rel=1e-7)

    @pytest.mark.parametrize("bad", [math.inf, math.nan])
    def test_factor_of_bad_gradients_is_nan(self, implementation, bad):
        self.prepared(implementation)
        with ops.use(implementation):
            norm, scale = ops.grad_clip([torch.tensor([1.0, bad])], 1.0)
        assert not norm.isfinite()
        assert scale.isnan()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_loss_that_is_not_finite_makes_the_factor_nan(self, implementation, dtype):
        grads = self.prepared(implementation)[0][1]
        with ops.use(implementation):
            expected = ops.grad_clip(grads, 0.5)
            assert ops.grad_clip(grads, 0.5, torch.tensor(7.0, dtype=dtype)) == expected
            for bad in (math.inf, -math.inf, math.nan):
                norm, scale = ops.grad_clip(grads, 0.5, torch.tensor(bad, dtype=dtype))
                assert norm == expected[0]
                assert scale.isnan()
            with pytest.raises(ValueError, match=r"grad_clip: loss must have shape \[\], got \[1\]"):
                ops.grad_clip(grads, 0.5, torch.ones(1))
            with pytest.raises(TypeError, match=f"grad_clip: loss must be {dtype} on cpu, got {dtype} on meta$"):
                ops.grad_clip(grads, 0.5, torch.ones((), dtype=dtype, device="meta"))

    @pytest.mark.parametrize(
        ("other", "got"),
        [
            (torch.ones(4, dtype=torch.float64), "torch.float64 on cpu"),
            (torch.ones(8).bfloat16(), "torch.bfloat16 on cpu"),
            (torch.ones(4, device="meta"), "torch.float32 on meta"),
        ],
        ids=str,
    )
    def test_gradients_of_several_kinds_are_refused(self, implementation, other, got):
        self.prepared(implementation)
        with ops.use(implementation):
            for function in (ops.grad_norm, lambda grads: ops.grad_clip(grads, 1.0)):
                with pytest.raises(TypeError, match=f"grad_clip: grads must be torch.float32 on cpu, got {got}$"):
                    function([torch.ones(4), other])

    def test_factor_of_no_gradients_is_one(self, implementation):
        self.prepared(implementation)
        with ops.use(implementation):
            for grads in ([], [torch.zeros(3)], [torch.zeros(0)]):
                assert [float(x) for x in ops.grad_clip(grads, 1.0)] == [0.0, 1.0]


def test_inf_and_nan_together_are_not_finite():
    needs_native()
    with ops.use("native"):
        assert math.isnan(ops.grad_norm([torch.tensor([math.inf]), torch.tensor([math.nan])]))


@pytest.mark.parametrize(("norm", "scale"), [(0.0, 1.0), (0.5, 1.0), (2.0, 1.0), (8.0, 0.25), (math.inf, 0.0)])
def test_clip_factor(norm, scale):
    assert ops.clip_factor(norm, 2.0) == scale
