"""The GPU's training step, run on CPU tensors: the same numbers as the CPU's own, and nothing that a CUDA graph forbids."""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from guard import GraphGuard, NotCapturableError, addresses, kept_by_step, operators_called
from operator_cases import needs_native
from tiny import tiny_config, tiny_dataset

from dsfast import ops
from dsfast.errors import UserError
from dsfast.model import capture, captured
from dsfast.ops import triton
from dsfast.train import (
    Interrupted,
    Trainer,
    TrainingError,
    build_optimizer,
    load_checkpoint,
    runtime,
    steps,
)
from dsfast.train.optimizer import learning_rate_scale
from dsfast.train.steps import DeviceSteps, HostSteps

FALLBACK = "ignore:.*runs in plain PyTorch"
BY_OPERATORS = {"runtime.whole_step": False}


def eager(step):
    """Launch the step as it is."""
    return step


def host_trainer(output_dir=None, **changes) -> Trainer:
    return Trainer(tiny_config(**{**BY_OPERATORS, **changes}), output_dir, tiny_dataset())


def device_trainer(output_dir=None, launch=eager, **changes) -> Trainer:
    """A trainer whose steps are those of a GPU, on CPU tensors."""
    trainer = host_trainer(output_dir, **changes)
    trainer.steps = partial(DeviceSteps, trainer, launch)
    return trainer


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    tensors = {**trainer.model.state_dict(), **trainer.optimizer.state_dict()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def test_a_process_that_trains_does_not_import_sympy():
    """It takes a third of a second, and torch.autograd.grad does for a gradient that it is given."""
    code = (
        "import sys, test_device_step; test_device_step.device_trainer().train(quiet=True);"
        " sys.exit('sympy' in sys.modules)"
    )
    folder = Path(__file__).parent
    child = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr


def prepared(trainer: Trainer) -> DeviceSteps | HostSteps:
    """Steps that are ready to run."""
    steps = trainer.steps()
    steps.prepare()
    return steps


def first_block(**changes) -> DeviceSteps:
    """Steps of which five are done, none launched ahead: a checkpoint is due."""
    steps = prepared(device_trainer(**{"train.checkpoint_every": 5, **changes}))
    list(steps.run())
    return steps


def reports(trainer: Trainer) -> list:
    """The report and the loads of every step of the run."""
    steps, done = prepared(trainer), []
    while trainer.steps_done < trainer.config.train.steps:
        done += [(report, [load.clone() for load in loads]) for report, loads in steps.run()]
    return done


def assert_same_run(found: Trainer, expected: Trainer, rtol: float) -> None:
    """Step by step: losses, norms, rates, loads; then weights, moments, biases, counters and what the routers counted last."""
    for (a, a_loads), (b, b_loads) in zip(reports(found), reports(expected), strict=True):
        assert (a.step, a.lr, a.skipped, a.tokens) == (b.step, b.lr, b.skipped, b.tokens)
        assert a.loss == pytest.approx(b.loss, rel=rtol), f"step {a.step}"
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=10 * rtol), f"step {a.step}"
        assert all(torch.equal(x, y) for x, y in zip(a_loads, b_loads, strict=True)), f"step {a.step}"
    last = [[router.load.tolist() for router in trainer.model.routers()] for trainer in (found, expected)]
    assert last[0] == last[1]
    ours, theirs = state(found), state(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, theirs[name], rtol=100 * rtol, atol=10 * rtol, msg=lambda m, n=name: f"{n}: {m}"
        )


class TestTheSameNumbers:
    """1e-6 of a loss: rates and clip factor are rounded to float32 on a device, and are Python's float64 on the CPU.

    In these ten steps no loss differed by a bit on the machine where this was written, weights by 6e-8 at most.
    """

    @pytest.mark.parametrize("kind", ["adamw", "muon"])
    def test_as_the_cpu_loop_with_its_kernels(self, kind):
        needs_native()
        changes = {"train.optimizer": kind, "train.grad_clip": 0.5}
        assert_same_run(device_trainer(**changes), host_trainer(**changes), 1e-6)

    @pytest.mark.parametrize("kind", ["adamw", "muon"])
    def test_in_plain_pytorch(self, kind):
        changes = {"train.optimizer": kind, "runtime.kernels": {"default": "reference"}, "train.decay": "cosine"}
        assert_same_run(device_trainer(**changes), host_trainer(**changes), 1e-6)

    def test_with_multi_token_prediction(self):
        changes = {"model.num_nextn_predict_layers": 1, "train.mtp_loss_weight": 0.7}
        assert_same_run(device_trainer(**changes), host_trainer(**changes), 1e-6)

    def test_with_dense_layers_alone(self):
        changes = {"model.first_k_dense_replace": 2, "train.steps": 3}
        assert_same_run(device_trainer(**changes), host_trainer(**changes), 1e-6)

    def test_as_the_whole_step_in_one_native_call(self):
        """Its sums have another order: 1e-5."""
        needs_native()
        expected = host_trainer(**{"runtime.whole_step": True})
        assert_same_run(device_trainer(), expected, 1e-5)
        assert expected.gradients.in_one_call

    @pytest.mark.filterwarnings(FALLBACK)
    def test_in_bfloat16_as_loss_in(self):
        """Casts to copies at fixed addresses instead of new tensors: the same bits, if the loop computes in bfloat16 too."""
        trainers = [device_trainer(**{"train.steps": 4}), host_trainer(**{"train.steps": 4})]
        for trainer in trainers:
            trainer.precision = trainer.precision._replace(tensors=torch.bfloat16)
        trainers[1].gradients.dtype = torch.bfloat16
        with ops.use("auto"):
            assert_same_run(*trainers, 1e-6)
        losses = [report.loss for report, _ in reports(device_trainer(**{"train.steps": 4}))]
        assert losses[0] != pytest.approx(reports(host_bfloat16())[0][0].loss, rel=1e-7), "it did compute in bfloat16"

    def test_batches_in_several_loads(self, monkeypatch):
        """3 places for 10 steps."""
        trainer = device_trainer()
        monkeypatch.setattr(steps, "RESIDENT_BYTES", 3 * 8 * (3 * 48 + 30))
        places = len(trainer.steps().step.batches.rows)
        assert 3 <= places < 5
        assert_same_run(trainer, host_trainer(), 1e-6)


def host_bfloat16() -> Trainer:
    trainer = host_trainer(**{"train.steps": 1})
    trainer.gradients.dtype = torch.bfloat16
    return trainer


class TestTheLoop:
    def test_writes_what_the_cpu_loop_writes(self, tmp_path, capsys):
        folders = {}
        for name, make in (("host", host_trainer), ("device", device_trainer)):
            trainer = make(tmp_path / name, **{"train.checkpoint_every": 4})
            result = trainer.train()
            lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
            assert [line["loss"] for line in lines] == result.losses
            squares = (sum(share**2 for share in shares) for shares in lines[-1]["expert_load"])
            assert result.experts_used == pytest.approx([1 / total for total in squares])
            shown = capsys.readouterr().out.splitlines()
            assert [line.split(" in ")[0] for line in shown if "step " not in line[:5]] == ["prepared"] * (
                name == "device"
            )
            assert (result.preparation_seconds is None) == (name == "host")
            assert result.utilisation is None, "there is no other clock on a CPU"
            printed = [line.split(" tokens/s")[0].rsplit("  ", 1)[0] for line in shown if line.startswith("step ")]
            kept = sorted(path.name for path in (tmp_path / name).iterdir())
            folders[name] = (lines, printed, kept, [(result.steps, result.skipped_steps, result.checkpoint.name)])
        assert folders["host"][1:] == folders["device"][1:]
        for a, b in zip(folders["host"][0], folders["device"][0], strict=True):
            assert a.keys() == b.keys()
            exactly = ("step", "lr", "skipped", "expert_load")
            assert [a[name] for name in exactly] == [b[name] for name in exactly]
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)

    @pytest.mark.parametrize("kind", ["adamw", "muon"])
    def test_resumes_bit_for_bit(self, tmp_path, kind):
        changes = {"train.optimizer": kind, "train.checkpoint_every": 4}
        whole = device_trainer(tmp_path / "whole", **changes)
        whole.train(quiet=True)
        rest = device_trainer(**changes)
        result = rest.train(tmp_path / "whole" / "step-000004", quiet=True)
        assert (result.steps, len(result.losses)) == (10, 6)
        expected = state(whole)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state(rest).items())
        assert rest.optimizer.updates == 10

    @pytest.mark.usefixtures("terminal")
    @pytest.mark.parametrize(("at", "last"), [(1, 4), (3, 4), (5, 6), (10, 10)])
    def test_a_signal_ends_it_after_what_is_launched(self, tmp_path, at, last):
        """Blocks of two: in the first, and in the first ahead, it is noticed when the first is read; then one after the other."""
        trainer = device_trainer(tmp_path / "run", partial(signalling, at=at), **{"train.log_every": 2})
        former = signal.getsignal(signal.SIGINT)
        with pytest.raises(Interrupted, match=rf"stopped after step {last} of 10; saved as .*step-0000{last:02}"):
            trainer.train(quiet=True)
        assert signal.getsignal(signal.SIGINT) is former
        assert trainer.optimizer.updates == last
        expected = state(stopped_after(last))
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state(trainer).items())
        model, _, _ = load_checkpoint(tmp_path / "run")
        assert all(torch.equal(x, trainer.model.state_dict()[name]) for name, x in model.state_dict().items())

    def test_ids_out_of_range_are_noticed_when_batches_are_loaded(self):
        data = tiny_dataset()
        stream = data.rows.stream.copy()
        stream[5] = 300
        trainer = device_trainer()
        trainer.dataset = replace(data, rows=replace(data.rows, stream=stream))
        with pytest.raises(UserError, match=r"expected 0 .. 299, got 300"):
            reports(trainer)

    def test_the_cpu_has_its_own_steps(self):
        assert isinstance(host_trainer().steps(), HostSteps)


class Mark:
    """A GPU's event, made up: it takes a second from one to the next, and says when it is waited for."""

    def __init__(self, log: list):
        log.append("mark")
        self.log, self.second = log, log.count("mark")

    def synchronize(self) -> None:
        self.log.append("wait")

    def elapsed_time(self, later: Mark) -> float:
        return 1e3 * (later.second - self.second)


class TestRunningAhead:
    def log_of(self, monkeypatch, **changes) -> list[str | int]:
        """Of a run in blocks of two: every mark, every wait for one, the step of every call and of every report."""
        log, calls = [], []
        monkeypatch.setattr(steps, "mark", lambda device: Mark(log))

        def launch(step):
            def call():
                calls.append(None)
                log.append(f"call {len(calls)}")
                step()

            return call

        trainer = device_trainer(None, launch, **{"train.steps": 8, "train.log_every": 2, **changes})
        count, self.steps, self.seconds = trainer.count_step, trainer.steps(), []

        def count_step(*values):
            log.append(f"report {trainer.steps_done + 1}")
            self.seconds.append(values[-1])
            return count(*values)

        trainer.count_step, trainer.steps = count_step, lambda: self.steps
        self.result = trainer.train(quiet=True)
        return [entry for entry in log if entry != "mark"]

    def test_the_next_steps_are_launched_before_one_is_waited_for(self, monkeypatch):
        first, rest = ["call 1", "call 2"], []
        for step in (3, 5, 7):
            rest += [f"call {step}", f"call {step + 1}", "wait", f"report {step - 2}", f"report {step - 1}"]
        assert self.log_of(monkeypatch) == [*first, *rest, "wait", "report 7", "report 8"]
        assert self.steps.busy_seconds == 4.0  # a second for each block
        assert self.result.utilisation == pytest.approx(4.0 / sum(self.seconds))

    def test_steps_launched_kernel_by_kernel_tell_of_no_busy_device(self, monkeypatch):
        monkeypatch.setattr(steps, "mark", lambda device: Mark([]))
        assert device_trainer().train(quiet=True).utilisation is None

    def test_not_beyond_a_checkpoint(self, monkeypatch):
        log = self.log_of(monkeypatch, **{"train.checkpoint_every": 4})
        assert log.index("report 4") < log.index("call 5")
        assert log.index("call 3") < log.index("report 1")

    def test_a_checkpoint_holds_the_weights_of_its_step(self, tmp_path):
        device_trainer(tmp_path / "run", **{"train.log_every": 2, "train.checkpoint_every": 6}).train(quiet=True)
        saved, _, _ = load_checkpoint(tmp_path / "run" / "step-000006")
        expected = stopped_after(6).model.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in saved.state_dict().items())

    def test_not_beyond_the_batches_that_are_loaded(self, monkeypatch):
        monkeypatch.setattr(steps, "RESIDENT_BYTES", 3 * 8 * (3 * 48 + 30))
        places = len(device_trainer().steps().step.batches.rows)
        log = self.log_of(monkeypatch)
        for step in range(places, 8, places):
            assert log.index(f"report {step}") < log.index(f"call {step + 1}")

    def test_what_is_sent_stays_as_it_was(self):
        """Later steps write to other places, and after other batches are loaded to the same ones."""
        steps = first_block()
        sent = steps.step.sent(0, 5)
        before = [x.clone() for x in sent]
        for tensor in (steps.step.measured, steps.step.loads):
            tensor.fill_(7)
        assert all(torch.equal(x, y) for x, y in zip(sent, before, strict=True))

    def test_preparation_takes_the_time_from_its_begin_to_its_end(self, monkeypatch):
        clock = SimpleNamespace(now=3.0)
        monkeypatch.setattr(steps, "perf_counter", lambda: clock.now)

        def launch(step):
            clock.now += 2.5
            return step

        assert prepared(device_trainer(launch=launch)).preparation_seconds == 2.5

    def test_the_time_of_the_steps_is_that_of_the_run(self, monkeypatch):
        """Each moment from the first launch to the last read is of one block: looked at 2 times preparing, then at 5 + 5."""
        looks = []
        monkeypatch.setattr(steps, "perf_counter", lambda: looks.append(None) or float(len(looks)))
        trainer = device_trainer(**{"train.log_every": 2})
        found = reports(trainer)
        assert sum(report.seconds for report, _ in found) == pytest.approx(12 - 3)
        assert all(report.seconds > 0 for report, _ in found)


def stopped_after(steps: int) -> Trainer:
    """A trainer that did its first `steps` steps, each by itself."""
    trainer = device_trainer(**{"train.checkpoint_every": 1})
    ready = prepared(trainer)
    for _ in range(steps):
        list(ready.run())
    return trainer


def signalling(step, at: int):
    """The step, which at its call number `at` sends this process SIGINT."""
    calls = []

    def call():
        calls.append(None)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)
        step()

    return call


def poisoned(values: dict[int, float], trainer: Trainer) -> None:
    """Multiply one gradient by values[step] (from 0), the step counted on the device."""
    factors = torch.tensor([values.get(step, 1.0) for step in range(trainer.config.train.steps)])
    target = dict(trainer.model.named_parameters())["layers.1.self_attn.o_proj.weight"]
    steps = trainer.steps()
    trainer.steps = lambda: steps
    target.register_hook(lambda grad: grad * factors.index_select(0, steps.step.place))


class TestNotFinite:
    @pytest.mark.parametrize("kind", ["adamw", "muon"])
    def test_nothing_is_updated_it_is_counted_and_the_run_goes_on(self, kind, tmp_path):
        bad = {0: math.nan, 3: math.nan, 4: math.inf, 6: -math.inf}
        trainer = device_trainer(**{"train.optimizer": kind, "train.checkpoint_every": 1})
        poisoned(bad, trainer)
        steps, skipped = prepared(trainer), []
        for step in range(10):
            before, biases = state(trainer), [r.e_score_correction_bias.clone() for r in trainer.model.routers()]
            ((report, _),) = steps.run()
            after = state(trainer)
            assert all(torch.equal(before[n], after[n]) for n in before) == (step in bad)
            same = [
                torch.equal(b, r.e_score_correction_bias) for b, r in zip(biases, trainer.model.routers(), strict=True)
            ]
            assert all(same) or step not in bad
            assert int(steps.step.update) - 1 == trainer.optimizer.updates == int(after["adamw.updates"])
            skipped += [report.step] if report.skipped else []
        assert skipped == [1, 4, 5, 7]
        assert trainer.optimizer.updates == 6
        assert not any(tensor.isnan().any() for tensor in state(trainer).values())

    def test_a_loss_that_is_not_finite_with_gradients_that_are(self):
        trainer = device_trainer(**{"train.log_every": 1})
        steps = prepared(trainer)
        inner = steps.step.weights.loss_and_gradients
        steps.step.weights.loss_and_gradients = lambda *a: (lambda loss, g: (loss * math.inf, g))(*inner(*a))
        before = state(trainer)
        ((report, _),) = steps.run()
        assert (report.loss, report.skipped) == (math.inf, True)
        assert math.isfinite(report.grad_norm)
        assert all(torch.equal(tensor, before[name]) for name, tensor in state(trainer).items())

    def test_the_same_run_as_the_cpu_loop(self):
        bad = {0: math.nan, 5: math.inf}
        found, expected = device_trainer(), host_trainer()
        poisoned(bad, found)
        target = dict(expected.model.named_parameters())["layers.1.self_attn.o_proj.weight"]
        target.register_hook(lambda grad: grad * bad.get(expected.steps_done, 1.0))
        for (a, _), (b, _) in zip(reports(found), reports(expected), strict=True):
            assert (a.step, a.skipped, a.lr) == (b.step, b.skipped, b.lr)
            assert a.loss == pytest.approx(b.loss, rel=1e-6)
        assert found.optimizer.updates == expected.optimizer.updates == 8

    def test_too_many_in_a_row_end_the_run_at_the_next_log_line(self):
        trainer = device_trainer(**{"train.max_bad_steps": 2})
        poisoned(dict.fromkeys(range(2, 10), math.inf), trainer)
        with pytest.raises(
            TrainingError, match=r"step 4: 2 steps in a row .*gradient of 'layers.1.self_attn.o_proj.weight'"
        ):
            trainer.train(quiet=True)


def on_meta(kind: str, dtype: torch.dtype, monkeypatch) -> DeviceSteps:
    """Steps whose tensors have no memory, every operator taking its GPU kernels' way (of which only the shapes are made)."""
    monkeypatch.setitem(ops.dispatch._OF_DEVICE, "meta", "triton")
    monkeypatch.setattr(triton, "available", lambda operator: (True, ""))
    trainer = host_trainer(**{"train.optimizer": kind, "model.num_nextn_predict_layers": 1})
    trainer.device = torch.device("meta")
    trainer.model.to("meta")
    trainer.optimizer = build_optimizer(trainer.model, trainer.config.train, dtype)
    trainer.precision = trainer.precision._replace(tensors=dtype)
    steps = DeviceSteps(trainer, eager)
    steps._load()
    return steps


class TestWhatAGraphForbids:
    """Run with the C++ kernels: what plain PyTorch does inside an operator is not what a GPU runs."""

    @pytest.mark.parametrize("kind", ["adamw", "muon"])
    @pytest.mark.parametrize("mtp", [0, 1])
    def test_no_wait_no_shape_from_data_no_new_address(self, kind, mtp):
        needs_native()
        steps = first_block(**{"train.optimizer": kind, "model.num_nextn_predict_layers": mtp})
        trainer = steps.trainer
        before, losses = addresses(steps.step), []
        with trainer.kernels():
            for _ in range(4):
                with GraphGuard() as guard:
                    assert kept_by_step(steps.step, trainer.model) == []
                assert {"dsfast::mla_attention_backward", "dsfast::grad_clip", "dsfast::adamw"} <= set(guard.seen)
                assert addresses(steps.step) == before
                place = int(steps.step.place)
                losses.append(steps.step.measured[place - 1, 0].item())
        assert len(set(losses)) == 4

    @pytest.mark.parametrize("kind", ["adamw", "muon"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_on_a_device_without_memory(self, kind, dtype, monkeypatch):
        """Torch's meta device stands for a GPU: no value can be read, and a number left on the host is of another device."""
        steps = on_meta(kind, dtype, monkeypatch)
        with steps.trainer.kernels():
            steps.step()
            with GraphGuard() as guard:
                steps.step()
        inside = {"newton_schulz"} | ({"muon"} if kind == "adamw" else set())  # the first inside of muon
        at_once = ("mla_output", "mla_project") if dtype == torch.bfloat16 else ()  # rope is inside of the second
        wanted = set(ops.OPERATORS) - {"mla_decode"} - inside - ({"rope"} if at_once else set())
        assert wanted <= operators_called(guard.seen)
        inside_layers = {name + end for name in at_once for end in ("", "_backward")}
        others = {"grad_clip", "update_bias", "record_step"} | inside_layers
        assert {f"dsfast::{name}" for name in others} <= set(guard.seen)

    def test_there_a_number_of_the_hosts_is_noticed(self, monkeypatch):
        steps = on_meta("muon", torch.float32, monkeypatch)
        inner, zero = steps.step._gradients, torch.tensor(0.0)
        steps.step._gradients = lambda batch: torch.where((loss := inner(batch)) > 0, loss, zero)
        with steps.trainer.kernels():
            steps.step()
            with pytest.raises(NotCapturableError, match="takes a tensor from the host"), GraphGuard():
                steps.step()

    @pytest.mark.parametrize(
        "forbidden",
        [
            lambda x: x.item(),
            lambda x: float(x),
            lambda x: bool(x > 0),
            lambda x: x[None].tolist(),
            lambda x: x[None].nonzero(),
            lambda x: x[None][x[None] > 0],
            lambda x: x[None].masked_select(x[None] > 0),
            lambda x: x[None].unique(),
            lambda x: x.to("cpu"),
            lambda x: x.cpu(),
            lambda x: x.numpy(),
            lambda x: x.double().to(device="cpu", copy=True),
            lambda x: torch.repeat_interleave(x[None], x[None].long()),
            lambda x: torch.bincount(x[None].long()),
            lambda x: torch.equal(x, x),
            lambda x: torch.tensor(1.0, device=x.device),
            lambda x: torch.as_tensor([1.0]),
            lambda x: x.new_tensor([1.0]),
            lambda x: torch.zeros(1).to("meta"),
        ],
    )
    def test_the_guard_notices(self, forbidden):
        steps = first_block()
        trainer = steps.trainer
        inner = steps.step._gradients

        def injected(batch):
            loss = inner(batch)
            forbidden(loss)
            return loss

        steps.step._gradients = injected
        with trainer.kernels(), pytest.raises(NotCapturableError), GraphGuard():
            steps.step()

    def test_the_addresses_would_show_new_gradients(self):
        steps = first_block()
        before = addresses(steps.step)
        for parameter in steps.step.parameters:
            parameter.grad = parameter.grad.clone()
        assert addresses(steps.step) != before


class TestCapture:
    """Without a GPU: the stream and the recording are stood in for."""

    @pytest.fixture(autouse=True)
    def no_gpu(self, monkeypatch):
        monkeypatch.setattr(capture, "_side_stream", nullcontext)

    def test_warm_up_and_recording_change_nothing(self, monkeypatch):
        calls = []

        def record(step):
            def replay():
                calls.append(None)
                step()
                for router in step.routers:  # the model knows of another recording's counts
                    router.load = torch.zeros_like(router.load)

            step()
            return SimpleNamespace(replay=replay)

        monkeypatch.setattr(capture, "record", record)
        trainer = device_trainer(launch=captured)
        assert_same_run(trainer, host_trainer(), 1e-6)
        assert len(calls) == 10
        plain, warmed = device_trainer(), device_trainer(launch=captured)
        assert [r.loss for r, _ in reports(plain)] == [r.loss for r, _ in reports(warmed)]
        assert all(torch.equal(tensor, state(plain)[name]) for name, tensor in state(warmed).items())

    def test_state_is_everything_that_a_step_changes(self):
        steps = first_block()
        everything = {id(x): x for x in [*steps.step.state(), *steps.trainer.model.state_dict().values()]}
        before = {key: x.clone() for key, x in everything.items()}
        optimizer = state(steps.trainer)
        with capture.unchanged(steps.step.state()), steps.trainer.kernels():
            steps.step()
        assert all(torch.equal(x, before[key]) for key, x in everything.items())
        assert all(torch.equal(x, optimizer[name]) for name, x in state(steps.trainer).items())

    def test_what_compiling_has_changed_is_put_back_before_the_first_call(self, doubling, monkeypatch):
        seen, call = [], type(doubling).__call__
        monkeypatch.setattr(type(doubling), "__call__", lambda self: (seen.append(self.state()[0].item()), call(self)))
        monkeypatch.setattr(triton, "compile_together", lambda step: step())
        monkeypatch.setattr(capture, "record", lambda step: SimpleNamespace(replay=step.__call__))
        captured(doubling)
        assert seen == [1, 1]

    def test_a_step_knows_for_how_many_calls_it_has_batches(self):
        steps = first_block()
        assert steps.step.consecutive == steps.loaded - steps.first > 1

    def test_where_it_fails_the_steps_are_launched_one_by_one_and_it_is_said(self, monkeypatch):
        def record(step):
            step()
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

        monkeypatch.setattr(capture, "record", record)
        trainer = device_trainer(launch=captured)
        with pytest.warns(
            ops.FallbackWarning, match="train_step is launched operator by operator: capture as a CUDA graph"
        ):
            assert_same_run(trainer, host_trainer(), 1e-6)
        (row,) = ops.fallbacks()
        assert row["device"] == "cuda"
        assert row["reason"].endswith("operation not permitted when stream is capturing")

    def test_it_is_said_what_went_wrong_in_the_capture_and_not_that_it_could_not_be_ended(self, monkeypatch):
        def record(step):
            try:
                raise RuntimeError("the cause")
            finally:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

        monkeypatch.setattr(capture, "record", record)
        with pytest.warns(ops.FallbackWarning, match="capture as a CUDA graph failed: the cause$"):
            device_trainer(launch=captured).train(quiet=True)

    def test_a_step_that_waits_for_the_device_is_found_out_before_the_capture(self, monkeypatch):
        log, modes, streams, inside = [], ["warn"], [], []
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the caller's")
        monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: log.append("replay")))
        monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool, stream: nullcontext(log.append("capture")))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(capture, "_stream", lambda device, priority: f"of priority {priority}")

        def step():
            log.append(modes[-1])
            inside.append((gc.isenabled(), torch._C._is_multithreading_enabled()))

        capture.record(step).replay()
        assert log == ["error", "capture", "warn", "replay"]
        assert inside == [(True, False), (False, False)]  # no garbage is collected in a capture
        assert (gc.isenabled(), torch._C._is_multithreading_enabled()) == (True, True)

        def waiting():
            raise RuntimeError("called a synchronizing CUDA operation")

        with pytest.raises(RuntimeError, match="called a synchronizing"):
            capture.record(waiting)
        assert log.count("capture") == 1
        assert modes[-1] == "warn"

        def failing():
            if modes[-1] == "warn":
                raise RuntimeError("not permitted when stream is capturing")

        with pytest.raises(RuntimeError, match="not permitted"):
            capture.record(failing)
        assert gc.isenabled()
        assert streams == ["the caller's"] * 2  # after a capture that failed as well

    def test_branches_are_made_before_the_capture_and_used_before_and_inside(self, monkeypatch):
        log = []

        def logged(name):
            log.append(f"make {name}")
            return contextmanager(lambda: (yield log.append(name)))()

        monkeypatch.setattr(capture, "_waiting_refused", nullcontext)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the caller's")
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
        monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool, stream: logged(f"capture on {stream}"))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(capture, "_stream", lambda device, priority: f"priority {priority}")
        monkeypatch.setattr(triton, "branches", lambda: logged("branches"))
        capture.record(lambda: log.append("step"), branched=True)
        captures = "capture on priority -1"
        before = ["make branches", "branches", "step"]  # the same way as inside
        assert log == [*before, "make branches", f"make {captures}", captures, "branches", "step"]

    @pytest.fixture
    def doubling(self):
        """A step that adds to a number what it first writes elsewhere: the number itself."""
        number, elsewhere = torch.ones((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)

        class Doubling:
            name, consecutive = "doubling", 3

            def __call__(self):
                elsewhere.copy_(number)
                number.add_(elsewhere)

            def early(self):
                number.add_(elsewhere)
                elsewhere.copy_(number // 2)

            def state(self):
                return [number]

        return Doubling()

    @pytest.mark.parametrize(("chain", "branches"), [(1.0, 0.5), (0.5, 1.0)])
    def test_the_faster_of_two_recordings_that_leave_the_same_bits_is_taken(
        self, doubling, chain, branches, monkeypatch
    ):
        recordings, neighbours = {}, []

        def record(step, branched=False, beside=None):
            neighbours.append(beside)
            recordings[branched] = SimpleNamespace(replay=step.__call__)
            return recordings[branched]

        def seconds(call, times):
            assert times == doubling.consecutive
            for _ in range(times):
                call()
            return branches if call is recordings[True].replay else chain

        monkeypatch.setattr(capture, "record", record)
        monkeypatch.setattr(capture, "_seconds", seconds)
        assert captured(doubling, branched=True) is recordings[branches < chain].replay
        assert neighbours == [None, recordings[False]], "they share their memory"
        assert doubling.state()[0] == 1
        assert not ops.fallbacks()

    @pytest.mark.parametrize("kind", ["too early", "wrong at first", "wrong at last"])
    def test_one_that_leaves_other_bits_is_not_taken_and_it_is_said(self, doubling, kind, monkeypatch):
        """Even if it reads what the replay before it left, or goes well but for one time."""
        chain, replays = SimpleNamespace(replay=doubling.__call__), []
        wrong_at = {"wrong at first": 1, "wrong at last": capture.COMPARED * doubling.consecutive}.get(kind)

        def replay():
            replays.append(None)
            doubling.early() if kind == "too early" else doubling()
            doubling.state()[0].add_(len(replays) == wrong_at)

        branches = SimpleNamespace(replay=replay)
        monkeypatch.setattr(
            capture, "record", lambda step, branched=False, beside=None: branches if branched else chain
        )
        monkeypatch.setattr(capture, "_seconds", lambda call, times: [call() for _ in range(times)] and 1.0)
        with pytest.warns(ops.FallbackWarning, match="doubling is recorded as one chain: .* it leaves other numbers"):
            assert captured(doubling, branched=True) is chain.replay
        assert doubling.state()[0] == 1

    @pytest.mark.parametrize("where", ["recording", "comparing"])
    def test_one_that_fails_leaves_the_chain_and_it_is_said(self, doubling, where, monkeypatch):
        chain = SimpleNamespace(replay=doubling.__call__)

        def failing(*arguments):
            doubling()
            raise torch.OutOfMemoryError("no room\nmore")

        def record(step, branched=False, beside=None):
            return failing() if branched and where == "recording" else chain

        monkeypatch.setattr(capture, "record", record)
        monkeypatch.setattr(capture, "_seconds", failing)
        with pytest.warns(ops.FallbackWarning, match="its recording with branches failed: no room$"):
            assert captured(doubling, branched=True) is chain.replay
        assert doubling.state()[0] == 1

    @pytest.mark.parametrize(("most", "consecutive"), [(7, 3), (8, 1)])
    def test_a_step_with_much_state_or_for_one_call_is_recorded_once(self, doubling, most, consecutive, monkeypatch):
        chain = SimpleNamespace(replay=doubling.__call__)
        doubling.consecutive = consecutive
        monkeypatch.setattr(capture, "COMPARED_BYTES", most)
        monkeypatch.setattr(capture, "record", lambda step: chain)
        assert captured(doubling, branched=True) is chain.replay

    def test_a_recording_is_made_on_the_device_of_the_step(self, doubling, monkeypatch):
        """On the current one, another, it would be empty: no error, and tokens that nobody chose."""
        entered = []

        @contextmanager
        def device_of(x):
            entered.append(x)
            yield
            entered.append(None)

        def record(step):
            assert entered[-1] is not None
            return SimpleNamespace(replay=step.__call__)

        monkeypatch.setattr(torch.cuda, "device_of", device_of)
        monkeypatch.setattr(capture, "record", record)
        captured(doubling)
        assert [x is doubling.state()[0] for x in entered] == [True, False]

    @pytest.mark.parametrize(("most", "copied_to_the_host"), [(8, False), (7, True)])
    def test_much_state_waits_in_the_hosts_memory(self, doubling, most, copied_to_the_host, monkeypatch):
        """A copy in the GPU's would be one more of all weights and averages."""
        monkeypatch.setattr(capture, "COMPARED_BYTES", most)
        copied, to = [], torch.Tensor.to
        monkeypatch.setattr(
            torch.Tensor, "to", lambda x, *how, **named: (copied.append((how, named)), to(x, *how, **named))[1]
        )
        with capture.unchanged(doubling.state()) as restore:
            doubling()
            restore()
            assert doubling.state()[0] == 1
            doubling()
        assert doubling.state()[0] == 1
        assert copied == [(("cpu",), {"copy": True})] * copied_to_the_host

    @pytest.mark.parametrize("branched", [False, True])
    def test_ctrl_c_during_a_capture_that_cannot_be_ended_is_ctrl_c(self, doubling, branched, monkeypatch):
        def record(step, branched=False, beside=None):
            if branched or not also_branched:
                try:
                    raise KeyboardInterrupt
                finally:
                    raise RuntimeError("the capture could not be ended")
            return SimpleNamespace(replay=step.__call__)

        also_branched = branched
        monkeypatch.setattr(capture, "record", record)
        with pytest.raises(KeyboardInterrupt):
            captured(doubling, branched=branched)
        assert doubling.state()[0] == 1

    @pytest.mark.parametrize("on_top", [False, True])
    def test_out_of_memory_is_no_reason_for_another_way(self, on_top, monkeypatch):
        def record(step):
            try:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
            finally:
                if on_top:
                    raise RuntimeError("the capture could not be ended")

        monkeypatch.setattr(capture, "record", record)
        trainer = device_trainer(launch=captured)
        expected = (
            r"out of GPU memory after step 0 with train.batch_size 3 and data.sequence_length 16: lower one of them; no "
            r"checkpoint was written \(CUDA out of memory. Tried to allocate 2.00 GiB.\)$"
        )
        with pytest.raises(UserError, match=expected):
            trainer.train(quiet=True)


class TestAGpuThatFails:
    def failing(self, tmp_path, error: Exception) -> Trainer:
        """At step 6, after a checkpoint at 5."""

        def launch(step):
            calls = []

            def call():
                calls.append(None)
                if len(calls) == 7:
                    raise error
                step()

            return call

        return device_trainer(tmp_path / "run", launch, **{"train.checkpoint_every": 5})

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (torch.OutOfMemoryError("CUDA out of memory.\n"), "out of GPU memory after step 5 with train.batch_size 3"),
            (
                torch.AcceleratorError("CUDA error: unspecified launch failure\nmore"),
                "the GPU failed after step 5: CUDA error",
            ),
            (RuntimeError("CUDA error: device lost"), "the GPU failed after step 5: CUDA error: device lost"),
            (RuntimeError("CUDA driver error: unknown error"), "the GPU failed after step 5: CUDA driver error"),
            (
                RuntimeError("Triton Error [CUDA]: an illegal memory access"),
                "the GPU failed after step 5: Triton Error",
            ),
            (
                RuntimeError("Triton Error [CUDA]: out of memory"),
                "out of GPU memory after step 5 with train.batch_size 3",
            ),
            *(
                (RuntimeError(said), f"the GPU failed after step 5: {said}")
                for said in (
                    "CUDA unknown error - this may be due to an incorrectly set up environment",
                    "NVML_SUCCESS == r INTERNAL ASSERT FAILED at somewhere",
                    "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before",
                    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
                    "No CUDA GPUs are available",
                )
            ),
            (RuntimeError("CUDA error: out of memory\nmore"), "out of GPU memory after step 5 with train.batch_size 3"),
            (
                RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
                "out of GPU memory after step 5 with train.batch_size 3",
            ),
        ],
    )
    def test_ends_with_one_line_and_leaves_the_checkpoint(self, tmp_path, error, message):
        with pytest.raises(UserError) as caught:
            self.failing(tmp_path, error).train(quiet=True)
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)
        assert f"the last checkpoint is {tmp_path / 'run' / 'step-000005'}" in str(caught.value)
        assert [path.name for path in (tmp_path / "run").glob("*step-*")] == ["step-000005"]
        assert device_trainer(tmp_path / "run").train(tmp_path / "run", quiet=True).steps == 10

    def test_other_errors_are_not_the_gpus(self, tmp_path):
        with pytest.raises(RuntimeError, match="a mistake in the program"):
            self.failing(tmp_path, RuntimeError("a mistake in the program")).train(quiet=True)


class TestBfloat16OnOldGpus:
    @pytest.fixture(autouse=True)
    def old_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old GPU")

    def test_asked_for_is_one_line(self):
        expected = (
            r"^runtime.dtype is 'bfloat16', but Old GPU \(compute capability 7.5\) cannot multiply it, 8.0 or newer can"
        )
        with pytest.raises(UserError, match=expected):
            runtime.prepare(tiny_config(**{"runtime.device": "cuda", "runtime.dtype": "bfloat16"}))

    def test_auto_is_float32(self):
        from dsfast.model import precision_of

        config = tiny_config(**{"runtime.device": "cuda", "runtime.dtype": "auto"})
        assert precision_of(config.runtime).tensors == torch.float32


def test_most_segments_bounds_every_batch():
    rows = tiny_dataset().rows
    for size in (1, 3, 40):
        found = [len(rows.batch(step, size).cu_seqlens) - 1 for step in range(2 * (40 // size))]
        assert max(found) <= rows.most_segments(size)
    assert rows.most_segments(40) == len(rows.batch(0, 40).cu_seqlens) - 1
    assert learning_rate_scale(0, tiny_config().train) < 1
