"""The oracle: transformers' DeepseekV3ForCausalLM gives the same logits for an exported model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import GROUPS, SIZES, VARIANTS, YARN, random_ids, random_model, tiny_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dsfast import import_huggingface
from dsfast.command import run_command
from dsfast.config import load_config
from dsfast.errors import UserError
from dsfast.export import main
from dsfast.model import export_huggingface, generate_ids
from dsfast.model.rope import RotaryTables, _frequencies
from dsfast.tokens import BOS, EOS, PAD
from dsfast.train.checkpoint import TrainingState, save_checkpoint
from dsfast.train.optimizer import build_optimizer

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A byte-level tokenizer of 61 tokens: the specials, and every character of the test prompt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_special_tokens([BOS, EOS, PAD])
    tokenizer.add_tokens([chr(ord("A") + i) for i in range(58)])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def exported(request, tmp_path_factory, tokenizer):
    model = random_model(**VARIANTS[request.param])
    folder = tmp_path_factory.mktemp("export") / "model"
    export_huggingface(model, tokenizer, folder)
    return model, folder


def load_oracle(folder, **options):
    """In plain PyTorch: transformers' grouped matrix products refuse odd sizes on the CPU."""
    options = {"dtype": torch.float32, "attn_implementation": "eager", "experts_implementation": "eager"} | options
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def test_transformers_gives_the_same_logits(exported):
    model, folder = exported
    oracle, info = load_oracle(folder, output_loading_info=True)
    assert type(oracle).__name__ == "DeepseekV3ForCausalLM"
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    mtp_layers = tuple(f"model.layers.{len(model.layers) + k}." for k in range(len(model.mtp)))
    assert all(name.startswith(mtp_layers) for name in info["unexpected_keys"])
    ids = random_ids(model, 3, 37)
    with torch.no_grad():
        ours, theirs = model(ids), oracle(ids).logits
    assert theirs.std() > 0.1  # else equal logits would prove nothing
    assert relative_difference(ours, theirs) <= 1e-4


def test_transformers_generates_the_same_tokens(exported):
    model, folder = exported
    oracle = load_oracle(folder)
    ids = random_ids(model, 1, 5)
    theirs = oracle.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None)[0, 5:]
    assert generate_ids(model, ids.tolist(), max_new_tokens=8) == [theirs.tolist()]


def test_import_brings_back_the_same_model(exported):
    model, folder = exported
    again = import_huggingface(folder)
    ids = random_ids(model, 2, 19)
    with torch.no_grad():
        assert relative_difference(again(ids), model(ids)) <= 1e-5
        labels = ids.roll(-1, 1)
        torch.testing.assert_close(again.loss(ids, labels), model.loss(ids, labels))  # the MTP modules too
    assert again.config.embedding_rank is None


def test_import_has_a_dense_embedding_whatever_the_config_says(exported):
    model, folder = exported
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"embedding_rank": 8}))
    ids = random_ids(model, 2, 19)
    with torch.no_grad():
        assert relative_difference(import_huggingface(folder)(ids), model(ids)) <= 1e-5


def test_import_reads_what_transformers_saves(tmp_path, tokenizer):
    model = random_model(**GROUPS, rope_scaling=YARN)
    export_huggingface(model, tokenizer, tmp_path / "ours")
    oracle = load_oracle(tmp_path / "ours")
    oracle.save_pretrained(tmp_path / "theirs")
    ids = random_ids(model, 2, 19)
    with torch.no_grad():
        assert relative_difference(import_huggingface(tmp_path / "theirs")(ids), model(ids)) <= 1e-5


def test_import_passes_over_a_head_that_repeats_the_embedding(tmp_path, tokenizer):
    model = random_model()
    export_huggingface(model, tokenizer, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors"
    )
    ids = random_ids(model, 2, 19)
    with torch.no_grad():
        assert torch.equal(import_huggingface(tmp_path)(ids), model(ids))


COPIES = {
    "lm_head.weight": ({}, "model.embed_tokens.weight"),
    "model.layers.2.embed_tokens.weight": ({"tie_word_embeddings": False}, "model.embed_tokens.weight"),
    "model.layers.3.embed_tokens.weight": ({}, "model.embed_tokens.weight"),
    "model.layers.2.shared_head.head.weight": ({}, "model.embed_tokens.weight"),
    "model.layers.3.shared_head.head.weight": ({"tie_word_embeddings": False}, "lm_head.weight"),
}


@pytest.mark.parametrize("name", COPIES)
def test_import_passes_over_copies_and_refuses_what_differs_from_them(name, tmp_path, tokenizer):
    """In another file and another dtype too, in the last of many rows, and beside a tensor that holds NaN."""
    changes, original = COPIES[name]
    model = random_model(**changes, vocab_size=50_021, num_nextn_predict_layers=2)
    with torch.no_grad():
        for weight in (model.embed_tokens.weight, *([model.lm_head.weight] if model.lm_head else [])):
            weight[0, 0] = float("nan")
    export_huggingface(model, tokenizer, tmp_path)
    file, shard = tmp_path / "model.safetensors", tmp_path / "other.safetensors"
    tensors = load_file(file)
    copy = tensors.pop(name, tensors[original].clone())
    save_file(tensors, file)
    for same in (copy, copy.double()):
        save_file({name: same}, shard)
        imported = import_huggingface(tmp_path).embed_tokens.weight
        torch.testing.assert_close(imported, model.embed_tokens.weight, rtol=0, atol=0, equal_nan=True)
    changed = copy.clone()
    changed[-1, -1] += 0.25
    for wrong in (changed, changed.bfloat16(), copy[:-1].contiguous()):
        save_file({name: wrong}, shard)
        with pytest.raises(UserError, match=f": tensor '{name}' must repeat '{original}', .* but differs from it$"):
            import_huggingface(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_import_is_float32_whatever_the_default_dtype_is(dtype, tmp_path, tokenizer):
    model = random_model(num_nextn_predict_layers=1, rope_scaling=YARN)
    export_huggingface(model, tokenizer, tmp_path)
    torch.set_default_dtype(dtype)
    try:
        again = import_huggingface(tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {tensor.dtype for tensor in (*again.parameters(), *again.buffers())} == {
        tensor.dtype for tensor in (*model.parameters(), *model.buffers())
    }
    ids = random_ids(model, 2, 19)
    assert torch.equal(again(ids), model(ids))


def test_mtp_modules_are_those_of_transformers(tmp_path, tokenizer, monkeypatch):
    layers = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(layers, "MtpModel"):
        pytest.skip("this transformers has no MTP modules")
    model = random_model(num_nextn_predict_layers=1)
    export_huggingface(model, tokenizer, tmp_path / "model")
    oracle = load_oracle(tmp_path / "model")
    # It looks for MTP weights under the number they have in the published model, 61.
    monkeypatch.setattr(oracle, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.2.*"])
    mtp = layers.MtpModel.from_pretrained(oracle)
    ids = random_ids(model, 1, 13)
    positions, cu_seqlens = torch.arange(12), torch.tensor([0, 12], dtype=torch.int32)
    with torch.no_grad():
        state = oracle.model(ids[:, :-1]).last_hidden_state
        theirs = mtp(ids[:, 1:], state, torch.ones(1, 12), positions[None], None)[
            1
        ]  # [1, 1, V] after the last position
        embedded = model.embed_tokens(ids[0])
        hidden = model.hidden(embedded[:-1], positions, cu_seqlens)
        ours = model.logits(model.mtp[0](hidden, embedded[1:], model.rope(torch.float32), positions, cu_seqlens))
    assert relative_difference(ours[-1], theirs[0, 0]) <= 1e-4


def test_config_json_says_what_other_readers_need(tmp_path, tokenizer):
    scaling = {name: value for name, value in YARN.items() if name != "type"}
    export_huggingface(random_model(rope_scaling=scaling), tokenizer, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    expected = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "topk_method": "noaux_tc",
        "scoring_func": "sigmoid", "moe_layer_freq": 1, "rope_theta": 10000.0, "bos_token_id": 0, "eos_token_id": 1,
        "torch_dtype": "float32", "num_key_value_heads": 3,
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected
    assert config["rope_scaling"]["original_max_position_embeddings"] == 16
    assert config["rope_scaling"]["type"] == config["rope_scaling"]["rope_type"] == "yarn"
    assert not {"embedding_rank", "embedding_initializer_range", "zero_init_output"} & config.keys()


THETA, SCALED = {"rope_theta": 500.0}, {"factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7}
ROPES = {
    "nothing": {},
    "theta beside": THETA,
    "theta beside null": THETA | {"rope_parameters": None},
    "theta beside nothing": THETA | {"rope_parameters": {}},
    "theta beside a default": THETA | {"rope_parameters": {"rope_type": "default"}},
    "theta within": {"rope_parameters": {"rope_type": "default", **THETA}},
    "theta within and beside": {"rope_theta": 20.0, "rope_parameters": {"rope_type": "default", **THETA}},
    "yarn, theta beside": THETA | {"rope_parameters": {"rope_type": "yarn", **SCALED}},
    "yarn by the older key": {"rope_parameters": {"type": "yarn", **SCALED, **THETA}},
    "yarn by both keys": {"rope_parameters": {"type": "yarn", "rope_type": "yarn", **SCALED}},
    "yarn in rope_scaling": THETA | {"rope_scaling": {"type": "yarn", **SCALED}},
    "yarn in rope_scaling with theta": {"rope_scaling": {"rope_type": "yarn", **SCALED, **THETA}},
    "rope_scaling that is a default": {"rope_scaling": {"rope_type": "default", **THETA}},
    "rope_scaling and rope_parameters": {
        "rope_theta": 20.0, "rope_scaling": {"type": "yarn", **SCALED},
        "rope_parameters": {"rope_type": "yarn", "factor": 2.0, **THETA},
    },
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_rope_is_read_as_transformers_reads_it(rope, tmp_path):
    sizes = {
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 0,
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3", **SIZES, **sizes, **rope}))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    inverse, scale = oracle_frequencies(theirs)
    config = load_config(tmp_path / "config.json").model
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (config.rope_scaling is not None) == (theirs.rope_parameters["rope_type"] == "yarn")
    torch.testing.assert_close(RotaryTables(config).cos, (torch.arange(263)[:, None] * inverse).cos().float() * scale)


RAMPS = {
    "blended over several pairs": (50.0, 160, 4, 1),
    "both ends at pair 0": (10000.0, 16, 40, 2.6),
    "both ends at the last": (10.0, 500, 1, 0.9),
    "the last at -1": (10000.0, 16, 40, 30),
    "both ends above the last pair": (1.5, 10**6, 4, 1),
    "the first above the last pair": (1.9, 3000, 4, 1),
    "the last far below 0": (20.0, 16, 900, 500),
    "the ends exchanged": (50.0, 160, 1, 20),
}


@pytest.mark.parametrize(("theta", "context", "fast", "slow"), RAMPS.values(), ids=RAMPS)
def test_yarn_slows_the_pairs_that_transformers_slows(theta, context, fast, slow):
    scaling = {"factor": 40.0, "original_max_position_embeddings": context, "beta_fast": fast, "beta_slow": slow}
    config = tiny_config(qk_rope_head_dim=14, rope_theta=theta, rope_scaling=scaling).model
    rope = {"rope_type": "yarn", "rope_theta": theta, **scaling}
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "qk_rope_head_dim": 14, "max_position_embeddings": 263}
    inverse, _ = oracle_frequencies(transformers.DeepseekV3Config(**sizes, rope_parameters=rope))
    torch.testing.assert_close(_frequencies(config), inverse, rtol=1e-6, atol=0)


def oracle_frequencies(config) -> tuple[torch.Tensor, float]:
    """Radians per position of each pair in transformers' model, and what it multiplies the tables by."""
    rotary = transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3RotaryEmbedding(config)
    return rotary.inv_freq.double(), rotary.attention_scaling


def test_transformers_tokenizes_as_generate_does(tmp_path, tokenizer):
    export_huggingface(random_model(), tokenizer, tmp_path / "model")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert theirs("HELLO").input_ids == [0, *tokenizer.encode("HELLO").ids]
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == (BOS, EOS, PAD)
    assert theirs.decode(theirs("HELLO").input_ids, skip_special_tokens=True) == "HELLO"


def test_bfloat16_keeps_its_dtype_and_the_router_bias_in_float32(tmp_path, tokenizer):
    model = random_model().to(torch.bfloat16)
    export_huggingface(model, tokenizer, tmp_path / "model")
    oracle = load_oracle(tmp_path / "model", dtype="auto")
    assert oracle.lm_head.weight.dtype == torch.bfloat16
    bias = oracle.model.layers[0].mlp.gate.e_score_correction_bias
    assert torch.equal(bias, model.routers()[0].e_score_correction_bias)


@pytest.mark.parametrize("obstacle", ["a full folder", "a file", "an unwritable parent"])
def test_export_refuses_and_leaves_nothing_behind(tmp_path, tokenizer, obstacle):
    out = tmp_path / "model"
    if obstacle == "a full folder":
        out.mkdir()
        (out / "mine.txt").write_text("keep")
    elif obstacle == "a file":
        out.write_text("keep")
    else:
        (tmp_path / "file").write_text("")
        out = tmp_path / "file" / "model"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="model: "):
        export_huggingface(random_model(), tokenizer, out)
    assert sorted(tmp_path.rglob("*")) == before


def test_export_refuses_scores_that_transformers_would_make_otherwise(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"by sigmoid only, this model by softmax \(model.scoring_func\)"):
        export_huggingface(random_model(scoring_func="softmax"), tokenizer, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_export_refuses_groups_of_one_expert(tmp_path, tokenizer):
    sizes = {"n_routed_experts": 4, "n_group": 4, "topk_group": 2}
    with pytest.raises(
        UserError, match=r"adds the two best scores of a group, .* 4 each has one \(model.n_group\); it cannot be"
    ):
        export_huggingface(random_model(**sizes), tokenizer, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    export_huggingface(random_model(**sizes, first_k_dense_replace=2), tokenizer, tmp_path / "model")


def test_export_fills_an_empty_folder(tmp_path, tokenizer):
    export_huggingface(random_model(), tokenizer, tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    assert not [path for path in tmp_path.parent.iterdir() if "partial" in path.name]


def test_import_keeps_how_scores_are_made(tmp_path, tokenizer):
    model = random_model()
    export_huggingface(model, tokenizer, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    fields = json.loads(config.read_text())
    assert fields["scoring_func"] == "sigmoid"
    config.write_text(json.dumps(fields | {"scoring_func": "softmax"}))
    softmax = import_huggingface(tmp_path / "model")
    ids = random_ids(model, 2, 9)
    expected = random_model(scoring_func="softmax")
    with torch.no_grad():
        assert torch.equal(softmax(ids), expected(ids))
        assert not torch.allclose(softmax(ids), model(ids))


def test_import_names_what_is_wrong(tmp_path, tokenizer):
    def refuses(message: str) -> None:
        with pytest.raises(UserError, match=message):
            import_huggingface(tmp_path)

    export_huggingface(random_model(), tokenizer, tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    name = "model.layers.1.mlp.experts.4.up_proj.weight"
    save_file({key: value for key, value in whole.items() if key != name}, file)
    refuses(f"1 tensors are missing, among them '{name}'")
    save_file(whole | {"model.extra": torch.zeros(1)}, file)
    refuses("1 tensors are unknown, among them 'model.extra'")
    save_file(whole | {name: torch.zeros(3, 4)}, file)
    refuses(rf"'{name}' must have shape \[11, 24\], got \[3, 4\]")
    quantised = rf"the weights are quantised, as '{name}.*' shows; they are to be converted first, to one of float64, "
    save_file(whole | {name: whole[name].to(torch.int8)}, file)
    refuses(quantised)
    save_file(whole | {f"{name}_scale_inv": torch.ones(1, 1)}, file)
    refuses(quantised)
    save_file(whole, file)
    save_file({name: whole[name]}, tmp_path / "other.safetensors")
    refuses(rf"other\.safetensors: tensor '{name}' stands in another \.safetensors file too")
    (tmp_path / "other.safetensors").unlink()
    file.write_bytes(b"\0" * 20)
    refuses("not a readable safetensors file")
    file.unlink()
    refuses("no .safetensors file")


def test_command_exports_a_checkpoint(tmp_path, tokenizer, capsys):
    changes = {"embedding_rank": 8, "rope_scaling": YARN}
    model, config = random_model(**changes), tiny_config(**changes)
    (tmp_path / "run").mkdir()
    state = TrainingState(step=7)
    save_checkpoint(tmp_path / "run", model, build_optimizer(model, config.train), tokenizer, config, state, {})
    assert main(["--checkpoint", str(tmp_path / "run"), "--to", "huggingface", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"written: {tmp_path / 'out'}\n"
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1
    ids = random_ids(model, 2, 19)
    with torch.no_grad():
        assert relative_difference(load_oracle(tmp_path / "out")(ids).logits, model(ids)) <= 1e-4


def test_command_reports_a_missing_checkpoint_in_one_line(tmp_path, capsys):
    arguments = ["--checkpoint", str(tmp_path / "nothing"), "--to", "huggingface", str(tmp_path / "out")]
    status = run_command(main, arguments)
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", [".", "/", "inside/.."])
def test_export_wants_a_folder_of_its_own(where, tmp_path, monkeypatch):
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="expected a folder of its own, not the one you are in or the root"):
        export_huggingface(random_model(), None, where)


def test_a_folder_that_cannot_be(tokenizer):
    for use in (import_huggingface, lambda name: export_huggingface(random_model(), tokenizer, name)):
        with pytest.raises(UserError, match=r"no file can have this name$"):
            use("a\0b")


def test_export_follows_a_link_to_an_empty_folder(tmp_path, tokenizer):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    export_huggingface(random_model(), tokenizer, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "config.json").exists()
