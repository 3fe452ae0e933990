"""The whole training step and generation of the 500K model, as rows like those of the operators."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from dsfast import ops
from dsfast.bench.generation import run_generate
from dsfast.bench.gpu.bounds import Bounds
from dsfast.bench.gpu.operators import BUDGET, ROUNDS, related
from dsfast.bench.gpu.peers import no_gpu
from dsfast.bench.peers import GPU_PEERS
from dsfast.bench.step import first_steps
from dsfast.bench.timing import spread, take_turns
from dsfast.bench.workload import comparable, matrix_flops, random_batch
from dsfast.config import Config, default_config
from dsfast.model import DeepseekV3, precision_of
from dsfast.train import Trainer

Json = dict[str, Any]

NEW_TOKENS, BATCHES, REPEATS = 64, (1, 256), 5
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


def run_generation(rehearsal: bool) -> list[Json]:
    """Greedy tokens in float32, one row for each batch; the whole call, prompt included, by the host's clock."""
    config = whole_config(rehearsal).replace(**{"model.zero_init_output": False})
    torch.manual_seed(config.seed)
    model = DeepseekV3(config.model).to(config.runtime.device)
    batches, tokens, repeats = ((1, 2), 2, 1) if rehearsal else (BATCHES, NEW_TOKENS, REPEATS)
    found = run_generate(model, batches, tokens, repeats, lambda text: None)
    peer = {"what": "transformers generate, float32", "status": found["status"], "reason": found["reason"]}
    return [_generation_row(row, tokens, peer) for row in found["batches"]]


def _generation_row(found: Json, tokens: int, peer: Json) -> Json:
    variants = {"dsfast": {"seconds": found["seconds"], "tokens_per_second": found["tokens_per_second"]}}
    if "comparison" in found:
        theirs = {"seconds": found["comparison"]["other"], "tokens_per_second": found["peer_tokens_per_second"]}
        variants["transformers"] = theirs
    passes = {f"{tokens} tokens": {"flops": 0, "bytes": None, "ideal_seconds": None, "variants": related(variants)}}
    return {
        "part": "generate", "case": f"batch {found['batch']}", "sizes": {"batch": found["batch"], "tokens": tokens},
        "dtype": "float32", "check": "", "peers": _ready({"transformers": peer}), "passes": passes,
    }  # fmt: skip


def _ready(peers: Json) -> Json:
    """A peer that was timed is one that was ready, as in the operators' rows."""
    return {
        name: {**peer, "status": peer["status"].replace("timed", "ready") or "ready"} for name, peer in peers.items()
    }
