"""The tests of the suite and the phases of each: what is done and measured. What it is worth, suite.verdict says.

A phase is a function of the session; it returns its details, ready for JSON. An exception inside one is recorded with
its stack trace and ends the test: its remaining phases are skipped.
"""

from __future__ import annotations

import copy
import gc
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from dsfast import ops
from dsfast.config import Config
from dsfast.data import Prompt, PromptSets
from dsfast.data.prompts import PRIORITIES
from dsfast.errors import FileError, GpuError
from dsfast.evaluate import ProbeResult, ask, check_lengths, check_taught, measure_taught
from dsfast.evaluate.one_call import check_one_calls
from dsfast.evaluate.recall import as_json
from dsfast.model import DeepseekV3, parameter_counts
from dsfast.model.gpu import gpu_errors_while
from dsfast.suite.error_reports import error_reports
from dsfast.suite.propagation import check_call, check_propagation
from dsfast.suite.report import Reporter
from dsfast.suite.verdict import PARTED, Check, judge_phase
from dsfast.train import Trainer, TrainResult
from dsfast.train.metrics import largest_difference, relative_differences
from dsfast.train.runtime import answering

DEVICE_NAMES = {"cpu": "cpu", "cuda": "gpu"}
REMEDY = "lower train.batch_size or data.sequence_length"

Details = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """One test: `name` is "cpu", "gpu" or "full". What it asks: set name -> prompts."""

    name: str
    title: str
    config: Config
    prompts: dict[str, list[Prompt]]

    @property
    def device(self) -> str:
        """ "cpu" or "gpu"."""
        return DEVICE_NAMES[self.config.runtime.device]


def fast_plan(config: Config, prompts: PromptSets) -> Plan:
    """Test 1 (CPU) or 2 (GPU): the fast prompts."""
    device = DEVICE_NAMES[config.runtime.device]
    title = f"Test {1 if device == 'cpu' else 2}: fast {device.upper()} training ({config.train.steps} steps)"
    return Plan(device, title, config, {"fast": prompts.fast})


def full_plan(config: Config, prompts: PromptSets) -> Plan:
    """Test 3: suite.full_training_steps steps, a target time that grows with them, all prompts."""
    steps = config.suite.full_training_steps
    target = config.suite.target_seconds * steps / config.train.steps
    longer = config.replace(**{"train.steps": steps, "suite.target_seconds": target})
    title = f"Test 3: full training on the {DEVICE_NAMES[config.runtime.device].upper()} ({steps} steps)"
    return Plan("full", title, longer, {"fast": prompts.fast, "full": prompts.full})


@dataclass
class Session:
    """What the phases of one test hand on to each other."""

    plan: Plan
    folder: Path | None = None
    """Where the run keeps its metrics and checkpoint; None keeps nothing."""
    trainer: Trainer | None = None
    untrained: DeepseekV3 | None = None
    result: TrainResult | None = None
    probes: dict[str, list[ProbeResult]] = field(default_factory=dict)

    def ask(self, model: DeepseekV3, prompts: Sequence[Prompt]) -> list[ProbeResult]:
        with answering(model, self.plan.config, None):
            return ask(model, self.trainer.dataset.tokenizer, prompts, self.plan.config.suite.max_new_tokens)


def set_up(session: Session) -> Details:
    """Data, tokenizer, the untrained model. Raises UserError for whatever the user can mend."""
    config = session.plan.config
    session.trainer = Trainer(config, session.folder)
    data, model = session.trainer.dataset, session.trainer.model
    data.rows.batch(0, config.train.batch_size)
    for prompts in session.plan.prompts.values():
        check_lengths(data.tokenizer, prompts, config.model.max_position_embeddings)
    check_taught(data.tokenizer, data.taught, config.model.max_position_embeddings)
    session.untrained = copy.deepcopy(model)
    with session.trainer.kernels():
        operators = ops.report(config.runtime.device, session.trainer.precision.tensors)
    return {"data": data.manifest, "parameters": parameter_counts(model), "operators": operators}


def kernels(session: Session) -> Details:
    """Every operator, in every implementation that runs here, against its float64 reference."""
    precision = session.trainer.precision
    rows = ops.check_all(session.plan.config.runtime.device, precision.tensors, precision.products)
    missing = sorted(set(ops.OPERATORS) - {row["operator"] for row in rows})
    failed = sum(not row["passed"] for row in rows) + len(missing)
    return {"failed": failed, "missing": missing, "comparisons": rows}


def training(session: Session) -> Details:
    """The run itself. Tokens per second are those of the whole run; the losses are one per step.

    preparation_seconds, utilisation and experts_used: as in `TrainResult`; whole_step: the last step was one native call.
    """
    device = session.plan.config.runtime.device
    if device == "cuda":  # the kernels' comparisons, and a test before this one, are not the run's memory
        gc.collect()  # a recorded step and its model hold each other
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    session.result = result = session.trainer.train()
    return {
        "steps": result.steps,
        "seconds": result.seconds,
        "preparation_seconds": result.preparation_seconds,
        "utilisation": result.utilisation,
        "tokens_per_second": result.tokens_per_second,
        "skipped_steps": result.skipped_steps,
        "checkpoint": str(result.checkpoint),
        "final_loss": result.final_loss,
        "experts_used": result.experts_used,
        "losses": result.losses,
        "whole_step": session.trainer.gradients.in_one_call,
        "precision": {name: str(dtype) for name, dtype in session.trainer.precision._asdict().items()},
        "fallbacks": _fallbacks(device),
    }


def _fallbacks(device: str) -> list[dict[str, str]]:
    """What ran, up to now, in another way than it should on `device`."""
    return [row for row in ops.fallbacks() if row["device"] == device]


def propagation(session: Session) -> Details:
    """The propagation checks, on the model just trained and the batch that would come next."""
    config, trainer = session.plan.config, session.trainer
    batch = trainer.dataset.rows.batch(config.train.steps, config.train.batch_size)
    with trainer.kernels():
        checks = check_propagation(
            trainer.model, batch, trainer.precision.tensors, trainer.config.train.mtp_loss_weight
        )
        checks += map(check_call, check_one_calls(trainer))
    return {"failed": sum(not c.passed for c in checks), "checks": [asdict(c) for c in checks]}


def generation(session: Session) -> Details:
    """The prompts, greedily, one by one. Beforehand the first is asked once more, on a GPU all of them: kernels are compiled
    then, for long prompts others than for short ones.

    preparation_seconds: what that took on a GPU, in no answer's seconds; None on a CPU, which has nothing to prepare.
    """
    model, started, on_gpu = session.trainer.model, time.perf_counter(), session.plan.device == "gpu"
    prompts = [prompt for prompts in session.plan.prompts.values() for prompt in prompts]
    session.ask(model, prompts if on_gpu else prompts[:1])
    preparation = time.perf_counter() - started if on_gpu else None
    session.probes = {name: session.ask(model, prompts) for name, prompts in session.plan.prompts.items()}
    return {
        "preparation_seconds": preparation,
        "fallbacks": _fallbacks(session.plan.config.runtime.device),
        "success": success_rates(session.probes),
        "probes": [{"set": name, **probe.to_dict()} for name, probes in session.probes.items() for probe in probes],
    }


def success_rates(probes: dict[str, list[ProbeResult]]) -> dict[str, float]:
    """The share of exact answers by prompt set, and by priority over the set "full" where it was asked."""
    full = probes.get("full", [])
    groups = {**probes, **{priority: [p for p in full if p.prompt.priority == priority] for priority in PRIORITIES}}
    return {name: fmean(p.exact for p in group) for name, group in groups.items() if group}


def control(session: Session) -> Details:
    """The same prompts to the untrained model of the same seed: what it answers was not learnt."""
    results = [
        result for prompts in session.plan.prompts.values() for result in session.ask(session.untrained, prompts)
    ]
    answered = [result.to_dict() for result in results if result.exact]
    return {"asked": len(results), "answered": len(answered), "answers": answered}


def recall(session: Session) -> Details:
    """All taught facts: in the phrasings of the training text, and in those held out from it."""
    facts = session.trainer.dataset.taught
    if not facts:
        return {"taught": None, "heldout": None, "reason": "the text is not dsfast's own: it teaches no known facts"}
    with answering(session.trainer.model, session.plan.config, None):
        recalls = measure_taught(session.trainer.model, session.trainer.dataset.tokenizer, facts)
    return {"facts": len(facts), **as_json(recalls)}


def performance(session: Session) -> Details:
    """Training time against its target, generation speed, peak memory in 1e9 bytes (of the process, or of the GPU)."""
    result, target = session.result, session.plan.config.suite.target_seconds
    return {
        "device": session.plan.device,
        "training_seconds": result.seconds,
        "preparation_seconds": result.preparation_seconds,
        "utilisation": result.utilisation,
        "target_seconds": target,
        "times_target": result.seconds / target,
        "tokens_per_second": result.tokens_per_second,
        "seconds_per_answer": fmean(p.seconds for probes in session.probes.values() for p in probes),
        "memory_gb": result.peak_memory_bytes / 1e9,
    }


PHASES: dict[str, Callable[[Session], Details]] = {
    "set-up": set_up,
    "kernels": kernels,
    "training": training,
    "propagation": propagation,
    "generation": generation,
    "control": control,
    "recall": recall,
    "performance": performance,
}


def run_test(plan: Plan, folder: Path, reporter: Reporter) -> tuple[dict[str, Any], list[Check], list[dict[str, Any]]]:
    """Run the phases of one test. Returns (its part of the results file, its checks, its error reports)."""
    session = Session(plan, folder / plan.name)
    phases, checks, errors = [], [], []
    reporter.test_begins(plan.title)
    for name, function in PHASES.items():
        if phases and phases[-1]["status"] in ("error", "skipped"):
            phases.append({"name": name, "status": "skipped", "seconds": 0.0, "reason": "an earlier phase broke off"})
            continue
        reporter.phase_begins(name)
        phase, found = run_phase(name, partial(function, session), plan.name)
        phases.append(phase)
        checks += found
        errors += error_reports(plan.name, plan.config, phase, found)
        reporter.phase_ends(phase, found)
    broken = any(phase["status"] == "error" for phase in phases)
    status = "error" if broken else "failed" if any(c.fatal for c in checks) else "passed"
    return _test_entry(plan, status, phases), checks, errors


def run_phase(name: str, function: Callable[[], Details], test: str) -> tuple[dict[str, Any], list[Check]]:
    """Time one phase and hold it to its limits; an exception makes its status "error".

    gpu_failed is in the phase of a GPU that failed, file_failed in that of a file that cannot be read or written: one line each.
    """
    start = time.perf_counter()
    try:
        with gpu_errors_while(f"running the phase {name!r}", REMEDY):
            details = function()
    except Exception as error:
        phase = {"name": name, "status": "error", "seconds": time.perf_counter() - start}
        if isinstance(error, GpuError):
            phase["gpu_failed"] = str(error)
        elif isinstance(error, FileError):
            phase["file_failed"] = str(error)
        return {**phase, "reason": f"{type(error).__name__}: {error}", "stack_trace": traceback.format_exc()}, []
    seconds = time.perf_counter() - start
    checks = judge_phase(test, name, details)
    return {"name": name, "status": _status(checks), "seconds": seconds, "details": details}, checks


def _status(checks: list[Check]) -> str:
    if any(c.fatal for c in checks):
        return "failed"
    return "warning" if any(c.status == "FAIL" for c in checks) else "passed"


def _test_entry(plan: Plan, status: str, phases: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "title": plan.title,
        "status": status,
        "reason": None,
        "device": plan.device,
        "seconds": sum(phase["seconds"] for phase in phases),
        "config": plan.config.to_dict(),
        "config_sha256": plan.config.hash(),
        "phases": phases,
    }


def line_of(test: dict[str, Any], kind: str) -> str | None:
    """The line `kind`, "gpu_failed" or "file_failed", of a test's entry; None where it has none."""
    return next((phase[kind] for phase in test["phases"] if kind in phase), None)


def skipped_test(title: str, reason: str) -> dict[str, Any]:
    """The entry of a test that was not run."""
    return {"title": title, "status": "skipped", "reason": reason, "phases": []}


def compare(cpu: dict[str, Any], gpu: dict[str, Any]) -> dict[str, Any]:
    """CPU against GPU from the entries of the two fast tests; {"reason": ...} where one has no performance to show.

    training_speedup: of the steps alone; training_speedup_prepared: with what the GPU had to prepare before them; losses: see
    `compare_losses`.
    """
    numbers, losses = {}, []
    for name, test in (("CPU", cpu), ("GPU", gpu)):
        details = {p["name"]: p["details"] for p in test["phases"] if "details" in p}
        if "performance" not in details:
            return {"reason": test["reason"] or f"the {name} test broke off"}
        numbers[name] = details["performance"]
        losses.append(details.get("training", {}).get("losses", []))

    def ratio(key: str, before: float = 0.0) -> float:
        return numbers["CPU"][key] / (numbers["GPU"][key] + before)

    return {
        "training_speedup": ratio("training_seconds"),
        "training_speedup_prepared": ratio("training_seconds", numbers["GPU"]["preparation_seconds"]),
        "generation_speedup": ratio("seconds_per_answer"),
        "losses": compare_losses(*losses),
    }


def compare_losses(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float | int | None] | None:
    """The largest relative difference of two runs' losses and the step it is at; part_at_step: the first step, from 1, at which
    they differ by more than PARTED, None if they never do. None where there is no step that both have done."""
    if not (ours and theirs):
        return None
    found = relative_differences(theirs, ours)
    parted = (step for step, difference in enumerate(found, 1) if not difference <= PARTED)
    return {**largest_difference(found), "part_at_step": next(parted, None)}
