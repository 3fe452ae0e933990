"""Which ptxas makes machine code for sm_90 of what Triton compiles.

ptxas 12.8, which triton 3.6 takes, leaves out at times what sets a uniform register: on sm_90 the descriptors of a product of
warp groups are then made from garbage, without a word, though the PTX is right. It does so in kernels of the 500K model. triton
3.6 brings 12.9 as well, for newer chips, which makes right code of the same PTX.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from dsfast.triton_kernels.version import numbers

RIGHT = (12, 9)
"""The first version known to be right."""
_NAMING = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")
_TORCHS = Path(torch.__file__).absolute().parent / "bin" / "ptxas"
"""Where torch.compile looks for one to name, if none is named yet."""


class PtxasError(RuntimeError):
    """No ptxas that is known to be right is there; says what to do."""


@cache
def use_right_ptxas(arch: int) -> None:
    """Where `arch`, ten times a compute capability, is sm_90's, have Triton take a ptxas of version RIGHT or newer: its own, else
    the one that it brings for newer chips; in processes that are started later too. It is not torch's, which
    torch.compile names where none is named: that may be older.

    Raises PtxasError where the user names an older one in the environment, and where Triton brings none.
    """
    _take_right(arch)


@contextmanager
def right_ptxas(arch: int) -> Iterator[None]:
    """Inside, what `use_right_ptxas` does; behind it Triton takes for other chips what it would have taken."""
    before = os.environ.get(_NAMING[0])
    try:
        _take_right(arch)
        yield
    finally:
        if os.environ.get(_NAMING[0]) != before:
            _take(before)


def _take_right(arch: int) -> None:
    if not torch.version.hip and arch // 10 == 9:
        _take(_right(arch))


def _right(arch: int) -> str:
    """Its path. Raises PtxasError."""
    from triton import knobs
    from triton.backends.nvidia import compiler

    if os.environ.get(_NAMING[0]) == str(_TORCHS):
        del os.environ[_NAMING[0]]
    try:
        own = compiler.get_ptxas(arch)
        if numbers(own.version) >= RIGHT:
            return own.path
        reason = f"{own.path} is ptxas {own.version}, which compiles some kernels wrongly"
        newer = None if any(map(os.environ.get, _NAMING)) else knobs.nvidia.ptxas_blackwell
    except RuntimeError as error:  # Triton finds no such file
        reason, newer = str(error), None
    if newer is None or numbers(newer.version) < RIGHT:
        raise PtxasError(
            f"{reason}; for this GPU Triton needs a ptxas {'.'.join(map(str, RIGHT))} or newer: name one in"
            f" {_NAMING[0]}, or install a newer triton and leave {' and '.join(_NAMING)} unset"
        )
    return newer.path


def _take(path: str | None) -> None:
    """None: none is named."""
    from triton.backends.nvidia import compiler

    if path is None:
        del os.environ[_NAMING[0]]
    else:
        os.environ[_NAMING[0]] = path  # torch.compile names none where one is named
    compiler.get_ptxas_version.cache_clear()  # the version is part of a kernel's name in Triton's cache
