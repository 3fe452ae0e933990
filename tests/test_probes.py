"""Probes and recall: batches agree with single answers, what counts as one, intervals against published values."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_config
from tokenizers import Tokenizer

from dsfast.data import Prompt, heldout_prompts, load_facts, taught_prompts, train_tokenizer
from dsfast.errors import UserError
from dsfast.evaluate import (
    ask,
    check_lengths,
    measure_taught,
    probes,
    recall,
)
from dsfast.evaluate.probes import continue_greedily, encode_prompts, judge
from dsfast.evaluate.recall import measure_recall, wilson_interval
from dsfast.model import DeepseekV3, generate

TEXTS = ["Paris is the capital of France.", "The Sun", "Water is made of hydrogen and oxygen", "x", "The Moon orbits"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS * 3, 265)


@pytest.fixture(scope="module")
def model() -> DeepseekV3:
    """Random and far from uniform, so that greedy choices are not ties."""
    torch.manual_seed(0)
    model = DeepseekV3(tiny_config(**{"model.vocab_size": 265, "model.max_position_embeddings": 64}).model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def test_batched_continuations_equal_single_ones(model, tokenizer):
    alone = [generate(model, tokenizer, text, max_new_tokens=6) for text in TEXTS]
    assert continue_greedily(model, tokenizer, TEXTS, 6, batch_size=2) == alone
    assert len(set(alone)) > 1


def test_special_tokens_are_no_part_of_a_continuation(tokenizer, monkeypatch):
    answer = tokenizer.encode(" The Sun", add_special_tokens=False).ids
    monkeypatch.setattr(
        probes, "generate_ids", lambda model, prompts, *_, eos_id: [[0, *answer, eos_id] for _ in prompts]
    )
    assert continue_greedily(None, tokenizer, ["x", "y"], 6) == [tokenizer.decode(answer)] * 2


def test_ask_gives_what_generate_gives(model, tokenizer):
    prompts = [Prompt(text, "oxygen", priority="low") for text in TEXTS]
    results = ask(model, tokenizer, prompts, 5)
    assert [r.generated for r in results] == [generate(model, tokenizer, text, max_new_tokens=5) for text in TEXTS]
    assert results[0].to_dict()["priority"] == "low"


def test_an_answers_seconds_are_those_it_took(monkeypatch):
    times = iter([10.0, 12.5, 20.0, 20.25])
    monkeypatch.setattr(probes, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    monkeypatch.setattr(probes, "generate", lambda *arguments, **options: " y")
    assert [result.seconds for result in ask(None, None, [Prompt("x", "y")] * 2, 5)] == [2.5, 0.25]


def test_asking_leaves_the_weights_alone(model, tokenizer):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ask(model, tokenizer, [Prompt("x", "y")], 5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_prompts_begin_with_bos(tokenizer):
    ids = encode_prompts(tokenizer, ["The Sun"])[0]
    assert ids[0] == tokenizer.token_to_id("<|bos|>")
    assert tokenizer.decode(ids[1:]).strip() == "The Sun"


@pytest.mark.parametrize(
    ("generated", "exact"), [(" Paris.", True), ("Paris", False), ('"Paris"', True), (", Paris", True)]
)
def test_a_continuation_of_the_prompts_last_word_is_no_answer(generated, exact):
    assert judge(Prompt("The capital of France is", "Paris"), generated, 0.0).exact is exact


def test_the_longest_prompt_that_fits_and_one_token_more(tokenizer):
    prompt = Prompt("The Sun", "is")
    length = len(encode_prompts(tokenizer, [prompt.text])[0])
    check_lengths(tokenizer, [prompt], length)
    with pytest.raises(UserError, match=f"'The Sun': {length} tokens; at most {length - 1}"):
        check_lengths(tokenizer, [prompt], length - 1)


def test_recall_counts_exact_answers(model, tokenizer, monkeypatch):
    prompts = [
        Prompt("a", "Paris"),
        Prompt("b", "300000", ("300,000",)),
        Prompt("c", "Sun"),
        Prompt("d", "Moon", ("x" * 12,)),
    ]
    answers = [" Paris.", " 300,000 km", " the Sun", " comparison"]

    def canned(model, tokenizer, texts, max_new_tokens):
        assert texts == ["a", "b", "c", "d"]
        longest = max(len(tokenizer.encode(" " + a).ids) for p in prompts for a in (p.answer, *p.aliases))
        assert max_new_tokens > longest
        return answers

    monkeypatch.setattr(recall, "continue_greedily", canned)
    result = measure_recall(model, tokenizer, prompts)
    assert (result.asked, result.correct, result.fraction) == (4, 3, 0.75)
    assert (result.low, result.high) == wilson_interval(3, 4)
    assert measure_recall(model, tokenizer, []) is None


def test_recall_of_facts_is_by_the_phrasings_that_were_read_and_by_those_held_out(monkeypatch):
    monkeypatch.setattr(recall, "measure_recall", lambda model, tokenizer, prompts: prompts)
    facts = load_facts()[:3]
    found = measure_taught(None, None, facts)
    assert found == {
        name: [prompt for fact in facts for prompt in phrasings(fact)]
        for name, phrasings in (("taught", taught_prompts), ("heldout", heldout_prompts))
    }
    assert not {prompt.text for prompt in found["taught"]} & {prompt.text for prompt in found["heldout"]}


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe 1998, table I, method 3 (score): 81/263, 15/148, 0/20, 1/29
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0000),
    ],
)
def test_wilson_interval_against_published_values(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 3), (4, 3)])
def test_wilson_interval_refuses_what_is_no_fraction(successes, trials):
    with pytest.raises(ValueError, match="expected"):
        wilson_interval(successes, trials)
