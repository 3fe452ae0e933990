"""The tokenizer: exact size, round trip, determinism across processes, and a cache that survives damage."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models

from dsfast.data import heldout_prompts, load_facts, load_tokenizer, taught_prompts, train_tokenizer
from dsfast.data.articles import vocabulary_texts
from dsfast.data.tokenizer import for_texts, tokenizer_hash
from dsfast.errors import UserError
from dsfast.files import cache_folder
from dsfast.tokens import SPECIAL_TOKENS

TEXTS = ["the cat sat on the mat and the dog sat on the log in 1945"] * 3


@pytest.fixture(scope="module")
def bundled():
    return train_tokenizer(vocabulary_texts(load_facts()), 8000)


def test_the_bundled_text_gives_exactly_8000_tokens(bundled):
    assert bundled.get_vocab_size() == 8000
    assert [bundled.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2]
    assert sorted(bundled.get_vocab().values()) == list(range(8000))


@pytest.mark.parametrize(
    "text", ["The capital of France is Paris.", "naïve café 北京 🙂", "a  b\tc", "x", "<|eos|> <|bos|>"]
)
def test_decoding_gives_the_text_back_behind_one_space(bundled, text):
    ids = bundled.encode(text).ids
    assert bundled.decode(ids, skip_special_tokens=False) == f" {text}"
    assert min(ids) > 2, "the name of a special token inside a text is plain text"


def test_the_bundled_text_has_all_phrasings_also_those_held_out():
    texts = set(vocabulary_texts(load_facts()))
    for phrasings in (taught_prompts, heldout_prompts):
        assert {prompt.sentence for fact in load_facts() for prompt in phrasings(fact)} <= texts


def test_a_word_has_one_token_at_the_start_and_inside(bundled):
    assert bundled.encode("The capital").ids == bundled.encode("x The capital").ids[-2:]


def test_years_and_one_word_objects_are_one_token(bundled):
    whole = [f.object for f in load_facts() if f.object.isalnum()]
    broken = {text for text in whole if len(bundled.encode(text).ids) != 1}
    assert broken == set()
    assert {year for year in range(1000, 2031) if len(bundled.encode(f"in {year}").ids) == 2} >= {
        1066,
        1492,
        1815,
        1945,
    }


def test_training_is_the_same_in_another_process(bundled):
    code = (
        "from dsfast.data import load_facts, train_tokenizer; from dsfast.data.articles import vocabulary_texts;"
        "from dsfast.data.tokenizer import tokenizer_hash;"
        "print(tokenizer_hash(train_tokenizer(vocabulary_texts(load_facts()), 8000)))"
    )
    environment = os.environ | {
        "PYTHONHASHSEED": "77",
        "RAYON_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == tokenizer_hash(bundled)


def test_too_small_a_text_or_size_is_refused():
    with pytest.raises(UserError, match=r"expected a text rich enough for 8000 tokens, but it gives only \d+"):
        train_tokenizer(TEXTS, 8000)
    with pytest.raises(UserError, match=r"model\.vocab_size: expected at least 259 .*got 258"):
        train_tokenizer(TEXTS, 258)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSFAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_cache_is_used(cache, monkeypatch):
    first = load_tokenizer(TEXTS, 270)
    (file,) = cache.iterdir()
    monkeypatch.setattr("dsfast.data.tokenizer.train_tokenizer", lambda *_: pytest.fail("trained again"))
    again = load_tokenizer(TEXTS, 270)
    assert again.to_str() == first.to_str()
    assert min(again.encode("<|eos|>").ids) > 2
    assert [f.name for f in cache.iterdir()] == [file.name], "no temporary file stays"


MANY = TEXTS * 50


@pytest.mark.parametrize(
    "other", [(MANY, 271), ([*MANY, "more"], 270), ([*MANY[:-1], "other"], 270)], ids=["size", "more", "the last"]
)
def test_another_text_or_size_has_another_entry(cache, other):
    load_tokenizer(MANY, 270)
    load_tokenizer(*other)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [("tokenizers.__version__", "0.0.1"), ("__file__", __file__), ("SPECIAL_TOKENS", ("<s>",))],
    ids=["library", "recipe", "special"],
)
def test_another_library_recipe_or_special_token_has_another_entry(cache, monkeypatch, name, value):
    load_tokenizer(TEXTS, 270)
    monkeypatch.setattr(f"dsfast.data.tokenizer.{name}", value)
    monkeypatch.setattr("dsfast.data.tokenizer.train_tokenizer", lambda *_: Tokenizer(models.BPE()))
    load_tokenizer(TEXTS, 270)
    assert len(list(cache.iterdir())) == 2


def test_texts_are_neither_padded_nor_cut(bundled):
    given = Tokenizer.from_str(bundled.to_str())
    given.enable_padding(length=64)
    given.enable_truncation(5)
    text = "The capital of France is <|eos|>."
    assert for_texts(given).encode(text).ids == bundled.encode(text).ids


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "binary"])
def test_a_damaged_cache_is_trained_anew(cache, damage):
    good = load_tokenizer(TEXTS, 270)
    (file,) = cache.iterdir()
    raw = file.read_bytes()
    file.write_bytes(
        {"truncate": raw[: len(raw) // 2], "flip": raw.replace(b"sat", b"sit"), "empty": b"", "binary": b"\xff\xfe"}[
            damage
        ]
    )
    assert load_tokenizer(TEXTS, 270).to_str() == good.to_str()
    assert file.read_bytes() == raw


def test_a_cache_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DSFAST_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="the tokenizer is not cached"):
        assert isinstance(load_tokenizer(TEXTS, 270), Tokenizer)


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("DSFAST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "dsfast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "dsfast"
