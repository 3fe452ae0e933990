"""Loss and gradients of a whole model in one C++ call (csrc/train_step.cpp), on the CPU in float32.

Each thread takes a share of the documents through all layers, forward and back, with the same kernels as the operators:
what the backward pass needs stays in the cache, and nothing but the gradients of the weights is added up between threads.
Shapes: N tokens, S documents, L layers, E experts.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise

import torch
from torch import Tensor

from dsfast.model.changed import has_hooks
from dsfast.model.deepseek_v3 import DeepseekV3
from dsfast.model.native_model import FORWARD, NativeModel, runs_natively
from dsfast.ops import native
from dsfast.ops.mla_attention import rises
from dsfast.tokens import IGNORED

OPERATORS = FORWARD - {"mla_decode"} | {"linear_cross_entropy"}
"""Those the call stands for."""
PARTS = (
    "embedding", "rms_norm", "linear", "rope", "mla_attention", "moe_route", "moe_experts", "swiglu_mlp",
    "linear_cross_entropy",
)  # fmt: skip
"""What `thread_seconds` tells apart: the operators, and the linear layers."""
MOST_UNEVEN = 1.5
"""A thread's share of the tokens, times the threads, above which the operators' own division of the work is better."""
_ALIGNMENT = 16  # floats of a cache line


class NativeStep:
    """What stands in for `model.loss(...).backward()` where `takes` says so. Keeps the gradients' memory between calls."""

    def __init__(self, model: DeepseekV3):
        self.model = model
        # [forward or backward, part], of all threads
        self._seconds = torch.zeros(2, len(PARTS), dtype=torch.float64, device="cpu")
        # Walking through the modules takes longer than all else that a step does outside its call.
        self._parameters, self._modules = list(model.parameters()), list(model.modules())
        self._routers = [getattr(layer.mlp, "gate", None) for layer in model.layers]
        sizes = [-(-p.numel() // _ALIGNMENT) * _ALIGNMENT for p in self._parameters]
        self._shared = torch.empty(sum(sizes), dtype=torch.float32, device="cpu")  # whatever torch makes by default
        parts = self._shared.split(sizes)
        self._gradients = [part[: p.numel()].view(p.shape) for p, part in zip(self._parameters, parts, strict=True)]
        of = {id(p): gradient for p, gradient in zip(self._parameters, self._gradients, strict=True)}
        self._gradient_struct = NativeModel(model, lambda tensor: of.get(id(tensor), tensor))
        self._loads = torch.zeros(len(model.layers), model.config.n_routed_experts, dtype=torch.int64, device="cpu")
        self._addresses: list[int] = []

    def takes(self, ids: Tensor, labels: Tensor, positions: Tensor, cu_seqlens: Tensor) -> bool:
        """Whether a batch, flat as `DeepseekV3.flatten` returns it, can be left to the call.

        It can where the operators would run natively, the model is float32 with all its parameters trained, no MTP modules
        and no hooks of parameters, and the documents divide evenly enough among the threads. Input of another dtype or with
        boundaries that do not rise from 0 to N is left to the operators, which say what is wrong.
        """
        if self.model.mtp or not all(p.requires_grad and p.is_contiguous() for p in self._parameters):
            return False
        if any(map(has_hooks, self._parameters)):
            return False
        if any(x.dtype != torch.int64 for x in (ids, labels, positions)) or cu_seqlens.dtype != torch.int32:
            return False
        boundaries = cu_seqlens.tolist()
        if not rises(boundaries, len(ids)):
            return False
        return uneven(boundaries, torch.get_num_threads()) <= MOST_UNEVEN and runs_natively(self.model, OPERATORS)

    def __call__(self, ids: Tensor, labels: Tensor, positions: Tensor, cu_seqlens: Tensor) -> float:
        """Flat tokens as `DeepseekV3.flatten` returns them -> the mean loss; sets every `.grad` and every router's load.

        The gradients are views of memory that the next call overwrites.
        """
        buffers = (x for module in self._modules for x in module._buffers.values())
        addresses = [x.data_ptr() for x in (*self._parameters, *buffers)]
        if addresses != self._addresses:  # first call, or the memory of a weight or buffer was replaced
            self._weights, self._addresses = NativeModel(self.model), addresses
        ids, labels, positions, cu_seqlens = (x.contiguous() for x in (ids, labels, positions, cu_seqlens))
        loss = native.products().train_step(
            self._weights.address, self._gradient_struct.address, self._shared.data_ptr(), len(self._shared),
            ids.data_ptr(), labels.data_ptr(), positions.data_ptr(), cu_seqlens.data_ptr(), len(ids),
            len(cu_seqlens) - 1, IGNORED, self._loads.data_ptr(), self._seconds.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        for router, load in zip(self._routers, self._loads, strict=True):
            if router is not None:
                router.load = load.clone()
        return loss

    def thread_seconds(self) -> dict[str, tuple[float, float]]:
        """Seconds (forward, backward) of each part in the last call, the mean over the threads."""
        shares = (self._seconds / torch.get_num_threads()).T.tolist()
        return {part: (forward, backward) for part, (forward, backward) in zip(PARTS, shares, strict=True)}


def uneven(boundaries: list[int], threads: int) -> float:
    """The largest share of tokens that a thread gets, in units of an even share; documents are not divided."""
    total = boundaries[-1]
    firsts = [boundaries[bisect_left(boundaries, total * t // threads)] for t in range(threads)]
    shares = [end - begin for begin, end in pairwise([*firsts, total])]
    return max(shares) * threads / max(total, 1)
