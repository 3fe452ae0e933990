"""Generation with the whole model in one C++ call per token (csrc/decode_step.cpp), on the CPU in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from dsfast import ops
from dsfast.errors import UserError
from dsfast.model.attention import LATENT_NORM_EPS, MultiHeadLatentAttention
from dsfast.model.cache import LatentCache
from dsfast.model.decode import NOT_FINITE, Prompts
from dsfast.model.decoder import DecoderLayer
from dsfast.model.deepseek_v3 import DeepseekV3
from dsfast.model.moe import DeepseekMoE
from dsfast.model.rope import softmax_scale
from dsfast.ops import native

OPERATORS = frozenset(ops.OPERATORS) - {"linear_cross_entropy", "adamw"}
"""Those a forward pass is made of: the step stands for all of them and runs only where each would run natively."""


def runs_natively(model: DeepseekV3) -> bool:
    """Whether every operator of the model's forward pass takes its C++ kernel now."""
    weights = list(model.parameters())
    if not all(w.is_cpu and w.dtype == torch.float32 for w in weights):
        return False
    return all(row["implementation"] == "native" for row in ops.report("cpu") if row["operator"] in OPERATORS)


class NativeDecoder:
    """OperatorDecoder with the whole step in C++: the same tokens but for rounding, a sequence the same bits in any batch.

    `logits` are there only where it samples. The model's weights must stay as they are while it is used.
    """

    def __init__(self, model: DeepseekV3, batch: int, capacity: int, temperature: float, generator: Generator):
        self._kept: list[Tensor] = []  # what the C++ side has addresses of
        self._model = self._describe(model)
        cache = LatentCache(model.config, batch, capacity, torch.device("cpu"), torch.float32)
        hidden = torch.empty(batch, self._head_width)
        self._kept += [cache.latent, cache.k_rope, hidden]
        self._cache = (cache.latent.data_ptr(), cache.k_rope.data_ptr(), batch, capacity)
        self._hidden, self._last_place = hidden.data_ptr(), capacity - 1
        self._temperature, self._generator = temperature, generator
        self.logits = torch.empty(batch if temperature > 0 else 0, model.config.vocab_size)
        self.chosen = torch.empty(batch, dtype=torch.int64)
        self._rows, self._lengths = torch.arange(batch), torch.empty(batch, dtype=torch.int64)
        self._decode_step = native.module().decode_step

    def start(self, prompts: Prompts) -> list[int]:
        self._lengths.copy_(prompts.lengths)
        return self._run(prompts.ids, prompts.rows, prompts.positions)

    def step(self) -> list[int]:
        positions = self._lengths.clamp_(max=self._last_place)
        chosen = self._run(self.chosen, self._rows, positions)
        self._lengths += 1
        return chosen

    def _run(self, ids: Tensor, rows: Tensor, positions: Tensor) -> list[int]:
        logits = uniforms = 0
        if self._temperature > 0:
            drawn = torch.rand(len(self.chosen), dtype=torch.float64, generator=self._generator)
            logits, uniforms = self.logits.data_ptr(), drawn.data_ptr()
        not_finite = self._decode_step(
            self._model.address, *self._cache, ids.data_ptr(), rows.data_ptr(), positions.data_ptr(), len(ids),
            self._hidden, logits, uniforms, self._temperature, self.chosen.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        if not_finite:
            raise UserError(NOT_FINITE)
        return self.chosen.tolist()

    def _describe(self, model: DeepseekV3) -> Any:
        """csrc/decode.h's DecodeModel."""
        c, e = model.config, model.embed_tokens
        head_projection, head = model.head_weights()
        self._head_width = head.size(1)
        description = self._filled(
            native.module().DecodeModel(),
            vocabulary=c.vocab_size, width=c.hidden_size, heads=c.num_attention_heads, latent_rank=c.kv_lora_rank,
            query_rank=c.q_lora_rank or 0, nope=c.qk_nope_head_dim, rope=c.qk_rope_head_dim, value=c.v_head_dim,
            experts=c.n_routed_experts, chosen=c.num_experts_per_tok, groups=c.n_group, chosen_groups=c.topk_group,
            expert_width=c.moe_intermediate_size, norm_topk_prob=c.norm_topk_prob,
            routed_scaling=c.routed_scaling_factor, softmax_scale=softmax_scale(c), eps=c.rms_norm_eps,
            latent_eps=LATENT_NORM_EPS, cos=model.rope.cos, sin=model.rope.sin, table=e.weight, projection=e.projection,
            embedding_rank=e.weight.size(1), norm=model.norm.weight, head_projection=head_projection, head=head,
            head_width=self._head_width,
        )  # fmt: skip
        for layer in model.layers:
            description.add_layer(self._layer(layer))
        return description

    def _layer(self, layer: DecoderLayer) -> Any:
        """csrc/decode.h's DecodeLayer."""
        a = layer.self_attn
        filled = self._filled(
            native.module().DecodeLayer(),
            input_norm=layer.input_layernorm.weight, mlp_norm=layer.post_attention_layernorm.weight,
            kv_a=a.kv_a_proj_with_mqa.weight, kv_a_norm=a.kv_a_layernorm.weight, kv_b=a.kv_b_proj.weight,
            o=a.o_proj.weight, **self._queries(a),
        )  # fmt: skip
        mlp = layer.mlp
        if isinstance(mlp, DeepseekMoE):
            self._filled(
                filled, router=mlp.gate.weight, router_bias=mlp.gate.e_score_correction_bias,
                experts_gate_up=mlp.experts.gate_up_proj, experts_down=mlp.experts.down_proj,
            )  # fmt: skip
            mlp = mlp.shared_experts
        if mlp is not None:
            self._filled(filled, gate_up=mlp.gate_up_proj, down=mlp.down_proj, width=mlp.down_proj.size(1))
        return filled

    @staticmethod
    def _queries(attention: MultiHeadLatentAttention) -> dict[str, Tensor]:
        if hasattr(attention, "q_proj"):
            return {"q": attention.q_proj.weight}
        return {
            "q_a": attention.q_a_proj.weight,
            "q_a_norm": attention.q_a_layernorm.weight,
            "q": attention.q_b_proj.weight,
        }

    def _filled(self, struct: Any, **fields: Any) -> Any:
        """`struct` with its fields set: numbers as they are, tensors as addresses, None as null."""
        for name, value in fields.items():
            if isinstance(value, Tensor):
                value = value.detach().contiguous()
                self._kept.append(value)
            setattr(struct, name, value.data_ptr() if isinstance(value, Tensor) else 0 if value is None else value)
        return struct
