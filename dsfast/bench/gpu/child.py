"""One part of `bench gpu` in a process of its own: the request on standard input, each row into a file as soon as it is there.

On standard error it says what it does, and of everything that fails where.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from dsfast.bench.gpu import cases
from dsfast.bench.gpu.bounds import Bounds, measure_bounds
from dsfast.bench.gpu.clock import GpuClock, HostClock
from dsfast.bench.gpu.operators import ROUNDS, check_ours, check_peers, run_case
from dsfast.bench.gpu.recall import run_recall
from dsfast.bench.gpu.suite import run_tests
from dsfast.bench.gpu.training import run_training
from dsfast.bench.gpu.tuning import tune
from dsfast.bench.gpu.whole import compile_generation, compile_step, run_generation, run_step
from dsfast.files import finite

Json = dict[str, Any]
OUT_OF_TIME = "not measured: out of time"


def rows_of(
    part: str, rehearsal: bool, bounds: Json | None, seconds: float, tiles_of: str = "", planned: bool = False
) -> Iterator[Json]:
    """The rows of `part`, none begun after `seconds`; of one part, case and entry the last counts. "bounds" has one, what
    measure_bounds returns. tiles_of: the case whose tiles are tried, in place of all else; `planned`: see `tune`.
    """
    end = time.perf_counter() + seconds
    clock, device = (HostClock(), "cpu") if rehearsal or planned else (GpuClock(), "cuda")
    found = None if bounds is None else Bounds(**bounds)

    def expired() -> bool:
        return time.perf_counter() > end

    if tiles_of:
        yield from tune(cases.build(part, tiles_of, rehearsal), rehearsal, planned, expired, clock)
    elif part == "bounds":
        yield measure_bounds(clock, device, **({"copy_bytes": 4096, "size": 64} if rehearsal else {}))
    elif part == "tests":
        yield from run_tests(seconds)
    elif part in ("step", "compiled"):
        yield run_step(clock, found, rehearsal, part)
    elif part == "training":
        yield from run_training(rehearsal)
    elif part == "generate":
        yield from run_generation(clock, rehearsal)
    elif part == "recall":
        yield from run_recall(rehearsal, expired)
    else:
        yield from _operator(part, rehearsal, lambda case: run_case(
            case, clock, found, device, expired, 1 if rehearsal else ROUNDS), expired)  # fmt: skip


def _operator(
    part: str, rehearsal: bool, run: Callable[[Any], Iterator[Json]], expired: Callable[[], bool]
) -> Iterator[Json]:
    for name in (cases.TINY if rehearsal else cases.SIZES)[part]:
        if expired():
            yield {"part": part, "case": name, "status": OUT_OF_TIME}
        else:
            yield from run(cases.build(part, name, rehearsal))


def compile_part(part: str, rehearsal: bool) -> None:
    """Run what is compiled for `part` before it is timed, so that the caches have it: the checks of all its cases."""
    if part == "step":
        compile_step(rehearsal)
    elif part == "generate":
        compile_generation(rehearsal)
    else:
        for name in (cases.TINY if rehearsal else cases.SIZES)[part]:
            case, device = cases.build(part, name, rehearsal), "cpu" if rehearsal else "cuda"
            check_ours(case, device)
            check_peers(case, device, {}, lambda: False)


def main() -> None:
    """A request without a file is one to compile."""
    request = json.load(sys.stdin)
    logging.basicConfig(format="%(relativeCreated)d ms: %(message)s")
    log = logging.getLogger("dsfast.bench")
    log.setLevel(logging.DEBUG)
    log.debug("begin: %s", request["part"])
    if "file" not in request:
        compile_part(**request)
        return
    with open(request.pop("file"), "w", encoding="utf-8") as file:
        for row in rows_of(**request):
            file.write(json.dumps(finite(row)) + "\n")
            file.flush()
            log.debug("done: %s %s", request["part"], row.get("case", ""))


if __name__ == "__main__":
    main()
