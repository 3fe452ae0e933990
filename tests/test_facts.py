"""The bundled facts: enough, sound, unambiguous; the tables are read strictly; the taught ones are well chosen."""

from __future__ import annotations

import json
from collections import Counter, defaultdict

import pytest

from dsfast.data import heldout_prompts, load_facts, load_prompts, taught_facts, taught_prompts
from dsfast.data.facts import COLUMNS
from dsfast.data.phrasings import load_phrasings
from dsfast.errors import UserError

HEADER = ",".join(COLUMNS)
ROW = "capital-france,capital,France,Paris,,geography,high,common knowledge"


@pytest.fixture(scope="module")
def facts():
    return load_facts()


def every_prompt(facts):
    return [prompt for fact in facts for prompt in (*taught_prompts(fact), *heldout_prompts(fact))]


def test_there_are_enough_facts_relations_and_phrasings(facts):
    assert len(facts) >= 650
    relations = Counter(fact.relation for fact in facts)
    assert len(relations) >= 22
    assert set(relations) == set(load_phrasings())
    for phrasings in load_phrasings().values():
        assert 4 <= len(phrasings.taught) <= 6
        assert len(phrasings.heldout) >= 2
        assert len({*phrasings.taught, *phrasings.heldout}) == len(phrasings.taught) + len(phrasings.heldout)


@pytest.mark.parametrize("wrong", ["{subject} has {object}", "There is {object}.", "{subject}, {subject} is {object}."])
@pytest.mark.parametrize("kind", ["taught", "heldout"])
def test_a_broken_phrasing_is_named(kind, wrong, monkeypatch):
    document = {"has": {"taught": ["{subject} has {object}."], "heldout": ["{subject} got {object}."]}}
    document["has"][kind].append(wrong)
    monkeypatch.setattr(json, "loads", lambda text: document)
    with pytest.raises(UserError, match=f"^phrasings.json: has: expected {{subject}} once .* last, got '{wrong}'$"):
        load_phrasings.__wrapped__()


def test_objects_are_short(facts):
    assert [fact.id for fact in facts if len(fact.object.split()) > 5 or fact.object.endswith(".")] == []


def test_no_prompt_has_two_answers(facts):
    """No prompt is another sentence's beginning unless the same answer follows there.

    This covers equal prompts of two facts and a prompt that is a prefix of a longer one, over all facts and all
    phrasings, the held-out ones too.
    """
    prompts = every_prompt(facts)
    by_text = defaultdict(list)
    for prompt in prompts:
        by_text[prompt.text].append(prompt)
    clashes = []
    for prompt in prompts:
        words = f"{prompt.text} {prompt.answer}.".split(" ")
        for cut in range(1, len(words)):
            rest = " ".join(words[cut:])
            for shorter in by_text.get(" ".join(words[:cut]), []):
                answers = (shorter.answer, *shorter.aliases)
                if not any(rest.startswith((f"{answer}.", f"{answer} ")) for answer in answers):
                    clashes.append((shorter.text, shorter.answer, prompt.text, prompt.answer))
    assert clashes == []


def test_no_heldout_prompt_is_taught(facts):
    taught = {prompt.text for fact in facts for prompt in taught_prompts(fact)}
    assert taught.isdisjoint(prompt.text for fact in facts for prompt in heldout_prompts(fact))


def test_the_asked_prompts_are_taught_word_for_word(facts):
    by_id = {fact.id: fact for fact in facts}
    prompts = load_prompts()
    for prompt in (*prompts.fast, *prompts.full):
        fact = by_id[prompt.fact_id]
        assert prompt.text in [taught.text for taught in taught_prompts(fact)]
        assert (prompt.answer, prompt.topic, prompt.priority) == (fact.object, fact.topic, fact.priority)


@pytest.mark.parametrize("count", [13, 14, 150, 200, 501])
def test_taught_facts_are_balanced_and_begin_with_the_asked_ones(facts, count):
    taught = taught_facts(facts, count)
    asked = {prompt.fact_id for prompts in vars(load_prompts()).values() for prompt in prompts}
    assert len({fact.id for fact in taught}) == len(taught) == count
    assert {fact.id for fact in taught[:13]} == asked
    assert taught == taught_facts(facts, count + 1)[:-1]
    extra = Counter(fact.relation for fact in taught[13:])
    available = Counter(fact.relation for fact in facts if fact.id not in asked)
    most = max(extra.values(), default=0)
    assert all(extra[relation] >= min(most - 1, number) for relation, number in available.items())


@pytest.mark.parametrize("count", [0, 12, 100_000])
def test_an_impossible_number_of_facts_is_refused(facts, count):
    with pytest.raises(UserError, match=rf"data\.facts: expected 13 to {len(facts)} facts, got {count}"):
        taught_facts(facts, count)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (f"{HEADER[1:]}\n{ROW}\n", "t.csv: line 1: expected the columns id,relation"),
        ("", "t.csv: line 1: expected the columns"),
        (f"{HEADER}\n{ROW},more\n", "t.csv: line 2: expected 8 fields, got 9"),
        (f"{HEADER}\n{ROW.replace('Paris', '')}\n", "t.csv: line 2: object: expected a value"),
        (f"{HEADER}\n{ROW.replace('Paris', ' Paris')}\n", "t.csv: line 2: object: expected single spaces"),
        (f"{HEADER}\n{ROW.replace('Paris,', 'Paris,a||b')}\n", "t.csv: line 2: aliases: "),
        (
            f"{HEADER}\n{ROW.replace(',capital,', ',color,')}\n",
            "t.csv: line 2: relation: expected one of .*got 'color'",
        ),
        (f"{HEADER}\n{ROW.replace('high', 'top')}\n", "t.csv: line 2: priority: expected one of high, medium, low"),
        (f"{HEADER}\n{ROW}\n{ROW}\n", "t.csv: line 3: id: 'capital-france' stands already in t.csv: line 2"),
        (f"{HEADER}\n{ROW}\nx{ROW}\n", "t.csv: line 3: relation, subject: 'capital/France' stands already"),
        (f'{HEADER}\n"{ROW}\n', "t.csv: line 2: not valid CSV"),
    ],
)
def test_a_broken_table_is_named_with_line_and_field(tmp_path, table, message):
    (tmp_path / "t.csv").write_text(table, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_facts(tmp_path)


def test_a_good_table_is_read_and_others_are_refused(tmp_path):
    with pytest.raises(UserError, match="found none"):
        load_facts(tmp_path)
    (tmp_path / "t.csv").write_text(f"{HEADER}\n{ROW.replace('Paris,', 'Paris,a|b')}\n", encoding="utf-8")
    (fact,) = load_facts(tmp_path)
    assert (fact.subject, fact.object, fact.aliases) == ("France", "Paris", ("a", "b"))
    (tmp_path / "t.csv").write_bytes(f"{HEADER}\n".encode() + b"\xff")
    with pytest.raises(UserError, match=f"t.csv: not UTF-8 at byte {len(HEADER) + 1}"):
        load_facts(tmp_path)
