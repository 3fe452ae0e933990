"""The parts of `bench gpu` one after the other within a budget of seconds, those that figures are asked of first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dsfast.bench.gpu.figures import NOT_MEASURED, OUT_OF_TIME, figures
from dsfast.errors import UserError, expect_known
from dsfast.files import Json
from dsfast.ops import triton

PARTS = (
    "norm", "rope", "adamw", "route", "step", "decode", "generate", "training", "head", "attention", "experts", "compiled",
    "muon", "newton_schulz", "mlp", "embedding", "project", "output", "recall", "tests",
)  # fmt: skip
"""Those that figures are asked of first, and of these what gives most of them in a second: on an H200 attention took 65 s with
its peers, experts over 75, decode 22. "bounds" comes before them all. For the tests RESERVED seconds are kept."""
BUDGET = 450
"""Seconds: with what starting and writing take, below 8 minutes."""
LEAST = 10.0  # seconds below which no part is started
RESERVED = 120.0
"""Seconds of a budget, or a quarter of it where that is less, that are the tests', where they are asked for."""
SHARE = 100.0  # seconds that one part may take, but for the tests
SHARES = {"recall": 580.0}
"""In place of it: of whole runs on the CPU."""
ON_REQUEST = ("recall",)
"""Parts that the 8 minutes of all have no room for."""
COMPILING = 90.0  # seconds at most, before anything is timed, in which all parts compile at once
COMPILED = tuple(part for part in PARTS if part not in ("training", "recall", "tests"))
"""What compiles then: training has caches of its own."""
GRACE = 15.0  # seconds between a part's own end and its process's
LOOK = 2.0  # seconds from one look at a process's rows to the next
NOT_YET = f"{NOT_MEASURED}: the command ended before"
NOT_ASKED = f"{NOT_MEASURED}: not asked for (--only)"
_CHILD = [sys.executable, "-m", "dsfast.bench.gpu.child"]
_ALONE = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
"""torch.compile has else a process for each processor, and each of the parts that compile at once so many."""
_ENVIRONMENT = ("CUDA", "DSFAST", "LIGER", "NVIDIA", "PYTORCH", "TORCH", "TRITON")


def choose_parts(names: Sequence[str] | None, known: Sequence[str] = PARTS, bench: str = "gpu") -> tuple[str, ...]:
    """`names` in the order of `known`; None is all but those ON_REQUEST. Raises UserError for an unknown one."""
    expect_known("part", names or (), known, f"bench {bench}: ")
    return tuple(part for part in known if (part not in ON_REQUEST if names is None else part in names))


def check_gpu(rehearsal: bool, bench: str = "gpu") -> None:
    """Raises UserError where no GPU that the kernels run on is here; for a rehearsal, where Triton's interpreter is not on."""
    if rehearsal:
        reason = (
            triton.missing() or ("" if triton.INTERPRETED else "set TRITON_INTERPRET=1") or triton.cannot_interpret()
        )
        if reason:
            raise UserError(f"bench {bench} --rehearse runs the kernels in Triton's interpreter: {reason}")
        return
    if triton.INTERPRETED:
        raise UserError(
            f"bench {bench}: TRITON_INTERPRET is set, and nothing would run on the GPU; unset it or --rehearse"
        )
    if torch.cuda.is_available():
        available, reason = triton.available("mla_attention")
        if available:
            return
    else:
        reason = "torch finds no GPU"
    raise UserError(
        f"bench {bench}: {reason}; nothing is measured. Without a GPU: `python -m dsfast.bench compile` compiles the kernels for"
        " their chips, and `make test` runs them in Triton's interpreter"
    )


def run_gpu(
    parts: Sequence[str], seconds: float, rehearsal: bool, progress: Callable[[str], None],
    keep: Callable[[Json, str], None],
) -> Json:  # fmt: skip
    """Run `parts`, each in a process of its own, for `seconds` in all; `progress` is told what comes next.

    Returns measured_on ("GPU", or "CPU (rehearsal)": then nothing is a figure), gpu, environment, compilation (see
    compile_parts), bounds, parts (name -> status, seconds), rows and figures. keep(as much of that as there is, what its process
    said) after each part, and within it with "" as rows come in.
    """
    end = time.perf_counter() + seconds
    states = {part: {"status": NOT_YET if part in parts else NOT_ASKED, "seconds": 0.0} for part in PARTS}
    found = where(rehearsal) | {
        "compilation": {}, "bounds": None, "parts": states, "rows": [], "figures": figures([]),
    }  # fmt: skip

    def note(part: str, before: list[Json], rows: list[Json], said: str = "") -> None:
        if not said and before + rows == found["rows"]:
            return
        found.update({"bounds": rows[0] if rows else None} if part == "bounds" else {"rows": before + rows})
        found["figures"] = figures([] if rehearsal else found["rows"])
        keep(found, said)

    with Children() as children:
        progress("compiling, all parts at once")
        found["compilation"] = compile_parts(
            [part for part in parts if part in COMPILED], rehearsal, min(COMPILING, seconds / 4)
        )
        for part in ("bounds", *(part for part in PARTS if part in parts)):
            left = end - time.perf_counter()
            if part != "tests" and "tests" in parts:
                left -= min(RESERVED, seconds / 4)
            if part != "bounds" and left < LEAST:
                states[part] = {"status": OUT_OF_TIME, "seconds": 0.0}
                continue
            progress(f"{part}, {left:.0f} s left")
            noted = partial(note, part, found["rows"])
            share = left if part == "tests" else min(SHARES.get(part, SHARE), left)
            states[part], rows, said = run_part(children.take(), part, found["bounds"], rehearsal, share, noted)
            noted(rows, said)
    keep(found, "")  # what was not begun too
    return found


def compile_parts(parts: Sequence[str], rehearsal: bool, seconds: float) -> Json:
    """Let each part compile what it will run, all of them at once: one takes a processor or two, and a GPU's host has many.

    Returns part -> "done", "failed: ..." or that it was not ready in time: what is missing in the caches is compiled later.
    """
    broken_off = threading.Event()

    def look() -> None:
        if broken_off.is_set():
            raise KeyboardInterrupt

    def run(part: str) -> str:
        return Child().run(json.dumps({"part": part, "rehearsal": rehearsal}), seconds, look)[0]

    with ThreadPoolExecutor(max(1, len(parts))) as pool:
        try:
            ended = dict(zip(parts, pool.map(run, parts), strict=True))
        except BaseException:
            broken_off.set()  # the pool waits for its threads, and they for their processes
            raise
    return {part: "not ready in time" if status == OUT_OF_TIME else status for part, status in ended.items()}


def run_part(
    child: Child, part: str, bounds: Json | None, rehearsal: bool, seconds: float,
    watch: Callable[[list[Json]], object] = lambda rows: None, **request: Any,
) -> tuple[Json, list[Json], str]:  # fmt: skip
    """(status and seconds, the rows that `child` wrote before it ended or its time was up, what it said on the way).

    watch: is given the rows so far, every few seconds. request: what else `child.rows_of` takes.
    """
    begin = time.perf_counter()
    with TemporaryDirectory() as folder:
        file = Path(folder) / "rows"
        own = max(seconds - GRACE, seconds / 2)
        request |= {"part": part, "rehearsal": rehearsal, "bounds": bounds, "seconds": own, "file": str(file)}
        status, said = child.run(json.dumps(request), seconds, lambda: watch(_rows_in(file)))
        rows = _rows_in(file)
    if status == OUT_OF_TIME and rows:
        status = "cut: out of time, the rest is not measured"
    return {"status": status, "seconds": round(time.perf_counter() - begin, 1)}, rows, said


def _rows_in(file: Path) -> list[Json]:
    """The rows in a log; of a row that was written again as it grew, the last state."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may have been cut short
    return list({tuple(row.get(key) for key in ("part", "case", "entry")): row for row in rows}.values())


class Child:
    """A process that is given its request when its time has come; until then it imports what it needs.

    command: None is dsfast.bench.gpu.child.
    """

    def __init__(self, command: Sequence[str] | None = None):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        self._process = subprocess.Popen(
            command or _CHILD, **pipes, env=_ALONE | os.environ, text=True, errors="replace", start_new_session=True
        )

    def run(self, request: str, seconds: float, look: Callable[[], object] = lambda: None) -> tuple[str, str]:
        """("done", OUT_OF_TIME, or "failed: " and the last line of what it said; all that it said); now and then a `look`."""
        end = time.perf_counter() + seconds
        try:
            said = None
            while said is None:
                try:
                    _, said = self._process.communicate(request, timeout=min(LOOK, end - time.perf_counter()))
                except subprocess.TimeoutExpired:
                    if end <= time.perf_counter():
                        return OUT_OF_TIME, self.end()
                    look()
                    request = None  # it has it
        finally:
            if self._process.poll() is None:
                self.end()
        if self._process.returncode == 0:
            return "done", said
        lines = said.strip().splitlines() or [f"exit status {self._process.returncode}"]
        return f"failed: {lines[-1]}", said

    def end(self) -> str:
        """End it and what it has started, compilers and pytest; what it said before."""
        os.killpg(self._process.pid, 9)
        return self._process.communicate()[1]


class Children:
    """Processes for one part after the other, each of which gets ready while the one before works; inside `with`."""

    def __enter__(self) -> Children:
        self._next = Child()
        return self

    def __exit__(self, *_: object) -> None:
        self._next.end()

    def take(self) -> Child:
        child, self._next = self._next, Child()
        return child


def where(rehearsal: bool) -> Json:
    """measured_on, gpu and environment of a results file."""
    return {
        "measured_on": "CPU (rehearsal)" if rehearsal else "GPU", "gpu": None if rehearsal else gpu_facts(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_ENVIRONMENT)},
    }  # fmt: skip


def gpu_facts() -> Json:
    """Name, compute capability, memory, multiprocessors, driver, and CUDA and cuDNN version of the GPU."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "hip": torch.version.hip,
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return said[0].strip() if said else None


def sound(found: Json) -> bool:
    """Whether there was time for a part, every part that ran ended by itself, every case passed its check, no peer was wrong, no
    test failed and nothing on the GPU fell back."""
    failed = [state for state in found["parts"].values() if state["status"].startswith("failed")]
    wrong = [row for row in found["rows"] if row.get("check") or row.get("status", "").startswith("failed")]
    peers = [p for row in found["rows"] for p in row.get("peers", {}).values() if p["status"] == "wrong"]
    ours = [v for row in found["rows"] for p in row.get("passes", {}).values() for n, v in p["variants"].items()
            if n == "dsfast" and "failed" in v]  # fmt: skip
    fell_back = [f for row in found["rows"] for f in row.get("fallbacks", ()) if f["device"] == "cuda"]
    return not (failed or wrong or peers or ours or fell_back or nothing_measured(found["parts"]))


def nothing_measured(parts: Json) -> bool:
    """Whether for none of those that were asked for there was time."""
    states = {state["status"] for part, state in parts.items() if part != "bounds"} - {NOT_ASKED}
    return states == {OUT_OF_TIME}
