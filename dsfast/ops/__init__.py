"""The operators of a DeepSeek-V3 model. Each one's module holds its maths, reference, schema, dispatch and backward."""

from dsfast.ops.adamw import adamw, clip_factor, grad_clip, grad_norm
from dsfast.ops.after_step import record_step, update_bias
from dsfast.ops.checks import check_all
from dsfast.ops.dispatch import (
    IMPLEMENTATIONS,
    OPERATORS,
    FallbackWarning,
    configured,
    fallbacks,
    note_fallback,
    report,
    use,
)
from dsfast.ops.embedding import embedding, tied_embedding
from dsfast.ops.linear_cross_entropy import linear_cross_entropy
from dsfast.ops.mla_attention import mla_attention
from dsfast.ops.mla_decode import mla_decode
from dsfast.ops.mla_output import mla_output, outputs_at_once
from dsfast.ops.mla_project import mla_project, projects_at_once
from dsfast.ops.moe_experts import moe_experts
from dsfast.ops.moe_route import Routing, moe_route, route_tokens
from dsfast.ops.muon import muon
from dsfast.ops.native import products_in
from dsfast.ops.newton_schulz import newton_schulz
from dsfast.ops.rms_norm import rms_norm, stream_norm
from dsfast.ops.rope import rope, rope_, split_and_turn
from dsfast.ops.swiglu_mlp import swiglu_mlp

__all__ = [
    "IMPLEMENTATIONS",
    "OPERATORS",
    "FallbackWarning",
    "Routing",
    "adamw",
    "check_all",
    "clip_factor",
    "configured",
    "embedding",
    "fallbacks",
    "grad_clip",
    "grad_norm",
    "linear_cross_entropy",
    "mla_attention",
    "mla_decode",
    "mla_output",
    "mla_project",
    "moe_experts",
    "moe_route",
    "muon",
    "newton_schulz",
    "note_fallback",
    "outputs_at_once",
    "products_in",
    "projects_at_once",
    "record_step",
    "report",
    "rms_norm",
    "rope",
    "rope_",
    "route_tokens",
    "split_and_turn",
    "stream_norm",
    "swiglu_mlp",
    "tied_embedding",
    "update_bias",
    "use",
]  # fmt: skip
