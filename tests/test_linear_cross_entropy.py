from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
import torch.utils.checkpoint
from operator_cases import DRAWS, OperatorContract, assert_passed, bad, drawn, edges, needs_native, run_native

from dsfast import ops
from dsfast.errors import UserError
from dsfast.ops import native
from dsfast.ops.cases import linear_cross_entropy_case
from dsfast.ops.checks import check, check_draws
from dsfast.ops.linear_cross_entropy import _takes


class TestLinearCrossEntropy(OperatorContract):
    cases = (
        *edges(linear_cross_entropy_case, "n", r=5, v=11),
        *edges(linear_cross_entropy_case, "r", n=19, v=5),
        *(case for case in edges(linear_cross_entropy_case, "v", n=19, r=5) if case.name != "v 1"),
        linear_cross_entropy_case("no tokens", 0, 5, 11),
        linear_cross_entropy_case("all labels ignored: the loss is 0", 37, 5, 11, counted=0.0),
        linear_cross_entropy_case("most labels ignored", 67, 5, 11, counted=0.1),
        linear_cross_entropy_case("every label counts", 67, 5, 11, counted=1.0),
        linear_cross_entropy_case("a sum over 1009 words", 41, 16, 1009),
        linear_cross_entropy_case("a sum over 641 tokens", 641, 8, 97),
        linear_cross_entropy_case("a narrow head at its widest: chunks of 144 words", 131, 256, 433),
        linear_cross_entropy_case("a wide head: chunks of 480 words, sums in parts of 256", 131, 521, 1009),
        linear_cross_entropy_case("a wide head of fewer words than a chunk", 7, 1031, 479),
    )
    not_expanded = (1,)  # the weight: see test_equal_words
    tiny = linear_cross_entropy_case("tiny", 4, 3, 5, counted=1.0)
    summed_over_threads = frozenset({"output", "grad weight"})
    bad_arguments = (
        bad(r"linear_cross_entropy: hidden must have shape \[N, R\], got \[4\]", hidden=lambda h: h[:, 0]),
        bad(r"linear_cross_entropy: weight must have shape \[V, 3\], got \[5, 2\]", weight=lambda w: w[:, :2]),
        bad(r"linear_cross_entropy: labels must have shape \[4\], got \[3\]", labels=lambda x: x[:3]),
        bad("linear_cross_entropy: weight must be torch.float32 on cpu, got", TypeError, weight=torch.Tensor.double),
        bad("linear_cross_entropy: labels must be torch.int64 on cpu, got", TypeError, labels=torch.Tensor.int),
        bad(r"labels must lie in 0..4 or be -100, 1 of 4 do not", labels=torch.tensor([0, 5, -100, 4])),
        bad(r"labels must lie in 0..4 or be -100, 3 of 4 do not", labels=torch.tensor([-1, 2**62, -101, 4])),
        bad(r"labels must lie in 0..4 or be -7, 1 of 4 do not", labels=torch.tensor([0, -100, -7, 4]), ignore_index=-7),
    )

    @staticmethod
    def independent(hidden, weight, labels, ignore_index=-100):
        kept = labels != ignore_index
        z = hidden[kept] @ weight.T
        losses = torch.log(torch.exp(z - z.max().detach()).sum(1)) + z.max().detach() if len(z) else z.sum(1)
        taken = z.gather(1, labels[kept][:, None]).squeeze(1)
        return (losses - taken).sum() / max(1, len(z))


def test_an_ignore_index_that_is_a_word():
    needs_native()
    hidden, weight, labels = drawn(linear_cross_entropy_case("all count", 37, 5, 7, counted=1.0))

    def function(hidden, weight, labels):
        return ops.linear_cross_entropy(hidden, weight, labels, ignore_index=3)

    assert (labels == 3).any()
    rows = check("linear_cross_entropy", function, (hidden, weight, labels), (0, 1), ["reference", "native"])
    assert_passed(rows)


@pytest.mark.parametrize("implementation", ["reference", "native"])
def test_no_words_and_nothing_that_counts(implementation):
    needs_native()
    hidden = torch.randn(5, 8, requires_grad=True)
    with ops.use(implementation):
        loss = ops.linear_cross_entropy(hidden, torch.empty(0, 8), torch.full((5,), -100))
        loss.backward()
    assert loss == 0
    assert not hidden.grad.any()


def test_no_loss_is_below_zero():
    """A word some 30 likelier than all others, exponentials rounded: the loss is 0, not what is left of the rounding."""
    needs_native()
    weight = torch.zeros(300, 32)
    weight[200] = torch.linspace(0.5, 1.5, 32)
    hidden = torch.ones(1, 32) * torch.linspace(0.9, 1.1, 41)[:, None]
    for products in [torch.float32, torch.bfloat16][: 1 + hasattr(native.module(), "bfloat16")]:
        with ops.use("native"), native.products_in(products):
            losses = [ops.linear_cross_entropy(row[None], weight, torch.tensor([200])) for row in hidden]
        assert all(0 <= loss < 1e-3 for loss in losses)


@pytest.mark.parametrize("words", [1, 2, 17])
def test_equal_words(words):
    """Words with one weight: the loss is log V, and their gradients cancel in dhidden but for the last bits."""
    needs_native()
    case = linear_cross_entropy_case("equal words", 13, 5, words, counted=1.0)
    hidden, weight, labels = drawn(case)
    found = run_native(case, (hidden, weight[:1].expand(words, 5), labels))
    torch.testing.assert_close(found["output"], torch.tensor(float(words)).log(), rtol=3e-7, atol=1e-7)
    ulp = torch.finfo(torch.float32).eps
    assert found["grad hidden"].abs().max() <= 4 * ulp * weight.abs().max() / 13
    assert found["grad weight"].sum(0).abs().max() <= 4 * ulp * hidden.abs().max()


def test_ignored_rows_have_no_gradient():
    needs_native()
    case = linear_cross_entropy_case("half", 33, 5, 7, counted=0.5)
    arguments = drawn(case)
    gradient = run_native(case, arguments)["grad hidden"]
    ignored = arguments[2] == -100
    assert not gradient[ignored].any()
    assert gradient[~ignored].any(1).all()


@pytest.mark.parametrize("size", [1e-3, 30.0, 1e4])
def test_small_and_large_logits(size):
    """Logits of 10^5: the exponentials must not overflow, and a word with all the weight leaves a loss near 0."""
    needs_native()
    hidden, weight, labels = drawn(linear_cross_entropy_case("logits", 37, 5, 19))
    assert_passed(
        check("linear_cross_entropy", ops.linear_cross_entropy, (hidden * size, weight, labels), (0, 1), ["native"])
    )


@pytest.mark.parametrize("rise", [3.0, 60.0, 3000.0])
def test_later_words_far_likelier_than_the_first(rise):
    """What is subtracted before exp comes from the first words; later logits lie up to thousands above it, twice over."""
    needs_native()
    draws = []
    for seed in range(DRAWS):
        hidden, weight, labels = drawn(linear_cross_entropy_case("rise", 70, 8, 401), seed)
        weight[200] *= rise
        weight[390] *= 4 * rise
        draws.append([hidden, weight, labels])
    assert_passed(check_draws("linear_cross_entropy", ops.linear_cross_entropy, draws, (0, 1), ["native"]))


@pytest.mark.parametrize("logit", [50.0, 92.0, 300.0])
@pytest.mark.parametrize(("r", "v"), [(8, 401), (257, 1103)], ids=["narrow", "wide"])
def test_one_token_alone_to_which_a_later_word_is_far_likelier(r, v, logit):
    """Every place in a block of tokens; exp(87) is no infinity, but times a weight of 92 it is one."""
    needs_native()
    for token in (0, 20, 45, 69):
        hidden, weight, labels = drawn(linear_cross_entropy_case("alone", 70, r, v, counted=1.0))
        hidden[:, 0], weight[:, 0] = 0, 0
        hidden[token, 0], weight[v - 3, 0] = 1, logit
        arguments = hidden, weight, labels
        assert_passed(check("linear_cross_entropy", ops.linear_cross_entropy, arguments, (0, 1), ["native"]))


def test_forward_alone_gives_the_same_loss():
    """Without gradients nothing of them is made; the loss is the same bits."""
    needs_native()
    arguments = drawn(linear_cross_entropy_case("both ways", 67, 5, 131))
    with ops.use("native"):
        alone = ops.linear_cross_entropy(*arguments)
        arguments[0].requires_grad_()
        with_gradients = ops.linear_cross_entropy(*arguments)
        with torch.no_grad():
            under_no_grad = ops.linear_cross_entropy(*arguments)
    assert with_gradients.requires_grad
    assert not under_no_grad.requires_grad
    assert torch.equal(alone, with_gradients)
    assert torch.equal(alone, under_no_grad)


def test_z_loss():
    """The C++ kernel has none: "auto" runs the reference and says so, "native" refuses."""
    needs_native()
    hidden, weight, labels = drawn(linear_cross_entropy_case("z-loss", 9, 5, 11))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ops.FallbackWarning)  # comes once in a process
        found = ops.linear_cross_entropy(hidden, weight, labels, z_loss=0.5)
    reason = "the C++ kernel has no z_loss"
    assert reason in [row["reason"] for row in ops.fallbacks() if row["operator"] == "linear_cross_entropy"]
    with ops.use("native"), pytest.raises(UserError, match="kernel has no z_loss"):
        ops.linear_cross_entropy(hidden, weight, labels, z_loss=0.5)
    kept = labels != -100
    log_sums = torch.log(torch.exp(hidden[kept].double() @ weight.double().T).sum(1))
    plain = ops.linear_cross_entropy(hidden, weight, labels).double()
    torch.testing.assert_close(found.double(), plain + 0.5 * log_sums.square().mean(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("with_projection", "z_loss"), [(False, 0.5), (True, 0.0)])
def test_what_the_cpus_kernel_does_not_do_is_refused_not_left_out(with_projection, z_loss):
    hidden, weight, labels, *_, projection = drawn(linear_cross_entropy_case("", 3, 4, 5, d=4))
    projection = projection if with_projection else None
    with pytest.raises(NotImplementedError, match="has no z_loss and no projection on a CPU"):
        torch.ops.dsfast.linear_cross_entropy(hidden, weight, projection, labels, -100, False, z_loss)


def projected(n: int, d: int, r: int, v: int) -> tuple:
    """`linear_cross_entropy` of hidden, weight, labels and projection, and these."""
    hidden, weight, labels, *_, projection = drawn(linear_cross_entropy_case("", n, r, v, d=d))

    def function(hidden, weight, labels, projection):
        return ops.linear_cross_entropy(hidden, weight, labels, projection=projection)

    return function, (hidden, weight, labels, projection)


def test_with_a_projection():
    needs_native()
    function, arguments = projected(13, 24, 7, 50)
    assert_passed(check("linear_cross_entropy", function, arguments, (0, 1, 3), ["reference", "native"]))
    hidden, weight, labels, projection = arguments
    expected = ops.linear_cross_entropy(torch.nn.functional.linear(hidden, projection), weight, labels)
    assert torch.equal(function(*arguments), expected)


def test_a_projection_of_another_shape_or_dtype_is_refused():
    function, (hidden, weight, labels, projection) = projected(3, 24, 7, 50)
    with pytest.raises(ValueError, match=r"linear_cross_entropy: projection must have shape \[R, 24\], got \[7, 23\]"):
        function(hidden, weight, labels, projection[:, 1:])
    with pytest.raises(ValueError, match=r"linear_cross_entropy: weight must have shape \[V, 6\], got \[50, 7\]"):
        function(hidden, weight, labels, projection[1:])
    with pytest.raises(TypeError, match=r"linear_cross_entropy: projection must be torch.float32 on cpu, got"):
        function(hidden, weight, labels, projection.double())


@pytest.mark.parametrize(
    ("r", "d", "dtype", "taken"),
    [
        (32, 128, torch.bfloat16, True), (128, 128, torch.float16, True), (32, 128, torch.float32, False),
        (128, 129, torch.bfloat16, False), (129, 16, torch.bfloat16, False), (32, 512, torch.bfloat16, False),
        (64, 256, torch.bfloat16, True),
    ],
)  # fmt: skip
def test_which_projections_a_gpus_kernels_take(r, d, dtype, taken):
    assert _takes(torch.empty(r, d, dtype=dtype, device="meta")) == taken


def test_may_be_checkpointed():
    """What is saved is unpacked once."""
    needs_native()
    function, (hidden, weight, labels, projection) = projected(13, 24, 7, 50)
    found = []
    for call in (function, partial(torch.utils.checkpoint.checkpoint, function, use_reentrant=False)):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, projection)]
        found.append(torch.autograd.grad(call(*leaves[:2], labels, leaves[2]), leaves))
    assert all(map(torch.equal, *found))
