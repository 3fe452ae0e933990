from __future__ import annotations

import math

import pytest
import torch
from operator_cases import EDGES, OperatorContract, assert_passed, bad, drawn, needs_native, run_native

from dsfast import ops
from dsfast.ops.cases import newton_schulz_case
from dsfast.ops.checks import check
from dsfast.ops.newton_schulz import ITERATIONS, A, B, C, newton_schulz_reference

SHAPES = ((2, 3, 5), (1, 4, 4))


class TestNewtonSchulz(OperatorContract):
    cases = (
        *(newton_schulz_case(f"square, {n} rows", (2, n, n)) for n in EDGES),
        *(newton_schulz_case(f"{n} columns", (2, min(n, 5), n)) for n in EDGES),
        newton_schulz_case("no stack"),
        newton_schulz_case("empty stacks, first, last, between", (0, 3, 4), (1, 2, 3), (0, 1, 1), (2, 1, 2), (0, 0, 0)),
        newton_schulz_case("matrices without an element", (2, 0, 0), (1, 2, 3), (3, 0, 7)),
        newton_schulz_case("more matrices than any number of threads", (300, 1, 2), (2, 5, 6)),
        newton_schulz_case("columns in two slices: sums of 513 and 1031 terms", (1, 7, 513), (1, 3, 1031)),
        newton_schulz_case("rows more than a page apart", (1, 29, 1031)),
        newton_schulz_case("the 500K model's", (1, 128, 192), (1, 128, 128), (2, 64, 128), (1, 48, 128), (1, 32, 256)),
    )  # fmt: skip
    tiny = newton_schulz_case("tiny", *SHAPES)
    bad_arguments = (
        bad(r"newton_schulz: x must have shape \[46\], got \[45\]", x=lambda x: x[:45]),
        bad(r"newton_schulz: x must have shape \[46\], got \[2, 23\]", x=lambda x: x.view(2, 23)),
        bad(r"newton_schulz: shapes must be \(n, R, C\) with 0 <= R <= C, got \[\(2, 5, 3\)\]", shapes=((2, 5, 3),)),
        bad(r"newton_schulz: shapes must be \(n, R, C\) .*, got \[\(-2, 3, 5\)\]", shapes=((-2, 3, 5),)),
        bad(r"newton_schulz: shapes must be \(n, R, C\) .*, got \[\(1, -1, 5\)\]", shapes=((1, -1, 5),)),
    )

    @staticmethod
    def independent(x, shapes):
        """By singular values: they are what the iteration moves, the vectors stay."""
        results = [x[:0]]
        for part, (n, rows, cols) in zip(x.split([math.prod(shape) for shape in shapes]), shapes, strict=True):
            if not part.numel():
                continue
            u, s, vh = torch.linalg.svd(part.view(n, rows, cols), full_matrices=False)
            s = s / s.square().sum(1, keepdim=True).sqrt()
            for _ in range(ITERATIONS):
                s = A * s + B * s**3 + C * s**5
            results.append((u * s[:, None] @ vh).flatten())
        return torch.cat(results)

    test_gradcheck_of_reference = None  # an update is not differentiated: see below for who asks all the same
    test_second_derivative = None


def both(x: torch.Tensor, shapes) -> list[torch.Tensor]:
    needs_native()
    results = []
    for implementation in ("native", "reference"):
        with ops.use(implementation):
            results.append(ops.newton_schulz(x, shapes))
    return results


def test_a_backward_pass_is_refused_not_silently_zero():
    needs_native()
    x, shapes = drawn(TestNewtonSchulz.tiny)
    with ops.use("native"):
        y = ops.newton_schulz(x.requires_grad_(), shapes)
    with pytest.raises(
        NotImplementedError, match=r"dsfast::newton_schulz has no derivative; ops.use\('reference'\) has"
    ):
        y.sum().backward()


def test_every_direction_is_given_about_the_same_length():
    """From 0.002 of the norm on a singular value comes to lie between 0.68 and 1.21."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0] for n in (33, 48))
    values = torch.logspace(math.log10(2.1e-3), 0, 33, dtype=torch.float64)
    x = (u * (values / values.norm()) @ v[:33]).float()
    small = values / values.norm() < 2e-3
    for y in both(x.flatten(), ((1, 33, 48),)):
        length = torch.diagonal(u.T @ y.view(33, 48).double() @ v[:33].T)
        assert length.max() < 1.21
        assert length[~small].min() > 0.68


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e-3, 1e3, 1e18])
def test_the_size_of_a_matrix_does_not_count_unless_it_is_next_to_zero(size):
    """Below eps it does: nothing is divided by zero, and no square overflows before 1e19."""
    needs_native()
    x, shapes = drawn(TestNewtonSchulz.tiny)
    assert_passed(check("newton_schulz", ops.newton_schulz, (x * size, shapes), (), ["native"]))
    found, _ = both(x * size, shapes)
    assert found.isfinite().all()
    if size >= 1e-3:
        torch.testing.assert_close(found, both(x, shapes)[0], rtol=1e-4, atol=1e-5)


def test_a_matrix_of_zeros_stays_one():
    x = drawn(TestNewtonSchulz.tiny)[0]
    x[15:30] = 0
    for y in both(x, SHAPES):
        assert not y[15:30].any()
        assert y[:15].all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_matrix(value):
    x = drawn(TestNewtonSchulz.tiny)[0]
    expected = both(x, SHAPES)
    x[20] = value
    for y, clean in zip(both(x, SHAPES), expected, strict=True):
        assert y[15:30].isnan().all()
        assert torch.equal(y[:15], clean[:15])
        assert torch.equal(y[30:], clean[30:])


def test_a_matrix_gives_the_same_bits_alone():
    case = newton_schulz_case("several", (3, 13, 29), (2, 7, 7))
    x, _ = drawn(case)
    together = run_native(case, drawn(case))["output"]
    with ops.use("native"):
        for i in range(3):
            part = slice(i * 13 * 29, (i + 1) * 13 * 29)
            assert torch.equal(ops.newton_schulz(x[part], ((1, 13, 29),)), together[part])
        assert torch.equal(ops.newton_schulz(x[3 * 13 * 29 :], ((2, 7, 7),)), together[3 * 13 * 29 :])


def test_agrees_with_torchs_own():
    """torch.optim.Muon iterates in bfloat16, one matrix at a time."""
    muon = pytest.importorskip("torch.optim._muon")
    x, shapes = drawn(newton_schulz_case("one", (1, 24, 40)))
    expected = muon._zeropower_via_newtonschulz(x.view(24, 40), (A, B, C), ITERATIONS, 1e-7)
    assert (newton_schulz_reference(x, shapes).view(24, 40) - expected).norm() < 0.03 * expected.norm()
