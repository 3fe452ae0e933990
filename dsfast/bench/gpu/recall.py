"""The part "recall", which runs where it is asked for alone: whether what is trained on the GPU knows as much as what is trained
on this machine's CPU, seed by seed, each in a process of its own.

    python -m dsfast.bench.gpu.recall DEVICE SEED [rehearsal]    trains, asks, and prints the recalls as JSON
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from functools import partial

from dsfast.bench.gpu.training import command_of, not_run, run_process, trainer_for
from dsfast.bench.step import attempt
from dsfast.command import run_command
from dsfast.config import default_config
from dsfast.evaluate import measure_taught
from dsfast.evaluate.recall import as_json
from dsfast.files import Json, cache_folder
from dsfast.train import Trainer

SEEDS = 5
PHRASINGS = ("taught", "heldout")


def run_recall(rehearsal: bool, seconds: float) -> Iterator[Json]:
    """A row for each seed: recall ("GPU", "CPU" -> phrasings -> as dataclass Recall) and overlap, see `overlap`; within `seconds`
    in all. A seed that fails costs the others nothing."""
    end = time.perf_counter() + seconds
    for seed in range(1 if rehearsal else SEEDS):
        found, problem = attempt(partial(recalls_of, seed, rehearsal, end))
        yield not_run("recall", f"seed {seed}", problem) if problem else {
            "part": "recall", "case": f"seed {seed}", "sizes": {}, "dtype": "", "peers": {}, "passes": {}, "check": "",
            "recall": found, "overlap": overlap(found["GPU"], found["CPU"]),
        }  # fmt: skip


def recalls_of(seed: int, rehearsal: bool, end: float) -> Json:
    """ "GPU", "CPU" -> the recalls of a run of `seed` there. Raises as `run_process` does, at the latest at `end`."""
    found = {}
    for name, device in (("GPU", "cpu" if rehearsal else "gpu"), ("CPU", "cpu")):
        command = command_of("dsfast.bench.gpu.recall", device, seed, rehearsal)
        found[name] = run_process(command, str(cache_folder()), end - time.perf_counter())[1]
    return found


def overlap(ours: Json, theirs: Json) -> bool | None:
    """Whether the Wilson intervals of the two recalls overlap, in both phrasings; None where nothing was asked."""
    pairs = [(ours[name], theirs[name]) for name in PHRASINGS if ours[name] and theirs[name]]
    return all(a["low"] <= b["high"] and b["low"] <= a["high"] for a, b in pairs) if pairs else None


def recall(trainer: Trainer) -> Json:
    """What the model knows after its run."""
    trainer.train(quiet=True)
    return as_json(measure_taught(trainer.model, trainer.dataset.tokenizer, trainer.dataset.taught))


def seeded(device: str, seed: int, rehearsal: bool) -> Trainer:
    return trainer_for(device, 1, True) if rehearsal else Trainer(default_config(device).replace(seed=seed))


def main(argv: list[str]) -> None:
    device, seed, *rest = argv
    print(json.dumps(recall(seeded(device, int(seed), bool(rest)))))


if __name__ == "__main__":
    sys.exit(run_command(main))
