"""The routers' biases and what is kept of a step: in plain PyTorch here, by the Triton kernels in the interpreter's process."""

from __future__ import annotations

import math

import pytest
import torch
from triton_contract import DEVICE, INTERPRETED, in_the_interpreter, on_device, poisoned

from dsfast import ops
from dsfast.errors import UserError

IMPLEMENTATIONS = ["reference", "triton" if INTERPRETED or torch.cuda.is_available() else "native"]
FLOAT64, INT64 = torch.float64, torch.int64


def integers(*shape: int, seed: int = 0, high: int = 9000) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def number(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype, device=DEVICE)


@on_device
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestBias:
    @pytest.mark.parametrize(("routers", "experts"), [(1, 1), (2, 2), (3, 5), (2, 64), (61, 257), (1, 2048)])
    @pytest.mark.parametrize("on_the_device", [False, True])
    def test_moves_towards_the_mean_load(self, implementation, routers, experts, on_the_device):
        loads = integers(routers, experts)
        loads[:, experts // 2] = loads.sum(1) // experts  # about the mean
        biases = [torch.randn(experts, device=DEVICE) for _ in range(routers)]
        before = [bias.tolist() for bias in biases]
        with poisoned(), ops.use(implementation):
            ops.update_bias(biases, loads, 0.25, number(0.5) if on_the_device else 0.5)
        for bias, old, load in zip(biases, before, loads.tolist(), strict=True):
            mean = sum(load) / experts
            expected = [b + 0.25 * ((mean > x) - (mean < x)) for b, x in zip(old, load, strict=True)]
            torch.testing.assert_close(bias.cpu(), torch.tensor(expected), rtol=0, atol=1e-6)

    def test_equal_loads_change_nothing(self, implementation):
        bias = torch.ones(7, device=DEVICE)
        with ops.use(implementation):
            ops.update_bias([bias], torch.full((1, 7), 3, device=DEVICE), 0.25)
        assert (bias == 1).all()

    @pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
    def test_nothing_moves_by_a_factor_that_is_not_finite(self, implementation, value):
        bias = torch.ones(5, device=DEVICE)
        with ops.use(implementation):
            ops.update_bias([bias], integers(1, 5), 0.25, number(value))
        assert (bias == 1).all()

    def test_views_of_one_tensor(self, implementation):
        """As where the biases of all routers lie in one, and at odd places."""
        whole = torch.zeros(23, device=DEVICE)
        with ops.use(implementation):
            ops.update_bias(
                [whole[1:6], whole[7:12]], number(0.0, INT64) + torch.arange(10, device=DEVICE).view(2, 5), 1.0
            )
        assert whole.tolist() == [0, 1, 1, 0, -1, -1, 0, 1, 1, 0, -1, -1, *[0] * 11]

    def test_loads_that_lie_expert_by_expert(self, implementation):
        biases = [torch.zeros(2, device=DEVICE) for _ in range(3)]
        loads = torch.tensor([[0, 5, 2], [9, 5, 1]], device=DEVICE)
        with ops.use(implementation):
            ops.update_bias(biases, loads.T, 1.0)
        assert [bias.tolist() for bias in biases] == [[1, -1], [0, 0], [-1, 1]]

    def test_no_router(self, implementation):
        with ops.use(implementation):
            ops.update_bias([], torch.zeros(0, 0, dtype=INT64, device=DEVICE), 0.1)

    def test_bad_arguments(self, implementation):
        bias, loads = torch.zeros(5, device=DEVICE), integers(1, 5)
        with ops.use(implementation):
            with pytest.raises(ValueError, match=r"update_bias: loads must have shape \[2, E\], got \[1, 5\]"):
                ops.update_bias([bias, bias], loads, 0.1)
            with pytest.raises(ValueError, match=r"update_bias: biases must have shape \[5\], got \[4\]"):
                ops.update_bias([bias[:4]], loads, 0.1)
            with pytest.raises(TypeError, match=r"update_bias: biases must be torch.float32 on"):
                ops.update_bias([bias.double()], loads, 0.1)
            with pytest.raises(ValueError, match=r"update_bias: biases, .*, must be contiguous, got strides \(2,\)"):
                ops.update_bias([torch.zeros(10, device=DEVICE)[::2]], loads, 0.1)
            with pytest.raises(TypeError, match=r"update_bias: loads must be torch.int64 on"):
                ops.update_bias([bias], loads.int(), 0.1)
            with pytest.raises(TypeError, match=r"update_bias: clip_scale must be torch.float32 on"):
                ops.update_bias([bias], loads, 0.1, number(1.0, FLOAT64))


@on_device
def test_more_experts_than_a_block_are_refused():
    with ops.use("triton"):
        ops.update_bias([torch.zeros(2048, device=DEVICE)], integers(1, 2048), 0.1)
    with ops.use("triton"), pytest.raises(UserError, match="up to 2048 experts, got 2049"):
        ops.update_bias([torch.zeros(2049, device=DEVICE)], integers(1, 2049), 0.1)


class Memory:
    """What a run keeps: P places, two routers of three experts."""

    def __init__(self, places: int = 4, loads: tuple[int, int] = (2, 3)):
        self.place, self.update = torch.zeros(1, dtype=INT64, device=DEVICE), number(1, INT64)
        self.measured = torch.full((places, 4), 7.0, dtype=FLOAT64, device=DEVICE)
        self.loads = torch.full((places, *loads), 7, device=DEVICE)

    def record(self, loss, norm, scale, clip_scale, load, dtype=torch.float32) -> None:
        numbers = number(loss, dtype), number(norm, FLOAT64), number(scale, FLOAT64), number(clip_scale)
        ops.record_step(self.place, self.update, self.measured, self.loads, *numbers, load)


@on_device
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestRecord:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_one_row_after_the_other_and_bad_steps_are_not_counted(self, implementation, dtype):
        memory, loads = Memory(), [integers(2, 3, seed=seed) for seed in range(3)]
        with poisoned(), ops.use(implementation):
            for step, clip_scale in enumerate((1.0, math.nan, 0.5)):
                memory.record(1.5 + step, 1e-40 * (step + 1), 1 / (step + 3), clip_scale, loads[step], dtype)
        assert memory.measured.tolist() == [
            [1.5, 1e-40, 1 / 3, 1.0], [2.5, 2e-40, 1 / 4, 0.0], [3.5, 1e-40 * 3, 1 / 5, 1.0], [7.0] * 4,
        ]  # fmt: skip
        assert [row.tolist() for row in memory.loads] == [*(load.tolist() for load in loads), [[7] * 3] * 2]
        assert (memory.place.tolist(), memory.update.item()) == ([3], 3)

    @pytest.mark.parametrize("shape", [(0, 0), (1, 1), (61, 257)])
    def test_any_number_of_loads(self, implementation, shape):
        memory, load = Memory(2, shape), integers(*shape)
        with ops.use(implementation):
            memory.record(math.inf, math.nan, 1.0, -math.inf, load)
        assert torch.equal(memory.loads[0], load)
        assert (memory.loads[1] == 7).all()
        assert [str(x) for x in memory.measured[0].tolist()] == ["inf", "nan", "1.0", "0.0"]

    def test_loads_that_lie_expert_by_expert(self, implementation):
        memory, load = Memory(), integers(3, 2).T
        with ops.use(implementation):
            memory.record(1.0, 1.0, 1.0, 1.0, load)
        assert torch.equal(memory.loads[0], load)

    def test_bad_arguments(self, implementation):
        memory = Memory()
        with ops.use(implementation):
            with pytest.raises(ValueError, match=r"record_step: loads must have shape \[4, 2, 4\], got \[4, 2, 3\]"):
                memory.record(1.0, 1.0, 1.0, 1.0, integers(2, 4))
            measured = memory.measured
            for other, match in (
                (measured[:, :3], r"measured must have shape \[P, 4\], got \[4, 3\]"),
                (measured[:3], r"loads must have shape \[3, 2, 3\], got \[4, 2, 3\]"),
                (measured.repeat(1, 2)[:, ::2], r"measured, .*, must be contiguous, got strides \(8, 2\)"),
            ):
                memory.measured = other
                with pytest.raises(ValueError, match=f"record_step: {match}"):
                    memory.record(1.0, 1.0, 1.0, 1.0, integers(2, 3))
            memory.measured = measured
            kept = {name: getattr(memory, name) for name in ("place", "update", "measured", "loads")}
            given = {name: number(1.0, FLOAT64) for name in ("loss", "norm", "lr_scale")}
            right = {**kept, **given, "clip_scale": number(1.0), "load": integers(2, 3)}
            for name in set(right) - {"loss"}:
                with pytest.raises(TypeError, match=rf"record_step: {name} must be {right[name].dtype} on"):
                    ops.record_step(**{**right, name: right[name].half()})


@on_device
@pytest.mark.parametrize("place", [-1, 4, 2**40])
def test_a_place_that_is_none_keeps_nothing(place):
    memory = Memory()
    memory.place.fill_(place)
    with ops.use("triton"):
        memory.record(1.0, 1.0, 1.0, 1.0, integers(2, 3))
    assert (memory.measured == 7).all()
    assert (memory.loads == 7).all()


@pytest.mark.skipif(DEVICE != "cpu", reason="elsewhere looking would wait for the device")
def test_a_place_that_is_none_is_an_error_on_the_cpu():
    memory = Memory()
    memory.place.fill_(4)
    with ops.use("reference"), pytest.raises((IndexError, RuntimeError)):
        memory.record(1.0, 1.0, 1.0, 1.0, integers(2, 3))


test_in_the_interpreter = in_the_interpreter(__file__)
