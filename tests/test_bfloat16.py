"""bfloat16 on the CPU: float32 tensors, products that multiply numbers rounded to bfloat16."""

from __future__ import annotations

import struct
import warnings
from importlib import import_module
from inspect import getsource

import pytest
import torch
from operator_cases import DRAWS, EDGES, assert_bitwise_equal, assert_passed, contract, drawn, needs_bfloat16
from test_native_build import run_python
from test_native_step import LARGE, LARGE_AFTER_A, by_autograd, flat, in_one_call
from tiny import tiny_config, tiny_dataset
from tiny_models import random_model

from dsfast import ops
from dsfast.config import RuntimeConfig
from dsfast.errors import UserError
from dsfast.model import loss_in, precision_of
from dsfast.ops import native
from dsfast.ops.cases import linear_cross_entropy_case
from dsfast.ops.checks import compare, evaluate, judge
from dsfast.train import Trainer

BF16, FP32 = torch.bfloat16, torch.float32
LAST_NAN = struct.unpack("f", b"\xff\xff\xff\x7f")[0]  # one more in its bits is -0
SLOWER = "ignore:runtime.dtype 'bfloat16' is slower here"


CASES = [
    pytest.param(case, id=f"{operator}-{case.name}")
    for operator in native.OF_PRODUCTS
    for case in (*contract(operator).cases[::3], contract(operator).tiny)
]


@pytest.fixture(autouse=True)
def bfloat16():
    needs_bfloat16()


def test_the_operators_made_of_products_are_those_that_take_kernels_of_them():
    taking = {name for name in ops.OPERATORS if "native.products()" in getsource(import_module(f"dsfast.ops.{name}"))}
    assert taking == set(native.OF_PRODUCTS)


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.to(BF16).double()


class TestProducts:
    @pytest.mark.parametrize("case", CASES)
    def test_at_most_twice_the_error_of_bfloat16_eager(self, case):
        assert_passed(compare(case, ["native"], draws=DRAWS, products=BF16))

    def test_of_an_odd_width_and_several_chunks_of_words(self):
        case = linear_cross_entropy_case("odd", 37, 7, 301)
        assert_passed(compare(case, ["native"], draws=DRAWS, products=BF16))

    @pytest.mark.parametrize("r", EDGES)
    def test_are_those_of_operands_rounded_to_nearest_even(self, r):
        """x P in every shape of tile, and its derivatives: exact products of rounded operands, to float32's rounding."""
        random = torch.Generator().manual_seed(r)
        for n, d in ((1, 1), (33, 17), (49, 35), (13, 96)):
            ids = torch.arange(n)
            x, p, dy = (torch.randn(*shape, generator=random) for shape in ((n, r), (r, d), (n, d)))
            x[0, 0] = 1.00390625  # half way between two bfloat16
            x.requires_grad_(), p.requires_grad_()
            with ops.use("native"), ops.products_in(BF16):
                y = ops.embedding(ids, x, p)
                dx, dp = torch.autograd.grad(y, (x, p), dy)
            for found, expected in (
                (y, rounded(x) @ rounded(p)), (dx, rounded(dy) @ rounded(p).T), (dp, rounded(x).T @ rounded(dy)),
            ):  # fmt: skip
                torch.testing.assert_close(found.detach().double(), expected, rtol=0, atol=2e-7 * max(r, n, d))

    @pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), LAST_NAN, 3.3953e38, 1e-30])
    def test_of_what_is_not_an_ordinary_number(self, value):
        """NaN and infinities stay; a float32 above the largest bfloat16 becomes infinite; a small number is not lost."""
        x = torch.ones(3, 5)
        x[1, 4] = value
        with ops.use("native"), ops.products_in(BF16):
            y = ops.embedding(torch.arange(3), x, torch.eye(5))
        assert torch.equal(y[[0, 2]], torch.ones(2, 5))
        expected = rounded(torch.tensor(value)).float()
        if torch.tensor(value).isfinite() and expected.isfinite():
            assert y[1, 4] == expected
            assert torch.equal(y[1, :4], torch.ones(4))
        else:  # 0 times infinity
            assert not y[1].isfinite().any()

    def test_same_bits_twice_and_float32_afterwards(self):
        case = contract("swiglu_mlp").cases[-1]
        arguments = drawn(case)

        def run():
            with ops.use("native"):
                return evaluate(case.function, arguments, case.differentiable)

        before = run()
        with ops.products_in(BF16):
            first, second = run(), run()
        assert_bitwise_equal(first, second)
        assert not torch.equal(first["output"], before["output"]), "it did round"
        assert_bitwise_equal(before, run())

    def test_report_says_so(self):
        with ops.products_in(BF16):
            reasons = {row["operator"]: row["reason"] for row in ops.report()}
        assert {name for name, reason in reasons.items() if "bfloat16" in reason} == set(native.OF_PRODUCTS)

    def test_of_another_dtype_are_refused(self):
        with (
            pytest.raises(ValueError, match=r"must be float32 or bfloat16, got torch.float16"),
            ops.products_in(torch.half),
        ):
            pass

    def test_emulated_as_by_the_instruction(self):
        """The same loss by the processor's own instruction and emulated, but for the order in which two terms are added."""
        if native.module().isa != "avx512_bf16":
            pytest.skip("this processor has no bfloat16 instruction")
        losses = [float(run_python("-c", ONE_LOSS, DSFAST_ISA=isa).stdout) for isa in ("avx2", "avx512", "avx512_bf16")]
        assert losses[0] == pytest.approx(losses[2], rel=1e-6)
        assert losses[1] == pytest.approx(losses[2], rel=1e-6)

    def test_without_avx2_are_refused_in_one_line(self):
        done = run_python("-c", ONE_LOSS, DSFAST_ISA="baseline")
        assert "UserError: bfloat16 on the CPU takes AVX2 at least; the kernels here run as baseline" in done.stderr


ONE_LOSS = """
import torch
from dsfast import ops
from dsfast.ops.cases import linear_cross_entropy_case
case = linear_cross_entropy_case("", 67, 33, 131)
with ops.use("native"), ops.products_in(torch.bfloat16):
    print(float(case.function(*case.make_inputs(torch.Generator().manual_seed(0)))))
"""


def in_bfloat16(model, arguments) -> dict[str, torch.Tensor]:
    """Loss and gradients of plain PyTorch that keeps everything but the weights in bfloat16."""
    ids, labels, positions, cu_seqlens = arguments
    with ops.use("reference"):
        loss = loss_in(BF16, model, 0.3, ids[None], labels[None], positions[None], cu_seqlens)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
    return {"loss": loss.detach(), **dict(zip(dict(model.named_parameters()), gradients, strict=True))}


class TestWholeStep:
    @pytest.mark.parametrize(
        "changes", [{}, {"embedding_rank": 8}, {"q_lora_rank": 9}, {"first_k_dense_replace": 1}, LARGE, LARGE_AFTER_A]
    )
    def test_at_most_twice_the_error_of_bfloat16_eager(self, changes):
        """All experts chosen: a near tie between two cannot fall differently."""
        changes = {"n_routed_experts": 2, "num_experts_per_tok": 2, **changes}
        draws = []
        for seed in range(DRAWS):
            model, exact = random_model(seed, **changes).train(), random_model(seed, **changes).train().double()
            arguments = flat(model, (17, 29, 1, 33), seed)
            expected = by_autograd(exact, *arguments)
            eager = in_bfloat16(model, arguments)
            with ops.products_in(BF16):
                found = in_one_call(model, arguments)
            sizes = {name: x.abs().max() for name, x in expected.items()}
            draws.append([{n: x.double() / sizes[n] for n, x in values.items()} for values in (expected, eager, found)])
        expected, eager, found = (
            torch.stack([torch.cat([x.flatten() for x in draw[i].values()]) for draw in draws]) for i in range(3)
        )
        # In float32's ulp: what is allowed is twice eager's error and next to nothing else.
        row = judge(expected, eager, found, FP32, "native")
        assert_passed([row])
        assert row["max_abs_error"] > 1e-4, "it did round"

    def test_router_stays_in_float32(self):
        """Rounding the scores would send tokens elsewhere: with the router's weights all but equal the loads tell."""
        model = random_model(n_routed_experts=40, num_experts_per_tok=1, n_group=1, topk_group=1).train()
        with torch.no_grad():
            for router in model.routers():
                router.weight.copy_(router.weight[:1] * (1 + 1e-4 * torch.randn(40, 1)))
        arguments = flat(model, (40, 30))
        in_one_call(model, arguments)
        first = model.routers()[0]
        exact = first.load.clone()
        with ops.products_in(BF16):
            in_one_call(model, arguments)
        # The first layer's input differs by bfloat16's rounding in the attention; most choices stay, which scores of 8 bits
        # that are equal to within 1e-4 could not make.
        assert (first.load - exact).abs().sum() <= 0.5 * exact.sum()


A_TRAINER = """
import sys
sys.path.insert(0, "tests")
from tiny import tiny_config
from dsfast.train import Trainer
Trainer(tiny_config(**{"runtime.dtype": "bfloat16"}))
"""


class TestTrainer:
    @pytest.mark.filterwarnings(SLOWER)
    def test_learns_as_in_float32(self):
        losses = {}
        for dtype in ("float32", "bfloat16"):
            trainer = Trainer(tiny_config(**{"runtime.dtype": dtype, "train.steps": 40}))
            losses[dtype] = trainer.train(quiet=True).losses
            assert trainer.gradients.in_one_call
        assert losses["bfloat16"] != losses["float32"]
        assert losses["bfloat16"][-1] == pytest.approx(losses["float32"][-1], rel=0.02)

    @pytest.mark.filterwarnings(SLOWER)
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_muon_multiplies_the_same(self, dtype, monkeypatch):
        """The optimizer's step is inside what `runtime.dtype` says, and the report says so."""
        calls, kernels = [], native.module().bfloat16
        run = kernels.muon
        monkeypatch.setattr(kernels, "muon", lambda *arguments: calls.append(run(*arguments)))
        trainer = Trainer(tiny_config(**{"runtime.dtype": dtype}), dataset=tiny_dataset())
        list(trainer.steps().run())
        assert len(calls) == (dtype == "bfloat16")
        with trainer.kernels():
            reasons = {row["operator"]: row["reason"] for row in ops.report()}
        assert ("products of bfloat16" in reasons["muon"]) == (dtype == "bfloat16")

    def test_says_aloud_where_it_is_slower(self):
        if native.fast_bfloat16():
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                Trainer(tiny_config(**{"runtime.dtype": "bfloat16"}))
            return
        done = run_python("-c", A_TRAINER)
        assert "FallbackWarning: runtime.dtype 'bfloat16' is slower here" in done.stderr

    def test_auto_is_what_is_faster(self, monkeypatch):
        for fast, expected in ((True, BF16), (False, FP32)):
            monkeypatch.setattr(native, "fast_bfloat16", lambda fast=fast: fast)
            assert precision_of(RuntimeConfig(dtype="auto")) == (FP32, expected)
        assert precision_of(RuntimeConfig(device="cuda", dtype="auto")) == (BF16, FP32)
        assert precision_of(RuntimeConfig(dtype="float32")) == (FP32, FP32)

    def test_needs_the_kernels(self, monkeypatch):
        monkeypatch.setattr(native, "status", lambda: (None, "dsfast._native is not built"))
        with pytest.raises(UserError, match=r"runtime\.dtype is 'bfloat16', .* \(dsfast\._native is not built\)"):
            Trainer(tiny_config(**{"runtime.dtype": "bfloat16"}))
