"""What the suite shows on the console while it runs and when it ends. Colour on a terminal, plain text elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dsfast.console import make_console, make_table
from dsfast.data.prompts import PRIORITIES
from dsfast.files import Json
from dsfast.suite.verdict import PARTED, THRESHOLDS, Check, show

SHOWN = 48  # characters of a generated answer in a table
BUSY = 0.5  # share of the steps' time from which a GPU is used well enough
PASSED, FAILED = "✓ ALL TESTS PASSED", "✗ SOME TESTS FAILED"
_MARKS = {"passed": ("✓", "green"), "failed": ("✗", "red"), "error": ("✗", "red"), "warning": ("⚠", "yellow")}
_STATUS_STYLES = {"PASS": "green", "FAIL": "red", "SKIP": "yellow"}


class Reporter:
    """Prints to `console`, by default standard output."""

    def __init__(self, console: Console | None = None):
        self.console = console or make_console()

    def environment(self, facts: Json) -> None:
        machine, versions, native = facts["machine"], facts["versions"], facts["native"]
        gpu = machine["gpu"]["name"] if machine["gpu"] else "none"
        self._line("dsfast suite", "bold")
        self._line(
            f"  machine   {machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, GPU: {gpu}"
        )
        self._line(
            f"  versions  Python {versions['python']}, torch {versions['torch']}, commit {_commit(facts['commit'])}"
        )
        self._line(f"  kernels   {native['reason']}")
        if machine["gpu"]:
            self._line(f"  cache     {facts['caches']['kernels']} (GPU kernels as compiled)")

    def test_begins(self, title: str) -> None:
        self._line(f"\n── {title} ", "bold")

    def phase_begins(self, name: str) -> None:
        if name == "training":  # the only phase long enough to be watched; it shows its own progress
            self._line("  … training")

    def phase_ends(self, phase: Json, checks: Iterable[Check]) -> None:
        mark, style = _MARKS[phase["status"]]
        line = phase["reason"] if phase["status"] == "error" else _HEADLINES[phase["name"]](phase["details"])
        self._line(f"  {mark} {phase['name']:<12} {phase['seconds']:7.1f} s   {line}", style)
        if phase["status"] == "error":
            self._line(phase["stack_trace"])
            return
        detail = _DETAILS.get(phase["name"])
        if detail is not None:
            self.console.print(Padding(detail(phase["details"]), (0, 0, 1, 4)))
        for check in checks:
            if check.status != "PASS":
                self._line(f"    {'⚠' if check.severity == 'warning' else '✗'} {check.reason}", "yellow")

    def summary(self, results: Json, path: Path | None) -> None:
        """Errors, checks, success by priority, performance, what was skipped, the banner, where the file is."""
        verdict = results["verdict"]
        self._errors(results["errors"])
        self.console.print(checks_table(verdict["checks"]))
        full = find_details(results["tests"]["full"], "generation")
        if full:
            self.console.print(priority_table(full))
        self._line("\n".join(performance_block(results)))
        for fallback in fallbacks(results["tests"]):
            self._line(f"FELL BACK  {fallback['operator']} on {fallback['device']}: {fallback['reason']}", "yellow")
        for skipped in verdict["skipped"]:
            self._line(f"SKIPPED  {skipped}", "yellow")
        for failed in verdict["failed"]:
            self._line(f"FAILED   {failed}", "red")
        passed = verdict["passed"]
        self._line(f"\n{PASSED if passed else FAILED}", "bold green" if passed else "bold red")
        ran = [name for name, test in results["tests"].items() if test["status"] != "skipped"]
        self._line(f"tests run: {', '.join(ran)}; results: {path or 'not written'}")

    def _errors(self, errors: list[Json]) -> None:
        if errors:
            self._line(f"\nError reports ({len(errors)})", "bold")
        for error in errors:
            self._line(f"  [{error['severity']}] {error['test']}: {error['type']}: {error['message']}", "yellow")
            for key in ("expected", "actual", "generated", "score", "priority", "debug"):
                if key in error:
                    self._line(f"      {key}: {_plain(error[key])}")

    def _line(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style=style), soft_wrap=True)


def fallbacks(tests: Json) -> list[Json]:
    """What ran in another way than it should, each once."""
    found = [find_details(test, phase) or {} for test in tests.values() for phase in ("training", "generation")]
    rows = [row for details in found for row in details.get("fallbacks", [])]
    return [row for place, row in enumerate(rows) if row not in rows[:place]]


def find_details(test: Json, phase: str) -> Json | None:
    """The details of a phase that ran to its end."""
    return next((p["details"] for p in test["phases"] if p["name"] == phase and "details" in p), None)


def checks_table(checks: Iterable[Json]) -> Table:
    table = _table("Checks", "test", "check", "limit", "measured", "severity", "status")
    for c in checks:
        status = Text(c["status"], style=_STATUS_STYLES[c["status"]])
        table.add_row(c["test"], c["name"].replace("_", " "), c["expected"], c["actual"], c["severity"], status)
    return table


def priority_table(generation: Json) -> Table:
    """Success of the full prompts by priority."""
    table = _table("Success by priority (full prompts)", "priority", "exact", "asked", "rate", "limit", "status")
    for priority in PRIORITIES:
        exact = [p["exact"] for p in generation["probes"] if p["set"] == "full" and p["priority"] == priority]
        if exact:
            limit, rate = getattr(THRESHOLDS, f"{priority}_success"), sum(exact) / len(exact)
            status = "PASS" if limit.holds(rate) else "FAIL"
            row = (priority, str(sum(exact)), str(len(exact)), show(rate, "fraction"), str(limit))
            table.add_row(*row, Text(status, style=_STATUS_STYLES[status]))
    return table


def performance_block(results: Json) -> list[str]:
    """The specification's performance blocks: "Good Performance" where nothing in it carries a warning."""
    measured = {name: find_details(results["tests"][name], "performance") for name in ("cpu", "gpu", "full")}
    measured = {name: details for name, details in measured.items() if details}
    if not measured:
        return []
    speedups = results["comparison"]
    lines = ["Training Time:", *(f"  {_label(n)}: {training_time(d)}" for n, d in measured.items())]
    lines += _speedup(speedups, "training_speedup")
    lines += ["", "Generation Speed (avg):"]
    lines += [f"  {_label(n)}: {d['seconds_per_answer']:.3f}s" for n, d in measured.items()]
    lines += _speedup(speedups, "generation_speedup")
    lines += _gpu_lines({name: d for name, d in measured.items() if d["device"] == "gpu"}, speedups)
    poor = any("⚠" in line for line in lines)
    return ["", f"{'Poor' if poor else 'Good'} Performance:", *lines, ""]


def training_time(performance: Json) -> str:
    """ "11.2min (target: 12.0min)", with a warning where it is above the target."""
    seconds, target = performance["training_seconds"], performance["target_seconds"]
    slower = f" ⚠ {seconds / target:.1f}x slower" if seconds > target else ""
    return f"{duration(seconds, target)} (target: {duration(target, target)}){slower}"


def duration(seconds: float, scale: float) -> str:
    """`seconds` in words: minutes where the target `scale` is several and they would not round to nothing, else seconds."""
    if scale >= 180 and seconds >= 60:
        return f"{seconds / 60:.1f}min"
    return f"{seconds:.1f}s" if seconds >= 1 else f"{seconds:.3f}s"


def _speedup(speedups: Json, name: str) -> list[str]:
    if name not in speedups:
        return [f"  Speedup: not measured ({speedups['reason']})"]
    limit = getattr(THRESHOLDS, name)
    warning = "" if limit.holds(speedups[name]) else f" ⚠ expected {limit.usual}"
    return [f"  Speedup: {speedups[name]:.1f}x faster on GPU{warning}"]


def _parting(speedups: Json) -> list[str]:
    """How far the losses of the two devices come apart, where both have trained."""
    found = speedups.get("losses")
    if not found:
        return []
    where = found["part_at_step"]
    parted = f"first by more than {PARTED:.0%} at step {where}" if where else f"never by more than {PARTED:.0%}"
    return ["", f"Losses of CPU and GPU: apart by {found['largest']:.2%} at most (step {found['at_step']}), {parted}"]


def _gpu_lines(measured: Json, speedups: Json) -> list[str]:
    """What is to be known of the tests that ran on a GPU beside the specification's lines."""
    if not measured:
        return []
    lines = [
        "",
        "GPU preparation (batches loaded, kernels compiled or read from the cache, step recorded; in no time above):",
    ]
    lines += [f"  {_label(n)}: {duration(d['preparation_seconds'], 0)}" for n, d in measured.items()]
    if "training_speedup_prepared" in speedups:
        lines.append(f"  Speedup of training with it: {speedups['training_speedup_prepared']:.1f}x faster on GPU")
    lines += ["", "GPU utilisation and memory:"]
    for name, d in measured.items():
        limit = THRESHOLDS.gpu_memory
        warning = "" if limit.holds(d["memory_gb"]) else f" ⚠ expected {limit}"
        lines.append(
            f"  {_label(name)}: {utilisation(d['utilisation'])}; {show(d['memory_gb'], 'GB')} of VRAM{warning}"
        )
    return lines + _parting(speedups)


def utilisation(share: float | None) -> str:
    """The note on how busy the GPU was while training."""
    if share is None:
        return "utilisation not known (steps launched kernel by kernel): see nvidia-smi"
    hint = "" if share >= BUSY else ", a larger train.batch_size or train.log_every would use it better"
    return f"busy {share:.0%} of the steps' time{hint}"


def _label(test: str) -> str:
    return {"cpu": "CPU", "gpu": "GPU", "full": "Full"}[test]


def _set_up(d: Json) -> str:
    p, data = d["parameters"], d["data"]
    sizes = f"{p['total']:,} parameters ({p['active']:,} active, {p['embedding']:,} embedding)"
    return f"{sizes}; {data['articles']:,} articles, {data['tokens']:,} tokens, {data['facts_taught']} facts"


def _prepared(d: Json) -> str:
    """What stands behind a time that a preparation came before."""
    return "" if d["preparation_seconds"] is None else f" after {d['preparation_seconds']:.1f} s of preparation"


def _recall(d: Json) -> str:
    def one(name: str) -> str:
        r = d[name]
        if r is None:
            return f"{name}: not measured"
        return f"{name} {r['correct']}/{r['asked']} = {r['fraction']:.1%} ({r['low']:.1%}-{r['high']:.1%})"

    return f"{one('taught')}, {one('heldout')}"


_HEADLINES = {
    "set-up": _set_up,
    "kernels": lambda d: f"{len(d['comparisons'])} comparisons with float64 references, {d['failed']} failed",
    "training": lambda d: (
        f"{d['steps']} steps in {duration(d['seconds'], 0)}{_prepared(d)}, loss {d['losses'][0]:.3f} -> "
        f"{d['final_loss']:.3f}, {d['tokens_per_second']:,.0f} tokens/s"
    ),
    "propagation": lambda d: f"{len(d['checks'])} checks, {d['failed']} failed",
    "generation": lambda d: (
        ", ".join(f"{name} {rate:.1%}" for name, rate in d["success"].items()) + f" exact{_prepared(d)}"
    ),
    "control": lambda d: f"the untrained model answers {d['answered']} of {d['asked']}",
    "recall": _recall,
    "performance": lambda d: (
        f"training {training_time(d)}, {d['seconds_per_answer']:.3f} s an answer, "
        f"{d['tokens_per_second']:,.0f} tokens/s, {d['memory_gb']:.2f} GB"
    ),
}


def _kernels_table(details: Json) -> Table:
    """For each operator and implementation, the quantity that comes nearest to its tolerance."""
    table = _table("", "operator", "implementation", "quantities", "worst", "error", "tolerance", "status")
    groups: dict[tuple[str, str], list[Json]] = {}
    for row in details["comparisons"]:
        groups.setdefault((row["operator"], row["implementation"]), []).append(row)
    for (operator, implementation), rows in groups.items():
        worst = max(
            rows, key=lambda r: (not r["passed"], r["max_abs_error"] / r["tolerance"] if r["tolerance"] else 0.0)
        )
        status = "PASS" if all(r["passed"] for r in rows) else "FAIL"
        errors = (worst["quantity"], f"{worst['max_abs_error']:.2e}", f"{worst['tolerance']:.2e}")
        table.add_row(operator, implementation, str(len(rows)), *errors, Text(status, style=_STATUS_STYLES[status]))
    return table


def _propagation_table(details: Json) -> Table:
    table = _table("", "check", "expected", "actual", "status")
    for c in details["checks"]:
        status = "PASS" if c["passed"] else "FAIL"
        table.add_row(c["name"], c["expected"], c["actual"], Text(status, style=_STATUS_STYLES[status]))
    return table


def _generation_table(details: Json) -> Table:
    table = _table("", "prompt", "expected", "generated", "sequence", "words", "substring", "combined", "exact")
    for p in details["probes"]:
        s, style = p["similarity"], "green" if p["exact"] else "red"
        scores = (f"{s[name]:.0%}" for name in ("sequence", "word_overlap", "substring", "combined"))
        generated = " ".join(p["generated"].split())
        generated = generated if len(generated) <= SHOWN else generated[: SHOWN - 1] + "…"
        table.add_row(p["prompt"], p["expected"], generated, *scores, Text("✓" if p["exact"] else "✗", style=style))
    return table


_DETAILS = {"kernels": _kernels_table, "propagation": _propagation_table, "generation": _generation_table}


def _table(title: str, *columns: str) -> Table:
    return make_table(title, *columns, folded=columns)


def _commit(commit: Json | None) -> str:
    if commit is None:
        return "unknown"
    return commit["hash"][:12] + {True: " with changes", False: "", None: ", with changes or without"}[commit["dirty"]]


def _plain(value: Any) -> str:
    return f"{value:.1%}" if isinstance(value, float) else " ".join(str(value).split())
