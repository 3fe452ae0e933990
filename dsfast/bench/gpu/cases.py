"""What is timed on a GPU: each operator at the sizes that DeepSeek-V3 and the 500K model give it.

Letters as in dsfast.bench.cases. Each size has a smaller one beside it, on which values and gradients are first checked: the
reference in float64 at the full size would take memory or minutes. It is chosen so that the kernels are the ones that are timed,
and not others of the same source: compiled once, and what is timed is what was checked. bfloat16, but for what a model runs in
float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from dsfast import ops
from dsfast.bench import cases
from dsfast.bench.cases import Work
from dsfast.ops.cases import Case
from dsfast.ops.checks import IN_FLOAT32, MATRICES, converted

OPERATORS = {
    "attention": "mla_attention",
    "experts": "moe_experts",
    "head": "linear_cross_entropy",
    "decode": "mla_decode",
    "route": "moe_route",
    "norm": "rms_norm",
    "rope": "rope",
    "adamw": "adamw",
    "muon": "muon",
    "newton_schulz": "newton_schulz",
    "mlp": "swiglu_mlp",
    "embedding": "embedding",
    "project": "mla_project",
    "output": "mla_output",
}
"""Part -> the operator it times."""
IN_16_BITS = ("project", "output")
"""Parts whose kernels take no float32."""

Sizes = dict[str, Any]
_V3_HEAD, _SMALL_HEAD = {"Dn": 128, "Dr": 64, "Dv": 128}, {"Dn": 32, "Dr": 16, "Dv": 32}
MIXED = (4096, 2048, 2048, 1024, 1024, 1024, 1024, 777, 700, 571, 512, 512, 256, 256, 128, 128, 100, 100, 56)
"""Tokens of documents, 16,384 together."""

# part -> name -> (timed, checked)
SIZES: dict[str, dict[str, tuple[Sizes, Sizes]]] = {
    "attention": {
        "V3": ({"N": 16384, "T": 4096, "H": 16, **_V3_HEAD}, {"N": 1024, "T": 512, "H": 16, **_V3_HEAD}),
        "V3 mixed": ({"lengths": MIXED, "H": 16, **_V3_HEAD}, {"lengths": (777, 256, 100, 17, 1), "H": 16, **_V3_HEAD}),
        "500K": ({"N": 8192, "T": 256, "H": 4, **_SMALL_HEAD}, {"N": 1024, "T": 256, "H": 4, **_SMALL_HEAD}),
    },
    "experts": {
        "E128": ({"N": 32768, "D": 2048, "E": 128, "K": 8, "I": 768}, {"N": 4096, "D": 2048, "E": 128, "K": 8, "I": 768}),
        "500K": ({"N": 8192, "D": 128, "E": 2, "K": 1, "I": 64}, {"N": 8192, "D": 128, "E": 2, "K": 1, "I": 64}),
    },
    "head": {
        "V3": ({"N": 2048, "R": 7168, "V": 129280}, {"N": 256, "R": 7168, "V": 16000}),
        "500K": ({"N": 8192, "R": 32, "V": 8000}, {"N": 1024, "R": 32, "V": 8000}),
    },
    "decode": {
        f"V3 H{h}": (
            {"B": 128, "C": 4096, "H": h, "R": 512, **_V3_HEAD}, {"B": b, "C": 1024, "H": h, "R": 512, **_V3_HEAD},
        ) for h, b in ((16, 4), (128, 32))
    } | {
        "V3 H16 paged": (
            {"B": 128, "C": 4096, "H": 16, "R": 512, **_V3_HEAD, "S": 64},
            {"B": 4, "C": 1024, "H": 16, "R": 512, **_V3_HEAD, "S": 64},
        ),
        "500K": ({"B": 256, "C": 256, "H": 4, "R": 32, **_SMALL_HEAD}, {"B": 32, "C": 256, "H": 4, "R": 32, **_SMALL_HEAD}),
    },
    "route": {  # checked on few: a near tie falls either way in float32
        "V3": ({"N": 8192, "E": 256, "K": 8, "G": 8, "kept": 4}, {"N": 128, "E": 256, "K": 8, "G": 8, "kept": 4}),
        "500K": ({"N": 8192, "E": 2, "K": 1, "G": 1, "kept": 1}, {"N": 512, "E": 2, "K": 1, "G": 1, "kept": 1}),
    },
    "norm": {"V3": ({"N": 8192, "D": 7168}, {"N": 512, "D": 7168}), "500K": ({"N": 8192, "D": 128}, {"N": 512, "D": 128})},
    "rope": {
        "V3": ({"N": 8192, "T": 4096, "H": 128, "Dr": 64}, {"N": 256, "T": 4096, "H": 128, "Dr": 64}),
        "500K": ({"N": 8192, "T": 256, "H": 4, "Dr": 16}, {"N": 512, "T": 256, "H": 4, "Dr": 16}),
    },
    "adamw": {name: ({"P": 519_360, "tensors": 21}, {"P": 519_360, "tensors": 21}) for name in ("500K", "500K clip")},
    "muon": {"500K": ({"layers": 2, "D": 128, "I": 64}, {"layers": 2, "D": 128, "I": 64})},
    "newton_schulz": {"500K": ({"shapes": MATRICES}, {"shapes": MATRICES})},
    "mlp": {
        "V3": ({"N": 8192, "D": 7168, "I": 2048}, {"N": 2048, "D": 7168, "I": 2048}),
        "500K": ({"N": 8192, "D": 128, "I": 64}, {"N": 8192, "D": 128, "I": 64}),
    },
    "embedding": {
        "V3": ({"N": 8192, "V": 129280, "R": 7168, "D": 0}, {"N": 512, "V": 32768, "R": 7168, "D": 0}),
        "500K": ({"N": 8192, "V": 8000, "R": 32, "D": 128}, {"N": 1024, "V": 8000, "R": 32, "D": 128}),
    },
    "project": {
        "500K": ({"N": 8192, "D": 128, "R": 32, "H": 4, **_SMALL_HEAD}, {"N": 1024, "D": 128, "R": 32, "H": 4, **_SMALL_HEAD}),
    },
    "output": {"500K": ({"N": 8192, "D": 128, "C": 128}, {"N": 1024, "D": 128, "C": 128})},
}  # fmt: skip

_TINY = {
    "attention": {"N": 32, "T": 16, "H": 2, "Dn": 16, "Dr": 16, "Dv": 16},
    "experts": {"N": 12, "D": 16, "E": 3, "K": 2, "I": 16},
    "head": {"N": 12, "R": 16, "V": 40},
    "decode": {"B": 2, "C": 20, "H": 4, "R": 16, "Dn": 16, "Dr": 16, "Dv": 16},
    "route": {"N": 12, "E": 8, "K": 2, "G": 2, "kept": 1},
    "norm": {"N": 12, "D": 24},
    "rope": {"N": 12, "T": 6, "H": 2, "Dr": 8},
    "adamw": {"P": 50, "tensors": 4},
    "muon": {"layers": 1, "D": 8, "I": 4},
    "newton_schulz": {"M": 2, "R": 5, "C": 7},
    "mlp": {"N": 12, "D": 16, "I": 16},
    "embedding": {"N": 12, "V": 19, "R": 8, "D": 16},
    "project": {"N": 12, "D": 16, "R": 16, "H": 2, "Dn": 16, "Dr": 8, "Dv": 16},
    "output": {"N": 12, "D": 16, "C": 32},
}
TINY: dict[str, dict[str, tuple[Sizes, Sizes]]] = {part: {"tiny": (sizes, sizes)} for part, sizes in _TINY.items()}
"""For a rehearsal without a GPU."""


def identity(outputs: Any) -> Any:
    return outputs


@dataclass(frozen=True)
class GpuCase:
    """`timed` and, smaller, `checked`: what `ours` runs on. canonical: what the results are compared as."""

    part: str
    name: str
    sizes: Sizes
    checked_sizes: Sizes
    timed: Case
    checked: Case
    ours: Callable[..., Any]
    forward: Work
    backward: Work | None
    dtype: torch.dtype
    canonical: Callable[[Any], Any] = identity


def build(part: str, name: str, rehearsal: bool = False) -> GpuCase:
    """The case of SIZES (of TINY in a rehearsal, which is in float32 or float16: the interpreter's bfloat16 is wrong)."""
    sizes, smaller = (TINY if rehearsal else SIZES)[part][name]
    timed, forward, backward = _case(part, name, sizes)
    checked, _, _ = _case(part, name, smaller)
    dtype = torch.float32 if rehearsal or OPERATORS[part] in IN_FLOAT32 else torch.bfloat16
    if rehearsal and part in IN_16_BITS:
        dtype = torch.float16
    case = GpuCase(part, name, sizes, smaller, timed, checked, timed.function, forward, backward, dtype)
    if part == "route":
        return replace(case, canonical=_canonical_route)
    if part == "adamw":
        return replace(case, ours=clip_and_update if name.endswith("clip") else ops.adamw)
    if part == "muon":
        return replace(case, ours=partial(ops.muon, dtype=None if rehearsal else torch.bfloat16))
    return case


def _case(part: str, name: str, sizes: Sizes) -> tuple[Case, Work, Work | None]:
    if "lengths" in sizes:
        return cases.attention(sizes["lengths"], name, *(sizes[letter] for letter in ("H", "Dn", "Dr", "Dv")))
    if "shapes" in sizes:
        return cases.newton_schulz(sizes["shapes"], name)
    if part in IN_16_BITS:
        return (cases.project if part == "project" else cases.output)(name, **sizes)
    bench = cases.build_case(OPERATORS[part], name, sizes)
    return bench.case, bench.forward, bench.backward


def _canonical_route(outputs: tuple) -> tuple:
    """The weights by expert: peers leave the order of the chosen open."""
    weights, indices, counts = outputs[:3]
    return weights.new_zeros(weights.size(0), counts.size(0)).scatter(1, indices, weights), counts


def clip_and_update(params, grads, exp_avgs, exp_avg_sqs, *settings) -> None:
    """The norm, the clip and the update, without waiting for the device; settings as of `ops.adamw` from lrs on."""
    _, scale = ops.grad_clip(grads, 1.0)
    ops.adamw(params, grads, exp_avgs, exp_avg_sqs, *settings[:-1], scale)


def draw(case: Case, device: str, dtype: torch.dtype) -> list:
    """The inputs, drawn on the device (on the host the largest would take many seconds)."""
    with torch.device(device):
        arguments = case.make_inputs(torch.Generator(device).manual_seed(0))
    return [converted(x, dtype) for x in arguments]
