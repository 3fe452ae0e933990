"""One side of `bench against`: what the source tree in the working folder makes of a run, a turn at a time.

    python -c "..."    with the text of this file, so that it is the same in either tree

It takes of dsfast only what older commits have too, but for `Run.check_prompts` and `Run.one_calls`. Standard input has lines of
JSON, the name of a method of `Run` and its arguments, first "ready" with those that make the run. Standard output has a line of
JSON for each: what the method returns, {"user_error": ...}, or {"failed": ...} where losses or logits are no numbers.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout, suppress
from dataclasses import asdict
from functools import lru_cache, wraps
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from dsfast import ops
from dsfast.bench.cases import SIZES, BenchCase, build_case
from dsfast.config import load_config
from dsfast.errors import UserError
from dsfast.evaluate.__main__ import main as evaluate_command
from dsfast.model import generate_ids
from dsfast.ops.checks import evaluate
from dsfast.train import Trainer

PROMPT = "The capital of France is"
LEAST = 0.02
"""Seconds for which what takes less is called again and again."""
PLACING = 0.01
"""Seconds that a thread may wait in a turn without any other work: the kernel may wake it where another thread of its
process runs, or one of the other side that still looks for work, and takes some milliseconds to move it."""
Answer = dict[str, Any]


def _turn(method: Callable[..., Answer]) -> Callable[..., Answer]:
    """The method of `Run`, whose answer then has `waited` too: how long the thread that waited longest could have run and
    had no processor, less PLACING, as a part of the turn's wall time. 0 where the kernel does not say.

    Not of all threads together: with many, milliseconds of each would be more than a part of the turn. On a GPU it is of
    the threads that launch its work.
    """

    @wraps(method)
    def turn(*arguments: Any, **named: Any) -> Answer:
        had, begin = _waits(), perf_counter()
        answer = method(*arguments, **named)
        seconds = perf_counter() - begin
        waited = max((each - had.get(thread, 0.0) for thread, each in _waits().items()), default=0.0)
        return {**answer, "waited": max(waited - PLACING, 0.0) / seconds}

    return turn


def _waits() -> dict[str, float]:
    """Thread -> the seconds so far for which it could have run and had no processor, of all that there are."""
    found = {}
    for thread in Path("/proc/self/task").glob("*"):
        with suppress(OSError):  # it has ended meanwhile, or the kernel was built without this file
            found[thread.name] = int((thread / "schedstat").read_text().split()[1]) / 1e9
    return found


class Run:
    """A training run of the config in a file, with `changes` to it; `turn` of its steps at a time, on a GPU all of them. And the
    operators, with the kernels and the products that the run would have."""

    def __init__(self, config: str, changes: dict[str, Any], turn: int):
        self.file, self.config = config, load_config(config).replace(**changes)
        self.turn = turn
        self.trainer = Trainer(self.config)

    def ready(self) -> dict[str, Any]:
        """Whose code this is, where it trains, and the operators it has."""
        package = str(Path(ops.__file__).parents[1])
        return {"package": package, "device": self.trainer.device.type, "operators": list(SIZES)}

    def check_prompts(self) -> dict[str, Any]:
        """Asked of the present tree alone. Raises UserError where what is asked in the end does not fit the model's context."""
        from dsfast.data import load_prompts
        from dsfast.evaluate import check_lengths, check_taught

        data, prompts, context = self.trainer.dataset, load_prompts(), self.config.model.max_position_embeddings
        try:
            check_lengths(data.tokenizer, [*prompts.fast, *prompts.full], context)
            check_taught(data.tokenizer, data.taught, context)
        except UserError as error:
            raise UserError(f"{self.file}: {error}") from None
        return {}

    @_turn
    def train(self) -> dict[str, Any]:
        """The next steps: their losses, the median of their seconds. On a GPU a whole run, begun anew."""
        if self.trainer.device.type == "cuda":
            self.trainer = Trainer(self.config, dataset=self.trainer.dataset)
            result = self.trainer.train(quiet=True)
            return {"losses": result.losses, "seconds": result.seconds / len(result.losses)}
        train, reports = self.config.train, []
        for step in range(self.trainer.steps_done, min(train.steps, self.trainer.steps_done + self.turn)):
            reports.append(self.trainer.train_batch(self.trainer.dataset.rows.batch(step, train.batch_size)))
        return {"losses": [r.loss for r in reports], "seconds": median(r.seconds for r in reports)}

    @_turn
    def generate(self, batch: int, tokens: int) -> dict[str, Any]:
        """`tokens` more for each of `batch` times the same prompt: the seconds of that."""
        prompt, runtime = self.trainer.dataset.tokenizer.encode(PROMPT).ids, self.config.runtime
        with ops.configured(runtime.kernels, runtime.device):
            return _timed(lambda: generate_ids(self.trainer.model, [prompt] * batch, tokens))

    def one_calls(self) -> dict[str, Any]:
        """Asked of the present tree alone: how far the calls that stand for the whole model are from its operators."""
        from dsfast.evaluate.one_call import check_one_calls

        with self.trainer.kernels():
            return {"calls": [asdict(one) | {"passed": one.passed} for one in check_one_calls(self.trainer)]}

    def save(self, folder: str) -> dict[str, Any]:
        """A checkpoint of what was trained; peak memory in bytes, and what ran in plain PyTorch instead of a kernel."""
        self.trainer.output_dir = Path(folder)
        self.trainer.output_dir.mkdir()
        self.trainer.save()
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return {"peak_memory_bytes": int(peak.split()[1]) * 1024, "fallbacks": ops.fallbacks()}

    def answers(self, checkpoint: str, file: str) -> dict[str, Any]:
        """Write into `file` what `python -m dsfast.evaluate` finds of a checkpoint; its status."""
        with redirect_stdout(io.StringIO()):
            return {"status": evaluate_command(["--checkpoint", checkpoint, "--json", file])}

    @_turn
    def operator(self, name: str, size: str, backward: bool) -> dict[str, Any]:
        """The seconds of one of the operators at a size of `bench kernels`: forward, or with `backward` its gradients too."""
        with self.trainer.kernels():
            return _timed(_call(name, size, backward))

    def bits(self, name: str, size: str) -> dict[str, Any]:
        """Whether it has a gradient; a digest of its inputs, and one of its outputs and gradients."""
        bench, arguments = _case(name, size)
        with self.trainer.kernels():
            found = evaluate(bench.case.function, arguments, bench.case.differentiable)
        return {
            "backward": bench.backward is not None,
            "inputs": _digest(arguments),
            "results": _digest(found.values()),
        }


@lru_cache(maxsize=1)
def _case(name: str, size: str) -> tuple[BenchCase, tuple]:
    """The operator at that size, and its inputs."""
    bench = build_case(name, size)
    return bench, bench.case.make_inputs(torch.Generator().manual_seed(0))


def _call(name: str, size: str, backward: bool) -> Callable[[], object]:
    bench, arguments = _case(name, size)
    if not backward:
        return torch.no_grad()(lambda: bench.ours(*arguments))
    inputs = list(arguments)
    for position in bench.case.differentiable:
        inputs[position] = arguments[position].detach().requires_grad_()

    def call() -> object:
        outputs = bench.ours(*inputs)
        outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x.requires_grad]
        leaves = [inputs[position] for position in bench.case.differentiable]
        return torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs])

    return call


def _timed(call: Callable[[], object]) -> dict[str, float]:
    """The median of the calls' seconds, but for one before them: the other side has had the caches."""
    call()
    seconds: list[float] = []
    while sum(seconds) < LEAST:
        begin = perf_counter()
        call()
        seconds.append(perf_counter() - begin)
    return {"seconds": median(seconds)}


def _digest(values: Iterable[Any]) -> str:
    """A digest of the bits of all tensors among `values`, also of those in lists."""
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            found.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, list | tuple):
            found.update(_digest(value).encode())
    return found.hexdigest()


def main() -> None:
    """Do what standard input asks for, until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anything else prints is no answer
    run = None
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            if run is None:
                run, arguments = Run(**arguments), {}
            answer = getattr(run, name)(**arguments)
        except UserError as error:
            # Losses or logits that are no numbers are what a tree does, not what it was given. Told by the words, as this runs in
            # older trees, too.
            answer = {"failed" if "not finite" in str(error) else "user_error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
