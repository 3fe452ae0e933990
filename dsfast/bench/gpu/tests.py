"""The part "tests": pytest of what needs a GPU and of every Triton kernel on it, where the source tree is there."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

from dsfast.bench.gpu.figures import OUT_OF_TIME
from dsfast.files import Json
from dsfast.info import ROOT

NOT_ON_A_GPU = ("test_triton_compile.py", "test_watched.py")
"""The one is for chips that are not there, the other for the interpreter."""
WITHOUT_A_GPU = (
    "in_the_interpreter", "whenever_its_branches_run", "those_of_the_native_path", "on_a_gpu_that_is_not_there",
)  # fmt: skip
"""Parts of the names of tests whose work is done by a process that has none."""
ENDING = 10.0  # seconds to end in
MOST_TOGETHER = 16
FIRST = ("test_triton_step.py", "test_device_decode.py")
"""Whole steps, whether they agree with the CPU's and can be captured."""
_PYTEST = (  # a shell's background jobs ignore what interrupts others, and so would their children
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); sys.path[:1] = ['.'];"
    " import pytest; sys.exit(pytest.main())"
)


def run_tests(seconds: float, root: Path = ROOT) -> Iterator[Json]:
    """A row for the tests marked gpu, first of all those of whole steps, and one for the kernels' others, within `seconds`.

    The first have at most half of it.
    """
    end = time.perf_counter() + max(seconds - 2 * ENDING, seconds / 2)
    tests = sorted(p for p in (root / "tests").glob("test_*.py") if p.name not in NOT_ON_A_GPU)
    kernels = [path for path in tests if "triton_contract" in path.read_text(encoding="utf-8")]
    if not kernels:
        yield _row("kernels", "missing", "no source tree with tests here")
        return
    if importlib.util.find_spec("pytest") is None:
        yield _row("kernels", "missing", "pytest is not installed")
        return
    for name, marks, paths, share in (
        ("marked gpu", "gpu and not slow", sorted(tests, key=_importance), 0.5),
        ("kernels", "not gpu and not slow", kernels, 1.0),
    ):
        chosen = ["-m", marks, "-k", f"not ({' or '.join(WITHOUT_A_GPU)})", *_together(), *map(str, paths)]
        yield run_pytest(name, chosen, (end - time.perf_counter()) * share, root)


def _importance(path: Path) -> int:
    """Where a file's tests stand among the others'."""
    return FIRST.index(path.name) if path.name in FIRST else len(FIRST)


def _together() -> list[str]:
    """Processes that share the GPU: most of the time goes into compiling."""
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(max(1, min(MOST_TOGETHER, os.cpu_count() or 1)))]


def run_pytest(name: str, arguments: list[str], seconds: float, root: Path) -> Json:
    """The row of one run: status "passed", "failed", "failed to run" or OUT_OF_TIME, counts, failures.

    Where time is up it is interrupted, and the tests so far are counted.
    """
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-c", _PYTEST, "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), environment.get("PYTHONPATH"))))
        child = subprocess.Popen(
            command,
            cwd=root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        said, in_time = _end_of(child, seconds)
        suite = ElementTree.parse(report).getroot().find("testsuite") if report.exists() else None
    if suite is not None:
        row = _counted(name, suite)
        return row if in_time else {**row, **_stopped(row["failures"], seconds)}
    if not in_time:
        return {**_row(name, "", ""), **_stopped([], seconds)}
    lines = said.strip().splitlines() or [""]
    return _row(name, "failed to run", lines[-1])


def _end_of(child: subprocess.Popen, seconds: float) -> tuple[str, bool]:
    """(what it said, whether it ended by itself within `seconds`)."""
    try:
        return child.communicate(timeout=seconds)[0], True
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGINT)
    try:
        return child.communicate(timeout=ENDING)[0], False
    except subprocess.TimeoutExpired:
        child.kill()
        return child.communicate()[0], False


def _stopped(failures: list[str], seconds: float) -> Json:
    return {"status": "failed" if failures else OUT_OF_TIME, "reason": f"stopped after {seconds:.0f} s"}


def _counted(name: str, suite: ElementTree.Element) -> Json:
    failures = [
        f"{case.get('classname')}::{case.get('name')}: {' '.join((bad.get('message') or '').split())[:200]}"
        for case in suite.iter("testcase")
        for bad in (*case.findall("failure"), *case.findall("error"))
    ]
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    return {**_row(name, "failed" if failures else "passed", ""), "counts": counts, "failures": failures}


def _row(name: str, status: str, reason: str) -> Json:
    return {"part": "tests", "case": name, "status": status, "reason": reason, "counts": {}, "failures": []}
