"""What dsfast's training step is timed against: name -> how to build it, and what it is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dsfast.bench.peers import huggingface
from dsfast.bench.peers.eager import EagerDeepseekV3, MoE
from dsfast.config import ModelConfig, TrainConfig
from dsfast.model import DeepseekV3, why_not_exported

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """`build(model)` copies the weights of a dsfast model: (module, its loss(input_ids, labels)).

    what: the line in the table. missing(): why it cannot run here, "" if it can; refuses(config): why no model of `config` can
    be built.
    tolerance: of its first loss against dsfast's, relative.
    """

    what: str
    build: Callable[[DeepseekV3], tuple[nn.Module, Loss]]
    _: KW_ONLY
    missing: Callable[[], str] = lambda: ""
    refuses: Callable[[ModelConfig], str] = lambda config: ""
    tolerance: float = 1e-4

    def unavailable(self, config: ModelConfig) -> str:
        """Why it cannot run here, or has no model of `config`; "" if it can."""
        return self.missing() or self.refuses(config)


class PeerTraining:
    """A training step as PyTorch users write it, with AdamW and clipping as `train` says."""

    def __init__(self, peer: Peer, model: DeepseekV3, train: TrainConfig):
        module, self.loss = peer.build(model)
        self.parameters = list(module.train().parameters())
        self.grad_clip = train.grad_clip
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=train.learning_rate, betas=(train.beta1, train.beta2), eps=train.eps,
            weight_decay=train.weight_decay, fused=True,
        )  # fmt: skip

    def step(self, input_ids: Tensor, labels: Tensor) -> float:
        """Forward, backward, clip, update; returns the loss before the update."""
        self.optimizer.zero_grad()
        loss = self.loss(input_ids, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.grad_clip)
        self.optimizer.step()
        return loss.item()


FEW_EXPERTS = 4
"""Up to so many each works on all tokens in the module on a GPU."""


def _module(model: DeepseekV3, static: bool = False) -> EagerDeepseekV3:
    module = EagerDeepseekV3(model).to(_device(model))
    for layer in module.modules():
        if isinstance(layer, MoE):
            layer.static = static
    return module


def _device(model: DeepseekV3) -> torch.device:
    return model.embed_tokens.weight.device


def _eager(model: DeepseekV3) -> tuple[nn.Module, Loss]:
    module = _module(model)
    return module, module.loss


def _compiled(model: DeepseekV3) -> tuple[nn.Module, Loss]:
    module = _module(model)
    return module, torch.compile(module.loss)


def _autocast(model: DeepseekV3, mode: str | None = None) -> tuple[nn.Module, Loss]:
    """mode: of torch.compile; None is eager."""
    few = model.config.n_routed_experts <= FEW_EXPERTS
    module = _module(model, static=few and _device(model).type == "cuda")
    loss = torch.compile(module.loss, mode=mode) if mode else module.loss
    return module, torch.autocast(_device(model).type, torch.bfloat16)(loss)


def _transformers(model: DeepseekV3) -> tuple[nn.Module, Loss]:
    module = huggingface.from_dsfast(model).to(_device(model))

    def loss(input_ids: Tensor, labels: Tensor) -> Tensor:
        return module(input_ids, labels=labels, shift_labels=labels, use_cache=False).loss

    return module, loss


def _transformers_autocast(model: DeepseekV3) -> tuple[nn.Module, Loss]:
    module, loss = _transformers(model)
    return module, torch.autocast(_device(model).type, torch.bfloat16)(loss)


def _no_compiler() -> str:
    found = any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++"))
    return "" if found else "torch.compile needs a C++ compiler; install g++ or clang++, or set CXX"


ROUGH = 1e-2
"""How far apart, relatively, two losses may be where one is computed in bfloat16."""

_FROM_TRANSFORMERS = {"missing": huggingface.missing, "refuses": why_not_exported}

PEERS = {
    "eager": Peer("PyTorch module, float32", _eager),
    "compile": Peer("torch.compile of it, float32", _compiled, missing=_no_compiler),
    "autocast": Peer("the module under bfloat16 autocast", _autocast, tolerance=ROUGH),
    "transformers": Peer("transformers DeepseekV3, full embedding, float32", _transformers, **_FROM_TRANSFORMERS),
}

GPU_PEERS = {
    "eager": Peer("PyTorch module, bfloat16 autocast", _autocast, tolerance=ROUGH),
    "reduce-overhead": Peer(
        "torch.compile of it with CUDA graphs", partial(_autocast, mode="reduce-overhead"), missing=_no_compiler,
        tolerance=ROUGH,
    ),
    "compile": Peer("torch.compile of it", partial(_autocast, mode="default"), missing=_no_compiler, tolerance=ROUGH),
    "transformers": Peer(
        "transformers DeepseekV3, full embedding, bfloat16 autocast", _transformers_autocast, **_FROM_TRANSFORMERS,
        tolerance=ROUGH,
    ),
}  # fmt: skip
"""Those of `bench gpu`, in the precision that dsfast has there."""
