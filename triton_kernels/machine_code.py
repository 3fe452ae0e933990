"""The machine code of a compiled kernel, looked at for what ptxas has been seen to leave out (dsfast.triton_kernels.ptxas)."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any


def by_warp_groups(kernel: Any) -> bool:
    """Whether a compiled kernel has products of warp groups, which sm_90 alone knows."""
    return "wgmma.mma_async" in kernel.asm.get("ptx", "")


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
