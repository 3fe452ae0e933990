"""Kernels that several operators share: dsfast.triton_kernels.pieces."""

from __future__ import annotations

import pytest
import torch
from triton_contract import DEVICE, in_the_interpreter, on_device, poisoned

SHAPES = {
    "one number": (1, 1, 1),
    "no row": (3, 0, 5),
    "one part beyond a step": (129, 1, 7),
    "one column beyond a block": (2, 3, 1025),
    "as many rows as a block has, and one": (8, 9, 100),
    "narrow rows": (5, 67, 3),
}


@on_device
@pytest.mark.parametrize("rows_first", [False, True], ids=["parts one after the other", "parts of a row side by side"])
@pytest.mark.parametrize("based", [False, True], ids=["", "and a base"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_sum(shape, dtype, based, rows_first):
    """Integers, whose sums are exact in any order."""
    from dsfast.triton_kernels.pieces import sum_launch

    draws = torch.Generator().manual_seed(0)
    parts = torch.randint(-7, 8, shape, generator=draws).to(DEVICE, dtype)
    base = torch.randint(-7, 8, shape[1:], generator=draws).to(DEVICE, dtype) if based else None
    if rows_first:
        parts = parts.transpose(0, 1).contiguous().transpose(0, 1)
    with poisoned():
        y = torch.empty(shape[1:], dtype=dtype, device=DEVICE)
    sum_launch(parts, y, base).run()
    assert torch.equal(y, (parts.double().sum(0) + (base if based else 0)).to(dtype))


@pytest.mark.parametrize(("tiles", "steps"), [(1, 1), (1, 1000), (7, 100), (528, 3), (529, 3)], ids=str)
def test_splits_of_a_loop(tiles, steps):
    """Up to as many programs as are asked for, or one for each tile; together they take every step, and none is idle."""
    from dsfast.triton_kernels.pieces import splits

    parts, each = splits(tiles, steps, 528)
    assert parts * tiles <= max(tiles, 528)
    assert (parts - 1) * each < steps <= parts * each


test_in_the_interpreter = in_the_interpreter(__file__)
