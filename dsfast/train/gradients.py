"""Loss and gradients of a batch: the whole model in one native call where that is possible, else operator by operator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsfast import ops
from dsfast.config import TrainConfig
from dsfast.model import DeepseekV3, NativeStep, loss_in
from dsfast.model.changed import note_changed
from dsfast.model.native_model import AGREEMENT
from dsfast.ops import native

CHECKED_TOKENS = 1024
"""So many tokens of the first batch, in whole documents, go both ways before the native call is relied on."""
NEGLIGIBLE = 1e-4
"""Of the norm of all gradients together: one below that may be made of nothing but rounding."""

UNLIKE = 10
"""So many times in a row tokens may go to other experts one way than the other, as rounding sends one at times. Each time half as
many are looked at."""
CHOICE, NOTHING = "the choice of experts", "nothing to compare"

Flat = tuple[Tensor, Tensor, Tensor, Tensor]
"""ids [N], labels [N], positions [N], cu_seqlens [S + 1]."""


class Gradients:
    """Sets `.grad` of every parameter of a model; `whole_step` False always goes operator by operator.

    dtype: what the activations are kept in.

    The native call repeats in C++ what dsfast/model says in Python. So that a change there is never passed over, it is first
    held against autograd; where they differ the operators run one by one, with a warning.
    """

    def __init__(self, model: DeepseekV3, dtype: torch.dtype, train: TrainConfig, whole_step: bool):
        self.model, self.dtype, self.train = model, dtype, train
        in_cpp = whole_step and dtype == torch.float32 and all(p.is_cpu for p in model.parameters())
        usable = in_cpp and native.status()[0] is not None and not note_changed(model)
        self._native = NativeStep(model) if usable else None
        self._checked, self._unlike = False, 0
        self.in_one_call = False
        """Whether the last batch went through the native call."""

    def __call__(self, input_ids: Tensor, labels: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None) -> float:
        """Arguments as in `DeepseekV3.loss`; returns the loss."""
        self.in_one_call = False
        if self._native is not None:
            flat = self.model.flatten(input_ids, labels, positions, cu_seqlens)
            with native.products_in(torch.float32):  # rounding to bfloat16 would hide a difference
                self.in_one_call = self._native.takes(*flat) and self._agrees(flat)
        if self.in_one_call:
            return self._native(*flat)
        for parameter in self.model.parameters():
            parameter.grad = None  # the backward pass then hands over its own tensors: nothing to clear, nothing to add
        weight = self.train.mtp_loss_weight
        loss = loss_in(self.dtype, self.model, weight, input_ids, labels, positions, cu_seqlens)
        loss.backward()
        return loss.item()

    def seconds(self) -> dict[str, tuple[float, float]]:
        """Where the last native call spent its time: part -> (forward, backward), a thread's share; empty if it was none."""
        return self._native.thread_seconds() if self.in_one_call else {}

    def _agrees(self, flat: Flat) -> bool:
        """Whether the native call may be relied on; looked at until it has been held against autograd once."""
        if self._checked:
            return True
        what, difference = self._furthest_apart(first_documents(flat, CHECKED_TOKENS >> self._unlike))
        self._unlike = self._unlike + 1 if what == CHOICE else 0
        if what == NOTHING or 0 < self._unlike < UNLIKE:
            return False  # the next batch will do
        self._checked = what != CHOICE and difference <= AGREEMENT
        if not self._checked:
            self._native = None
            by = f"differs by {difference:.1e}" if what != CHOICE else f"differs in {UNLIKE} batches in a row"
            reason = f"{what} {by} between dsfast/model and csrc/train_step.cpp"
            ops.note_fallback("train_step", "cpu", "runs operator by operator", reason)
        return self._checked

    def furthest_apart(self, *batch: Tensor | None) -> tuple[str, float] | None:
        """How far the native call is from autograd on a whole batch, as `_furthest_apart`; None where it is not used for it."""
        if self._native is None:
            return None
        flat = self.model.flatten(*batch)
        with native.products_in(torch.float32):
            return self._furthest_apart(flat) if self._native.takes(*flat) else None

    def _furthest_apart(self, flat: Flat) -> tuple[str, float]:
        """What is furthest apart between the native call and autograd, and by how much, relatively: the loss, or the gradient of
        a parameter, by the norm. CHOICE where tokens go to other experts, as rounding sends one at times, and the part of all
        choices; NOTHING where there is no label or a gradient is not finite."""
        loss, gradients = self._by_autograd(flat)
        loads = [router.load.clone() for router in self.model.routers()]
        found = {"the loss": torch.tensor(self._native(*flat))}
        found |= {f"the gradient of {name}": p.grad for name, p in self.model.named_parameters()}
        others = sum(int((a - router.load).abs().sum()) for a, router in zip(loads, self.model.routers(), strict=True))
        if others:
            return CHOICE, others / (2 * sum(int(load.sum()) for load in loads))
        size = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        if not 0 < size < math.inf:
            return NOTHING, math.nan
        by = {
            name: float((found[name] - expected).norm() / torch.maximum(expected.norm(), NEGLIGIBLE * size))
            for name, expected in {"the loss": loss, **gradients}.items()
        }
        return max(by.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])

    def _by_autograd(self, flat: Flat) -> tuple[Tensor, dict[str, Tensor]]:
        named = dict(self.model.named_parameters())
        loss = self.model.loss_of(*flat, mtp_loss_weight=0.0)  # `takes` leaves out models with MTP
        gradients = torch.autograd.grad(loss, list(named.values()))
        return loss.detach(), {f"the gradient of {name}": g for name, g in zip(named, gradients, strict=True)}


def first_documents(flat: Flat, tokens: int) -> Flat:
    """The documents that fit in the first `tokens` tokens, or the first one alone."""
    ids, labels, positions, cu_seqlens = flat
    fit = max(int((cu_seqlens <= tokens).sum()), 2)
    end = int(cu_seqlens[fit - 1])
    return ids[:end], labels[:end], positions[:end], cu_seqlens[:fit]
