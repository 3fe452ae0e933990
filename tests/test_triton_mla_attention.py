"""The Triton kernels of mla_attention against the float64 reference; the contract of every operator's is in
tests/triton_contract.py."""

from __future__ import annotations

import pytest
import torch
from dsfast.triton_kernels.version import numbers
from operator_cases import assert_passed, attention_by_heads
from triton_contract import DEVICE, DTYPES, TritonContract, in_the_interpreter, on_device, poisoned, without_maximum

from dsfast import ops
from dsfast.errors import UserError
from dsfast.ops.cases import mla_attention_case
from dsfast.ops.checks import FLOOR_ULPS, compare
from dsfast.ops.mla_attention import mla_attention_reference
from dsfast.ops.triton import INTERPRETED

NAMES = ("q_nope", "q_rope", "k_nope", "k_rope", "v")


class TestMlaAttention(TritonContract):
    cases = (
        mla_attention_case("no document", (), 2, 32, 16, 32),
        mla_attention_case("documents inside and across tiles", (1, 0, 17, 30), 1, 32, 16, 32),
        mla_attention_case("widths that are no power of two", (20, 3, 9), 2, 24, 8, 40),
        mla_attention_case("one head of keys and values for three of queries", (19, 0, 51), 6, 16, 8, 24, 2),
        mla_attention_case("one head of keys and values for all", (35, 9), 4, 8, 6, 16, 1),
        mla_attention_case("a rope key expanded to the heads", (35, 0, 9), 3, 16, 8, 32, function=attention_by_heads),
    )
    tiny = mla_attention_case("tiny", (2, 0, 33), 2, 3, 2, 5)
    registered = ("mla_attention", "mla_attention_backward")
    not_expanded = (3,)  # k_rope


# Lengths of the documents, with the reason. Tiles have 128 rows and blocks 64 in 16 bits; 16 and 32 in float32.
DOCUMENTS = {
    "no token": [0],
    "one token": [1],
    "one below a tile": [127],
    "a tile": [128],
    "one above a tile": [129],
    "a prime, several blocks before the tile": [211],
    "boundaries inside a tile, on its edge, and a document that spans three tiles": [5, 1, 122, 201, 37],
    "empty documents at the start, in the middle, side by side and at the end": [0, 40, 0, 0, 33, 70, 0],
    "single tokens": [1] * 33,
}
WIDTHS = {
    "500K model": (32, 16, 32),
    "DeepSeek-V3": (128, 64, 128),
    "no power of two": (48, 16, 80),
    "narrower than a matrix instruction": (8, 4, 8),
    "values the widest": (16, 16, 64),
}


def make_inputs(lengths, widths, dtype, heads=2, seed=0):
    """Tensors as the model's projections leave them: views with strides, split from a common tensor."""
    dn, dr, dv = widths
    n = sum(lengths)
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(n, heads, dn + dr, generator=random).to(DEVICE, dtype)
    kv = torch.randn(n, heads, dn + dv, generator=random).to(DEVICE, dtype)
    latent = torch.randn(n, 24 + dr, generator=random).to(DEVICE, dtype)
    do = torch.randn(n, heads, dv, generator=random).to(DEVICE, dtype)
    k_nope, v = kv.split([dn, dv], -1)
    tensors = (*q.split([dn, dr], -1), k_nope, latent[:, 24:], v)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
    return tensors, cu_seqlens, (dn + dr) ** -0.5, do


def run_kernels(tensors, cu_seqlens, scale, do):
    """o and the five gradients by the kernels, every uninitialised output filled with NaN beforehand."""
    from dsfast.triton_kernels import mla_attention as kernels

    with poisoned():
        o, softmax = kernels.forward(*tensors, cu_seqlens, scale)
        return o, softmax, kernels.backward(do, *tensors, cu_seqlens, scale, o, softmax)


def run_reference(tensors, cu_seqlens, scale, do, dtype):
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in tensors]
    o = mla_attention_reference(*leaves, cu_seqlens, scale)
    return o.detach(), torch.autograd.grad(o, leaves, do.to(dtype))


def assert_as_good_as_eager(tensors, cu_seqlens, scale, do, rounding=None):
    """Values and gradients: the error is at most twice that of eager PyTorch in the same dtype, plus one rounding, the dtype's if
    no other is given."""
    dtype = tensors[0].dtype
    rounding = rounding or torch.finfo(dtype).eps
    o, _, gradients = run_kernels(tensors, cu_seqlens, scale, do)
    exact = run_reference(tensors, cu_seqlens, scale, do, torch.float64)
    eager = run_reference(tensors, cu_seqlens, scale, do, dtype)
    for name, mine, theirs, truth in zip(
        ("o", *NAMES), (o, *gradients), (eager[0], *eager[1]), (exact[0], *exact[1]), strict=True
    ):
        assert mine.dtype == dtype
        assert mine.is_contiguous()
        assert mine.shape == truth.shape
        # With one token a document the gradients of q and k are differences of equal numbers, exactly 0 and so in eager; v's
        # gives the size, and the floor is that of dsfast.ops.checks for where eager is exact.
        size = truth.norm() if truth.any() else FLOOR_ULPS * exact[1][-1].norm()
        assert (mine - truth).norm() <= 2 * (theirs - truth).norm() + rounding * size, name


@on_device
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_documents(documents, dtype):
    assert_as_good_as_eager(*make_inputs(DOCUMENTS[documents], WIDTHS["500K model"], dtype, heads=1))


@on_device
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_widths(widths, dtype):
    assert_as_good_as_eager(*make_inputs([50, 3, 28], WIDTHS[widths], dtype))


@on_device
@pytest.mark.parametrize("widths", [(128, 64, 128), (64, 64, 64)], ids=str)
def test_several_tiles_of_keys(widths, monkeypatch):
    """On large chips these widths have tiles of their own, of 64 and 128 keys; they meet blocks of queries without a mask."""
    from dsfast.triton_kernels import mla_attention_kept

    monkeypatch.setattr(mla_attention_kept, "KEPT", 0)
    assert_as_good_as_eager(*make_inputs([210, 3, 60], widths, torch.float16, heads=1))


# Squares of scores have sides of 128 tokens, blocks 64.
KEPT_DOCUMENTS = {
    "one token": [1],
    "one below a block": [63],
    "a block more than a square, whose second half no document reaches": [192],
    "a document over four squares, ended in the first half of the last": [400],
    "boundaries on the edges of squares": [128, 256, 128],
    "boundaries inside squares, those between whole": [60, 330, 0, 10],
    "short ones in front of a long one and behind it": [5, 1, 0, 290, 37, 3],
}


@on_device
@pytest.mark.parametrize("documents", KEPT_DOCUMENTS)
def test_kept_scores(documents):
    """Widths whose gradient of the scores is kept on large chips: what is read of it was written, all of it."""
    assert_as_good_as_eager(*make_inputs(KEPT_DOCUMENTS[documents], (80, 16, 80), torch.float16, heads=1))


@on_device
@pytest.mark.parametrize("fit", [2, *(pytest.param(fit, marks=pytest.mark.slow) for fit in (1, 3, 5))])
def test_kept_scores_of_some_heads_at_once(fit, monkeypatch):
    """As many as memory is given for: the same bits."""
    from dsfast.triton_kernels import launch, mla_attention_kept

    inputs = make_inputs([150, 20], (80, 16, 80), torch.float16, heads=5)
    expected = run_kernels(*inputs)[2]
    calls, run = [], launch.Launch.run
    monkeypatch.setattr(launch.Launch, "run", lambda self: (calls.append(self.kernel.__name__), run(self)))
    monkeypatch.setattr(mla_attention_kept, "KEPT", fit * 3 * 128 * 128 * 2 + 1)
    found = run_kernels(*inputs)[2]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    kept = launch.large_tiles(torch.device(DEVICE)) != 0
    assert calls.count("scores_kernel") == (-(-5 // fit) if kept else 0)


@pytest.mark.parametrize(
    ("change", "heads"),
    [
        ({}, 6), ({"N": 4096}, 16), ({"N": 46_208}, 1), ({"N": 46_209}, 0), ({"N": 0}, 0), ({"H": 0}, 0), ({"H": 5}, 5),
        ({"Dn": 32, "Dr": 16, "Dv": 32}, 0), ({"Dn": 192, "Dv": 256}, 0), ({"dtype": torch.float32}, 0), ({"large": 0}, 0),
    ],
    ids=str,
)  # fmt: skip
def test_how_many_heads_are_kept_at_once(change, heads):
    """As few parts as 2 GiB allow, of equal size; none where scores are made anew."""
    from dsfast.triton_kernels import mla_attention_kept

    sizes = {"N": 16_384, "H": 16, "Dn": 128, "Dr": 64, "Dv": 128, "dtype": torch.bfloat16, "large": 9} | change
    dtype, large = sizes.pop("dtype"), sizes.pop("large")
    assert mla_attention_kept.heads_at_once(sizes | {"v": torch.empty(0, dtype=dtype)}, large) == heads


@on_device
def test_kept_scores_of_shared_keys():
    case = mla_attention_case("a head of keys and values for two of queries", (150, 20), 4, 80, 16, 80, 2)
    with poisoned():
        assert_passed(compare(case, ["triton"], DEVICE, torch.float16, draws=1))


@on_device
@pytest.mark.parametrize("widths", [(80, 16, 80), (32, 16, 32)], ids=str)
def test_the_benchmark_has_scores_made_anew_beside_those_kept(widths, monkeypatch):
    from dsfast.triton_kernels import launch, mla_attention_kept

    from dsfast.bench.gpu.peers import PEERS
    from dsfast.bench.gpu.peers.peer import RefusedError

    tensors, cu_seqlens, scale, do = make_inputs([150, 20], widths, torch.float16)
    peer, arguments = PEERS["attention"]["scores anew"], [*tensors, cu_seqlens, scale]
    if widths[0] == 32 or not launch.large_tiles(torch.device(DEVICE)):
        with pytest.raises(RefusedError, match="does not keep scores here either"):
            peer.prepare(arguments, range(5))
        return
    prepared = peer.prepare(arguments, range(5))
    found = torch.autograd.grad(prepared.run(), prepared.leaves, do)
    monkeypatch.setattr(mla_attention_kept, "KEPT", 0)
    expected = run_kernels(tensors, cu_seqlens, scale, do)[2]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@on_device
@pytest.mark.parametrize("widths", [(64, 64, 64), (32, 16, 32)], ids=str)
def test_the_benchmark_has_a_softmax_with_a_maximum_beside_the_one_without(widths, monkeypatch):
    from dsfast.triton_kernels import mla_attention as kernels

    from dsfast.bench.gpu.peers import PEERS
    from dsfast.bench.gpu.peers.peer import RefusedError

    tensors, cu_seqlens, scale, _ = make_inputs([150, 20], widths, torch.float16)
    peer, arguments = PEERS["attention"]["with a maximum"], [*tensors, cu_seqlens, scale]
    expected, *_ = kernels.forward(*arguments)
    taken = without_maximum(monkeypatch, kernels)
    if widths[0] == 32:
        with pytest.raises(RefusedError, match="has a maximum here too"):
            peer.prepare(arguments, range(5))
        return
    with ops.use("triton"):
        found = peer.prepare(arguments, range(5)).run()
    assert torch.equal(found, expected)
    assert not taken


@on_device
def test_widest():
    """All three kernels have tiles of their own there, half as long and with 8 warps: scores pass a condition."""
    assert_as_good_as_eager(*make_inputs([70, 0, 59, 3], (136, 8, 136), torch.float16, heads=1))


@on_device
def test_more_heads_than_run_together():
    assert_as_good_as_eager(*make_inputs([33, 7], WIDTHS["500K model"], torch.float32, heads=11))


@on_device
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_documents(seed, dtype):
    random = torch.Generator().manual_seed(seed)
    lengths = (torch.rand(5, generator=random) ** 3 * 200).int().tolist()
    assert_as_good_as_eager(*make_inputs(lengths, WIDTHS["500K model"], dtype, heads=1, seed=seed))


@on_device
@pytest.mark.parametrize("size", [10, 100])
def test_large_scores(size):
    """Scores of tens and hundreds: the softmax must neither overflow nor lose what rounding a log-sum-exp would."""
    tensors, cu_seqlens, scale, do = make_inputs([70, 30], WIDTHS["500K model"], torch.float32)
    assert_as_good_as_eager(tensors, cu_seqlens, size * scale, do)


BEYOND_BFLOAT16 = 2**-15
"""A rounding that results in bfloat16 do not show."""


FACTORS = {1.0: {True}, 12.0: {True, False}, 100.0: {False}}
"""Of the scores: whether their sums fit, program by program, where there are many tokens."""


@on_device
@pytest.mark.parametrize(
    ("documents", "factor"),
    [
        pytest.param(name, factor, marks=pytest.mark.slow if len(FACTORS[factor]) == 1 and sum(lengths) < 200 else ())
        for factor in FACTORS
        for name, lengths in DOCUMENTS.items()
    ],
)
def test_exponentials_of_the_scores_themselves(documents, factor, monkeypatch):
    """As long as they fit float32 wide heads have no maximum, else a tile begins anew with one. In float32, whose gradients have
    the logarithm of a sum apart, the last digits are not what they would be with one."""
    from dsfast.triton_kernels import mla_attention as kernels

    taken = without_maximum(monkeypatch, kernels)
    tensors, cu_seqlens, scale, do = make_inputs(DOCUMENTS[documents], (32, 32, 16), torch.float32, heads=1)
    assert_as_good_as_eager(tensors, cu_seqlens, factor * scale, do, BEYOND_BFLOAT16)
    if INTERPRETED and len(do) > 200:
        assert set(taken) == FACTORS[factor]


@on_device
@pytest.mark.parametrize(("factor", "right"), [(-3.0, True), (-30.0, False), (-300.0, False)])
def test_exponentials_of_scores_below_zero(factor, right, monkeypatch):
    """All of them by as much: what is left is lost in float32 at some point, and nothing when all begins anew."""
    from dsfast.triton_kernels import mla_attention as kernels

    taken = without_maximum(monkeypatch, kernels)
    (q_nope, q_rope, k_nope, k_rope, v), *others = make_inputs([70, 30], (32, 32, 16), torch.float32, heads=1)
    q_nope.abs_(), q_rope.abs_(), k_nope.abs_().mul_(factor), k_rope.abs_().mul_(factor)
    assert_as_good_as_eager((q_nope, q_rope, k_nope, k_rope, v), *others, BEYOND_BFLOAT16)
    assert not taken or set(taken) == {right}


@on_device
@pytest.mark.parametrize("size", [1.0, 1000.0])
def test_without_a_maximum_nan_stays_in_its_document(size, monkeypatch):
    """Size 1000: tiles begin anew in any case."""
    from dsfast.triton_kernels import mla_attention as kernels

    without_maximum(monkeypatch, kernels)
    tensors, cu_seqlens, scale, _ = make_inputs([150, 60], (32, 32, 16), torch.float32)
    tensors[2][10] = float("nan")
    o, _ = kernels.forward(*tensors, cu_seqlens, size * scale)
    assert o[10:150].isnan().all()
    assert o[:10].isfinite().all()
    assert o[150:].isfinite().all()


@on_device
def test_nan_key_stays_in_its_document():
    """The loop over earlier keys runs without a mask, also for the rows of the tile that belong to the next document."""
    from dsfast.triton_kernels import mla_attention as kernels

    tensors, cu_seqlens, scale, _ = make_inputs([150, 60], WIDTHS["500K model"], torch.float16)
    tensors[2][10] = float("nan")
    o, _ = kernels.forward(*tensors, cu_seqlens, scale)
    assert o[10:150].isnan().all()
    assert o[:10].isfinite().all()
    assert o[150:].isfinite().all()


@on_device
@pytest.mark.parametrize("which", [*(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[:-1]), "v"])
@pytest.mark.parametrize(
    ("widths", "tile"),
    [
        pytest.param(WIDTHS["500K model"], 128, id="narrow"),
        pytest.param((80, 16, 80), 256, id="kept", marks=pytest.mark.slow),
    ],
)
def test_nan_stays_in_the_tiles_of_its_document(which, widths, tile):
    """Within a tile a document full of NaN may spoil others, where the scores' gradient is kept within two. Where none reaches
    into the next tile, that has the same bits."""
    tensors, cu_seqlens, scale, do = make_inputs([tile, 20, tile - 20, 30], widths, torch.float16, heads=1)
    others = torch.cat([torch.arange(tile), torch.arange(2 * tile, 2 * tile + 30)]).to(DEVICE)
    clean, _, gradients = run_kernels(tensors, cu_seqlens, scale, do)
    tensors[NAMES.index(which)][tile : tile + 20] = float("nan")
    o, _, spoilt = run_kernels(tensors, cu_seqlens, scale, do)
    assert o[tile : tile + 20].isnan().all()
    for mine, before in zip((o, *spoilt), (clean, *gradients), strict=True):
        assert mine[others].isfinite().all()
        assert torch.equal(mine[others], before[others])


@on_device
@pytest.mark.parametrize("widths", [(80, 16, 80), (16, 16, 136), (16, 72, 16)], ids=str)
def test_lopsided_widths(widths):
    """Tiles go by the widest part and by masks; below 64 rows the kernels for gradients take a narrow part for a wider one."""
    assert_as_good_as_eager(*make_inputs([37, 3], widths, torch.float16, heads=1))


@on_device
@pytest.mark.slow
@pytest.mark.parametrize("widths", [(192, 64, 256), (512, 32, 32), (16, 16, 512), (16, 256, 16)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_widest_of_each_kind(widths, dtype):
    assert_as_good_as_eager(*make_inputs([70, 3], widths, dtype, heads=1))


def test_a_version_is_read_as_far_as_its_numbers_go():
    assert numbers("3.9.0") == (3, 9)
    assert numbers("3.7rc1") == (3, 7)
    assert numbers("3.6.0+git1a2b") == (3, 6)


@on_device
def test_any_strides():
    """Expanded, with a last dimension that is not contiguous, and with rows too far apart."""
    from dsfast.triton_kernels.launch import rows

    tensors, cu_seqlens, scale, do = make_inputs([20, 25], WIDTHS["500K model"], torch.float32)
    q_nope, q_rope, k_nope, k_rope, v = tensors
    expanded = k_nope[:1].expand(k_nope.shape)
    transposed = v.transpose(1, 2).contiguous().transpose(1, 2)
    assert_as_good_as_eager(
        (q_nope, q_rope, expanded, k_rope, transposed), cu_seqlens, scale, do[..., :1].expand(do.shape)
    )
    # Offsets inside a tile are 32-bit: rows further apart are copied.
    far = torch.empty(2**23 + 64, device=DEVICE).as_strided((2, 2, 32), (2**23, 32, 1))
    assert max(rows(far)[0].stride()) == 64


@on_device
def test_rope_key_gradient_is_summed_in_float32():
    """Many heads whose shares nearly cancel: rounding them to float16 before the sum would show."""
    tensors, cu_seqlens, scale, do = make_inputs([40], WIDTHS["500K model"], torch.float16, heads=16)
    exact = run_reference(tensors, cu_seqlens, scale, do, torch.float64)[1][3]
    found = run_kernels(tensors, cu_seqlens, scale, do)[2][3]
    eager = run_reference(tensors, cu_seqlens, scale, do, torch.float16)[1][3]
    assert (found - exact).norm() <= (eager - exact).norm() + torch.finfo(torch.float16).eps * exact.norm()


# In 16 bits: narrow heads, those whose scores' gradient is kept, and those whose scores are made anew.
of_each_backward_pass = pytest.mark.parametrize("widths", [WIDTHS["500K model"], (80, 16, 80), (64, 64, 64)], ids=str)


@on_device
@of_each_backward_pass
def test_heads_shares_of_the_rope_key_are_kept_in_float32(widths):
    """Three heads' cancel, but would not if each were rounded to float16; the fourth one's is a 256th of theirs."""
    (q_nope, q_rope, k_nope, k_rope, v), *others, do = make_inputs([40], widths, torch.float16, heads=4)
    for x in (q_nope, k_nope, v, do):
        x[:, 1:3] = x[:, :1]
    k_rope.zero_()  # so that scores do not depend on the rope part
    q_rope.mul_(8).round_()
    q_rope[:, 2] = -q_rope[:, 0] - q_rope[:, 1]
    do[:, 3] /= 256
    found = run_kernels((q_nope, q_rope, k_nope, k_rope, v), *others, do)[2][3]
    do[:, :3] = 0.0
    expected = run_kernels((q_nope, q_rope, k_nope, k_rope, v), *others, do)[2][3]
    assert (found - expected).abs().max() <= 4 * torch.finfo(torch.float16).eps * expected.abs().max()


@on_device
def test_fake_gradients_of_a_rope_key_by_heads_in_16_bits():
    """Unsummed they have its dtype, and not that of shares to be summed."""
    (q_nope, q_rope, k_nope, k_rope, v), *others, do = make_inputs([5], WIDTHS["500K model"], torch.float16)
    inputs = q_nope, q_rope, k_nope, k_rope[:, None].expand(q_rope.shape), v, *others
    results = torch.ops.dsfast.mla_attention(*inputs)
    backward = torch.ops.dsfast.mla_attention_backward.default
    torch.library.opcheck(backward, (do, *inputs, *results), test_utils=("test_schema", "test_faketensor"))


@on_device
@of_each_backward_pass
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_far_below_zero(widths, dtype):
    """All of them: relative to 0 there would be no weight left, and infinite ones where there is no key."""
    (q_nope, q_rope, k_nope, k_rope, v), *others = make_inputs([70, 30], widths, dtype, heads=1)
    q_nope.abs_(), q_rope.abs_(), k_nope.abs_().mul_(-16), k_rope.abs_().mul_(-16)
    assert_as_good_as_eager((q_nope, q_rope, k_nope, k_rope, v), *others)


@on_device
@of_each_backward_pass
def test_delta_is_summed_in_float32(widths):
    """Most of its terms are beyond float16, and cancel."""
    tensors, cu_seqlens, scale, do = make_inputs([40, 3], widths, torch.float16, heads=1)
    v = tensors[4][..., :-2]
    v[..., ::2] = v[..., 1::2] = 128 * v[..., ::2]
    do[..., :-2:2], do[..., 1:-2:2] = 1024.0, -1024.0
    assert_as_good_as_eager(tensors, cu_seqlens, scale, do)


@on_device
def test_two_runs_are_equal_and_inputs_stay():
    tensors, cu_seqlens, scale, do = make_inputs([50, 0, 90], WIDTHS["500K model"], torch.float16)
    before = [x.clone() for x in (*tensors, cu_seqlens, do)]
    o, softmax, gradients = run_kernels(tensors, cu_seqlens, scale, do)
    again = run_kernels(tensors, cu_seqlens, scale, do)
    assert all(torch.equal(a, b) for a, b in zip((o, softmax, *gradients), (*again[:2], *again[2]), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (*tensors, cu_seqlens, do), strict=True))
    assert softmax.dtype == torch.float32


@on_device
def test_boundaries_of_no_document_are_refused_before_launch():
    tensors, cu_seqlens, scale, do = make_inputs([4], (32, 16, 32), torch.float16)
    with pytest.raises(ValueError, match="cu_seqlens must hold 0 and the end of each document, got 1 numbers"):
        run_kernels(tensors, cu_seqlens[:1], scale, do)


@on_device
@pytest.mark.parametrize("scale", [0.0, float("nan")])
def test_a_scale_that_is_not_positive_is_refused(scale):
    tensors, cu_seqlens, _, _ = make_inputs([4], (32, 16, 32), torch.float16)
    with ops.use("triton"), pytest.raises(UserError, match=f"take a positive scale, got {scale}"):
        ops.mla_attention(*tensors, cu_seqlens, scale)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_operator_takes_the_kernels():
    """Through torch.library: autograd, and torch.compile, give what the launchers give, bit for bit."""
    tensors, cu_seqlens, scale, do = make_inputs([300, 45], WIDTHS["500K model"], torch.bfloat16)
    o, _, gradients = run_kernels(tensors, cu_seqlens, scale, do)
    for function in (ops.mla_attention, torch.compile(ops.mla_attention, fullgraph=True)):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        with ops.use("triton", "mla_attention"):
            found = function(*leaves, cu_seqlens, scale)
        assert torch.equal(found, o)
        assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(found, leaves, do), gradients, strict=True))


@on_device
@pytest.mark.parametrize("widths", [WIDTHS["500K model"], WIDTHS["DeepSeek-V3"]], ids=["500K", "V3"])
@pytest.mark.parametrize("boundaries", [[-300, 100], [0, -70, 50, -90, 100], [20, 100], [0, 300], [60, 20]], ids=str)
def test_wrong_boundaries_read_nothing_outside(boundaries, widths):
    """Every launch is watched for that."""
    tensors, _, scale, do = make_inputs([100], widths, torch.float16)
    run_kernels(tensors, torch.tensor(boundaries, dtype=torch.int32, device=DEVICE), scale, do)


test_in_the_interpreter = in_the_interpreter(__file__, ("sm_80", "sm_100"))
