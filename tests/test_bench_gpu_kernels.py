"""`bench gpu` checks the kernels that it times: compiled of the same source for the same constants, not others of its kind."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from dsfast.triton_kernels import ahead

from dsfast.bench.cases import UPDATES
from dsfast.bench.gpu import cases, launched
from dsfast.ops.triton import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels have no compiled kinds")
SUMS = {"sum_kernel", "combine_kernel", "scan_kernel", "scatter_kernel"}
"""Kernels whose tiles follow from how many parts or places there are: checked in other cases and in the tests."""


def kinds(part: str, case, dtype: torch.dtype) -> dict[str, set]:
    """What a part's passes would launch on an H100 at a case's inputs: kernel -> its signatures, constants and options."""
    found = {}
    with launched.on_an_h100():
        arguments = cases.draw(case, "cpu", dtype)
        for launch in launched.launches(part, arguments, start=False):
            assert len(launch.grid) == 1 or max(launch.grid[1:]) < 2**16
            source = ahead._source(launch)
            kind = (str(source.signature), str(source.constants), str(source.attrs), str(launch.options))
            found.setdefault(launch.kernel.__name__, set()).add(kind)
    return found


@pytest.mark.parametrize(("part", "name"), [(part, name) for part in launched.PASSES for name in cases.SIZES[part]])
def test_what_is_timed_is_what_was_checked(part, name):
    case = cases.build(part, name)
    checked, timed = (kinds(part, which, case.dtype) for which in (case.checked, case.timed))
    assert timed.keys() - SUMS == checked.keys() - SUMS
    others = {kernel for kernel, kind in timed.items() if kind - checked.get(kernel, set())}
    assert others <= SUMS
    assert set(launched.PASSES) | set(UPDATES) == set(cases.SIZES)  # these are checked at the size they are timed at
