"""Compiles a launch for a chip that is not here and reads off what it takes of it: registers, shared memory, instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from dsfast.triton_kernels.launch import Launch
from dsfast.triton_kernels.limits import CHIPS, SPILLS
from dsfast.triton_kernels.ptxas import right_ptxas
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

_POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64",
    torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """What one kernel takes on one chip."""

    kernel: str
    chip: str
    registers: int  # of a thread
    spills: int  # bytes of registers that a thread keeps in memory
    shared: int  # bytes of a program
    matrix: int  # instructions of the matrix units
    copies: int | None  # asynchronous copies into shared memory; None where the assembly does not tell
    repeated: float | None  # matrix work of the warp groups over that of the source's products; None without
    serialized: bool | None  # whether each of these instructions waits for the one before it; None without them
    unset: tuple[str, ...]  # instructions that read uniform registers which nothing has set; () without them

    def faults(self, launch: Launch) -> list[str]:
        """How it breaks the limits of its chip (dsfast.triton_kernels.limits); empty if it keeps them."""
        chip, itemsize = CHIPS[self.chip], launch.itemsize
        found = []
        if self.spills > (most := SPILLS[chip.backend][itemsize]):
            found.append(f"{self.spills} bytes of registers spilled, at most {most} may be")
        if self.shared > chip.shared:
            found.append(f"{self.shared} bytes of shared memory, {chip.shared} are there")
        if itemsize == 2 and launch.rows >= chip.matrix_rows and not self.matrix:
            found.append(f"no {chip.matrix} for tiles of {launch.rows} rows")
        if self.copies == 0 and launch.options["num_stages"] > 1:
            found.append("the loop is not pipelined: no asynchronous copies")
        if (self.repeated or 1) > 1:
            found.append(f"products are computed {self.repeated:g} times")
        if self.serialized:
            found.append("each matrix instruction waits for the one before it (ptxas calls them serialized)")
        found += [f"ptxas has left out what sets a register: {instruction}" for instruction in self.unset]
        return [f"{self.kernel} on {self.chip}: {fault}" for fault in found]


def compiled_kernel(launch: Launch, chip: str) -> triton.compiler.CompiledKernel:
    """Compile `launch`, whose tensors may lie on the meta device, for `chip` (a name in limits.CHIPS)."""
    target = CHIPS[chip]
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    with right_ptxas(target.arch) if target.backend == "cuda" else nullcontext():
        return triton.compile(_source(launch), target=gpu, options=launch.options)


def compile_launch(launch: Launch, chip: str) -> Compiled:
    """What `launch` takes of `chip`, arguments as of `compiled_kernel`."""
    target, kernel = CHIPS[chip], compiled_kernel(launch, chip)
    assembly = kernel.asm[target.stage]
    cuda = target.backend == "cuda"
    registers, spills = (_read_cuda if cuda else _read_hip)(kernel)
    copies = len(re.findall(r"\bcp\.async\.c[ag]\b", assembly)) if cuda else None
    groups = "wgmma.mma_async" in kernel.asm.get("ptx", "")
    return Compiled(
        launch.kernel.__name__, chip, registers, spills, kernel.metadata.shared, assembly.count(target.matrix), copies,
        _repeated(kernel, launch.options["num_warps"]) if groups else None, _serialized(kernel, target.arch) if groups else None,
        unset(_dumped(kernel, "-sass")) if groups else (),
    )  # fmt: skip


def unset(sass: str) -> tuple[str, ...]:
    """Instructions that read uniform registers before anything has been written to them, of a listing in the order of its text.
    Where a product's operands begin stands in such registers."""
    written, found = set(), []
    for text in re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", sass, re.MULTILINE):
        name, _, operands = re.sub(r"^@!?U?P\w+\s+", "", text).partition(" ")
        if name.startswith("ULOP3"):  # may set a predicate as well, which stands first
            operands = re.sub(r"^\s*UP\w+,", "", operands)
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


def _serialized(kernel, arch: int) -> bool:
    """As in Compiled. ptxas says so when it assembles; Triton asks it too, but keeps what it says to itself."""
    with right_ptxas(arch), tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(kernel.asm["ptx"])
        command = [get_ptxas(arch).path, f"--gpu-name=sm_{arch}a", ptx, "-o", ptx.with_suffix(".cubin")]
        return "serialized" in subprocess.run(command, check=True, capture_output=True, text=True).stderr


def _repeated(kernel, warps: int) -> float:
    """As in Compiled. Of 64 rows, a product's layout may give all to each of two warp groups: nothing else tells of it.

    Loops count once in both; an instruction of sm_90's has its sizes in its name and is every warp group's.
    """
    sizes = re.findall(r"\bwgmma\.mma_async\S*\.m(\d+)n(\d+)k(\d+)\b", kernel.asm["ptx"])
    products = re.findall(r"tt\.dot .*tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x", kernel.asm["ttir"])
    done, wanted = (sum(int(a) * int(b) * int(c) for a, b, c in found) for found in (sizes, products))
    return done * (warps // 4) / wanted


def _source(launch: Launch) -> ASTSource:
    """The arguments' types as a call would specialise them: None and an integer 1 are constants, multiples of 16 are marked."""
    kernel = launch.kernel
    constants = {p.name for p in kernel.params if p.is_constexpr}
    general = {p.name for p in kernel.params if p.do_not_specialize}
    signature, constexprs, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        value = launch.arguments[name]
        one = type(value) is int and value == 1 and name not in general
        if name in constants or value is None or one:
            signature[name], constexprs[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32" if -(2**31) <= value < 2**31 else "i64"
        place = value.data_ptr() if isinstance(value, Tensor) else value  # 0 on the meta device
        aligned = type(place) is int and place % 16 == 0
        if aligned and signature[name] != "constexpr" and name not in general:
            attributes[position,] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs, attributes)


def _read_cuda(kernel) -> tuple[int, int]:
    """(registers, spilled bytes)."""
    usage = _dumped(kernel, "-res-usage")
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _dumped(kernel, what: str) -> str:
    """What the cuobjdump that Triton ships says of a kernel."""
    dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        return subprocess.run([dump, what, cubin.name], check=True, capture_output=True, text=True).stdout


def _read_hip(kernel) -> tuple[int, int]:
    """(registers, spilled bytes) by the assembler's own notes."""
    fields = re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", kernel.asm["amdgcn"])
    found = {key: int(value) for key, value in fields}
    return found["vgpr_count"], found["private_segment_fixed_size"]
