"""What a config may hold: every bound, every type, every way in which a file can be wrong."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path

import pytest
import torch
from tiny_models import SIZES, YARN

from dsfast.config import OPERATORS, Config, ModelConfig, default_config, load_config
from dsfast.errors import UserError
from dsfast.files import read_json
from dsfast.model import DeepseekV3

CONFIGS = Path(__file__).parents[1] / "configs"
BASE = Config.from_dict({"model": SIZES, "data": {"sequence_length": 16}})
COUNT, SIZE, GROUP, DEPTH = 2**31 - 1, 2**24, 2**16, 10_000
TINY = 1e-300

# Dotted name: (bad, smallest good, largest good, bad); None where no bound is. A set of other changes may follow,
# without which another rule would speak first.
BOUNDS = {
    "seed": (-1, 0, 2**63 - 1, 2**63),
    "model.vocab_size": (0, 1, SIZE, SIZE + 1),
    "model.hidden_size": (0, 1, SIZE, SIZE + 1),
    "model.num_hidden_layers": (0, 1, DEPTH, DEPTH + 1),
    "model.num_attention_heads": (0, 1, SIZE, SIZE + 1),
    "model.kv_lora_rank": (0, 1, SIZE, SIZE + 1),
    "model.qk_nope_head_dim": (0, 1, SIZE, SIZE + 1),
    "model.qk_rope_head_dim": (0, 2, SIZE, SIZE + 2),
    "model.v_head_dim": (0, 1, SIZE, SIZE + 1),
    "model.intermediate_size": (0, 1, SIZE, SIZE + 1),
    "model.moe_intermediate_size": (0, 1, SIZE, SIZE + 1),
    "model.n_routed_experts": (0, 1, GROUP, GROUP + 1, {"model.num_experts_per_tok": 1}),
    "model.n_shared_experts": (-1, 0, GROUP, GROUP + 1),
    "model.num_experts_per_tok": (0, 1, 6, 7),
    "model.q_lora_rank": (0, 1, SIZE, SIZE + 1),
    "model.n_group": (0, 1, 3, 4, {"model.topk_group": 1}),
    "model.topk_group": (0, 1, 3, 4, {"model.n_group": 3}),
    "model.routed_scaling_factor": (0.0, TINY, 1e6, 1.1e6),
    "model.first_k_dense_replace": (-1, 0, 2, 3),
    "model.max_position_embeddings": (0, 1, SIZE, SIZE + 1, {"data.sequence_length": 1}),
    "model.rope_theta": (1.0, 1.001, None, None),
    "model.rms_norm_eps": (9e-31, 1e-30, 1.0, 1.1),
    "model.num_nextn_predict_layers": (-1, 0, DEPTH, DEPTH + 1),
    "model.initializer_range": (0.0, TINY, 1e6, 1.1e6),
    "model.embedding_rank": (0, 1, SIZE, SIZE + 1),
    "model.embedding_initializer_range": (0.0, TINY, 1e6, 1.1e6),
    "data.max_articles": (0, 1, COUNT, COUNT + 1),
    "data.facts": (0, 1, COUNT, COUNT + 1),
    "data.sequence_length": (0, 1, SIZES["max_position_embeddings"], SIZES["max_position_embeddings"] + 1),
    "train.steps": (0, 1, COUNT, COUNT + 1),
    "train.batch_size": (0, 1, COUNT // 16, COUNT // 16 + 1),
    "train.learning_rate": (0.0, TINY, 1e6, 1.1e6),
    "train.embedding_learning_rate": (0.0, TINY, 1e6, 1.1e6),
    "train.muon_learning_rate": (0.0, TINY, 1e6, 1.1e6),
    "train.beta1": (-TINY, 0.0, 0.999, 1.0),
    "train.beta2": (-TINY, 0.0, 0.999, 1.0),
    "train.eps": (9e-19, 1e-18, 1e6, 1.1e6),
    "train.weight_decay": (-TINY, 0.0, 1e6, 1.1e6),
    "train.grad_clip": (9e-31, 1e-30, None, None),
    "train.warmup_steps": (-1, 0, COUNT, COUNT + 1),
    "train.final_lr_ratio": (-TINY, 0.0, 1.0, 1.001),
    "train.bias_update_speed": (-TINY, 0.0, 1e6, 1.1e6),
    "train.mtp_loss_weight": (-TINY, 0.0, 1e6, 1.1e6),
    "train.checkpoint_every": (-1, 0, COUNT, COUNT + 1),
    "train.max_bad_steps": (0, 1, COUNT, COUNT + 1),
    "train.log_every": (0, 1, COUNT, COUNT + 1),
    "runtime.threads": (0, 1, 4096, 4097),
    "suite.target_seconds": (0.0, TINY, None, None),
    "suite.full_training_steps": (0, 1, COUNT, COUNT + 1),
    "suite.max_new_tokens": (0, 1, COUNT, COUNT + 1),
    # entries of dictionaries
    "data.boost.history": (0, 1, 1000, 1001),
    "model.rope_scaling.factor": (1e-10, 1e-9, 1e9, 1.1e9, {"model.rope_scaling": YARN}),
}


def fields(cls: type = Config, prefix: str = "") -> dict[str, tuple[type, bool]]:
    """Dotted name -> (type, whether null is allowed) of every leaf of the config."""
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
        if dataclasses.is_dataclass(hint):
            found |= fields(hint, f"{prefix}{name}.")
        elif typing.get_origin(hint) in (dict, typing.Literal):
            found[prefix + name] = (typing.get_origin(hint), False)
        else:
            found[prefix + name] = (typing.get_origin(kinds[0]) or kinds[0], type(None) in typing.get_args(hint))
    return found


FIELDS = fields()


def value_at(config: Config, name: str):
    value = config.to_dict()
    for key in name.split("."):
        value = value[key]
    return value


def write(folder: Path, text: str) -> Path:
    path = folder / "run.json"
    path.write_text(text, encoding="utf-8")
    return path


DEFAULTS = {
    "first_k_dense_replace": 0, "n_group": 1, "q_lora_rank": None, "routed_scaling_factor": 1.0, "topk_group": 1,
}  # fmt: skip


def published(folder: Path, **changes) -> Path:
    """A flat config as Hugging Face writes them."""
    return write(folder, json.dumps({"model_type": "deepseek_v3", **DEFAULTS, **SIZES, **changes}))


class TestBounds:
    def test_every_number_has_a_row(self):
        numbers = {name for name, (kind, _) in FIELDS.items() if kind in (int, float)}
        assert numbers == {name for name in BOUNDS if name in FIELDS}

    @pytest.mark.parametrize("name", BOUNDS)
    def test_just_inside_and_just_outside(self, name):
        low, least, most, high, *others = BOUNDS[name]
        config = BASE.replace(**others[0]) if others else BASE
        for good in (least, most):
            if good is not None:
                assert value_at(config.replace(**{name: good}), name) == good
        for bad in (low, high):
            if bad is not None:
                with pytest.raises(UserError, match=rf"^here: {name} ") as caught:
                    config.replace(where="here", **{name: bad})
                assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("name", [name for name, (_, nullable) in FIELDS.items() if nullable])
    def test_null_where_it_is_allowed(self, name):
        assert value_at(BASE.replace(**{name: None}), name) is None

    def test_messages(self):
        for changes, message in (
            ({"train.steps": 0}, "config: train.steps must be above 0, got 0"),
            ({"train.beta1": 1}, "config: train.beta1 must be below 1, got 1.0"),
            ({"model.embedding_rank": 0}, "config: model.embedding_rank must be null or above 0, got 0"),
            ({"runtime.threads": 5000}, "config: runtime.threads must be at most 4096, got 5000"),
            ({"seed": -1}, "config: seed must be at least 0, got -1"),
            ({"seed": 2**70}, "config: seed must be a number of at most 64 bits, got one of 72"),
            ({"data.boost.history": 0}, "config: data.boost.history must be 1..1000, got 0"),
        ):
            with pytest.raises(UserError) as caught:
                BASE.replace(**changes)
            assert str(caught.value) == message


# Changes that no bound of one field excludes -> the complaint.
RELATIONS = {
    "odd rope width": ({"model.qk_rope_head_dim": 5}, "qk_rope_head_dim must be even .*got 5"),
    "groups do not divide": ({"model.n_group": 4}, "n_group must divide n_routed_experts, got 4 groups of 6"),
    "more groups chosen than are": ({"model.topk_group": 2}, "topk_group must be at most n_group 1, got 2"),
    "top-k above one group's experts": (
        {"model.n_group": 3, "model.num_experts_per_tok": 3}, "num_experts_per_tok must be at most the 2 experts .*got 3",
    ),
    "more dense layers than layers": ({"model.first_k_dense_replace": 3}, r"first_k_dense_replace must be 0\.\.2, got 3"),
    "another scaling": ({"model.rope_scaling": {"type": "linear", "factor": 2}}, "type is 'linear'; known: yarn"),
    "another scaling, new name": ({"model.rope_scaling": {"rope_type": "longrope", "factor": 2}}, "known: yarn"),
    "scaling of two kinds": (
        {"model.rope_scaling": YARN | {"rope_type": "linear"}},
        "type and rope_type mean the same, but are 'yarn' and 'linear'; expected one of them$",
    ),
    "scaling without a factor": ({"model.rope_scaling": {"type": "yarn"}}, "needs the key 'factor'"),
    "scaling by an unknown key": ({"model.rope_scaling": YARN | {"betafast": 32}}, "rope_scaling: unknown key 'betafast'"),
    "scaling by a text": ({"model.rope_scaling": YARN | {"factor": "8"}}, "rope_scaling.factor must be a number, got '8'"),
    "scaling by 0": ({"model.rope_scaling": YARN | {"factor": 0}}, r"factor must be 1e-9\.\.1e9, got 0"),
    "scaling from below 0": ({"model.rope_scaling": YARN | {"mscale": -1}}, r"mscale must be 0 or 1e-9\.\.1e9, got -1"),
    "empty scaling": ({"model.rope_scaling": {}}, "needs the key 'factor'"),
    "row longer than the context": ({"data.sequence_length": 264}, "sequence_length 264 exceeds .*263"),
    "batch beyond 32 bits": (
        {"train.batch_size": 2**23, "data.sequence_length": 256}, "batch_size times data.sequence_length .*2147483647",
    ),
    "unknown operator": ({"runtime.kernels": {"ropee": "native"}}, "runtime.kernels: unknown operator 'ropee'; .*rope, "),
    "unknown implementation": ({"runtime.kernels": {"rope": "fast"}}, "kernels.rope is 'fast'; known: auto, native"),
    "more parameters than anyone trains": (
        {"model.hidden_size": 10**5, "model.vocab_size": 10**7, "model.tie_word_embeddings": False},
        r"2,\d{3},\d{3},\d{3},\d{3} parameters .*at most 1,000,000,000,000",
    ),
    **{
        f"impossible {name}": ({f"model.{name}": 10**15}, f"model.{name} must be at most")
        for name in ("hidden_size", "vocab_size", "n_routed_experts", "num_hidden_layers")
    },
}  # fmt: skip


class TestRelations:
    @pytest.mark.parametrize("case", RELATIONS)
    def test_refused(self, case):
        changes, message = RELATIONS[case]
        with pytest.raises(UserError, match=f"^here: .*{message}"):
            BASE.replace(where="here", **changes)

    @pytest.mark.parametrize(
        "changes",
        [
            {"model.n_group": 3, "model.topk_group": 2, "model.num_experts_per_tok": 4},
            {"model.rope_scaling": YARN},
            {"model.rope_scaling": {"rope_type": "yarn", "factor": 2}},
            {"data.sequence_length": 263},
            {"train.batch_size": 2**23 - 1, "data.sequence_length": 256},
            {"train.batch_size": 2**31 - 1, "data.sequence_length": 1},
            {"runtime.device": "cuda", "runtime.dtype": "bfloat16"},
            {"runtime.kernels": dict.fromkeys([*OPERATORS, "default"], "reference")},
        ],
        ids=str,
    )
    def test_just_inside(self, changes):
        config = BASE.replace(**changes)
        assert all(value_at(config, name) == value for name, value in changes.items())

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"embedding_rank": 8},
            {"tie_word_embeddings": False, "embedding_rank": 8},
            {"q_lora_rank": 9, "tie_word_embeddings": False, "first_k_dense_replace": 1, "num_nextn_predict_layers": 2},
            {"first_k_dense_replace": 2, "n_shared_experts": 3},
        ],
        ids=str,
    )
    def test_matrix_elements_are_those_of_the_model(self, changes):
        config = ModelConfig(**(SIZES | changes))
        with torch.device("meta"):
            parameters = list(DeepseekV3(config).parameters())
        assert config.matrix_elements == sum(p.numel() for p in parameters if p.ndim > 1)


# Of each type, values that another language or a careless hand would have taken for it.
MISTYPED = {
    int: ["1", 1.0, True, None, [1], {}],
    float: ["1", True, None, [1.0], {}],
    bool: [0, 1, "true", None, []],
    str: [1, True, None, ["a"], {}],
    dict: [1, "a", None, [], True],
    typing.Literal: [1, "nothing known", None, ["adamw"], {}],
}


class TestTypes:
    @pytest.mark.parametrize("name", FIELDS)
    def test_mistyped(self, name):
        kind, nullable = FIELDS[name]
        for value in MISTYPED[kind]:
            if not (nullable and value is None):
                with pytest.raises(UserError, match=rf"^here: {name} (must be|is) "):
                    BASE.replace(where="here", **{name: value})

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("train.steps", "200", "train.steps must be a whole number, got str '200'"),
            ("train.steps", 2.0, "train.steps must be a whole number, got float 2.0"),
            ("train.grad_clip", True, "train.grad_clip must be a number, got bool True"),
            ("model.norm_topk_prob", 1, "model.norm_topk_prob must be true or false, got int 1"),
            ("name", None, "name must be a string, got null"),
            ("data", [], "data must be an object, got list []"),
            ("data.boost", {"history": 1.5}, "data.boost.history must be a whole number, got float 1.5"),
            ("model.rope_scaling", {"factor": [2]}, r"model.rope_scaling.factor must be a number, got list [2]"),
            ("train.optimizer", "sgd", "train.optimizer is 'sgd'; known: adamw, muon"),
        ],
    )
    def test_messages(self, name, value, message):
        with pytest.raises(UserError) as caught:
            BASE.replace(**{name: value})
        assert str(caught.value) == f"config: {message}"

    def test_a_whole_number_is_a_float_where_one_is_wanted(self):
        value = BASE.replace(**{"train.grad_clip": 2}).train.grad_clip
        assert (value, type(value)) == (2.0, float)

    @pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
    def test_floats_are_finite(self, value):
        with pytest.raises(UserError, match=r"train.learning_rate must be finite"):
            BASE.replace(**{"train.learning_rate": value})

    @pytest.mark.parametrize("name", ["seed", "train.learning_rate", "name", "runtime.device", "runtime.threads"])
    @pytest.mark.parametrize("value", [2**63, -(2**70), 10**400, 10**5000], ids=int.bit_length)
    def test_huge_whole_numbers(self, name, value):
        with pytest.raises(UserError, match=rf"^config: {name} must be a number of at most 64 bits") as caught:
            BASE.replace(**{name: value})
        assert len(str(caught.value)) < 100


class TestKeys:
    def test_unknown(self):
        with pytest.raises(UserError, match=r"^config: unknown key 'trian'; known: data, model, name, .*, train$"):
            Config.from_dict({"model": SIZES, "trian": {}})
        with pytest.raises(UserError, match=r"^config: unknown key 'train.stepz'; known: .*steps"):
            Config.from_dict({"model": SIZES, "train": {"stepz": 1}})

    @pytest.mark.parametrize(
        "name", [f.name for f in dataclasses.fields(ModelConfig) if f.default is dataclasses.MISSING]
    )
    def test_missing(self, name):
        with pytest.raises(UserError, match=f"^config: missing key 'model.{name}'$"):
            Config.from_dict({"model": {key: value for key, value in SIZES.items() if key != name}})

    def test_missing_model(self):
        with pytest.raises(UserError, match=r"^config: missing key 'model'$"):
            Config.from_dict({})


class TestReplace:
    def test_changes_what_is_named_alone(self):
        values = BASE.to_dict()
        changed = BASE.replace(seed=7, **{"train.steps": 3, "data.boost.history": 2})
        values["seed"], values["train"]["steps"], values["data"]["boost"] = 7, 3, {"history": 2}
        assert changed.to_dict() == values
        assert BASE.seed == 0
        assert BASE.data.boost == {}

    @pytest.mark.parametrize(
        ("name", "known"),
        [
            ("trian.steps", "data, model, name"),
            ("train.steps.more", "batch_size, beta1"),
            ("name.steps", "data, model, name"),
            ("model.rope_scaling.factor", "embedding_initializer_range"),
            ("stepz", "data, model, name"),
            ("train.stepz", "batch_size, beta1"),
        ],
    )
    def test_unknown_section_or_key(self, name, known):
        with pytest.raises(UserError, match=rf"^config: unknown key '{name}'; known: .*{known}"):
            BASE.replace(**{name: 1})

    def test_says_where(self):
        with pytest.raises(UserError, match=r"^--seed: seed must be at least 0, got -1$"):
            BASE.replace(where="--seed", seed=-1)

    def test_equal_configs_have_equal_hashes(self):
        assert BASE.replace().hash() == BASE.hash()
        assert BASE.replace(seed=1).hash() != BASE.hash()
        kernels = {"rope": "reference", "adamw": "native"}
        one, other = (
            BASE.replace(**{"runtime.kernels": dict(order)}) for order in (kernels.items(), [*kernels.items()][::-1])
        )
        assert list(one.runtime.kernels) != list(other.runtime.kernels)
        assert one == other
        assert one.hash() == other.hash()


class TestShipped:
    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_loads_and_survives_a_round_trip(self, device, tmp_path):
        path = CONFIGS / f"deepseek_v3_test_run_{'gpu' if device == 'cuda' else device}.json"
        config = load_config(path)
        assert config.runtime.device == device
        assert config.name == path.stem
        assert load_config(write(tmp_path, json.dumps(config.to_dict()))) == config

    def test_there_are_no_others(self):
        assert len(list(CONFIGS.glob("*.json"))) == 2


# Text of a file -> the complaint after its name.
BROKEN_FILES = {
    "duplicate key": ('{"seed": 1, "seed": 1}', "key 'seed' stands twice in one object"),
    "duplicate key below": ('{"train": {"steps": 1, "eps": 1, "steps": 2}}', "key 'steps' stands twice"),
    "NaN": ('{"seed": NaN}', "NaN is not a JSON number"),
    "Infinity": ('{"seed": Infinity}', "Infinity is not a JSON number"),
    "-Infinity": ('{"seed": -Infinity}', "-Infinity is not a JSON number"),
    "comma": ('{"seed": 1,}', "not valid JSON: .* at line 1, column"),
    "empty": ("", "not valid JSON: .* at line 1, column 1"),
    "surrogate in a value": (r'{"name": "abc\ud800"}', r"half of a surrogate pair.*abc\\ud800"),
    "surrogate in a key": (r'{"\udfff": 1}', r"half of a surrogate pair.*\\udfff"),
    "surrogate in a list": (r'{"full": [{"aliases": ["\ud83d x"]}]}', r"half of a surrogate pair.*\\ud83d"),
    "5,000 digits": ('{"seed": 1' + "0" * 5000 + "}", "a whole number with too many digits"),
    "nested too deeply": ("[" * 200_000 + "]" * 200_000, "nested too deeply"),
    "objects nested too deeply": ('{"a":' * 200_000 + "1" + "}" * 200_000, "nested too deeply"),
}


class TestFiles:
    @pytest.mark.parametrize("case", BROKEN_FILES)
    def test_broken(self, case, tmp_path):
        text, message = BROKEN_FILES[case]
        path = write(tmp_path, text)
        for read in (read_json, load_config):
            with pytest.raises(UserError, match=rf"run\.json: {message}") as caught:
                read(path)
            assert str(caught.value).startswith(str(path))
            str(caught.value).encode()

    def test_a_byte_order_mark_is_passed_over(self, tmp_path):
        assert read_json(write(tmp_path, '\ufeff{"seed": 3}')) == {"seed": 3}

    def test_a_whole_surrogate_pair_is_a_character(self, tmp_path):
        assert read_json(write(tmp_path, r'["\ud83d\ude00"]')) == ["\U0001f600"]

    @pytest.mark.parametrize(("mark", "byte"), [(b"", 10), (b"\xef\xbb\xbf", 13)])
    def test_not_utf8(self, tmp_path, mark, byte):
        path = tmp_path / "run.json"
        path.write_bytes(mark + b'{"name": "\xff"}')
        with pytest.raises(UserError, match=rf"run\.json: not UTF-8 text \(byte {byte}\)"):
            load_config(path)

    def test_unreadable(self, tmp_path):
        for path in (tmp_path / "absent.json", tmp_path):
            with pytest.raises(UserError, match=f"^{path}: cannot be read: "):
                load_config(path)

    @pytest.mark.parametrize("text", ["[]", "3", "null", '"text"'])
    def test_not_an_object(self, text, tmp_path):
        with pytest.raises(UserError, match=r"run\.json: expected a JSON object, got "):
            load_config(write(tmp_path, text))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("1" + "0" * 400, "train.grad_clip must be a number of at most 64 bits"),
            ("1e999", "train.grad_clip must be finite, got inf"),
        ],
    )
    def test_numbers_beyond_a_float(self, text, message, tmp_path):
        sizes = json.dumps(SIZES)
        with pytest.raises(UserError, match=rf"run\.json: {message}"):
            load_config(write(tmp_path, f'{{"model": {sizes}, "train": {{"grad_clip": {text}}}}}'))


class TestPublished:
    def test_loads(self, tmp_path):
        config = load_config(published(tmp_path, torch_dtype="bfloat16", architectures=["X"], hidden_act="silu"))
        assert config.model == ModelConfig(**SIZES)
        assert config.name == "run"
        assert config.data.sequence_length == 256

    def test_short_context_shortens_the_rows(self, tmp_path):
        assert load_config(published(tmp_path, max_position_embeddings=9)).data.sequence_length == 9

    @pytest.mark.parametrize(
        ("rope", "theta", "scaling"),
        [
            ({"rope_theta": 500.0, "rope_type": "default"}, 500.0, None),
            ({}, 10000.0, None),
            (None, 10000.0, None),
            ({"rope_type": "yarn", "factor": 4, "rope_theta": 5}, 5.0, {"rope_type": "yarn", "factor": 4.0}),
        ],
    )
    def test_rope_parameters(self, rope, theta, scaling, tmp_path):
        model = load_config(published(tmp_path, rope_parameters=rope)).model
        assert (model.rope_theta, model.rope_scaling) == (theta, scaling)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"attention_bias": True}, "attention_bias is True; dsfast supports False only"),
            ({"attention_dropout": 0.1}, "attention_dropout is 0.1; dsfast supports 0.0 only"),
            ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; dsfast supports 'silu' only"),
            ({"moe_layer_freq": 2}, "moe_layer_freq is 2; dsfast supports 1 only"),
            ({"rope_interleave": False}, "rope_interleave is False; dsfast supports True only"),
            ({"scoring_func": "tanh"}, "model.scoring_func is 'tanh'; known: sigmoid, softmax"),
            ({"topk_method": "greedy"}, "topk_method is 'greedy'; dsfast supports 'noaux_tc' only"),
            ({"num_key_value_heads": 1}, "num_key_value_heads is 1; .* must equal num_attention_heads"),
            ({"rope_parameters": 3}, "rope_parameters must be an object or null, got 3"),
            ({"rope_parameters": "yarn"}, "rope_parameters must be an object or null, got 'yarn'"),
            ({"rope_parameters": {"rope_theta": "a"}}, "model.rope_theta must be a number"),
            (
                {"rope_parameters": {"type": "yarn", "rope_type": "default", "factor": 2}},
                "model.rope_scaling: type and rope_type ",
            ),
            (
                {"rope_parameters": {"type": "default", "rope_type": "yarn", "factor": 2}},
                "model.rope_scaling: type and rope_type ",
            ),
            (
                {"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2}},
                "model.rope_scaling: type and rope_type ",
            ),
            ({"rope_scaling": 3}, "model.rope_scaling must be an object, got int 3"),
            (
                {"rope_parameters": {"rope_type": "llama3", "factor": 2}},
                "model.rope_scaling.type is 'llama3'; known: yarn",
            ),
            ({"max_position_embeddings": "many"}, "model.max_position_embeddings must be a whole number"),
            ({"max_position_embeddings": 0}, "model.max_position_embeddings must be above 0, got 0"),
            ({"sliding_window": 4096}, "unknown key 'model.sliding_window'"),
        ],
    )
    def test_refused(self, changes, message, tmp_path):
        with pytest.raises(UserError, match=rf"run\.json: {message}"):
            load_config(published(tmp_path, **changes))

    @pytest.mark.parametrize("missing", [["q_lora_rank"], ["n_group", "topk_group"], [*DEFAULTS]], ids=str)
    def test_keys_with_another_default_in_transformers_are_needed(self, missing, tmp_path):
        fields = {
            name: value for name, value in json.loads(published(tmp_path).read_text()).items() if name not in missing
        }
        expected = (
            f"run.json: expected the keys {', '.join(missing)}, whose defaults differ between transformers and dsfast$"
        )
        with pytest.raises(UserError, match=expected):
            load_config(write(tmp_path, json.dumps(fields)))

    def test_the_keys_needed_are_those_with_another_default_in_transformers(self):
        theirs = pytest.importorskip("transformers").DeepseekV3Config()
        own = {f.name: f.default for f in dataclasses.fields(ModelConfig) if f.default is not dataclasses.MISSING}
        differ = {name for name, default in own.items() if getattr(theirs, name, default) != default}
        assert differ - {"num_nextn_predict_layers", "rope_scaling"} == DEFAULTS.keys()

    def test_another_model_type_is_no_published_config(self, tmp_path):
        with pytest.raises(UserError, match=r"run\.json: model_type is 'llama'; expected 'deepseek_v3'"):
            load_config(write(tmp_path, json.dumps({"model_type": "llama", **SIZES})))


def test_an_empty_source_is_not_the_working_folder():
    with pytest.raises(UserError, match=r"data.source must be 'encyclopedia' or name a file or folder, got ''"):
        default_config("cpu").replace(**{"data.source": ""})


def test_a_name_that_no_file_can_have():
    with pytest.raises(UserError, match="no file can have this name"):
        load_config("a\0b")
