"""The suite: limits just below and just above, error reports, the results file, what is skipped and how it ends."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import re
import sys
from datetime import datetime
from math import inf, nan
from time import perf_counter
from types import SimpleNamespace

import pytest
import torch
from operator_cases import needs_native
from rich.console import Console
from tiny import tiny_config, tiny_dataset, write_text_run

from dsfast import info
from dsfast.command import _prepare_output
from dsfast.config import CONFIGS, default_config, load_config
from dsfast.data import Prompt, load_prompts
from dsfast.errors import GpuError, UserError
from dsfast.evaluate.probes import judge
from dsfast.files import os_errors_as
from dsfast.model import loss_in
from dsfast.ops import triton
from dsfast.suite import __main__ as suite
from dsfast.suite import phases, propagation
from dsfast.suite.error_reports import error_reports
from dsfast.suite.report import (
    FAILED,
    PASSED,
    Reporter,
    _commit,
    _generation_table,
    duration,
    fallbacks,
    performance_block,
    priority_table,
    training_time,
    utilisation,
)
from dsfast.suite.results import write_results
from dsfast.suite.verdict import THRESHOLDS, Limit, check, judge_comparison, judge_phase, verdict
from dsfast.train import Trainer, TrainResult, checkpoint, loop, steps

BELOW, ABOVE = -1e-9, 1e-9


@pytest.mark.parametrize(
    ("name", "at_limit", "just_below", "just_above"),
    [
        # The specification's ">50%" is strict; its "within 2x" and "5-15x" include the bound.
        ("fast_success", False, False, True),
        ("full_success", False, False, True),
        ("high_success", False, False, True),
        ("medium_success", False, False, True),
        ("low_success", False, False, True),
        ("training_time", True, True, False),
        ("taught_recall", True, False, True),
        ("cpu_memory", False, True, False),
        ("gpu_memory", False, True, False),
        ("training_speedup", True, False, True),
        ("generation_speedup", True, False, True),
        ("kernels_failed", True, False, False),
        ("propagation_failed", True, False, False),
        ("control_answered", True, False, False),
    ],
)
def test_each_limit_at_below_and_above(name, at_limit, just_below, just_above):
    value = getattr(THRESHOLDS, name).value
    statuses = [check("cpu", name, value + delta).status for delta in (0, BELOW, ABOVE)]
    assert statuses == ["PASS" if holds else "FAIL" for holds in (at_limit, just_below, just_above)]


def test_every_limit_is_in_the_table_above():
    marks = test_each_limit_at_below_and_above.pytestmark[0].args[1]
    assert {row[0] for row in marks} == {f.name for f in dataclasses.fields(THRESHOLDS)}


def test_the_limits_are_the_specifications():
    values = {
        f.name: (getattr(THRESHOLDS, f.name).value, getattr(THRESHOLDS, f.name).severity)
        for f in dataclasses.fields(THRESHOLDS)
    }
    assert values == {
        "kernels_failed": (0, "critical"), "propagation_failed": (0, "critical"), "control_answered": (0, "critical"),
        "fast_success": (0.5, "error"), "full_success": (0.6, "error"), "high_success": (0.7, "error"),
        "medium_success": (0.5, "error"), "low_success": (0.3, "error"), "training_time": (2.0, "error"),
        "taught_recall": (0.9, "warning"), "cpu_memory": (16.0, "warning"), "gpu_memory": (2.0, "warning"),
        "training_speedup": (5.0, "warning"), "generation_speedup": (3.0, "warning"),
    }  # fmt: skip
    assert all(getattr(THRESHOLDS, name).source for name in values)


def test_what_is_not_a_number_fails_and_what_is_missing_is_skipped():
    assert check("cpu", "training_time", float("nan")).status == "FAIL"
    assert check("cpu", "training_time", None, "why").status == "SKIP"
    assert check("cpu", "training_time", None, "why").reason == "why"


def entry(status: str = "passed", phase: str = "passed") -> dict:
    return {
        "status": status,
        "reason": "no GPU",
        "phases": [{"name": "training", "status": phase, "reason": "it broke"}],
    }


@pytest.mark.parametrize(
    ("checks", "tests", "passed"),
    [
        ([check("cpu", "fast_success", 0.6)], {"cpu": entry()}, True),
        ([check("cpu", "fast_success", 0.5)], {"cpu": entry()}, False),
        ([check("cpu", "taught_recall", 0.1)], {"cpu": entry()}, True),  # a warning
        ([check("cpu", "control_answered", 1)], {"cpu": entry()}, False),
        ([check("cpu", "fast_success", 1.0)], {"cpu": entry(), "gpu": entry("skipped")}, True),
        ([], {"cpu": entry("skipped"), "gpu": entry("skipped")}, False),  # nothing ran: nothing passed
        ([], {"cpu": entry("error", "error")}, False),
    ],
)
def test_verdict(checks, tests, passed):
    result = verdict(tests, checks)
    assert result["passed"] is passed
    assert result["status"] == ("PASS" if passed else "FAIL")
    assert bool(result["failed"]) is not passed


def test_verdict_lists_warnings_and_skips_apart():
    result = verdict(
        {"cpu": entry(), "gpu": entry("skipped")},
        [check("cpu", "taught_recall", 0.1), *judge_comparison({"reason": "no GPU"})],
    )
    assert result["warnings"] == ["cpu: taught recall is 10.0%, not >= 90.0%"]
    assert result["skipped"] == ["gpu: no GPU"]
    assert len(result["not_checked"]) == 2
    assert {c["status"] for c in result["checks"] if c["test"] == "comparison"} == {"SKIP"}


def test_a_phase_is_judged_by_its_own_limits():
    details = {"device": "gpu", "times_target": 2.5, "memory_gb": 1.0}
    assert {c.name: c.status for c in judge_phase("gpu", "performance", details)} == {
        "training_time": "FAIL",
        "gpu_memory": "PASS",
    }
    assert [c.name for c in judge_phase("full", "generation", {"success": {"fast": 1.0, "high": 0.5}})] == [
        "fast_success",
        "high_success",
    ]
    assert judge_phase("cpu", "set-up", {}) == []


def test_a_limit_shows_its_relation_and_unit():
    assert str(Limit(">", 0.5, "fraction", "error", "")) == "> 50.0%"
    assert str(Limit("<", 2.0, "GB", "error", "")) == "< 2.00 GB"


def probes(answers: str, priority: str = "medium") -> list:
    """A result per letter: r(ight) or w(rong)."""
    prompt = Prompt("The capital of France is", "Paris", priority=priority)
    return [judge(prompt, " Paris" if letter == "r" else " London", 0.1) for letter in answers]


def test_success_rates_by_set_and_priority():
    full = [*probes("rrw", "high"), *probes("rw", "medium")]
    rates = phases.success_rates({"fast": probes("rw", "high"), "full": full})
    assert rates == {
        "fast": 0.5,
        "full": 0.6,
        "high": pytest.approx(2 / 3),
        "medium": 0.5,
    }  # fast ones are in no priority
    assert phases.success_rates({"fast": probes("rw", "high")}) == {"fast": 0.5}


def test_error_reports_say_what_is_needed():
    config = load_config(CONFIGS / "deepseek_v3_test_run_cpu.json")
    wrong = judge(probes("w")[0].prompt, " Parma", 0.1).to_dict() | {"generated": "x" * 300}
    [report] = error_reports(
        "cpu", config, {"name": "generation", "status": "failed", "details": {"probes": [wrong]}}, []
    )
    assert (report["type"], report["severity"], report["priority"]) == ("similarity", "warning", "medium")
    assert report["generated"] == "x" * 200
    assert report["score"] == report["metrics"]["combined"] != report["metrics"]["sequence"]

    performance = {
        "device": "cpu",
        "training_seconds": 1600.0,
        "target_seconds": 720.0,
        "times_target": 1600 / 720,
        "memory_gb": 1.0,
    }
    slow = {"name": "performance", "status": "failed", "details": performance}
    [report] = error_reports("cpu", config, slow, judge_phase("cpu", "performance", performance))
    assert report["type"] == "timing"
    assert report["expected"] == "at most 1440.0 s (2 times the target)"
    assert report["actual"] == "1600.0 s"

    for phase, kind in (("set-up", "training"), ("training", "training"), ("recall", "exception")):
        broken = {"name": phase, "status": "error", "reason": "ValueError: x", "stack_trace": "Traceback"}
        [report] = error_reports("cpu", config, broken, [])
        assert (report["type"], report["stack_trace"]) == (kind, "Traceback")
        assert report["configuration"] == config.to_dict()

    failed = {"name": "forward pass", "passed": False, "expected": "a", "actual": "b", "debug": "c"}
    details = {"failed": 1, "checks": [failed]}
    found = error_reports(
        "cpu",
        config,
        {"name": "propagation", "status": "failed", "details": details},
        judge_phase("cpu", "propagation", details),
    )
    assert [(r["type"], r["expected"], r["actual"]) for r in found] == [
        ("propagation", "a", "b"),
        ("threshold", "== 0", "1"),
    ]


def test_what_was_not_measured_is_no_error():
    phase, config = {"name": "recall", "status": "passed", "details": {}}, tiny_config()
    assert error_reports("cpu", config, phase, [check("cpu", "taught_recall", None, "no facts")]) == []
    [report] = error_reports("cpu", config, phase, [check("cpu", "taught_recall", 0.5)])
    assert (report["type"], report["severity"]) == ("threshold", "warning")


def test_kernel_errors_and_missing_operators_are_reported():
    row = {
        "operator": "rope",
        "implementation": "native",
        "quantity": "x",
        "max_abs_error": 1.0,
        "tolerance": 0.1,
        "passed": False,
    }
    details = {"failed": 2, "missing": ["adamw"], "comparisons": [row]}
    found = error_reports(
        "cpu",
        load_config(CONFIGS / "deepseek_v3_test_run_cpu.json"),
        {"name": "kernels", "status": "failed", "details": details},
        [],
    )
    assert [r["message"] for r in found] == [
        "rope (native): x differs from the float64 reference",
        "adamw: was not compared with anything",
    ]


def session_of(**changes) -> phases.Session:
    """A session of tiny.py's run, about to train."""
    config = tiny_config(**changes)
    return phases.Session(phases.fast_plan(config, load_prompts()), trainer=Trainer(config, dataset=tiny_dataset()))


def test_operators_that_nothing_compares_have_failed(monkeypatch):
    monkeypatch.setattr(phases.ops, "check_all", lambda *_: [{"operator": "rope", "passed": True}])
    details = phases.kernels(session_of())
    assert details["missing"] == sorted(set(phases.ops.OPERATORS) - {"rope"})
    assert details["failed"] == len(phases.ops.OPERATORS) - 1


def test_training_counts_skipped_steps_and_ends_with_the_last_loss():
    """Of four steps the second has a gradient that is not finite."""
    session = session_of(**{"train.steps": 4})
    trainer = session.trainer
    trainer.model.norm.weight.register_hook(lambda grad: grad * (nan if trainer.steps_done == 1 else 1.0))
    details = phases.training(session)
    assert (details["steps"], details["skipped_steps"], len(details["losses"])) == (4, 1, 4)
    assert details["final_loss"] == details["losses"][-1] != details["losses"][0]


def test_propagation_is_checked_on_the_batch_that_would_come_next(monkeypatch):
    batches, checked = [], []
    longer = session_of(**{"train.steps": 3}).trainer
    train_batch = longer.train_batch
    longer.train_batch = lambda batch: batches.append(batch) or train_batch(batch)
    longer.train(quiet=True)
    monkeypatch.setattr(phases, "check_propagation", lambda model, batch, *_: checked.append(batch) or [])
    phases.propagation(session_of(**{"train.steps": 2}))
    assert torch.equal(checked[0].input_ids, batches[2].input_ids)


@pytest.mark.parametrize(("device", "beforehand"), [("cpu", ["One"]), ("gpu", ["One", "Two", "Three"])])
def test_a_gpu_is_asked_all_questions_once_before_they_are_timed(device, beforehand, monkeypatch):
    asked = []

    def ask(session, model, prompts):
        asked.append([prompt.text for prompt in prompts])
        return [judge(prompt, "", 0.1) for prompt in prompts]

    monkeypatch.setattr(phases.Session, "ask", ask)
    monkeypatch.setattr(phases.Plan, "device", device)
    one, two, three = (Prompt(text, "yes") for text in ("One", "Two", "Three"))
    plan = phases.Plan("full", "Test 3", tiny_config(), {"fast": [one], "full": [two, three]})
    phases.generation(phases.Session(plan, trainer=SimpleNamespace(model=None)))
    assert asked == [beforehand, ["One"], ["Two", "Three"]]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_fell_back_on_another_device_is_none_of_a_tests(device, monkeypatch):
    rows = [{"operator": "rope", "device": name, "reason": "why"} for name in ("cpu", "cuda")]
    monkeypatch.setattr(phases.ops, "fallbacks", lambda: rows)
    assert phases._fallbacks(device) == [row for row in rows if row["device"] == device]


def test_performance_is_in_times_the_target_seconds_an_answer_and_1e9_bytes():
    session = session_of(**{"suite.target_seconds": 12.0})
    session.result = TrainResult(
        steps=10, final_loss=1.0, seconds=36.0, preparation_seconds=None, utilisation=None, tokens_per_second=480.0,
        peak_memory_bytes=3 * 10**9, skipped_steps=0, checkpoint=None, experts_used=[], losses=[1.0],
    )  # fmt: skip
    [one], two = probes("r"), probes("rw")
    session.probes = {"fast": [dataclasses.replace(one, seconds=0.4)], "full": two}
    assert phases.performance(session) == {
        "device": "cpu", "training_seconds": 36.0, "preparation_seconds": None, "utilisation": None,
        "target_seconds": 12.0, "times_target": 3.0, "tokens_per_second": 480.0,
        "seconds_per_answer": pytest.approx(0.2), "memory_gb": 3.0,
    }  # fmt: skip


def test_the_untrained_model_stays_as_it_was_made(tmp_path):
    config = load_config(write_text_run(tmp_path, **{"model.max_position_embeddings": 128}))
    session = phases.Session(phases.fast_plan(config, load_prompts()))
    phases.set_up(session)
    with torch.no_grad():
        for parameter in session.trainer.model.parameters():
            parameter.add_(1)
    made = Trainer(config).model.state_dict()
    torch.testing.assert_close(session.untrained.state_dict(), made, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("shape", "first", "passed"), [((2, 3, 5), 0.0, True), ((2, 3, 4), 0.0, False), ((2, 3, 5), nan, False)]
)
def test_a_forward_pass_gives_finite_logits_for_every_token_of_the_vocabulary(shape, first, passed):
    def model(input_ids):
        logits = torch.zeros(shape)
        logits[0, 0, 0] = first
        return logits

    model.config = SimpleNamespace(vocab_size=5)
    assert propagation.check_forward(model, torch.zeros(2, 3, dtype=torch.int64)).passed is passed


@pytest.mark.parametrize(("count", "passed"), [(399_999, False), (400_000, True), (600_000, True), (600_001, False)])
def test_the_parameters_are_from_400_to_600_thousand(count, passed):
    model = torch.nn.ParameterList([torch.empty(count - 7), torch.empty(7)])
    found = propagation.check_parameters(model)
    assert (found.passed, found.actual) == (passed, f"{count:,}")


GRADIENTS = {"g": [0.0, 1.0], "0": [0.0, 0.0], "n": [1.0, nan], "i": [inf, 1.0]}


@pytest.mark.parametrize(
    ("gradients", "passed"),
    [("gg0-", True), ("g00-", False), ("ggni", True), ("gg000", False), ("gnnn", False), ("giii", False)],
)
def test_gradients_flow_where_half_of_the_tensors_have_one(gradients, passed):
    """A letter per tensor: g(ood), 0 throughout, n(ot a number) or i(nfinite) in one place, - none."""
    model = torch.nn.ParameterList(torch.zeros(2) for _ in gradients)
    for parameter, letter in zip(model, gradients, strict=True):
        parameter.grad = None if letter == "-" else torch.tensor(GRADIENTS[letter])
    found = propagation.check_gradients(model)
    assert found.passed is passed
    assert found.actual.startswith(f"{gradients.count('g')} of {len(gradients)} tensors")


@pytest.mark.filterwarnings("ignore:.*runs in plain PyTorch")
def test_the_loss_is_computed_in_the_dtype_that_was_trained_in():
    trainer = session_of().trainer
    batch = trainer.dataset.rows.batch(0, 3)
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        checks = propagation.check_propagation(trainer.model, batch, dtype, 0.0)
        assert all(parameter.grad is None for parameter in trainer.model.parameters()), "gradients are left"
        losses[dtype] = next(check.actual for check in checks if check.name == "loss finite")
        alone = loss_in(dtype, trainer.model, 0.0, batch.input_ids, batch.labels, batch.positions, batch.cu_seqlens)
        assert losses[dtype] == f"{alone.item():.4f}"
    assert losses[torch.float32] != losses[torch.bfloat16]


def test_the_full_tests_target_grows_with_its_steps():
    config = load_config(CONFIGS / "deepseek_v3_test_run_cpu.json")
    plan = phases.full_plan(config, load_prompts())
    assert plan.config.train.steps == 500
    assert plan.config.suite.target_seconds == config.suite.target_seconds * 500 / config.train.steps
    assert {name: len(prompts) for name, prompts in plan.prompts.items()} == {"fast": 3, "full": 10}
    assert list(phases.fast_plan(config, load_prompts()).prompts) == ["fast"]


def test_comparison_needs_both():
    def test_with(losses=(), **details):
        phases = {"training": {"losses": losses}, "performance": details}
        return {"phases": [{"name": name, "details": details} for name, details in phases.items()]}

    skipped = phases.skipped_test("Test 2", "no GPU")
    assert phases.compare(test_with(training_seconds=1.0), skipped) == {"reason": "no GPU"}
    both = phases.compare(
        test_with([9.0, 8.0, 4.0], training_seconds=60.0, seconds_per_answer=0.2, preparation_seconds=None),
        test_with([9.0, 8.5, 3.9], training_seconds=10.0, seconds_per_answer=0.1, preparation_seconds=5.0),
    )
    assert both.pop("losses") == {"largest": 0.0625, "at_step": 2, "part_at_step": 2}
    assert both == {"training_speedup": 6.0, "training_speedup_prepared": 4.0, "generation_speedup": 2.0}
    assert [c.status for c in judge_comparison(both)] == ["PASS", "FAIL"]


def test_losses_part_where_one_is_no_number():
    assert phases.compare_losses([1.0, 1.0, 1.0], [1.0, nan, 1.0]) == {"largest": inf, "at_step": 2, "part_at_step": 2}


@pytest.mark.parametrize(
    ("seconds", "target", "text"),
    [
        (672.0, 720.0, "11.2min (target: 12.0min)"),
        (1710.0, 720.0, "28.5min (target: 12.0min) ⚠ 2.4x slower"),
        (68.5, 75.0, "68.5s (target: 75.0s)"),
        (145.2, 75.0, "145.2s (target: 75.0s) ⚠ 1.9x slower"),
    ],
)
def test_training_time_reads_as_in_the_specification(seconds, target, text):
    assert training_time({"training_seconds": seconds, "target_seconds": target}) == text


def test_a_fast_cpu_is_shown_in_seconds():
    assert duration(38.2, 720.0) == "38.2s"
    assert duration(0.0612, 75.0) == "0.061s"


def both_devices(cpu_seconds: float, **gpu) -> dict:
    """Results of both fast tests, as far as performance goes; `gpu`: details of the GPU's that differ."""

    def test_with(device, seconds, target, answer, **details):
        times = {"training_seconds": seconds, "target_seconds": target, "seconds_per_answer": answer}
        details = {"device": device, **times, **details}
        return {"status": "passed", "reason": None, "phases": [{"name": "performance", "details": details}]}

    own = {"preparation_seconds": 12.34, "utilisation": 0.968, "memory_gb": 0.314}
    tests = {
        "cpu": test_with("cpu", cpu_seconds, 720.0, 0.185, preparation_seconds=None, utilisation=None, memory_gb=0.5),
        "gpu": test_with("gpu", 68.5, 75.0, 0.032, **(own | gpu)),
    }
    return {"tests": tests | {"full": {"phases": []}}, "comparison": phases.compare(tests["cpu"], tests["gpu"])}


def test_the_good_performance_block_is_the_specifications():
    assert performance_block(both_devices(672.0))[1:11] == [
        "Good Performance:",
        "Training Time:",
        "  CPU: 11.2min (target: 12.0min)",
        "  GPU: 68.5s (target: 75.0s)",
        "  Speedup: 9.8x faster on GPU",
        "",
        "Generation Speed (avg):",
        "  CPU: 0.185s",
        "  GPU: 0.032s",
        "  Speedup: 5.8x faster on GPU",
    ]


def test_behind_it_stands_what_the_gpu_took_besides():
    assert performance_block(both_devices(672.0))[11:-1] == [
        "",
        "GPU preparation (batches loaded, kernels compiled or read from the cache, step recorded; in no time above):",
        "  GPU: 12.3s",
        "  Speedup of training with it: 8.3x faster on GPU",
        "",
        "GPU utilisation and memory:",
        "  GPU: busy 97% of the steps' time; 0.31 GB of VRAM",
    ]


@pytest.mark.parametrize(
    ("gpu", "line"),
    [
        ([8.0, 6.01, 4.0], "apart by 0.17% at most (step 2), never by more than 3%"),
        ([8.0, 6.3, 4.4], "apart by 10.00% at most (step 3), first by more than 3% at step 2"),
        ([8.0, 5.4, 4.0], "apart by 10.00% at most (step 2), first by more than 3% at step 2"),
    ],
)
def test_how_far_the_losses_come_apart(gpu, line):
    results = both_devices(672.0)
    for name, losses in (("cpu", [8.0, 6.0, 4.0]), ("gpu", gpu)):
        results["tests"][name]["phases"].append({"name": "training", "details": {"losses": losses}})
    results["comparison"] = phases.compare(results["tests"]["cpu"], results["tests"]["gpu"])
    assert performance_block(results)[-3:-1] == ["", f"Losses of CPU and GPU: {line}"]


def test_what_fell_back_is_said_once():
    row = {"operator": "train_step", "device": "cuda", "reason": "capture as a CUDA graph failed: why"}
    found = [{"name": name, "details": {"fallbacks": [row]}} for name in ("training", "generation")]
    assert fallbacks({"gpu": {"phases": found}, "cpu": {"phases": []}}) == [row]


def test_without_a_gpu_nothing_is_said_of_one():
    results = both_devices(672.0)
    skipped = phases.skipped_test("Test 2", "no GPU")
    results["tests"]["gpu"], results["comparison"] = skipped, phases.compare(results["tests"]["cpu"], skipped)
    assert performance_block(results)[1:-1] == [
        "Good Performance:",
        "Training Time:",
        "  CPU: 11.2min (target: 12.0min)",
        "  Speedup: not measured (no GPU)",
        "",
        "Generation Speed (avg):",
        "  CPU: 0.185s",
        "  Speedup: not measured (no GPU)",
    ]


def test_the_gpu_alone_with_full_training():
    """Two tests on the GPU, nothing to compare them with."""
    results = both_devices(672.0)
    results["tests"]["full"] = results["tests"]["gpu"]
    results["tests"]["cpu"] = phases.skipped_test("Test 1", "not asked for (--gpu-only)")
    results["comparison"] = phases.compare(results["tests"]["cpu"], results["tests"]["gpu"])
    block = performance_block(results)
    assert [line for line in block if "Full: " in line] == [
        "  Full: 68.5s (target: 75.0s)",
        "  Full: 0.032s",
        "  Full: 12.3s",
        "  Full: busy 97% of the steps' time; 0.31 GB of VRAM",
    ]
    assert block.count("  Speedup: not measured (not asked for (--gpu-only))") == 2
    assert not any("with it" in line for line in block)


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (None, "utilisation not known (steps launched kernel by kernel): see nvidia-smi"),
        (0.5, "busy 50% of the steps' time"),
        (0.49, "busy 49% of the steps' time, a larger train.batch_size or train.log_every would use it better"),
    ],
)
def test_the_note_on_utilisation(share, text):
    assert utilisation(share) == text


@pytest.mark.parametrize(
    ("cpu_seconds", "gpu", "complaint"),
    [
        (1710.0, {}, "⚠ 2.4x slower"),
        (300.0, {}, "4.4x faster on GPU ⚠ expected 5-15x"),
        (672.0, {"seconds_per_answer": 0.074}, "2.5x faster on GPU ⚠ expected 3-10x"),
        (672.0, {"memory_gb": 2.0}, "2.00 GB of VRAM ⚠ expected < 2.00 GB"),
        (1710.0, {"training_seconds": 145.2}, "GPU: 145.2s (target: 75.0s) ⚠ 1.9x slower"),
    ],
)
def test_poor_performance_says_where(cpu_seconds, gpu, complaint):
    block = performance_block(both_devices(cpu_seconds, **gpu))
    assert "Poor Performance:" in block
    assert any(complaint in line for line in block)


def test_what_a_model_writes_is_shown_as_it_is_on_any_terminal(monkeypatch):
    """Of every command what its output's encoding lacks is written in full (dsfast.command)."""
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    _prepare_output()
    probe = judge(Prompt("Name a tag", "x"), " [/bold] :smile: é", 0.1).to_dict() | {"set": "fast"}
    phase = {
        "name": "generation",
        "status": "failed",
        "seconds": 0.1,
        "details": {"success": {"fast": 0.0}, "probes": [probe], "preparation_seconds": None},
    }
    Reporter().phase_ends(phase, [])
    printed = raw.getvalue().decode("ascii")
    assert r"[/bold] :smile: \xe9" in printed
    assert "\x1b" not in printed


RED, GREEN, END = "\x1b[31m", "\x1b[32m", "\x1b[0m"


def coloured(show) -> list[str]:
    """The lines that `show` prints on a reporter's console, which has colours; of several spaces, one."""
    output = io.StringIO()
    terminal = {"force_terminal": True, "color_system": "standard", "no_color": False}
    show(Reporter(Console(file=output, width=160, height=50, markup=False, highlight=False, **terminal)))
    return [" ".join(line.split()).replace(f" {END}", END) for line in output.getvalue().splitlines()]


def test_the_table_by_priority_has_the_full_prompts_of_each():
    asked = {"fast": probes("r", "high"), "full": [*probes("wrrr", "high"), *probes("wr", "medium")]}
    found = [{"set": name, **probe.to_dict()} for name, results in asked.items() for probe in results]
    rows = coloured(lambda reporter: reporter.console.print(priority_table({"probes": found})))
    assert rows[-2:] == [
        f"high 3 4 75.0% > 70.0% {GREEN}PASS{END}",
        f"medium 1 2 50.0% > 50.0% {RED}FAIL{END}",
    ]


def compared(operator: str, quantity: str, error: float, passed: bool) -> dict:
    row = {"operator": operator, "implementation": "native", "quantity": quantity}
    return row | {"max_abs_error": error, "tolerance": 0.25, "passed": passed}


PHASE_TABLES = {
    "kernels": (
        {
            "failed": 1,
            "comparisons": [
                compared("rope", "y", 0.2, True),
                compared("rope", "x", nan, False),
                compared("adamw", "a", 0.01, True),
                compared("adamw", "b", 0.1, True),
                compared("adamw", "c", 0.2, True) | {"tolerance": 1.0},
            ],
        },
        [
            f"rope native 2 x nan 2.50e-01 {RED}FAIL{END}",
            f"adamw native 3 b 1.00e-01 2.50e-01 {GREEN}PASS{END}",
        ],
    ),
    "propagation": (
        {
            "failed": 1,
            "checks": [
                {"name": "loss", "passed": True, "expected": "finite", "actual": "3.5"},
                {"name": "flow", "passed": False, "expected": "half", "actual": "none"},
            ],
        },
        [f"loss finite 3.5 {GREEN}PASS{END}", f"flow half none {RED}FAIL{END}"],
    ),
    "generation": (
        {"success": {}, "preparation_seconds": None, "probes": [probe.to_dict() for probe in probes("rw")]},
        [
            f"The capital of France is Paris Paris 100% 100% 100% 100% {GREEN}✓{END}",
            f"The capital of France is Paris London 0% 0% 0% 0% {RED}✗{END}",
        ],
    ),
}


@pytest.mark.parametrize("phase", PHASE_TABLES)
def test_a_phases_table_marks_what_passed_and_what_failed(phase):
    details, expected = PHASE_TABLES[phase]
    shown = {"name": phase, "status": "failed", "seconds": 0.1, "details": details}
    assert coloured(lambda reporter: reporter.phase_ends(shown, []))[-3:-1] == expected


@pytest.mark.parametrize(("letters", "shown"), [(48, "x" * 48), (49, "x" * 47 + "…")])
def test_an_answer_longer_than_its_column_is_cut(letters, shown):
    found = judge(Prompt("It is", "so"), "x" * letters, 0.1).to_dict()
    assert list(_generation_table({"probes": [found]}).columns[2].cells) == [shown]


@pytest.mark.parametrize(
    ("dirty", "words"), [(True, " with changes"), (False, ""), (None, ", with changes or without")]
)
def test_a_commit_is_shown_with_what_is_known_of_changes(dirty, words):
    assert _commit({"hash": "0123456789abcdef", "dirty": dirty}) == f"0123456789ab{words}"
    assert _commit(None) == "unknown"


def test_results_never_overwrite_and_are_whole_or_absent(tmp_path):
    now = datetime(2030, 1, 2, 3, 4, 59)
    names = [write_results(tmp_path, {"n": n, "loss": float("nan")}, now).name for n in range(2)]
    assert names == ["test_results_fast_500k_20300102_030459.json", "test_results_fast_500k_20300102_030500.json"]
    assert [json.loads((tmp_path / name).read_text()) for name in names] == [
        {"n": 0, "loss": None},
        {"n": 1, "loss": None},
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    with pytest.raises(TypeError):
        write_results(tmp_path, {"unwritable": object()}, now)
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_results_take_their_name_when_they_are_whole(tmp_path, monkeypatch):
    moved, replace = {}, os.replace

    def watched(source, target):
        moved[target] = json.loads(source.read_text(encoding="utf-8"))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    path = write_results(tmp_path, {"n": 1}, datetime(2030, 1, 2, 3, 4, 59))
    assert moved[path] == {"n": 1}


@pytest.mark.parametrize("step", ["dsfast.suite.results._claim", "os.replace"])
def test_results_without_a_name_leave_nothing(step, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(step, full)
    with pytest.raises(UserError, match=r"the results cannot be written: No space left on device$"):
        write_results(tmp_path, {"n": 1}, datetime(2030, 1, 2, 3, 4, 59))
    assert list(tmp_path.iterdir()) == []


def test_the_summary_is_shown_where_the_results_cannot_be_written(failing_run, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise UserError("No space left on device")

    monkeypatch.setattr(suite, "make_plans", lambda *_: [])
    monkeypatch.setattr(suite, "run", lambda *_: failing_run[2])
    monkeypatch.setattr(suite, "write_results", full)
    with pytest.raises(UserError, match="No space left"):
        suite.main(["--cpu-only", "--output-dir", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "SOME TESTS FAILED" in shown
    assert "results: not written" in shown


def parsed(*argv: str):
    return suite._parser().parse_args(argv)


def test_without_a_gpu_its_test_is_skipped_and_gpu_only_cannot_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    configs, skipped = suite.choose_configs(parsed())
    assert list(configs) == ["cpu"]
    assert skipped == {"gpu": "no CUDA device is available on this machine"}
    with pytest.raises(UserError, match="no CUDA device"):
        suite.choose_configs(parsed("--gpu-only"))


def test_with_a_gpu_alone_both_its_tests_run_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    configs, skipped = suite.choose_configs(parsed("--gpu-only", "--full-training"))
    assert skipped == {"cpu": "not asked for (--gpu-only)"}
    fast, full = suite.make_plans(configs, load_prompts(), True)
    assert [(plan.name, plan.device) for plan in (fast, full)] == [("gpu", "gpu"), ("full", "gpu")]
    assert fast.title == "Test 2: fast GPU training (200 steps)"
    assert full.title == "Test 3: full training on the GPU (500 steps)"
    assert (fast.config.suite.target_seconds, full.config.suite.target_seconds) == (75.0, 75.0 * 500 / 200)
    monkeypatch.setattr(suite, "_why_unfit", lambda: None)
    both, _ = suite.choose_configs(parsed())
    plans = suite.make_plans(both, load_prompts(), True)
    assert [(plan.name, plan.device) for plan in plans] == [("cpu", "cpu"), ("gpu", "gpu"), ("full", "gpu")]


def test_the_configs_device_decides_and_a_contradiction_is_an_error(tmp_path):
    config = str(CONFIGS / "deepseek_v3_test_run_cpu.json")
    configs, skipped = suite.choose_configs(parsed("--config", config, "--seed", "7"))
    assert configs["cpu"].seed == 7
    assert skipped == {"gpu": f"{config} has runtime.device 'cpu'"}
    with pytest.raises(UserError, match="nothing to run"):
        suite.choose_configs(parsed("--config", config, "--gpu-only"))


class Moment:
    """In place of a mark in a GPU's stream: the host's time."""

    def __init__(self, device):
        self.seconds = perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: Moment) -> float:
        return 1e3 * (later.seconds - self.seconds)


class GpuPlan(phases.Plan):
    device = "gpu"


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> tuple[str, dict]:
    """Console and results of all three tests, the GPU's done by a GPU's steps on CPU tensors."""
    folder = tmp_path_factory.mktemp("rehearsal")
    changes = {"model.max_position_embeddings": 128, "train.steps": 4, "train.log_every": 2, "suite.max_new_tokens": 4}
    config = load_config(write_text_run(folder, **changes))
    longer = config.replace(**{"train.steps": 6})
    prompts = load_prompts()
    plans = [
        phases.Plan("cpu", "Test 1", config, {"fast": prompts.fast}),
        GpuPlan("gpu", "Test 2", config, {"fast": prompts.fast}),
        GpuPlan("full", "Test 3", longer, {"fast": prompts.fast, "full": prompts.full}),
    ]

    def steps_of(trainer):
        on_cpu = trainer.output_dir.name == "cpu"
        return steps.HostSteps(trainer) if on_cpu else steps.DeviceSteps(trainer, lambda step: step.__call__)

    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "steps_of", steps_of)
        patch.setattr(steps, "mark", Moment)
        reporter = Reporter(Console(file=output, width=120, markup=False))
        results = suite.run(plans, {}, folder / "runs", reporter, ["suite"])
        reporter.summary(results, None)
    return output.getvalue(), results


class TestRehearsedOnAGpu:
    def details(self, rehearsal, test: str, phase: str) -> dict:
        return next(p["details"] for p in rehearsal[1]["tests"][test]["phases"] if p["name"] == phase)

    def test_preparation_stands_apart_from_training_and_answers(self, rehearsal):
        for test in ("gpu", "full"):
            training, performance = (
                self.details(rehearsal, test, "training"),
                self.details(rehearsal, test, "performance"),
            )
            assert training["preparation_seconds"] == performance["preparation_seconds"] > 0
            assert self.details(rehearsal, test, "generation")["preparation_seconds"] > 0
            assert performance["training_seconds"] == training["seconds"]
            assert len(training["losses"]) == training["steps"]

    def test_the_gpus_own_clock_gives_its_utilisation(self, rehearsal):
        for test in ("gpu", "full"):
            training, performance = (
                self.details(rehearsal, test, "training"),
                self.details(rehearsal, test, "performance"),
            )
            assert 0 < training["utilisation"] == performance["utilisation"] < 1

    def test_a_cpu_has_neither(self, rehearsal):
        training, performance = (
            self.details(rehearsal, "cpu", "training"),
            self.details(rehearsal, "cpu", "performance"),
        )
        assert training["preparation_seconds"] is training["utilisation"] is None
        assert performance["preparation_seconds"] is performance["utilisation"] is None
        assert self.details(rehearsal, "cpu", "generation")["preparation_seconds"] is None
        (line,) = [line for line in rehearsal[0].splitlines() if "steps in" in line and "preparation" not in line]
        assert "4 steps in" in line

    def test_the_speed_ups_are_those_of_the_times_and_warned_of(self, rehearsal):
        results = rehearsal[1]
        cpu, gpu = (self.details(rehearsal, test, "performance") for test in ("cpu", "gpu"))
        prepared = gpu["training_seconds"] + gpu["preparation_seconds"]
        found = dict(results["comparison"])
        assert found.pop("losses").keys() == {"largest", "at_step", "part_at_step"}
        assert found == {
            "training_speedup": cpu["training_seconds"] / gpu["training_seconds"],
            "training_speedup_prepared": cpu["training_seconds"] / prepared,
            "generation_speedup": cpu["seconds_per_answer"] / gpu["seconds_per_answer"],
        }
        checks = {(c["test"], c["name"]): c for c in results["verdict"]["checks"]}
        for name in ("training_speedup", "generation_speedup"):
            assert checks["comparison", name]["severity"] == "warning"
            assert checks["comparison", name]["value"] == results["comparison"][name]
        assert checks["gpu", "gpu_memory"]["value"] == gpu["memory_gb"]
        assert checks["full", "gpu_memory"]["expected"] == "< 2.00 GB"
        assert ("gpu", "cpu_memory") not in checks

    def test_the_console_says_it_all(self, rehearsal):
        console = rehearsal[0]
        assert len(re.findall(r"[46] steps in \d+\.\d+s after \d+\.\d s of preparation, loss", console)) == 2
        for test in ("GPU", "Full"):
            assert re.search(rf"  {test}: busy \d+% of the steps' time.*; \d\.\d\d GB of VRAM", console)
        assert "Speedup of training with it:" in console


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_both_its_tests_run_to_their_end(tmp_path):
    """20 steps of the 500K model teach it nothing, but all else is as it is to be."""
    values = load_config(CONFIGS / "deepseek_v3_test_run_gpu.json").to_dict()
    values["train"]["steps"], values["suite"]["full_training_steps"] = 20, 30
    (tmp_path / "config.json").write_text(json.dumps(values))
    arguments = [
        "--gpu-only",
        "--full-training",
        "--config",
        str(tmp_path / "config.json"),
        "--output-dir",
        str(tmp_path),
    ]
    suite.main(arguments)
    [path] = tmp_path.glob("test_results_*.json")
    results = json.loads(path.read_text(encoding="utf-8"))
    assert results["tests"]["cpu"]["status"] == "skipped"
    for name in ("gpu", "full"):
        details = {phase["name"]: phase.get("details") for phase in results["tests"][name]["phases"]}
        assert None not in details.values(), results["errors"]
        assert details["kernels"]["failed"] == details["propagation"]["failed"] == 0
        assert details["training"]["fallbacks"] == []
        assert details["training"]["preparation_seconds"] > 0
        assert 0 < details["performance"]["utilisation"] <= 1
        assert details["performance"]["memory_gb"] < 2.0


@pytest.fixture(scope="module")
def failing_run(tmp_path_factory) -> tuple[int, str, dict]:
    """Exit code, console and results of a run on random text that is far too short to learn anything."""
    folder = tmp_path_factory.mktemp("suite")
    changes = {
        "model.max_position_embeddings": 128,
        "train.steps": 2,
        "suite.full_training_steps": 3,
        "suite.max_new_tokens": 4,
    }
    config = write_text_run(folder, **changes)
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "Reporter", lambda: Reporter(Console(file=output, width=120, markup=False)))
        patch.setattr(torch.cuda, "is_available", lambda: False)
        code = suite.main(
            ["--config", str(config), "--full-training", "--output-dir", str(folder / "out"), "--seed", "3"]
        )
    [path] = (folder / "out").glob("*.json")
    assert re.fullmatch(r"test_results_fast_500k_\d{8}_\d{6}\.json", path.name)
    return code, output.getvalue(), json.loads(path.read_text(encoding="utf-8"))


def test_a_model_that_learnt_nothing_fails(failing_run):
    code, console, results = failing_run
    assert code == 1
    assert results["verdict"]["passed"] is False
    assert FAILED in console
    assert PASSED not in console
    assert "tests run: cpu, full; results: " in console
    assert results["tests"]["cpu"]["status"] == results["tests"]["full"]["status"] == "failed"
    failed = " ".join(results["verdict"]["failed"])
    assert "cpu: fast success is 0.0%, not > 50.0%" in failed
    assert "full: high success is 0.0%, not > 70.0%" in failed
    assert "cpu: propagation failed is 1, not == 0" in failed  # this model has far fewer than 400K parameters


def test_the_gpu_half_is_skipped_never_passed(failing_run):
    _, console, results = failing_run
    assert results["tests"]["gpu"]["status"] == "skipped"
    assert re.search(r"SKIPPED +gpu: ", console)
    comparison = [c for c in results["verdict"]["checks"] if c["test"] == "comparison"]
    assert [c["status"] for c in comparison] == ["SKIP", "SKIP"]


def test_the_results_file_holds_everything(failing_run):
    results = failing_run[2]
    top = {
        "schema_version",
        "created",
        "command",
        "seconds",
        "commit",
        "machine",
        "versions",
        "native",
        "caches",
        "phases",
        "tests",
    }
    assert set(results) == top | {"comparison", "errors", "verdict"}
    for name in ("cpu", "full"):
        test = results["tests"][name]
        assert [phase["name"] for phase in test["phases"]] == list(phases.PHASES)
        assert all(
            phase["seconds"] >= 0 and phase["status"] in ("passed", "warning", "failed") for phase in test["phases"]
        )
        details = {phase["name"]: phase["details"] for phase in test["phases"]}
        assert test["config"]["seed"] == 3
        assert len(test["config_sha256"]) == 64
        assert set(details["set-up"]["parameters"]) == {"total", "active", "embedding"}
        assert details["set-up"]["data"]["texts_sha256"]
        assert {row["operator"] for row in details["set-up"]["operators"]} == set(phases.ops.OPERATORS)
        assert details["recall"]["taught"] is None
        assert details["control"]["answered"] == 0
        assert len(details["training"]["losses"]) == test["config"]["train"]["steps"]
        assert set(details["generation"]["probes"][0]["similarity"]) == {
            "sequence",
            "word_overlap",
            "substring",
            "combined",
        }
    assert len(results["tests"]["full"]["phases"][4]["details"]["probes"]) == 13
    similarity = [error for error in results["errors"] if error["type"] == "similarity"]
    assert len(similarity) == 3 + 13
    assert all(len(error["generated"]) <= 200 for error in similarity)


def test_a_question_about_a_fact_that_does_not_fit_is_named_before_anything_is_trained(tmp_path, monkeypatch):
    config = default_config("cpu").replace(**{"model.max_position_embeddings": 8, "data.sequence_length": 8})
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    prompts = {name: [{"text": f"The {name}", "answer": "is"}] for name in ("fast", "full")}
    (tmp_path / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    files = ["--config", str(tmp_path / "config.json"), "--prompts", str(tmp_path / "prompts.json")]
    monkeypatch.setattr(suite, "run", lambda *_: pytest.fail("it ran"))
    with pytest.raises(UserError, match=r"prompt 'The .*: \d+ tokens; at most 8 \(max_position_embeddings\)"):
        suite.main([*files, "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("left", [[], ["cpu/step-000100"]])
def test_an_interrupted_suite_leaves_what_was_trained_and_no_empty_folder(left, tmp_path, monkeypatch):
    def interrupted(plans, skipped, folder, *_):
        for name in left:
            (folder / name).mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "make_plans", lambda *_: [])
    monkeypatch.setattr(suite, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        suite.main(["--output-dir", str(tmp_path)])
    found = [path.relative_to(path.parents[1]) for path in tmp_path.glob("runs/*/*/*")]
    assert [str(path) for path in found] == left
    assert (tmp_path / "runs").exists() == bool(left)


def test_an_exception_in_a_phase_is_reported_and_ends_the_test(tmp_path, monkeypatch):
    def broken(session):
        raise ZeroDivisionError("a defect")

    monkeypatch.setitem(phases.PHASES, "training", broken)
    changes = {"model.max_position_embeddings": 128, "train.steps": 2}
    code = suite.main(["--config", str(write_text_run(tmp_path, **changes)), "--output-dir", str(tmp_path / "out")])
    [path] = (tmp_path / "out").glob("*.json")
    results = json.loads(path.read_text(encoding="utf-8"))
    assert code == 1
    assert results["tests"]["cpu"]["status"] == "error"
    statuses = {phase["name"]: phase["status"] for phase in results["tests"]["cpu"]["phases"]}
    assert statuses["training"] == "error"
    assert {statuses[name] for name in ("propagation", "generation", "control", "recall", "performance")} == {"skipped"}
    [error] = [error for error in results["errors"] if error["type"] == "training"]
    assert "ZeroDivisionError: a defect" in error["message"]
    assert "in broken" in error["stack_trace"]
    assert error["configuration"]["train"]["steps"] == 2
    assert "cpu: training: ZeroDivisionError: a defect" in results["verdict"]["failed"]


def test_a_file_that_cannot_be_written_ends_with_2_after_the_results_are_written(tmp_path, monkeypatch):
    def full(session):
        with os_errors_as("step-000200: cannot be written"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setitem(phases.PHASES, "training", full)
    changes = {"model.max_position_embeddings": 128, "train.steps": 2}
    arguments = ["--config", str(write_text_run(tmp_path, **changes)), "--output-dir", str(tmp_path / "out")]
    line = r"^step-000200: cannot be written: No space left on device; what was found until then is in .*\.json$"
    with pytest.raises(UserError, match=line):
        suite.main(arguments)
    [path] = (tmp_path / "out").glob("*.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    [phase] = [phase for phase in found["tests"]["cpu"]["phases"] if phase["status"] == "error"]
    assert phase["file_failed"] == "step-000200: cannot be written: No space left on device"
    assert found["verdict"]["passed"] is False


GPU_FAILURES = [
    *((phase, torch.AcceleratorError("CUDA error: unspecified launch failure\nmore")) for phase in phases.PHASES),
    ("training", GpuError("the GPU failed after step 1: CUDA error: unspecified launch failure")),
]


@pytest.mark.parametrize(("phase", "error"), GPU_FAILURES)
def test_a_gpu_that_fails_ends_with_one_line_after_the_results_are_written(tmp_path, monkeypatch, phase, error):
    asked = []

    def failing(session):
        asked.append(session.plan.name)
        raise error

    monkeypatch.setitem(phases.PHASES, phase, failing)
    monkeypatch.setattr(phases.Plan, "device", "gpu")
    changes = {"model.max_position_embeddings": 128, "train.steps": 2, "suite.full_training_steps": 3}
    config = write_text_run(tmp_path, **changes)
    arguments = ["--config", str(config), "--full-training", "--output-dir", str(tmp_path / "out")]
    with pytest.raises(
        GpuError, match=r"^the GPU failed (after step 1|while .*): .* launch failure; what was found until then is in "
    ) as caught:
        suite.main(arguments)
    assert "\n" not in str(caught.value)
    [path] = (tmp_path / "out").glob("*.json")
    assert str(path) in str(caught.value)
    results = json.loads(path.read_text(encoding="utf-8"))
    tests = results["tests"]
    assert asked == ["cpu"]
    assert tests["cpu"]["status"] == "error"
    assert (tests["full"]["status"], tests["full"]["reason"]) == ("skipped", "the GPU failed in the test before")
    assert results["verdict"]["passed"] is False
    assert any("the GPU failed " in reason for reason in results["verdict"]["failed"])


def test_a_gpu_that_fails_before_the_first_test_ends_with_one_line(tmp_path, monkeypatch):
    def failing(session):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(suite, "set_up", failing)
    config = write_text_run(tmp_path, **{"model.max_position_embeddings": 128})
    expected = r"^out of GPU memory while setting up: lower train.batch_size .* \(CUDA out of memory. Tried .*\)$"
    with pytest.raises(GpuError, match=expected):
        suite.main(["--config", str(config), "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_does_not_answer_leaves_the_cpus_test(monkeypatch):
    def busy(*_):
        raise torch.AcceleratorError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("get_device_capability", "get_device_name", "get_device_properties", "get_rng_state_all"):
        monkeypatch.setattr(torch.cuda, name, busy)
    configs, skipped = suite.choose_configs(suite._parser().parse_args([]))
    assert set(configs) == {"cpu"}
    assert re.search(
        r"^the GPU failed while being asked what it can do: CUDA error: .* busy or unavailable$", skipped["gpu"]
    )
    triton.available.cache_clear()
    try:
        facts = info.collect()
    finally:
        triton.available.cache_clear()
    assert facts["machine"]["gpu"]["name"].startswith("does not answer: CUDA error: ")
    assert {row["implementation"] for row in facts["operators"]["cuda"]} == {"reference"}
    assert checkpoint.random_states()["cuda"] == []  # of a run on the CPU, which needs no GPU


def test_a_gpu_that_cannot_run_the_config_leaves_the_cpus_test(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old GPU")
    configs, skipped = suite.choose_configs(suite._parser().parse_args([]))
    assert set(configs) == {"cpu"}
    assert "Old GPU (compute capability 7.5) cannot multiply it" in skipped["gpu"]
    configs, _ = suite.choose_configs(suite._parser().parse_args(["--gpu-only"]))
    assert set(configs) == {"gpu"}  # there the mistake is the user's, and said before anything is trained


@pytest.mark.parametrize(("kernel", "decoder"), [("reference", "OperatorDecoder"), ("auto", "NativeDecoder")])
def test_the_questions_are_answered_by_the_kernels_that_the_results_name(tmp_path, monkeypatch, kernel, decoder):
    needs_native()
    generate_module, taken = sys.modules["dsfast.model.generate"], set()
    for name in ("OperatorDecoder", "NativeDecoder"):
        own = getattr(generate_module, name)
        monkeypatch.setattr(generate_module, name, lambda *args, own=own: (taken.add(own.__name__), own(*args))[1])
    changes = {"model.max_position_embeddings": 128, "train.steps": 2, "runtime.kernels": {"default": kernel}}
    suite.main(["--config", str(write_text_run(tmp_path, **changes)), "--output-dir", str(tmp_path / "out")])
    assert taken == {decoder}


def test_a_users_mistake_in_setting_up_writes_nothing(tmp_path):
    config = write_text_run(tmp_path, **{"model.max_position_embeddings": 128, "train.batch_size": 10_000})
    with pytest.raises(UserError, match="too few articles for one batch"):
        suite.main(["--config", str(config), "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_prompt_longer_than_the_context_is_noticed_before_training(tmp_path):
    config = write_text_run(tmp_path, **{"model.max_position_embeddings": 16})
    with pytest.raises(UserError, match=r"prompt .* tokens; at most 16"):
        suite.main(["--config", str(config), "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_every_knob_the_page_names_is_real():
    page = (CONFIGS.parent / "docs" / "TESTS.md").read_text(encoding="utf-8")
    config = load_config(CONFIGS / "deepseek_v3_test_run_cpu.json").to_dict()
    keys = re.findall(r"`(model|data|train|runtime|suite)\.(\w+)`", page)
    assert len(keys) >= 20
    assert [f"{section}.{key}" for section, key in keys if key not in config[section]] == []
    flags = {flag for action in suite._parser()._actions for flag in action.option_strings}
    named = set(re.findall(r"--[a-z][-a-z]+", page))
    assert named <= flags
    assert flags - named == {"--help", "-h"}


def test_each_suite_of_a_second_has_a_folder_of_its_own(tmp_path):
    found = [suite._own_folder(tmp_path / "runs" / "suite_1").name for _ in range(3)]
    assert found == ["suite_1", "suite_1_2", "suite_1_3"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/suite_1: cannot be made: Not a directory"):
        suite._own_folder(tmp_path / "file" / "suite_1")
