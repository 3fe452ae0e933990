"""What every part of the model shares: the norms, a module whose buffers stay float32, and which modules are plain."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from dsfast import ops


class Float32Buffers(nn.Module):
    """A module whose float32 buffers stay float32 when the model is cast.

    The router's bias moves in steps of 1e-3 and rotary angles reach max_position_embeddings: bfloat16 holds neither.
    """

    def _apply(self, fn, recurse: bool = True):
        kept = {name: b for name, b in self.named_buffers(recurse=False) if b.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            # Seen as integers the values are moved but not cast: .to(dtype) leaves integer tensors alone.
            setattr(self, name, fn(buffer.view(torch.int32)).view(torch.float32))
        return self


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[N, D] -> [N, D]."""
        return ops.rms_norm(x, self.weight, self.eps)


class StreamNorm(RMSNorm):
    """The norm of the stream, to which it first adds what the layer before has made."""

    def forward(self, x: Tensor, residual: Tensor | None, uses: int = 1) -> tuple[tuple[Tensor, ...], Tensor]:
        """x, residual [N, D] (None counts as 0) -> (norm(x + residual), once for each of its `uses`), x + residual."""
        *y, h = ops.stream_norm(x, self.weight, self.eps, residual, uses)
        return tuple(y), h


_PLAIN = frozenset({RMSNorm, StreamNorm, nn.Linear})


def is_plain(module: nn.Module) -> bool:
    """Whether `module` is a norm or linear layer as the model makes them, which what takes its weight may stand for."""
    return is_unchanged(module, _PLAIN) and not _has_any_global_hook()


def is_unchanged(module: nn.Module, kinds: frozenset[type]) -> bool:
    """Whether `module` is one of `kinds` and does what they do: no forward of its own, no hooks, no bias in a linear layer."""
    m = module  # torch.compile follows this where it would not follow attrgetter or vars
    if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
        return False
    return type(m) in kinds and "forward" not in m.__dict__ and (type(m) is not nn.Linear or m.bias is None)
