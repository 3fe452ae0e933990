"""The part "training": the 500K model trained, each time in a process of its own: from empty caches, from those the first one
left, and on this machine's CPU.

    python -m dsfast.bench.gpu.training DEVICE STEPS [rehearsal]    trains, and prints what it took as JSON
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from tempfile import TemporaryDirectory

from dsfast import ops
from dsfast.bench.gpu.figures import OUT_OF_TIME
from dsfast.bench.gpu.whole import trainer_on, whole_config
from dsfast.bench.step import attempt
from dsfast.bench.timing import spread
from dsfast.bench.workload import random_batch
from dsfast.command import run_command
from dsfast.config import default_config
from dsfast.files import Json
from dsfast.train import Trainer
from dsfast.triton_kernels.launch import dtype_name


def run_training(rehearsal: bool, seconds: float) -> Iterator[Json]:
    """A row for each case. Its seconds: of the whole process, of the preparation of a GPU, and of the training steps.

    In `seconds` in all: a case takes at most half of what is left, the last one all. One that fails costs the others nothing.
    """
    config, end = whole_config(rehearsal), time.perf_counter() + seconds
    device, steps = ("cpu", 1) if rehearsal else ("gpu", config.train.steps)
    with TemporaryDirectory() as caches:
        for case, where in (("cold", device), ("warm", device), ("CPU", "cpu")):
            command = command_of("dsfast.bench.gpu.training", where, steps, rehearsal)
            left = (end - time.perf_counter()) * (1.0 if case == "CPU" else 0.5)
            found, problem = attempt(partial(run_process, command, caches, left))
            yield not_run("training", case, problem) if problem else row(case, steps, *found)


def command_of(module: str, device: str, number: int, rehearsal: bool) -> list[str]:
    """What runs a module of this folder in a process of its own."""
    return [sys.executable, "-m", module, device, str(number), *(["rehearsal"] if rehearsal else [])]


def not_run(part: str, case: str, problem: str) -> Json:
    """The row of a case whose process gave nothing."""
    late = problem.startswith("TimeoutExpired")
    return {"part": part, "case": case, "status": OUT_OF_TIME if late else f"failed: {problem}"}


def run_process(command: list[str], caches: str, timeout: float) -> tuple[float, Json]:
    """(its seconds, what it printed last); `caches`: dsfast's cache folder there. Raises RuntimeError with its last line, and
    subprocess.TimeoutExpired after `timeout` seconds."""
    if timeout <= 0:
        raise subprocess.TimeoutExpired(command, timeout)
    environment = {**os.environ, "DSFAST_CACHE": caches}
    environment.pop("TRITON_CACHE_DIR", None)
    begin = time.perf_counter()
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=timeout)
    seconds = time.perf_counter() - begin
    if child.returncode:
        raise RuntimeError((child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1])
    return seconds, json.loads(child.stdout.splitlines()[-1])


def row(case: str, steps: int, seconds: float, found: Json) -> Json:
    """The row of a process that took `seconds`; found: what `train` returned there."""
    first, last = found["losses"]
    times = {"process": seconds, "preparation": found["preparation_seconds"], "training": found["seconds"]}
    variants = {name: {"seconds": asdict(spread([taken]))} for name, taken in times.items() if taken is not None}
    variants["training"] |= {key: found[key] for key in ("tokens_per_second", "memory_gb", "utilisation")}
    passes = {
        name: {"flops": 0, "bytes": None, "ideal_seconds": None, "variants": {"dsfast": variant}}
        for name, variant in variants.items()
    }
    return {
        "part": "training", "case": case, "sizes": {"steps": steps}, "dtype": found["dtype"], "peers": {}, "passes": passes,
        "check": "" if last <= first else f"the loss rose from {first:.4f} to {last:.4f}", "fallbacks": found["fallbacks"],
    }  # fmt: skip


def train(trainer: Trainer) -> Json:
    """What a run of `trainer` took: its seconds as in `TrainResult`, memory in 1e9 bytes, the first and the last loss."""
    result = trainer.train(quiet=True)
    return {
        "seconds": result.seconds, "preparation_seconds": result.preparation_seconds, "utilisation": result.utilisation,
        "tokens_per_second": result.tokens_per_second, "memory_gb": result.peak_memory_bytes / 1e9,
        "losses": [result.losses[0], result.losses[-1]], "fallbacks": ops.fallbacks(),
        "dtype": dtype_name(trainer.precision.tensors),
    }  # fmt: skip


def trainer_for(device: str, steps: int, rehearsal: bool) -> Trainer:
    """On the data of the shipped config; for a rehearsal on rows of random tokens."""
    if rehearsal:
        config = whole_config(True)
        return trainer_on(config, *random_batch(config, 1, 8), steps=steps)
    return Trainer(default_config(device).replace(**{"train.steps": steps}))


def main(argv: list[str]) -> None:
    device, steps, *rest = argv
    print(json.dumps(train(trainer_for(device, int(steps), bool(rest)))))


if __name__ == "__main__":
    sys.exit(run_command(main))
