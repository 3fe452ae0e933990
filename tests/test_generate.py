"""Generation: the latent cache changes nothing, batches do not mix, limits hold."""

from __future__ import annotations

import pytest
import torch
from tiny_models import YARN, random_ids, random_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dsfast.errors import UserError
from dsfast.model import generate, generate_ids
from dsfast.model.cache import LatentCache
from dsfast.model.generate import _decode, _prefill

VARIANTS = {
    "plain": {},
    "q_lora, yarn, groups": {
        "q_lora_rank": 9, "rope_scaling": YARN, "n_routed_experts": 9, "n_group": 3, "topk_group": 2,
        "embedding_rank": 8, "first_k_dense_replace": 1,
    },
    "untied, with an MTP module": {"tie_word_embeddings": False, "num_nextn_predict_layers": 1},
}  # fmt: skip


@pytest.fixture(params=VARIANTS, ids=str)
def model(request):
    return random_model(**VARIANTS[request.param])


@pytest.fixture
def tokenizer() -> Tokenizer:
    """Specials and the 58 letters from A on: 61 tokens, as many as the tiny models know."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_special_tokens(["<|bos|>", "<|eos|>", "<|pad|>"])
    tokenizer.add_tokens([chr(ord("A") + i) for i in range(58)])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def without_cache(model, prompt: list[int], steps: int) -> list[int]:
    """Greedy continuation with a full forward pass per token."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_cached_generation_equals_full_forward_passes(model):
    prompts = [random_ids(model, n, seed=n).tolist() for n in (5, 1, 17, 8)]
    with torch.no_grad():
        expected = [without_cache(model, prompt, 12) for prompt in prompts]
    assert generate_ids(model, prompts, max_new_tokens=12) == expected
    assert [generate_ids(model, [prompt], max_new_tokens=12)[0] for prompt in prompts] == expected


def test_cached_logits_equal_full_forward_passes(model):
    ids = random_ids(model, 3, 20)
    lengths = [4, 9, 1]
    cache = LatentCache(model.config, batch=3, capacity=16, device=ids.device, dtype=torch.float32)
    with torch.no_grad():
        full = model(ids)
        logits = _prefill(model, [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)], cache)
        for step in range(7):
            at = torch.tensor(lengths) + step
            expected = full[torch.arange(3), at - 1]
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
            logits = _decode(model, ids[torch.arange(3), at], cache)


def test_the_cache_holds_the_latent_and_the_rotary_key_alone():
    model = random_model()
    cache = LatentCache(model.config, batch=2, capacity=7, device=torch.device("cpu"), dtype=torch.float32)
    floats = [t for t in vars(cache).values() if isinstance(t, torch.Tensor) and t.is_floating_point()]
    assert sum(t.numel() for t in floats) == 2 * 2 * 7 * (10 + 6)  # layers, sequences, tokens, R + Dr


def test_eos_ends_one_row_and_not_the_others():
    model = random_model()
    prompts = [random_ids(model, 6, seed=s).tolist() for s in range(4)]
    free = generate_ids(model, prompts, max_new_tokens=10)
    eos = free[0][3]
    stopped = generate_ids(model, prompts, max_new_tokens=10, eos_id=eos)
    assert stopped == [row[: row.index(eos)] if eos in row else row for row in free]
    assert len({len(row) for row in stopped}) > 1


def test_generation_ends_with_the_context():
    model = random_model(max_position_embeddings=20)
    prompts = [random_ids(model, n, seed=n).tolist() for n in (17, 20, 3)]
    assert [len(row) for row in generate_ids(model, prompts, max_new_tokens=9)] == [4, 1, 9]


def test_sampling_repeats_with_its_seed_and_varies_with_it():
    model = random_model()
    prompts = [random_ids(model, 4).tolist()] * 2
    first, again, other = (
        generate_ids(model, prompts, max_new_tokens=20, temperature=1.5, seed=seed) for seed in (5, 5, 6)
    )
    assert first == again
    assert first != other
    assert first[0] != first[1]
    for temperature in (1e-4, 1e-300, 5e-324):
        cold = generate_ids(model, prompts, max_new_tokens=20, temperature=temperature, seed=5)
        assert cold == generate_ids(model, prompts, max_new_tokens=20)


def test_generate_returns_the_continuation_of_bos_and_prompt(tokenizer):
    model = random_model()
    ids = [0, *tokenizer.encode("HELLO").ids]
    assert len(ids) == 6
    [expected] = generate_ids(model, [ids], max_new_tokens=6, eos_id=1)
    text = generate(model, tokenizer, "HELLO", max_new_tokens=6)
    assert text == tokenizer.decode(expected)
    assert text
    assert not text.startswith("HELLO")


def test_generation_leaves_the_model_as_it_was():
    model = random_model().train()
    model(random_ids(model, 2, 8))
    loads = [router.load.clone() for router in model.routers()]
    generate_ids(model, [[3, 4]], max_new_tokens=3)
    assert model.training
    assert all(torch.equal(router.load, load) for router, load in zip(model.routers(), loads, strict=True))
    assert generate_ids(model.eval(), [[3, 4]], max_new_tokens=1) is not None
    assert not model.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "A" * 20}, r"prompt: expected 1 .. 20 tokens, <\|bos\|> included .*, got 21"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"temperature": -0.1}, "temperature: expected at least 0, got -0.1"),
        ({"temperature": float("nan")}, "temperature: expected at least 0, got nan"),
        ({"seed": -1}, "seed: expected 0 .. 9223372036854775807, got -1"),
        ({"seed": 2**63}, "seed: expected 0 .. 9223372036854775807, got 9223372036854775808"),
        ({"prompt": "A\udcff"}, r"prompt: expected text that UTF-8 can hold, got '\\udcff' at character 1"),
    ],
)
def test_bad_arguments_are_refused(tokenizer, arguments, message):
    model = random_model(max_position_embeddings=20)
    with pytest.raises(UserError, match=message):
        generate(model, tokenizer, **{"prompt": "A", **arguments})


def test_the_largest_seed_and_the_highest_temperature():
    """An infinite temperature draws every token alike."""
    model = random_model()
    [ids] = generate_ids(model, [[1]], max_new_tokens=200, temperature=float("inf"), seed=2**63 - 1)
    assert len(ids) == 200
    assert len(set(ids)) > 45  # of 61; 59 are expected, and 45 is beyond seven standard deviations


def test_a_tokenizer_without_the_special_tokens_is_refused():
    with pytest.raises(UserError, match=r"tokenizer: special token '<\|bos\|>' is missing"):
        generate(random_model(), Tokenizer(models.BPE()), "A")


def test_an_id_outside_the_vocabulary_is_refused():
    with pytest.raises(UserError, match=r"input_ids: expected 0 .. 60, got 61"):
        generate_ids(random_model(), [[1, 61]], max_new_tokens=1)
