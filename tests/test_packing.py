"""Packed rows against a plain construction of the same stream, their order over epochs, and whole data sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsfast.config import DataConfig
from dsfast.data import PackedRows, build_dataset, train_tokenizer
from dsfast.data.packing import pack
from dsfast.errors import UserError


class ByteTokenizer:
    """Stands in for a tokenizer: the token of a byte b is b + 3."""

    def encode_batch(self, texts, add_special_tokens):
        assert not add_special_tokens
        return [type("Encoding", (), {"ids": [b + 3 for b in text.encode()]}) for text in texts]


# Lengths with bos and eos: 2 (empty), 3, 7 and 40, so rows of 8 begin inside, at the start and at the end of documents.
TEXTS = ["", "a", "hello", "x" * 38, "", "b", "c" * 5, "d" * 17]


def expected_rows(length):
    """Every row as lists of (input, label, position), token by token."""
    stream = [(t, i, n) for n, text in enumerate(TEXTS) for i, t in enumerate([0, *(b + 3 for b in text.encode()), 1])]
    rows = []
    for start in range(0, len(stream) - length, length):
        row, position = [], 0
        for k in range(start, start + length):
            token, offset, document = stream[k]
            position = 0 if k == start or offset == 0 else position + 1
            following = stream[k + 1]
            row.append((token, following[0] if following[2] == document else -100, position))
        rows.append(row)
    return rows


@pytest.mark.parametrize("length", [1, 2, 7, 8, 11])
def test_rows_hold_the_stream_with_labels_and_positions(length):
    rows = pack(TEXTS, ByteTokenizer(), length, seed=5)
    expected = expected_rows(length)
    assert len(rows) == len(expected)
    got = []
    for step in range(len(rows)):
        batch = rows.batch(step, 1)
        assert batch.input_ids.shape == batch.labels.shape == batch.positions.shape == (1, length)
        got.append(list(zip(*(t[0].tolist() for t in (batch.input_ids, batch.labels, batch.positions)), strict=True)))
    assert sorted(got) == sorted(expected)


def test_segments_begin_where_positions_are_zero():
    batch = pack(TEXTS, ByteTokenizer(), 8, seed=0).batch(0, 5)
    starts = (batch.positions.flatten() == 0).nonzero().flatten().tolist()
    assert batch.cu_seqlens.tolist() == [*starts, 40]
    assert batch.cu_seqlens.dtype == torch.int32
    assert {batch.input_ids.dtype, batch.labels.dtype, batch.positions.dtype} == {torch.int64}
    assert set(range(0, 40, 8)) <= set(starts)


def test_an_epoch_deals_every_row_once_and_the_next_in_another_order():
    rows = PackedRows(np.arange(3, 3 + 12 * 4 + 1, dtype=np.int32), sequence_length=4, seed=1)
    epochs = [[rows.batch(e * 4 + i, 3).input_ids[:, 0].tolist() for i in range(4)] for e in range(2)]
    first, second = ([row for batch in epoch for row in batch] for epoch in epochs)
    assert sorted(first) == sorted(second) == list(range(3, 51, 4))
    assert first != second
    other = PackedRows(rows.stream, 4, seed=2)
    assert [other.batch(i, 3).input_ids[:, 0].tolist() for i in range(4)] not in epochs


def test_a_batch_is_a_function_of_the_step_alone():
    stream = np.arange(3, 104, dtype=np.int32)
    resumed = PackedRows(stream, 4, seed=1).batch(17, 3)
    rows = PackedRows(stream.copy(), 4, seed=1)
    for step in range(18):
        batch = rows.batch(step, 3)
    for name in ("input_ids", "labels", "positions", "cu_seqlens"):
        assert torch.equal(getattr(batch, name), getattr(resumed, name))
    batch.input_ids.zero_()
    assert torch.equal(rows.batch(17, 3).input_ids, resumed.input_ids)


@pytest.mark.parametrize("tokens", [0, 1, 4, 12])
def test_too_few_rows_for_a_batch_are_refused(tokens):
    rows = PackedRows(np.zeros(tokens, dtype=np.int32), 4, seed=0)
    message = rf"too few articles for one batch: they give {max(0, (tokens - 1) // 4)} rows of 4 tokens"
    with pytest.raises(UserError, match=rf"{message} and train\.batch_size is 3; raise data\.max_articles"):
        rows.batch(0, 3)


@pytest.fixture(autouse=True, scope="module")
def one_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSFAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_the_encyclopedia_is_built_the_same_twice():
    data = DataConfig(max_articles=300, facts=150, boost={"history": 3})
    first, second = build_dataset(data, 8000, seed=4), build_dataset(data, 8000, seed=4)
    assert first.manifest == second.manifest
    assert np.array_equal(first.rows.stream, second.rows.stream)
    other = build_dataset(data, 8000, seed=5)
    assert other.manifest["texts_sha256"] != first.manifest["texts_sha256"]
    assert (first.rows.seed, other.rows.seed) == (4, 5)
    assert other.manifest["tokenizer_sha256"] == first.manifest["tokenizer_sha256"]
    assert first.manifest | {"articles": 300, "facts_taught": 150, "vocab_size": 8000, "seed": 4} == first.manifest
    assert first.manifest["tokens"] == len(first.rows.stream)
    assert first.manifest["rows"] == len(first.rows)
    assert len(first.taught) == 150
    batch = first.rows.batch(0, 8)
    assert batch.input_ids.shape == (8, 256)
    assert batch.input_ids[batch.input_ids > 1].min() >= 3
    assert batch.input_ids.max() < 8000


def test_the_encyclopedia_is_read_by_the_tokenizer_that_is_given():
    tokenizer = train_tokenizer(["x"], 259)
    dataset = build_dataset(DataConfig(max_articles=2, facts=13), 8000, 0, tokenizer)
    assert dataset.tokenizer is tokenizer
    assert dataset.manifest["vocab_size"] == 259


def test_texts_that_are_parted_elsewhere_have_another_hash(tmp_path):
    tokenizer, hashes = train_tokenizer(["x"], 259), set()
    for texts in ("ab\n\nc", "a\n\nbc"):
        (tmp_path / "mine.txt").write_text(texts)
        data = DataConfig(source=str(tmp_path / "mine.txt"))
        hashes.add(build_dataset(data, 259, 0, tokenizer).manifest["texts_sha256"])
    assert len(hashes) == 2


def test_a_users_text_is_built_and_teaches_no_facts(tmp_path):
    (tmp_path / "mine.txt").write_text("\n\n".join(f"The number {n} is followed by {n + 1}." for n in range(99)))
    data = DataConfig(source=str(tmp_path / "mine.txt"), max_articles=50, sequence_length=16)
    with pytest.warns(UserWarning, match="only its first 50 documents are read"):
        dataset = build_dataset(data, 300, seed=0)
    assert dataset.taught == []
    assert dataset.manifest["articles"] == 50
    first = dataset.rows.stream[: list(dataset.rows.stream).index(1) + 1]
    assert first[0] == 0
    assert (
        dataset.tokenizer.decode(first.tolist(), skip_special_tokens=True).strip() == "The number 0 is followed by 1."
    )
