"""Computing in a lower precision than the weights are kept in: float32 masters, everything else in the compute dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsfast.model.deepseek_v3 import DeepseekV3


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
