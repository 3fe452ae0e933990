"""The article writer (balance, boost, order, filler), and a user's own text (reading, cleaning, errors)."""

from __future__ import annotations

import json
import os
import random
import re
import statistics
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest
from unreadable import unreadable

from dsfast.data import heldout_prompts, load_facts, load_tokenizer, taught_facts, taught_prompts, write_articles
from dsfast.data.articles import filler_sentence, vocabulary_texts
from dsfast.data.sources import read_texts, sanitize
from dsfast.errors import UserError


@pytest.fixture(scope="module")
def facts():
    return taught_facts(load_facts(), 200)


@pytest.fixture(scope="module")
def articles(facts):
    return write_articles(facts, 1000, {"history": 3}, seed=0)


@pytest.fixture(scope="module")
def sentences(facts):
    """Every taught sentence and the fact it states."""
    return {f"{prompt.text} {prompt.answer}.": fact.id for fact in facts for prompt in taught_prompts(fact)}


def split(text):
    return re.split(r"(?<=\.) (?=[A-Z])", text)


def test_boosted_facts_stand_three_times_as_often_and_others_equally(facts, articles):
    stated = Counter(fact_id for article in articles for fact_id in article.fact_ids)
    usual = statistics.mean(stated[fact.id] for fact in facts if fact.topic != "history")
    for fact in facts:
        assert stated[fact.id] / usual == pytest.approx(3 if fact.topic == "history" else 1, rel=0.15)


def test_the_only_fact_of_a_boosted_topic_fills_up_and_opens_other_topics_articles_more_often():
    few = taught_facts(load_facts(), 13)
    (boosted,) = (fact for fact in few if fact.topic == "geography")
    written = write_articles(few, 1000, {"geography": 3}, seed=0)
    stated = Counter(fact_id for article in written for fact_id in article.fact_ids)
    opened = Counter(article.fact_ids[0] for article in written)
    most = max(number for fact_id, number in stated.items() if fact_id != boosted.id)
    assert stated[boosted.id] > 1.2 * most
    for number in (number for fact_id, number in opened.items() if fact_id != boosted.id):
        assert opened[boosted.id] / number == pytest.approx(3, rel=0.1)


def test_an_article_states_its_facts_and_otherwise_filler(articles, sentences):
    for article in articles:
        stated = [sentences[text] for text in split(article.text) if text in sentences]
        assert tuple(stated) == article.fact_ids
        assert len(set(stated)) == len(stated) >= 7
        assert split(article.text)[0] in sentences


def test_all_phrasings_are_taught_equally_and_no_heldout_one(facts, articles, sentences):
    used = Counter(text for article in articles for text in split(article.text) if text in sentences)
    for fact in facts:
        counts = [used[f"{prompt.text} {prompt.answer}."] for prompt in taught_prompts(fact)]
        assert max(counts) - min(counts) <= 1
    everything = " ".join(article.text for article in articles)
    assert not any(prompt.text in everything for fact in facts for prompt in heldout_prompts(fact))


def test_every_fact_opens_articles(facts, articles):
    opening = Counter(article.fact_ids[0] for article in articles)
    assert min(opening[fact.id] for fact in facts) >= 2


def test_no_fact_predicts_the_next(facts, articles):
    pairs = Counter(pair for article in articles for pair in zip(article.fact_ids, article.fact_ids[1:], strict=False))
    stated = Counter(fact_id for article in articles for fact_id in article.fact_ids)
    assert max(count / stated[first] for (first, _), count in pairs.items()) < 0.35


def test_lengths_and_the_share_of_filler(facts, articles, sentences, tmp_path, monkeypatch):
    monkeypatch.setenv("DSFAST_CACHE", str(tmp_path))
    tokenizer = load_tokenizer(vocabulary_texts(load_facts()), 8000)
    lengths = [len(tokenizer.encode(article.text).ids) for article in articles]
    assert min(lengths) >= 45
    assert max(lengths) <= 260
    filler = [text for article in articles for text in split(article.text) if text not in sentences]
    assert 0.10 <= sum(len(tokenizer.encode(text).ids) for text in filler) / sum(lengths) <= 0.20


def test_filler_never_begins_like_a_prompt_nor_names_a_fact():
    rng = random.Random(1)
    filler = [filler_sentence(rng) for _ in range(3000)]
    assert len(set(filler)) > 2500
    assert not any("{" in text for text in filler)
    facts = load_facts()
    prompts = {p.text for fact in facts for p in (*taught_prompts(fact), *heldout_prompts(fact))}
    beginnings = {" ".join(text.split()[:cut]) for text in filler for cut in range(1, len(text.split()))}
    assert beginnings.isdisjoint(prompts)


def test_the_same_seed_gives_the_same_articles_in_another_process(facts, articles):
    assert write_articles(facts, 1000, {"history": 3}, seed=0) == articles
    assert write_articles(facts, 1000, {"history": 3}, seed=1) != articles
    code = (
        "import hashlib; from dsfast.data import *;"
        "a = write_articles(taught_facts(load_facts(), 200), 1000, {'history': 3}, 0);"
        "print(hashlib.sha256(''.join(x.text for x in a).encode()).hexdigest())"
    )
    environments = [os.environ | {"PYTHONHASHSEED": s, "PYTHONPATH": os.pathsep.join(sys.path)} for s in ("1", "2")]
    outputs = {
        subprocess.run([sys.executable, "-c", code], env=e, capture_output=True, check=True).stdout
        for e in environments
    }
    assert len(outputs) == 1


@pytest.mark.parametrize("count", [1, 7])
def test_the_number_of_articles_is_exact_even_with_few_facts(count):
    articles = write_articles(taught_facts(load_facts(), 13), count, {}, seed=0)
    assert len(articles) == count
    assert all(1 <= len(set(article.fact_ids)) == len(article.fact_ids) for article in articles)


def test_a_boost_for_no_topic_is_refused(facts):
    with pytest.raises(UserError, match=r"data\.boost: expected topics among .*history.*, got 'sport'"):
        write_articles(facts, 10, {"sport": 2}, seed=0)


def test_sanitize_normalises_drops_controls_and_collapses_spaces():
    assert sanitize(" cafe\u0301\x00\x07 a\t\nb\u00a0 c\x1b ") == "caf\u00e9 a b c"
    assert sanitize("a \x01 b e\x07\u0301") == "a b \u00e9"
    assert sanitize("x\u00b2 \ufb01ne \u2460") == "x\u00b2 \ufb01ne \u2460", "what only looks alike is not exchanged"


def test_a_text_file_is_split_at_blank_lines_without_repeats(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes(b"\xef\xbb\xbfone\nline\n\n two \n \n\none  line\n\n\x00\n\nthree")
    assert read_texts(str(path), 10) == ["one line", "two", "three"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none is left out
        assert read_texts(str(path), 3) == ["one line", "two", "three"]
    with pytest.warns(UserWarning, match=r"mine\.txt: only its first 2 documents are read \(data\.max_articles\)"):
        assert read_texts(str(path), 2) == ["one line", "two"]


def test_a_folder_gives_one_document_a_file(tmp_path):
    (tmp_path / "b.txt").write_text("second\n\nstill")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.md").write_text("not read")
    (tmp_path / "d.txt").mkdir()
    assert read_texts(str(tmp_path), 10) == ["first", "second still"]


@pytest.mark.parametrize("goal", ["absent", "b.txt"])
def test_a_folder_with_a_broken_link_is_refused(tmp_path, goal):
    """A link to what is not there, or to itself; one that leads to a text is read, and what is no .txt is passed over."""
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "c.txt").symlink_to("a.md")
    (tmp_path / "a.md").write_text("two")
    (tmp_path / "b.md").symlink_to("absent")
    assert read_texts(str(tmp_path), 10) == ["one", "two"]
    (tmp_path / "b.txt").symlink_to(goal)
    with pytest.raises(UserError, match=rf"^{tmp_path}/b\.txt: expected a text file, this is a broken link$"):
        read_texts(str(tmp_path), 10)


def test_a_jsonl_file_gives_one_document_a_line(tmp_path):
    path = tmp_path / "mine.jsonl"
    lines = [{"text": "one", "title": 3, "url": "One"}, {"text": "two\u2028more"}]
    path.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    assert read_texts(str(path), 10) == ["one", "two more"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"good \xff", r"x\.txt: not UTF-8 at byte 5"),
        ("x.txt", b"\xef\xbb\xbfgood \xff", r"x\.txt: not UTF-8 at byte 8"),
        ("x.txt", b" \n\n\x00", r"x\.txt: expected text, found none"),
        ("x.jsonl", b"", r"x\.jsonl: expected text, found none"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}', r"x\.jsonl: not UTF-8 at byte 24"),
        ("x.jsonl", b'{"text": "a"}\n{"text": ', r"x\.jsonl:2: not valid JSON"),
        ("x.jsonl", b'{"text": "a"}\n\n["text"]', r"x\.jsonl:3: expected an object with a string \"text\""),
        ("x.jsonl", b'{"text": "a"}\n\xef\xbb\xbf{"text": "b"}', r"x\.jsonl:2: not valid JSON"),
        ("x.jsonl", b"[" * 100_000, r"x\.jsonl:1: not valid JSON"),
        ("x.jsonl", b'{"title": "a"}', r"x\.jsonl:1: expected an object with a string \"text\""),
        ("x.jsonl", b'{"text": "\\ud800"}', r"x\.jsonl:1: holds half of a surrogate pair"),
        ("x.csv", b"text", r"data\.source: expected 'encyclopedia', an existing \.txt"),
    ],
)
def test_bad_text_is_named_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_texts(str(tmp_path / name), 10)
    assert "\n" not in str(caught.value)


def test_where_a_relative_source_is_looked_for_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"\(by its whole name, or as seen from {tmp_path}\), got 'mine.txt'"):
        read_texts("mine.txt", 10)


@pytest.mark.parametrize("name", ["missing.txt", "missing", "empty"])
def test_a_source_that_is_not_there_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="expected"):
        read_texts(str(tmp_path / name), 10)


@pytest.mark.parametrize(
    ("source", "closed"),
    [
        ("mine", "mine"),
        ("mine", "mine/a.txt"),
        ("mine/a.txt", "mine"),
        ("mine/a.txt", "mine/a.txt"),
        ("x.jsonl", "x.jsonl"),
    ],
)
def test_a_source_that_may_not_be_read_is_refused(tmp_path, monkeypatch, source, closed):
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)  # pytest's is closed to all but its owner
    Path("mine").mkdir()
    for name in ("mine/a.txt", "x.jsonl"):
        Path(name).write_text('{"text": "a"}')
    assert read_texts(source, 10)
    with (
        unreadable(Path(closed)),
        pytest.raises(UserError, match=r"^(mine|mine/a\.txt|x\.jsonl): cannot read \(Permission"),
    ):
        read_texts(source, 10)
