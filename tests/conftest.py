"""What holds for every test."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def no_fallbacks_yet(monkeypatch):
    """The list of fall-backs is the process's: each test begins with an empty one, and leaves none to others."""
    if dispatch := sys.modules.get("dsfast.ops.dispatch"):  # which tests/fake_driver.py has to import first
        monkeypatch.setattr(dispatch, "_fallbacks", {})
