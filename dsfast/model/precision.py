"""Computing in a lower precision than the weights are kept in: float32 masters, all else as `precision_of` says."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dsfast.config import RuntimeConfig
from dsfast.model.deepseek_v3 import DeepseekV3
from dsfast.ops import native


class Precision(NamedTuple):
    """What activations are kept in, and what the matrix products of the CPU's kernels multiply."""

    tensors: torch.dtype
    products: torch.dtype


def precision_of(runtime: RuntimeConfig) -> Precision:
    """bfloat16 on a GPU casts weights and activations; on a CPU the kernels round what they multiply, and nothing else.

    "auto" is bfloat16 where that is faster: on a GPU, and on a CPU where `native.fast_bfloat16` says so.
    """
    gpu = runtime.device == "cuda"
    name = runtime.dtype
    if name == "auto":
        name = "bfloat16" if gpu or native.fast_bfloat16() else "float32"
    dtype = getattr(torch, name)
    return Precision(dtype, torch.float32) if gpu else Precision(torch.float32, dtype)


class _Loss(nn.Module):
    """`DeepseekV3.loss` as a module's forward, which is what functional_call calls."""

    def __init__(self, model: DeepseekV3):
        super().__init__()
        self.model = model

    def forward(self, *arguments, **options) -> Tensor:
        return self.model.loss(*arguments, **options)


def loss_in(dtype: torch.dtype, model: DeepseekV3, *arguments, **options) -> Tensor:
    """`model.loss(*arguments, **options)` with the parameters cast to `dtype`; their gradients keep their own dtype."""
    if all(p.dtype == dtype for p in model.parameters()):
        return model.loss(*arguments, **options)
    cast = {f"model.{name}": parameter.to(dtype) for name, parameter in model.named_parameters()}
    return torch.func.functional_call(_Loss(model), cast, arguments, options)
