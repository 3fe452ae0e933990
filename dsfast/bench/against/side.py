"""One side of `bench against`: what the source tree in the working folder makes of a run, a turn at a time.

    python -c "..."    with the text of this file, so that it is the same in either tree

It takes of dsfast only what older commits have too. Standard input has a line of JSON, `Run`'s arguments, and then a line for
each turn: the name of a method and its arguments. Standard output has a line of JSON for each: what the method returns.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from dsfast import ops
from dsfast.config import load_config
from dsfast.model import generate_ids
from dsfast.train import Trainer

PROMPT = "The capital of France is"
CALLS = 5


class Run:
    """A training run of the config in a file, with `changes` to it; `turn` of its steps at a time, on a GPU all of them."""

    def __init__(self, config: str, changes: dict[str, Any], turn: int):
        self.config = load_config(config).replace(**changes)
        self.turn = turn
        self.trainer = Trainer(self.config)
        self.data = self.trainer.dataset

    def ready(self) -> dict[str, Any]:
        """Whose code this is, and where it trains."""
        return {"package": str(Path(ops.__file__).parents[1]), "device": self.trainer.device.type}

    def train(self) -> dict[str, Any]:
        """The next steps: their losses, the median of their seconds. On a GPU a whole run, begun anew."""
        if self.trainer.device.type == "cuda":
            self.trainer = Trainer(self.config, dataset=self.data)
            result = self.trainer.train(quiet=True)
            return {"losses": result.losses, "seconds": result.seconds / len(result.losses)}
        train, reports = self.config.train, []
        for step in range(self.trainer.steps_done, min(train.steps, self.trainer.steps_done + self.turn)):
            reports.append(self.trainer.train_batch(self.data.rows.batch(step, train.batch_size)))
        return {"losses": [r.loss for r in reports], "seconds": median(r.seconds for r in reports)}

    def generate(self, batch: int, tokens: int) -> dict[str, Any]:
        """`tokens` more for each of `batch` times the same prompt, CALLS times: the median of their seconds."""
        prompt, seconds = self.data.tokenizer.encode(PROMPT).ids, []
        for _ in range(CALLS):
            begin = perf_counter()
            generate_ids(self.trainer.model, [prompt] * batch, tokens)
            seconds.append(perf_counter() - begin)
        return {"seconds": median(seconds)}

    def save(self, folder: str) -> dict[str, Any]:
        """A checkpoint of what was trained; peak memory in bytes, and what ran in plain PyTorch instead of a kernel."""
        self.trainer.output_dir = Path(folder)
        self.trainer.output_dir.mkdir()
        self.trainer.save()
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return {"peak_memory_bytes": int(peak.split()[1]) * 1024, "fallbacks": ops.fallbacks()}


def main() -> None:
    """Do what standard input asks for, until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anything else prints is no answer
    run = Run(**json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps(getattr(run, name)(**arguments)), file=answers, flush=True)


if __name__ == "__main__":
    main()
