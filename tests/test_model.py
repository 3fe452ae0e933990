"""The model itself: sizes, causality, document boundaries, the router's bias, MTP, initialisation, errors."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from operator_cases import needs_native
from tiny_models import VARIANTS, YARN, next_tokens, random_ids, random_model, tiny_config

from dsfast import ops
from dsfast.config import load_config
from dsfast.errors import UserError
from dsfast.model import DeepseekV3, parameter_counts

CPU_CONFIG = Path(__file__).parents[1] / "configs" / "deepseek_v3_test_run_cpu.json"

PUBLISHED = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "attention_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3,
    "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "moe_layer_freq": 1,
    "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128,
    "vocab_size": 129280,
}  # fmt: skip

EVERYTHING = {
    "n_routed_experts": 9, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 3, "q_lora_rank": 9,
    "rope_scaling": YARN, "embedding_rank": 8, "first_k_dense_replace": 1, "num_nextn_predict_layers": 2,
}  # fmt: skip


def published_config(tmp_path, **changes):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(PUBLISHED | changes))
    return load_config(file).model


def test_the_cpu_config_has_519360_parameters():
    # Embedding 8000 x 32 + 32 x 128; a layer 55,296 attention, 256 router, 49,152 routed, 24,576 shared, 288 norms;
    # the final norm 128. A token goes through one of the two routed experts: 2 x 24,576 less.
    counts = parameter_counts(DeepseekV3(load_config(CPU_CONFIG).model))
    assert counts == {"total": 519_360, "active": 519_360 - 2 * 24_576, "embedding": 260_096}


def test_the_published_config_has_671_billion_parameters_37_active(tmp_path):
    with torch.device("meta"):
        model = DeepseekV3(published_config(tmp_path))
    counts = parameter_counts(model)
    assert counts["total"] - sum(p.numel() for p in model.mtp.parameters()) == 671_026_404_352
    assert round(counts["active"] / 1e9, 1) == 37.6  # the paper's 37B leave out the input embedding, 0.9B
    assert counts["embedding"] == 2 * 129_280 * 7168


def test_the_published_config_trains_when_shrunk_in_width_alone(tmp_path):
    config = published_config(
        tmp_path, hidden_size=32, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=4, vocab_size=50,
        num_attention_heads=2, num_key_value_heads=2, q_lora_rank=16, kv_lora_rank=8, n_routed_experts=16,
        max_position_embeddings=300,
    )  # fmt: skip
    model = DeepseekV3(config)
    ids = random_ids(model, 2, 20)
    loss = model.loss(ids, next_tokens(ids))
    loss.backward()
    assert loss.isfinite()


def test_packed_documents_equal_the_same_documents_alone():
    model = random_model(**EVERYTHING)
    ids = random_ids(model, 2, 20)
    bounds = [0, 1, 14, 20, 27, 40]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    positions = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(bounds)]).view(2, 20)
    with torch.no_grad():
        packed = model(ids, positions, cu_seqlens).flatten(0, 1)
        torch.testing.assert_close(model(ids, cu_seqlens=cu_seqlens).flatten(0, 1), packed, rtol=0, atol=0)
        flat = ids.flatten()
        for a, b in itertools.pairwise(bounds):
            torch.testing.assert_close(packed[a:b], model(flat[None, a:b])[0], rtol=1e-4, atol=1e-5)


def test_packed_loss_is_the_token_mean_over_the_documents():
    """MTP included: no depth may learn from another document's tokens."""
    model = random_model(**EVERYTHING)
    first, second = random_ids(model, 1, 13), random_ids(model, 1, 13, seed=2)
    labels = torch.cat([next_tokens(first), next_tokens(second)], dim=1)
    ids, cu_seqlens = torch.cat([first, second], dim=1), torch.tensor([0, 13, 26], dtype=torch.int32)
    with torch.no_grad():
        packed = model.loss(ids, labels, cu_seqlens=cu_seqlens)
        alone = [model.loss(x, next_tokens(x)) for x in (first, second)]
    torch.testing.assert_close(packed, torch.stack(alone).mean())  # equal lengths: equal weights


def test_a_token_does_not_see_what_follows():
    model = random_model(**EVERYTHING)
    ids = random_ids(model, 1, 17)
    changed = ids.clone()
    changed[0, 9] = (ids[0, 9] + 1) % model.config.vocab_size
    with torch.no_grad():
        before, after = model(ids)[0], model(changed)[0]
    # Not bitwise: how many tokens an expert gets decides how its matrix product is cut up.
    torch.testing.assert_close(after[:9], before[:9], rtol=1e-5, atol=1e-5)
    assert ((before[9:] - after[9:]).abs().amax(dim=1) > 1e-3).all()


def test_loss_is_the_cross_entropy_of_the_logits():
    for changes in ({}, {"embedding_rank": 8}, {"tie_word_embeddings": False}):
        model = random_model(**changes)
        ids = random_ids(model, 2, 9)
        labels = next_tokens(ids)
        labels[0, 3] = -100
        expected = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), labels.flatten())
        torch.testing.assert_close(model.loss(ids, labels), expected)


@pytest.mark.parametrize("variant", ["q_lora", "all at once"])
def test_torch_compile_follows_the_model_in_one_graph(variant):
    needs_native()
    torch._dynamo.reset()
    model = random_model(**VARIANTS[variant])
    ids = random_ids(model, 2, 7)
    for function, arguments in ((model, (ids,)), (model.loss, (ids, next_tokens(ids)))):
        found = torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)
        torch.testing.assert_close(found, function(*arguments), rtol=1e-5, atol=1e-5)


def test_every_parameter_gets_a_gradient():
    model = random_model(**EVERYTHING, tie_word_embeddings=False).train()
    ids = random_ids(model, 4, 40)
    model.loss(ids, next_tokens(ids)).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_mtp_adds_its_weighted_mean_loss_and_teaches_its_modules_alone():
    model = random_model(num_nextn_predict_layers=2, tie_word_embeddings=False)
    plain = random_model(num_nextn_predict_layers=0, tie_word_embeddings=False)
    plain.load_state_dict(model.state_dict(), strict=False)
    ids = random_ids(model, 3, 15)
    labels = next_tokens(ids)
    with torch.no_grad():
        base, half, whole = (model.loss(ids, labels, mtp_loss_weight=w) for w in (0.0, 0.5, 1.0))
        torch.testing.assert_close(base, plain.loss(ids, labels))
    assert base.isfinite()
    assert whole > base
    torch.testing.assert_close(whole - base, 2 * (half - base))


def test_mtp_loss_by_hand():
    """Depth 1 at place i reads the state at i and the token at i + 1, and predicts the token at i + 2."""
    model = random_model(num_nextn_predict_layers=1)
    ids = random_ids(model, 1, 12)
    with torch.no_grad():
        embedded = model.embed_tokens(ids[0])
        positions, cu_seqlens = torch.arange(12), torch.tensor([0, 12], dtype=torch.int32)
        state = model.hidden(embedded, positions, cu_seqlens)
        cut = torch.tensor([0, 10], dtype=torch.int32)
        ahead = model.mtp[0](state[:10], embedded[1:11], model.rope(torch.float32), positions[:10], cut)
        expected = torch.nn.functional.cross_entropy(model.logits(ahead), ids[0, 2:])
        labels = next_tokens(ids)
        actual = model.loss(ids, labels, mtp_loss_weight=1.0) - model.loss(ids, labels, mtp_loss_weight=0.0)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_router_bias_moves_towards_the_mean_load():
    model = random_model(num_nextn_predict_layers=1).train()
    ids = random_ids(model, 3, 16)
    before = [router.e_score_correction_bias.clone() for router in model.routers()]
    model.loss(ids, next_tokens(ids))
    model.update_router_bias(0.01)
    assert len(before) == 3
    for router, old in zip(model.routers(), before, strict=True):
        assert router.load.sum() == 48 * model.config.num_experts_per_tok
        expected = old + 0.01 * torch.sign(48 * 2 / 6 - router.load.float())
        torch.testing.assert_close(router.e_score_correction_bias, expected)
        assert (router.load != 16).any()


def test_router_load_is_not_counted_in_evaluation():
    model = random_model().train()
    model(random_ids(model, 2, 8))
    counted = [router.load.clone() for router in model.routers()]
    model.eval()
    model(random_ids(model, 5, 8))
    assert all(torch.equal(router.load, load) for router, load in zip(model.routers(), counted, strict=True))


def test_router_bias_is_a_float32_buffer_outside_the_gradient():
    model = random_model()
    bias = model.routers()[0].e_score_correction_bias.clone()
    assert not any("bias" in name for name, _ in model.named_parameters())
    model.to(torch.bfloat16)
    assert model.embed_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(model.routers()[0].e_score_correction_bias, bias)
    assert model.rope.cos.dtype == torch.float32
    with ops.use("reference"):
        assert model(random_ids(model, 1, 5)).dtype == torch.bfloat16


def test_rotary_tables_are_cast_once_for_a_dtype_and_a_device():
    """Recorded steps keep their addresses: neither another dtype nor a move to where it is frees them."""
    model = random_model()
    tables = model.rope
    assert tables(torch.float32) == (tables.cos, tables.sin)
    with torch.inference_mode():
        cast = tables(torch.bfloat16)
    assert not any(table.is_inference() for table in cast)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(cast, (tables.cos, tables.sin), strict=True))
    assert tables(torch.float16)[0].dtype == torch.float16
    model.to("cpu")
    assert all(a is b for a, b in zip(tables(torch.bfloat16), cast, strict=True))
    tables.cos.mul_(2)
    tables.sin = tables.sin + 1
    assert all(a is b for a, b in zip(tables(torch.bfloat16), cast, strict=True))
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(cast, (tables.cos, tables.sin), strict=True))
    tables.cos, tables.sin = tables.cos[:5], tables.sin[:5]
    assert tables(torch.bfloat16)[0].shape == tables.cos.shape
    model.to("meta")
    assert [table.device.type for table in tables(torch.bfloat16)] == ["meta"] * 2


def test_a_model_begun_on_the_meta_device_computes_what_another_does():
    """Its weights come from a state dict, which has no rotary tables."""
    model = random_model()
    with torch.device("meta"):
        begun = DeepseekV3(model.config)
    begun.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(begun.rope.cos, model.rope.cos)
    assert torch.equal(begun.rope.sin, model.rope.sin)
    ids = random_ids(model, 2, 9)
    with torch.no_grad():
        assert torch.equal(begun(ids), model(ids))


def test_initialisation_follows_the_config_and_the_seed():
    def build(seed: int) -> DeepseekV3:
        torch.manual_seed(seed)
        return DeepseekV3(load_config(CPU_CONFIG).model)

    model, again, other = build(3), build(3), build(4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(model.embed_tokens.weight, other.embed_tokens.weight)
    projection = model.embed_tokens.projection
    torch.testing.assert_close(projection @ projection.T, torch.eye(32), atol=1e-5, rtol=0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        elif name.endswith(("o_proj.weight", "down_proj")):
            assert (parameter == 0).all(), name
        elif name == "embed_tokens.weight":
            assert parameter.std().item() == pytest.approx(0.1, rel=0.02)
        elif name != "embed_tokens.projection":
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2), name


def test_zero_outputs_are_an_option():
    model = DeepseekV3(tiny_config().model)
    assert all(p.any() for name, p in model.named_parameters() if name.endswith(("o_proj.weight", "down_proj")))


def test_one_token_and_the_longest_row_are_possible():
    model = random_model()
    limit = model.config.max_position_embeddings
    with torch.no_grad():
        assert model(random_ids(model, 2, 1)).shape == (2, 1, 61)
        assert model(random_ids(model, 1, limit)).isfinite().all()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[0, 61]]), r"input_ids: expected 0 .. 60, got 61"),
        (torch.tensor([[0, -1]]), r"input_ids: expected 0 .. 60, got -1"),
        (torch.zeros(1, 264, dtype=torch.int64), r"rows of 264 tokens, at most 263 are possible"),
        (torch.zeros(4, dtype=torch.int64), r"input_ids: expected \[B, T\] of int64, got \[4\]"),
        (torch.zeros(1, 4), r"got \[1, 4\] of torch.float32"),
        ([[0, 1]], r"input_ids: expected a tensor \[B, T\] of int64, got list"),
    ],
)
def test_bad_input_ids_are_refused(ids, message):
    model = random_model()
    with pytest.raises(UserError, match=message):
        model(ids)


def test_autocast_is_refused():
    model = random_model()
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(UserError, match=r"torch\.autocast is on; .* runtime\.dtype"),
    ):
        model(random_ids(model, 2, 4))


def test_bad_labels_and_positions_are_refused():
    model = random_model()
    ids = random_ids(model, 2, 4)
    with pytest.raises(UserError, match=r"labels: expected 0 .. 60, got 61"):
        model.loss(ids, torch.full((2, 4), 61))
    expected = r"labels: expected the shape of input_ids \[2, 4\], of int64, got "
    for labels, found in (
        (ids[:, :3], r"\[2, 3\] of torch.int64"), (ids.int(), r"\[2, 4\] of torch.int32"), (None, "NoneType"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=expected + found):
            model.loss(ids, labels)
    with pytest.raises(UserError, match=r"positions: expected 0 .. 262, got 263"):
        model(ids, torch.full((2, 4), 263))
    with pytest.raises(UserError, match=r"positions: expected the shape of input_ids \[2, 4\], of int64, got list"):
        model(ids, [[0, 1, 2, 3]] * 2)


@pytest.mark.parametrize("boundaries", [[], [0], [0, 7], [1, 8], [0, 9], [0, 5, 3, 8], list(range(1, 30))], ids=str)
@pytest.mark.parametrize("own_positions", [False, True])
def test_boundaries_that_do_not_rise_from_0_to_the_last_token_are_refused(boundaries, own_positions):
    model = random_model()
    ids, cu_seqlens = random_ids(model, 2, 4), torch.tensor(boundaries, dtype=torch.int32)
    positions = torch.arange(4).repeat(2, 1) if own_positions else None
    expected = rf"^cu_seqlens: expected .*, rising from 0 to 8, .*, got {re.escape(str(boundaries[:20]))}$"
    with pytest.raises(UserError, match=expected):
        model(ids, positions, cu_seqlens)
    with pytest.raises(UserError, match=expected):
        model.loss(ids, ids, positions, cu_seqlens)


def test_empty_documents_and_rows_without_tokens_are_possible():
    model = random_model()
    ids = random_ids(model, 2, 4)
    with torch.no_grad():
        apart = model(ids, cu_seqlens=torch.tensor([0, 0, 4, 4, 8, 8], dtype=torch.int32))
        assert torch.equal(apart, model(ids))
        assert model(ids[:, :0], cu_seqlens=torch.tensor([0], dtype=torch.int32)).shape == (2, 0, 61)


def test_boundaries_elsewhere_are_not_looked_at():
    """Only their number: a device would be waited for."""
    with torch.device("meta"):
        model = DeepseekV3(tiny_config().model)
        ids, boundaries = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)
    assert model.flatten(ids, ids, None, boundaries)[3] is boundaries
    with pytest.raises(UserError, match=r"^cu_seqlens: expected .* to 8, the number of tokens, got \[0\]$"):
        model(ids, cu_seqlens=boundaries[:0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.filterwarnings("ignore:.*runs in plain PyTorch")
def test_a_model_made_in_another_default_dtype_is_as_one_that_was_cast(dtype):
    torch.set_default_dtype(dtype)
    try:
        model = random_model(embedding_rank=8)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in model.parameters()} == {dtype}
    cast = random_model(embedding_rank=8).to(dtype)
    cast.load_state_dict(model.state_dict())
    assert [(name, b.dtype) for name, b in model.named_buffers()] == [
        (name, b.dtype) for name, b in cast.named_buffers()
    ]
    ids = random_ids(model, 2, 9)
    assert torch.equal(model(ids), cast(ids))
    rows = DeepseekV3(tiny_config(embedding_rank=8).model).embed_tokens.projection
    torch.testing.assert_close(rows @ rows.T, torch.eye(8), rtol=0, atol=1e-5)
