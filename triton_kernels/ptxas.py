"""Which ptxas makes machine code of what Triton compiles.

ptxas 12.8, which triton 3.6 takes, leaves out at times what sets a uniform register: on sm_90 the descriptors of a product of
warp groups are then made from garbage, without a word, though the PTX is right. It does so in kernels of the 500K model. triton
3.6 brings 12.9 as well, for newer chips, which makes right code of the same PTX for all.
"""

from __future__ import annotations

import os
from functools import cache

import torch
from dsfast.triton_kernels.version import numbers

RIGHT = (12, 9)
"""The first version known to be right."""


class PtxasError(RuntimeError):
    """No ptxas that is known to be right is there; says what to do."""


@cache
def use_right_ptxas() -> None:
    """Have Triton take a ptxas of version RIGHT or newer: its own, else the one that it brings for newer chips; in processes that
    are started later too. Call it before Triton compiles or looks for a kernel: the version is part of a kernel's key.

    Raises PtxasError where $TRITON_PTXAS_PATH names an older one, and where Triton brings none.
    """
    if torch.version.hip:
        return
    from triton import knobs

    own = knobs.nvidia.ptxas
    if numbers(own.version) >= RIGHT:
        return
    newer = knobs.nvidia.ptxas_blackwell
    if os.environ.get("TRITON_PTXAS_PATH") or numbers(newer.version) < RIGHT:
        raise PtxasError(
            f"{own.path} is ptxas {own.version}, which compiles some kernels wrongly; set TRITON_PTXAS_PATH to a ptxas"
            f" {'.'.join(map(str, RIGHT))} or newer, or install a newer triton and leave it unset"
        )
    os.environ["TRITON_PTXAS_PATH"] = newer.path
