"""Files of tensors, as safetensors writes them."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsfast.files import os_errors_as


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Name -> tensor, on the CPU. Raises FileError."""
    with os_errors_as(f"{file}: not a readable safetensors file", SafetensorError):
        return load_file(file)


def write_tensors(file: Path, tensors: dict[str, Tensor], beside: Path, metadata: dict[str, str] | None = None) -> None:
    """Write name -> contiguous tensor on the CPU. Who may read the file `beside` may read it: safetensors lets only its owner.

    Raises OSError or SafetensorError.
    """
    save_file(tensors, file, metadata)
    shutil.copymode(beside, file)
