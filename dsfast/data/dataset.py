"""From a data configuration to packed rows, with a manifest that says what went in."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from tokenizers import Tokenizer

from dsfast.config import DataConfig
from dsfast.data.articles import vocabulary_texts, write_articles
from dsfast.data.facts import Fact, load_facts, taught_facts
from dsfast.data.packing import PackedRows, pack
from dsfast.data.sources import ENCYCLOPEDIA, read_texts
from dsfast.data.tokenizer import load_tokenizer, tokenizer_hash


@dataclass(frozen=True)
class Dataset:
    """The text a run trains on. `taught` is empty for a user's own text."""

    tokenizer: Tokenizer
    rows: PackedRows
    manifest: dict
    taught: list[Fact]


def build_dataset(data: DataConfig, vocab_size: int, seed: int, tokenizer: Tokenizer | None = None) -> Dataset:
    """Read or write the articles, train a tokenizer of `vocab_size` (or find it in the cache) where none is given, pack the rows.

    `data.facts` and `data.boost` are about the encyclopedia; a user's own text is taken as it is. Deterministic in
    the arguments and, for a user's source, its content. Raises UserError for bad input.
    """
    taught = []
    if data.source == ENCYCLOPEDIA:
        facts = load_facts()
        taught = taught_facts(facts, data.facts)
        texts = [article.text for article in write_articles(taught, data.max_articles, dict(data.boost), seed)]
        tokenizer = tokenizer or load_tokenizer(vocabulary_texts(facts), vocab_size)
    else:
        texts = read_texts(data.source, data.max_articles)
        tokenizer = tokenizer or load_tokenizer(texts, vocab_size)
    rows = pack(texts, tokenizer, data.sequence_length, seed)
    return Dataset(tokenizer, rows, _manifest(data, seed, texts, taught, tokenizer, rows), taught)


def _manifest(
    data: DataConfig, seed: int, texts: list[str], taught: list[Fact], tokenizer: Tokenizer, rows: PackedRows
) -> dict:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8") + b"\0")
    return {
        "source": data.source,
        "seed": seed,
        "boost": dict(data.boost),
        "articles": len(texts),
        "texts_sha256": digest.hexdigest(),
        "tokens": len(rows.stream),
        "rows": len(rows),
        "sequence_length": data.sequence_length,
        "facts_taught": len(taught),
        "vocab_size": tokenizer.get_vocab_size(),
        "tokenizer_sha256": tokenizer_hash(tokenizer),
    }
