"""What of a GPU's failures is told in one line, and what is kept on it for the next use."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from dsfast.errors import GpuError, first_line

_OF_THE_GPU = (
    "CUDA error", "CUDA driver error", "CUDA unknown error", "cudaGetDeviceCount", "No CUDA GPUs", "NVML_SUCCESS", "HIP error",
    "Triton Error [", "CUBLAS_STATUS", "CUDNN_STATUS", "cuDNN error", "HIPBLAS_STATUS",
)  # fmt: skip
"""What the first line of a RuntimeError that tells of a GPU holds: torch's, Triton's and the libraries'."""
_OUT_OF_MEMORY = ("out of memory", "STATUS_ALLOC_FAILED")


class LastValue:
    """One value, and the key that says what it was made of: for a module to keep what is dear to make again.

    A copy of it, as the copy of a module makes, is empty.
    """

    def __init__(self) -> None:
        self._key: Hashable = None
        self._value: Any = None

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value kept by an equal key, or else, in its place, what `make` returns."""
        if self._value is None or self._key != key:
            self._value = None  # its memory first
            self._value, self._key = make(), key
        return self._value

    def __reduce__(self):
        return LastValue, ()


@contextmanager
def gpu_errors(out_of_memory: Callable[[str], str], failed: Callable[[str], str]) -> Iterator[None]:
    """Make a GpuError of memory that is not there and of a GPU that fails; both are given the first line of what was said."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise GpuError(out_of_memory(first_line(error))) from error
    except RuntimeError as error:
        said = first_line(error)
        if not isinstance(error, torch.AcceleratorError) and not any(words in said for words in _OF_THE_GPU):
            raise
        short = any(words in said for words in _OUT_OF_MEMORY)
        raise GpuError(out_of_memory(said) if short else failed(said)) from error


def gpu_errors_while(what: str, remedy: str = "") -> AbstractContextManager[None]:
    """`gpu_errors` that say at what it was, "setting up", and what helps against too little memory."""
    return gpu_errors(
        lambda said: f"out of GPU memory while {what}{remedy and f': {remedy}'} ({said})",
        lambda said: f"the GPU failed while {what}: {said}",
    )
