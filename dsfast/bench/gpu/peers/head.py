"""Peers of the head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.nn import functional

from dsfast import ops
from dsfast.bench.gpu.peers.peer import GpuPeer, Prepared, compiled_by, direct, no_liger, plain, with_maximum
from dsfast.bench.peers import operators as eager

CHUNK = 1024
"""Rows whose logits exist at a time."""


def chunked_head(part: Callable, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """`part(hidden, weight, labels)`, a sum of losses, chunk by chunk, recomputed for the backward pass."""
    total = hidden.new_zeros((), dtype=torch.float32)
    for rows, wanted in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True):
        total = total + torch.utils.checkpoint.checkpoint(part, rows, weight, wanted, use_reentrant=False)
    return total / (labels != -100).sum()


def summed_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(hidden, weight).float(), labels, reduction="sum")


def _compiled_chunks(arguments: list, differentiable: Sequence[int]) -> Prepared:
    return direct(partial(chunked_head, torch.compile(summed_loss)), arguments, differentiable)


def _liger_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, labels)


def _raw(arguments: list) -> bool:
    from dsfast.triton_kernels import launch, linear_cross_entropy

    hidden, weight = arguments[:2]
    narrow = linear_cross_entropy.narrow(weight.size(1), hidden.dtype)
    return narrow and linear_cross_entropy.takes_raw(hidden.dtype, launch.large_tiles(hidden.device))


PEERS: dict[str, dict[str, GpuPeer]] = {
    "head": {
        "eager chunked": plain(f"cross_entropy, {CHUNK} rows at a time", partial(chunked_head, summed_loss)),
        "compile chunked": compiled_by("torch.compile of a chunk", _compiled_chunks),
        "liger": plain("LigerFusedLinearCrossEntropyLoss()", _liger_head, no_liger),
        "with a maximum": with_maximum("linear_cross_entropy", _raw, ops.linear_cross_entropy),
        "eager": plain("all logits at once", eager.linear_cross_entropy),
    },
}
