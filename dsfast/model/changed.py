"""Whether a model's modules are those of dsfast/model: a call of C++ or a CUDA graph would pass others, and hooks, by."""

from __future__ import annotations

from operator import attrgetter

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from dsfast import ops
from dsfast.config import ModelConfig
from dsfast.model.attention import LATENT_NORM_EPS, MultiHeadLatentAttention
from dsfast.model.decoder import DecoderLayer, MultiTokenPrediction
from dsfast.model.deepseek_v3 import DeepseekV3, shapes
from dsfast.model.embedding import Embedding
from dsfast.model.layers import RMSNorm, StreamNorm, is_unchanged
from dsfast.model.moe import DeepseekMoE, Experts, Router, SwiGLU, choice_of
from dsfast.model.rope import RotaryTables, softmax_scale

OWN_MODULES = frozenset({
    DecoderLayer, DeepseekMoE, DeepseekV3, Embedding, Experts, MultiHeadLatentAttention, MultiTokenPrediction, RMSNorm,
    RotaryTables, Router, StreamNorm, SwiGLU, nn.Linear, nn.ModuleList,
})  # fmt: skip
_HOOKS = attrgetter("_backward_hooks", "_post_accumulate_grad_hooks")
_STANDS_FOR_THE_MODEL = {"cpu": "the whole-model call", "cuda": "the CUDA graph"}


def note_changed(model: DeepseekV3) -> bool:
    """Whether modules are not dsfast's own or have hooks, or tensors have another shape than they were made with, so that nothing
    may stand for the model; says which in a warning."""
    if _has_any_global_hook() or not all(_is_own(module, model.config) for module in model.modules()):
        changed = [name for name, module in model.named_modules() if not _is_own(module, model.config)]
        where = f"module {changed[0]!r}" if changed and changed[0] else "the model"
        reason = f"{where} is not dsfast's own, or has hooks"
    elif not _has_its_shapes(model):
        reason = "weights or buffers have other shapes than the config's"
    else:
        return False
    _note(model, f"{reason}: the operators run one by one, more slowly")
    return True


def _has_its_shapes(model: DeepseekV3) -> bool:
    (beside, layers), (beside_made, layers_made) = shapes(model), model.made
    return beside == beside_made and layers <= layers_made


def note_hooked(model: DeepseekV3) -> bool:
    """Whether parameters have hooks, which a step in a CUDA graph, with its copies of the weights, passes by; says which in a
    warning."""
    hooked = [name for name, parameter in model.named_parameters() if has_hooks(parameter)]
    if hooked:
        _note(model, f"parameter {hooked[0]!r} has hooks: each step is launched by itself, more slowly")
    return bool(hooked)


def has_hooks(parameter: Tensor) -> bool:
    """Whether a backward pass is to do more with its gradient than to make it."""
    return any(_HOOKS(parameter))


def _note(model: DeepseekV3, reason: str) -> None:
    """Warn that what would stand for the model on its device is not made."""
    device = model.embed_tokens.weight.device.type
    ops.note_fallback(_STANDS_FOR_THE_MODEL[device], device, "is not made", reason, stacklevel=3)


def _is_own(module: nn.Module, config: ModelConfig) -> bool:
    """Whether `module` is one of a model such as `config` describes, its numbers too."""
    if not is_unchanged(module, OWN_MODULES):
        return False
    if isinstance(module, Router):
        return module.choice == choice_of(config)
    if isinstance(module, MultiHeadLatentAttention):
        return module.scale == softmax_scale(config)
    return not isinstance(module, RMSNorm) or module.eps in (config.rms_norm_eps, LATENT_NORM_EPS)
