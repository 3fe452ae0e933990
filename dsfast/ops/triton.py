"""The Triton kernels (dsfast.triton_kernels): which operators have one."""

from __future__ import annotations

import importlib.util


def available(operator: str) -> tuple[bool, str]:
    """Whether `operator` has a Triton kernel that can run here, and the reason."""
    if importlib.util.find_spec(f"dsfast.triton_kernels.{operator}") is None:
        return False, "dsfast has no Triton kernel for it yet"
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed; run `pip install dsfast[gpu]`"
    return True, "Triton kernel"
