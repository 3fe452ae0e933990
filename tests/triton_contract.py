"""The tests that every operator's Triton kernels pass: on a GPU where there is one, and everywhere in Triton's interpreter,
in a process of its own because triton reads TRITON_INTERPRET when it is imported. Where DSFAST_PTX_MACHINE is set, what is
compiled of them runs on tests/ptx_machine.py in the interpreter's place.

A file tests/test_triton_X.py holds a subclass of TritonContract, and `test_in_the_interpreter = in_the_interpreter(__file__)`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import pytest
import torch
from dsfast.triton_kernels import launch
from dsfast.triton_kernels.limits import CHIPS
from operator_cases import (
    DRAWS,
    LAYOUTS,
    assert_bitwise_equal,
    assert_no_gradient_goes_on,
    assert_passed,
    drawn,
    expanded,
    with_gradient_layout,
)  # fmt: skip
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dsfast import ops
from dsfast.ops.cases import Case
from dsfast.ops.checks import IN_FLOAT32, check_draws, compare, evaluate
from dsfast.ops.triton import INTERPRETED, kept_kernels

ON_THE_MACHINE = INTERPRETED and "DSFAST_PTX_MACHINE" in os.environ
if ON_THE_MACHINE:
    del os.environ["TRITON_INTERPRET"]  # dsfast has read it, Triton is to compile

pytest.importorskip("triton")

# Deterministic algorithms make torch ask for it before cuBLAS runs on a GPU; cuBLAS reads it when it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

DEVICE = "cpu" if INTERPRETED else "cuda"
# bf16 on a GPU alone: the interpreter's bf16 products are wrong.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)[: 2 if INTERPRETED and not ON_THE_MACHINE else 3]

on_device = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="needs a GPU; without one it runs in the interpreter's process",
)

if ON_THE_MACHINE:
    from ptx_machine import CHIP, run_launch

    launch.Launch.run = run_launch
    launch.INTERPRETED_AS = CHIPS[os.environ.get("DSFAST_INTERPRETED_CHIP", CHIP)].large
elif INTERPRETED:
    from interpreted import set_up_interpreter
    from watched import watch_launches

    set_up_interpreter()
    watch_launches()
    launch.INTERPRETED_AS = CHIPS[os.environ.get("DSFAST_INTERPRETED_CHIP", "sm_90")].large
elif torch.cuda.is_available():
    with kept_kernels():  # the right ptxas and cache, for tests that call launchers themselves too
        pass


@contextmanager
def poisoned() -> Iterator[None]:
    """Outputs and working memory come full of NaN (integers: of their largest value)."""
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def on_the_device(arguments: list) -> list:
    return tree_map_only(Tensor, lambda x: x.to(DEVICE), arguments)


def run_triton(case: Case, arguments: list) -> dict[str, Tensor]:
    with poisoned(), ops.use("triton", case.operator):
        return evaluate(case.function, on_the_device(arguments), case.differentiable)


def both_passes(case: Case, arguments: list) -> list[Tensor]:
    """The outputs, and the gradients of half the sum of their squares: nothing comes from the host, as in `evaluate`."""
    leaves = list(arguments)
    for i in case.differentiable:
        leaves[i] = arguments[i].detach().requires_grad_()  # anew: autograd is to know no stream but this pass's
    outputs = case.function(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    found, weighed = [x.detach() for x in outputs], [x for x in outputs if x.requires_grad]
    if weighed:
        wanted, weights = [leaves[i] for i in case.differentiable], [x.detach() for x in weighed]
        found += torch.autograd.grad(weighed, wanted, weights, allow_unused=True, materialize_grads=True)
    return found


def in_the_interpreter(path: str, other_chips: tuple[str, ...] = ()):
    """A test that runs the tests of `path` in a process of the interpreter's, by the tiles of an sm_90, and where it is slow
    those that are not by the tiles of `other_chips` as well."""
    slow = [("slow", "sm_90"), *(("not slow", chip) for chip in other_chips)]

    @pytest.mark.skipif(INTERPRETED, reason="this is what starts the interpreter's process")
    @pytest.mark.parametrize(
        ("which", "chip"), [("not slow", "sm_90"), *(pytest.param(*run, marks=pytest.mark.slow) for run in slow)]
    )
    def test(which, chip):
        pass_in_a_process(path, "-m", f"{which} and not gpu", DSFAST_INTERPRETED_CHIP=chip)

    return test


def pass_in_a_process(path: str, *flags: str, **environment: str) -> None:
    """The tests of `path` pass in a process of the interpreter's with this environment; flags: pytest's."""
    command = [sys.executable, "-m", "pytest", *flags, "-p", "no:cacheprovider", path]
    interpreted = {**os.environ, "TRITON_INTERPRET": "1", **environment}
    child = subprocess.run(command, env=interpreted, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-2000:]


def small_tiles_of_narrow_experts(monkeypatch) -> None:
    """The backward pass of moe_experts and swiglu_mlp in the one kernel of narrow experts, in float32 as well, and by tiles so
    small that few tokens have several of places, of columns and of the columns that one product adds up. The sums of two tiles
    are added up at once."""
    from dsfast.triton_kernels import moe_experts

    monkeypatch.setattr(moe_experts, "ADDED", 2)
    for table in (moe_experts._FLOAT32, moe_experts._LARGE):
        monkeypatch.setitem(table, "narrow", {16: moe_experts.Tiles(16, 16, 16, 4, 1)})


def without_maximum(monkeypatch, kernels) -> list[bool]:
    """Every dtype's softmax in the module `kernels` begins as bfloat16's does, which the interpreter does not multiply. What
    comes back fills with whether that was right, program by program, in the interpreter."""
    taken, fits = [], kernels.fits

    def noted(b_l):
        right = fits(b_l)
        taken.append(bool(right))
        return right

    monkeypatch.setattr(kernels, "takes_raw", lambda dtype, large: True)
    if INTERPRETED:
        monkeypatch.setattr(kernels, "fits", noted)
    return taken


class TritonContract:
    """`cases`: the name of each says why it is there; sizes beside those of the kernels' tiles. `tiny` as in OperatorContract."""

    cases: ClassVar[tuple[Case, ...]]
    tiny: ClassVar[Case]
    registered: ClassVar[tuple[str, ...]]  # names in torch.ops.dsfast
    strided_arguments: ClassVar[tuple[int, ...] | None] = None  # None: all
    not_expanded: ClassVar[tuple[int, ...]] = ()

    def pytest_generate_tests(self, metafunc) -> None:
        cls = metafunc.cls
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", cls.cases, ids=[case.name for case in cls.cases])
        if "dtype" in metafunc.fixturenames:
            dtypes = (torch.float32,) if cls.tiny.operator in IN_FLOAT32 else DTYPES
            metafunc.parametrize("dtype", dtypes, ids=str)
        if "layout" in metafunc.fixturenames:
            metafunc.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
        if "operator" in metafunc.fixturenames:
            metafunc.parametrize("operator", cls.registered)

    @on_device
    def test_against_float64(self, case, dtype):
        with poisoned():
            assert_passed(compare(case, ["triton"], DEVICE, dtype, draws=DRAWS))

    @on_device
    def test_views_as_inputs_and_gradients(self, layout):
        case = self.tiny
        draws = [on_the_device(drawn(case, seed)) for seed in range(DRAWS)]
        for arguments in draws:
            for i in range(len(arguments)) if self.strided_arguments is None else self.strided_arguments:
                if layout is not expanded or i not in self.not_expanded:
                    arguments[i] = tree_map_only(Tensor, lambda x: layout(x) if x.dim() else x, arguments[i])
        function = with_gradient_layout(case.function, layout)
        with poisoned():
            assert_passed(check_draws(case.operator, function, draws, case.differentiable, ["triton"], case=case.name))

    @on_device
    def test_no_gradient_of_its_outputs(self):
        if self.tiny.differentiable:
            with ops.use("triton", self.tiny.operator):
                assert_no_gradient_goes_on(self.tiny, on_the_device(drawn(self.tiny)))

    @on_device
    def test_same_bits_twice_and_inputs_left_alone(self, case):
        arguments = drawn(case)
        first = run_triton(case, arguments)
        assert_bitwise_equal(first, run_triton(case, arguments))
        for x, original in zip(arguments, drawn(case), strict=True):
            pairs = zip(x, original, strict=True) if isinstance(x, list) else [(x, original)]
            assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)

    @on_device
    def test_fake_tensors_have_the_shapes_of_real_ones(self):
        """What torch.compile believes: shapes and dtypes of each torch.ops.dsfast operator that is called."""
        from operator_cases import RecordCalls

        with RecordCalls() as record:
            run_triton(self.tiny, self.tiny_arguments())
        assert record.calls
        for operator, arguments in record.calls.items():
            torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))

    def tiny_arguments(self) -> list:
        """Of `tiny`, in a dtype in which the kernels run on a GPU too."""
        return drawn(self.tiny)

    def test_registered_for_cuda(self, operator):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dsfast::{operator}", "CUDA")

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_captured_in_a_graph(self):
        """Neither pass waits for the host or allocates outside the graph's pool; a replay gives the same bits."""
        arguments = on_the_device(drawn(self.tiny))
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with ops.use("triton", self.tiny.operator):
            with torch.cuda.stream(stream):  # compiles the kernels: not during a capture
                expected = both_passes(self.tiny, arguments)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                found = both_passes(self.tiny, arguments)
        given = [x.untyped_storage().data_ptr() for x in arguments if isinstance(x, Tensor)]
        for x in found:
            if x.untyped_storage().data_ptr() not in given:  # some are views of inputs
                x.zero_()
        graph.replay()
        for x, y in zip(expected, found, strict=True):
            assert torch.equal(x, y)
