"""`bench tiles`: other tiles beside those that the kernels ship with, case by case, each in a process of its own (`tuning`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from dsfast.bench.gpu.candidates import PARTS
from dsfast.bench.gpu.cases import SIZES, TINY
from dsfast.bench.gpu.figures import OUT_OF_TIME
from dsfast.bench.gpu.run import (
    LEAST,
    NOT_YET,
    SHARE,
    Children,
    check_gpu,
    choose_parts,
    nothing_measured,
    run_part,
    where,
)
from dsfast.bench.gpu.tuning import PLANNED_FOR, this_chip
from dsfast.errors import UserError, choices, expect_known
from dsfast.files import Json
from dsfast.ops import triton
from dsfast.triton_kernels.limits import CHIPS

GROUPS = ("V3", "500K")
_SAME_TILES = ("V3 mixed", "V3 H16 paged")  # cases that take the entries of another of their part

Case = tuple[str, str]


def choose_cases(names: Sequence[str], group: str | None, rehearsal: bool) -> list[Case]:
    """(part, case) of the parts `names`; group: the 500K model's cases or the others', None: both. UserError for unknown ones."""
    if not names:
        raise UserError(f"bench tiles: nothing to try; name one or more of {', '.join(PARTS)}")
    expect_known("case", () if group is None else [group], GROUPS, "bench tiles: ")
    parts = choose_parts(names, PARTS, "tiles")
    found = [(part, name) for part in parts for name in (TINY if rehearsal else SIZES)[part] if name not in _SAME_TILES]
    chosen = [(part, name) for part, name in found if rehearsal or group in (None, "500K" if name == "500K" else "V3")]
    if without := [part for part in parts if part not in dict(chosen)]:
        raise UserError(f"bench tiles: no case {group} of {', '.join(without)}; leave --case out or name other parts")
    return chosen


def check_can_try(rehearsal: bool, planned: bool) -> None:
    """Raises UserError where this machine cannot do it."""
    if planned:
        reason = triton.missing() or (
            "TRITON_INTERPRET is set, and Triton then compiles nothing" if triton.INTERPRETED else ""
        )
        if rehearsal or reason:
            raise UserError(f"bench tiles --plan compiles: {reason or 'it cannot --rehearse'}")
        return
    check_gpu(rehearsal, "tiles")
    if not rehearsal and (chip := this_chip()) not in CHIPS:
        raise UserError(f"bench tiles: the limits of {chip} are not known; {choices(CHIPS)}")


def run_tiles(
    cases: Sequence[Case], seconds: float, rehearsal: bool, planned: bool, progress: Callable[[str], None],
    keep: Callable[[Json, str], None],
) -> Json:  # fmt: skip
    """Try the tiles of `cases`, one after the other, for `seconds` in all.

    Returns measured_on, gpu and environment as `bench gpu`, parts ("part case" -> status, seconds) and rows (see
    tuning.Tuner.rows); keep(as much of that as there is, what the case's process said) after each entry of a table.
    """
    end = time.perf_counter() + seconds
    found = where(rehearsal or planned) | {"rows": []}
    if planned:
        found["measured_on"] = f"nothing (compiled for {PLANNED_FOR})"
    found["parts"] = {f"{part} {name}": {"status": NOT_YET, "seconds": 0.0} for part, name in cases}
    with Children() as children:
        for part, name in cases:
            done, left, state = found["rows"], end - time.perf_counter(), found["parts"][f"{part} {name}"]
            if left < LEAST:
                state["status"] = OUT_OF_TIME
                continue
            progress(f"{part} {name}, {left:.0f} s left")

            def watch(rows: list[Json], done: list[Json] = done) -> None:
                if done + rows != found["rows"]:
                    found["rows"] = done + rows
                    keep(found, "")

            share, child = left if planned else min(SHARE, left), children.take()
            ended, rows, said = run_part(child, part, None, rehearsal, share, watch, tiles_of=name, planned=planned)
            state |= ended
            found["rows"] = done + rows
            keep(found, said)
    keep(found, "")
    return found


def sound(found: Json) -> bool:
    """Whether there was time for a case, every case's process ended by itself or with its time, and the shipped tiles were
    right."""
    states = [*found["parts"].values(), *found["rows"]]
    failed = [state for state in states if state["status"].startswith("failed")]
    return not (failed or nothing_measured(found["parts"]))
