"""The `model` section of a published DeepSeek-V3 config.json: flat, with keys that mean nothing here or mean one thing only."""

from __future__ import annotations

from typing import Any

from dsfast.errors import UserError

# Keys that say nothing about the architecture, or that dsfast has decided otherwise.
_IGNORED = {
    "_name_or_path", "architectures", "auto_map", "aux_loss_alpha", "bos_token_id", "chunk_size_feed_forward",
    "dtype", "eos_token_id", "ep_size", "head_dim", "id2label", "is_encoder_decoder", "label2id", "model_type",
    "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp", "problem_type",
    "quantization_config", "qk_head_dim", "return_dict", "seq_aux", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip
SCALING_TYPES = ("type", "rope_type")
"""The older and the newer name of what a rope_scaling is."""
# Keys that dsfast supports at one value only.
FIXED = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "topk_method": "noaux_tc",
}
# Keys that transformers takes other defaults for. Its count of MTP modules is not asked for: it leaves them out of the model.
_NEEDED = ("first_k_dense_replace", "n_group", "q_lora_rank", "routed_scaling_factor", "topk_group")


def model_section(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The keys of ModelConfig, not yet checked. Raises UserError for what dsfast does not support; `where` is the file."""
    if missing := [name for name in _NEEDED if name not in values]:
        raise UserError(
            f"{where}: expected the keys {', '.join(missing)}, whose defaults differ between transformers and dsfast"
        )
    model = {name: value for name, value in values.items() if name not in _IGNORED}
    for name, supported in FIXED.items():
        if model.pop(name, supported) != supported:
            raise UserError(f"{where}: {name} is {values[name]!r}; dsfast supports {supported!r} only")
    heads = model.pop("num_key_value_heads", model.get("num_attention_heads"))
    if heads != model.get("num_attention_heads"):
        raise UserError(
            f"{where}: num_key_value_heads is {heads}; with latent attention it must equal num_attention_heads"
        )
    _separate_rope(model, where)
    return model


def _separate_rope(model: dict[str, Any], where: str) -> None:
    """Put theta and scaling where ModelConfig has them. transformers 5 writes both into rope_parameters; it reads rope_scaling
    in its place where that is given too, and the theta beside them where they have none."""
    parameters = model.pop("rope_parameters", None)
    if parameters is not None and not isinstance(parameters, dict):
        raise UserError(f"{where}: rope_parameters must be an object or null, got {parameters!r:.80}")
    rope = model.get("rope_scaling") or parameters
    if not isinstance(rope, dict):
        return
    if "rope_theta" in rope:
        model["rope_theta"] = rope["rope_theta"]
    scaled = any(rope.get(name, "default") != "default" for name in SCALING_TYPES)
    model["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"} if scaled else None
