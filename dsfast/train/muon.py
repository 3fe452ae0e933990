"""Muon: momentum whose matrices are orthogonalised before they are applied.

Per matrix G [rows, cols], momentum m, rate lr, weight decay w:

    M <- m M + (1 - m) G                    momentum
    U  = m M + (1 - m) G                    Nesterov's look ahead
    O  = NS(U)                              orthogonalised: `ops.newton_schulz`
    W <- (1 - lr w) W - lr 0.2 sqrt(max(rows, cols)) O

Sources: Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024); the factor 0.2 sqrt(max(rows, cols)),
which gives the update the root mean square of AdamW's, is equation 4 of "Muon is scalable for LLM training" (arXiv 2502.16982).

Matrices of equal shape (tall ones transposed) are one stack [n, rows, cols], and one call orthogonalises all stacks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dsfast import ops

MOMENTUM = 0.95


@dataclass(frozen=True)
class Matrix:
    """A parameter of at least two dimensions; it is read as `[n, rows, cols]`.

    `parts` matrices lie above one another in the next to last dimension: 2 for gate_up_proj (gate, up), else 1.
    """

    name: str
    parameter: Tensor
    parts: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.parameter.shape[-2:]
        return rows // self.parts, cols

    def stack(self, tensor: Tensor) -> Tensor:
        """`tensor`, of the parameter's shape, as a view [n, short side, long side]."""
        rows, cols = self.shape
        view = tensor.view(-1, rows, cols)
        return view.transpose(1, 2) if rows > cols else view


class Stack:
    """All matrices of one shape: `shape` is (n, short side, long side)."""

    def __init__(self, matrices: list[Matrix]):
        self.matrices = matrices
        self.parameters = [m.stack(m.parameter.detach()) for m in matrices]
        self.sizes = [len(view) for view in self.parameters]
        self.shape = (sum(self.sizes), *self.parameters[0].shape[1:])
        self.rms_scale = 0.2 * math.sqrt(self.shape[2])

    def split(self, part: Tensor) -> tuple[Tensor, ...]:
        """This stack's `part` of a flat tensor: each parameter's own, a view [n, short, long]."""
        return part.view(self.shape).split(self.sizes)

    def gather(self, part: Tensor) -> None:
        """Fill `part` with the gradients; a missing one counts as zero."""
        for matrix, own in zip(self.matrices, self.split(part), strict=True):
            grad = matrix.parameter.grad
            own.zero_() if grad is None else own.copy_(matrix.stack(grad.contiguous()))

    def apply(self, direction: Tensor, lr: float | Tensor, weight_decay: float) -> None:
        """Update every parameter here along its part of `direction`."""
        for parameter, own in zip(self.parameters, self.split(direction), strict=True):
            if weight_decay:
                parameter.mul_(1 - lr * weight_decay)
            rate = -lr * self.rms_scale
            if isinstance(rate, Tensor):
                parameter.addcmul_(own, rate.to(parameter.dtype))
            else:
                parameter.add_(own, alpha=rate)


class Muon:
    """Muon over `matrices`, at one learning rate; `dtype` is what `ops.newton_schulz` iterates in.

    Momentum and update of all stacks, the most costly first, lie one after the other in one flat tensor each.
    """

    def __init__(self, matrices: list[Matrix], lr: float, weight_decay: float, dtype: torch.dtype = torch.float32):
        self.lr, self.weight_decay, self.dtype = lr, weight_decay, dtype
        by_shape: dict[tuple[int, int], list[Matrix]] = {}
        for matrix in matrices:
            by_shape.setdefault(tuple(sorted(matrix.shape)), []).append(matrix)
        costs = {(short, long): short * short * (2 * long + short) for short, long in by_shape}
        self.stacks = [Stack(by_shape[shape]) for shape in sorted(by_shape, key=costs.get, reverse=True)]
        self.sizes = [math.prod(stack.shape) for stack in self.stacks]
        self.momentum = matrices[0].parameter.detach().new_zeros(sum(self.sizes))
        self.update = torch.empty_like(self.momentum)

    def parts(self, flat: Tensor) -> Iterator[tuple[Stack, Tensor]]:
        """Each stack with its part of `flat`, which is laid out as `momentum`."""
        return zip(self.stacks, flat.split(self.sizes), strict=True)

    @torch.no_grad()
    def step(self, lr_scale: float | Tensor, clip_scale: float | Tensor, update: Tensor | None = None) -> None:
        """As `Optimizer.step`; Muon has no use for the number of the update."""
        lr = self.lr * lr_scale
        for stack, part in self.parts(self.update):
            stack.gather(part)
        if isinstance(clip_scale, Tensor):
            # Where it is not finite what moves towards itself stays, to the bit, and so do the parameters.
            lr = lr * clip_scale.isfinite()
            torch.where(clip_scale.isfinite(), self.update * clip_scale, self.momentum, out=self.update)
        elif clip_scale != 1.0:
            self.update.mul_(clip_scale)
        self.momentum.lerp_(self.update, 1 - MOMENTUM)
        self.update.lerp_(self.momentum, MOMENTUM)
        direction = ops.newton_schulz(self.update.to(self.dtype), [stack.shape for stack in self.stacks])
        for stack, part in self.parts(direction):
            stack.apply(part, lr, self.weight_decay)

    def tensors(self) -> list[Tensor]:
        """What an update changes beside the parameters, in place."""
        return [self.momentum]

    def state_dict(self) -> dict[str, Tensor]:
        """`muon.momentum.<name>`, each in its parameter's own shape."""
        state = {}
        for stack, part in self.parts(self.momentum):
            for matrix, momentum in zip(stack.matrices, stack.split(part), strict=True):
                saved = torch.empty_like(matrix.parameter, memory_format=torch.contiguous_format)
                matrix.stack(saved.detach()).copy_(momentum)
                state[f"muon.momentum.{matrix.name}"] = saved.detach()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for stack, part in self.parts(self.momentum):
            for matrix, momentum in zip(stack.matrices, stack.split(part), strict=True):
                momentum.copy_(matrix.stack(state[f"muon.momentum.{matrix.name}"]))
