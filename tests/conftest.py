"""What holds for every test."""

from __future__ import annotations

import pytest

from dsfast import ops


@pytest.fixture(autouse=True)
def no_fallbacks_yet(monkeypatch):
    """The list of fall-backs is the process's: each test begins with an empty one, and leaves none to others."""
    monkeypatch.setattr(ops.dispatch, "_fallbacks", {})
