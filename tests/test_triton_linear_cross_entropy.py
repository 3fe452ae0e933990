"""The Triton kernels of linear_cross_entropy against the float64 reference; the contract of every operator's is in
tests/triton_contract.py."""

from __future__ import annotations

import pytest
import torch
from operator_cases import DRAWS, assert_passed, drawn, padded, transposed
from test_linear_cross_entropy import projected
from triton_contract import (
    DEVICE,
    DTYPES,
    TritonContract,
    in_the_interpreter,
    on_device,
    on_the_device,
    poisoned,
    run_triton,
    without_maximum,
)

from dsfast import ops
from dsfast.errors import UserError
from dsfast.ops.cases import linear_cross_entropy_case
from dsfast.ops.checks import check, check_draws, compare
from dsfast.ops.triton import INTERPRETED

# Tiles have 128 tokens and 64 words in the forward pass in 16 bits, and the other way round for the weight's gradient; 64 or
# 32 in float32. The second way begins above a width of 256, in float32 above 128.
WIDE = 257
WIDTHS = (5, WIDE)


class TestLinearCrossEntropy(TritonContract):
    cases = (
        linear_cross_entropy_case("no tokens", 0, 5, 11),
        linear_cross_entropy_case("no tokens, wide", 0, WIDE, 11),
        linear_cross_entropy_case("most labels ignored, several tiles of words", 19, 5, 131, counted=0.1),
        linear_cross_entropy_case("all labels ignored: the loss is 0", 37, 5, 11, counted=0.0),
        linear_cross_entropy_case("all labels ignored, wide", 3, WIDE, 11, counted=0.0),
        linear_cross_entropy_case("one above a tile", 129, 32, 65),
        linear_cross_entropy_case("wide", 11, WIDE, 67),
    )
    tiny = linear_cross_entropy_case("tiny", 4, 3, 5, counted=1.0)
    not_expanded = (1,)  # the weight: words with one weight make dhidden cancel to nothing
    registered = ("linear_cross_entropy", "linear_cross_entropy_backward")


class TestWide(TritonContract):
    """What the contract asks of `tiny`, for the second way."""

    cases = (linear_cross_entropy_case("one token", 1, WIDE, 5, counted=1.0),)
    tiny = linear_cross_entropy_case("tiny, wide", 4, WIDE, 5, counted=1.0)
    not_expanded = (1,)
    registered = ()


SIZES = (
    linear_cross_entropy_case("one token, one word more than one", 1, 32, 2, counted=1.0),
    linear_cross_entropy_case("a tile of words and of tokens", 128, 32, 64),
    linear_cross_entropy_case("one below a tile", 127, 32, 63),
    linear_cross_entropy_case("several tiles each way", 131, 16, 331),
    linear_cross_entropy_case("as wide as the first way goes, no power of two", 19, 127, 37),
)


@on_device
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SIZES, ids=lambda case: case.name)
def test_sizes(case, dtype):
    with poisoned():
        assert_passed(compare(case, ["triton"], DEVICE, dtype, draws=DRAWS))


@on_device
@pytest.mark.parametrize("programs", [1, pytest.param(7, marks=pytest.mark.slow)])
def test_several_tiles_in_one_program(programs, monkeypatch):
    """Small cases are split into programs of one tile; here programs go through several, the last share through fewer."""
    from dsfast.triton_kernels import pieces

    monkeypatch.setattr(pieces, "PROGRAMS", programs)
    with poisoned():
        case = linear_cross_entropy_case("several tiles", 70, 8, 101)
        assert_passed(compare(case, ["triton"], DEVICE, torch.float32, draws=DRAWS))


@on_device
def test_more_tokens_than_one_step_adds_up(monkeypatch):
    """257 tiles whose counted tokens are added up 256 at a time; of losses and labels 4,096 are."""
    from dsfast.triton_kernels import linear_cross_entropy as kernels

    monkeypatch.setitem(kernels._FLOAT32["forward"], 16, kernels._FLOAT32["forward"][16]._replace(rows=16))
    monkeypatch.setattr(kernels, "_COMBINED", 2**14)
    case = linear_cross_entropy_case("many tokens", 4097, 1, 2, counted=1.0)
    arguments = on_the_device(drawn(case))
    with poisoned(), torch.no_grad():
        assert_passed(check(case.operator, case.function, arguments, (), ["triton"]))
        count = torch.empty(1, device=DEVICE)
        kernels.count_launch(torch.arange(4097, device=DEVICE), 4095, count).run()
    assert count == 4096


@on_device
@pytest.mark.parametrize("words", [101, pytest.param(96, marks=pytest.mark.slow)])
def test_several_blocks_in_a_row(words, monkeypatch):
    """The sweep over a row of logits, the second way's, in several blocks; the last of them cut off, or as long as the row."""
    from dsfast.triton_kernels import linear_cross_entropy as kernels

    monkeypatch.setattr(kernels, "_WORDS", 32)
    with poisoned():
        case = linear_cross_entropy_case("several blocks", 5, WIDE, words)
        assert_passed(compare(case, ["triton"], DEVICE, torch.float32, draws=DRAWS))


@on_device
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("tokens", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 5, 12))])
def test_chunks(tokens, dtype, monkeypatch):
    """A chunk that does not divide the tokens; of one token; all but one; strips and blocks that do not divide the words."""
    from dsfast.triton_kernels import linear_cross_entropy as kernels

    monkeypatch.setattr(kernels, "WORKSPACE", tokens * 592 * dtype.itemsize)
    monkeypatch.setattr(kernels, "_STRIP", 256)
    monkeypatch.setattr(kernels, "_WORDS", 512)  # one for each thread
    assert kernels.chunk_shape(13, 579, dtype.itemsize)[0] <= tokens

    def function(hidden, weight, labels):
        return ops.linear_cross_entropy(hidden, weight, labels, z_loss=0.125)

    case = linear_cross_entropy_case("chunks", 13, WIDE, 579)
    draws = [on_the_device(drawn(case, seed)) for seed in range(DRAWS)]
    with poisoned():
        assert_passed(check_draws("linear_cross_entropy", function, draws, (0, 1), ["triton"], dtype))


def test_chunks_stay_within_the_workspace():
    from dsfast.triton_kernels import linear_cross_entropy as kernels

    for n, v, itemsize in (
        (1, 129280, 2),
        (2048, 129280, 2),
        (16384, 129280, 2),
        (16384, 129280, 4),
        (10**6, 50257, 2),
    ):
        chunk, width = kernels.chunk_shape(n, v, itemsize)
        assert chunk * width * itemsize <= kernels.WORKSPACE
        assert chunk <= n
        assert width >= v
        assert width % 8 == 0
    assert kernels.chunk_shape(2048, 129280, 2)[0] == 2048


@on_device
@pytest.mark.parametrize(("programs", "width"), [(528, 5), (1, 5), (528, WIDE)], ids=str)
@pytest.mark.parametrize("size", [1e4, *(pytest.param(size, marks=pytest.mark.slow) for size in (1e-3, 30.0))])
def test_small_and_large_logits(size, programs, width, monkeypatch):
    """Logits of 10^5: the exponentials must not overflow, and a word with all the weight leaves a loss near 0."""
    from dsfast.triton_kernels import pieces

    monkeypatch.setattr(pieces, "PROGRAMS", programs)  # 1: one goes through all tiles of words
    draws = []
    for seed in range(DRAWS):
        hidden, weight, labels = drawn(linear_cross_entropy_case("logits", 19, width, 101), seed)
        draws.append(on_the_device([hidden * size, weight, labels]))
    assert_passed(check_draws("linear_cross_entropy", ops.linear_cross_entropy, draws, (0, 1), ["triton"]))


@on_device
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("z_loss", [0.0, 0.125])
def test_logits_far_below_zero(z_loss, width):
    """All of them: relative to 0 there would be no weight left. A z-loss turns their gradients round."""

    def function(hidden, weight, labels):
        return ops.linear_cross_entropy(hidden, weight, labels, z_loss=z_loss)

    draws = []
    for seed in range(DRAWS):
        hidden, weight, labels = drawn(linear_cross_entropy_case("below", 9, width, 37), seed)
        draws.append(on_the_device([hidden.abs() * 1000, -weight.abs(), labels]))
    assert_passed(check_draws("linear_cross_entropy", function, draws, (0, 1), ["triton"]))


@on_device
@pytest.mark.parametrize(("programs", "width"), [(528, 5), (1, 5), (528, WIDE)], ids=str)
@pytest.mark.parametrize("rise", [3000.0, *(pytest.param(rise, marks=pytest.mark.slow) for rise in (3.0, 60.0))])
def test_later_words_far_likelier_than_the_first(rise, programs, width, monkeypatch):
    """The running maximum rises from tile to tile, by up to thousands, twice over."""
    from dsfast.triton_kernels import pieces

    monkeypatch.setattr(pieces, "PROGRAMS", programs)
    draws = []
    for seed in range(DRAWS):
        hidden, weight, labels = drawn(linear_cross_entropy_case("rise", 9, width, 131), seed)
        weight[66] *= rise
        weight[120] *= 4 * rise
        draws.append(on_the_device([hidden, weight, labels]))
    assert_passed(check_draws("linear_cross_entropy", ops.linear_cross_entropy, draws, (0, 1), ["triton"]))


@on_device
@pytest.mark.parametrize("grads", [True, False])
@pytest.mark.parametrize(
    ("largest", "first", "right"),
    [(9.0, True, True), (43.0, True, True), (46.0, False, False), (300.0, False, False), (-43.0, False, True),
     (-46.0, True, False), (-300.0, False, False), (float("nan"), True, False)],
)  # fmt: skip
def test_exponentials_of_the_logits_themselves(largest, first, right, grads, monkeypatch):
    """One word, in the first tile or the last, which is cut off, has that logit and the others one far below it: as long as
    exponentials fit float32 there is no maximum, else all begins anew with one."""
    from dsfast.triton_kernels import linear_cross_entropy as kernels
    from dsfast.triton_kernels import pieces

    monkeypatch.setattr(pieces, "PROGRAMS", 1)
    taken = without_maximum(monkeypatch, kernels)
    random = torch.Generator().manual_seed(0)
    hidden, weight = torch.ones(9, 4), torch.randn(101, 4, generator=random) - 100
    weight[3 if first else 100] = largest / 4
    arguments = on_the_device([hidden, weight, torch.tensor([3, 100, 7, 5, -100, 0, 50, 3, 100])])
    differentiable = (0, 1) if grads else ()
    assert_passed(check("linear_cross_entropy", ops.linear_cross_entropy, arguments, differentiable, ["triton"]))
    assert not taken or set(taken) == {right}


@on_device
def test_a_share_of_the_words_begins_anew_by_itself(monkeypatch):
    """The first and the last of three fit, the one between them, all of its words far below zero, does not."""
    from dsfast.triton_kernels import linear_cross_entropy as kernels
    from dsfast.triton_kernels import pieces

    monkeypatch.setattr(pieces, "PROGRAMS", 3)
    taken = without_maximum(monkeypatch, kernels)
    hidden, weight, labels = drawn(linear_cross_entropy_case("shares", 9, 4, 301))
    weight[128:256] -= 100
    arguments = on_the_device([hidden.abs() + 1, weight, labels])
    assert_passed(check("linear_cross_entropy", ops.linear_cross_entropy, arguments, (0, 1), ["triton"]))
    assert not INTERPRETED or taken == [True, False, True]


@on_device
@pytest.mark.parametrize("width", WIDTHS)
def test_the_benchmark_has_a_softmax_with_a_maximum_beside_the_one_without(width, monkeypatch):
    from dsfast.triton_kernels import linear_cross_entropy as kernels

    from dsfast.bench.gpu.peers import PEERS
    from dsfast.bench.gpu.peers.peer import RefusedError

    peer, arguments = PEERS["head"]["with a maximum"], on_the_device(drawn(linear_cross_entropy_case("", 9, width, 67)))
    with ops.use("triton"):
        expected = ops.linear_cross_entropy(*arguments)
        taken = without_maximum(monkeypatch, kernels)
        if width == WIDE:
            with pytest.raises(RefusedError, match="has a maximum here too"):
                peer.prepare(arguments, (0, 1))
            return
        assert torch.equal(peer.prepare(arguments, (0, 1)).run(), expected)
    assert not taken


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("programs", "words"), [(528, 331), (1, 331), (1, 64), (2, 63)], ids=str)
def test_no_maximum_is_needed(programs, words, dtype, monkeypatch):
    """With logits of some units in shares of several tiles, of one, and of one that is cut off."""
    from dsfast.triton_kernels import linear_cross_entropy as kernels
    from dsfast.triton_kernels import pieces

    monkeypatch.setattr(pieces, "PROGRAMS", programs)
    taken = without_maximum(monkeypatch, kernels)
    with poisoned():
        case = linear_cross_entropy_case("no maximum", 19, 16, words)
        assert_passed(compare(case, ["triton"], DEVICE, dtype, draws=DRAWS))
    assert all(taken)
    assert taken or not INTERPRETED


@on_device
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
def test_z_loss(dtype, width):
    def function(hidden, weight, labels):
        return ops.linear_cross_entropy(hidden, weight, labels, z_loss=0.125)

    case = linear_cross_entropy_case("z-loss", 7, width, 35)
    draws = [on_the_device(drawn(case, seed)) for seed in range(DRAWS)]
    with poisoned():
        assert_passed(check_draws("linear_cross_entropy", function, draws, (0, 1), ["triton"], dtype))


@on_device
@pytest.mark.parametrize("width", WIDTHS)
def test_an_ignore_index_that_is_a_word(width):
    def function(hidden, weight, labels):
        return ops.linear_cross_entropy(hidden, weight, labels, ignore_index=3)

    arguments = on_the_device(drawn(linear_cross_entropy_case("all count", 37, width, 7, counted=1.0)))
    assert (arguments[2] == 3).any()
    assert_passed(check("linear_cross_entropy", function, arguments, (0, 1), ["triton"]))


@on_device
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("argument", [0, 1])
def test_nan_and_infinities_come_out_where_eager_shows_them(argument, value, width):
    case = linear_cross_entropy_case("not finite", 5, width, 7, counted=1.0)
    for place in (0, 4):  # tokens that count and that do not; words that are no label
        arguments = drawn(case)
        arguments[2][:] = torch.tensor([1, 2, 3, 2, -100])
        arguments[argument][place, 1] = value
        assert_passed(check("linear_cross_entropy", case.function, on_the_device(arguments), (0, 1), ["triton"]))


@on_device
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("label", [11, -1, -(2**62), 2**32 + 1])
def test_label_out_of_range(label, width):
    """The loss is NaN, and so are that token's gradient and the weight's; a GPU cannot raise without waiting."""
    case = linear_cross_entropy_case("out of range", 9, width, 11, counted=1.0)
    arguments = drawn(case)
    arguments[2][4] = label
    found = run_triton(case, arguments)
    assert found["output"].isnan()
    assert found["grad weight"].isnan().all()
    assert found["grad hidden"][4].isnan().all()
    assert found["grad hidden"][torch.arange(9) != 4].isfinite().all()


@on_device
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_alone_gives_the_same_loss(dtype, width):
    """Without gradients nothing of them is made; the loss is the same bits, and float32 whatever the inputs are."""
    hidden, weight, labels = on_the_device(drawn(linear_cross_entropy_case("both ways", 11, width, 67)))
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    with ops.use("triton", "linear_cross_entropy"):
        alone = ops.linear_cross_entropy(hidden, weight, labels)
        hidden.requires_grad_()
        with_gradients = ops.linear_cross_entropy(hidden, weight, labels)
    assert alone.dtype == with_gradients.dtype == torch.float32
    assert with_gradients.requires_grad
    assert torch.equal(alone, with_gradients)


@on_device
@pytest.mark.parametrize("width", WIDTHS)
def test_loss_scale(width):
    """In float16 gradients are not rounded before they are scaled; 2^17 is itself no float16."""
    hidden, weight, labels = on_the_device(drawn(linear_cross_entropy_case("scaled", 33, width, 67)))
    leaves = [hidden.half().requires_grad_(), weight.half().mul(2**-14).requires_grad_()]
    gradients = {}
    for implementation in ("triton", "reference"):
        with ops.use(implementation, "linear_cross_entropy"):
            loss = ops.linear_cross_entropy(*leaves, labels)
        gradients[implementation] = torch.autograd.grad(loss * 2.0**17, leaves)
    for found, expected in zip(gradients["triton"], gradients["reference"], strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


@on_device
@pytest.mark.parametrize("width", WIDTHS)
def test_the_gradient_of_the_weight_is_summed_in_float32(width, monkeypatch):
    """Tokens cancel but for one: rounded to float16 the part of 64 of them, of a program or a chunk, would not keep it."""
    from dsfast.triton_kernels import linear_cross_entropy as kernels

    monkeypatch.setattr(kernels, "WORKSPACE", 64 * 512 * 2)
    hidden, labels = torch.full((128, width), 2048.0), torch.zeros(128, dtype=torch.int64)
    hidden[0], hidden[64:] = 2047.0, -2048.0
    hidden, weight, labels = on_the_device([hidden.half(), torch.zeros(512, width).half(), labels])
    with ops.use("triton", "linear_cross_entropy"):
        loss = ops.linear_cross_entropy(hidden, weight.requires_grad_(), labels)
    (found,) = torch.autograd.grad(loss, weight)
    expected = torch.full_like(found, -1 / 512 / 128)
    expected[0] += 1 / 128
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0)


@on_device
def test_sums_of_many_words_do_not_overflow(monkeypatch):
    """They are not divided by the sum of exponentials yet: 256 times 400 is beyond float16."""
    from dsfast.triton_kernels import pieces

    monkeypatch.setattr(pieces, "PROGRAMS", 1)
    weight = torch.zeros(512, 8)
    weight[:256] = 400.0
    arguments = on_the_device([torch.zeros(3, 8), weight, torch.tensor([0, 300, 511])])
    assert_passed(check("linear_cross_entropy", ops.linear_cross_entropy, arguments, (0,), ["triton"], torch.float16))


@on_device
def test_words_with_equal_large_logits():
    """A third each: the log2 of 3 added to their maximum would be rounded off in float32."""
    arguments = [torch.full((5, 8), 1000.0), torch.full((3, 8), 41.0), torch.tensor([0, 1, 2, 0, -100])]
    hidden, weight, labels = on_the_device(arguments)
    with ops.use("triton", "linear_cross_entropy"):
        loss = ops.linear_cross_entropy(hidden, weight.requires_grad_(), labels)
    (found,) = torch.autograd.grad(loss, weight)
    expected = torch.tensor([-500 / 3, 250 / 3, 250 / 3])[:, None].expand(3, 8)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=0)


@on_device
@pytest.mark.parametrize("width", WIDTHS)
def test_a_second_backward_pass_gives_the_same_bits(width):
    """What is kept for it is not written over."""
    hidden, weight, labels = on_the_device(drawn(linear_cross_entropy_case("twice", 11, width, 67)))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    with ops.use("triton", "linear_cross_entropy"):
        loss = 3 * ops.linear_cross_entropy(*leaves, labels)
        first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@on_device
@pytest.mark.parametrize(
    ("sizes", "dtype", "message"),
    [
        ((4, 3, 5), torch.float64, "take float32, float16, bfloat16, got float64"),
        ((4, 0, 5), torch.float32, "take R and V from 1 on, got 0 and 5"),
    ],
    ids=str,
)
def test_refused_before_launch(sizes, dtype, message):
    n, r, v = sizes
    arguments = (torch.zeros(n, r, dtype=dtype), torch.zeros(v, r, dtype=dtype), torch.zeros(n, dtype=torch.int64))
    with ops.use("triton", "linear_cross_entropy"), pytest.raises(UserError, match=message):
        ops.linear_cross_entropy(*on_the_device(list(arguments)))


@on_device
@pytest.mark.parametrize("layout", [transposed, padded], ids=lambda layout: layout.__name__)
def test_with_a_projection_and_z_loss_and_views(layout):
    function, arguments = projected(67, 24, 7, 131)
    hidden, weight, labels, projection = on_the_device([*arguments])
    views = [layout(x.half()) for x in (hidden, weight, projection)]  # a cast later on would make them contiguous

    def loss(hidden, weight, labels, projection):
        return ops.linear_cross_entropy(hidden, weight, labels, z_loss=0.1, projection=projection)

    with poisoned():
        arguments = [*views[:2], labels, views[2]]
        assert_passed(check("linear_cross_entropy", loss, arguments, (0, 1, 3), ["triton"], torch.float16))
        assert_passed(check("linear_cross_entropy", function, arguments, (1, 3), ["triton"], torch.float16))


@on_device
def test_a_label_out_of_range_with_a_projection():
    function, arguments = projected(9, 24, 7, 11)
    hidden, weight, labels, projection = (x.half() if x.is_floating_point() else x for x in on_the_device([*arguments]))
    labels[4] = 11
    leaves = [x.requires_grad_() for x in (hidden, weight, projection)]
    with ops.use("triton"):
        loss = function(*leaves[:2], labels, leaves[2])
        of_hidden, *others = torch.autograd.grad(loss, leaves)
    assert loss.isnan()
    assert of_hidden.isnan().any(1).tolist() == [i == 4 for i in range(9)]
    assert all(x.isnan().all() for x in others)


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "d", "r"),
    [(67, 24, 7), (1, 128, 32), (300, 130, 16), (0, 24, 7), (9, 300, 64)],
    ids=["odd", "one token", "parts", "no token", "too wide for one tile"],
)
def test_with_a_projection(n, d, r, dtype):
    function, arguments = projected(n, d, r, 131)
    with poisoned():
        assert_passed(
            check("linear_cross_entropy", function, on_the_device([*arguments]), (0, 1, 3), ["triton"], dtype)
        )


test_in_the_interpreter = in_the_interpreter(__file__, ("sm_80", "sm_100"))
