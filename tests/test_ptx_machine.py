"""What Triton compiles of the kernels for an NVIDIA GPU, run on tests/ptx_machine.py; and that machine itself."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from dsfast.triton_kernels import mla_attention, moe_route, rms_norm
from dsfast.triton_kernels.limits import CHIPS
from ptx_machine import run_launch
from triton_contract import pass_in_a_process
from watched import LaunchError

from dsfast import ops
from dsfast.ops.triton import INTERPRETED

OPERATORS = sorted(
    path.name
    for path in Path(__file__).parent.glob("test_*.py")
    if re.search(r"^class \w+\(TritonContract", path.read_text(), re.M)
)
pytestmark = pytest.mark.skipif(INTERPRETED, reason="Triton is to compile")


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
@pytest.mark.parametrize("file", OPERATORS)
def test_every_operator_as_it_is_compiled(file, chip):
    """By the chip's own tiles, in float32, float16 and bfloat16."""
    path = str(Path(__file__).with_name(file))
    machine = {"DSFAST_PTX_MACHINE": "1", "DSFAST_INTERPRETED_CHIP": chip}
    pass_in_a_process(path, "-m", "not gpu and not slow", "-k", "against_float64", **machine)


def routed(n: int, experts: int, top_k: int, *groups: int, run) -> None:
    """Routes n tokens by the compiled kernels, with `run`, and holds the choice and its order to plain PyTorch's."""
    random = torch.Generator().manual_seed(0)
    logits, bias = torch.randn(n, experts, generator=random), torch.randn(experts, generator=random)
    choice = top_k, *groups, True, 2.5
    found = moe_route._outputs(logits, top_k, torch.float32)
    for launch in moe_route.forward_launches(logits, bias, *choice, "sigmoid", *found):
        run(launch)
    with ops.use("reference"):
        weights, *expected = ops.moe_route(logits, bias, *choice)
    torch.testing.assert_close(found[0], weights)
    for mine, right in zip(found[1:], expected, strict=True):
        assert torch.equal(mine, right)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "choice", [(41, 64, 5, 8, 1), (9, 256, 8, 8, 4)], ids=["no power of two of choices", "DeepSeek-V3"]
)
def test_choices_are_counted_and_sorted(choice, seed):
    routed(*choice, run=partial(run_launch, seed=seed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_products_of_16_bits(dtype):
    random = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*shape, generator=random).to(dtype) for shape in ((33, 150), (8, 150)))
    logits = torch.empty(33, 8)
    found = moe_route._outputs(logits, 2, dtype)
    launches = moe_route.forward_launches(logits, torch.zeros(8), 2, 1, 1, True, 1.0, "sigmoid", *found, (x, w))
    assert launches[0].arguments["BK"] < 150
    run_launch(launches[0])
    torch.testing.assert_close(logits, x.float() @ w.float().T)


def test_threads_that_wait_for_nobody_are_found():
    without_barriers = partial(run_launch, change=lambda ptx: re.sub(r"bar\.sync\s+0;", "", ptx))
    with pytest.raises(AssertionError):
        routed(41, 64, 5, 8, 1, run=without_barriers)


def attended(chip: str, seed: int, change=str) -> None:
    """Attends by the compiled kernel of the 500K model's widths, and holds that to PyTorch in float64."""
    random = torch.Generator().manual_seed(seed)
    shapes = {
        "q_nope": (150, 2, 32),
        "q_rope": (150, 2, 16),
        "k_nope": (150, 2, 32),
        "k_rope": (150, 16),
        "v": (150, 2, 32),
    }
    arguments = [torch.randn(*shape, generator=random).bfloat16() for shape in shapes.values()]
    boundaries, scale = torch.tensor([0, 50, 150], dtype=torch.int32), 0.3
    o, softmax = torch.empty(150, 2, 32, dtype=torch.bfloat16), torch.empty(mla_attention.softmax_shape(arguments[0]))
    launch = mla_attention.forward_launch(*arguments, boundaries, scale, o, softmax, CHIPS[chip].large)

    def seen(ptx: str) -> str:
        assert "cp.async" in ptx
        assert ("wgmma.mma_async" in ptx) == (chip == "sm_90")
        return change(ptx)

    run_launch(launch, seed=seed, change=seen, chip=chip)
    with ops.use("reference"):
        expected = ops.mla_attention(*(x.double() for x in arguments), boundaries, scale)
    torch.testing.assert_close(o.double(), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
def test_copies_and_products_are_waited_for(chip, seed):
    attended(chip, seed)


@pytest.mark.parametrize(
    ("chip", "left_out"),
    [
        ("sm_80", r"cp\.async\.wait_group\s+\d+;"),
        ("sm_90", r"cp\.async\.wait_group\s+\d+;"),
        ("sm_90", r"wgmma\.wait_group\.sync\.aligned\s+\d+;"),
        ("sm_80", r"bar\.sync\s+0;"),
        ("sm_90", r"bar\.sync\s+0;"),
    ],
)
def test_waits_that_are_missing_are_found(chip, left_out):
    def wrong(seed: int) -> bool:
        try:
            attended(chip, seed, lambda ptx: re.sub(left_out, "", ptx))
        except AssertionError:
            return True
        return False

    assert any(map(wrong, range(4)))


def normed(change=str, **arguments) -> None:
    """Normalises by the compiled kernel, some of whose `arguments` are others, and holds that to PyTorch's own operator."""
    x, weight, y, rstd = torch.randn(5, 40), torch.randn(40), torch.empty(5, 40), torch.empty(5)
    launch = rms_norm.forward_launch(x, weight, 1e-6, None, y, None, rstd)
    launch.arguments.update(arguments)
    run_launch(launch, change=change)
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (40,), weight, 1e-6))


def test_a_norm():
    normed()


def test_rows_beyond_a_tensor_are_found():
    with pytest.raises(LaunchError, match="outside of every tensor"):
        normed(N=2**20)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (r"sqrt\.rn", "sin.approx", "the machine does not know sin"),
        (r"shfl\.sync\.bfly", "setp.lt.u32 %p999, %tid.x, 5;\n@%p999 shfl.sync.bfly", "not by all threads"),
        (r"%tid\.x", "%laneid", "does not know %laneid"),
    ],
)
def test_what_the_machine_does_not_know_is_an_error(old, new, said):
    def changed(ptx: str) -> str:
        assert re.search(old, ptx)
        return re.sub(old, new, ptx)

    with pytest.raises(LaunchError, match=said):
        normed(change=changed)
