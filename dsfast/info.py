"""`python -m dsfast.info [--json]`: this machine, what is built on it, and which kernels run and why."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dsfast import ops
from dsfast.command import CommandParser, run_command
from dsfast.errors import first_line
from dsfast.files import cache_folder
from dsfast.ops import native, triton

_PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "rich", "triton", "transformers", "liger_kernel")
ROOT = Path(__file__).parents[1]


def machine() -> dict[str, Any]:
    """The processor, the memory in GB, the threads torch takes, the GPU (None where there is none)."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": _gpu(),
    }


def versions() -> dict[str, str | None]:
    """Python, dsfast and the packages it stands on; None for one that is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in ("dsfast", *_PACKAGES)}}


def native_build() -> dict[str, Any]:
    """The compiled CPU module: whether it is used and why (not), the instruction sets in it, and what bfloat16 is worth here."""
    module, reason = native.status()
    return {
        "available": module is not None,
        "reason": reason,
        "compiled": list(module.compiled) if module else [],
        "supported_here": list(module.supported) if module else [],
        "runs": module.isa if module else None,
        "bfloat16": _bfloat16(module),
    }


def _bfloat16(module: ModuleType | None) -> str:
    if not hasattr(module, "bfloat16"):
        return "none"
    return "fast" if native.fast_bfloat16() else "slower than float32"


def caches() -> dict[str, str]:
    """The folders of what is kept from one run to the next: trained tokenizers; GPU kernels, as Triton compiled them."""
    return {"tokenizers": str(cache_folder()), "kernels": str(triton.kernel_cache())}


def commit() -> dict[str, Any] | None:
    """The git commit of the source tree and whether it has changes, None where git cannot say; None where dsfast does not run
    from one."""
    if not in_a_clone():
        return None
    head = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain")
    return {"hash": head, "dirty": None if changes is None else bool(changes)} if head else None


def collect() -> dict[str, Any]:
    """Everything the command shows, ready for JSON."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "native": native_build(),
        "caches": caches(),
        "operators": {device: ops.report(device) for device in devices},
    }


def main(argv: list[str]) -> int:
    parser = CommandParser(prog="python -m dsfast.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    facts = collect()
    print(json.dumps(facts, indent=2) if arguments.json else _text(facts))
    return 0


def _text(facts: dict[str, Any]) -> str:
    build = facts["native"]
    lines = [*_section("machine", facts["machine"]), *_section("versions", facts["versions"])]
    lines += _section("commit", facts["commit"] or {"hash": "not a git working tree"})
    lines += _section("C++ kernels", {k: ", ".join(v) if isinstance(v, list) else v for k, v in build.items()})
    lines += _section("caches", facts["caches"])
    for device, rows in facts["operators"].items():
        lines += _section(
            f"operators on {device}", {r["operator"]: f"{r['implementation']:<10} {r['reason']}" for r in rows}
        )
    return "\n".join(lines)


def _section(title: str, values: dict[str, Any]) -> list[str]:
    return [title, *(f"  {name:<22} {'-' if value is None else value}" for name, value in values.items()), ""]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    try:
        gpu = torch.cuda.get_device_properties(0)
    except RuntimeError as error:  # busy, or broken
        return {"name": f"does not answer: {first_line(error)}", "capability": None, "memory_gb": None}
    capability = f"{gpu.major}.{gpu.minor}"
    return {"name": gpu.name, "capability": capability, "memory_gb": round(gpu.total_memory / 1e9, 1)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def in_a_clone() -> bool:
    """Whether dsfast runs from the top folder of a git working tree."""
    top = git("rev-parse", "--show-toplevel")
    return bool(top) and os.path.samefile(top, ROOT)


def git(*arguments: str) -> str | None:
    """What git prints in the folder that dsfast runs from; None where it fails or is not there."""
    try:
        run = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


if __name__ == "__main__":
    sys.exit(run_command(main))
