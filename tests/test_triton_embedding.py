"""The Triton kernels of embedding against the float64 reference; the contract of every operator's is in
tests/triton_contract.py."""

from __future__ import annotations

import pytest
import torch
from operator_cases import DRAWS, assert_passed, drawn
from triton_contract import (
    DEVICE,
    DTYPES,
    TritonContract,
    in_the_interpreter,
    on_device,
    on_the_device,
    poisoned,
    run_triton,
)

from dsfast import ops
from dsfast.errors import UserError
from dsfast.ops.cases import embedding_case
from dsfast.ops.checks import check, compare

# Tiles have 64 tokens, at most 128 columns and a depth of 64 in 16 bits, 32 each in float32; sorted tokens are summed by 64.


class TestEmbedding(TritonContract):
    cases = (
        embedding_case("no tokens", 0, 5, 3, 7),
        embedding_case("no tokens, no projection", 0, 5, 3, None),
        embedding_case("one word: every gradient falls on one row", 130, 1, 7, 13),
        embedding_case("no projection, words that do not occur", 37, 43, 19, None),
        embedding_case("one above a tile each way", 65, 5, 33, 33),
    )
    tiny = embedding_case("tiny", 4, 3, 2, 5)
    registered = ("embedding", "embedding_backward")


class TestNoProjection(TritonContract):
    """What the contract asks of `tiny`, without a projection."""

    cases = (embedding_case("one token", 1, 3, 1, None), embedding_case("no column", 3, 5, 0, None))
    tiny = embedding_case("tiny, no projection", 5, 3, 2, None)
    registered = ()


SIZES = (
    embedding_case("a tile each way", 64, 5, 64, 128),
    embedding_case("one below", 63, 5, 63, 127),
    embedding_case("one above", 65, 5, 65, 129),
    embedding_case("several steps of depth, both ways", 19, 7, 150, 145),
    embedding_case("more words than programs of a row of tiles", 9, 1030, 2, None),
    embedding_case("more tokens than keys are made together", 1030, 3, 2, None),
    embedding_case("rows in more than one strip", 5, 3, 1030, None),
)


@on_device
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SIZES, ids=lambda case: case.name)
def test_sizes(case, dtype):
    with poisoned():
        assert_passed(compare(case, ["triton"], DEVICE, dtype, draws=DRAWS))


@on_device
def test_starts_of_more_words_than_are_looked_up_together(monkeypatch):
    """Where a row of the table is several strips, each word's tokens are looked for once, by a kernel of their own."""
    from dsfast.triton_kernels import embedding as kernels

    monkeypatch.setattr(kernels, "_KEYS", 16)
    with poisoned():
        assert_passed(compare(embedding_case("40 words", 70, 40, 1030, None), ["triton"], DEVICE, draws=DRAWS))


# How often each word occurs, with the reason; blocks have 64 sorted tokens.
COUNTS = {
    "a word that fills a block": [64, 3],
    "one below and one above a block, beginning inside one": [5, 63, 65],
    "whole blocks with tokens before and after": [10, 190, 7],
    "whole blocks without": [64, 128, 1],
    "more blocks than are added together": [3, 64 * 18, 2],
    "no words between others": [2, 0, 0, 5, 0],
}


def of_counts(counts):
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]


@on_device
@pytest.mark.parametrize("n", [1, 31, 32, 33, 127, 128, 129, 300])
@pytest.mark.parametrize("v", [1, 7, 40000])
@pytest.mark.parametrize("compared", [False, True])
def test_tokens_are_sorted_by_word_and_keep_their_order(n, v, compared, monkeypatch):
    """Some ids are none: below 0, V and above; at widths of keys with 16 and with 32 bits."""
    from dsfast.triton_kernels import embedding as kernels

    monkeypatch.setattr(kernels, "MOST_COMPARED", 300 if compared else 0)
    ids = torch.randint(-2, v + 3, (n,), generator=torch.Generator().manual_seed(n))
    ids[n // 2] = 2**62
    expected = torch.where((ids >= 0) & (ids < v), ids, v)
    with poisoned():
        table = torch.zeros(v, 1, device=DEVICE)
        _, keys, order, starts = kernels.forward(ids.to(DEVICE), table, None, True)
    assert keys.tolist() == sorted(expected.tolist())
    assert order.tolist() == sorted(range(n), key=expected.tolist().__getitem__)
    assert torch.equal(starts.cpu(), torch.searchsorted(expected.sort()[0], torch.arange(v + 1)).int())


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("d", [None, 7])
@pytest.mark.parametrize("counts", COUNTS)
def test_long_segments(counts, d, dtype):
    """With a projection, which sums blocks of 32 in float32."""
    ids, generator = of_counts(COUNTS[counts]), torch.Generator().manual_seed(1)
    table = torch.randn(len(COUNTS[counts]), 3, generator=generator)
    projection = None if d is None else torch.randn(3, d, generator=generator)
    leaves = (1,) if d is None else (1, 2)
    with poisoned():
        arguments = on_the_device([ids, table, projection])
        assert_passed(check("embedding", ops.embedding, arguments, leaves, ["triton"], dtype))


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["tiny", "several parts", "no tokens", "no projection", "head alone", "table alone"])
def test_with_a_head_that_is_tied(case, dtype):
    """What the head finds for table and projection, in columns, is added to their gradients."""
    n, d = {"no tokens": 0, "several parts": 300}.get(case, 9), None if case == "no projection" else 7

    def both(input_ids, table, projection):
        y, table, projection = ops.tied_embedding(input_ids, table, projection)
        read = [] if projection is None or case == "table alone" else [projection.T.flatten()]
        return torch.cat([*([] if case == "head alone" else [y.flatten()]), 0.5 * table.T.flatten(), *read])

    arguments = on_the_device(drawn(embedding_case("tied", n, 5, 3, d)))
    with poisoned():
        assert_passed(check("embedding", both, arguments, (1,) if d is None else (1, 2), ["triton"], dtype))


@on_device
@pytest.mark.parametrize("leaf", [1, 2], ids=["table", "projection"])
def test_one_of_both_is_trained(leaf):
    arguments = on_the_device(drawn(embedding_case("one", 70, 5, 3, 7)))
    with poisoned():
        assert_passed(check("embedding", ops.embedding, arguments, (leaf,), ["triton"]))


@on_device
def test_programs_with_several_tiles_of_tokens(monkeypatch):
    """As where there are many tokens: 4 and 3 of 7 tiles for the projection's gradient."""
    from dsfast.triton_kernels import pieces

    monkeypatch.setattr(pieces, "PROGRAMS", 2)
    with poisoned():
        assert_passed(compare(embedding_case("7 tiles", 200, 5, 3, 7), ["triton"], DEVICE, draws=DRAWS))


@on_device
def test_parts_of_a_sum_over_tokens_are_float32():
    """Of -2048, -1 and, from afar, 2048 with 1 in another column: float16 has no 2049."""
    from dsfast.triton_kernels import embedding as kernels

    dy = torch.zeros(130, 2)
    dy[0, 0], dy[1, 0], dy[-1] = -2048.0, -1.0, torch.tensor([2048.0, 1.0])
    ids, one = torch.zeros(130, dtype=torch.int64), torch.ones(1, 2)
    ids, table, projection, dy = on_the_device([ids, one[:, :1].half(), one.half(), dy.half()])
    _, *kept = kernels.forward(ids, table, projection, True)
    dtable, dprojection = kernels.backward(dy, ids, table, projection, *kept, None, None)
    assert (dtable.tolist(), dprojection.tolist()) == ([[0.0]], [[-1.0, 1.0]])


@on_device
@pytest.mark.parametrize("d", [None, 7])
def test_nan_stays_in_its_word(d):
    """One token's gradient is NaN: that of its word is, and no other's, also beside it in a block."""
    from dsfast.triton_kernels import embedding as kernels

    ids, table, projection = on_the_device(drawn(embedding_case("nan", 70, 5, 3, d)))
    dy = torch.ones(70, d or 3, device=DEVICE)
    dy[1] = float("nan")
    _, *kept = kernels.forward(ids, table, projection, True)
    dtable, _ = kernels.backward(dy, ids, table, projection, *kept, None, None)
    word = torch.arange(5, device=DEVICE) == ids[1]
    assert dtable[word].isnan().all()
    assert dtable[~word].isfinite().all()


@on_device
@pytest.mark.parametrize("d", [None, 7])
@pytest.mark.parametrize("bad", [5, -1, 2**62, -(2**62), 2**32 + 1])
def test_id_out_of_range(bad, d):
    """Its row is NaN, and it adds nothing to the gradients; a GPU cannot raise without waiting."""
    case = embedding_case("out of range", 9, 5, 3, d)
    arguments = drawn(case)
    known = torch.arange(9) != 4
    arguments[0][4] = bad
    found = run_triton(case, arguments)
    assert found["output"][4].isnan().all()
    assert found["output"][known].isfinite().all()
    weights = torch.randint(-8, 9, found["output"].shape, generator=torch.Generator().manual_seed(0)) / 8
    leaves = [None if x is None else x.double().requires_grad_() for x in arguments[1:]]
    with ops.use("reference"):
        y = ops.embedding(arguments[0][known], *leaves)
    expected = torch.autograd.grad(y, [x for x in leaves if x is not None], weights[known].double())
    for name, x in zip(("grad table", "grad projection"), expected, strict=False):
        torch.testing.assert_close(found[name].cpu().double(), x, rtol=1e-5, atol=1e-5, msg=name)


@on_device
@pytest.mark.parametrize("projected", [False, True])
def test_block_of_ids_out_of_range(projected):
    """They sort behind all words, and a whole block of them is no word's."""
    ids = torch.full((200,), 10**6)
    ids[:3] = torch.tensor([0, 2, 2])
    table, dy = torch.ones(3, 4, device=DEVICE), torch.ones(200, 4, device=DEVICE)
    projection = torch.eye(4, device=DEVICE) if projected else None
    from dsfast.triton_kernels import embedding as kernels

    with poisoned():
        _, *kept = kernels.forward(ids.to(DEVICE), table, projection, True)
        dtable, _ = kernels.backward(dy, ids.to(DEVICE), table, projection, *kept, None, None)
    assert dtable[:, 0].tolist() == [1, 0, 2]


@pytest.mark.parametrize(("v", "dtype"), [(2**15 - 1, torch.int16), (2**15, torch.int32)])
def test_keys_hold_every_word_and_the_mark_for_none(v, dtype):
    from dsfast.triton_kernels import embedding as kernels

    assert kernels.key_dtype(v) == dtype
    assert torch.iinfo(dtype).max >= v


@on_device
def test_refused_before_launch():
    arguments = on_the_device([torch.zeros(2, dtype=torch.int64), torch.zeros(3, 4, dtype=torch.float64), None])
    with (
        ops.use("triton", "embedding"),
        pytest.raises(UserError, match="take float32, float16, bfloat16, got float64"),
    ):
        ops.embedding(*arguments)


test_in_the_interpreter = in_the_interpreter(__file__, ("sm_80",))
