"""The calls that stand for a whole model are held to its operators; a wrong one is told."""

from __future__ import annotations

import pytest
import torch
from operator_cases import needs_native
from tiny import tiny_config, tiny_dataset

from dsfast.config import OPERATORS
from dsfast.evaluate.one_call import BATCHES, check_one_calls
from dsfast.model import NativeStep
from dsfast.model.native_decode import NativeDecoder
from dsfast.train import Trainer
from dsfast.train.gradients import AGREEMENT, CHOICE


@pytest.fixture(autouse=True)
def native():
    needs_native()


def trained(**changes) -> Trainer:
    """Two steps, after which no product is zero."""
    trainer = Trainer(tiny_config(**changes), dataset=tiny_dataset())
    for number in range(2):
        trainer.train_batch(trainer.dataset.rows.batch(number, 3))
    return trainer


def checked(trainer: Trainer) -> dict[str, tuple[str, bool]]:
    with trainer.kernels():
        return {one.call: (one.what, one.passed) for one in check_one_calls(trainer)}


@pytest.mark.parametrize("training", [True, False])
def test_right_calls_pass_and_the_model_is_left_as_it_was(training):
    trainer = trained()
    trainer.model.train(training)
    found = checked(trainer)
    assert {call: passed for call, (_, passed) in found.items()} == {"train_step": True, "decode_step": True}
    assert trainer.model.training == training
    assert all(p.grad is None for p in trainer.model.parameters())


def test_only_calls_that_run_are_looked_at():
    assert checked(trained(**{"runtime.kernels": dict.fromkeys(OPERATORS, "reference")})) == {}
    assert set(checked(trained(**{"runtime.whole_step": False}))) == {"decode_step"}


def test_a_gradient_that_misses_one_word_in_a_whole_batch_is_told(monkeypatch):
    of_step = NativeStep.__call__

    def without_the_last_word(self, *flat):
        loss = of_step(self, *flat)
        self.model.embed_tokens.weight.grad[int(flat[0][-1])] = 0
        return loss

    trainer = trained()
    monkeypatch.setattr(NativeStep, "__call__", without_the_last_word)
    found = checked(trainer)
    assert found["train_step"] == ("the gradient of embed_tokens.weight", False)
    assert found["decode_step"][1]


@pytest.mark.parametrize(
    ("batches", "allowed", "compared", "passed"),
    [(BATCHES - 1, 0.1, True, True), (BATCHES, 0.1, False, True), (1, 1e-3, False, False)],
    ids=["in some", "in all", "by more"],
)
def test_roundings_may_send_a_few_tokens_to_other_experts(monkeypatch, batches, allowed, compared, passed):
    """Where they do, in one of two routers, a smaller batch is compared."""
    of_step, calls = NativeStep.__call__, []

    def with_another_load(self, *flat):
        loss = of_step(self, *flat)
        calls.append(None)
        if len(calls) <= batches:
            self.model.routers()[0].load[0] -= 1
        return loss

    monkeypatch.setattr("dsfast.evaluate.one_call.OTHERS", allowed)
    trainer = trained(**{"model.num_hidden_layers": 3})
    assert len(trainer.model.routers()) == 2
    monkeypatch.setattr(NativeStep, "__call__", with_another_load)
    what, right = checked(trainer)["train_step"]
    assert (what != CHOICE, right) == (compared, passed)


def test_a_place_of_the_cache_that_is_another_is_told(monkeypatch):
    of_step = NativeDecoder.step

    def written_over(self):
        if self._longest == 20:
            self._cache.latent[:, :, 19] = self._cache.latent[:, :, 18]
        return of_step(self)

    trainer = trained()
    monkeypatch.setattr(NativeDecoder, "step", written_over)
    found = checked(trainer)
    assert found["decode_step"] == ("the logits", False)
    assert found["train_step"][1]


def test_what_is_not_finite_does_not_pass(monkeypatch):
    trainer = trained()
    monkeypatch.setattr("dsfast.evaluate.one_call.apart", lambda *_: torch.full((4, 2), float("nan")))
    assert not checked(trainer)["decode_step"][1]
    assert AGREEMENT == 1e-3
