"""The specification's four propagation checks: forward pass, finite loss, parameter count, gradient flow. And whether the calls
that stand for a whole model give what its operators give."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dsfast.data import Batch
from dsfast.evaluate.one_call import OneCall
from dsfast.model import DeepseekV3, loss_in
from dsfast.suite.verdict import GRADIENT_SHARE_MIN, PARAMETERS_MAX, PARAMETERS_MIN

PROBE_ROWS = 2  # rows of the batch whose logits are written out: [2, 256, 8000] are 16 MB


@dataclass(frozen=True)
class PropagationCheck:
    """One check. `debug`: what helps when it fails."""

    name: str
    passed: bool
    expected: str
    actual: str
    debug: str


def check_propagation(
    model: DeepseekV3, batch: Batch, dtype: torch.dtype, mtp_loss_weight: float
) -> list[PropagationCheck]:
    """The checks on `batch`, the loss computed in `dtype`, in the specification's order. Leaves the model's gradients cleared."""
    device = next(model.parameters()).device
    inputs = [x.to(device) for x in (batch.input_ids, batch.labels, batch.positions, batch.cu_seqlens)]
    forward = check_forward(model, inputs[0][:PROBE_ROWS])
    model.zero_grad(set_to_none=True)
    loss = loss_in(dtype, model, mtp_loss_weight, *inputs)
    loss.backward()
    checks = [forward, check_loss(loss.item()), check_parameters(model), check_gradients(model)]
    model.zero_grad(set_to_none=True)
    return checks


@torch.no_grad()
def check_forward(model: DeepseekV3, input_ids: Tensor) -> PropagationCheck:
    """Logits of the right shape, every one finite."""
    logits = model(input_ids)
    expected = [*input_ids.shape, model.config.vocab_size]
    bad = int((~logits.isfinite()).sum())
    passed = list(logits.shape) == expected and bad == 0
    actual = f"logits {list(logits.shape)}, {bad} of them not finite"
    return PropagationCheck(
        "forward pass", passed, f"finite logits {expected}", actual, f"input_ids {list(input_ids.shape)}"
    )


def check_call(one: OneCall) -> PropagationCheck:
    """The call beside dsfast/model, operator by operator."""
    return PropagationCheck(
        f"{one.call} in one call", one.passed, f"within {one.allowed:.0e} of the operators'", f"{one.what}: {one.apart:.1e}",
        f"csrc/{one.call}.cpp, or dsfast/model",
    )  # fmt: skip


def check_loss(loss: float) -> PropagationCheck:
    return PropagationCheck(
        "loss finite", math.isfinite(loss), "a finite number", f"{loss:.4f}", "mean cross-entropy, nats"
    )


def check_parameters(model: DeepseekV3) -> PropagationCheck:
    """The true total, embedding included."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total = sum(sizes.values())
    largest = ", ".join(f"{name} {sizes[name]:,}" for name in sorted(sizes, key=sizes.get, reverse=True)[:3])
    expected = f"{PARAMETERS_MIN:,} to {PARAMETERS_MAX:,}"
    passed = PARAMETERS_MIN <= total <= PARAMETERS_MAX
    return PropagationCheck("parameter count", passed, expected, f"{total:,}", f"largest: {largest}")


def check_gradients(model: DeepseekV3) -> PropagationCheck:
    """The share of tensors whose gradient exists, is finite everywhere and is not zero everywhere."""
    without = [name for name, parameter in model.named_parameters() if not has_gradient(parameter)]
    tensors = sum(1 for _ in model.parameters())
    share = 1 - len(without) / tensors
    return PropagationCheck(
        "gradient flow",
        share >= GRADIENT_SHARE_MIN,
        f"a gradient in at least {GRADIENT_SHARE_MIN:.0%} of the tensors",
        f"{tensors - len(without)} of {tensors} tensors ({share:.1%}); without: {', '.join(without) or 'none'}",
        "without: no gradient, one that is not finite throughout, or one that is zero throughout",
    )


def has_gradient(parameter: Tensor) -> bool:
    gradient = parameter.grad
    return gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.any())
