"""`bench compile`: every Triton kernel compiled, without a GPU, for each chip that dsfast.triton_kernels.limits names.

What is compiled are the launches that the operators' modules give as examples: those a GPU would run at these sizes. Each is
held to the limits of its chip.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import chain, product
from typing import Any, NamedTuple

import torch

from dsfast import ops
from dsfast.errors import UserError, expect_known
from dsfast.files import Json
from dsfast.ops import triton
from dsfast.triton_kernels.limits import CHIPS, SPILLS

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PROCESSES = 4
"""At most: each holds torch and a compiler."""
FEW = 8
"""So many kernels are compiled before other processes would have started."""


class Example(NamedTuple):
    """One launch of `operator`'s module, compiled for `chip`; `kernel`: its name among the example launches."""

    operator: str
    size: str
    kernel: str
    dtype: str
    chip: str

    def launch(self):
        """The dsfast.triton_kernels.launch.Launch, on the meta device."""
        return kernels_of(self.operator).example_launches(self.size, DTYPES[self.dtype], CHIPS[self.chip].large)[
            self.kernel
        ]


def operators() -> list[str]:
    """The operators that have a Triton kernel, and what else is launched in a training step."""
    names = (*ops.OPERATORS, "after_step", "mla_attention_kept", "mla_output", "mla_project")
    return [name for name in names if importlib.util.find_spec(f"dsfast.triton_kernels.{name}")]


def kernels_of(operator: str):
    """The module with its Triton kernels."""
    return importlib.import_module(f"dsfast.triton_kernels.{operator}")


def examples(
    names: Sequence[str], chips: Sequence[str], dtypes: Sequence[str], wanted: Callable[[str], bool]
) -> list[Example]:
    """Every example launch of the operators `names` at the sizes that `wanted` says yes to, each on the chips that have it:
    whether a sum is split, and with it the launch that adds up, depends on the tiles."""
    found = []
    for operator in names:
        for size, dtype in product(filter(wanted, kernels_of(operator).EXAMPLES), dtypes):
            tables = {CHIPS[chip].large for chip in chips}
            launches = {
                large: kernels_of(operator).example_launches(size, DTYPES[dtype], large) for large in sorted(tables)
            }
            for kernel in dict.fromkeys(chain.from_iterable(launches.values())):
                on = (chip for chip in chips if kernel in launches[CHIPS[chip].large])
                found += [Example(operator, size, kernel, dtype, chip) for chip in on]
    return found


def plan(
    names: Sequence[str], chips: Sequence[str] | None, dtypes: Sequence[str], sizes: Sequence[str] | None
) -> list[Example]:
    """What to compile; no names: all operators, None: all chips or sizes.

    Raises UserError for a name that is not known, and where triton cannot compile here.
    """
    if reason := triton.missing():
        raise UserError(f"bench compile: {reason}")
    if triton.INTERPRETED:
        raise UserError("bench compile: TRITON_INTERPRET is set, and Triton then compiles nothing; unset it")
    known = operators()
    names = _among("operator", names or known, known)
    found = [size for operator in names for size in kernels_of(operator).EXAMPLES]
    sizes = _among("size", found if sizes is None else sizes, dict.fromkeys(found))
    chips = _among("chip", CHIPS if chips is None else chips, CHIPS)
    dtypes = _among("dtype", dtypes, DTYPES)
    planned = examples(names, chips, dtypes, sizes.__contains__)
    if not planned:
        raise UserError(
            f"bench compile: no kernel of {', '.join(names)} in {', '.join(dtypes)} at these sizes on these chips"
        )
    return planned


def _among(what: str, names, known) -> list[str]:
    expect_known(what, names, known, "bench compile: ")
    return list(dict.fromkeys(names))


def run_compile(planned: Sequence[Example], progress: Callable[[str], None]) -> Json:
    """Compile `planned` (from `plan`); `progress` is told what is done.

    Returns `limits` (chip -> what one program may take there), `spills` (backend -> bytes of an element -> bytes of registers
    that a thread may keep in memory) and `kernels`, a row as `compile_example` returns for each.
    """
    rows = []
    for example, row in zip(planned, _compiled(planned), strict=True):
        rows.append(row)
        if example.chip == planned[-1].chip:
            progress(
                f"{len(rows)} of {len(planned)}: {example.operator} {example.size} {example.kernel} {example.dtype}"
            )
    limits = {name: chip._asdict() for name, chip in CHIPS.items()}
    return {"limits": limits, "spills": SPILLS, "kernels": rows}


def _compiled(planned: Sequence[Example]) -> Iterator[Json]:
    processes = min(PROCESSES, os.cpu_count() or 1)
    if len(planned) <= FEW or processes == 1:
        yield from map(compile_example, planned)
        return
    # spawn: torch's threads do not survive a fork. Ctrl-C is this process's to answer, which ends the others.
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        yield from pool.imap(compile_example, planned)


def compile_example(example: Example) -> Json:
    """The fields of `example`, those of dsfast.triton_kernels.ahead.Compiled if it compiles, and `faults`, limits it breaks."""
    compiled, faults = compile_named(example.launch(), example.chip, example.kernel)
    return {**(asdict(compiled) if compiled else {}), **example._asdict(), "faults": faults}


def compile_named(launch, chip: str, name: str) -> tuple[Any, list[str]]:
    """What `launch`, called `name`, takes of `chip` (dsfast.triton_kernels.ahead.Compiled; None if it does not compile), and
    its faults."""
    from dsfast.triton_kernels.ahead import compile_launch  # triton is not installed everywhere

    try:
        with triton.kept_kernels():
            compiled = replace(compile_launch(launch, chip), kernel=name)
    except Exception as error:  # a compiler fails in many ways; the other kernels are still to be seen
        lines = str(error).strip().splitlines() or [""]
        return None, [f"{name} on {chip}: does not compile: {type(error).__name__}: {lines[-1]}"]
    return compiled, compiled.faults(launch)
