"""What the guard over a step notices in the process in which a GPU's operators run."""

from __future__ import annotations

import importlib

import pytest
import torch
from guard import GraphGuard, NotCapturableError, kept_memory
from triton_contract import INTERPRETED, in_the_interpreter

from dsfast import ops

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process")


@interpreted
@pytest.mark.parametrize("name", ["nonzero", "item"])
def test_what_an_operator_calls(name, monkeypatch):
    kernels = importlib.import_module("dsfast.triton_kernels.rope")
    own = kernels.rope

    def waiting(x, *others):
        getattr(x.sum(), name)()
        return own(x, *others)

    arguments = torch.ones(3, 2, 4), torch.ones(5, 2), torch.zeros(5, 2), torch.arange(3)
    with GraphGuard():
        found = ops.rope(*arguments)
    assert torch.equal(found, arguments[0])
    monkeypatch.setattr(kernels, "rope", waiting)
    with GraphGuard(), pytest.raises(NotCapturableError):
        ops.rope(*arguments)


@interpreted
def test_memory_that_is_kept():
    kept = []
    assert kept_memory(lambda: torch.zeros(1000).sum()) == []
    (found,) = kept_memory(lambda: kept.append(torch.zeros(1000)))
    assert found is kept[0]


test_in_the_interpreter = in_the_interpreter(__file__)
