"""Holds implementations of the operators against a float64 reference; shared by the suite, the tests and the bench.

An implementation's error is its largest absolute difference from the reference computed in float64. It may be

    tolerance = 2 (error of the same reference computed in the implementation's dtype, "eager") + 4 ulp of max |expected|

The factor 2 leaves room for another order of the same operations and no room for a lower precision. The floor is for where
eager is exact or nearly so (a copied row, one token's softmax): exp may be 2 ulp off, and a division and a product round
by half a ulp each. NaN and infinities must stand exactly where eager has them. The reference has no error but eager's, so
it is held to its float64 self within 64 ulp: ten times what it needs on a CPU (sums of 8,000 terms), while a TensorFloat-32 or
bfloat16 product that slipped in (4,000 ulp and more) does not.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dsfast.config import OPERATORS
from dsfast.ops import cases, native
from dsfast.ops.cases import Case
from dsfast.ops.dispatch import IN_FLOAT32, report, use

EAGER_FACTOR = 2
FLOOR_ULPS = 4
REFERENCE_ULPS = 64
ROUNDED = "native bfloat16"
"""The native implementation with products of bfloat16 (native.products_in), held to eager's error in bfloat16."""

MATRICES = ((2, 128, 192), (2, 128, 128), (18, 64, 128), (2, 48, 128), (2, 32, 256), (1, 32, 128))
"""n, rows and columns of what Muon updates in the 500K model."""

Row = dict[str, Any]

# The 500K model's own shapes (512 tokens) and one odd one each: primes, above and below every vector width and block.
CASES = (
    cases.rms_norm_case("500K", 512, 128),
    cases.rms_norm_case("odd", 67, 33, residual=False),
    cases.rope_case("500K", 512, 4, 16, 256),
    cases.rope_case("odd", 37, 3, 6, 41),
    cases.embedding_case("500K", 512, 8000, 32, 128),
    cases.embedding_case("odd", 101, 53, 7, 19),
    cases.mla_attention_case("500K", (256, 256), 4, 32, 16, 32),
    cases.mla_attention_case("odd", (1, 0, 37, 65), 3, 5, 6, 17),
    cases.mla_decode_case("500K", range(1, 256, 8), 256, 4, 32, 32, 16, 32),
    cases.mla_decode_case("odd", (37, 0, 1, 40, 5), 40, 3, 17, 5, 6, 7),
    cases.moe_route_case("500K", 512, 2, 1),
    cases.moe_route_case("odd", 61, 21, 4, n_group=3, topk_group=2, norm_topk_prob=True),
    cases.moe_experts_case("500K", 512, 128, 1, 2, 64),
    cases.moe_experts_case("odd", 61, 19, 3, 7, 5, used=(0, 1, 3, 6)),
    cases.swiglu_mlp_case("500K", 512, 128, 64),
    cases.swiglu_mlp_case("odd", 97, 19, 13),
    cases.linear_cross_entropy_case("500K", 512, 32, 8000),
    cases.linear_cross_entropy_case("odd", 67, 7, 131),
    cases.adamw_case("500K", ((8000, 32), (32, 128), (2, 128, 128), (128,)), 10),
    cases.adamw_case("odd", ((1,), (0,), (17, 3), (16385,)), 1),
    cases.muon_case("500K", (192, 128), (2, 128, 128), (2, 128, 64), (48, 128), (256, 32), parts=(1, 2, 1, 1, 1)),
    cases.muon_case("odd", (17, 41), (3, 13, 7), (6, 5), (31, 31), (1, 1), parts=(1, 1, 2, 1, 1), missing=1),
    cases.newton_schulz_case("500K", *MATRICES),
    cases.newton_schulz_case("odd", (3, 17, 41), (0, 2, 3), (1, 1, 7), (2, 31, 31)),
)

IN_A_STEP = (
    cases.mla_project_case("before attention, 500K", 512, 4, 128, 32, 32, 16, 32),
    cases.mla_output_case("behind attention, 500K", 512, 128, 128, uses=3),
    cases.stream_norm_case("read twice, 500K", 512, 128, uses=2),
    cases.split_and_turn_case("queries and key, 500K", 512, 4, 32, 32, 16, 256),
    cases.route_tokens_case("from tokens, 500K", 512, 128, 2, 1),
    cases.tied_embedding_case("tied, 500K", 512, 8000, 32, 128),
    cases.linear_cross_entropy_case("projected, 500K", 512, 32, 8000, d=128),
)
"""As a training step on a GPU calls them in 16 bits, by kernels of their own; elsewhere these are the operators above."""


def check_all(
    device: str = "cpu", dtype: torch.dtype = torch.float32, products: torch.dtype = torch.float32,
    operators: Container[str] = OPERATORS,
) -> list[Row]:  # fmt: skip
    """Each of `operators` in every implementation that runs on `device`, at the 500K model's shapes and an odd one, in `dtype`.

    products: where it is bfloat16 the native implementation is checked with such products too, as ROUNDED: they may be off by so
    much (`check_draws`) that a kernel which is wrong by a thousandth shows in float32 alone.
    """
    rows = []
    chosen = [(case, torch.float32 if case.operator in IN_FLOAT32 else dtype) for case in CASES]
    if device == "cuda" and dtype.itemsize == 2:
        chosen += [(case, dtype) for case in IN_A_STEP]
    for case, used in chosen:
        if case.operator not in operators:
            continue
        with use("auto"):
            own = {row["operator"]: row["implementation"] for row in report(device, used)}
        implementations = dict.fromkeys(("reference", own[case.operator]))
        rows += compare(case, implementations, device, used)
        if products == torch.bfloat16 and case.operator in native.OF_PRODUCTS and "native" in implementations:
            rows += compare(case, ["native"], device, used, products=products)
    return rows


def compare(
    case: Case, implementations: Iterable[str], device: str = "cpu", dtype: torch.dtype = torch.float32, draws: int = 1,
    products: torch.dtype = torch.float32,
) -> list[Row]:  # fmt: skip
    """`check` of a case on inputs drawn `draws` times (seeds 0, 1, ...) and judged together."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(draws)]
    inputs = [[converted(x, torch.device(device)) for x in case.make_inputs(g)] for g in generators]
    return check_draws(
        case.operator, case.function, inputs, case.differentiable, implementations, dtype, case.name, products
    )


def check(
    operator: str, function: Callable[..., Any], arguments: Sequence, differentiable: Sequence[int],
    implementations: Iterable[str], dtype: torch.dtype = torch.float32, case: str = "",
) -> list[Row]:  # fmt: skip
    """One row for each implementation and quantity (outputs, gradients) of `function(*arguments)`.

    `function` is the public operator, or calls it; floating tensors among `arguments` are cast to `dtype`. A row holds
    operator, implementation, case, quantity, max_abs_error (inf where NaN or infinities differ), eager_error,
    tolerance, passed.
    """
    return check_draws(operator, function, [arguments], differentiable, implementations, dtype, case)


def check_draws(
    operator: str, function: Callable[..., Any], draws: Sequence[Sequence], differentiable: Sequence[int],
    implementations: Iterable[str], dtype: torch.dtype = torch.float32, case: str = "",
    products: torch.dtype = torch.float32,
) -> list[Row]:  # fmt: skip
    """`check` on several sets of arguments of the same shapes, judged as one.

    In a small case eager's largest error is that of a handful of numbers, and often 0 by luck; several draws show what
    it usually is. products bfloat16: the native implementation, in float32 but for what its products multiply
    (native.products_in), is held to what eager makes of the same numbers in bfloat16; its rows say ROUNDED.
    """
    implementations = list(implementations)
    if products == torch.bfloat16 and "native" in implementations:
        rounded = [[converted(converted(x, products), dtype) for x in arguments] for arguments in draws]
        others = [name for name in implementations if name != "native"]
        rows = check_draws(operator, function, draws, differentiable, others, dtype, case) if others else []
        with native.products_in(products):
            rows_of_native = _judged(operator, function, rounded, differentiable, ["native"], products, case)
        return rows + [{**row, "implementation": ROUNDED} for row in rows_of_native]
    draws = [[converted(x, dtype) for x in arguments] for arguments in draws]
    return _judged(operator, function, draws, differentiable, implementations, dtype, case)


def in_words(row: Row) -> str:
    """What is wrong in a row that has not passed."""
    return f"{row['quantity']}: error {row['max_abs_error']:.2e}, at most {row['tolerance']:.2e} is right"


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> str:
    """The first quantity that is further from what is expected than `tolerance` times that one's largest value, in words; "" for
    none."""
    for quantity, values in expected.items():
        error, allowed = _error(found[quantity], values), tolerance * values.double().abs().max().item()
        if not error <= allowed:
            return in_words({"quantity": quantity, "max_abs_error": error, "tolerance": allowed})
    return ""


def _judged(operator, function, draws, differentiable, implementations, dtype, case) -> list[Row]:
    """A row for each implementation and quantity; eager computes in `dtype`, whatever the draws are in."""
    with use("reference", operator):
        expected = _evaluated(
            function, [[converted(x, torch.float64) for x in arguments] for arguments in draws], differentiable
        )
        eager = _evaluated(function, [[converted(x, dtype) for x in arguments] for arguments in draws], differentiable)
    rows = []
    for implementation in implementations:
        found = eager
        if implementation != "reference":
            with use(implementation, operator):
                found = _evaluated(function, draws, differentiable)
        for quantity, values in expected.items():
            numbers = judge(values, eager[quantity], found[quantity], dtype, implementation)
            row = {"operator": operator, "implementation": implementation, "case": case, "quantity": quantity}
            rows.append({**row, **numbers})
    return rows


def _evaluated(
    function: Callable[..., Any], draws: Sequence[Sequence], differentiable: Sequence[int]
) -> dict[str, Tensor]:
    """Each quantity of all draws, stacked."""
    found = [evaluate(function, arguments, differentiable, seed) for seed, arguments in enumerate(draws)]
    return {quantity: torch.stack([values[quantity] for values in found]) for quantity in found[0]}


def evaluate(
    function: Callable[..., Any], arguments: Sequence, differentiable: Sequence[int], seed: int = 0
) -> dict[str, Tensor]:
    """The outputs of `function(*arguments)` and the gradients of the arguments at positions `differentiable`, by name.

    The gradients are those of the outputs' sum weighted by random multiples of 1/8, which every dtype holds exactly.
    """
    leaves = list(arguments)
    for position in differentiable:
        leaves[position] = arguments[position].detach().requires_grad_()
    outputs = as_tuple(function(*leaves))
    found = {f"output {i}" if len(outputs) > 1 else "output": x.detach() for i, x in enumerate(outputs)}
    if differentiable:
        generator = torch.Generator().manual_seed(seed)
        weighed = [x for x in outputs if x.requires_grad]
        weights = [torch.randint(-8, 9, x.shape, generator=generator).to(x) / 8 for x in weighed]
        names = list(inspect.signature(function).parameters)
        wanted = [leaves[i] for i in differentiable]
        gradients = torch.autograd.grad(weighed, wanted, weights, allow_unused=True, materialize_grads=True)
        found |= {f"grad {names[i]}": g for i, g in zip(differentiable, gradients, strict=True)}
    return found


def as_tuple(outputs: Any) -> tuple:
    """What an operator returns, one result or several, as several."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def judge(expected: Tensor, eager: Tensor, found: Tensor, dtype: torch.dtype, implementation: str) -> Row:
    """max_abs_error, eager_error, tolerance and passed of one quantity; `expected` is in float64."""
    if not expected.is_floating_point():
        numbers = {"max_abs_error": _error(found, expected), "eager_error": 0.0, "tolerance": 0.0}
    else:
        finite = eager.isfinite()
        size = float(expected[finite].abs().max()) if finite.any() else 0.0
        ulp = torch.finfo(dtype).eps * size
        eager_error = _error(eager[finite], expected[finite])
        error = _error(found[finite], expected[finite]) if torch.equal(_pattern(found), _pattern(eager)) else math.inf
        allowed = (
            REFERENCE_ULPS * ulp if implementation == "reference" else EAGER_FACTOR * eager_error + FLOOR_ULPS * ulp
        )
        numbers = {"max_abs_error": error, "eager_error": eager_error, "tolerance": allowed}
    return {**numbers, "passed": numbers["max_abs_error"] <= numbers["tolerance"]}


def _error(found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference; inf for another shape."""
    if found.shape != expected.shape:
        return math.inf
    return float((found.double() - expected.double()).abs().max()) if expected.numel() else 0.0


def _pattern(x: Tensor) -> Tensor:
    """0 where x is finite, else which kind it is."""
    return x.masked_fill(x.isfinite(), 0.0).nan_to_num(nan=1.0, posinf=2.0, neginf=3.0)


def converted(x: Any, to: torch.dtype | torch.device) -> Any:
    """`x` on a device, or its floating tensors in a dtype; lists entry by entry."""
    if isinstance(x, list):
        return [converted(entry, to) for entry in x]
    if isinstance(x, Tensor) and (x.is_floating_point() or isinstance(to, torch.device)):
        return x.to(to)
    return x
