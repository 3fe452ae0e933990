"""`bench kernels`: every operator, forward and forward + backward, its implementations beside each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch

from dsfast import ops
from dsfast.bench.cases import UPDATES, BenchCase, Work, build_case
from dsfast.bench.ceilings import Ceilings, measure_ceilings
from dsfast.bench.timing import Call, Spread, compare, gradients_call
from dsfast.files import Json
from dsfast.ops import checks, native
from dsfast.ops.checks import ROUNDED

EAGER_TOLERANCE = 1e-3
"""Of the largest value. Eager may not compute something else, but it may round: torch's float32 norm of 10^7 numbers is
off by 3e-4."""


def run_kernels(names: Iterable[str], sizes: Iterable[str], repeats: int, progress: Callable[[str], None]) -> Json:
    """Check and time the operators `names` at `sizes`; `progress` is told what comes next.

    Returns `ceilings` and `cases`, a list of what `run_case` returns. Freed memory stays with the process from here on, as
    in training: the alternative is to time the kernel's page faults. Eager gains from it as well.
    """
    module, _ = native.status()
    if module is not None:
        module.keep_freed_memory()
    progress("ceilings")
    ceilings = measure_ceilings()
    rows = []
    for name in names:
        for size in sizes:
            progress(f"{name} {size}")
            rows.append(run_case(build_case(name, size), ceilings, repeats))
    return {"ceilings": asdict(ceilings), "cases": rows}


def run_case(bench: BenchCase, ceilings: Ceilings, repeats: int) -> Json:
    """`operator`, `size`, `sizes`, `checks` (implementation -> what is wrong, or ""), and `passes`, timed, of those right.

    An implementation that is missing or wrong is named under `checks` and not timed.
    """
    arguments = bench.case.make_inputs(torch.Generator().manual_seed(0))
    found = check_case(bench, arguments)
    variants = {name: call for name, call in _variants(bench).items() if not found[name]}
    row = {
        "operator": bench.case.operator,
        "size": bench.case.name,
        "sizes": bench.sizes,
        "checks": found,
        "passes": {},
    }
    if not {"eager"} < variants.keys():  # nothing to compare
        return row
    if bench.backward is None:
        passes = {"update" if bench.case.operator in UPDATES else "forward": (bench.forward, _forward)}
    else:
        both = (bench.forward + bench.backward, _forward_backward)
        passes = {"forward": (bench.forward, _forward), "forward+backward": both}
    for name, (work, prepare) in passes.items():
        calls = {variant: prepare(call, bench, arguments) for variant, call in variants.items()}
        if ROUNDED in calls:  # the backward pass too, which runs when the operator has returned
            calls[ROUNDED] = native.products_in(torch.bfloat16)(calls[ROUNDED])
        row["passes"][name] = _timed(calls, work, ceilings, repeats)
    return row


def has_rounded(operator: str) -> bool:
    """Whether ROUNDED is another implementation of the operator here."""
    return operator in native.OF_PRODUCTS and native.fast_bfloat16()


def check_case(bench: BenchCase, arguments: tuple) -> dict[str, str]:
    """Implementation -> what is wrong with it, "" if nothing. Values and gradients are held against the reference."""
    case = bench.case
    module, reason = native.status()
    ours = ("reference",) if module is None else ("native", "reference")
    rows = checks.check(case.operator, case.function, arguments, case.differentiable, ours, case=case.name)
    if has_rounded(case.operator):
        rows += checks.check_draws(
            case.operator, case.function, [arguments], case.differentiable, ["native"], products=torch.bfloat16
        )
    found = dict.fromkeys((row["implementation"] for row in rows), "")
    found |= {} if module else {"native": f"not available: {reason}"}
    for row in rows:
        if not row["passed"] and not found[row["implementation"]]:
            found[row["implementation"]] = checks.in_words(row)
    with ops.use("reference", case.operator):
        expected = checks.evaluate(case.function, arguments, case.differentiable)
    eager = checks.evaluate(bench.eager_result, arguments, case.differentiable)
    found["eager"] = checks.difference(eager, expected, EAGER_TOLERANCE)
    return found


def _variants(bench: BenchCase) -> dict[str, Callable[..., Any]]:
    """Implementation -> the function to time."""
    names = ("native", "reference") if native.status()[0] else ("reference",)
    variants = {name: _bound(name, bench.ours) for name in names}
    if has_rounded(bench.case.operator):
        variants[ROUNDED] = variants["native"]
    return {**variants, "eager": bench.eager}


def _bound(implementation: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with that implementation; selecting it takes a few microseconds of every time."""

    def run(*arguments):
        with ops.use(implementation):
            return function(*arguments)

    return run


def _forward(function: Callable[..., Any], bench: BenchCase, arguments: tuple) -> Call:
    return torch.no_grad()(lambda: function(*arguments))


def _forward_backward(function: Callable[..., Any], bench: BenchCase, arguments: tuple) -> Call:
    """The call that also computes the gradient of every differentiable argument, from gradients given for the results."""
    inputs = list(arguments)
    for position in bench.case.differentiable:
        inputs[position] = arguments[position].detach().requires_grad_()
    leaves = [inputs[position] for position in bench.case.differentiable]

    return gradients_call(lambda: function(*inputs), leaves)


def _timed(calls: dict[str, Call], work: Work, ceilings: Ceilings, repeats: int) -> Json:
    """The work, and for each implementation its time and what follows from it; eager takes turns with each other one."""
    others = {name: call for name, call in calls.items() if name != "eager"}
    pairs = compare(calls["eager"], others, repeats)
    dtypes = {ROUNDED: torch.bfloat16}
    figures = {
        name: _figures(pair.other, work, ceilings, dtypes.get(name, torch.float32)) for name, pair in pairs.items()
    }
    for name, pair in pairs.items():
        figures[name] |= {
            "speedup_of_medians": 1 / pair.ratio_of_medians,
            "speedup_median_of_pairs": 1 / pair.median_of_ratios,
        }
    figures["eager"] = _figures(next(iter(pairs.values())).first, work, ceilings, torch.float32)
    return {"flops": work.flops, "bytes": work.bytes, "implementations": figures}


def _figures(taken: Spread, work: Work, ceilings: Ceilings, dtype: torch.dtype) -> Json:
    """`ceiling_share`: the time the ceilings allow, products in `dtype`, over the median; above 1 where the work stays in the
    caches."""
    return {
        "seconds": asdict(taken),
        "flops_per_second": work.flops / taken.median,
        "bytes_per_second": work.bytes / taken.median,
        "ceiling_share": ceilings.ideal_seconds(work.flops, work.bytes, dtype) / taken.median,
    }
