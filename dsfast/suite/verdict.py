"""What a run is held to, and whether it passed.

Every limit stands here once, with its severity and its source. A failed check of severity "critical" or "error" fails
the suite; a "warning" is shown and recorded. What could not be measured is SKIP, never PASS.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["critical", "error", "warning"]
Status = Literal["PASS", "FAIL", "SKIP"]

PARTED = 0.03
"""Relative difference of a step's losses above which CPU and GPU are said to have parted: what bfloat16 may make."""
_RELATIONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le, "==": operator.eq}


@dataclass(frozen=True)
class Limit:
    """`value` (in `unit`) that a measurement must stand in `relation` to."""

    relation: Literal[">", ">=", "<", "<=", "=="]
    value: float
    unit: Literal["fraction", "times", "GB", "count"]
    severity: Severity
    source: str
    usual: str = ""
    """What the specification expects, where that has another end too."""

    def holds(self, measured: float) -> bool:
        return bool(_RELATIONS[self.relation](measured, self.value))

    def __str__(self) -> str:
        return f"{self.relation} {show(self.value, self.unit)}"


@dataclass(frozen=True)
class Thresholds:
    """All limits of the suite. The sources are sections of the specification, or dsfast's own goals."""

    kernels_failed: Limit = Limit("==", 0, "count", "critical", "dsfast: every kernel is held to its reference")
    propagation_failed: Limit = Limit("==", 0, "count", "critical", "Propagation Checks")
    control_answered: Limit = Limit("==", 0, "count", "critical", "dsfast: the untrained model must fail the prompts")
    fast_success: Limit = Limit(">", 0.5, "fraction", "error", "Success Rates: Fast Training")
    full_success: Limit = Limit(">", 0.6, "fraction", "error", "Success Rates: Full Training")
    high_success: Limit = Limit(">", 0.7, "fraction", "error", "Success Rates: High Priority")
    medium_success: Limit = Limit(">", 0.5, "fraction", "error", "Success Rates: Medium Priority")
    low_success: Limit = Limit(">", 0.3, "fraction", "error", "Success Rates: Low Priority")
    training_time: Limit = Limit("<=", 2.0, "times", "error", "Training Times: within 2x the target")
    taught_recall: Limit = Limit(">=", 0.9, "fraction", "warning", "dsfast: recall on taught phrasings")
    cpu_memory: Limit = Limit("<", 16.0, "GB", "warning", "Performance Benchmarks: CPU Memory")
    gpu_memory: Limit = Limit("<", 2.0, "GB", "warning", "Performance Benchmarks: GPU VRAM")
    training_speedup: Limit = Limit(">=", 5.0, "times", "warning", "Performance Benchmarks: Training Speedup", "5-15x")
    generation_speedup: Limit = Limit(
        ">=", 3.0, "times", "warning", "Performance Benchmarks: Generation Speedup", "3-10x"
    )


THRESHOLDS = Thresholds()

# The propagation checks' own limits (specification, "Propagation Checks").
PARAMETERS_MIN, PARAMETERS_MAX = 400_000, 600_000
GRADIENT_SHARE_MIN = 0.5


@dataclass(frozen=True)
class Check:
    """One measurement against one limit. `value` is None where nothing was measured."""

    test: str
    name: str
    status: Status
    severity: Severity
    value: float | None
    expected: str
    actual: str
    reason: str
    source: str

    @property
    def fatal(self) -> bool:
        return self.status == "FAIL" and self.severity != "warning"


def check(test: str, name: str, measured: float | None, skip_reason: str = "not measured") -> Check:
    """Hold `measured` to the limit called `name`; None is SKIP with `skip_reason`."""
    limit: Limit = getattr(THRESHOLDS, name)
    if measured is None:
        return Check(test, name, "SKIP", limit.severity, None, str(limit), "not measured", skip_reason, limit.source)
    passed = limit.holds(measured)
    actual = show(measured, limit.unit)
    reason = f"{name.replace('_', ' ')} is {actual}, {'as' if passed else 'not'} {limit}"
    return Check(
        test, name, "PASS" if passed else "FAIL", limit.severity, measured, str(limit), actual, reason, limit.source
    )


def judge_phase(test: str, phase: str, details: Mapping[str, Any]) -> list[Check]:
    """Hold the details of one phase (see suite.phases) to their limits; a phase without limits gives none."""
    if phase == "generation":
        measured = {f"{name}_success": rate for name, rate in details["success"].items()}
    elif phase == "recall":
        measured = {"taught_recall": (details["taught"] or {}).get("fraction")}
    elif phase == "performance":
        measured = {"training_time": details["times_target"], f"{details['device']}_memory": details["memory_gb"]}
    else:
        measured = {name: details[key] for phase_name, key, name in _COUNTS if phase_name == phase}
    return [check(test, name, value, details.get("reason", "not measured")) for name, value in measured.items()]


_COUNTS = (
    ("kernels", "failed", "kernels_failed"),
    ("propagation", "failed", "propagation_failed"),
    ("control", "answered", "control_answered"),
)


def judge_comparison(comparison: Mapping[str, Any]) -> list[Check]:
    """The speed-ups of the GPU over the CPU; SKIP where one of them did not run."""
    reason = comparison.get("reason", "not measured")
    names = ("training_speedup", "generation_speedup")
    return [check("comparison", name, comparison.get(name), reason) for name in names]


def verdict(tests: Mapping[str, Mapping[str, Any]], checks: Iterable[Check]) -> dict[str, Any]:
    """PASS where at least one test ran, every phase ran to its end, and no check worse than a warning failed.

    Args: test name -> {status, reason, phases: [{name, status, reason}]}; the checks of all tests.
    """
    checks = list(checks)
    failed = [f"{c.test}: {c.reason}" for c in checks if c.fatal]
    for name, test in tests.items():
        failed += [f"{name}: {p['name']}: {p['reason']}" for p in test["phases"] if p["status"] == "error"]
    if all(test["status"] == "skipped" for test in tests.values()):
        failed.append("no test ran")
    return {
        "status": "FAIL" if failed else "PASS",
        "passed": not failed,
        "failed": failed,
        "warnings": [f"{c.test}: {c.reason}" for c in checks if c.status == "FAIL" and not c.fatal],
        "skipped": [f"{name}: {test['reason']}" for name, test in tests.items() if test["status"] == "skipped"],
        "not_checked": [f"{c.test}: {c.name}: {c.reason}" for c in checks if c.status == "SKIP"],
        "checks": [asdict(c) for c in checks],
    }


def show(value: float, unit: str) -> str:
    """A measurement as people read it: 66.7%, 2.40x, 1.21 GB, 3."""
    if unit == "fraction":
        return f"{100 * value:.1f}%"
    return {"times": f"{value:.2f}x", "GB": f"{value:.2f} GB"}.get(unit, f"{value:g}")
