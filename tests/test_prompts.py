"""The prompts file: the specification's 13, and strict reading of a user's own."""

from __future__ import annotations

import json

import pytest

from dsfast.data import Prompt, load_prompts
from dsfast.errors import UserError

SPECIFIED = {
    "The atomic bombing of Hiroshima occurred in": "1945",
    "World War II ended in the year": "1945",
    "The first atomic bomb was dropped on": "Hiroshima",
    "The capital of France is": "Paris",
    "The Earth orbits the": "Sun",
    "Water is composed of hydrogen and": "oxygen",
    "The first President of the United States was": "George Washington",
    "The speed of light is approximately": "300000",
    "DNA stands for": "deoxyribonucleic acid",
    "The largest planet in our solar system is": "Jupiter",
    "Albert Einstein developed the theory of": "relativity",
    "The Battle of Waterloo took place in": "1815",
    "Shakespeare wrote": "Hamlet",
}


def test_the_bundled_prompts_are_the_specified_ones():
    prompts = load_prompts()
    assert {p.text: p.answer for p in (*prompts.fast, *prompts.full)} == SPECIFIED
    assert [p.text for p in prompts.fast] == list(SPECIFIED)[:3]
    assert [p.priority for p in prompts.full] == ["high"] * 4 + ["medium"] * 4 + ["low"] * 2


def write(tmp_path, document):
    path = tmp_path / "mine.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return path


def test_a_users_file_is_read_with_its_defaults(tmp_path):
    entry = {"text": "Snow is", "answer": "white", "aliases": ["pale"]}
    prompts = load_prompts(write(tmp_path, {"fast": [entry], "full": [{**entry, "priority": "low"}]}))
    assert prompts.fast == [Prompt("Snow is", "white", ("pale",), "", "", "medium")]
    assert prompts.full[0].priority == "low"


GOOD = {"text": "Snow is", "answer": "white"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("Snow", r"mine.json: full\[0\]: expected an object"),
        ({"text": "Snow is"}, r"mine.json: full\[0\].answer: expected a non-empty string, got nothing"),
        ({**GOOD, "answer": 7}, r"full\[0\].answer: expected a non-empty string, got 7"),
        ({**GOOD, "answer": "..."}, r"full\[0\].answer: expected a word or a number, got \"\.\.\.\""),
        ({**GOOD, "text": " "}, r"full\[0\].text: expected a non-empty string"),
        ({**GOOD, "text": "Snow is "}, r"full\[0\].text: expected no spaces at either end"),
        ({**GOOD, "text": 99 * "x" + " "}, r"full\[0\].text: expected no spaces at either end, got \"x{56}\.\.\.$"),
        ({**GOOD, "answers": "x"}, r"full\[0\].answers: unknown field; known: text, answer"),
        ({**GOOD, "priority": "top"}, r"full\[0\].priority: expected high, medium, low, got 'top'"),
        ({**GOOD, "aliases": "pale"}, r"full\[0\].aliases: expected a list"),
        ({**GOOD, "aliases": [""]}, r"full\[0\].aliases: expected a list"),
        ({**GOOD, "aliases": ["white", "!"]}, r"full\[0\].aliases: expected a list of words or numbers"),
        ({**GOOD, "topic": None}, r"full\[0\].topic: expected a string, got null"),
    ],
)
def test_a_wrong_prompt_is_named_with_its_field(tmp_path, entry, message):
    with pytest.raises(UserError, match=message) as caught:
        load_prompts(write(tmp_path, {"fast": [GOOD], "full": [entry]}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "mine.json: expected an object with exactly the lists 'fast' and 'full'"),
        ({"fast": [GOOD]}, "mine.json: expected an object with exactly the lists"),
        ({"fast": [], "full": [GOOD]}, "mine.json: fast: expected a list of at least one prompt"),
        ('{"fast": [}', "mine.json: not valid JSON"),
        ('{"fast": 1, "fast": 2, "full": 3}', "mine.json: key 'fast' stands twice"),
        ('{"fast": NaN, "full": 3}', "mine.json: NaN is not a JSON number"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, document, message):
    with pytest.raises(UserError, match=message):
        load_prompts(write(tmp_path, document))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: cannot be read"):
        load_prompts(tmp_path / "none.json")
