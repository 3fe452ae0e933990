"""A model as the whole-model calls of C++ take it (csrc/model.h): sizes, and the addresses of weights or of their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsfast import ops
from dsfast.model.attention import LATENT_NORM_EPS, MultiHeadLatentAttention
from dsfast.model.changed import note_changed
from dsfast.model.decoder import DecoderLayer
from dsfast.model.deepseek_v3 import DeepseekV3
from dsfast.model.moe import DeepseekMoE
from dsfast.model.rope import softmax_scale
from dsfast.ops import native

FORWARD = frozenset({
    "embedding", "rms_norm", "rope", "mla_attention", "mla_decode", "moe_route", "moe_experts", "swiglu_mlp",
})  # fmt: skip
"""The operators a forward pass without loss is made of: not the head's loss, not the optimizers'."""
AGREEMENT = 1e-3
"""How far, relatively, what a call gives may be from what dsfast/model says. Rounding makes 1e-5 of gradients, 1e-6 of logits."""


def runs_natively(model: DeepseekV3, operators: frozenset[str] = FORWARD) -> bool:
    """Whether a whole-model call may stand for the model now: `operators` all take their C++ kernels, and the modules are those
    of dsfast/model, without hooks, which a call would pass by. Where only these are in the way a warning says so."""
    modules = list(model.modules())
    weights = (w for module in modules for w in module._parameters.values() if w is not None)
    buffers = (b for module in modules for b in module._buffers.values() if b is not None and b.is_floating_point())
    if not all(w.is_cpu and w.dtype == torch.float32 for w in (*weights, *buffers)):
        return False
    if not all(row["implementation"] == "native" for row in ops.report("cpu") if row["operator"] in operators):
        return False
    return not note_changed(model)


class NativeModel:
    """csrc/model.h's Model, and what keeps alive the memory it has addresses of.

    `of` maps a tensor of the model to the one whose address is taken: itself, or its gradient.
    """

    def __init__(self, model: DeepseekV3, of: Callable[[Tensor], Tensor] = lambda tensor: tensor):
        self._of = of
        self._kept: list[Tensor] = []
        head_projection, head = model.head_weights()
        self.head_width = head.size(1)
        c, e = model.config, model.embed_tokens
        self._struct = self._filled(
            native.module().Model(),
            vocabulary=c.vocab_size, width=c.hidden_size, heads=c.num_attention_heads, latent_rank=c.kv_lora_rank,
            query_rank=c.q_lora_rank or 0, nope=c.qk_nope_head_dim, rope=c.qk_rope_head_dim, value=c.v_head_dim,
            experts=c.n_routed_experts, chosen=c.num_experts_per_tok, groups=c.n_group, chosen_groups=c.topk_group,
            expert_width=c.moe_intermediate_size, norm_topk_prob=c.norm_topk_prob,
            softmax_scores=c.scoring_func == "softmax", routed_scaling=c.routed_scaling_factor,
            softmax_scale=softmax_scale(c), eps=c.rms_norm_eps, latent_eps=LATENT_NORM_EPS, cos=model.rope.cos,
            sin=model.rope.sin, table=e.weight, projection=e.projection, embedding_rank=e.weight.size(1),
            norm=model.norm.weight, head_projection=head_projection, head=head, head_width=self.head_width,
        )  # fmt: skip
        for layer in model.layers:
            self._struct.add_layer(self._layer(layer))
        self.address: int = self._struct.address

    def _layer(self, layer: DecoderLayer) -> Any:
        """csrc/model.h's Layer."""
        a = layer.self_attn
        filled = self._filled(
            native.module().Layer(),
            input_norm=layer.input_layernorm.weight, mlp_norm=layer.post_attention_layernorm.weight,
            kv_a=a.kv_a_proj_with_mqa.weight, kv_a_norm=a.kv_a_layernorm.weight, kv_b=a.kv_b_proj.weight,
            o=a.o_proj.weight, **_queries(a),
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

    def _filled(self, struct: Any, **fields: Any) -> Any:
        """`struct` with its fields set: numbers as they are, tensors as addresses, None as null."""
        for name, value in fields.items():
            if isinstance(value, Tensor):
                value = self._of(value)
                if not value.is_contiguous():
                    value = value.detach().contiguous()
                self._kept.append(value)
            setattr(struct, name, value.data_ptr() if isinstance(value, Tensor) else 0 if value is None else value)
        return struct


def _queries(attention: MultiHeadLatentAttention) -> dict[str, Tensor]:
    if hasattr(attention, "q_proj"):
        return {"q": attention.q_proj.weight}
    return {
        "q_a": attention.q_a_proj.weight,
        "q_a_norm": attention.q_a_layernorm.weight,
        "q": attention.q_b_proj.weight,
    }
