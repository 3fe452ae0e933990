"""Computing in a lower precision than the weights are kept in: float32 masters, all else as `precision_of` says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dsfast.config import RuntimeConfig
from dsfast.model.deepseek_v3 import DeepseekV3
from dsfast.ops import native
from dsfast.ops.triton import OLDEST_CHIP

PIECE = 2**14
"""Elements of a tensor that `copy_all` takes as one: of 2^16, as PyTorch does it, few multiprocessors have any (8.2 us for the
weights of the 500K model on an H200)."""


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
        fast = gpu_has_bfloat16() if gpu else native.fast_bfloat16() and any_native_products(runtime)
        name = "bfloat16" if fast else "float32"
    dtype = getattr(torch, name)
    return Precision(dtype, torch.float32) if gpu else Precision(torch.float32, dtype)


def any_native_products(runtime: RuntimeConfig) -> bool:
    """Whether runtime.kernels leaves C++ kernels whose products could be of bfloat16."""
    chosen = (runtime.kernels.get(name, runtime.kernels.get("default", "auto")) for name in native.OF_PRODUCTS)
    return any(name != "reference" for name in chosen)


def gpu_has_bfloat16() -> bool:
    """Whether the GPU multiplies bfloat16 (compute capability 8.0 and newer); True where there is none to ask."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= OLDEST_CHIP


class _Loss(nn.Module):
    """`DeepseekV3.loss_of` as a module's forward, which is what functional_call calls."""

    def __init__(self, model: DeepseekV3):
        super().__init__()
        self.model = model

    def forward(self, *arguments) -> Tensor:
        return self.model.loss_of(*arguments)


def loss_in(
    dtype: torch.dtype, model: DeepseekV3, mtp_loss_weight: float, input_ids: Tensor, labels: Tensor,
    positions: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`model.loss` with the parameters cast to `dtype`; their gradients keep their own dtype."""
    if all(p.dtype == dtype for p in model.parameters()):
        return model.loss(input_ids, labels, positions, cu_seqlens, mtp_loss_weight)
    cast = {f"model.{name}": parameter.to(dtype) for name, parameter in model.named_parameters()}
    flat = model.flatten(input_ids, labels, positions, cu_seqlens)
    return torch.func.functional_call(_Loss(model), cast, (*flat, mtp_loss_weight))


def copy_all(copies: Sequence[Tensor], originals: Sequence[Tensor]) -> None:
    """Fill each of `copies` with its original, cast, in one launch for up to 64 PIECEs."""
    pairs = [pair for copy, original in zip(copies, originals, strict=True) for pair in _in_pieces(copy, original)]
    torch._foreach_copy_(*([pair[side] for pair in pairs] for side in (0, 1)))


def _in_pieces(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    if not all(x.is_contiguous() for x in tensors):
        return [tensors]
    return list(zip(*(x.detach().view(-1).split(PIECE) for x in tensors), strict=True))


class _Begin(torch.autograd.Function):
    """Where a backward pass begins: `gradient` is that of `loss`, and lies on its device.

    torch.autograd.grad makes the gradient of what this returns, on the CPU, where it is no launch; one that it is given has it
    import sympy, which takes a third of a second.
    """

    @staticmethod
    def forward(ctx, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return loss.new_empty((), device="cpu")

    @staticmethod
    def backward(ctx, _) -> tuple[Tensor, None]:
        return ctx.gradient, None


class FixedWeights:
    """The loss of flat tokens with the parameters cast to `dtype` in copies that keep their addresses.

    The same numbers as `loss_in`, whose casts are a new tensor for each parameter: here one launch casts all of them, and
    one their gradients back. In the parameters' own dtype there are no copies.
    """

    def __init__(self, model: DeepseekV3, dtype: torch.dtype):
        named = dict(model.named_parameters())
        self.model, self.parameters = model, list(named.values())
        self._one = torch.ones((), dtype=torch.promote_types(dtype, torch.float32), device=self.parameters[0].device)
        self.cast = None
        if any(p.dtype != dtype for p in self.parameters):
            copies = {
                f"model.{name}": torch.empty_like(p, dtype=dtype, requires_grad=True) for name, p in named.items()
            }
            self.cast, self._loss = copies, _Loss(model)

    def loss_and_gradients(
        self, flat: tuple[Tensor, ...], mtp_loss_weight: float
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """flat: as `DeepseekV3.flatten` returns it. The gradients, in `dtype`, follow `model.parameters()`."""
        if self.cast is None:
            loss, weights = self.model.loss_of(*flat, mtp_loss_weight), self.parameters
        else:
            weights = list(self.cast.values())
            with torch.no_grad():
                copy_all(weights, self.parameters)
            loss = torch.func.functional_call(self._loss, self.cast, (*flat, mtp_loss_weight))
        return loss.detach(), torch.autograd.grad(_Begin.apply(loss, self._one), weights, allow_unused=True)
