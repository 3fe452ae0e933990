"""Muon over the matrices of a model, all of them in one call of `ops.muon`, whose module has the maths."""

from __future__ import annotations

import torch
from torch import Tensor

from dsfast import ops

MOMENTUM = 0.95


class Muon:
    """Muon over named `matrices`, at one learning rate.

    parts: matrices that lie above one another in a parameter's next to last dimension, 2 for gate_up_proj (gate, up), else 1.
    dtype: what `ops.newton_schulz` iterates in.
    """

    def __init__(
        self, matrices: dict[str, Tensor], parts: list[int], lr: float, weight_decay: float, dtype: torch.dtype = torch.float32
    ):  # fmt: skip
        self.matrices, self.parts, self.lr, self.weight_decay, self.dtype = matrices, parts, lr, weight_decay, dtype
        self.momentum = {name: torch.zeros_like(p, requires_grad=False) for name, p in matrices.items()}

    def step(self, lr_scale: float | Tensor, clip_scale: float | Tensor, update: Tensor | None = None) -> None:
        """As `Optimizer.step`; a missing gradient counts as zero. Muon has no use for the number of the update."""
        ops.muon(
            [p.detach() for p in self.matrices.values()],
            [p.grad for p in self.matrices.values()],
            list(self.momentum.values()),
            self.parts,
            self.lr,
            self.weight_decay,
            MOMENTUM,
            clip_scale,
            lr_scale,
            self.dtype,
        )

    def tensors(self) -> list[Tensor]:
        """What an update changes beside the parameters, in place."""
        return list(self.momentum.values())

    def state_dict(self) -> dict[str, Tensor]:
        """`muon.momentum.<name>`."""
        return {f"muon.momentum.{name}": tensor for name, tensor in self.momentum.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, momentum in self.momentum.items():
            momentum.copy_(state[f"muon.momentum.{name}"])
