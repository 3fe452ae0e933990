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
import operator
import types
import typing
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from dsfast.errors import UserError, choices
from dsfast.files import read_json
from dsfast.huggingface_config import SCALING_TYPES, model_section

OPERATORS = (
    "rms_norm", "rope", "embedding", "mla_attention", "mla_decode", "moe_route", "moe_experts", "swiglu_mlp",
    "linear_cross_entropy", "adamw", "muon", "newton_schulz",
)  # fmt: skip
"""The names that `runtime.kernels` may hold, beside "default"."""

CONFIGS = Path(str(files("dsfast.configs")))
"""The folder of the shipped configs."""

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
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
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

    @property
    def matrix_elements(self) -> int:
        """How many parameters the matrices have together: all but the norms'."""
        d, v, r = self.hidden_size, self.vocab_size, self.embedding_rank
        embedding = v * d if r is None else (v + d) * r
        head = 0 if self.tie_word_embeddings else v * d
        return embedding + head + self.layer_elements(self.n_routed_experts)

    def layer_elements(self, routed: int) -> int:
        """Elements of all layers' matrices, MTP modules included, counting `routed` of each layer's routed experts."""
        d, h, kv, q = self.hidden_size, self.num_attention_heads, self.kv_lora_rank, self.q_lora_rank
        queries = h * self.qk_head_dim
        attention = d * queries if q is None else q * (d + queries)
        attention += d * (kv + self.qk_rope_head_dim) + h * kv * (self.qk_nope_head_dim + self.v_head_dim)
        attention += h * self.v_head_dim * d
        moe = 3 * d * self.moe_intermediate_size * (routed + self.n_shared_experts) + d * self.n_routed_experts
        dense, mtp = self.first_k_dense_replace, self.num_nextn_predict_layers
        blocks = (self.num_hidden_layers + mtp) * attention + (self.num_hidden_layers - dense + mtp) * moe
        return blocks + dense * 3 * d * self.intermediate_size + mtp * 2 * d * d


@dataclass(frozen=True)
class DataConfig:
    """What is read. `boost` maps a topic to how many times as often its facts are written.

    `facts` and `boost` are about the encyclopedia, and mean nothing for another source.
    """

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
    """Where and how it runs. `kernels` maps an operator (or "default") to an implementation.

    dtype: what the model computes in; "auto" is bfloat16 where that is faster, else float32 (dsfast.model.precision).

    whole_step: on the CPU, take a training step in one native call where every operator runs natively anyway.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    kernels: dict[str, Implementation] = field(default_factory=dict)
    threads: int | None = None
    whole_step: bool = True


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

    def replace(self, *, where: str = "config", **changes: Any) -> Config:
        """A checked copy with dotted names set: `config.replace(**{"train.steps": 20})`.

        Raises UserError as from_dict does; `where` names what the changes come from, such as a flag.
        """
        values = self.to_dict()
        for name, value in changes.items():
            *sections, key = name.split(".")
            target = values
            for section in sections:
                if not isinstance(target.get(section), dict):
                    raise UserError(f"{where}: unknown key {name!r}; {choices(target)}")
                target = target[section]
            target[key] = value
        return Config.from_dict(values, where)

    def hash(self) -> str:
        """SHA-256 of the canonical JSON; equal configs have equal hashes."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def default_config(device: str = "cpu") -> Config:
    """The shipped config of the 500K model, for "cpu" or "gpu"."""
    return load_config(CONFIGS / f"deepseek_v3_test_run_{device}.json")


def load_config(path: str | Path) -> Config:
    """Read a dsfast config or a published DeepSeek-V3 config.json. Raises UserError."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, got {_describe(values)}")
    if values.get("model_type") == "deepseek_v3":
        model = model_section(values, str(path))
        # The default row must fit the model's context; a context that is not a number is reported by from_dict.
        context = model.get("max_position_embeddings")
        rows = min(DataConfig.sequence_length, context) if isinstance(context, int) else DataConfig.sequence_length
        values = {"name": Path(path).stem, "model": model, "data": {"sequence_length": rows}}
    elif "model_type" in values:
        raise UserError(f"{path}: model_type is {values['model_type']!r}; expected 'deepseek_v3'")
    return Config.from_dict(values, str(path))


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
    if type(value) is int and value.bit_length() > 63:
        raise UserError(f"{where}: {path} must be a number of at most 64 bits, got one of {value.bit_length() + 1}")
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
    for words, bound, names in _BOUNDS:
        for name in names:
            value = operator.attrgetter(name)(config)
            if value is not None and not _COMPARE[words](value, bound):
                raise UserError(f"{where}: {name} must be {words} {bound}, got {value}")
    for holds, message in [*_model_rules(config.model), *_run_rules(config)]:
        if not holds:
            raise UserError(f"{where}: {message}")


_COMPARE = {
    "above": operator.gt,
    "null or above": operator.gt,
    "at least": operator.ge,
    "at most": operator.le,
    "below": operator.lt,
}
_SIZES = (
    "model.vocab_size", "model.hidden_size", "model.num_attention_heads", "model.kv_lora_rank", "model.qk_nope_head_dim",
    "model.qk_rope_head_dim", "model.v_head_dim", "model.intermediate_size", "model.moe_intermediate_size",
    "model.max_position_embeddings",
)  # fmt: skip
_RANKS = ("model.q_lora_rank", "model.embedding_rank")
_EXPERTS = ("model.n_routed_experts", "model.num_experts_per_tok", "model.n_group", "model.topk_group")
_COUNTS = (
    "data.max_articles", "data.facts", "data.sequence_length", "train.steps", "train.batch_size", "train.max_bad_steps",
    "train.log_every", "suite.full_training_steps", "suite.max_new_tokens",
)  # fmt: skip
_FACTORS = (
    "model.routed_scaling_factor", "model.initializer_range", "model.embedding_initializer_range", "train.learning_rate",
    "train.embedding_learning_rate", "train.muon_learning_rate", "train.weight_decay", "train.bias_update_speed",
    "train.mtp_loss_weight", "train.eps",
)  # fmt: skip
_COUNTS_FROM_0 = ("train.warmup_steps", "train.checkpoint_every")
# (words, bound, dotted names); checked in this order. Upper bounds lie far above any use: they are there so that a
# slip of the keyboard ends in a line and not in an allocator or an int32.
_BOUNDS: tuple[tuple[str, float, tuple[str, ...]], ...] = (
    ("above", 0, (*_SIZES, "model.num_hidden_layers", *_EXPERTS)),
    ("above", 0, ("model.routed_scaling_factor", "model.initializer_range")),
    ("above", 1, ("model.rope_theta",)),
    ("null or above", 0, (*_RANKS, "model.embedding_initializer_range")),
    ("at least", 0, ("model.n_shared_experts", "model.first_k_dense_replace", "model.num_nextn_predict_layers")),
    ("at most", 2**24, (*_SIZES, *_RANKS)),
    ("at most", 2**16, (*_EXPERTS, "model.n_shared_experts")),
    ("at most", 10_000, ("model.num_hidden_layers", "model.num_nextn_predict_layers")),
    ("at least", 0, ("seed", *_COUNTS_FROM_0)),
    ("above", 0, _COUNTS),
    ("at most", 2**31 - 1, (*_COUNTS, *_COUNTS_FROM_0)),
    ("above", 0, ("train.learning_rate", "train.muon_learning_rate")),
    ("at least", 1e-30, ("train.grad_clip", "model.rms_norm_eps")),  # below, float32 loses it or what it scales
    ("at least", 1e-18, ("train.eps",)),  # a GPU's root is 0 of what float32 keeps as a denormal, below 1e-38
    ("null or above", 0, ("train.embedding_learning_rate",)),
    ("at least", 0, ("train.weight_decay", "train.bias_update_speed", "train.mtp_loss_weight")),
    ("at most", 1, ("model.rms_norm_eps",)),
    ("at most", 1e6, _FACTORS),
    ("at least", 0, ("train.beta1", "train.beta2", "train.final_lr_ratio")),
    ("below", 1, ("train.beta1", "train.beta2")),
    ("at most", 1, ("train.final_lr_ratio",)),
    ("null or above", 0, ("runtime.threads",)),
    ("at most", 4096, ("runtime.threads",)),
    ("above", 0, ("suite.target_seconds",)),
)
_SCALING_FROM_0 = ("mscale", "mscale_all_dim", "attention_factor")
_SCALING_ABOVE_0 = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
_MOST_PARAMETERS = 10**12
_MOST_TOKENS = 2**31 - 1  # the kernels count the tokens of a batch in 32 bits
_MOST_BOOST = 1000


def _model_rules(m: ModelConfig) -> list[tuple[bool, str]]:
    candidates = m.n_routed_experts // m.n_group * m.topk_group
    return [
        (m.qk_rope_head_dim % 2 == 0,
         f"model.qk_rope_head_dim must be even (it holds pairs), got {m.qk_rope_head_dim}"),
        (m.n_routed_experts % m.n_group == 0,
         f"model.n_group must divide n_routed_experts, got {m.n_group} groups of {m.n_routed_experts} experts"),
        (m.topk_group <= m.n_group, f"model.topk_group must be at most n_group {m.n_group}, got {m.topk_group}"),
        (m.num_experts_per_tok <= candidates,
         f"model.num_experts_per_tok must be at most the {candidates} experts of topk_group groups, "
         f"got {m.num_experts_per_tok}"),
        (m.first_k_dense_replace <= m.num_hidden_layers,
         f"model.first_k_dense_replace must be 0..{m.num_hidden_layers}, got {m.first_k_dense_replace}"),
        *(_scaling_rules(m.rope_scaling) if m.rope_scaling is not None else []),
        (m.matrix_elements <= _MOST_PARAMETERS,
         f"model has {m.matrix_elements:,} parameters by its sizes; at most {_MOST_PARAMETERS:,} are supported"),
    ]  # fmt: skip


def _scaling_rules(scaling: dict[str, float | str]) -> list[tuple[bool, str]]:
    kinds = [scaling[name] for name in SCALING_TYPES if name in scaling] or ["yarn"]
    known = (*SCALING_TYPES, *_SCALING_ABOVE_0, *_SCALING_FROM_0)
    numbers = [(name, value) for name, value in scaling.items() if name not in SCALING_TYPES]
    return [
        *((name in known, f"model.rope_scaling: unknown key {name!r}; {choices(known)}") for name in scaling),
        (kinds[0] == kinds[-1],
         f"model.rope_scaling: type and rope_type mean the same, but are {kinds[0]!r} and {kinds[-1]!r}; expected one of them"),
        (kinds[0] == "yarn", f"model.rope_scaling.type is {kinds[0]!r}; known: yarn"),
        ("factor" in scaling, "model.rope_scaling needs the key 'factor'"),
        *((isinstance(value, float), f"model.rope_scaling.{name} must be a number, got {value!r}") for name, value in numbers),
        *((_in_range(value, name in _SCALING_FROM_0),
           f"model.rope_scaling.{name} must be {'0 or ' * (name in _SCALING_FROM_0)}1e-9..1e9, got {value}")
          for name, value in numbers),
    ]  # fmt: skip


def _in_range(value: float | str, may_be_0: bool) -> bool:
    return isinstance(value, float) and (1e-9 <= value <= 1e9 or (may_be_0 and value == 0))


def _run_rules(c: Config) -> list[tuple[bool, str]]:
    d, t, r = c.data, c.train, c.runtime
    kernels = (*OPERATORS, "default")
    return [
        (bool(d.source.strip()), f"data.source must be 'encyclopedia' or name a file or folder, got {d.source!r}"),
        (d.sequence_length <= c.model.max_position_embeddings,
         f"data.sequence_length {d.sequence_length} exceeds model.max_position_embeddings {c.model.max_position_embeddings}"),
        (t.batch_size * d.sequence_length <= _MOST_TOKENS,
         f"train.batch_size times data.sequence_length must be at most {_MOST_TOKENS} tokens, "
         f"got {t.batch_size} times {d.sequence_length}"),
        *((1 <= weight <= _MOST_BOOST, f"data.boost.{topic} must be 1..{_MOST_BOOST}, got {weight}")
          for topic, weight in d.boost.items()),
        *((name in kernels, f"runtime.kernels: unknown operator {name!r}; {choices(kernels)}") for name in r.kernels),
    ]  # fmt: skip
