"""`bench step`: one whole training step of dsfast against peers with the same weights on the same batch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsfast.bench.ceilings import Ceilings, measure_ceilings
from dsfast.bench.memory import peak_memory
from dsfast.bench.peers import PEERS, ROUGH, Peer, PeerTraining
from dsfast.bench.split import split_by_operator
from dsfast.bench.timing import compare, repeat, spread
from dsfast.bench.workload import comparable, matrix_flops, random_batch
from dsfast.config import Config, ModelConfig
from dsfast.errors import UserError, expect_known
from dsfast.files import Json
from dsfast.train import Trainer
from dsfast.triton_kernels.launch import dtype_name

PROFILED_STEPS = 3

_log = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]


def choose_peers(names: Sequence[str] | None, config: ModelConfig) -> dict[str, str]:
    """Peer -> why it is missing here or for a model of `config`, "" if it is not; all peers if `names` is None.

    Raises UserError for an unknown peer, and for one asked for by name that is missing.
    """
    missing = {name: peer.unavailable(config) for name, peer in PEERS.items()}
    expect_known("peer", names or (), PEERS, "bench step: ")
    for name in names or ():
        if missing[name]:
            here = ", ".join(name for name, why in missing.items() if not why)
            raise UserError(f"peer {name!r}: {missing[name]}; available here: {here}")
    return {name: missing[name] for name in (PEERS if names is None else dict.fromkeys(names))}


def run_step(
    config: Config, batch: int, length: int, repeats: int, peers: dict[str, str], memory: bool,
    progress: Callable[[str], None],
) -> Json:  # fmt: skip
    """Time `peers` (from `choose_peers`) against dsfast; `progress` is told what comes next.

    Returns `first_loss`, `dsfast` (seconds; what its products multiply), `peers` (name -> status "timed", "missing",
    "failed" or "wrong", reason, comparison), `work`, `ceilings`, `operators` (see split) and, where asked for, what
    `peak_memory` returns.
    """
    if config.runtime.device != "cpu":
        got = f"got {config.runtime.device!r}; a GPU is timed by `bench gpu`"
        raise UserError(f"bench step runs on the CPU; expected runtime.device 'cpu', {got}")
    config = comparable(config)
    rows = random_batch(config, batch, length)
    trainer = Trainer(config)
    ours = partial(trainer.step, *rows)
    trainings, outcome = first_steps(trainer, PEERS, peers, rows, progress)
    progress(f"dsfast against {', '.join(trainings)}")
    others = {name: partial(training.step, *rows) for name, training in trainings.items()}
    for name, pair in compare(ours, others, repeats).items():
        outcome["peers"][name] |= {"status": "timed", "comparison": asdict(pair)}
    progress("ceilings")
    products = dtype_name(trainer.precision.products)
    outcome["dsfast"] = {"products": products} | asdict(spread([taken for (taken,) in repeat([ours], repeats)]))
    outcome |= _work(matrix_flops(config.model, batch, length), outcome["dsfast"]["median"], measure_ceilings())
    progress("dsfast by operator")
    outcome["operators"] = split_by_operator(ours, PROFILED_STEPS, trainer.gradients.seconds)
    if memory:
        outcome |= peak_memory(config, batch, length, trainings, progress)
    return outcome


def _work(flops: int, median: float, ceilings: Ceilings) -> Json:
    """The step's matrix products over its whole time, and as shares of the ceilings."""
    rate = flops / median
    shares = {"float32": rate / ceilings.float32, "bfloat16": rate / ceilings.bfloat16}
    return {"work": {"flops": flops, "flops_per_second": rate, "share_of": shares}, "ceilings": asdict(ceilings)}


def first_steps(
    trainer: Trainer, known: Mapping[str, Peer], peers: Mapping[str, str], rows: Batch, progress: Callable[[str], None]
) -> tuple[dict[str, PeerTraining], Json]:
    """The trainings of those `peers` (name in `known` -> why it is missing) whose first step gives dsfast's loss; the outcome."""
    first = FirstSteps(trainer, known, peers, rows)
    found, trainings = {}, {}
    for name in peers:
        progress(f"first step of {name}")
        found[name], training = first.of(name)
        trainings |= {name: training} if training else {}
    return trainings, {"first_loss": first.expected, "peers": found}


class FirstSteps:
    """dsfast's first step is made, and so are the copies of its weights before it; `of` makes a peer's, one after the other."""

    def __init__(self, trainer: Trainer, known: Mapping[str, Peer], peers: Mapping[str, str], rows: Batch):
        self.known, self.missing, self.rows = known, peers, rows
        self._built = {
            name: attempt(partial(PeerTraining, known[name], trainer.model, trainer.config.train))
            for name, missing in peers.items()
            if not missing
        }
        self.expected = trainer.step(*rows)
        self._rough = ROUGH if torch.bfloat16 in trainer.precision else 0.0  # how far that may be off, relatively

    def of(self, name: str) -> tuple[Json, PeerTraining | None]:
        """(what it is, status and reason, both empty where its loss is dsfast's; its training then)."""
        what = {"what": self.known[name].what}
        if self.missing[name]:
            return {**what, "status": "missing", "reason": self.missing[name]}, None
        training, problem = self._built[name]
        state = _first_step(self.known[name], training, problem, self.rows, self.expected, self._rough)
        return {**what, **state}, None if state["reason"] else training


def _first_step(
    peer: Peer, training: PeerTraining | None, problem: str, rows: Batch, expected: float, rough: float
) -> Json:
    if training is not None:
        loss, problem = attempt(partial(training.step, *rows))
    if problem:
        return {"status": "failed", "reason": problem}
    allowed = max(peer.tolerance, rough) * abs(expected)
    if not abs(loss - expected) <= allowed:
        reason = f"its first loss is {loss:.6f}, dsfast's {expected:.6f}; they may differ by {allowed:.1e}"
        return {"status": "wrong", "reason": reason, "first_loss": loss}
    return {"status": "", "reason": "", "first_loss": loss}


def attempt(call: Callable[[], Any]) -> tuple[Any, str]:
    """(what a peer's code returns, ""), or (None, why it failed): the others are still worth timing."""
    try:
        with warnings.catch_warnings():  # what a peer has to say of itself at first is of use to nobody
            warnings.simplefilter("ignore")
            return call(), ""
    except Exception as error:  # whatever stops a peer is the peer's own
        _log.debug("this failed:", exc_info=True)
        return None, f"{type(error).__name__}: {error}".splitlines()[0]
