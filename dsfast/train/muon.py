"""Muon: momentum whose matrices are orthogonalised before they are applied.

Per matrix G [rows, cols], momentum m, rate lr, weight decay w:

    M <- m M + (1 - m) G                    momentum
    U  = m M + (1 - m) G                    Nesterov's look ahead
    O  = NS(U / |U|_F)                      five steps of X <- a X + (b X X^T + c (X X^T)^2) X
    W <- (1 - lr w) W - lr 0.2 sqrt(max(rows, cols)) O

Sources: Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024), with its coefficients a, b, c;
the factor 0.2 sqrt(max(rows, cols)), which gives the update the root mean square of AdamW's, is equation 4 of
"Muon is scalable for LLM training" (arXiv 2502.16982).

Matrices of equal shape (tall ones transposed) are one stack [n, rows, cols]: an iteration is three batched products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
MOMENTUM = 0.95
EPS = 1e-7


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
    """All matrices of one shape, with their momentum and the buffers of the iteration."""

    def __init__(self, matrices: list[Matrix]):
        self.matrices = matrices
        views = [m.stack(m.parameter.detach()) for m in matrices]
        self.parameters = views
        self.sizes = [len(view) for view in views]
        count, (short, long) = sum(self.sizes), views[0].shape[1:]
        self.momentum = views[0].new_zeros(count, short, long)
        self.update, self.other = torch.empty_like(self.momentum), torch.empty_like(self.momentum)
        self.gram, self.poly = (self.momentum.new_empty(count, short, short) for _ in range(2))
        self.rms_scale = 0.2 * math.sqrt(long)

    def momenta(self) -> tuple[Tensor, ...]:
        """Each matrix parameter's slice of the momentum, a view [n, short, long]."""
        return self.momentum.split(self.sizes)

    def step(self, lr: float | Tensor, weight_decay: float, clip_scale: float | Tensor) -> None:
        """One update of every parameter here from its `.grad`; a missing gradient counts as zero.

        A clip_scale that lies on the device and is not finite leaves the momentum as it is; `Muon.step` makes lr 0 then.
        """
        for matrix, part in zip(self.matrices, self.update.split(self.sizes), strict=True):
            grad = matrix.parameter.grad
            part.zero_() if grad is None else part.copy_(matrix.stack(grad.contiguous()))
        if isinstance(clip_scale, Tensor):  # what moves towards itself stays, to the bit
            torch.where(clip_scale.isfinite(), self.update * clip_scale, self.momentum, out=self.update)
        elif clip_scale != 1.0:
            self.update.mul_(clip_scale)
        self.momentum.lerp_(self.update, 1 - MOMENTUM)
        direction = self.orthogonalise(self.update.lerp_(self.momentum, MOMENTUM))
        for parameter, part in zip(self.parameters, direction.split(self.sizes), strict=True):
            if weight_decay:
                parameter.mul_(1 - lr * weight_decay)
            rate = -lr * self.rms_scale
            if isinstance(rate, Tensor):
                parameter.addcmul_(part, rate.to(part.dtype))
            else:
                parameter.add_(part, alpha=rate)

    def orthogonalise(self, x: Tensor) -> Tensor:
        """NS(x / |x|) for every matrix of x [n, short, long], in fp32; x is overwritten."""
        x.div_(x.flatten(1).norm(dim=1).clamp_(min=EPS).view(-1, 1, 1))
        out = self.other
        for _ in range(ITERATIONS):
            torch.bmm(x, x.mT, out=self.gram)
            torch.baddbmm(self.gram, self.gram, self.gram, beta=B, alpha=C, out=self.poly)
            torch.baddbmm(x, self.poly, x, beta=A, out=out)
            x, out = out, x
        return x


class Muon:
    """Muon over `matrices`, at one learning rate."""

    def __init__(self, matrices: list[Matrix], lr: float, weight_decay: float):
        self.lr, self.weight_decay = lr, weight_decay
        by_shape: dict[tuple[int, int], list[Matrix]] = {}
        for matrix in matrices:
            by_shape.setdefault(tuple(sorted(matrix.shape)), []).append(matrix)
        self.stacks = [Stack(group) for group in by_shape.values()]

    @torch.no_grad()
    def step(self, lr_scale: float | Tensor, clip_scale: float | Tensor, update: Tensor | None = None) -> None:
        """As `Optimizer.step`; Muon has no use for the number of the update."""
        lr = self.lr * lr_scale
        if isinstance(lr, Tensor):
            lr = lr * clip_scale.isfinite()
        for stack in self.stacks:
            stack.step(lr, self.weight_decay, clip_scale)

    def tensors(self) -> list[Tensor]:
        """What an update changes beside the parameters, in place."""
        return [stack.momentum for stack in self.stacks]

    def state_dict(self) -> dict[str, Tensor]:
        """`muon.momentum.<name>`, each in its parameter's own shape."""
        state = {}
        for stack in self.stacks:
            for matrix, momentum in zip(stack.matrices, stack.momenta(), strict=True):
                saved = torch.empty_like(matrix.parameter, memory_format=torch.contiguous_format)
                matrix.stack(saved.detach()).copy_(momentum)
                state[f"muon.momentum.{matrix.name}"] = saved.detach()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for stack in self.stacks:
            for matrix, momentum in zip(stack.matrices, stack.momenta(), strict=True):
                momentum.copy_(matrix.stack(state[f"muon.momentum.{matrix.name}"]))
