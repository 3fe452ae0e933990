"""JSON -> frozen dataclasses, strictly: unknown, missing, mistyped, duplicate or impossible values are errors.

A dsfast config has the sections `model`, `data`, `train`, `runtime` and `suite`. A published DeepSeek-V3 `config.json`
(flat, `model_type: "deepseek_v3"`) loads too: it fills `model` and leaves the other sections at their defaults.
Field names of `model` are those of transformers' DeepseekV3Config; the few of our own are marked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dsfast.errors import UserError, choices

Implementation = Literal["auto", "reference", "native", "triton"]


@dataclass(frozen=True)
class ModelConfig:
    """A DeepSeek-V3 model (arXiv 2412.19437, section 2.1). Sizes are counts of elements."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    q_lora_rank: int | None = None
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    first_k_dense_replace: int = 0
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: dict[str, float | str] | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 0
    initializer_range: float = 0.02
    # dsfast's own fields
    embedding_rank: int | None = None
    """Rank R of the factorised embedding E [V, R] P [R, D]; null keeps one [V, D] matrix."""
    embedding_initializer_range: float | None = None
    """Standard deviation of E at the start; null takes initializer_range."""
    zero_init_output: bool = False
    """Start attention's and the experts' output projections at zero, so that each layer begins as the identity."""

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True)
class DataConfig:
    """What is read. `boost` maps a topic to how many times as often its facts are written."""

    source: str = "encyclopedia"
    max_articles: int = 1000
    facts: int = 200
    boost: dict[str, int] = field(default_factory=dict)
    sequence_length: int = 256


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Rates are peaks: they rise over `warmup_steps` and fall to `final_lr_ratio` after the last."""

    steps: int = 200
    batch_size: int = 32
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-2
    embedding_learning_rate: float | None = None
    muon_learning_rate: float = 3e-2
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    warmup_steps: int = 10
    decay: Literal["linear", "cosine", "constant"] = "linear"
    final_lr_ratio: float = 0.0
    bias_update_speed: float = 1e-3
    mtp_loss_weight: float = 0.3
    checkpoint_every: int = 0
    max_bad_steps: int = 5
    log_every: int = 10


@dataclass(frozen=True)
class RuntimeConfig:
    """Where and how it runs. `kernels` maps an operator (or "default") to an implementation."""

    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    kernels: dict[str, Implementation] = field(default_factory=dict)
    threads: int | None = None


@dataclass(frozen=True)
class SuiteConfig:
    """What `python -m dsfast.suite` holds a run to."""

    target_seconds: float = 720.0
    full_training_steps: int = 500
    max_new_tokens: int = 16


@dataclass(frozen=True)
class Config:
    """A whole run: what is trained, on what, how, where."""

    model: ModelConfig
    name: str = "unnamed"
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    suite: SuiteConfig = field(default_factory=SuiteConfig)

    @staticmethod
    def from_dict(values: dict[str, Any], where: str = "config") -> Config:
        """Raise UserError for anything unknown, missing, mistyped or impossible; `where` names the file."""
        config = _build(Config, values, where, "")
        _check(config, where)
        return config

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> Config:
        """A checked copy with dotted names set: `config.replace(**{"train.steps": 20})`."""
        values = self.to_dict()
        for name, value in changes.items():
            *sections, key = name.split(".")
            target = values
            for section in sections:
                target = target[section]
            target[key] = value
        return Config.from_dict(values)

    def hash(self) -> str:
        """SHA-256 of the canonical JSON; equal configs have equal hashes."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def load_config(path: str | Path) -> Config:
    """Read a dsfast config or a published DeepSeek-V3 config.json. Raises UserError."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, got {_describe(values)}")
    if values.get("model_type") == "deepseek_v3":
        model = _from_huggingface(values, str(path))
        # The default row must fit the model's context; a context that is not a number is reported by from_dict.
        context = model.get("max_position_embeddings")
        rows = min(DataConfig.sequence_length, context) if isinstance(context, int) else DataConfig.sequence_length
        values = {"name": Path(path).stem, "model": model, "data": {"sequence_length": rows}}
    return Config.from_dict(values, str(path))


def read_json(path: str | Path) -> Any:
    """A JSON file without what Python's parser lets through: duplicate keys, NaN, Infinity. Raises UserError."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{path}: key {twice!r} stands twice in one object; keep one of them")
        return dict(pairs)

    def no_constants(text: str) -> Any:
        raise UserError(f"{path}: {text} is not a JSON number; expected a finite number")

    try:
        text = Path(path).read_text(encoding="utf-8")
        return json.loads(text, object_pairs_hook=no_duplicates, parse_constant=no_constants)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


# Keys of a published config.json that say nothing about the architecture, or that dsfast has decided otherwise.
_HUGGINGFACE_IGNORED = {
    "_name_or_path", "architectures", "auto_map", "aux_loss_alpha", "bos_token_id", "chunk_size_feed_forward",
    "dtype", "eos_token_id", "ep_size", "head_dim", "id2label", "is_encoder_decoder", "label2id", "model_type",
    "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp", "problem_type",
    "quantization_config", "qk_head_dim", "return_dict", "seq_aux", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip
# Keys that dsfast supports at one value only.
_HUGGINGFACE_FIXED = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}


def _from_huggingface(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The `model` section of a published config: ignorable keys dropped, fixed ones checked."""
    model = {name: value for name, value in values.items() if name not in _HUGGINGFACE_IGNORED}
    for name, supported in _HUGGINGFACE_FIXED.items():
        if model.pop(name, supported) != supported:
            raise UserError(f"{where}: {name} is {values[name]!r}; dsfast supports {supported!r} only")
    heads = model.pop("num_key_value_heads", model.get("num_attention_heads"))
    if heads != model.get("num_attention_heads"):
        raise UserError(
            f"{where}: num_key_value_heads is {heads}; with latent attention it must equal num_attention_heads"
        )
    rope = model.pop("rope_parameters", None)  # transformers 5 keeps theta and scaling together
    if rope is not None:
        model["rope_theta"] = rope.get("rope_theta", 10000.0)
        if rope.get("rope_type", "default") != "default":
            model["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    return model


def _build(cls: type, values: Any, where: str, path: str) -> Any:
    """A dataclass from a JSON object; `path` is the dotted name of the section, for messages."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: {path or 'config'} must be an object, got {_describe(values)}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise UserError(f"{where}: unknown key {_join(path, name)!r}; {choices(fields)}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UserError(f"{where}: missing key {_join(path, name)!r}")
    return cls(**{name: _convert(hints[name], value, where, _join(path, name)) for name, value in values.items()})


def _convert(hint: Any, value: Any, where: str, path: str) -> Any:
    """`value` as the annotated type, or a UserError. An int is taken where a float is wanted, never a bool as an int."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where, path)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        inner = [a for a in arguments if a is not type(None)]
        matching = [a for a in inner if a is type(value)]
        return _convert((matching or inner)[0], value, where, path)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{where}: {path} is {value!r}; {choices(arguments)}")
        return value
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}: {path} must be an object, got {_describe(value)}")
        return {name: _convert(arguments[1], item, where, _join(path, name)) for name, item in value.items()}
    if hint is float and type(value) in (int, float):
        if not math.isfinite(value):
            raise UserError(f"{where}: {path} must be finite, got {value}")
        return float(value)
    if type(value) is not hint:
        raise UserError(f"{where}: {path} must be {_TYPE_NAMES[hint]}, got {_describe(value)}")
    return value


_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def _describe(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {value!r}"[:80]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _check(config: Config, where: str) -> None:
    """Everything a type cannot say. Raises UserError for the first rule that does not hold."""
    for rule, message in [*_model_rules(config.model), *_run_rules(config)]:
        if not rule:
            raise UserError(f"{where}: {message}")


_MODEL_POSITIVE = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim",
    "qk_rope_head_dim", "v_head_dim", "intermediate_size", "moe_intermediate_size", "n_routed_experts",
    "num_experts_per_tok", "n_group", "topk_group", "max_position_embeddings", "rope_theta", "rms_norm_eps",
    "routed_scaling_factor", "initializer_range",
)  # fmt: skip


def _model_rules(m: ModelConfig) -> list[tuple[bool, str]]:
    positive = [(getattr(m, n) > 0, f"model.{n} must be above 0, got {getattr(m, n)}") for n in _MODEL_POSITIVE]
    if not all(rule for rule, _ in positive):
        return positive
    per_group = m.n_routed_experts // m.n_group
    optional = [(getattr(m, n) or 1, n) for n in ("q_lora_rank", "embedding_rank", "embedding_initializer_range")]
    scaling_type = (m.rope_scaling or {}).get("type", (m.rope_scaling or {}).get("rope_type", "yarn"))
    return [
        *((value > 0, f"model.{name} must be above 0 or null, got {value}") for value, name in optional),
        (
            m.q_lora_rank != 0 and m.embedding_rank != 0,
            "model.q_lora_rank and embedding_rank must be above 0 or null, got 0",
        ),
        (
            m.qk_rope_head_dim % 2 == 0,
            f"model.qk_rope_head_dim must be even (it holds pairs), got {m.qk_rope_head_dim}",
        ),
        (m.n_shared_experts >= 0, f"model.n_shared_experts must be at least 0, got {m.n_shared_experts}"),
        (
            m.n_routed_experts % m.n_group == 0,
            f"model.n_group must divide n_routed_experts, got {m.n_group} groups of {m.n_routed_experts} experts",
        ),
        (m.topk_group <= m.n_group, f"model.topk_group must be at most n_group {m.n_group}, got {m.topk_group}"),
        (
            m.num_experts_per_tok <= per_group * m.topk_group,
            f"model.num_experts_per_tok must be at most the {per_group * m.topk_group} experts of topk_group groups, "
            f"got {m.num_experts_per_tok}",
        ),
        (
            0 <= m.first_k_dense_replace <= m.num_hidden_layers,
            f"model.first_k_dense_replace must be 0..{m.num_hidden_layers}, got {m.first_k_dense_replace}",
        ),
        (
            m.num_nextn_predict_layers >= 0,
            f"model.num_nextn_predict_layers must be at least 0, got {m.num_nextn_predict_layers}",
        ),
        (scaling_type == "yarn", f"model.rope_scaling.type is {scaling_type!r}; known: yarn"),
        (m.rope_scaling is None or "factor" in m.rope_scaling, "model.rope_scaling needs the key 'factor'"),
    ]


def _run_rules(c: Config) -> list[tuple[bool, str]]:
    d, t, r, s = c.data, c.train, c.runtime, c.suite
    positive = [
        ("data.max_articles", d.max_articles), ("data.sequence_length", d.sequence_length), ("data.facts", d.facts),
        ("train.steps", t.steps), ("train.batch_size", t.batch_size), ("train.learning_rate", t.learning_rate),
        ("train.muon_learning_rate", t.muon_learning_rate), ("train.eps", t.eps), ("train.grad_clip", t.grad_clip),
        ("train.log_every", t.log_every), ("train.max_bad_steps", t.max_bad_steps), ("suite.target_seconds", s.target_seconds),
        ("suite.full_training_steps", s.full_training_steps), ("suite.max_new_tokens", s.max_new_tokens),
        *((f"data.boost.{topic}", weight) for topic, weight in d.boost.items()),
    ]  # fmt: skip
    at_least_0 = [
        ("seed", c.seed), ("train.weight_decay", t.weight_decay), ("train.warmup_steps", t.warmup_steps),
        ("train.bias_update_speed", t.bias_update_speed), ("train.mtp_loss_weight", t.mtp_loss_weight),
        ("train.checkpoint_every", t.checkpoint_every),
    ]  # fmt: skip
    unit = [("train.beta1", t.beta1), ("train.beta2", t.beta2)]
    return [
        *((value > 0, f"{name} must be above 0, got {value}") for name, value in positive),
        *((value >= 0, f"{name} must be at least 0, got {value}") for name, value in at_least_0),
        *((0 <= value < 1, f"{name} must be in [0, 1), got {value}") for name, value in unit),
        (0 <= t.final_lr_ratio <= 1, f"train.final_lr_ratio must be in [0, 1], got {t.final_lr_ratio}"),
        (t.embedding_learning_rate is None or t.embedding_learning_rate > 0,
         f"train.embedding_learning_rate must be above 0 or null, got {t.embedding_learning_rate}"),
        (r.threads is None or r.threads > 0, f"runtime.threads must be above 0 or null, got {r.threads}"),
        (d.sequence_length <= c.model.max_position_embeddings,
         f"data.sequence_length {d.sequence_length} exceeds model.max_position_embeddings {c.model.max_position_embeddings}"),
        (r.device == "cuda" or r.dtype == "float32", f"runtime.dtype is {r.dtype!r}; known on the cpu: float32"),
    ]  # fmt: skip
