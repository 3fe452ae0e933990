"""A training step as a function of device memory alone: what a CUDA graph can record once and replay.

Nothing in it waits for the host, no shape depends on data, and whatever a step reads of an earlier one, or leaves to a
later one, stands at an address that does not change. The batch is chosen by a counter that the step itself moves on.

P places of batches, N tokens of a batch, S segments at most, L routers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dsfast import ops
from dsfast.config import TrainConfig
from dsfast.data import Batch
from dsfast.model import DeepseekV3, FixedWeights, copy_all
from dsfast.train.optimizer import Optimizer


class Measured(NamedTuple):
    """What the step at one place left behind; `loads` [L, E] int64, tokens per expert of each router."""

    loss: float
    grad_norm: float
    lr_scale: float
    skipped: bool
    loads: Tensor


def read(numbers: Tensor, loads: Tensor) -> list[Measured]:
    """The rows of what a `DeviceStep` has `sent`, one for each step."""
    return [Measured(*row[:3], row[3] == 0, load) for row, load in zip(numbers.tolist(), loads, strict=True)]


class Batches:
    """`places` batches in device memory, one int64 row each: ids, labels, positions [N], then cu_seqlens [S + 1], int32 by twos,
    then the learning rate's scale, a float64.

    Those with fewer segments end in empty ones, boundaries N, so that all have one shape.
    """

    def __init__(self, places: int, tokens: int, segments: int, device: torch.device):
        self.tokens, self.segments = tokens, segments
        self.rows = torch.zeros(places, row_elements(tokens, segments), dtype=torch.int64, device=device)

    def load(self, batches: Sequence[tuple[Tensor, ...]], scales: Sequence[float]) -> None:
        """Put them in the first places, each with its scale; each flat, as `DeepseekV3.flatten` returns it, on the CPU."""
        rows = torch.empty(len(batches), self.rows.size(1), dtype=torch.int64)
        for row, (*parts, cu_seqlens) in zip(rows, batches, strict=True):
            row[: 3 * self.tokens] = torch.cat([part.long() for part in parts])
            boundaries = row[3 * self.tokens : -1].view(torch.int32).fill_(self.tokens)
            boundaries[: len(cu_seqlens)] = cu_seqlens
        rows[:, -1] = torch.tensor(scales, dtype=torch.float64).view(torch.int64)
        self.rows[: len(batches)].copy_(rows)

    def at(self, place: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """(ids, labels, positions [N] int64, cu_seqlens [S + 1] int32) of the batch at place [1] int64, and its scale []."""
        row = self.rows.index_select(0, place).squeeze(0)
        ids, labels, positions, boundaries, scale = row.tensor_split([*(n * self.tokens for n in (1, 2, 3)), -1])
        batch = ids, labels, positions, boundaries.view(torch.int32)[: self.segments + 1]
        return batch, scale.view(torch.float64).squeeze(0)


def row_elements(tokens: int, segments: int) -> int:
    """int64 elements that a batch takes."""
    boundaries = segments // 2 + 1
    return 3 * tokens + boundaries + 1


class DeviceStep:
    """The training step of `model`: each call takes the batch at the next place of those loaded.

    Forward and backward in `dtype`, clip, update, router bias; where loss or gradients are not finite nothing is updated,
    as in `Trainer.train_batch`. The model lies on its device already; call within `Trainer.kernels()`.
    """

    name = "train_step"

    def __init__(
        self, model: DeepseekV3, optimizer: Optimizer, train: TrainConfig, dtype: torch.dtype, batches: Batches
    ):
        self.model, self.optimizer, self.train, self.batches = model, optimizer, train, batches
        self.weights, self.routers = FixedWeights(model, dtype), model.routers()
        self.parameters = self.weights.parameters
        places, device = len(batches.rows), batches.rows.device
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        self.update = torch.ones((), dtype=torch.int64, device=device)
        """The number of the next one, from 1."""
        self.measured = torch.zeros(places, 4, dtype=torch.float64, device=device)
        experts = max((len(router.load) for router in self.routers), default=0)
        self.loads = torch.zeros(places, len(self.routers), experts, dtype=torch.int64, device=device)
        self.consecutive = 0
        """Batches that are loaded, of which each call takes one."""
        self.gradients: list[Tensor] = []
        """At fixed addresses from the first call on, of the parameters that have one."""

    def load(self, batches: Sequence[Batch], scales: Sequence[float], updates: int) -> None:
        """What the next len(batches) calls take, from place 0 on: batches, learning rate scales; updates made so far.

        Raises UserError for ids, labels or positions out of range: here they lie on the CPU and can be looked at.
        """
        flat = [self.model.flatten(b.input_ids, b.labels, b.positions, b.cu_seqlens) for b in batches]
        self.batches.load(flat, scales)
        self.consecutive = len(batches)
        self.place.zero_()
        self.update.fill_(updates + 1)

    def __call__(self) -> None:
        """One step; returns before the device has done it."""
        batch, lr_scale = self.batches.at(self.place)
        loss = self._gradients(batch)
        with torch.no_grad():
            norm, clip_scale = ops.grad_clip(self.gradients, self.train.grad_clip, loss)
            loads = self.model.update_router_bias(self.train.bias_update_speed, clip_scale)
            self.optimizer.step(lr_scale, clip_scale, self.update)
            kept = (self.place, self.update, self.measured, self.loads)
            ops.record_step(*kept, loss, norm, lr_scale, clip_scale, loads)

    def sent(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """What the steps at places begin .. end - 1 measure, on its way to the host; `read` takes it once the device is there.

        Later steps may be launched, and other batches loaded, in between.
        """
        return tuple(x[begin:end].to("cpu", non_blocking=True, copy=True) for x in (self.measured, self.loads))

    def state(self) -> list[Tensor]:
        """Every tensor that a call changes for later ones to see; the gradients, which each call makes anew, left out."""
        own = [self.place, self.update, self.measured, self.loads]
        biases = [router.e_score_correction_bias for router in self.routers]
        return [*(p.detach() for p in self.parameters), *self.optimizer.tensors(), *biases, *own]

    def _gradients(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Set every `.grad`, in place after the first call; the loss, without dimension."""
        loss, gradients = self.weights.loss_and_gradients(batch, self.train.mtp_loss_weight)
        pairs = [(p, g) for p, g in zip(self.parameters, gradients, strict=True) if g is not None]
        if not self.gradients:  # which parameters have one follows from the model, not from the batch
            self.gradients = [torch.empty_like(p, requires_grad=False) for p, _ in pairs]
        for parameter in self.parameters:
            parameter.grad = None
        for (parameter, _), kept in zip(pairs, self.gradients, strict=True):
            parameter.grad = kept
        copy_all(self.gradients, [gradient for _, gradient in pairs])
        return loss
