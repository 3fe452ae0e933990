"""The widths that kernels take, the chips they are compiled for without one at hand, and what one may take of each."""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """A compilation target of Triton, and its limits for one program."""

    backend: str
    arch: int | str
    warp_size: int
    shared: int  # bytes of shared memory
    large: int  # which tiles a launcher takes there (dsfast.triton_kernels.launch.large_tiles)
    matrix: str  # instruction of the matrix units, in the assembly of `stage`
    stage: str
    matrix_rows: int  # rows of a tile from which a 16-bit product must use it


MULTIPROCESSORS = 132
"""Of an H100 and an H200, which launches are sized for where the sums are to be the same bits on every chip."""

ATTENTION_WIDEST, DECODE_WIDEST, NORM_WIDEST, ROPE_WIDEST = 576, 1152, 8192, 4096
"""Dn + Dr + Dv and R + Dr, each rounded up to a power of two, D and Dr that kernels take. Wider runs in plain PyTorch."""

CHIPS = {
    "sm_80": Chip("cuda", 80, 32, 166_912, 0, "mma.sync", "ptx", 16),
    "sm_90": Chip("cuda", 90, 32, 232_448, 9, "wgmma.mma_async", "ptx", 64),
    "sm_100": Chip("cuda", 100, 32, 232_448, 10, "tcgen05.mma", "ptx", 64),
    "gfx942": Chip("hip", "gfx942", 64, 65_536, 0, "v_mfma", "amdgcn", 16),
}

# Bytes of registers that a thread may keep in memory, by backend and bytes of an element. float32 serves to check, and its
# products at full precision hold both operands in registers: at attention's widest not all fit. A warp of gfx942 has twice the
# threads; tiles that suit it and the others have not been found there.
SPILLS = {"cuda": {2: 0, 4: 160}, "hip": {2: 0, 4: 704}}
