"""What every part of the model shares: the norm, and a module whose buffers stay float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """x [N, D] -> [N, D]; with `residual` [N, D]: (norm(x + residual), x + residual)."""
        return ops.rms_norm(x, self.weight, self.eps, residual=residual)

    def of_stream(self, x: Tensor, residual: Tensor | None, uses: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """x, residual [N, D] (None counts as 0) -> (norm(x + residual), once for each of its `uses`), x + residual."""
        *y, h = ops.stream_norm(x, self.weight, self.eps, residual, uses)
        return tuple(y), h
