from __future__ import annotations

import pytest
import torch
from operator_cases import (
    DRAWS,
    OperatorContract,
    assert_passed,
    bad,
    drawn,
    edges,
    expanded,
    guarded_allocations,
    needs_native,
)

from dsfast import ops
from dsfast.ops.cases import swiglu_mlp_case
from dsfast.ops.checks import check, check_draws, evaluate


class TestSwigluMlp(OperatorContract):
    cases = (
        *edges(swiglu_mlp_case, "n", d=5, i=3),
        *edges(swiglu_mlp_case, "d", n=29, i=3),
        *edges(swiglu_mlp_case, "i", n=29, d=3),
        swiglu_mlp_case("wide: read transposed as they lie, rows more than a page apart", 61, 1031, 67),
        swiglu_mlp_case("wide: more tokens than a block", 801, 270, 260),
        swiglu_mlp_case("wide: as the first, the other way round", 61, 67, 1031),
        swiglu_mlp_case("no tokens", 0, 5, 3),
        swiglu_mlp_case("sums over 641 tokens", 641, 7, 5),
        swiglu_mlp_case("primes above every block", 101, 37, 53),
    )
    tiny = swiglu_mlp_case("tiny", 3, 5, 2)
    summed_over_threads = frozenset({"grad gate_up", "grad down"})
    bad_arguments = (
        bad(r"swiglu_mlp: x must have shape \[N, D\], got \[3\]", x=lambda x: x[:, 0]),
        bad(r"swiglu_mlp: down must have shape \[5, I\], got \[4, 2\]", down=lambda d: d[:4]),
        bad(r"swiglu_mlp: gate_up must have shape \[4, 5\], got \[3, 5\]", gate_up=lambda g: g[:3]),
        bad("swiglu_mlp: down must be torch.float32 on cpu, got torch.float64", TypeError, down=torch.Tensor.double),
        bad("swiglu_mlp: gate_up must be torch.float32 on cpu, got", TypeError, gate_up=torch.Tensor.bfloat16),
    )

    @staticmethod
    def independent(x, gate_up, down):
        i = down.size(1)
        gate, up = torch.nn.functional.linear(x, gate_up[:i]), torch.nn.functional.linear(x, gate_up[i:])
        return torch.nn.functional.linear(gate / (1 + torch.exp(-gate)) * up, down)


@pytest.mark.parametrize("size", [10.0, 60.0, 300.0])
def test_saturated_gates(size):
    """Gates far from 0: silu falls to 0 on one side and is its argument on the other, its exp must not overflow."""
    needs_native()
    x, gate_up, down = drawn(swiglu_mlp_case("large", 13, 5, 7))
    assert_passed(check("swiglu_mlp", ops.swiglu_mlp, (x, gate_up * size, down), (0, 1, 2), ["native"]))


def test_without_an_inner_width_there_is_nothing_to_add(monkeypatch):
    """Sums of no products are written, too."""
    needs_native()
    arguments = torch.ones(5, 7), torch.ones(0, 7), torch.ones(7, 0)
    with guarded_allocations(monkeypatch), ops.use("native", "swiglu_mlp"):
        found = evaluate(ops.swiglu_mlp, arguments, (0, 1, 2))
    assert not any(x.any() for x in found.values())


def test_long_sums_of_equal_terms():
    """All rows of an argument are one row: terms that are equal round the same way, the more of them in a chain the further."""
    needs_native()
    draws = [[expanded(x) for x in drawn(swiglu_mlp_case("equal", 19, 1024, 520), seed)] for seed in range(DRAWS)]
    assert_passed(check_draws("swiglu_mlp", ops.swiglu_mlp, draws, (0, 1, 2), ["native"]))
