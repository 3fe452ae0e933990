"""The Triton kernels of mla_decode against the float64 reference; the contract of every operator's is in
tests/triton_contract.py."""

from __future__ import annotations

import pytest
import torch
from triton_contract import DEVICE, DTYPES, TritonContract, in_the_interpreter, on_device, on_the_device, poisoned

from dsfast import ops
from dsfast.ops.cases import mla_decode_case
from dsfast.ops.checks import judge
from dsfast.ops.mla_decode import mla_decode_reference

SMALL = {"h": 4, "r": 32, "dn": 32, "dr": 16, "dv": 32}  # the 500K model's: one kernel does it all
WIDE = {"h": 3, "r": 80, "dn": 24, "dr": 8, "dv": 20}  # products with `up` outside
DEEPSEEK_V3 = {"h": 1, "r": 512, "dn": 128, "dr": 64, "dv": 128}
NAMES = ("q_nope", "q_rope", "latent", "k_rope", "lengths", "up", "scale", "pages")


class TestMlaDecode(TritonContract):
    cases = (
        mla_decode_case("no sequence", (), 5, **SMALL),
        mla_decode_case("a cache without a place", (0, 0), 0, **SMALL),
        mla_decode_case("empty, one token, around a tile, full", (0, 1, 64, 65), 65, **SMALL),
        mla_decode_case("several splits, some empty", (70,), 768, **SMALL),
        mla_decode_case("one head, widths that are no power of two", (33,), 40, 1, 24, 20, 6, 17),
        mla_decode_case("one head more than a tile's rows", (9,), 9, 17, 20, 8, 16, 8),
        mla_decode_case("products outside", (0, 33), 33, **WIDE),
        mla_decode_case("products outside, several splits", (70,), 768, **WIDE),
        mla_decode_case("a latent one column wider than its slices", (5,), 5, 1, 97, 8, 4, 8),
        mla_decode_case("no part with position", (7,), 7, 3, 20, 8, 0, 8),
        mla_decode_case("DeepSeek-V3's widths", (17,), 17, **DEEPSEEK_V3),
        mla_decode_case("DeepSeek-V3's widths, as many heads as a tile has", (2,), 2, **{**DEEPSEEK_V3, "h": 64}),
    )
    tiny = mla_decode_case("tiny", (2, 0, 33), 33, 2, 3, 3, 2, 2)
    registered = ("mla_decode",)


class TestPagedMlaDecode(TritonContract):
    cases = (
        mla_decode_case("pages of whole tiles", (65,), 128, **SMALL, page=64),
        mla_decode_case("pages smaller than a tile", (16, 47), 48, **SMALL, page=16),
        mla_decode_case("pages of a prime's places, products outside", (0, 40), 42, **WIDE, page=7),
        mla_decode_case("several splits", (70,), 768, **WIDE, page=128),
    )
    tiny = mla_decode_case("tiny", (2, 0, 11), 12, 2, 3, 3, 2, 2, page=3)
    registered = ("mla_decode",)


def draw(lengths, c, widths, dtype=torch.float32, page=None):
    """Arguments by name, on the device."""
    arguments = mla_decode_case("", lengths, c, **widths, page=page).make_inputs(torch.Generator().manual_seed(0))
    moved = on_the_device([x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments])
    return dict(zip(NAMES, moved, strict=False))


def run(arguments, splits=None):
    """By the kernels, every uninitialised output filled with NaN beforehand."""
    from dsfast.triton_kernels import mla_decode as kernels

    with poisoned():
        return kernels.forward(**arguments, splits=splits)


def assert_as_good_as_eager(found, arguments):
    exact = {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in arguments.items()}
    dtype = arguments["latent"].dtype
    numbers = judge(mla_decode_reference(**exact), mla_decode_reference(**arguments), found, dtype, "triton")
    assert numbers["passed"], numbers


def in_pages(arguments, page, dtype=torch.int64):
    """The same cache as pages in another order, among others that nobody needs and that hold NaN."""
    latent, k_rope = arguments["latent"], arguments["k_rope"]
    b, c = latent.shape[:2]
    order = torch.randperm(b * c // page + 3, generator=torch.Generator().manual_seed(1)).to(DEVICE)[3:]

    def spread(x):
        store = x.new_full((b * c // page + 3, page, x.size(-1)), float("nan"))
        store[order] = x.reshape(-1, page, x.size(-1))
        return store

    pages = order.view(b, c // page).to(dtype)
    return {**arguments, "latent": spread(latent), "k_rope": spread(k_rope), "pages": pages}


@on_device
@pytest.mark.parametrize("splits", [1, 2, 3, 20])
@pytest.mark.parametrize("widths", [SMALL, WIDE], ids=["inside", "outside"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_splits(splits, widths, dtype):
    """More of them than tiles: what an empty one would have written must not be read."""
    arguments = draw((0, 1, 70), 70, widths, dtype)
    found = run(arguments, splits)
    assert not found[0].any()
    assert_as_good_as_eager(found, arguments)


@on_device
@pytest.mark.parametrize("widths", [SMALL, WIDE], ids=["inside", "outside"])
@pytest.mark.parametrize(("splits", "combined"), [(40, 512), pytest.param(300, 8192, marks=pytest.mark.slow)])
def test_many_splits(splits, combined, widths, monkeypatch):
    """Put together in several steps, of which the last has fewer, and none for a sequence that needs one split or two."""
    from dsfast.triton_kernels import mla_decode as kernels

    monkeypatch.setattr(kernels, "COMBINED", combined)
    arguments = draw((splits * 64, 70), splits * 64, {**widths, "h": 1}, torch.float16)
    assert_as_good_as_eager(run(arguments, splits), arguments)


@on_device
def test_products_inside_are_summed_in_float32():
    """A query times `up` is 2048 + 1 - 2048, which in float16 is 0."""
    arguments = draw((2,), 2, SMALL, torch.float16) | {"scale": 1.0}
    arguments["q_rope"].zero_()
    arguments["q_nope"].zero_()[..., :3] = torch.tensor([2048.0, 1.0, -2048.0])
    arguments["up"][:, : SMALL["dn"]] = 1.0
    assert_as_good_as_eager(run(arguments), arguments)


@on_device
def test_partial_sums_of_many_places_do_not_overflow():
    """They are not divided by the sum of weights yet: beyond float16 where 128 places of a thousand weigh the same."""
    arguments = draw((256,), 256, SMALL, torch.float16) | {"scale": 0.0}
    arguments["latent"].fill_(1000.0)
    assert_as_good_as_eager(run(arguments, 2), arguments)


@on_device
@pytest.mark.parametrize(("splits", "widths"), [(1, SMALL), (3, WIDE)])
@pytest.mark.parametrize(
    "page", [64, 16, 5, 80], ids=["whole tiles", "parts of tiles", "across tiles", "a tile and a part"]
)
def test_pages_give_the_bits_of_a_contiguous_cache(splits, page, widths):
    arguments = draw((130,), 320, widths, torch.float16)
    dtype = torch.int32 if page == 16 else torch.int64
    assert torch.equal(run(in_pages(arguments, page, dtype), splits), run(arguments, splits))


@on_device
@pytest.mark.parametrize(("splits", "page"), [(1, None), (3, 64), (1, 16)])
def test_what_lies_behind_a_sequence_is_not_read(splits, page):
    lengths = (70, 0, 1, 127)
    arguments = draw(lengths, 128, SMALL, torch.float16)
    expected = run(arguments, splits)
    behind = (torch.arange(128) >= torch.tensor(lengths)[:, None])[..., None].to(DEVICE)
    for name in ("latent", "k_rope"):
        arguments[name] = arguments[name].masked_fill(behind, float("nan"))
    if page:
        arguments = in_pages(arguments, page)
        unused = behind[:, ::page, 0]
        arguments["pages"] = arguments["pages"].masked_fill(unused, -(2**62))
    assert torch.equal(run(arguments, splits), expected)


@on_device
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(("widths", "page"), [(SMALL, None), (SMALL, 64), (WIDE, None)])
def test_length_that_is_none_gives_nan(splits, page, widths):
    arguments = draw((70, 3, 128, 1, 0), 128, widths)
    arguments = in_pages(arguments, page) if page else arguments
    expected = run(arguments, splits)
    arguments["lengths"] = torch.tensor([70, -1, 129, 1, 2**62]).to(DEVICE)
    found = run(arguments, splits)
    assert found[[1, 2, 4]].isnan().all()
    assert torch.equal(found[[0, 3]], expected[[0, 3]])


@on_device
@pytest.mark.parametrize(("splits", "page"), [(1, 64), (2, 64), (1, 16), (2, 16)])
def test_page_that_is_not_there_gives_nan(splits, page):
    arguments = in_pages(draw((128, 3, 128, 128, 128), 128, SMALL), page, torch.int32)
    expected = run(arguments, splits)
    arguments["pages"][0, -1] = -1
    arguments["pages"][1, -1] = -1  # behind the sequence
    arguments["pages"][3, -1] = 2**31 - 1
    arguments["pages"][4, -1] = len(arguments["latent"])  # the first that is not there
    found = run(arguments, splits)
    assert found[[0, 3, 4]].isnan().all()
    assert torch.equal(found[[1, 2]], expected[[1, 2]])


@on_device
def test_nan_stays_in_its_sequence_and_head():
    arguments = draw((20, 40), 40, {**SMALL, "h": 3})
    expected = run(arguments)
    arguments["q_nope"][0, 1, 0] = float("nan")
    found = run(arguments)
    assert found[0, 1].isnan().all()
    assert torch.equal(found[0, [0, 2]], expected[0, [0, 2]])
    arguments["k_rope"][1, 3, 0] = float("nan")
    found = run(arguments)
    assert found[1].isnan().all()
    assert torch.equal(found[0, [0, 2]], expected[0, [0, 2]])


@on_device
@pytest.mark.parametrize("scale", [1e-3, 30.0, 0.0, -1.0])
@pytest.mark.parametrize("splits", [1, 3])
def test_any_scale(scale, splits):
    """Scores of a hundred: exp2 must neither overflow nor lose the sum, and all weight may fall on one token."""
    arguments = {**draw((100, 37), 100, SMALL), "scale": scale}
    assert_as_good_as_eager(run(arguments, splits), arguments)


@on_device
@pytest.mark.parametrize("splits", [1, 3])
def test_scores_far_below_zero(splits):
    """All of them: relative to 0 there would be no weight left."""
    arguments = draw((100, 37), 100, SMALL) | {"scale": -30.0}
    arguments["q_nope"].zero_()
    arguments["q_rope"].fill_(1.0)
    arguments["k_rope"].abs_()
    assert_as_good_as_eager(run(arguments, splits), arguments)


@on_device
@pytest.mark.slow
@pytest.mark.parametrize("h", [16, 32, 33, 64, 65])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_heads(h, dtype):
    for widths in (SMALL, WIDE):
        arguments = draw((70, 5), 70, {**widths, "h": h}, dtype)
        assert_as_good_as_eager(run(arguments, 2), arguments)


@on_device
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_random_lengths_in_random_pages(seed):
    random = torch.Generator().manual_seed(seed)
    lengths = (torch.rand(6, generator=random) ** 3 * 480).int().tolist()
    page = (1, 3, 8, 16, 24, 32, 40, 60, 120, 480)[seed]
    arguments = draw(lengths, 480, WIDE, torch.float16)
    expected = run(arguments, 1 + seed % 4)
    assert_as_good_as_eager(expected, arguments)
    assert torch.equal(run(in_pages(arguments, page), 1 + seed % 4), expected)


@on_device
def test_backward_pass_is_refused_not_silently_zero():
    for widths in (SMALL, WIDE):
        arguments = draw((4,), 4, widths)
        arguments["up"].requires_grad_()
        with ops.use("triton", "mla_decode"):
            o = ops.mla_decode(**arguments)
        with pytest.raises(NotImplementedError, match="dsfast::mla_decode has no derivative"):
            o.sum().backward()


class TestPlan:
    """What is launched, from sizes alone; 132 multiprocessors as on an H200."""

    @staticmethod
    def plan(b, c, h, widths, dtype=torch.bfloat16, processors=132):
        from dsfast.triton_kernels import mla_decode as kernels

        return kernels.plan(b, h, c, tuple(widths[name] for name in ("r", "dn", "dr", "dv")), 0, dtype, 9, processors)

    @pytest.mark.parametrize("b", [1, 8, 32, 256])
    def test_500k_model_takes_one_kernel(self, b):
        chosen = self.plan(b, 256, 4, SMALL)
        assert chosen.absorb
        assert chosen.splits == 1

    def test_deepseek_v3(self):
        """Splits where there are too few sequences to fill the chip, and none where there are enough."""
        assert self.plan(128, 4096, 128, DEEPSEEK_V3)[::3] == (False, 1)
        assert self.plan(1, 4096, 128, DEEPSEEK_V3).splits == 32
        for b in (1, 2, 3, 16, 128):
            chosen = self.plan(b, 4096, 16, DEEPSEEK_V3)
            assert b * chosen.splits <= 132 * chosen.tiles.resident

    def test_no_more_splits_than_there_is_work_for(self):
        assert self.plan(1, 0, 16, DEEPSEEK_V3).splits == 1
        assert self.plan(1, 255, 16, DEEPSEEK_V3).splits == 1
        assert self.plan(1, 10**6, 16, DEEPSEEK_V3, processors=1000).splits == 512

    @pytest.mark.parametrize(("c", "h"), [(131072, 16), (32768, 64), (131072, 128)])
    def test_one_long_sequence_fills_the_chip(self, c, h):
        chosen = self.plan(1, c, h, DEEPSEEK_V3)
        programs, slots = chosen.splits * -(-h // chosen.bh), 132 * chosen.tiles.resident
        assert 0.9 * slots <= programs <= slots

    @pytest.mark.parametrize("widths", [SMALL, WIDE], ids=["inside", "outside"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_cases_of_several_splits_have_them(self, widths, dtype):
        """On the interpreter's two multiprocessors too; the sequence ends in the first of them."""
        for processors in (2, 132):
            assert self.plan(1, 768, 4, widths, dtype, processors).splits > 1

    def test_long_cache_is_not_copied(self):
        from dsfast.triton_kernels.mla_decode import _readable

        cache = torch.empty(4, 2**20, 576, device="meta", dtype=torch.bfloat16)
        for x in (cache, cache[..., :512], cache[..., 512:]):
            assert _readable(x) is x
        assert _readable(cache.transpose(1, 2)).is_contiguous()


test_in_the_interpreter = in_the_interpreter(__file__, ("sm_80", "sm_100"))
