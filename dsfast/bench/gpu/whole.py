"""The whole training step and generation of the 500K model, as rows like those of the operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsfast import ops
from dsfast.bench.cases import Work
from dsfast.bench.generation import run_generate
from dsfast.bench.gpu.bounds import Bounds
from dsfast.bench.gpu.operators import BUDGET, SKIPPED, in_a_graph, kernels_of, related
from dsfast.bench.gpu.peers.peer import no_gpu
from dsfast.bench.peers import GPU_PEERS
from dsfast.bench.step import FirstSteps, attempt
from dsfast.bench.timing import repeat, spread, take_turns
from dsfast.bench.workload import comparable, matrix_flops, random_batch
from dsfast.config import Config, ModelConfig, default_config
from dsfast.data import Batch, Dataset
from dsfast.files import Json
from dsfast.model import DeepseekV3, generate_ids, precision_of
from dsfast.model.capture import record, unchanged
from dsfast.model.decode import OperatorDecoder
from dsfast.model.device_decode import DecodeStep, DeviceDecoder, places_for
from dsfast.train import Trainer
from dsfast.train.device_step import DeviceStep
from dsfast.train.steps import DeviceSteps
from dsfast.triton_kernels.launch import dtype_name

NEW_TOKENS, BATCHES, REPEATS = 64, (1, 32, 256), 5
UNCAPTURED = "dsfast, uncaptured"
WAYS = {"dsfast, one chain": False, "dsfast, branches": True}
"""Of recording a step: with branches or without. The trainer takes the faster."""
WARM_CALLS = 5
"""Untimed: CUDA graphs are recorded on the way."""
AGREEMENT = {"loss": 1e-3, "gradient norm": 3e-2}
"""How far apart, relatively, those of the recorded step, in bfloat16, and of the plain PyTorch path, in float32, may be."""
_COMPILED = ("compile", "reduce-overhead")
_SMALL = {
    "model.vocab_size": 48, "model.embedding_rank": 16, "model.hidden_size": 32, "model.num_hidden_layers": 1,
    "model.moe_intermediate_size": 16, "runtime.whole_step": False, "runtime.dtype": "float32",
}  # fmt: skip


def whole_config(rehearsal: bool) -> Config:
    """The 500K model's on a GPU; for a rehearsal a much smaller one on the CPU."""
    return default_config("cpu").replace(**_SMALL) if rehearsal else default_config("gpu")


def run_step(
    clock: Any, bounds: Bounds | None, rehearsal: bool, part: str, expired: Callable[[], bool], rounds: int
) -> Iterator[Json]:  # fmt: skip
    """The row of a step as the trainer records it on a GPU, its batch in device memory, beside the same in each of WAYS, and
    again each time a peer has joined: those of GPU_PEERS that PyTorch launches; in the part "compiled" those that it compiles,
    which takes longer than all else.

    Once `expired()` is true no other peer is tried.
    """
    config = comparable(whole_config(rehearsal))
    batch, length = (1, 8) if rehearsal else (config.train.batch_size, config.data.sequence_length)
    rows = random_batch(config, batch, length)
    missing = _peers(part, config.model)
    replays = (1 + len(WAYS)) * max(WARM_CALLS, rounds)
    trainer = trainer_on(config, *rows, steps=2 + replays)
    rows = [x.to(trainer.device) for x in rows]
    first = FirstSteps(trainer, GPU_PEERS, missing, rows)
    flops, dtype = matrix_flops(config.model, batch, length), precision_of(config.runtime).tensors
    with trainer.kernels():
        steps, problem = recorded_steps(trainer, rows, clock.on_gpu)
        calls = {"dsfast": steps.call}
        if clock.on_gpu and steps.call is not steps.step:
            calls |= _recordings(steps.step)

        def timed() -> Json:
            steps.step.place.zero_()  # there are batches for one round of turns
            return _time_step(calls, clock, flops, dtype, bounds, rounds)

        for call in calls.values():
            _warm(call)
        row = {
            "part": part, "case": f"{batch} x {length}", "sizes": {"batch": batch, "length": length}, "check": problem,
            "preparation_seconds": steps.preparation_seconds, "dtype": dtype_name(dtype),
            "peers": {name: {"what": GPU_PEERS[name].what, **SKIPPED} for name in missing},
            "passes": {"step": timed()}, "fallbacks": ops.fallbacks(), "recordings": {},
        }  # fmt: skip
        if clock.on_gpu:
            steps.step.place.zero_()
            row["recordings"] = {name: kernels_of(clock, call) for name, call in calls.items()}
        yield row
        for name in missing:
            if expired():
                return
            state, training = first.of(name)
            call = training and partial(training.step, *rows)
            _, failed = attempt(partial(_warm, call)) if call else (None, "")
            state |= {"status": "failed", "reason": failed} if failed else {}
            row["peers"][name] = _ready({k: state[k] for k in ("what", "status", "reason")})
            if call and not failed:
                calls[name] = call
                row["passes"]["step"] = timed()
            yield row


def _peers(part: str, model: ModelConfig) -> dict[str, str]:
    """The peers of a part, and why one cannot run, "" if it can."""
    return {
        name: peer.unavailable(model) or (no_gpu() if part == "compiled" else "")
        for name, peer in GPU_PEERS.items()
        if (name in _COMPILED) == (part == "compiled")
    }


def _recordings(step: DeviceStep) -> dict[str, Callable[[], object]]:
    """What replays the step, recorded in each of WAYS that does not fail."""
    found = {}
    for name, branched in WAYS.items():
        with unchanged(step.state()):
            recording, _ = attempt(partial(record, step, branched))
        if recording is not None:
            found[name] = recording.replay
    return found


def _time_step(
    calls: dict[str, Callable[[], object]], clock: Any, flops: int, dtype: torch.dtype, bounds: Bounds | None, rounds: int
) -> Json:  # fmt: skip
    """The pass in which `calls` take turns."""
    ideal = bounds and bounds.ideal_seconds(Work(flops, 0), dtype)
    taken, variants = take_turns({name: (call,) for name, call in calls.items()}, rounds, BUDGET, clock.seconds), {}
    for name, samples in taken.items():
        seconds = spread([seconds for (seconds,) in samples])
        variants[name] = {"seconds": asdict(seconds), "flops_per_second": flops / seconds.median}
        variants[name]["bound_share"] = ideal and ideal / seconds.median
    return {"flops": flops, "bytes": None, "ideal_seconds": ideal, "variants": related(variants)}


def _warm(call: Callable[[], object]) -> None:
    for _ in range(WARM_CALLS):
        call()


class SameRows:
    """Stands for a data set's rows: the same batch at every step, each row a document."""

    def __init__(self, input_ids: Tensor, labels: Tensor):
        self._batch = Batch(input_ids, labels, None, None)

    def batch(self, step: int, batch_size: int) -> Batch:
        return self._batch

    def most_segments(self, batch_size: int) -> int:
        return batch_size


def trainer_on(config: Config, input_ids: Tensor, labels: Tensor, steps: int) -> Trainer:
    """A trainer of `steps` steps, whose every batch is input_ids, labels [B, T]."""
    batch, length = input_ids.shape
    sizes = {"train.batch_size": batch, "data.sequence_length": length, "train.steps": steps}
    return Trainer(config.replace(**sizes), None, Dataset(None, SameRows(input_ids, labels), {}, []))


def recorded_steps(trainer: Trainer, rows: list[Tensor], on_gpu: bool) -> tuple[DeviceSteps, str]:
    """The trainer's steps, ready, the first of them done, and how its loss or its gradient is wrong, "" if they are right."""
    steps = trainer.steps() if on_gpu else DeviceSteps(trainer, lambda step: step)
    steps.prepare()
    with ops.use("reference"):
        loss = trainer.model.loss(*rows, mtp_loss_weight=trainer.config.train.mtp_loss_weight)
        gradients = torch.autograd.grad(loss, list(trainer.model.parameters()), allow_unused=True)
    expected = loss.item(), torch.nn.utils.get_total_norm([g for g in gradients if g is not None]).item()
    steps.call()
    for (name, apart), right, found in zip(AGREEMENT.items(), expected, steps.step.measured[0].tolist(), strict=False):
        if not abs(found - right) <= apart * abs(right):
            return steps, f"the recorded step's {name} is {found:.6f}, plain PyTorch's {right:.6f}"
    return steps, ""


def run_generation(clock: Any, rehearsal: bool, rounds: int) -> Iterator[Json]:
    """Greedy tokens in float32, one row for each batch, against transformers and our own steps launched one by one.

    Two passes: the whole call, prompt included, by the host's clock; and one step, by `clock`.
    """
    config = whole_config(rehearsal).replace(**{"model.zero_init_output": False})
    torch.manual_seed(config.seed)
    model = DeepseekV3(config.model).to(config.runtime.device)
    launch = {"launch": lambda step: step} if rehearsal else {}
    ours = partial(generate_ids, decoder_type=partial(DeviceDecoder, **launch))
    tokens, repeats = 2 if rehearsal else NEW_TOKENS, min(REPEATS, rounds)
    uncaptured = {UNCAPTURED: partial(generate_ids, decoder_type=OperatorDecoder)}
    for batch in (1, 2) if rehearsal else BATCHES:
        found = run_generate(model, [batch], tokens, repeats, lambda text: None, ours, uncaptured)
        peer = {"what": "transformers generate, float32", "status": found["status"], "reason": found["reason"]}
        row = _generation_row(found["batches"][0], tokens, peer)
        if not row["check"]:
            row["passes"]["one step"] = _one_step(clock, model, batch, tokens, rounds)
        yield row


def _generation_row(found: Json, tokens: int, peer: Json) -> Json:
    count = found["tokens"]
    seconds = {"dsfast": found["seconds"]} | {name: pair["other"] for name, pair in found["others"].items()}
    if "comparison" in found:
        seconds["transformers"] = found["comparison"]["other"]
    variants = {name: {"seconds": s, "tokens_per_second": count / s["median"]} for name, s in seconds.items()}
    check = "".join(f"other tokens than {name}" for name in found["different"])
    return {
        "part": "generate", "case": f"batch {found['batch']}", "sizes": {"batch": found["batch"], "tokens": tokens},
        "dtype": "float32", "check": check, "peers": {"transformers": _ready(peer)}, "fallbacks": ops.fallbacks(),
        "passes": {} if check else {f"{tokens} tokens": _pass(variants)},
    }  # fmt: skip


@torch.inference_mode()
def _one_step(clock: Any, model: DeepseekV3, batch: int, tokens: int, rounds: int) -> Json:
    """A step as it is captured, launched one operator after the other and in a graph; with it, its place set back."""
    step = DecodeStep(model, batch, places_for(model, tokens), temperature=0.0)

    def call() -> None:
        step.place.zero_()
        step()

    call()
    median = spread([seconds for (seconds,) in repeat((call,), rounds, BUDGET, clock.seconds)])
    variant = {"seconds": asdict(median), "tokens_per_second": batch / median.median}
    return _pass({"dsfast": variant | (in_a_graph(clock, call) | kernels_of(clock, call) if clock.on_gpu else {})})


def _pass(variants: Json) -> Json:
    return {"flops": 0, "bytes": None, "ideal_seconds": None, "variants": related(variants)}


def _ready(peer: Json) -> Json:
    """A peer that was timed, or of which nothing is said, was ready: so it is called in the operators' rows."""
    return {**peer, "status": "ready" if peer["status"] in ("timed", "") else peer["status"]}
