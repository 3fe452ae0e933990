"""The error reports of the results file: one for everything that went wrong, with what is needed to see why.

Every report has type (training, exception, kernels, propagation, similarity, timing, threshold), severity, test, phase
and message; the rest depends on the type.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dsfast.config import Config
from dsfast.suite.verdict import THRESHOLDS, Check

GENERATED_SHOWN = 200  # characters of a wrong answer

Report = dict[str, Any]


def error_reports(test: str, config: Config, phase: dict[str, Any], checks: list[Check]) -> list[Report]:
    """The reports of one phase that has ended. One that broke off gives its stack trace and the configuration."""
    if phase["status"] == "error":
        kind = "training" if phase["name"] in ("set-up", "training") else "exception"
        trace = {"stack_trace": phase["stack_trace"], "configuration": config.to_dict()}
        return [{**_head(kind, "critical", test, phase, phase["reason"]), **trace}]
    found = {"kernels": _kernels, "propagation": _propagation, "generation": _similarity}.get(phase["name"], _none)
    return [*found(test, phase), *(_threshold(test, phase, check) for check in checks if check.status == "FAIL")]


def _head(kind: str, severity: str, test: str, phase: dict[str, Any], message: str) -> Report:
    return {"type": kind, "severity": severity, "test": test, "phase": phase["name"], "message": message}


def _none(test: str, phase: dict[str, Any]) -> Iterator[Report]:
    yield from ()


def _kernels(test: str, phase: dict[str, Any]) -> Iterator[Report]:
    for row in phase["details"]["comparisons"]:
        if not row["passed"]:
            what = f"{row['operator']} ({row['implementation']}): {row['quantity']} differs from the float64 reference"
            limits = {"expected": f"at most {row['tolerance']:.3g}", "actual": f"{row['max_abs_error']:.3g}"}
            yield {**_head("kernels", "critical", test, phase, what), **limits}
    for operator in phase["details"]["missing"]:
        yield _head("kernels", "critical", test, phase, f"{operator}: was not compared with anything")


def _propagation(test: str, phase: dict[str, Any]) -> Iterator[Report]:
    for check in phase["details"]["checks"]:
        if not check["passed"]:
            head = _head("propagation", "critical", test, phase, f"{check['name']} check failed")
            yield {**head, "expected": check["expected"], "actual": check["actual"], "debug": check["debug"]}


def _similarity(test: str, phase: dict[str, Any]) -> Iterator[Report]:
    """One wrong answer is a warning; too many of them are the success rate's error."""
    for probe in phase["details"]["probes"]:
        if not probe["exact"]:
            head = _head("similarity", "warning", test, phase, f"wrong answer to {probe['prompt']!r}")
            answers = {"expected": probe["expected"], "generated": probe["generated"][:GENERATED_SHOWN]}
            scores = {"score": probe["similarity"]["combined"], "metrics": probe["similarity"]}
            yield {**head, "prompt": probe["prompt"], **answers, **scores, "priority": probe["priority"]}


def _threshold(test: str, phase: dict[str, Any], check: Check) -> Report:
    report = _head("threshold", check.severity, test, phase, check.reason)
    report |= {"expected": check.expected, "actual": check.actual, "source": check.source}
    if check.name == "training_time":
        details, limit = phase["details"], THRESHOLDS.training_time.value
        report |= {
            "type": "timing",
            "expected": f"at most {limit * details['target_seconds']:.1f} s ({limit:g} times the target)",
            "actual": f"{details['training_seconds']:.1f} s",
        }
    return report
