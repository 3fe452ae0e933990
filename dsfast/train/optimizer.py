"""Which parameter is updated how: groups, schedule, and AdamW and Muon behind one `Optimizer`.

Three groups, told apart by the model's parameter names:

    embedding   vocabulary tables [V, R] or [V, D]   AdamW at embedding_learning_rate (null: learning_rate)
    vectors     norms, and the router [E, D]         AdamW at learning_rate
    matrices    every other matrix                   AdamW at learning_rate, or Muon at muon_learning_rate

Weight decay is decoupled and applies to the matrices alone. The gradients are never rewritten: the clip by their global
norm is a factor that the updates take.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from dsfast import ops
from dsfast.config import TrainConfig
from dsfast.train.muon import Muon

Role = Literal["embedding", "vector", "matrix"]


def role(name: str, parameter: Tensor) -> Role:
    """The group of a parameter."""
    if parameter.ndim < 2 or name.endswith(".gate.weight"):
        return "vector"
    if name in ("embed_tokens.weight", "lm_head.weight"):
        return "embedding"
    return "matrix"


def learning_rate_scale(step: int, train: TrainConfig) -> float:
    """The factor on every learning rate at `step` (from 0).

    It rises linearly to 1 over `warmup_steps`, is 1 at the first step after them, and would reach `final_lr_ratio` at
    step `train.steps`, the first that is not taken: no step is spent at a rate of zero. Later steps stay there.
    """
    if step < train.warmup_steps:
        return (step + 1) / (train.warmup_steps + 1)
    done = min(1.0, (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps))
    fall = {"linear": done, "cosine": (1 - math.cos(math.pi * done)) / 2, "constant": 0.0}[train.decay]
    return 1 - (1 - train.final_lr_ratio) * fall


class AdamW:
    """AdamW (arXiv 1711.05101) over named parameters, all of them in one call of `ops.adamw`."""

    def __init__(self, parameters: dict[str, Tensor], lrs: list[float], weight_decays: list[float], train: TrainConfig):
        self.parameters, self.lrs, self.weight_decays = parameters, lrs, weight_decays
        self.beta1, self.beta2, self.eps = train.beta1, train.beta2, train.eps
        self.exp_avg = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
        self.updates = 0

    def step(self, lr_scale: float | Tensor, clip_scale: float | Tensor, update: Tensor | None = None) -> None:
        """One update of the parameters that have a gradient; see `Optimizer.step`."""
        if update is None:
            self.updates += 1
        rows = zip(self.parameters.items(), self.lrs, self.weight_decays, strict=True)
        chosen = [(name, p, lr, decay) for (name, p), lr, decay in rows if p.grad is not None]
        if not chosen:
            return
        names, parameters, lrs, decays = (list(column) for column in zip(*chosen, strict=True))
        ops.adamw(
            [p.detach() for p in parameters],
            [p.grad for p in parameters],
            [self.exp_avg[name] for name in names],
            [self.exp_avg_sq[name] for name in names],
            lrs,
            decays,
            self.beta1,
            self.beta2,
            self.eps,
            self.updates if update is None else update,
            clip_scale,
            lr_scale,
        )

    def tensors(self) -> list[Tensor]:
        """What an update changes beside the parameters, in place."""
        return [*self.exp_avg.values(), *self.exp_avg_sq.values()]

    def state_dict(self) -> dict[str, Tensor]:
        """`adamw.exp_avg.<name>`, `adamw.exp_avg_sq.<name>` and `adamw.updates`, an int64 scalar."""
        state = {f"adamw.exp_avg.{name}": tensor for name, tensor in self.exp_avg.items()}
        state |= {f"adamw.exp_avg_sq.{name}": tensor for name, tensor in self.exp_avg_sq.items()}
        return state | {"adamw.updates": torch.tensor(self.updates)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name in self.parameters:
            self.exp_avg[name].copy_(state[f"adamw.exp_avg.{name}"])
            self.exp_avg_sq[name].copy_(state[f"adamw.exp_avg_sq.{name}"])
        self.updates = int(state["adamw.updates"])


class Optimizer:
    """What `build_optimizer` returns: AdamW and, for the matrices of a "muon" run, Muon."""

    def __init__(self, adamw: AdamW, muon: Muon | None):
        self.adamw = adamw
        self.parts = [adamw] if muon is None else [adamw, muon]

    def step(self, lr_scale: float | Tensor, clip_scale: float | Tensor = 1.0, update: Tensor | None = None) -> None:
        """Update every parameter from its `.grad`, the rates multiplied by lr_scale, the gradients by clip_scale.

        Where all three are tensors on the parameters' device (lr_scale float64 [], clip_scale float32 [], update int64 []), the
        host does not wait for it, and a clip_scale that is not finite changes nothing. `update` is then the number of this
        update, from 1, and `updates` is the caller's to set.
        """
        for part in self.parts:
            part.step(lr_scale, clip_scale, update)

    @property
    def updates(self) -> int:
        """How many updates were made."""
        return self.adamw.updates

    @updates.setter
    def updates(self, number: int) -> None:
        self.adamw.updates = number

    def tensors(self) -> list[Tensor]:
        """What an update changes beside the parameters, in place."""
        return [tensor for part in self.parts for tensor in part.tensors()]

    def state_dict(self) -> dict[str, Tensor]:
        """A flat dictionary name -> tensor, as safetensors stores it."""
        return {name: tensor for part in self.parts for name, tensor in part.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """`state` has the names and shapes of `state_dict()`; values are copied."""
        for part in self.parts:
            part.load_state_dict(state)


def build_optimizer(model: nn.Module, train: TrainConfig, dtype: torch.dtype = torch.float32) -> Optimizer:
    """The optimizer of `model` as the config asks for it. Move the model to its device before, not after.

    dtype: what Muon's orthogonalisation computes in; all else is in the parameters' own.
    """
    named = dict(model.named_parameters())
    muon = None
    if train.optimizer == "muon":
        names = [name for name, parameter in named.items() if role(name, parameter) == "matrix"]
        parts = [2 if name.endswith("gate_up_proj") else 1 for name in names]
        matrices = {name: named.pop(name) for name in names}
        muon = Muon(matrices, parts, train.muon_learning_rate, train.weight_decay, dtype)
    roles = [role(name, parameter) for name, parameter in named.items()]
    embedding_lr = train.embedding_learning_rate or train.learning_rate
    lrs = [embedding_lr if kind == "embedding" else train.learning_rate for kind in roles]
    decays = [train.weight_decay if kind == "matrix" else 0.0 for kind in roles]
    return Optimizer(AdamW(named, lrs, decays, train), muon)
