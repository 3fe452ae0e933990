"""The Triton kernels of muon; the contract of every operator's is in tests/triton_contract.py."""

from __future__ import annotations

import math

import pytest
import torch
from operator_cases import drawn
from triton_contract import (
    DEVICE,
    TritonContract,
    assert_passed,
    in_the_interpreter,
    on_device,
    on_the_device,
    poisoned,
)

from dsfast import ops
from dsfast.errors import UserError
from dsfast.ops.cases import muon_case, updated_by_muon
from dsfast.ops.checks import check

BLOCK = 2048
MIXED = ((12, 20), (20, 12), (16, 16), (3, 12, 20), (24, 20), (3, 30, 12), (1, 7))
PARTS = (1, 1, 1, 1, 2, 2, 1)


class TestMuon(TritonContract):
    cases = (
        muon_case("one number", (1, 1)),
        muon_case("tall and wide, stacks and parts, equal shapes apart", *MIXED, parts=PARTS),
        muon_case("a gradient that is missing", *MIXED, parts=PARTS, missing=5),
        muon_case("a block of elements, less one, more one", (32, 64), (23, 89), (3, 683)),
        muon_case("a tall one of several blocks, which end inside of rows", (301, 17)),
        muon_case("parameters without elements", (0, 5), (3, 2), (2, 0, 4)),
    )
    tiny = muon_case("tiny", (3, 5), (4, 2), parts=(1, 2))
    registered = ("muon",)
    strided_arguments = (1,)
    not_expanded = (1,)

    test_captured_in_a_graph = None  # the case copies its tensors: their addresses are new in each call


def on_tensors(params, grads, momenta, parts, lr, weight_decay, momentum, clip_scale):
    """updated_by_muon with the numbers of a step on the device."""
    clip_scale, lr_scale = (
        torch.tensor(x, dtype=t, device=DEVICE) for x, t in ((clip_scale, torch.float32), (0.25, torch.float64))
    )
    return updated_by_muon(params, grads, momenta, parts, 4 * lr, weight_decay, momentum, clip_scale, lr_scale)


@on_device
def test_numbers_on_the_device():
    with poisoned():
        assert_passed(check("muon", on_tensors, on_the_device(drawn(TestMuon.tiny)), (), ["triton"]))


@on_device
def test_a_scale_of_the_learning_rate_that_is_a_number():
    def scaled(params, grads, momenta, parts, lr, weight_decay, momentum, clip_scale):
        return updated_by_muon(params, grads, momenta, parts, 4 * lr, weight_decay, momentum, clip_scale, 0.25)

    with poisoned():
        assert_passed(check("muon", scaled, on_the_device(drawn(TestMuon.tiny)), (), ["triton"]))


@on_device
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_nothing_is_updated_by_a_factor_that_is_not_finite(value):
    *arguments, _ = on_the_device(drawn(muon_case("a full block and a part", (32, 64), (65, 3))))
    before = [[x.clone() for x in column] for column in (arguments[0], arguments[2])]
    with poisoned(), ops.use("triton"):
        ops.muon(*arguments, torch.tensor(value, device=DEVICE))
    for now, then in zip((arguments[0], arguments[2]), before, strict=True):
        assert all(torch.equal(x, old) for x, old in zip(now, then, strict=True))


@on_device
def test_tensors_that_begin_anywhere():
    """Views into one vector, at multiples of 4 bytes that are none of 16; what lies between stays."""
    params, grads, momenta, *settings = on_the_device(drawn(muon_case("views", (32, 65), (5, 3))))
    expected = updated_by_muon(params, grads, momenta, *settings, dtype=torch.float32)
    whole = [torch.full((2120,), 7.0, device=DEVICE) for _ in range(3)]
    views = [[w[1:2081].view(32, 65), w[2083:2098].view(5, 3)] for w in whole]
    for column, values in zip(views, (params, grads, momenta), strict=True):
        for view, x in zip(column, values, strict=True):
            view.copy_(x)
    with ops.use("triton"):
        ops.muon(*views, *settings)
    for found, flat in zip((views[0], views[2]), expected, strict=True):
        torch.testing.assert_close(torch.cat([x.flatten() for x in found]), flat, rtol=0, atol=1e-6)
    for w in whole:
        assert (w[[0, 2081, 2082]] == 7).all()
        assert (w[2098:] == 7).all()


@on_device
def test_matrices_too_large_for_the_chip_are_orthogonalised_by_pytorch():
    def updated(params, *rest):
        return updated_by_muon(params, *rest, dtype=params[0].dtype)  # in 16 bits they would fit

    arguments = on_the_device(drawn(muon_case("large", (40, 45), (3, 5))))
    with pytest.warns(ops.FallbackWarning, match=r"newton_schulz runs in plain PyTorch: .* up to 32 rows"):
        assert_passed(check("muon", updated, arguments, (), ["auto"]))


@on_device
def test_nothing_is_changed_where_they_are_refused():
    params, grads, momenta, *others = on_the_device(drawn(muon_case("large", (40, 45), (3, 5))))
    before = [x.clone() for x in (*params, *momenta)]
    with ops.use("triton"), pytest.raises(UserError, match=r"newton_schulz: .* takes up to 32 rows"):
        ops.muon(params, grads, momenta, *others, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(before, (*params, *momenta), strict=True))


@on_device
def test_iterates_in_what_it_is_told():
    """A float16 iteration of the float32 momenta, as eager's."""
    arguments = on_the_device(drawn(TestMuon.tiny))
    results = []
    for implementation in ("triton", "reference"):
        with ops.use(implementation):
            results.append(updated_by_muon(*arguments, 1.0, torch.float16))
    assert torch.equal(results[0][1], results[1][1]) or (results[0][1] - results[1][1]).abs().max() < 1e-6
    assert (results[0][0] - results[1][0]).abs().max() < 0.02 * 0.45 * 0.01
    assert not torch.equal(results[0][0], updated_by_muon(*arguments, 1.0, torch.float32)[0])


@on_device
def test_only_float32():
    with ops.use("triton"), pytest.raises(UserError, match=r"muon: .* the Triton kernels take float32, got float64"):
        ops.muon(
            [torch.ones(3, 4, device=DEVICE).double()],
            [None],
            [torch.ones(3, 4, device=DEVICE).double()],
            [1],
            0.1,
            0.0,
            0.9,
        )


test_in_the_interpreter = in_the_interpreter(__file__)
