"""Which implementation runs: use, configure, report, fall-backs."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from operator_cases import contract, drawn, needs_native
from tiny_models import random_model
from torch.autograd import forward_ad

from dsfast import ops
from dsfast.errors import UserError
from dsfast.ops import native, triton
from dsfast.ops.checks import as_tuple

X, WEIGHT = torch.ones(2, 3), torch.ones(3)


@pytest.fixture(autouse=True)
def own_selection():
    """What a test configures ends with it."""
    with ops.use("auto"):
        yield


def taken(device: str = "cpu", **kwargs) -> dict[str, str]:
    return {row["operator"]: row["implementation"] for row in ops.report(device, **kwargs)}


@pytest.fixture
def without_native(monkeypatch):
    monkeypatch.setattr(native, "status", lambda: (None, "dsfast._native is not built; run `make build`"))


class TestUse:
    def test_all_operators_inside_the_block_alone(self):
        before = taken()
        with ops.use("reference"):
            assert set(taken().values()) == {"reference"}
        assert taken() == before

    def test_named_operators_alone(self):
        with ops.use("reference", "rope", "adamw"):
            assert {name for name, implementation in taken().items() if implementation == "reference"} >= {
                "rope",
                "adamw",
            }
            needs_native()
            assert taken()["rms_norm"] == "native"

    def test_inner_block_wins_and_outer_comes_back(self):
        needs_native()
        with ops.use("reference"):
            with ops.use("native", "rope"):
                assert taken()["rope"] == "native"
                assert taken()["adamw"] == "reference"
            assert taken()["rope"] == "reference"

    def test_ends_after_an_exception(self):
        before = taken()
        with pytest.raises(ZeroDivisionError), ops.use("reference"):
            raise ZeroDivisionError
        assert taken() == before

    def test_unknown_names_list_the_known(self):
        with pytest.raises(UserError, match="unknown implementation 'cuda'; known: auto, native, reference, triton"):
            ops.use("cuda").__enter__()
        with pytest.raises(UserError, match=r"unknown operator 'softmax'; known: adamw, embedding, .*swiglu_mlp"):
            ops.use("native", "softmax").__enter__()

    def test_implementation_of_another_device(self):
        with (
            ops.use("triton"),
            pytest.raises(UserError, match=r"rms_norm: .*'triton' does not run on cpu; there: reference, native"),
        ):
            ops.rms_norm(X, WEIGHT, 1e-6)

    def test_a_device_without_kernels_takes_the_reference_unless_others_are_asked_for(self):
        x, weight = X.to("meta"), WEIGHT.to("meta")
        assert ops.rms_norm(x, weight, 1e-6).shape == X.shape
        with ops.use("native"), pytest.raises(UserError, match=r"'native' does not run on meta; there: reference$"):
            ops.rms_norm(x, weight, 1e-6)

    def test_native_in_another_dtype_is_an_error_not_a_fall_back(self):
        needs_native()
        with ops.use("native"), pytest.raises(UserError, match=r"rms_norm: .*'native' cannot run: .*float32.*float64"):
            ops.rms_norm(X.double(), WEIGHT.double(), 1e-6)
        assert ops.fallbacks() == []

    def test_native_that_is_not_built_is_an_error(self, without_native):
        with (
            ops.use("native"),
            pytest.raises(UserError, match=r"'native' cannot run: dsfast._native is not built; run `make"),
        ):
            ops.rms_norm(X, WEIGHT, 1e-6)


class TestAuto:
    def test_takes_the_kernels_without_a_word(self):
        needs_native()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ops.rms_norm(X, WEIGHT, 1e-6)
        assert set(taken().values()) == {"native"}
        assert ops.fallbacks() == []

    def test_float64_falls_back_warns_once_and_is_listed(self):
        needs_native()
        with pytest.warns(ops.FallbackWarning, match="rms_norm runs in plain PyTorch: .*float32.* float64") as caught:
            [ops.rms_norm(X.double(), WEIGHT.double(), 1e-6) for _ in range(2)]
        assert [warning.filename for warning in caught] == [__file__]
        (row,) = ops.fallbacks()
        assert (row["operator"], row["device"]) == ("rms_norm", "cpu")
        assert "float64" in row["reason"]

    def test_another_reason_is_said_too(self):
        needs_native()
        for dtype in ("float64", "bfloat16"):
            with pytest.warns(ops.FallbackWarning, match=f"rms_norm runs in plain PyTorch: .*{dtype}"):
                ops.rms_norm(X.to(getattr(torch, dtype)), WEIGHT.to(getattr(torch, dtype)), 1e-6)
        assert [row["operator"] for row in ops.fallbacks()] == ["rms_norm"] * 2

    def test_kernels_that_are_not_there_are_the_reason_whatever_they_would_refuse(self, without_native):
        with pytest.warns(ops.FallbackWarning, match="linear_cross_entropy runs in plain PyTorch: .*not built"):
            ops.linear_cross_entropy(X, torch.ones(4, 3), torch.zeros(2, dtype=torch.int64), z_loss=1e-4)

    def test_each_operator_warns_for_itself(self, without_native):
        with pytest.warns(ops.FallbackWarning, match="rms_norm"):
            ops.rms_norm(X, WEIGHT, 1e-6)
        with pytest.warns(ops.FallbackWarning, match="swiglu_mlp"):
            ops.swiglu_mlp(X, torch.ones(4, 3), torch.ones(3, 2))
        assert [row["operator"] for row in ops.fallbacks()] == ["rms_norm", "swiglu_mlp"]
        assert all("make build" in row["reason"] for row in ops.fallbacks())

    def test_what_was_asked_for_is_no_fall_back(self):
        with ops.use("reference"), warnings.catch_warnings():
            warnings.simplefilter("error")
            ops.rms_norm(X, WEIGHT, 1e-6)
        assert ops.fallbacks() == []

    @pytest.mark.parametrize("implementation", ["reference", "native"])
    def test_autograd_runs_the_implementation_in_force_at_the_forward_pass(self, implementation):
        if implementation == "native":
            needs_native()
        x = torch.randn(3, 4, requires_grad=True)
        with ops.use(implementation):
            y = ops.swiglu_mlp(x, torch.ones(4, 4), torch.ones(4, 2))
        assert ("dsfast" in y.grad_fn.name()) == (implementation == "native")
        y.sum().backward()
        assert x.grad.shape == x.shape


class TestReport:
    def test_one_row_for_each_operator_with_a_reason(self):
        rows = ops.report("cpu")
        assert [row["operator"] for row in rows] == list(ops.OPERATORS)
        assert all(row["implementation"] in ops.IMPLEMENTATIONS and row["reason"] for row in rows)

    def test_asked_for(self):
        with ops.use("reference"):
            assert {row["reason"] for row in ops.report("cpu")} == {"asked for"}

    def test_says_why_not_native(self, without_native):
        for row in ops.report("cpu"):
            assert row["implementation"] == "reference"
            assert "not built" in row["reason"]

    def test_in_16_bits_a_gpu_takes_its_kernels_of_float32_too(self, monkeypatch):
        monkeypatch.setattr(ops.dispatch.triton, "available", lambda operator: (True, "there"))
        found = ops.report("cuda", torch.bfloat16)
        assert {(row["implementation"], row["reason"]) for row in found} == {("triton", "there")}

    def test_other_dtypes_take_the_reference(self):
        assert set(taken(dtype=torch.bfloat16).values()) == {"reference"}


@pytest.mark.parametrize(
    ("capability", "refused"),
    [((8, 0), ""), ((7, 5), "the GPU has compute capability 7.5, 8.0 or newer is needed")],
    ids=str,
)
def test_gpus_that_the_kernels_run_on(monkeypatch, capability, refused):
    monkeypatch.setattr(triton, "INTERPRETED", False)
    monkeypatch.setattr(triton, "missing", lambda: "")
    monkeypatch.setattr(triton, "_no_launcher", lambda: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert triton.available.__wrapped__("rope") == (not refused, refused or "Triton kernel")


class TestConfigured:
    def test_default_and_exceptions(self):
        with ops.configured({"default": "reference", "rope": "auto"}, "cpu"):
            chosen = taken()
        assert {name for name, implementation in chosen.items() if implementation != "reference"} <= {"rope"}
        if native.status()[0] is not None:
            assert chosen["rope"] == "native"

    def test_without_entries_what_is_selected_outside_holds(self):
        with ops.use("reference"), ops.configured({}, "cpu"):
            assert set(taken().values()) == {"reference"}

    def test_an_entry_leaves_the_other_operators_alone(self):
        with ops.use("reference"), ops.configured({"rope": "auto"}, "cpu"):
            assert {name for name, implementation in taken().items() if implementation != "reference"} <= {"rope"}

    def test_holds_in_this_thread_and_block_alone(self):
        before, found = taken(), []
        with ops.configured({"default": "reference"}, "cpu"):
            thread = threading.Thread(target=lambda: found.append(taken()))
            thread.start()
            thread.join()
            assert set(taken().values()) == {"reference"}
        assert [taken(), *found] == [before, before]

    @pytest.mark.parametrize(
        ("kernels", "match"),
        [
            ({"default": "fast"}, "unknown implementation 'fast'; known: auto"),
            ({"rope": "fast"}, "unknown implementation 'fast'; known: auto"),
            ({"softmax": "native"}, "unknown operator 'softmax'; known: adamw"),
            ({"rope": "triton"}, "rope: implementation 'triton' does not run on cpu"),
        ],
    )
    def test_bad_entries_raise_at_once_and_change_nothing(self, kernels, match):
        before = taken()
        with pytest.raises(UserError, match=match), ops.configured(kernels, "cpu"):
            pass
        assert taken() == before


def test_what_holds_no_floating_point_numbers_is_refused():
    with pytest.raises(TypeError, match=r"rms_norm: expected floating-point numbers, got torch.int32"):
        ops.rms_norm(X.int(), WEIGHT.int(), 1e-6)


class TestDerivativesOfNoBackwardPass:
    """Forward mode and torch.func's transforms, in which the kernels' part of a derivative would be missing."""

    @pytest.mark.parametrize("operator", [name for name in ops.OPERATORS if contract(name).tiny.differentiable])
    @pytest.mark.filterwarnings("ignore")
    def test_agree_with_the_backward_pass_of_the_kernels(self, operator):
        needs_native()
        case = contract(operator).tiny
        arguments, generator = drawn(case), torch.Generator().manual_seed(1)
        given = [arguments[i].detach() for i in case.differentiable]
        tangents = [torch.randn(x.shape, generator=generator) for x in given]

        def function(*given):
            """A sum of the outputs, each number with a factor of its own."""
            filled = dict(zip(case.differentiable, given, strict=True))
            outputs = as_tuple(case.function(*(filled.get(i, x) for i, x in enumerate(arguments))))
            return sum(
                (y * torch.arange(1.0, y.numel() + 1).view(y.shape)).sum() for y in outputs if y.is_floating_point()
            )

        leaves = [x.clone().requires_grad_() for x in given]
        gradients = torch.autograd.grad(function(*leaves), leaves)
        assert ops.fallbacks() == []
        by_transform = torch.func.grad(function, tuple(range(len(given))))(*given)
        assert {row["operator"] for row in ops.fallbacks()} == {operator}
        for found, expected in zip(by_transform, gradients, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        along = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
        with forward_ad.dual_level():
            dual = function(*map(forward_ad.make_dual, given, tangents))
            torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, along, rtol=1e-4, atol=1e-4)
        _, found = torch.func.jvp(function, tuple(given), tuple(tangents))
        torch.testing.assert_close(found, along, rtol=1e-4, atol=1e-4)

    @pytest.mark.filterwarnings("ignore")
    def test_gradients_of_a_model(self):
        needs_native()
        model = random_model()
        input_ids = torch.randint(3, model.config.vocab_size, (2, 5), generator=torch.Generator().manual_seed(0))
        model(input_ids).square().sum().backward()
        assert ops.fallbacks() == []
        weights = dict(model.named_parameters())
        found = torch.func.grad(lambda p: torch.func.functional_call(model, p, (input_ids,)).square().sum())(weights)
        for name, parameter in weights.items():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=name)

    def test_the_reason_is_said(self):
        needs_native()
        with pytest.warns(ops.FallbackWarning, match="rms_norm runs in plain PyTorch: .* forward mode or torch.func's"):
            torch.func.grad(lambda x: ops.rms_norm(x, WEIGHT, 1e-6).sum())(X)
        with (
            ops.use("native"),
            pytest.raises(UserError, match=r"rms_norm: implementation 'native' cannot run: .* torch\.func's"),
        ):
            torch.func.vmap(torch.func.grad(lambda x: ops.rms_norm(x, WEIGHT, 1e-6).sum()))(X[None])

    @pytest.mark.filterwarnings("ignore:There is a performance drop")
    def test_what_makes_no_derivative_takes_the_kernels(self):
        needs_native()
        y = torch.func.vmap(lambda x: ops.rms_norm(x, WEIGHT, 1e-6))(X[None])
        assert torch.equal(y[0], ops.rms_norm(X, WEIGHT, 1e-6))
        with forward_ad.dual_level():
            pass
        ops.rms_norm(X, WEIGHT, 1e-6)
        assert ops.fallbacks() == []
