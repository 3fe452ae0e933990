"""DeepSeek-V3 (arXiv 2412.19437, section 2) on flat tokens.

Shapes: B rows, T tokens per row, N = B T, D model width, R embedding rank, V vocabulary, S segments (documents).
Inside the model the tokens of all rows stand in one line [N, D]; `cu_seqlens` says where documents begin.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from dsfast import ops
from dsfast.config import ModelConfig
from dsfast.errors import UserError
from dsfast.model.cache import LatentCache
from dsfast.model.decoder import DecoderLayer, MultiTokenPrediction
from dsfast.model.embedding import Embedding
from dsfast.model.gpu import LastValue
from dsfast.model.initialise import initialise
from dsfast.model.layers import StreamNorm, is_plain
from dsfast.model.moe import Experts, Router
from dsfast.model.rope import RotaryTables
from dsfast.ops.mla_attention import rises
from dsfast.tokens import IGNORED
from dsfast.triton_kernels.launch import dtype_name


def shapes(model: DeepseekV3) -> tuple[list[torch.Size], set[tuple[torch.Size, ...]]]:
    """What shapes parameters and buffers have beside the layers, and in any of these, of which there may be more or fewer."""
    beside = (model.rope, model.embed_tokens, model.norm, model.lm_head, *model.mtp)
    return [shape for x in beside if x is not None for shape in _shapes(x)], {tuple(_shapes(x)) for x in model.layers}


def _shapes(module: nn.Module) -> list[torch.Size]:
    tensors = (*module._parameters.values(), *module._buffers.values())  # walking by `modules` takes twice as long
    below = chain.from_iterable(_shapes(x) for x in module._modules.values() if x is not None)
    return [*(x.shape for x in tensors if x is not None), *below]


class DeepseekV3(nn.Module):
    """The model. Its first weights follow from `torch.manual_seed` alone."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        if not isinstance(config, ModelConfig):
            raise UserError(f"DeepseekV3: expected a ModelConfig, such as config.model, got {type(config).__name__}")
        c = config
        self.config = c
        self.rope = RotaryTables(c)
        self.embed_tokens = Embedding(c)
        self.layers = nn.ModuleList(DecoderLayer(c, i) for i in range(c.num_hidden_layers))
        self.norm = StreamNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = None if c.tie_word_embeddings else nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.mtp = nn.ModuleList(
            MultiTokenPrediction(c, c.num_hidden_layers + k) for k in range(c.num_nextn_predict_layers)
        )
        self.kept = LastValue()
        """What generation keeps between calls."""
        initialise(self, c)
        self.made = shapes(self)
        """What C++ and CUDA graphs, which know addresses alone, count on."""

    def forward(self, input_ids: Tensor, positions: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """input_ids [B, T] int64 -> logits [B, T, V].

        `positions` [B, T] int64 and `cu_seqlens` [S + 1] int32 describe packed documents (dsfast.data.Batch); without
        `cu_seqlens` every row is one document, without `positions` they count from 0 in each document.
        Raises UserError for a row longer than max_position_embeddings and, on the CPU, for ids out of range and for `cu_seqlens`
        that do not rise from 0 to B T.
        """
        ids, positions, cu_seqlens = self._checked_tokens(input_ids, positions, cu_seqlens)
        hidden = self.hidden(self.embed_tokens(ids), positions, cu_seqlens)
        return self.logits(hidden).unflatten(0, input_ids.shape)

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        mtp_loss_weight: float = 0.3,
    ) -> Tensor:
        """Mean cross-entropy in nats, a scalar; with MTP modules, plus `mtp_loss_weight` times their mean (eq. 25).

        labels [B, T] int64: the token after each input, -100 where there is none to predict; otherwise as `forward`.
        """
        return self.loss_of(*self.flatten(input_ids, labels, positions, cu_seqlens), mtp_loss_weight)

    def loss_of(
        self, ids: Tensor, labels: Tensor, positions: Tensor, cu_seqlens: Tensor, mtp_loss_weight: float
    ) -> Tensor:
        """`loss` of what `flatten` returned: nothing is looked at, so that nothing waits for a device."""
        tied = self.lm_head is None
        embedded, head = self.embed_tokens(ids, tied=True) if tied else (self.embed_tokens(ids), self.head_weights())
        hidden = self.hidden(embedded, positions, cu_seqlens)
        loss = self.cross_entropy(hidden, labels, head)
        if not self.mtp:
            return loss
        return loss + mtp_loss_weight * self._mtp_loss(hidden, embedded, labels, positions, cu_seqlens, head)

    def flatten(
        self, input_ids: Tensor, labels: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The arguments of `loss` in one line: ids [N], labels [N], positions [N], cu_seqlens [S + 1]; checked, as it does."""
        ids, positions, cu_seqlens = self._checked_tokens(input_ids, positions, cu_seqlens)
        _expect_beside("labels", labels, input_ids)
        labels = labels.reshape(-1)
        _check_range("labels", labels.where(labels != IGNORED, 0) if labels.is_cpu else labels, self.config.vocab_size)
        return ids, labels, positions, cu_seqlens

    def hidden(
        self, embedded: Tensor, positions: Tensor, cu_seqlens: Tensor | None, cache: LatentCache | None = None
    ) -> Tensor:
        """embedded [N, D], positions [N] -> the final normed state [N, D].

        With a `cache` the tokens, announced by its `place` or `append`, are written to it; then `cu_seqlens` None means one new
        token per cached sequence.
        """
        rope = self.rope(embedded.dtype)
        delta, residual = embedded, None
        for number, layer in enumerate(self.layers):
            if cache is not None:
                cache.layer = number
            delta, residual = layer(delta, residual, rope, positions, cu_seqlens, cache)
        (normed,), _ = self.norm(delta, residual)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, D] -> [N, V]."""
        if self.lm_head is not None:
            return self.lm_head(hidden)
        projection, weight = self.head_weights()
        reduced = hidden if projection is None else nn.functional.linear(hidden, projection)
        return nn.functional.linear(reduced, weight)

    def routers(self) -> list[Router]:
        """Every router, in order, those of the MTP modules last. `load` is its tokens per expert in the last step."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def update_router_bias(self, speed: float, clip_scale: float | Tensor = 1.0) -> Tensor:
        """Balance the experts without a loss, as `ops.update_bias`: call after each training step.

        Returns the routers' loads [L, E] int64, in the order of `routers`; [0, 0] without routers.
        """
        routers = self.routers()
        if not routers:
            return torch.zeros(0, 0, dtype=torch.int64, device=self.embed_tokens.weight.device)
        loads = torch.stack([router.load for router in routers])
        ops.update_bias([router.e_score_correction_bias for router in routers], loads, speed, clip_scale)
        return loads

    def head_weights(self) -> tuple[Tensor | None, Tensor]:
        """(p, w) with logits = (hidden p^T) w^T, p None where there is no projection. Raises UserError for a changed
        lm_head, which a loss by these would pass by."""
        if self.lm_head is not None:
            if not is_plain(self.lm_head):
                raise UserError(
                    "lm_head: the loss takes its weight alone; expected torch.nn.Linear without bias or hooks, got a changed"
                    f" {type(self.lm_head).__name__}"
                )
            return None, self.lm_head.weight
        return self.embed_tokens.projection, self.embed_tokens.weight

    def cross_entropy(self, hidden: Tensor, labels: Tensor, head: tuple[Tensor | None, Tensor]) -> Tensor:
        """hidden [N, D], labels [N], the head's projection and weight, as `head_weights` -> mean loss, a scalar."""
        projection, weight = head
        return ops.linear_cross_entropy(hidden, weight, labels, ignore_index=IGNORED, projection=projection)

    def _mtp_loss(self, hidden, embedded, labels, positions, cu_seqlens, head) -> Tensor:
        """The mean loss of the depths. Depth k sees the token k ahead; a segment's last k places predict nothing.

        What those places read is another document's, but attention is causal: no place with a label sees them.
        """
        rope, ends = self.rope(embedded.dtype), cu_seqlens[1:].long() - 1
        losses = []
        for module in self.mtp:
            embedded = embedded.roll(-1, 0)
            labels = labels.roll(-1, 0).index_fill(0, ends, IGNORED)
            hidden = module(hidden, embedded, rope, positions, cu_seqlens)
            losses.append(self.cross_entropy(hidden, labels, head))
        return torch.stack(losses).mean()

    def _checked_tokens(self, input_ids: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None):
        """ids [N], positions [N], cu_seqlens [S + 1], checked and filled in."""
        _expect_tensor("input_ids", input_ids, "[B, T]", torch.int64)
        kind = input_ids.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            raise UserError(
                "torch.autocast is on; dsfast's operators want one dtype: leave it off, runtime.dtype is for that"
            )
        length, limit = input_ids.shape[1], self.config.max_position_embeddings
        if length > limit:
            raise UserError(
                f"input_ids: rows of {length} tokens, at most {limit} are possible (max_position_embeddings)"
            )
        _check_range("input_ids", input_ids, self.config.vocab_size)
        device, n = input_ids.device, input_ids.numel()
        if cu_seqlens is not None:
            _expect_tensor("cu_seqlens", cu_seqlens, "[S + 1]", torch.int32)
            _check_boundaries(cu_seqlens, n)
        if positions is not None:
            _expect_beside("positions", positions, input_ids)
            _check_range("positions", positions, limit)
        elif cu_seqlens is None:
            positions = torch.arange(length, device=device).repeat(len(input_ids))
        else:
            place = torch.arange(n, dtype=torch.int32, device=device)
            segment = torch.searchsorted(cu_seqlens, place, right=True) - 1
            positions = (place - cu_seqlens[segment]).long()
            _check_range("positions in the documents of cu_seqlens", positions, limit)
        if cu_seqlens is None:
            cu_seqlens = torch.arange(0, n + 1, max(length, 1), dtype=torch.int32, device=device)
        return input_ids.reshape(-1), positions.reshape(-1), cu_seqlens


def parameter_counts(model: DeepseekV3) -> dict[str, int]:
    """`total`: every parameter, a tied head once. `embedding`: of them the embedding and an untied head.

    `active`: those that a token goes through when it is predicted: K of E routed experts, no MTP module.
    """

    def count(module: nn.Module | None) -> int:
        return sum(p.numel() for p in module.parameters()) if module is not None else 0

    c = model.config
    total = count(model)
    routed = sum(count(m) for layer in model.layers for m in layer.modules() if isinstance(m, Experts))
    idle = routed - routed * c.num_experts_per_tok // c.n_routed_experts
    return {
        "total": total,
        "active": total - count(model.mtp) - idle,
        "embedding": count(model.embed_tokens) + count(model.lm_head),
    }


def _expect_tensor(name: str, values: Any, shape: str, dtype: torch.dtype) -> None:
    """`shape` as in "[B, T]"."""
    if not isinstance(values, Tensor):
        raise UserError(f"{name}: expected a tensor {shape} of {dtype_name(dtype)}, got {type(values).__name__}")
    if values.ndim != shape.count(",") + 1 or values.dtype != dtype:
        raise UserError(f"{name}: expected {shape} of {dtype_name(dtype)}, got {_shape(values)} of {values.dtype}")


def _expect_beside(name: str, values: Any, input_ids: Tensor) -> None:
    if not isinstance(values, Tensor) or values.shape != input_ids.shape or values.dtype != torch.int64:
        found = f"{_shape(values)} of {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
        raise UserError(f"{name}: expected the shape of input_ids {_shape(input_ids)}, of int64, got {found}")


def _check_range(name: str, values: Tensor, limit: int) -> None:
    """Raise UserError unless 0 <= values < limit. On the CPU alone: elsewhere looking would wait for the device; and not where
    torch.compile follows, which would end its graph there."""
    if torch.compiler.is_compiling() or not values.is_cpu or not values.numel():
        return
    low, high = (bound.item() for bound in torch.aminmax(values))
    if low < 0 or high >= limit:
        raise UserError(f"{name}: expected 0 .. {limit - 1}, got {low if low < 0 else high}")


def _check_boundaries(cu_seqlens: Tensor, end: int) -> None:
    """Raise UserError unless they rise from 0 to `end`. Where `_check_range` looks; at how many they are, everywhere."""
    looked_at = cu_seqlens.is_cpu and not torch.compiler.is_compiling()
    if not cu_seqlens.numel() or (looked_at and not rises(cu_seqlens.tolist(), end)):
        found = cu_seqlens[:20].tolist() if looked_at else _shape(cu_seqlens)
        raise UserError(
            f"cu_seqlens: expected where documents begin, rising from 0 to {end}, the number of tokens, got {found}"
        )


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
