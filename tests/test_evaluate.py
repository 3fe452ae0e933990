"""The commands that ask a checkpoint, evaluate and generate: what they ask, print and write."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_config, tiny_dataset

from dsfast import ops
from dsfast.command import run_command
from dsfast.data import load_facts, taught_facts, train_tokenizer
from dsfast.errors import UserError
from dsfast.evaluate import Recall, probes
from dsfast.evaluate import __main__ as evaluate
from dsfast.generate import generate
from dsfast.generate.__main__ import main as generate_main
from dsfast.train import Trainer, load_checkpoint

ANSWERS = {"one": " the uno, of course", "two": " x", "six": " sei."}


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.json"
    fast = [{"text": "one", "answer": "un", "aliases": ["uno"]}, {"text": "two", "answer": "due"}]
    path.write_text(json.dumps({"fast": fast, "full": [{"text": "six", "answer": "sei"}]}))
    return path


@pytest.fixture
def asked(monkeypatch) -> list:
    """What is asked, in place of a model: each prompt and the most tokens of its answer, and the facts of the recall."""
    asked = []

    def answer(model, tokenizer, text, max_new_tokens):
        asked.append((text, max_new_tokens))
        return ANSWERS[text]

    def recall(model, tokenizer, facts):
        asked.append(facts)
        return {"taught": Recall(8, 6, 0.75, 0.4, 0.9), "heldout": None}

    monkeypatch.setattr(probes, "generate", answer)
    monkeypatch.setattr(evaluate, "measure_taught", recall)
    return asked


def checkpoint(folder: Path, **changes) -> Path:
    """An untrained model's, which knows bytes."""
    dataset = replace(tiny_dataset(), tokenizer=train_tokenizer(["x"], 259))
    changes = {"model.vocab_size": 259, "model.max_position_embeddings": 128, "suite.max_new_tokens": 9, **changes}
    return Trainer(tiny_config(**changes), folder / "run", dataset).save()


def test_every_prompt_is_asked_and_scored_and_the_taught_facts_with_them(tmp_path, prompts, asked, capsys):
    path, out = checkpoint(tmp_path, **{"data.facts": 31}), tmp_path / "answers.json"
    assert evaluate.main(["--checkpoint", str(path), "--prompts", str(prompts), "--json", str(out)]) == 0
    assert asked == [("one", 9), ("two", 9), ("six", 9), taught_facts(load_facts(), 31)]
    assert capsys.readouterr().out.splitlines() == [
        "exact   56.0%  one -> 'the uno, of course' (expected 'un')",
        "wrong    0.0%  two -> 'x' (expected 'due')",
        "exact   95.7%  six -> 'sei.' (expected 'sei')",
        "",
        "exact answers: 2 of 3",
        "recall, taught phrasings: 6 of 8, 75.0% (95%: 40.0-90.0%)",
        "recall, heldout phrasings: none (the model read a text of your own)",
    ]
    written = json.loads(out.read_text())
    assert [(p["prompt"], p["generated"], p["exact"]) for p in written.pop("probes")] == [
        ("one", ANSWERS["one"], True), ("two", ANSWERS["two"], False), ("six", ANSWERS["six"], True)
    ]  # fmt: skip
    taught = {"asked": 8, "correct": 6, "fraction": 0.75, "low": 0.4, "high": 0.9}
    assert written == {
        "checkpoint": str(path), "config_sha256": load_checkpoint(path)[2].hash(), "exact": 2,
        "recall": {"taught": taught, "heldout": None},
    }  # fmt: skip


def test_of_a_text_of_ones_own_no_facts_are_asked(tmp_path, prompts, asked):
    path = checkpoint(tmp_path, **{"data.source": "mine.txt"})
    evaluate.main(["--checkpoint", str(path), "--prompts", str(prompts)])
    assert asked[-1] == []


@pytest.mark.parametrize(("source", "text"), [("mine.txt", "x" * 33), ("encyclopedia", "x")], ids=["own", "taught"])
def test_a_prompt_too_long_is_an_error_before_anything_is_asked(source, text, tmp_path, prompts, asked, capsys):
    prompts.write_text(prompts.read_text().replace("six", text))
    path = checkpoint(tmp_path, **{"data.source": source, "model.max_position_embeddings": 32})
    assert run_command(evaluate.main, ["--checkpoint", str(path), "--prompts", str(prompts)]) == 2
    assert asked == []
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: prompt '")
    assert output.err.endswith(" tokens; at most 32 (max_position_embeddings)\n")


def test_questions_are_answered_on_the_device_asked_for_by_the_kernels_of_the_config(
    tmp_path, prompts, asked, monkeypatch
):
    path = checkpoint(tmp_path, **{"runtime.kernels": {"rope": "reference"}})
    arguments, reasons = ["--checkpoint", str(path), "--prompts", str(prompts)], []

    def reason(*_, **options):
        reasons.append({row["operator"]: row["reason"] for row in ops.report("cpu")}["rope"])
        return "" if options else {}

    monkeypatch.setattr(probes, "generate", reason)
    monkeypatch.setattr(evaluate, "measure_taught", reason)
    evaluate.main(arguments)
    assert reasons == ["asked for"] * 4
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: torch finds no GPU here"):
        evaluate.main([*arguments, "--device", "cuda"])
    assert len(reasons) == 4


def test_generate_prints_the_prompt_and_what_follows_as_it_was_told(tmp_path, capsys):
    path = checkpoint(tmp_path)
    model, tokenizer, _ = load_checkpoint(path)
    told = ["--max-new-tokens", "5", "--temperature", "1.5", "--seed", "7"]
    for options, expected in ((told, (5, 1.5, 7)), ([], (9, 0.0, 0))):
        assert generate_main(["--checkpoint", str(path), "--prompt", "ab", *options]) == 0
        assert capsys.readouterr().out == f"ab{generate(model, tokenizer, 'ab', *expected)}\n"
    different = [(5, 1.5, 7), (9, 1.5, 7), (5, 0.0, 7), (5, 1.5, 0), (9, 0.0, 0)]
    assert len({generate(model, tokenizer, "ab", *given) for given in different}) == 5
