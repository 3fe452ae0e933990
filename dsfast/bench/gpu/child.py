"""One part of `bench gpu` in a process of its own: the request on standard input, each row into a file as soon as it is there.

On standard error it says what it does, and of everything that fails where.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from dsfast.bench.gpu import cases
from dsfast.bench.gpu.bounds import Bounds, measure_bounds
from dsfast.bench.gpu.clock import GpuClock, HostClock
from dsfast.bench.gpu.figures import OUT_OF_TIME
from dsfast.bench.gpu.operators import ROUNDS, compile_case, run_case
from dsfast.bench.gpu.recall import run_recall
from dsfast.bench.gpu.tests import run_tests
from dsfast.bench.gpu.training import run_training
from dsfast.bench.gpu.tuning import tune
from dsfast.bench.gpu.whole import run_generation, run_step
from dsfast.bench.step import attempt
from dsfast.files import Json, finite

IMPORTED = "transformers.models.deepseek_v3.modeling_deepseek_v3", "liger_kernel.transformers"


def rows_of(
    part: str, rehearsal: bool, bounds: Json | None, seconds: float, tiles_of: str = "", planned: bool = False,
    rounds: int = ROUNDS,
) -> Iterator[Json]:  # fmt: skip
    """The rows of `part`, none begun after `seconds`; of one part, case and entry the last counts. "bounds" has one, what
    measure_bounds returns. tiles_of: the case whose tiles are tried, in place of all else; `planned`: see `tune`. rounds: samples
    of each variant, of which a rehearsal takes one.
    """
    end, rounds = time.perf_counter() + seconds, 1 if rehearsal else rounds
    on_gpu = GpuClock.from_the_host if part in ("step", "compiled", "generate") else GpuClock
    clock, device = (HostClock(), "cpu") if rehearsal or planned else (on_gpu(), "cuda")
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
        yield from run_step(clock, found, rehearsal, part, expired, rounds)
    elif part == "training":
        yield from run_training(rehearsal, seconds)
    elif part == "generate":
        yield from run_generation(clock, rehearsal, rounds)
    elif part == "recall":
        yield from run_recall(rehearsal, seconds)
    else:
        run = partial(run_case, clock=clock, bounds=found, device=device, expired=expired, rounds=rounds)
        yield from _operator(part, rehearsal, run, expired)


def _operator(
    part: str, rehearsal: bool, run: Callable[[Any], Iterator[Json]], expired: Callable[[], bool]
) -> Iterator[Json]:
    for name in (cases.TINY if rehearsal else cases.SIZES)[part]:
        if expired():
            yield {"part": part, "case": name, "status": OUT_OF_TIME}
        else:
            yield from run(cases.build(part, name, rehearsal))


def compile_part(part: str, rehearsal: bool) -> None:
    """Run what is compiled for `part` before it is timed, so that the caches have it."""
    if part not in cases.SIZES:
        for _ in rows_of(part, rehearsal, None, math.inf, rounds=1):
            pass
        return
    for name in (cases.TINY if rehearsal else cases.SIZES)[part]:
        compile_case(cases.build(part, name, rehearsal), "cpu" if rehearsal else "cuda")


def import_peers() -> None:
    """What most peers need, which takes seconds: while the part before is timed. One that fails says so when its turn comes."""
    if torch.cuda.is_available():
        for name in ("torch._inductor.compile_fx", *IMPORTED):
            attempt(partial(importlib.import_module, name))


def main() -> None:
    """A request without a file is one to compile."""
    import_peers()
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
