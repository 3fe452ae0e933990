"""One case of `bench tiles`: for each entry of the kernels' tables that it takes, others in its place beside the shipped one.

Candidates are compiled for the chip all at once, dropped where they break its limits, checked against the reference as the
operator is, and then timed in turns: the launches alone that the entry changes, made by the module's own functions, on the memory
of the shipped ones' results.
"""

from __future__ import annotations

import logging
import math
import os
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsfast.bench.compile import compile_named
from dsfast.bench.gpu.candidates import SIDES, Entry, candidates, entries
from dsfast.bench.gpu.cases import GpuCase, draw
from dsfast.bench.gpu.figures import OUT_OF_TIME
from dsfast.bench.gpu.operators import BUDGET, GRAPHED, ROUNDS, WARMUP, check_ours
from dsfast.bench.gpu.replaced import replaced
from dsfast.bench.step import attempt
from dsfast.bench.timing import spread, take_turns
from dsfast.files import Json
from dsfast.ops import triton
from dsfast.triton_kernels.limits import CHIPS, MULTIPROCESSORS

MOST = 8
"""Candidates of an entry that are checked and timed, beside the shipped tiles."""
GRAPH_ROUNDS = 5
REGISTERS = 255  # of a thread
PLANNED_FOR = "sm_90"
COMPILED, TIMED = "compiled", "timed"
SAME = "launches what others do: these sizes take no more of it"
WARPS = 12  # of a multiprocessor, with which a kernel is thought to hide what it waits for

_log = logging.getLogger("dsfast.bench")


@dataclass(eq=False)
class Trial:
    """What one value of an entry launches where that differs from others', by kernel and number; how it compiled."""

    value: Any
    launches: dict[str, Any]
    compiled: list = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def estimate(self) -> float:
        """A guess at its time, to choose an order: of what a product's operands are read beside it, how many programs a
        multiprocessor holds, and how many the last round leaves idle."""
        if isinstance(self.value, int) or not self.compiled:
            return 0.0
        launch, compiled = next(iter(self.launches.values())), self.compiled[0]
        threads = 32 * launch.options["num_warps"]
        resident = max(
            1, min(CHIPS[compiled.chip].shared // max(1, compiled.shared), 65536 // (threads * compiled.registers))
        )
        slots = MULTIPROCESSORS * resident
        programs = torch.Size(launch.grid).numel()
        idle = -(-programs // slots) * slots / programs
        waits = max(1.0, WARPS / (resident * launch.options["num_warps"]))
        return sum(1 / side for side in _sides(self.value)) * idle * waits * (compiled.repeated or 1)


@dataclass(frozen=True)
class Tuner:
    """One case. chip: what candidates are compiled for ("": nothing is); clock: what they are timed by (None: they are not)."""

    case: GpuCase
    arguments: list
    device: str
    chip: str
    clock: Any
    expired: Callable[[], bool]
    most: int = MOST
    rounds: int = ROUNDS

    def rows(self) -> Iterator[Json]:
        """For each entry the row, again as it grows: part, case, entry, kernels, shipped, candidates (tiles, estimate, registers,
        shared, seconds, of_shipped, launches), dropped (tiles, reason) and status. None where no candidate changes a launch.
        """
        shipped = self.launches(start=self.clock is not None)
        for entry in entries(self.case.part, lambda: self.launches(start=False)):
            if self.expired():
                yield {"part": self.case.part, "case": self.case.name, "entry": entry.name, "status": OUT_OF_TIME}
            else:
                yield from self.try_entry(entry, shipped)

    def launches(self, start: bool) -> dict[str, Any]:
        """Kernel and its number -> launch, of both passes."""
        from dsfast.bench.gpu.launched import launches

        found: dict[str, Any] = {}
        for launch in launches(self.case.part, self.arguments, start):
            name = launch.kernel.__name__
            found[f"{name} {1 + sum(key.startswith(name + ' ') for key in found)}"] = launch
        return found

    def try_entry(self, entry: Entry, shipped: dict[str, Any]) -> Iterator[Json]:
        """The row of one entry, see `rows`."""
        ours, others, dropped = self.trials(entry, shipped)
        if all(one["reason"] == SAME for one in dropped) and not others:
            return
        if self.chip:
            others = self.compiled(ours, others, dropped)
        if self.clock is not None:
            dropped += [
                _dropped(trial.value, f"beyond the {self.most} most promising") for trial in others[self.most :]
            ]
            others = others[: self.most]
        row = {
            "part": self.case.part, "case": self.case.name, "entry": entry.name, "kernels": list(ours.launches),
            "shipped": _json(ours.value), "candidates": [_facts(trial, ours) for trial in (ours, *others)],
            "dropped": dropped, "status": COMPILED,
        }  # fmt: skip
        yield row
        if self.clock is not None:
            yield row | self.checked_and_timed(entry, ours, others, dropped)

    def checked_and_timed(self, entry: Entry, ours: Trial, others: list[Trial], dropped: list[Json]) -> Json:
        """status and candidates, of those that are right, the fastest first; `dropped` gets the others."""
        calls = [launch.run for trial in (ours, *others) for launch in trial.launches.values()]
        attempt(partial(triton.compile_together, lambda: [call() for call in calls]))  # what fails here fails its check
        right = []
        for trial in (ours, *others):
            problem = self.problem(entry, trial)
            if not problem:
                right.append(trial)
            elif trial is ours:
                failed = problem if problem == OUT_OF_TIME else f"failed: the shipped tiles: {problem}"
                return {"status": failed, "candidates": []}
            else:
                dropped.append(_dropped(trial.value, problem))
        found, problem = attempt(partial(self.timed, right))
        if problem:
            return {"status": f"failed: {problem}"}
        return {"status": TIMED, "candidates": sorted(found, key=lambda facts: facts["seconds"]["median"])}

    def trials(self, entry: Entry, shipped: dict[str, Any]) -> tuple[Trial, list[Trial], list[Json]]:
        """The shipped tiles, the others, and what was dropped: launchers that refuse, what would launch the same, and what spills
        for certain, with which the compiler would take longest."""
        found, seen, dropped = {}, [_signatures(shipped)], []
        for value in candidates(entry):
            with replaced(entry.table, entry.key, value):
                launches, problem = attempt(partial(self.launches, start=False))
            if not problem:
                problem = SAME if _signatures(launches) in seen else _too_many_sums(value)
            if problem:
                dropped.append(_dropped(value, problem))
            else:
                seen.append(_signatures(launches))
                found[value] = {name: _on_the_memory_of(x, shipped.get(name)) for name, x in launches.items()}
        names = {name for other in seen for name, signature in other.items() if seen[0].get(name) != signature}
        names |= {name for other in seen for name in seen[0] if name not in other}

        def trial(value: Any, launches: dict[str, Any]) -> Trial:
            return Trial(value, {name: launch for name, launch in launches.items() if name in names})

        return trial(entry.table[entry.key], shipped), [trial(*item) for item in found.items()], dropped

    def compiled(self, ours: Trial, others: list[Trial], dropped: list[Json]) -> list[Trial]:
        """The `others` that keep the chip's limits, the most promising first; `dropped` gets the rest.

        First the first launch of all candidates is compiled, then the other launches of the best `most`.
        """
        self._compile([ours, *others], slice(0, 1))
        kept = sorted((trial for trial in others if not trial.faults), key=Trial.estimate)
        self._compile([ours, *kept[: self.most]], slice(1, None))
        dropped += [_dropped(trial.value, trial.faults[0]) for trial in others if trial.faults]
        return [trial for trial in kept if not trial.faults]

    def _compile(self, trials: list[Trial], which: slice) -> None:
        jobs = [(trial, launch) for trial in trials for launch in list(trial.launches.values())[which]]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            done = threads.map(lambda job: compile_named(job[1], self.chip, job[1].kernel.__name__), jobs)
            for (trial, _), (compiled, faults) in zip(jobs, done, strict=True):
                trial.compiled += [compiled] if compiled else []
                trial.faults += faults

    def problem(self, entry: Entry, trial: Trial) -> str:
        """What is wrong with the operator's values and gradients when it has these tiles, or that there is no time to see."""
        if self.expired():
            return OUT_OF_TIME
        _log.debug("check: %s %s: %s", self.case.part, entry.name, trial.value)
        with replaced(entry.table, entry.key, trial.value):
            return check_ours(self.case, self.device)

    def timed(self, trials: list[Trial]) -> list[Json]:
        """The facts of each with its times, in turns; the first is what they are related to."""
        calls = {trial: [launch.run for launch in trial.launches.values()] for trial in trials}
        for call in [call for several in calls.values() for call in several] * WARMUP:
            call()
        short = self.clock.on_gpu and sum(map(self.clock.seconds, calls[trials[0]])) < GRAPHED
        rounds, timer = (GRAPH_ROUNDS, self.clock.graph_seconds) if short else (self.rounds, self.clock.seconds)
        taken = take_turns(calls, min(rounds, self.rounds), BUDGET, timer)
        ours = [sum(each) for each in taken[trials[0]]]
        return [
            _facts(trial, trials[0]) | {
                "seconds": asdict(spread([sum(each) for each in taken[trial]])),
                "of_shipped": statistics.median(sum(each) / own for each, own in zip(taken[trial], ours, strict=False)),
                "launches": dict(zip(trial.launches, map(statistics.median, zip(*taken[trial], strict=True)), strict=True)),
                "in_a_graph": short,
            }
            for trial in trials
        ]  # fmt: skip


def _sides(value: Any) -> list[int]:
    """Rows and columns of the tile, as far as an entry says them; none of a constant."""
    return [getattr(value, side) for side in SIDES if hasattr(value, side)]


def _too_many_sums(value: Any) -> str:
    """Why the results of a tile cannot lie in registers; "" if they may."""
    each = math.prod(_sides(value)) // (32 * value.warps) if len(_sides(value)) == 2 else 0
    return f"its sums alone take {each} registers of a thread, of {REGISTERS}" if each > REGISTERS else ""


def _signatures(launches: dict[str, Any]) -> dict[str, tuple]:
    """All that each kernel is given, but for the memory its tensors lie in."""

    def argument(x: Any) -> Any:
        return (tuple(x.shape), x.stride(), x.dtype) if isinstance(x, Tensor) else x

    return {
        name: (launch.grid, launch.options, [argument(launch.arguments[key]) for key in launch.kernel.arg_names])
        for name, launch in launches.items()
    }


def _on_the_memory_of(launch: Any, other: Any) -> Any:
    """`launch` with the tensors of `other` where they are of the same shape: they hold what kernels before it have written."""
    if other is None:
        return launch
    alike = {
        name: y
        for name, x in launch.arguments.items()
        if isinstance(x, Tensor) and isinstance(y := other.arguments.get(name), Tensor)
        and (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)
    }  # fmt: skip
    return replace(launch, arguments=launch.arguments | alike)


def _facts(trial: Trial, ours: Trial) -> Json:
    found = {"tiles": _json(trial.value), "shipped": trial is ours}
    if trial.compiled:
        first = trial.compiled[0]
        found |= {"estimate": trial.estimate(), "registers": first.registers, "shared": first.shared}
    return found


def _dropped(value: Any, reason: str) -> Json:
    return {"tiles": _json(value), "reason": reason}


def _json(value: Any) -> Any:
    """An entry's value: a number, or the tiles' numbers by name."""
    return value if isinstance(value, int) else value._asdict()


def this_chip() -> str:
    """What dsfast.triton_kernels.limits calls a GPU such as the one that is here."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def tune(case: GpuCase, rehearsal: bool, planned: bool, expired: Callable[[], bool], clock: Any) -> Iterator[Json]:
    """The rows of a case, on the GPU that is here. In a rehearsal: of two candidates each, on the CPU; `planned`: of what is
    compiled for an H100, and not timed."""
    from dsfast.bench.gpu.launched import on_an_h100

    device = "cpu" if rehearsal or planned else "cuda"
    chip = "" if rehearsal else PLANNED_FOR if planned else this_chip()
    few = {"most": 2, "rounds": 1} if rehearsal else {}
    with ExitStack() as stack:
        stack.enter_context(triton.kept_kernels())
        if planned:
            stack.enter_context(on_an_h100())
        arguments = draw(case.timed, device, case.dtype)
        yield from Tuner(case, arguments, device, chip, None if planned else clock, expired, **few).rows()
