"""The whole training step and generation of the 500K model, as rows like those of the operators."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from dsfast import ops
from dsfast.bench.generation import run_generate
from dsfast.bench.gpu.bounds import Bounds
from dsfast.bench.gpu.operators import BUDGET, ROUNDS, in_a_graph, related
from dsfast.bench.gpu.peers import no_gpu
from dsfast.bench.peers import GPU_PEERS
from dsfast.bench.step import first_steps
from dsfast.bench.timing import spread, take_turns
from dsfast.bench.workload import comparable, matrix_flops, random_batch
from dsfast.config import Config, default_config
from dsfast.model import DeepseekV3, generate_ids, precision_of
from dsfast.model.decode import OperatorDecoder
from dsfast.model.device_decode import DecodeStep, DeviceDecoder, places_for
from dsfast.train import Trainer

Json = dict[str, Any]

NEW_TOKENS, BATCHES, REPEATS = 64, (1, 32, 256), 5
UNCAPTURED = "dsfast, uncaptured"
_COMPILED = ("compile", "reduce-overhead")
_SMALL = {
    "model.vocab_size": 48, "model.embedding_rank": 16, "model.hidden_size": 32, "model.num_hidden_layers": 1,
    "model.moe_intermediate_size": 16, "runtime.whole_step": False, "runtime.dtype": "float32",
}  # fmt: skip


def whole_config(rehearsal: bool) -> Config:
    """The 500K model's on a GPU; for a rehearsal a much smaller one on the CPU."""
    return default_config("cpu").replace(**_SMALL) if rehearsal else default_config("gpu")


def run_step(clock: Any, bounds: Bounds | None, rehearsal: bool) -> Json:
    """A step of the trainer, as it is, against GPU_PEERS."""
    config = comparable(whole_config(rehearsal))
    batch, length = (1, 8) if rehearsal else (config.train.batch_size, config.data.sequence_length)
    trainer = Trainer(config)
    rows = [x.to(trainer.device) for x in random_batch(config, batch, length)]
    here = {name: peer.missing() or (no_gpu() if name in _COMPILED else "") for name, peer in GPU_PEERS.items()}
    trainings, outcome = first_steps(trainer, GPU_PEERS, here, rows, lambda text: None)
    calls = {"dsfast": trainer.step} | {name: training.step for name, training in trainings.items()}
    for call in calls.values():
        for _ in range(5):  # CUDA graphs are recorded on the way
            call(*rows)
    turns = {name: (partial(call, *rows),) for name, call in calls.items()}
    taken = take_turns(turns, ROUNDS if clock.on_gpu else 1, BUDGET, clock.seconds)
    flops, variants = matrix_flops(config.model, batch, length), {}
    dtype = precision_of(config.runtime).tensors
    ideal = bounds and flops / getattr(bounds, str(dtype).removeprefix("torch."))
    for name, samples in taken.items():
        seconds = spread([taken for (taken,) in samples])
        variants[name] = {"seconds": asdict(seconds), "flops_per_second": flops / seconds.median}
        variants[name]["bound_share"] = ideal and ideal / seconds.median
    peers = {n: {k: p[k] for k in ("what", "status", "reason")} for n, p in outcome["peers"].items()}
    passes = {"step": {"flops": flops, "bytes": None, "ideal_seconds": ideal, "variants": related(variants)}}
    return {
        "part": "step", "case": f"{batch} x {length}", "sizes": {"batch": batch, "length": length}, "check": "",
        "dtype": str(dtype).removeprefix("torch."), "peers": _ready(peers), "passes": passes, "fallbacks": ops.fallbacks(),
    }  # fmt: skip


def run_generation(clock: Any, rehearsal: bool) -> Iterator[Json]:
    """Greedy tokens in float32, one row for each batch, against transformers and our own steps launched one by one.

    Two passes: the whole call, prompt included, by the host's clock; and one step, by `clock`.
    """
    config = whole_config(rehearsal).replace(**{"model.zero_init_output": False})
    torch.manual_seed(config.seed)
    model = DeepseekV3(config.model).to(config.runtime.device)
    batches, tokens, repeats = ((1, 2), 2, 1) if rehearsal else (BATCHES, NEW_TOKENS, REPEATS)
    launch = {"launch": lambda step: step} if rehearsal else {}
    ours = partial(generate_ids, decoder_type=partial(DeviceDecoder, **launch))
    uncaptured = {UNCAPTURED: partial(generate_ids, decoder_type=OperatorDecoder)}
    for batch in batches:
        found = run_generate(model, [batch], tokens, repeats, lambda text: None, ours, uncaptured)
        peer = {"what": "transformers generate, float32", "status": found["status"], "reason": found["reason"]}
        row = _generation_row(found["batches"][0], tokens, peer)
        if not row["check"]:
            row["passes"]["one step"] = _one_step(clock, model, batch, tokens)
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
        "dtype": "float32", "check": check, "peers": _ready({"transformers": peer}), "fallbacks": ops.fallbacks(),
        "passes": {} if check else {f"{tokens} tokens": _pass(variants)},
    }  # fmt: skip


@torch.inference_mode()
def _one_step(clock: Any, model: DeepseekV3, batch: int, tokens: int) -> Json:
    """A step as it is captured, launched one operator after the other and in a graph; with it, its place set back."""
    step = DecodeStep(model, batch, places_for(model, tokens), temperature=0.0)

    def call() -> None:
        step.place.zero_()
        step()

    call()
    taken = take_turns({"": (call,)}, ROUNDS if clock.on_gpu else 1, BUDGET, clock.seconds)[""]
    median = spread([seconds for (seconds,) in taken])
    variant = {"seconds": asdict(median), "tokens_per_second": batch / median.median}
    return _pass({"dsfast": variant | (in_a_graph(clock, "dsfast", call) if clock.on_gpu else {})})


def _pass(variants: Json) -> Json:
    return {"flops": 0, "bytes": None, "ideal_seconds": None, "variants": related(variants)}


def _ready(peers: Json) -> Json:
    """A peer that was timed is one that was ready, as in the operators' rows."""
    return {
        name: {**peer, "status": peer["status"].replace("timed", "ready") or "ready"} for name, peer in peers.items()
    }
