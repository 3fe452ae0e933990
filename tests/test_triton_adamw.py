"""The Triton kernels of adamw; the contract of every operator's is in tests/triton_contract.py."""

from __future__ import annotations

import math

import pytest
import torch
from triton_contract import DEVICE, INTERPRETED, TritonContract, assert_passed, drawn, in_the_interpreter, on_device
from triton_contract import on_the_device as moved

from dsfast import ops
from dsfast.errors import UserError
from dsfast.ops.cases import adamw_case, updated_by_adamw
from dsfast.ops.checks import check

BLOCK = 2048


class TestAdamw(TritonContract):
    cases = (
        *(adamw_case(f"one tensor of {n}: blocks of {BLOCK}", ((n,),), 3) for n in (1, BLOCK - 1, BLOCK, BLOCK + 1)),
        adamw_case(
            "more blocks than the 16 programs that the norm has in the interpreter", ((2 * BLOCK,), *[(3,)] * 17), 2
        ),
        adamw_case("the first step: both corrections are largest", ((7, 5),), 1),
        adamw_case("step 100000: both corrections are 1", ((7, 5),), 100000),
        adamw_case("tensors without elements, first, last and between", ((0,), (3, 5), (0, 4), (2,), (0,)), 2),
        adamw_case("no element at all", ((0,), (3, 0)), 2),
        adamw_case("a scalar", ((),), 2),
    )
    tiny = adamw_case("tiny", ((3, 2), (5,)), 3)
    registered = ("adamw", "grad_clip")
    strided_arguments = (1,)  # the gradients: what is updated in place must be contiguous

    test_captured_in_a_graph = None  # the case copies its tensors; the one below does not


def prepared(case, seed=0):
    *tensors, lrs, decays, beta1, beta2, eps, step, clip_scale = moved(drawn(case, seed))
    return tensors, lrs, (decays, beta1, beta2, eps), step, clip_scale


def with_tensors(params, grads, exp_avgs, exp_avg_sqs, lrs, decays, beta1, beta2, eps, step, clip_scale):
    """updated_by_adamw with all that may lie on the device lying there; the learning rates are 4 times the scale's quarter."""
    step, clip_scale = torch.tensor(step, device=DEVICE), torch.tensor(clip_scale, device=DEVICE)
    lrs, lr_scale = [4 * lr for lr in lrs], torch.tensor(0.25, dtype=torch.float64, device=DEVICE)
    return updated_by_adamw(
        params, grads, exp_avgs, exp_avg_sqs, lrs, decays, beta1, beta2, eps, step, clip_scale, lr_scale
    )  # fmt: skip


@on_device
@pytest.mark.parametrize("step", [1, 2, 3, 17, 1000, 10**6, 2**40])
def test_numbers_on_the_device(step):
    """In the first steps 1 - beta^step is a difference of nearly equal numbers."""
    draws = moved(drawn(adamw_case("two", ((3, 2), (BLOCK + 1,)), step)))
    assert_passed(check("adamw", with_tensors, draws, (), ["triton"]))


@on_device
def test_a_scale_of_the_learning_rates_that_is_a_number():
    def scaled(params, grads, exp_avgs, exp_avg_sqs, lrs, decays, beta1, beta2, eps, step, clip_scale):
        lrs = [4 * lr for lr in lrs]
        return updated_by_adamw(
            params, grads, exp_avgs, exp_avg_sqs, lrs, decays, beta1, beta2, eps, step, clip_scale, 0.25
        )  # fmt: skip

    assert_passed(check("adamw", scaled, moved(drawn(TestAdamw.tiny)), (), ["triton"]))


@on_device
def test_betas_of_zero():
    """Nothing is remembered, nothing to be corrected: a learning rate in the direction of each gradient's sign."""
    p, g, m, v = (torch.full((3,), x, device=DEVICE) for x in (1.0, -0.5, 7.0, 7.0))
    with ops.use("triton"):
        ops.adamw([p], [g], [m], [v], [0.25], [0.0], 0.0, 0.0, 0.0, torch.tensor(2, device=DEVICE))
    assert [x.tolist() for x in (p, m, v)] == [[1.25] * 3, [-0.5] * 3, [0.25] * 3]


@on_device
@pytest.mark.parametrize("step", [1, 7])
def test_correction_is_as_exact_as_float32_is(step):
    """With m = correction1 and v = correction2 the update is the learning rate; betas near 1 are the hard case."""
    beta1, beta2 = 0.999, 0.9999
    p, g, m, v = (torch.full((4,), x, device=DEVICE) for x in (0.0, 0.0, 1 - beta1**step, 1 - beta2**step))
    m, v = m / beta1, v / beta2  # the gradient of 0 leaves beta m and beta v
    with ops.use("triton"):
        ops.adamw([p], [g], [m], [v], [1.0], [0.0], beta1, beta2, 0.0, torch.tensor(step, device=DEVICE))
    torch.testing.assert_close(p, torch.full_like(p, -1.0), rtol=0, atol=1e-6)


@on_device
def test_step_below_one_makes_params_nan():
    tensors, lrs, settings, _, clip_scale = prepared(TestAdamw.tiny)
    with ops.use("triton"):
        ops.adamw(*tensors, lrs, *settings, torch.tensor(0, device=DEVICE), clip_scale)
    assert all(p.isnan().all() for p in tensors[0])


@on_device
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_nothing_is_updated_by_a_factor_that_is_not_finite(value):
    tensors, lrs, settings, step, _ = prepared(adamw_case("a full block and a part", ((BLOCK,), (3,)), 3))
    before = [[x.clone() for x in column] for column in tensors]
    with ops.use("triton"):
        ops.adamw(*tensors, lrs, *settings, step, torch.tensor(value, device=DEVICE))
    pairs = zip(tensors, before, strict=True)
    assert all(torch.equal(x, old) for now, then in pairs for x, old in zip(now, then, strict=True))


@on_device
def test_tensors_that_begin_anywhere():
    """Views into one vector, at multiples of 4 bytes that are none of 16; what lies between stays."""
    case = adamw_case("views", ((BLOCK + 3,), (5,)), 3)
    tensors, lrs, settings, step, clip_scale = prepared(case)
    expected = updated_by_adamw(*tensors, lrs, *settings, step, clip_scale)
    whole = [torch.full((BLOCK + 20,), 7.0, device=DEVICE) for _ in range(4)]
    views = [[w[1 : BLOCK + 4], w[BLOCK + 6 : BLOCK + 11]] for w in whole]
    for column, values in zip(views, tensors, strict=True):
        for view, x in zip(column, values, strict=True):
            view.copy_(x)
    with ops.use("triton"):
        ops.adamw(*views, lrs, *settings, step, clip_scale)
        torch.testing.assert_close(ops.grad_norm(views[1]), float(expected[3]), rtol=1e-12, atol=0)
    for found, flat in zip((views[0], views[2], views[3]), expected[:3], strict=True):
        torch.testing.assert_close(torch.cat(found), flat, rtol=0, atol=1e-6)
    for w in whole:
        assert (w[[0, BLOCK + 4, BLOCK + 5]] == 7).all()
        assert (w[BLOCK + 11 :] == 7).all()


@on_device
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e30])
@pytest.mark.parametrize("at", [0, BLOCK - 1, BLOCK])
def test_norm_of_large_and_bad_gradients(value, at):
    gradient = torch.zeros(BLOCK + 1, device=DEVICE)
    gradient[at] = value
    with ops.use("triton"):
        norm, scale = ops.grad_clip([torch.ones(3, device=DEVICE), gradient], 1.0)
        with_a_loss = ops.grad_clip([torch.ones(3, device=DEVICE), gradient], 1.0, torch.ones((), device=DEVICE))
        torch.testing.assert_close(with_a_loss, (norm, scale), rtol=0, atol=0, equal_nan=True)
        assert ops.grad_norm([torch.ones(3, device=DEVICE), gradient]) == pytest.approx(float(norm), nan_ok=True)
    assert float(norm) == pytest.approx(abs(torch.tensor(value).item()), rel=1e-6, nan_ok=True)
    assert float(scale) == pytest.approx(1e-30 if value == 1e30 else math.nan, rel=1e-6, nan_ok=True)


@on_device
def test_norm_by_as_many_programs_as_its_kernel_adds_up(monkeypatch):
    """A chip with many multiprocessors would have more."""
    from dsfast.triton_kernels import adamw as kernels

    monkeypatch.setattr(kernels, "MOST_PARTS", 4)
    with ops.use("triton"):
        assert ops.grad_norm([torch.ones(1, device=DEVICE)] * 9) == 3.0


@on_device
@pytest.mark.parametrize(("max_norm", "scale"), [(1.0, 0.25), (4.0, 1.0), (8.0, 1.0)])
def test_factor(max_norm, scale):
    with ops.use("triton"):
        found = ops.grad_clip([torch.full((16,), 1.0, device=DEVICE)], max_norm)
        assert [float(x) for x in found] == [4.0, scale]
        assert [float(x) for x in ops.grad_clip([torch.zeros(5, device=DEVICE)], max_norm)] == [0.0, 1.0]
        assert [float(x) for x in ops.grad_clip([torch.zeros(0, device=DEVICE)], max_norm)] == [0.0, 1.0]


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("value", [2.0, math.inf, -math.inf, math.nan])
def test_factor_of_a_loss(value, dtype):
    gradients, loss = [torch.full((16,), 1.0, device=DEVICE)], torch.tensor(value, dtype=dtype, device=DEVICE)
    with ops.use("triton"):
        norm, scale = ops.grad_clip(gradients, 1.0, loss)
    assert float(norm) == 4.0
    assert float(scale) == pytest.approx(0.25 if value == 2.0 else math.nan, nan_ok=True)


@on_device
def test_only_float32():
    x = torch.ones(3, device=DEVICE, dtype=torch.float64)
    with ops.use("triton"):
        with pytest.raises(UserError, match="the Triton kernels take float32, got float64"):
            ops.grad_norm([x])
        with pytest.raises(UserError, match="the Triton kernels take float32, got float64"):
            ops.adamw([x], [x], [x], [x], [0.1], [0.0], 0.9, 0.95, 1e-8, 1)


class TestTable:
    """Host code, without a kernel."""

    def build(self, *arguments):
        from dsfast.triton_kernels.tables import build_table

        return build_table(*arguments)

    def test_rows(self):
        table = self.build([0, BLOCK + 1, 7], [1000, 2000, 3000], [16, 32, 48])
        assert table.tolist() == [[BLOCK, 0, 2000, 32], [1, BLOCK, 2000, 32], [7, 0, 3000, 48]]

    def test_more_than_2_to_31_elements(self):
        """Of the last element of 2^31 + 1, and of a tensor behind it."""
        table = self.build([2**31 + 1, 5], [2**46, 2**47])
        assert table[-2:].tolist() == [[1, 2**31, 2**46], [5, 0, 2**47]]
        assert table.size(0) == 2**31 // BLOCK + 2

    @pytest.mark.parametrize("value", [0.25, -0.0, 1e-45, math.inf])
    def test_numbers_keep_their_bits(self, value):
        from dsfast.triton_kernels.tables import float_bits

        (bits,) = float_bits([value])
        assert torch.tensor(bits, dtype=torch.int32).view(torch.float32).item() == torch.tensor(value).item()


class TestKept:
    def kept(self, most=2):
        from dsfast.triton_kernels.tables import DeviceCache

        return DeviceCache(most)

    def get(self, kept, key, made):
        def make():
            made.append(key)
            return torch.tensor([key])

        return kept.get(key, make, torch.device("cpu")).item()

    def test_made_once_and_the_oldest_go(self):
        kept, made = self.kept(), []
        assert [self.get(kept, key, made) for key in (1, 2, 1, 3, 1, 2)] == [1, 2, 1, 3, 1, 2]
        assert made == [1, 2, 3, 2]  # 2 was the one used longest ago when 3 came

    @pytest.fixture
    def capturing(self, monkeypatch):
        """As on a GPU, whose copies are left out."""
        from dsfast.triton_kernels import tables

        now = []
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(now))
        monkeypatch.setattr(tables, "_copy", lambda x, device: tables.Entry(x, None))
        return now

    def test_a_capture_makes_nothing_and_what_it_read_stays(self, capturing):
        kept, cuda = self.kept(), torch.device("cuda")
        tensor = kept.get("a", lambda: torch.ones(1), cuda)
        capturing.append(True)
        assert kept.get("a", lambda: None, cuda) is tensor
        with pytest.raises(RuntimeError, match="make the same call once ahead of the capture"):
            kept.get("b", lambda: torch.ones(1), cuda)
        capturing.clear()
        for key in "bcdef":
            kept.get(key, lambda: torch.zeros(1), cuda)
        assert kept.get("a", lambda: None, cuda) is tensor


@on_device
def test_the_same_tensors_need_one_table(monkeypatch):
    from dsfast.triton_kernels import tables

    made = []
    monkeypatch.setattr(tables, "_kept", tables.DeviceCache(4))
    monkeypatch.setattr(tables, "build_table", lambda *a, build=tables.build_table: made.append(1) or build(*a))
    tensors, lrs, settings, step, clip_scale = prepared(TestAdamw.tiny)
    with ops.use("triton"):
        for _ in range(3):
            ops.adamw(*tensors, lrs, *settings, step, clip_scale)
        assert len(made) == 1
        ops.adamw(*prepared(TestAdamw.tiny)[0], lrs, *settings, step, clip_scale)
    assert len(made) == 2


@on_device
def test_a_part_of_the_same_memory_has_a_table_of_its_own():
    """Also where it begins at 8 bytes, for which kernels must not read 16 at a time."""
    x = torch.ones(27, device=DEVICE)
    with ops.use("triton"):
        assert [ops.grad_norm([part]) for part in (x[:16], x[:4], x[2:])] == [4.0, 2.0, 5.0]


@on_device
def test_other_learning_rates_of_the_same_tensors():
    p, g, m, v = (torch.full((3,), x, device=DEVICE) for x in (1.0, -0.5, 7.0, 7.0))
    with ops.use("triton"):
        for lr, decay, expected in ((0.25, 0.0, 1.25), (0.5, 0.0, 1.75), (0.5, 1.0, 1.375)):
            ops.adamw([p], [g], [m], [v], [lr], [decay], 0.0, 0.0, 0.0, 1)
            assert p.tolist() == [expected] * 3


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_step_reads_new_numbers():
    """Norm, clip and update in one graph; scale and step change between replays; a bad gradient changes nothing."""
    case = adamw_case("two", ((BLOCK,), (5,)), 1)
    tensors, lrs, settings, _, _ = prepared(case)
    expected = [[x.clone() for x in column] for column in tensors]
    lr_scale = torch.ones((), dtype=torch.float64, device=DEVICE)
    step = torch.tensor(1, device=DEVICE)

    def update(columns, lr_scale, step):
        ops.adamw(*columns, lrs, *settings, step, ops.grad_clip(columns[1], 1.0)[1], lr_scale)

    with ops.use("triton"):
        graph, scratch = torch.cuda.CUDAGraph(), [[x.clone() for x in column] for column in tensors]
        update(tensors, lr_scale, step)  # makes the tables
        for column, old in zip(tensors, scratch, strict=True):
            for x, y in zip(column, old, strict=True):
                x.copy_(y)
        with torch.cuda.graph(graph):
            update(tensors, lr_scale, step)
        for number in range(1, 4):
            lr_scale.mul_(0.5)
            step.fill_(number)
            graph.replay()
            update(expected, lr_scale.clone(), step.clone())
        tensors[1][0][3] = math.nan
        graph.replay()
    for column in (0, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(tensors[column], expected[column], strict=True))


test_in_the_interpreter = in_the_interpreter(__file__)
