"""Computing in bfloat16 with float32 weights: what a GPU run does, checked on the CPU in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from tiny_models import next_tokens, random_ids, random_model

from dsfast import ops
from dsfast.model import loss_in

FALLBACK = "ignore:.*runs in plain PyTorch"  # the C++ kernels compute in float32


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.filterwarnings(FALLBACK)
def test_bfloat16_gives_float32_gradients_close_to_those_of_float32():
    model = random_model(n_routed_experts=2)  # both are chosen: a near tie cannot fall differently in bfloat16
    ids = random_ids(model, 2, 16)
    labels = next_tokens(ids)
    exact_loss = model.loss(ids, labels)
    exact = gradients(model, exact_loss)
    loss = loss_in(torch.bfloat16, model, 0.3, ids, labels)
    rough = gradients(model, loss)
    assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-2)
    assert loss.item() != exact_loss.item(), "it did compute in bfloat16"
    for name, gradient in rough.items():
        assert gradient.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), exact[name].flatten(), dim=0) > 0.99, name


def test_float32_is_the_plain_loss():
    model = random_model()
    ids = random_ids(model, 2, 16)
    with ops.use("reference"):
        assert torch.equal(loss_in(torch.float32, model, 0.3, ids, next_tokens(ids)), model.loss(ids, next_tokens(ids)))
