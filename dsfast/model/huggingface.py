"""To and from the folder layout of transformers' DeepseekV3ForCausalLM.

The names on disk are DeepSeek's own: experts one by one, gate and up projections apart. A factorised embedding is
written as the one [V, D] matrix E P that it stands for. MTP modules become the layers after the last, with their
copies of embedding and head, as in the published weights; transformers skips them when it loads the main model.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from dsfast.config import ModelConfig, load_config
from dsfast.errors import UserError
from dsfast.files import expect_possible_name, os_errors_as, write_json, write_text
from dsfast.huggingface_config import FIXED
from dsfast.model.decoder import DecoderLayer
from dsfast.model.deepseek_v3 import DeepseekV3
from dsfast.model.generate import special_id
from dsfast.model.tensors import read_tensors, write_tensors
from dsfast.tokens import BOS, EOS, PAD
from dsfast.triton_kernels.launch import dtype_name

_OWN_FIELDS = ("embedding_rank", "embedding_initializer_range", "zero_init_output")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MTP_COPIES = ("embed_tokens.weight", "shared_head.head.weight")
_PART = 2**20


def export_huggingface(model: DeepseekV3, tokenizer: Tokenizer, out_dir: str | Path) -> None:
    """Write config.json, generation_config.json, model.safetensors, tokenizer.json and tokenizer_config.json.

    The folder appears whole or not at all. Raises UserError if `out_dir` is not new or empty, or cannot be written, and for a
    model that transformers would load and compute something else with, or nothing.
    """
    if reason := why_not_exported(model.config):
        raise UserError(f"{out_dir}: {reason}; it cannot be exported")
    expect_possible_name(out_dir)
    with os_errors_as(f"{out_dir}: cannot be written", RuntimeError):  # a loop of links, a working folder that is gone
        out, here = Path(out_dir).resolve(), Path.cwd()
    if out in (here, Path(out.anchor)):
        raise UserError(f"{out_dir}: expected a folder of its own, not the one you are in or the root")
    special = {name: special_id(tokenizer, token) for name, token in (("bos", BOS), ("eos", EOS), ("pad", PAD))}
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        with os_errors_as(f"{out}: cannot be written", SafetensorError):
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise UserError(f"{out}: expected a new or an empty folder, but something is there")
            partial.mkdir(parents=True)
            config, weights = partial / "config.json", partial / "model.safetensors"
            write_json(config, _config(model, special))
            write_tensors(weights, _tensors_on_disk(model), config, {"format": "pt"})
            write_json(partial / "generation_config.json", {f"{name}_token_id": i for name, i in special.items()})
            _write_tokenizer(partial, tokenizer, special["bos"], model.config.max_position_embeddings)
            os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def why_not_exported(config: ModelConfig) -> str:
    """What transformers' model does otherwise than one of `config`, or ""."""
    does = "transformers' DeepseekV3ForCausalLM"
    if config.scoring_func != "sigmoid":
        return f"{does} makes the routers' scores by sigmoid only, this model by {config.scoring_func} (model.scoring_func)"
    if config.first_k_dense_replace < config.num_hidden_layers and config.n_routed_experts == config.n_group:
        return (
            f"{does} adds the two best scores of a group, of this model's {config.n_group} each has one (model.n_group)"
        )
    return ""


def import_huggingface(folder: str | Path) -> DeepseekV3:
    """The model in `folder`, float32 on the CPU, in evaluation mode, with a dense embedding.

    Raises UserError for a config dsfast does not support and for missing, unknown, repeated, quantised, misshapen or unreadable
    tensors, and for a tied head, or an MTP layer's embedding or head, that differs from what it stands for.
    """
    folder = Path(folder)
    model = DeepseekV3(replace(load_config(folder / "config.json").model, embedding_rank=None))
    model.float()  # whatever torch's default dtype is
    stored = _read_tensors(folder)
    with torch.no_grad():
        views = _views(model)
        scales = [name for name in stored if name.endswith("weight_scale_inv")]
        quantised = scales or [name for name in views.keys() & stored.keys() if stored[name].dtype not in _DTYPES]
        if quantised:
            raise UserError(
                f"{folder}: the weights are quantised, as {min(quantised)!r} shows; they are to be converted first, to one of "
                f"{', '.join(map(dtype_name, _DTYPES))}"
            )
        _drop_repeats(stored, model, folder)
        for problem, names in (("missing", views.keys() - stored.keys()), ("unknown", stored.keys() - views.keys())):
            if names:
                raise UserError(f"{folder}: {len(names)} tensors are {problem}, among them {min(names)!r}")
        for name, view in views.items():
            if stored[name].shape != view.shape:
                expected, found = list(view.shape), list(stored[name].shape)
                raise UserError(f"{folder}: tensor {name!r} must have shape {expected}, got {found}")
            view.copy_(stored[name])
    return model.eval()


def _views(model: DeepseekV3) -> dict[str, Tensor]:
    """Every tensor of the layout as a view of the model's own; a factorised embedding is merged, which is a copy."""
    views = {"model.embed_tokens.weight": model.embed_tokens.merged(), "model.norm.weight": model.norm.weight}
    if model.lm_head is not None:
        views["lm_head.weight"] = model.lm_head.weight
    for number, layer in enumerate(model.layers):
        views |= _layer_views(f"model.layers.{number}", layer)
    for number, module in enumerate(model.mtp, start=len(model.layers)):
        prefix = f"model.layers.{number}"
        views |= _layer_views(prefix, module.block)
        views |= {f"{prefix}.{name}.weight": getattr(module, name).weight for name in ("enorm", "hnorm", "eh_proj")}
        views[f"{prefix}.shared_head.norm.weight"] = module.norm.weight
    return views


def _layer_views(prefix: str, layer: DecoderLayer) -> dict[str, Tensor]:
    """A layer's tensors: ours have transformers' names but for the fused gate_up_proj and the stacked experts."""
    views = {}
    for name, tensor in layer.state_dict(keep_vars=True).items():
        owner, _, leaf = f"{prefix}.{name}".rpartition(".")
        if leaf not in ("gate_up_proj", "down_proj"):
            views[f"{prefix}.{name}"] = tensor
            continue
        stacked = tensor.ndim == 3
        for expert, weight in enumerate(tensor if stacked else [tensor]):
            at = f"{owner}.{expert}" if stacked else owner
            if leaf == "down_proj":
                views[f"{at}.down_proj.weight"] = weight
            else:
                views[f"{at}.gate_proj.weight"], views[f"{at}.up_proj.weight"] = weight.chunk(2)
    return views


@torch.no_grad()
def _tensors_on_disk(model: DeepseekV3) -> dict[str, Tensor]:
    """The views as tensors of their own on the CPU, plus the copies that MTP layers carry."""
    views = _views(model)
    embedding = views["model.embed_tokens.weight"]
    for number in range(len(model.layers), len(model.layers) + len(model.mtp)):
        for name, tensor in zip(_MTP_COPIES, (embedding, views.get("lm_head.weight", embedding)), strict=True):
            views[f"model.layers.{number}.{name}"] = tensor
    return {name: view.detach().cpu().clone(memory_format=torch.contiguous_format) for name, view in views.items()}


def _drop_repeats(stored: dict[str, Tensor], model: DeepseekV3, folder: Path) -> None:
    """Take out what only repeats another tensor. Raises UserError where one that should does not: it has no place in a model."""
    for name, original in _repeats(model).items():
        if name in stored and original in stored and not _same_values(stored[name], stored[original]):
            raise UserError(
                f"{folder}: tensor {name!r} must repeat {original!r}, with which the model shares it, but differs from it"
            )
        stored.pop(name, None)


def _repeats(model: DeepseekV3) -> dict[str, str]:
    """Stored tensors without a view, and what each repeats: a tied head, and the MTP layers' embeddings and heads."""
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    repeats = {}
    if model.lm_head is None:
        repeats[head], head = embedding, embedding
    for number in range(len(model.layers), len(model.layers) + len(model.mtp)):
        for copy, original in zip(_MTP_COPIES, (embedding, head), strict=True):
            repeats[f"model.layers.{number}.{copy}"] = original
    return repeats


def _same_values(tensor: Tensor, other: Tensor) -> bool:
    """Whether both say the same in float32, NaN in the same places too; a part at a time, for matrices of gigabytes."""
    if tensor.shape != other.shape:
        return False
    parts = zip(tensor.flatten().split(_PART), other.flatten().split(_PART), strict=True)
    return all(torch.allclose(a.float(), b.float(), rtol=0, atol=0, equal_nan=True) for a, b in parts)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no .safetensors file in it")
    stored: dict[str, Tensor] = {}
    for file in files:
        loaded = read_tensors(file)
        if twice := stored.keys() & loaded.keys():
            raise UserError(f"{file}: tensor {min(twice)!r} stands in another .safetensors file too")
        stored |= loaded
    return stored


def _config(model: DeepseekV3, special: dict[str, int]) -> dict[str, Any]:
    """config.json as DeepSeek publishes it; what vLLM and older readers ask for is not left to defaults."""
    fields = {name: value for name, value in asdict(model.config).items() if name not in _OWN_FIELDS}
    if fields["rope_scaling"]:
        fields["rope_scaling"] = {name: _whole(value) for name, value in fields["rope_scaling"].items()}
        fields["rope_scaling"] |= {"type": "yarn", "rope_type": "yarn"}  # older and newer readers' key
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **fields,
        "num_key_value_heads": model.config.num_attention_heads,
        **FIXED,
        "torch_dtype": dtype_name(model.norm.weight.dtype),
        **{f"{name}_token_id": number for name, number in special.items()},
    }


def _whole(value: float | str) -> float | int | str:
    """4096.0 as 4096: the config keeps all numbers of rope_scaling as floats, but readers check for whole ones."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, bos_id: int, context: int) -> None:
    """The tokenizer, set to put <|bos|> before every text, as `generate` does."""
    own = Tokenizer.from_str(tokenizer.to_str())
    own.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos_id)])
    write_text(folder / "tokenizer.json", own.to_str(pretty=True))  # not `save`, whose errors are bare exceptions
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings)
