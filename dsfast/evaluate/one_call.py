"""Whether the C++ calls that stand for a whole model, in training and in generation, give what its operators give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dsfast.model.native_decode import apart, stands_for
from dsfast.model.native_model import AGREEMENT, runs_natively
from dsfast.train import Trainer
from dsfast.train.gradients import CHOICE

OTHERS = 1e-3
"""The part of all choices of experts that roundings may change."""
BATCHES = 3
"""So many are looked at, each an eighth of the one before, for one in which they change none."""
ROWS, PROMPT, PLACES = 8, 8, 512
"""Sequences that are generated, the tokens that each begins with, and how far each goes at most. What is wrong at a place is so
in all of them."""


@dataclass(frozen=True)
class OneCall:
    """`call`: "train_step" or "decode_step", of csrc. `apart`: by how much, relatively, `what` differs from the operators'."""

    call: str
    what: str
    apart: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.apart <= self.allowed


def check_one_calls(trainer: Trainer) -> list[OneCall]:
    """The loss and gradients of a whole batch, the next one, and logits at each place of the context; of the calls that the
    trainer's model is left to here, on a GPU none. Runs under `trainer.kernels()`. Leaves the gradients cleared."""
    model = trainer.model
    was_training = model.training
    try:
        return [*_training(trainer), *_generation(trainer)]
    finally:
        model.train(was_training).zero_grad(set_to_none=True)


def _training(trainer: Trainer) -> Iterator[OneCall]:
    trainer.model.train()
    last = None
    for number in range(BATCHES):
        b = trainer.dataset.rows.batch(trainer.steps_done, max(trainer.config.train.batch_size >> 3 * number, 1))
        found = trainer.gradients.furthest_apart(b.input_ids, b.labels, b.positions, b.cu_seqlens)
        last = found or last
        if found is None or found[0] != CHOICE or found[1] > OTHERS:
            break
    if last is not None:
        yield OneCall("train_step", *last, OTHERS if last[0] == CHOICE else AGREEMENT)


def _generation(trainer: Trainer) -> Iterator[OneCall]:
    model = trainer.model.eval()
    if runs_natively(model) and stands_for(model):
        rows = trainer.dataset.rows.batch(trainer.steps_done, trainer.config.train.batch_size).input_ids
        prompts = rows[:ROWS, : min(PROMPT, model.config.max_position_embeddings)]
        by = float(apart(model, prompts, PLACES).amin(0).max())
        yield OneCall("decode_step", "the logits", by, AGREEMENT)
