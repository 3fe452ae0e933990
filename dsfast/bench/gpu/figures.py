"""The figures that the kernels are to show on an H200, and what a run says to each. A stretch is wished for, the rest asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from dsfast.files import Json

Rows = dict[tuple[str, str], Json]
"""(part, case) -> row."""

NOT_MEASURED = "not measured"
OUT_OF_TIME = f"{NOT_MEASURED}: out of time"


class Number(NamedTuple):
    """`of(rows)`: None where the run has not measured it; and which pass of which case it is of."""

    of: Callable[[Rows], float | None]
    part: str = ""
    case: str = ""
    run: str = ""


@dataclass(frozen=True)
class Figure:
    """least, stretch: bounds on the number, from below unless `at_most`."""

    what: str
    unit: str
    least: float | None
    stretch: float | None
    number: Number
    at_most: bool = False


def figures(rows: list[Json]) -> list[Json]:
    """what, unit, asked, stretch, got (None: not measured), met ("yes", "no", "stretch" or "not measured") of each figure, and
    bound_seconds, the shortest time that the run's bounds allow the pass it is of, with the share of it that was reached,
    bound_share; None where there is none."""
    by_case = {(row["part"], row["case"]): row for row in rows if "passes" in row}
    return [_judged(figure, figure.number.of(by_case)) | _bound(figure, by_case) for figure in FIGURES]


def _bound(figure: Figure, rows: Rows) -> Json:
    _, part, case, run = figure.number
    timed = rows.get((part, case), {}).get("passes", {}).get(run, {})
    return {
        "bound_seconds": timed.get("ideal_seconds"),
        "bound_share": timed.get("variants", {}).get("dsfast", {}).get("bound_share"),
    }


def _judged(figure: Figure, got: float | None) -> Json:
    sign = "<=" if figure.at_most else ">="
    words = {
        name: "" if bound is None else f"{sign} {bound:g} {figure.unit}".rstrip()
        for name, bound in (("asked", figure.least), ("stretch", figure.stretch))
    }
    return {"what": figure.what, "unit": figure.unit, **words, "got": got, "met": _met(figure, got)}


def _met(figure: Figure, got: float | None) -> str:
    if got is None:
        return NOT_MEASURED

    def within(bound: float | None) -> bool:
        return bound is not None and (got <= bound if figure.at_most else got >= bound)

    if within(figure.stretch):
        return "stretch"
    return "yes" if within(figure.least) else "no"


def _variant(rows: Rows, part: str, case: str, run: str, name: str) -> Json:
    """An empty one where it was not timed."""
    return rows.get((part, case), {}).get("passes", {}).get(run, {}).get("variants", {}).get(name, {})


def _over(part: str, case: str, run: str, *names: str) -> Number:
    """How many times as fast dsfast is as the fastest of `names`."""

    def value(rows: Rows) -> float | None:
        found = [_variant(rows, part, case, run, name).get("over_dsfast") for name in names]
        return min((ratio for ratio in found if ratio is not None), default=None)

    return Number(value, part, case, run)


def _ours(part: str, case: str, run: str, key: str, scale: float = 1.0) -> Number:
    def value(rows: Rows) -> float | None:
        found = _variant(rows, part, case, run, "dsfast").get(key)
        return None if found is None else found * scale

    return Number(value, part, case, run)


def _seconds(part: str, case: str, run: str, scale: float) -> Number:
    """dsfast's time; that in a CUDA graph, without the overhead of launching, where it was measured."""

    def value(rows: Rows) -> float | None:
        found = _variant(rows, part, case, run, "dsfast")
        seconds = found.get("graph_seconds") or found.get("seconds", {}).get("median")
        return None if seconds is None else seconds * scale

    return Number(value, part, case, run)


def _ratio(part: str, case: str, run: str, key: str, other: str) -> Number:
    """`key` of dsfast in `case` over that in `other`."""

    def value(rows: Rows) -> float | None:
        ours, theirs = (_ours(part, name, run, key).of(rows) for name in (case, other))
        return ours / theirs if ours and theirs else None

    return Number(value, part, case, run)


def _overlapping(rows: Rows) -> float | None:
    """Seeds whose recalls on the GPU and on the CPU are the same within noise."""
    found = [row["overlap"] for (part, _), row in rows.items() if part == "recall" and row["overlap"] is not None]
    return float(sum(found)) if found else None


_BOTH = "forward+backward"
_SDPA = ("SDPA flash", "SDPA efficient", "SDPA cudnn", "SDPA math")
_GROUPED = ("grouped_mm", "compile", "transformers")
_H16, _H128 = (("decode", f"V3 H{heads}", "forward") for heads in (16, 128))
_ROUTE = ("route", "V3", "forward")
_STEP, _COMPILED = ((part, "32 x 256", "step") for part in ("step", "compiled"))
_MIXED_OVER_DENSE = _ratio("attention", "V3 mixed", _BOTH, "flops_per_second", "V3")
FIGURES = (
    Figure("mla_attention 192/128 over FlexAttention", "x", 1.2, 1.5, _over("attention", "V3", _BOTH, "FlexAttention")),
    Figure("mla_attention 192/128 over the fastest SDPA", "x", 0.9, 1.2, _over("attention", "V3", _BOTH, *_SDPA)),
    Figure("documents of mixed length, rate over dense", "x", 0.9, 1.0, _MIXED_OVER_DENSE),
    Figure("mla_decode B128 S4096, 16 heads", "TB/s", 3.2, 3.8, _ours(*_H16, "bytes_per_second", 1e-12)),
    Figure("mla_decode B128 S4096, 128 heads", "TFLOP/s", 350, 500, _ours(*_H128, "flops_per_second", 1e-12)),
    Figure("moe_route with permutation over transformers", "x", 10, None, _over(*_ROUTE, "transformers")),
    Figure("moe_route 8192 x 256, permutation", "us", 20, 12, _seconds(*_ROUTE, 1e6), at_most=True),
    Figure("moe_experts E128 over the fastest by torch._grouped_mm", "x", 1.2, 1.6, _over("experts", "E128", _BOTH, *_GROUPED)),
    Figure("moe_experts E128 over liger", "x", 1.2, 1.6, _over("experts", "E128", _BOTH, "liger")),
    Figure("linear_cross_entropy V129280 over eager chunked", "x", 1.1, None, _over("head", "V3", _BOTH, "eager chunked")),
    Figure("linear_cross_entropy V129280 over liger", "x", 6, None, _over("head", "V3", _BOTH, "liger")),
    Figure("linear_cross_entropy V129280", "ms", None, 15.12, _seconds("head", "V3", _BOTH, 1e3), at_most=True),
    Figure("rms_norm, share of copy bandwidth", "%", 85, 95, _ours("norm", "V3", "forward", "bound_share", 100)),
    Figure("rms_norm with backward, share of copy bandwidth", "%", 85, 95, _ours("norm", "V3", _BOTH, "bound_share", 100)),
    Figure("rope, share of copy bandwidth", "%", 85, 95, _ours("rope", "V3", "forward", "bound_share", 100)),
    Figure("rope with backward, share of copy bandwidth", "%", 85, 95, _ours("rope", "V3", _BOTH, "bound_share", 100)),
    Figure("adamw 500K with the factor, launches", "", 1, None, _ours("adamw", "500K", "update", "launches"), at_most=True),
    Figure("adamw 500K with the norm, launches", "", 1, None, _ours("adamw", "500K clip", "update", "launches"), at_most=True),
    Figure("adamw 500K with the clip's factor", "us", None, 6, _seconds("adamw", "500K", "update", 1e6), at_most=True),
    Figure("adamw 500K with the norm as well", "us", None, 6, _seconds("adamw", "500K clip", "update", 1e6), at_most=True),
    Figure("training step 32 x 256", "ms", 0.30, 0.20, _seconds(*_STEP, 1e3), at_most=True),
    Figure("training step over PyTorch eager", "x", 20, None, _over(*_STEP, "eager")),
    Figure("training step over compiled, CUDA graphs", "x", 2, None, _over(*_COMPILED, "reduce-overhead")),
    Figure("training, 200 steps", "s", 0.1, None, _seconds("training", "warm", "training", 1), at_most=True),
    Figure("training, whole process, empty caches", "s", 20, None, _seconds("training", "cold", "process", 1), at_most=True),
    Figure("training, whole process, warm caches", "s", 6, None, _seconds("training", "warm", "process", 1), at_most=True),
    Figure("training over dsfast on the CPU", "x", 50, None, _ratio("training", "warm", "training", "tokens_per_second", "CPU")),
    Figure("recall as on the CPU, seeds", "of 5", 5, None, Number(_overlapping)),
    Figure("training, memory of the GPU", "GB", 1, None, _ours("training", "warm", "training", "memory_gb"), at_most=True),
    Figure("generation, one stream", "tokens/s", 5000, None, _ours("generate", "batch 1", "64 tokens", "tokens_per_second")),
    Figure("generation, batch 256", "tokens/s", 500000, None, _ours("generate", "batch 256", "64 tokens", "tokens_per_second")),
)  # fmt: skip
