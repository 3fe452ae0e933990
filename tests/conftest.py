"""What holds for every test."""

from __future__ import annotations

import signal
import sys

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start a process for all their tests come first: they take longest, and no worker is to end alone with one."""
    items.sort(key=lambda item: not item.name.startswith(("test_in_the_interpreter", "test_every_operator[")))


@pytest.fixture(autouse=True)
def no_fallbacks_yet(monkeypatch):
    """The list of fall-backs is the process's: each test begins with an empty one, and leaves none to others."""
    if dispatch := sys.modules.get("dsfast.ops.dispatch"):  # which tests/fake_driver.py has to import first
        monkeypatch.setattr(dispatch, "_fallbacks", {})


@pytest.fixture
def terminal():
    """Signals as a terminal leaves them: under nohup SIGHUP is ignored, and SIGINT in what a shell runs in the background."""
    own = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    former = {number: signal.signal(number, handler) for number, handler in own.items()}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)
