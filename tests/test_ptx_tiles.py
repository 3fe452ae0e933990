"""The tiles that large models' widths take, with few tokens, as Triton compiles them for NVIDIA GPUs, on tests/ptx_machine.py:
the operators are right by them, and those of every size that `bench compile` compiles are among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from operator_cases import assert_passed
from triton_contract import INTERPRETED, ON_THE_MACHINE, pass_in_a_process, poisoned

from dsfast import ops
from dsfast.config import OPERATORS
from dsfast.ops import cases
from dsfast.ops.cases import Case
from dsfast.ops.checks import compare

LENGTHS = (70, 150, 40)
FEW_SPLITS, MORE_SPLITS = (8,), (8, 16, 200)
FIXED = {"adamw", "muon"}
"""Operators whose kernels take blocks of one size, whatever the tensors' sizes."""

BY_COUNTS = {"sum_kernel"}
"""Kernels whose blocks follow from how much there is to add up; tests/test_triton_pieces.py has theirs."""

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Few(NamedTuple):
    """A case with few tokens, run with `changes`, by "module.name", to what dsfast.triton_kernels decides by: that it decides as
    it does for many."""

    case: Case
    changes: Mapping[str, Any] = NOTHING


def attention(name, dn, dr, dv, heads_of_keys) -> Iterator[Few]:
    yield Few(_attended(name, dn, dr, dv, heads_of_keys), {"mla_attention_kept.KEPT": 0})


def attention_kept(*size) -> Iterator[Few]:
    yield Few(_attended(*size))


def _attended(name, dn, dr, dv, heads_of_keys) -> Case:
    return cases.mla_attention_case(name, LENGTHS, 2, dn, dr, dv, 1 if heads_of_keys < 16 else 2)


def decoding(name, b, c, h, widths, page) -> Iterator[Few]:
    yield Few(cases.mla_decode_case(f"{name}, contiguous", (130, 0, 1, 64), 192, h, *widths), _in_splits(1))
    paged = cases.mla_decode_case(f"{name}, paged", (37, 0, 300), 512, h, *widths, page=page)
    for splits in FEW_SPLITS if b >= 32 else MORE_SPLITS:
        yield Few(paged, _in_splits(splits))


def _in_splits(n: int) -> dict[str, Any]:
    return {"mla_decode._splits": lambda *_: n}


def routing(name, n, e, k, *choice) -> Iterator[Few]:
    from dsfast.triton_kernels.moe_route import OF_TOKENS, SUMMED

    yield Few(cases.moe_route_case(name, min(n, 600), e, k, *choice))
    for summed in (SUMMED, 0):  # counts that need no kernel of their own to be summed
        yield Few(cases.moe_experts_case(f"{name}, of indices", 300, 4, k, e, 4), {"moe_route.SUMMED": summed})
    if name in OF_TOKENS:
        yield Few(cases.route_tokens_case(f"{name}, from tokens", 150, OF_TOKENS[name], e, k, *choice))


def experts(name, n, d, k, e, i) -> Iterator[Few]:
    """As many places of an expert as make tiles as large."""
    each, e = (23, min(e, 6)) if n * k < 24 * e else (257, min(e, 3))
    places, k = min(n * k, each * e), min(k, 2)
    yield from _as_on_chips(cases.moe_experts_case(name, places // k, min(d, 512), k, e, min(i, 512)), n * k)


def mlp(name, n, d, i) -> Iterator[Few]:
    yield from _as_on_chips(cases.swiglu_mlp_case(name, 300, min(d, 512), min(i, 512)), n)


def _as_on_chips(case: Case, places: int) -> Iterator[Few]:
    """On one that few tokens fill as many would, and where only the largest matrices do."""
    from dsfast.triton_kernels.moe_experts import FULL, MULTIPROCESSORS

    processors = {"moe_experts.MULTIPROCESSORS": MULTIPROCESSORS if places <= 64 * MULTIPROCESSORS else 1}
    for full in (4, FULL):
        yield Few(case, processors | {"moe_experts.FULL": full})


def head(name, n, r, v, d) -> Iterator[Few]:
    if r > 1024:
        wide = cases.linear_cross_entropy_case(name, 30, r, 9000)
        for workspace in (2**30, 2**14):  # logits are kept, or come by chunks
            yield from _with_and_without_gradients(wide, {"linear_cross_entropy.WORKSPACE": workspace})
        return
    for words in (1000, 60):  # many parts of the words' sum, or two at most
        yield from _with_and_without_gradients(cases.linear_cross_entropy_case(name, 200, r, words, d=d))


def _with_and_without_gradients(case: Case, changes: Mapping[str, Any] = NOTHING) -> Iterator[Few]:
    yield Few(case, changes)
    yield Few(replace(case, name=f"{case.name}, without gradients", differentiable=()), changes)


def embedding(name, n, v, r, d) -> Iterator[Few]:
    for most in (4096, 0):  # tokens that are sorted in one launch
        yield Few(cases.embedding_case(name, 100, 300, r, d), {"embedding.MOST_COMPARED": most})
    if d:
        yield Few(cases.tied_embedding_case(f"{name}, tied", 100, 300, r, d))


def norm(name, n, d) -> Iterator[Few]:
    for rows in (5, 90):  # the programs of a gradient have a tile each, or several
        for residual in (True, False):
            yield Few(cases.rms_norm_case(name, rows, d, residual))
        for uses in (2, 3):
            yield Few(cases.stream_norm_case(f"{name}, {uses} uses", rows, d, uses))


def turning(name, n, h, dr, dq, dk) -> Iterator[Few]:
    yield Few(cases.rope_case(name, 20, h, dr, 11))
    yield Few(cases.split_and_turn_case(name, 20, h, dq, dk, dr, 11))


def iterating(name, *shapes) -> Iterator[Few]:
    yield Few(cases.newton_schulz_case(name, *shapes))


def projecting(name, n, *widths) -> Iterator[Few]:
    for residual in (True, False):
        yield Few(cases.mla_project_case(name, 90, *widths, residual=residual))


def output(name, n, d, c) -> Iterator[Few]:
    for uses in (1, 2, 3):
        yield Few(cases.mla_output_case(f"{name}, {uses} uses", 90, d, c, uses))


FEW: dict[str, Callable[..., Iterator[Few]]] = {
    "rms_norm": norm,
    "rope": turning,
    "embedding": embedding,
    "mla_attention": attention,
    "mla_attention_kept": attention_kept,
    "mla_decode": decoding,
    "moe_route": routing,
    "moe_experts": experts,
    "swiglu_mlp": mlp,
    "linear_cross_entropy": head,
    "newton_schulz": iterating,
    "mla_project": projecting,
    "mla_output": output,
}
"""Of each module of dsfast.triton_kernels: what one of its EXAMPLES is with few tokens."""


def tiling(launch) -> tuple:
    """A Launch's kernel, and its constants that are blocks of the tiles or say what it is to do."""
    kernel = launch.kernel.fn.__name__
    fixed = {p.name: launch.arguments[p.name] for p in launch.kernel.params if p.is_constexpr}
    tiles = {name: x for name, x in fixed.items() if isinstance(x, bool) or name.startswith("B")}
    return kernel, *sorted(tiles.items()), *(launch.options[name] for name in ("num_warps", "num_stages"))


def dtype_of(case: Case) -> torch.dtype:
    """bfloat16, in which these models are trained; scores of experts are in float32."""
    return torch.float32 if case.function is ops.moe_route else torch.bfloat16


@pytest.mark.skipif(not ON_THE_MACHINE, reason="this runs in the process of the machine")
@pytest.mark.parametrize("module", FEW)
def test_right_and_all(module, monkeypatch):
    from dsfast.triton_kernels.launch import INTERPRETED_AS, Launch

    launched, run = set(), Launch.run

    def noted(launch) -> None:
        launched.add(tiling(launch))
        run(launch)

    monkeypatch.setattr(Launch, "run", noted)
    kernels = import_module(f"dsfast.triton_kernels.{module}")
    wanted = set()
    for size, numbers in kernels.EXAMPLES.items():
        for few in FEW[module](size, *numbers):
            with ExitStack() as stack:
                for name, value in few.changes.items():
                    stack.enter_context(mock.patch(f"dsfast.triton_kernels.{name}", value))
                with poisoned():
                    assert_passed(compare(few.case, ["triton"], "cpu", dtype_of(few.case)))
        wanted |= set(map(tiling, kernels.example_launches(size, torch.bfloat16, INTERPRETED_AS).values()))
    missing = sorted(str(x) for x in wanted - launched if x[0] not in BY_COUNTS)
    assert not missing, "\n".join(missing)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is what starts the process")
@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
@pytest.mark.parametrize("module", FEW)
def test_on_the_machine(module, chip):
    machine = {"DSFAST_PTX_MACHINE": "1", "DSFAST_INTERPRETED_CHIP": chip}
    pass_in_a_process(f"{__file__}::test_right_and_all[{module}]", **machine)


def test_every_operator_is_here():
    assert set(OPERATORS) - FIXED <= set(FEW)
