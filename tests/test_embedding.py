from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.utils.checkpoint
from operator_cases import OperatorContract, bad, drawn, edges, needs_native

from dsfast import ops
from dsfast.ops.cases import embedding_case


class TestEmbedding(OperatorContract):
    cases = (
        *edges(embedding_case, "n", v=11, r=5, d=7),
        *edges(embedding_case, "d", n=19, v=5, r=3),
        *edges(embedding_case, "r", n=19, v=5, d=3),
        embedding_case("no tokens", 0, 5, 3, 7),
        embedding_case("no tokens, no projection", 0, 5, 3, None),
        embedding_case("no projection", 37, 11, 19, None),
        embedding_case("no projection, one token", 1, 3, 1, None),
        embedding_case("one word: every gradient falls on one row", 97, 1, 7, 13),
        embedding_case("far more words than tokens: most rows have no gradient", 5, 1009, 3, 7),
        embedding_case("sums over 641 tokens", 641, 3, 5, 17),
        embedding_case("more than a block of words, each once or several times", 700, 400, 5, 17),
        embedding_case("the same without projection", 700, 400, 19, None),
        embedding_case("just too few tokens to look for equal words", 99, 400, 3, 7),
    )
    tiny = embedding_case("tiny", 4, 3, 2, 5)
    summed_over_threads = frozenset({"grad projection"})
    bad_arguments = (
        bad(r"embedding: input_ids must have shape \[N\], got \[1, 4\]", input_ids=lambda i: i[None]),
        bad(r"embedding: table must have shape \[V, R\], got \[3\]", table=lambda t: t[:, 0]),
        bad(r"embedding: projection must have shape \[2, D\], got \[1, 5\]", projection=lambda p: p[:1]),
        bad("embedding: input_ids must be torch.int64 on cpu, got torch.int32", TypeError, input_ids=torch.Tensor.int),
        bad("embedding: projection must be torch.float32 on cpu, got", TypeError, projection=torch.Tensor.double),
        bad(r"embedding: input_ids must lie in 0..2, 1 of 4 do not", input_ids=torch.tensor([0, 3, 1, 2])),
        bad(r"embedding: input_ids must lie in 0..2, 2 of 4 do not", input_ids=torch.tensor([0, -1, 1, -(2**62)])),
        bad(r"embedding: input_ids must lie in 0..-1", table=lambda t: t[:0]),
    )

    @staticmethod
    def independent(input_ids, table, projection):
        taken = torch.nn.functional.one_hot(input_ids, len(table)).to(table) @ table
        return taken if projection is None else taken @ projection


def test_may_be_checkpointed():
    """What is saved is unpacked once."""
    needs_native()
    ids, table, projection = drawn(embedding_case("", 9, 5, 3, 4))
    found = []
    for call in (ops.embedding, partial(torch.utils.checkpoint.checkpoint, ops.embedding, use_reentrant=False)):
        leaves = [x.clone().requires_grad_() for x in (table, projection)]
        found.append(torch.autograd.grad(call(ids, *leaves).sum(), leaves))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("which", ["table", "projection"])
def test_gradients_of_a_head_are_refused_on_a_cpu_not_left_out(which):
    ids, *weights = drawn(embedding_case("", 9, 5, 3, 4))
    of_the_head = [
        torch.zeros_like(x) if name == which else None for name, x in zip(("table", "projection"), weights, strict=True)
    ]
    with pytest.raises(NotImplementedError, match="embedding_backward takes no gradients of a head's on a CPU"):
        torch.ops.dsfast.embedding_backward(torch.ones(9, 4), ids, *weights, *[ids[:0]] * 3, *of_the_head)


@pytest.mark.parametrize(("r", "d"), [(3, 0), (0, 4), (0, 0)])
def test_an_empty_projection_is_left_to_the_reference(r, d):
    table, projection = torch.randn(7, r, requires_grad=True), torch.randn(r, d, requires_grad=True)
    with pytest.warns(ops.FallbackWarning, match="the kernels take no empty projection"):
        y = ops.embedding(torch.tensor([1, 2, 1]), table, projection)
    assert torch.equal(y, torch.zeros(3, d))
    gradients = torch.autograd.grad(y, (table, projection), torch.ones_like(y))
    assert [x.tolist() for x in gradients] == [torch.zeros_like(x).tolist() for x in (table, projection)]
