"""What Triton's version says, for those who may not import triton."""

from __future__ import annotations

import re


def numbers(version: str) -> tuple[int, ...]:
    """The first two, of "3.7.1" and of "3.7rc1"."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
