"""What ptxas makes of a kernel is looked at where it is known to be wrong at times, before anyone relies on it.

ptxas 12.8, which triton 3.6 brings, computes the descriptors of some warp groups' products on sm_90 from a uniform register
that it has given no value: the PTX is right, and on an H200 the product is garbage, without a word. Of some 700 kernels of
narrow models of many widths it is eleven; of the same PTX 12.9 makes right code.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from dsfast.triton_kernels.version import numbers

RIGHT = (12, 9)
"""The first ptxas whose code need not be looked at."""
_FILE = "dsfast-sound"
"""Beside a kernel in Triton's cache, where its code has been looked at and is right."""
_sound: set[str | None] = {None}
"""Hashes of kernels of this process; what is interpreted has none."""


class MiscompiledError(RuntimeError):
    """ptxas made wrong code of a kernel; says of which."""


def expect_sound(kernel: Any) -> None:
    """Raise MiscompiledError if the machine code of a compiled kernel, as Triton returns it, is known to be wrong."""
    name = getattr(kernel, "hash", None)
    if name not in _sound:
        _look_at(kernel)
        _sound.add(name)


def _look_at(kernel: Any) -> None:
    if not by_warp_groups(kernel) or (version := _ptxas(kernel.metadata.target.arch)) >= RIGHT:
        return
    from triton.runtime.cache import get_cache_manager

    kept = get_cache_manager(kernel.hash)
    if kept.get_file(_FILE):
        return
    if found := unset(dumped(kernel, "-sass")):
        raise MiscompiledError(
            f"ptxas {'.'.join(map(str, version))} compiles {kernel.metadata.name} wrongly at these sizes ({found[0]} reads"
            " registers that nothing has set)"
        )
    kept.put("", _FILE, binary=False)


def by_warp_groups(kernel: Any) -> bool:
    """Whether a compiled kernel has products of warp groups, which sm_90 alone knows."""
    return "wgmma.mma_async" in kernel.asm.get("ptx", "")


@cache
def _ptxas(arch: int) -> tuple[int, ...]:
    """Its version, the first two numbers."""
    from triton.backends.nvidia.compiler import get_ptxas

    return numbers(get_ptxas(arch).version)


def dumped(kernel: Any, what: str) -> str:
    """What the cuobjdump that Triton ships says of a kernel."""
    import triton

    dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        return subprocess.run([dump, what, cubin.name], check=True, capture_output=True, text=True).stdout


def unset(sass: str) -> tuple[str, ...]:
    """Instructions that read uniform registers before anything has been written to them, of a listing in the order of its text.
    Where a product's operands begin stands in such registers."""
    written, found = set(), []
    for text in re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", sass, re.MULTILINE):
        name, _, operands = re.sub(r"^@!?U?P\w+\s+", "", text).partition(" ")
        first, *others = (operand.strip() for operand in operands.split(","))
        target = re.fullmatch(r"UR(\d+)", first)
        if not _read_uniform(others if target else [first, *others]) <= written:
            found.append(text)
        if target:
            written |= set(range(int(target[1]), int(target[1]) + _uniform_width(name)))
    return tuple(found)


def _read_uniform(operands: list[str]) -> set[int]:
    """Numbers of uniform registers. A descriptor of memory has two, those of a product's operands have two each, one after the
    other, of which the left one's are not read where that operand lies in registers."""
    found = set()
    for place, operand in enumerate(operands):
        for kind, number in re.findall(r"(gdesc\[|desc\[|\b)UR(\d+)", operand):
            left = 0 if kind != "gdesc[" or not re.fullmatch(r"R\d+", operands[place - 1]) or place < 2 else 2
            width = {"gdesc[": 4, "desc[": 2}.get(kind, 1)
            found |= set(range(int(number) + left, int(number) + width))
    return found


def _uniform_width(name: str) -> int:
    """How many registers an instruction writes."""
    return 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name else 1
