"""The tests that every operator passes, each written once. A subclass of OperatorContract names the cases.

Errors are judged by dsfast.ops.checks (float64, twice eager's error); nothing here has a tolerance of its own except the
comparison of two float64 computations.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from dsfast import ops
from dsfast.ops import cases as builders
from dsfast.ops import native
from dsfast.ops.cases import Case
from dsfast.ops.checks import check, check_draws, compare, evaluate

# One below, at and above every block of csrc/: vectors of 4, 8 and 16 (W), panels of 8, 16, 32 (NR = 2 W), rows of 6 and 12
# (MR), blocks of 48 and 96 (8 MR), and rms_norm's 64 tokens.
EDGES = (1, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97)

DRAWS = 4
GUARD = 64  # elements before and after every allocation
POISON = {torch.float32: 0x7FC0BEEF, torch.int32: -1717986919, torch.int64: -7378697629483820647}  # as integers; a NaN


def needs_native() -> None:
    module, reason = native.status()
    if module is None:
        pytest.skip(reason)


def needs_bfloat16() -> None:
    needs_native()
    if not hasattr(native.module(), "bfloat16"):
        pytest.skip(f"the kernels run as {native.module().isa}, which has no bfloat16")


def drawn(case: Case, seed: int = 0) -> list:
    return list(case.make_inputs(torch.Generator().manual_seed(seed)))


def attention_by_heads(q_nope, q_rope, k_nope, k_rope, v, cu_seqlens, scale) -> Tensor:
    """`mla_attention` of a rope key that is expanded to the heads, each of which then has a gradient of it."""
    return ops.mla_attention(q_nope, q_rope, k_nope, k_rope[:, None].expand(q_rope.shape), v, cu_seqlens, scale)


def assert_passed(rows: Sequence[dict]) -> None:
    failed = [row for row in rows if not row["passed"]]
    assert rows
    assert not failed, "\n".join(map(str, failed))


def assert_bitwise_equal(a: dict[str, Tensor], b: dict[str, Tensor], quantities: Sequence[str] | None = None) -> None:
    assert a.keys() == b.keys()
    for quantity in a if quantities is None else quantities:
        assert torch.equal(a[quantity], b[quantity]), quantity


def run_native(case: Case, arguments: Sequence, positions: Sequence[int] | None = None) -> dict[str, Tensor]:
    needs_native()
    with ops.use("native", case.operator):
        return evaluate(case.function, arguments, case.differentiable if positions is None else positions)


# Views of the same values ------------------------------------------------------------------------------------------------


def transposed(x: Tensor) -> Tensor:
    """The last dimension is not contiguous."""
    if x.dim() < 2:
        return torch.stack((x, torch.full_like(x, _outside(x))), -1)[..., 0]
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def padded(x: Tensor) -> Tensor:
    """Rows further apart than they are long, an odd distance into the storage; what lies between must not be read."""
    wide = x.new_full((*x.shape[:-1], x.size(-1) + 5), _outside(x))
    wide[..., 3:-2] = x
    return wide[..., 3:-2]


def expanded(x: Tensor) -> Tensor:
    """All rows (of one token, where there are heads) are one row in one place. Document boundaries cannot be."""
    rows = max(0, x.dim() - 2)
    return x if x.dtype == torch.int32 or not x.size(rows) else x.narrow(rows, 0, 1).expand_as(x)


def _outside(x: Tensor) -> float:
    return float("nan") if x.is_floating_point() else 10**6


LAYOUTS = (transposed, padded, expanded)
# What makes autograd hand the operator a gradient of that layout.
GRADIENT_LAYOUTS = {
    transposed: lambda y: y.transpose(-1, -2).contiguous(),
    padded: lambda y: torch.cat((y.detach(), y, y.detach()), -1),
    expanded: lambda y: y.sum(),
}


def with_gradient_layout(function: Callable, layout: Callable) -> Callable:
    @functools.wraps(function)
    def wrapped(*arguments):
        outputs = function(*arguments)
        single = not isinstance(outputs, tuple)
        seen = [
            GRADIENT_LAYOUTS[layout](y) if y.requires_grad and y.dim() else y
            for y in ((outputs,) if single else outputs)
        ]
        return seen[0] if single else tuple(seen)

    return wrapped


# Allocations -------------------------------------------------------------------------------------------------------------


class GuardedAllocations:
    """Hands out poisoned tensors with a guard before and behind, and tells whether a guard was written to."""

    def __init__(self) -> None:
        self.flat: list[Tensor] = []

    def new_empty(self, like: Tensor, *size, dtype: torch.dtype | None = None) -> Tensor:
        shape = torch.Size(size[0] if size and not isinstance(size[0], int) else size)
        dtype = dtype or like.dtype
        as_integer = torch.int64 if dtype == torch.int64 else torch.int32
        flat = torch.full((shape.numel() + 2 * GUARD,), POISON[dtype], dtype=as_integer).view(dtype)
        self.flat.append(flat)
        return flat[GUARD : GUARD + shape.numel()].view(shape)

    def broken(self) -> int:
        bits = [x.view(torch.int32) if x.dtype == torch.float32 else x for x in self.flat]
        return sum(
            not bool((part == POISON[x.dtype]).all())
            for x, b in zip(self.flat, bits, strict=True)
            for part in (b[:GUARD], b[-GUARD:])
        )


@contextmanager
def guarded_allocations(monkeypatch: pytest.MonkeyPatch) -> Iterator[GuardedAllocations]:
    guarded = GuardedAllocations()
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", lambda like, *size, **kw: guarded.new_empty(like, *size, **kw))
        patch.setattr(torch, "empty_like", lambda like: guarded.new_empty(like, like.shape))
        yield guarded


class RecordCalls(TorchDispatchMode):
    """Keeps the arguments of every call of an operator of dsfast's, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple] = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "dsfast" and operator not in self.calls:
            forward = not operator._opname.endswith("_backward")
            self.calls[operator] = tree_map_only(
                Tensor, lambda x: x.detach().clone().requires_grad_(x.requires_grad and forward), args
            )
        return operator(*args, **(kwargs or {}))


def bad(match: str, error: type[Exception] = ValueError, **changes):
    """A call that must raise `error` with a message matching `match`: `changes` replaces arguments of the tiny case."""
    return pytest.param(match, error, changes, id=match)


def contract(operator: str):
    """The class with the operator's cases."""
    name = "Test" + "".join(word.capitalize() for word in operator.split("_"))
    return getattr(import_module(f"test_{operator}"), name)


# The contract ------------------------------------------------------------------------------------------------------------


class _GivesNoGradient(torch.autograd.Function):
    """Its input; its backward pass gives None, as some functions of users do."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


def assert_no_gradient_goes_on(case: Case, arguments: Sequence) -> None:
    """Where none comes to the operator's outputs, and a backward pass goes through it all the same."""
    leaves = list(arguments)
    for i in case.differentiable:
        leaves[i] = arguments[i].detach().requires_grad_()
    outputs = case.function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(_GivesNoGradient.apply(x).sum() for x in outputs if x.requires_grad).backward()
    assert all(leaves[i].grad is None or not leaves[i].grad.any() for i in case.differentiable)


class OperatorContract:
    """`cases`: the name of each says why it is there. `tiny`: an odd, small case that shows all of the operator.

    `independent` computes the operator another way, from torch's own functions. `summed_over_threads` are the quantities
    that depend on how many threads add them up; all others are the same bits with any number.
    """

    cases: ClassVar[tuple[Case, ...]]
    tiny: ClassVar[Case]
    bad_arguments: ClassVar[tuple]
    summed_over_threads: ClassVar[frozenset[str]] = frozenset()
    strided_arguments: ClassVar[tuple[int, ...] | None] = None  # None: all
    linear: ClassVar[bool] = False
    not_expanded: ClassVar[tuple[int, ...]] = ()  # where equal rows would make a gradient cancel to nothing
    dtypes_not_named: ClassVar[frozenset[str]] = frozenset()  # arguments, for a reason that stands there

    @staticmethod
    def independent(*arguments):
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc) -> None:
        cls = metafunc.cls
        for fixture, cases in (("case", cls.cases), ("sampled_case", (*cls.cases[:3], *cls.cases[3::6]))):
            if fixture in metafunc.fixturenames:
                metafunc.parametrize(fixture, cases, ids=[case.name for case in cases])
        if "layout" in metafunc.fixturenames:
            metafunc.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
        if "match" in metafunc.fixturenames:
            metafunc.parametrize(("match", "error", "changes"), cls.bad_arguments)

    def test_native_against_float64(self, case):
        needs_native()
        assert_passed(compare(case, ["native"], draws=DRAWS))

    def test_reference_against_independent_formula(self, case):
        arguments = tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, drawn(case))
        with ops.use("reference"):
            found = evaluate(case.function, arguments, case.differentiable)
        # evaluate takes the arguments' names from the signature
        independent = functools.wraps(case.function)(self.independent)
        expected = evaluate(independent, arguments, case.differentiable)
        assert found.keys() == expected.keys()
        for quantity in expected:
            torch.testing.assert_close(found[quantity], expected[quantity], rtol=1e-11, atol=1e-12, msg=quantity)

    def test_gradcheck_of_reference(self):
        case = self.tiny
        arguments = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in drawn(case)]
        for position in case.differentiable:
            arguments[position].requires_grad_()
        with ops.use("reference"):
            assert torch.autograd.gradcheck(case.function, arguments)

    def test_no_gradient_of_its_outputs(self):
        needs_native()
        if self.tiny.differentiable:
            with ops.use("native"):
                assert_no_gradient_goes_on(self.tiny, drawn(self.tiny))

    def test_views_as_inputs_and_gradients(self, sampled_case, layout):
        needs_native()
        case = sampled_case
        draws = [drawn(case, seed) for seed in range(DRAWS)]
        for arguments in draws:
            for i in range(len(arguments)) if self.strided_arguments is None else self.strided_arguments:
                if layout is not expanded or i not in self.not_expanded:
                    arguments[i] = tree_map_only(Tensor, lambda x: layout(x) if x.dim() else x, arguments[i])
        function = with_gradient_layout(case.function, layout)
        assert_passed(check_draws(case.operator, function, draws, case.differentiable, ["native"], case=case.name))

    def test_outputs_are_written_whole_and_nothing_beside_them(self, case, monkeypatch):
        """Outputs and working memory come full of NaN and with guards around them; the result is the same bits."""
        arguments = drawn(case)
        expected = run_native(case, arguments)
        with guarded_allocations(monkeypatch) as guarded:
            found = run_native(case, arguments)
        assert_bitwise_equal(expected, found)
        assert guarded.flat or case.operator in ("adamw", "muon")
        assert guarded.broken() == 0

    def test_inputs_are_left_alone(self, case):
        needs_native()
        arguments, before = drawn(case), drawn(case)
        run_native(case, arguments)
        for argument, original in zip(arguments, before, strict=True):
            entries = zip(argument, original, strict=True) if isinstance(argument, list) else [(argument, original)]
            for x, y in entries:
                assert torch.equal(x, y) if isinstance(x, Tensor) else x == y

    def test_same_bits_twice_and_after_working_memory_full_of_nan(self, case):
        needs_native()
        arguments = drawn(case)
        first = run_native(case, arguments)
        assert_bitwise_equal(first, run_native(case, arguments))
        run_native(case, tree_map_only(Tensor, _all_nan, arguments))
        large = builders.swiglu_mlp_case("large", 97, 128, 128)
        run_native(large, [_all_nan(x) for x in drawn(large)])
        assert_bitwise_equal(first, run_native(case, arguments))

    def test_two_threads(self, sampled_case):
        self._compare_threads(sampled_case, 2)

    def test_more_threads_than_tokens(self):
        self._compare_threads(self.tiny, 7)

    def _compare_threads(self, case: Case, threads: int) -> None:
        arguments, before = drawn(case), torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            one = run_native(case, arguments)
            torch.set_num_threads(threads)
            several, again = run_native(case, arguments), run_native(case, arguments)
            rows = compare(case, ["native"], draws=DRAWS)
        finally:
            torch.set_num_threads(before)
        assert_passed(rows)
        assert_bitwise_equal(several, again)
        assert_bitwise_equal(one, several, [name for name in one if name not in self.summed_over_threads])

    def test_nan_is_not_swallowed(self):
        """One NaN in one argument comes out wherever eager PyTorch shows it, and nowhere else."""
        needs_native()
        case = self.tiny
        for position, argument in enumerate(drawn(case)):
            if not isinstance(argument, Tensor) or not argument.is_floating_point():
                continue
            for element in range(argument.numel()):
                arguments = drawn(case)
                arguments[position].view(-1)[element] = float("nan")
                name = f"NaN at {element} of argument {position}"
                assert_passed(
                    check(case.operator, case.function, arguments, case.differentiable, ["native"], case=name)
                )

    def test_second_derivative(self):
        """The kernels have first derivatives only, but where the operator is linear; who asks for more must not get zeros."""
        needs_native()
        if not self.linear:
            with pytest.raises(NotImplementedError, match="first derivatives only"):
                second_derivative(self.tiny, "native")
            return
        found, expected = (second_derivative(self.tiny, name) for name in ("native", "reference"))
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)

    def test_opcheck(self):
        """Schema, fake tensors, autograd registration and aot dispatch of each torch.ops.dsfast operator that is called."""
        needs_native()
        with RecordCalls() as record:
            run_native(self.tiny, drawn(self.tiny))
        assert record.calls
        for operator, arguments in record.calls.items():
            torch.library.opcheck(operator, arguments)

    def test_compile_full_graph(self):
        needs_native()
        self._compare_compiled("aot_eager")

    @pytest.mark.slow
    def test_compile_with_inductor(self):
        needs_native()
        self._compare_compiled("inductor")

    def _compare_compiled(self, backend: str) -> None:
        arguments = drawn(self.tiny)
        torch._dynamo.reset()
        compiled = functools.wraps(self.tiny.function)(
            torch.compile(self.tiny.function, fullgraph=True, backend=backend)
        )
        assert_bitwise_equal(run_native(self.tiny, arguments), evaluate(compiled, arguments, self.tiny.differentiable))

    @pytest.mark.parametrize("implementation", ["reference", "native"])
    def test_bad_arguments(self, implementation, match, error, changes):
        if implementation == "native":
            needs_native()
        with ops.use(implementation), pytest.raises(error, match=match):
            self.call(**changes)

    @pytest.mark.parametrize("implementation", ["reference", "native"])
    def test_each_argument_of_another_dtype_is_named(self, implementation):
        """All tensors but the first of floating-point numbers, which says what the others are to be."""
        if implementation == "native":
            needs_native()
        arguments = zip(inspect.signature(self.tiny.function).parameters, drawn(self.tiny), strict=False)
        tensors = {name: x for name, x in arguments if isinstance(x, Tensor)}
        first = next((name for name, x in tensors.items() if x.is_floating_point()), None)
        others = {torch.float32: torch.float64, torch.int32: torch.int64, torch.int64: torch.int32}
        for name in tensors.keys() - {first} - self.dtypes_not_named:
            dtype, other = tensors[name].dtype, others[tensors[name].dtype]
            match = f"^{self.tiny.operator}: {name} must be {dtype} on cpu, got {other} on cpu$"
            with ops.use(implementation), pytest.raises(TypeError, match=match):
                self.call(**{name: tensors[name].to(other)})

    def call(self, **changes):
        """The public operator on the tiny case, with some arguments replaced (by a value, or a function of the old one)."""
        case = self.tiny
        names = list(inspect.signature(case.function).parameters)
        arguments = dict(zip(names, drawn(case), strict=False))
        for name, change in changes.items():
            assert name in names, name
            arguments[name] = change(arguments[name]) if callable(change) else change
        return case.function(**arguments)


def second_derivative(case: Case, implementation: str) -> tuple[Tensor, ...]:
    """The gradient of the squared gradient of the squared output."""
    arguments = drawn(case)
    leaves = [arguments[position].requires_grad_() for position in case.differentiable]
    with ops.use(implementation):
        outputs = case.function(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        total = sum(y.square().sum() for y in outputs if y.requires_grad)
        first = torch.autograd.grad(total, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)


def _all_nan(x: Tensor) -> Tensor:
    return torch.full_like(x, float("nan")) if x.is_floating_point() else x


def edges(build: Callable[..., Case], size: str, **others) -> list[Case]:
    """A case for each of EDGES, which the argument `size` of `build` takes; `others` are the other sizes."""
    return [build(f"{size} {n}", **others, **{size: n}) for n in EDGES]
