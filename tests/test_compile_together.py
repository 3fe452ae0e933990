"""What is compiled before a step is recorded: every kernel once, at the same time, none started, on a GPU that is not there."""

from __future__ import annotations

import errno
import gc
import os
import threading
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from fake_driver import InstantCompiler, fake_gpu, in_its_own_process, on_the_fake_gpu
from test_triton_step import trainer_of
from tiny_models import random_model
from triton_contract import poisoned

from dsfast import ops
from dsfast.errors import UserError
from dsfast.model import capture
from dsfast.model.device_decode import DecodeStep
from dsfast.ops import triton
from dsfast.train.steps import DeviceSteps

test_on_a_gpu_that_is_not_there = in_its_own_process(__file__)


def training_step(run: str):
    """The step of one of test_triton_step's runs, with a batch to take."""
    steps = DeviceSteps(trainer_of(run), lambda step: step)
    steps.prepare()
    return steps.step


STEPS = {
    "muon": lambda: training_step("muon"),
    "adamw and multi-token prediction": lambda: training_step("adamw"),
    "greedy": lambda: DecodeStep(random_model(), 3, 40, 0.0),
    "sampling": lambda: DecodeStep(random_model(), 3, 40, 0.7),
}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(capture, "_side_stream", nullcontext)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2})


@pytest.fixture(params=STEPS)
def step(request):
    with torch.inference_mode(request.param in ("greedy", "sampling")):
        yield STEPS[request.param]()


@on_the_fake_gpu
def test_each_kernel_is_compiled_once_and_none_is_started(step, monkeypatch):
    """At the same time; after it the step finds all of them, and starts what it launches."""
    from dsfast.triton_kernels import ahead
    from dsfast.triton_kernels.launch import Launch

    compiler = InstantCompiler(together=True)
    with fake_gpu(compiler) as driver, poisoned():
        triton.compile_together(step)
        assert driver.started == []
        compiled = list(compiler.sources)
        assert len(compiled) == len(set(compiled))
        assert len(compiler.threads) > 1
        assert threading.get_ident() not in compiler.threads
        assert sorted(driver.launchers) == sorted(name for name, *_ in compiled)
        launched, run = [], Launch.run
        monkeypatch.setattr(Launch, "run", lambda self: (launched.append(self), run(self))[1])
        step()
        assert compiler.sources == compiled, "compiled again"
        names = [launch.kernel.__name__ for launch in launched]
        assert driver.started == names
    sources = [(launch, ahead._source(launch)) for launch in launched]
    kinds = {
        (launch.kernel.__name__, *map(str, (s.signature, s.constants, s.attrs, launch.options)))
        for launch, s in sources
    }
    assert sorted(name for name, *_ in kinds) == sorted(name for name, *_ in compiled)


@on_the_fake_gpu
def test_capturing_compiles_before_it_starts_and_changes_nothing(step, monkeypatch):
    """Memory that kernels should have written is full of NaN and of the largest integers, when they are compiled and after."""
    compiler = InstantCompiler()
    with fake_gpu(compiler) as driver, poisoned():
        monkeypatch.setattr(capture, "record", lambda call: SimpleNamespace(replay=call))
        before, compiled, together = [x.clone() for x in step.state()], [], triton.compile_together

        def compile_together(call):
            together(call)
            compiled.extend(compiler.sources)
            assert driver.started == []

        monkeypatch.setattr(triton, "compile_together", compile_together)
        assert capture.captured(step) is step
        assert driver.started
        assert compiler.sources == compiled
        assert all(torch.equal(x, old) for x, old in zip(step.state(), before, strict=True))


@on_the_fake_gpu
def test_an_index_that_no_kernel_has_written_would_be_noticed():
    logits, bias = torch.zeros(3, 4), torch.zeros(4)

    def call():
        _, indices, *_ = ops.moe_route(logits, bias, 1, 1, 1, False, 1.0)
        bias.index_select(0, indices.flatten())

    with fake_gpu(InstantCompiler()), poisoned(), pytest.raises(IndexError):
        triton.compile_together(call)


class Failing(InstantCompiler):
    """The compilation of adamw's norm_kernel raises `error`."""

    def __init__(self, error: Exception):
        super().__init__()
        self.failing["norm_kernel"] = error


@on_the_fake_gpu
def test_a_compilation_that_fails_is_raised_and_others_go_on():
    compiler = Failing(ValueError("no such instruction"))
    with fake_gpu(compiler) as driver:
        with pytest.raises(ValueError, match="no such instruction"):
            triton.compile_together(training_step("muon"))
        compiled = len(compiler.sources)
        triton.compile_together(lambda: ops.rms_norm(torch.ones(2, 99), torch.ones(99), 1e-6))
        assert len(compiler.sources) == compiled + 1
        assert driver.started == []
        ops.rms_norm(torch.ones(2, 99), torch.ones(99), 1e-6)
        assert driver.started == ["forward_kernel"]


@on_the_fake_gpu
def test_a_cache_without_room_is_one_line_as_at_a_launch(monkeypatch, tmp_path):
    step = training_step("muon")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton, "INTERPRETED", False)
    error = OSError(errno.ENOSPC, "No space left on device")
    with fake_gpu(Failing(error)):
        for failing in (lambda: triton.compile_together(step), step):
            with pytest.raises(UserError, match=r"could not be written or read back \(\[Errno 28\] No space left"):
                failing()


@on_the_fake_gpu
@pytest.mark.parametrize("run", ["muon", "greedy"])
def test_an_operator_in_plain_pytorch_is_not_given_what_no_kernel_has_written(run, monkeypatch):
    """What comes before it is compiled, what comes after it when it is called."""
    step, compiler, called = STEPS[run](), InstantCompiler(), []
    reference = ops.moe_experts.__globals__["moe_experts_reference"]
    monkeypatch.setitem(
        ops.moe_experts.__globals__, "moe_experts_reference", lambda *a, **k: (called.append(1), reference(*a, **k))[1]
    )
    with fake_gpu(compiler) as driver, poisoned(), ops.use("reference", "moe_experts"):
        triton.compile_together(step)
        assert called == driver.started == []
        assert "forward_kernel" in {name for name, *_ in compiler.sources}


@on_the_fake_gpu
def test_other_threads_start_their_kernels():
    x, weight = torch.ones(2, 16), torch.ones(16)

    def call():
        other = threading.Thread(target=lambda: ops.rms_norm(x, weight, 1e-6))
        other.start()
        other.join()
        ops.rms_norm(x.double().float(), weight, 1e-6)

    with fake_gpu(InstantCompiler()) as driver:
        triton.compile_together(call)
        assert len(driver.started) == 1


@on_the_fake_gpu
def test_a_backward_pass_stays_in_the_thread_that_calls():
    """On a GPU it has one of its own, to which `compiling` would not reach."""
    inside = []
    with fake_gpu(InstantCompiler()):
        triton.compile_together(lambda: inside.append(torch._C._is_multithreading_enabled()))
    assert inside == [False]
    assert torch._C._is_multithreading_enabled()


@on_the_fake_gpu
def test_tensors_are_not_kept():
    kept = []

    def call():
        x = torch.ones(2, 16)
        kept.append(weakref.ref(x))
        ops.rms_norm(x, torch.ones(16), 1e-6)

    with fake_gpu(InstantCompiler()):
        triton.compile_together(call)
        gc.collect()
        assert kept[0]() is None


@on_the_fake_gpu
def test_with_tritons_own_compiler(monkeypatch, tmp_path):
    """Two kernels, forward and backward; the launch that follows finds them."""
    from triton import knobs

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x = torch.ones(2, 16, requires_grad=True)
    compiled = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda src, **about: compiled.append(src.fn.__name__))

    def call():
        ops.rms_norm(x, torch.ones(16), 1e-6).sum().backward()

    with fake_gpu() as driver:
        triton.compile_together(call)
        found = list(compiled)
        assert len(found) == len(set(found)) >= 2
        assert sorted(driver.launchers) == sorted(found)
        assert driver.started == []
        call()
        assert compiled == found
        assert set(driver.started) == set(found)
    assert {path.stem for path in tmp_path.rglob("*.cubin")} == set(found)


def test_without_triton_nothing_is_called(monkeypatch):
    """All operators are PyTorch's then."""
    monkeypatch.setattr(triton, "missing", lambda: "triton is not installed")
    triton.compile_together(lambda: pytest.fail("called"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_backward_pass_on_a_gpu_stays_in_the_thread_that_calls():
    x = torch.ones(2, 16, device="cuda", requires_grad=True)
    weight = torch.ones(16, device="cuda", requires_grad=True)
    threads = []

    def call():
        y = ops.rms_norm(x, weight, 1e-6)
        y.register_hook(lambda gradient: threads.append(threading.get_ident()))
        y.sum().backward()

    triton.compile_together(call)
    assert threads == [threading.get_ident()]
    call()
    assert len(threads) == 2
    assert threads[1] != threads[0], "as it is outside"
    torch.cuda.synchronize()
