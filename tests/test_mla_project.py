"""What stands before a layer's attention, at once, against the operators it stands for: in Triton's interpreter and on a GPU. The
contract of every operator's kernels is in tests/triton_contract.py."""

from __future__ import annotations

from functools import partial
from inspect import signature

import pytest
import torch
from narrow_layer import (
    TakenContract,
    assert_passed_where_used,
    assert_passed_without_eps,
    assert_same_in_float64,
    assert_weights_are_summed_in_float32,
    few_programs,
    half,
    layer_against_apart,
    layer_quantities,
    under_the_guard,
)
from operator_cases import RecordCalls, padded
from torch import Tensor
from triton_contract import (
    DEVICE,
    INTERPRETED,
    TritonContract,
    assert_bitwise_equal,
    drawn,
    in_the_interpreter,
    on_device,
    poisoned,
)

from dsfast import ops
from dsfast.ops.cases import mla_project_case
from dsfast.ops.checks import evaluate
from dsfast.ops.mla_project import INSTEAD_OF, mla_project_reference

P = 11
OUTPUTS = ("h", "q_nope", "q_rope", "k_nope", "k_rope", "v")


def projected(
    delta, residual, norm, eps, q, kv_a, latent_norm, latent_eps, kv_b, heads, cos, sin, positions
) -> tuple[Tensor, ...]:
    """`ops.mla_project`, in the interpreter by the kernel in float32 as well: there errors have no rounding to hide in."""
    arguments = delta, residual, norm, eps, q, kv_a, latent_norm, latent_eps, kv_b, heads, cos, sin, positions
    own = ops.dispatch.choose("mla_attention", delta) == "triton" and (INTERPRETED or delta.itemsize == 2)
    return torch.ops.dsfast.mla_project(*arguments) if own else mla_project_reference(*arguments)


project_case = partial(mla_project_case, function=projected)
sums_in_few_programs = pytest.fixture(autouse=True)(few_programs)


class TestMlaProject(TritonContract):
    # A tile holds 128 tokens, on small chips 64.
    cases = (
        project_case("no tokens", 0, 2, 16, 16, 16, 16, 16),
        project_case("one token", 1, 1, 16, 16, 16, 16, 16),
        project_case("one token below a small tile, widths of an odd multiple of 16", 63, 1, 112, 16, 48, 16, 80),
        project_case("a small tile, without residual", 64, 2, 48, 16, 16, 16, 32, residual=False),
        project_case("one above a small tile: the 500K model", 65, 4, 128, 32, 32, 16, 32),
        project_case("a tile, three heads", 128, 3, 80, 32, 16, 16, 32),
        project_case("one above a tile, without residual", 129, 2, 16, 16, 16, 16, 16, residual=False),
        project_case("several tiles, seven heads, no width a power of two", 259, 7, 33, 7, 9, 6, 11),
    )
    tiny = project_case("tiny", 3, 3, 7, 5, 4, 6, 3)
    registered = ("mla_project", "mla_project_backward")

    def tiny_arguments(self) -> list:
        return half(drawn(self.tiny))


@pytest.mark.skipif(INTERPRETED, reason="the reference is held to the CPU's operators")
@pytest.mark.parametrize("residual", [True, False])
def test_reference_is_the_composition_of_the_operators(residual):
    """As dsfast/model/attention.py has it, each of them in plain PyTorch, in float64."""
    case = project_case("", 13, 3, 24, 8, 8, 4, 6, residual, function=ops.mla_project)

    def composed(
        delta, residual, norm, eps, q, kv_a, latent_norm, latent_eps, kv_b, heads, cos, sin, positions
    ) -> tuple[Tensor, ...]:
        x, _, h = ops.stream_norm(delta, norm, eps, residual, 2)
        q_nope, q_rope = (x @ q.T).unflatten(-1, (heads, -1)).split([8, 4], dim=-1)
        latent, k_rope = (x @ kv_a.T).split([8, 4], dim=-1)
        key_values = (ops.rms_norm(latent, latent_norm, latent_eps) @ kv_b.T).unflatten(-1, (heads, -1))
        k_nope, v = key_values.split([8, 6], dim=-1)
        k_rope = ops.rope(k_rope[:, None], cos, sin, positions).expand(-1, heads, -1)
        return h, q_nope, ops.rope(q_rope, cos, sin, positions), k_nope, k_rope, v

    assert_same_in_float64(case, composed)


@on_device
@pytest.mark.parametrize("residual", [True, False])
def test_public_function_calls_the_kernel(residual):
    case = project_case("", 9, 2, 16, 16, 16, 16, 16, residual, function=ops.mla_project)
    arguments = half(drawn(case))
    with RecordCalls() as record, poisoned():
        found = evaluate(case.function, arguments, case.differentiable)
    assert {str(operator) for operator in record.calls} == {
        "dsfast.mla_project.default",
        "dsfast.mla_project_backward.default",
    }
    assert_bitwise_equal(found, evaluate(projected, arguments, case.differentiable))


@on_device
@pytest.mark.parametrize(
    "used", [("h",), ("v",), ("q_rope", "k_rope"), ("q_nope", "k_nope", "v"), OUTPUTS[1:]], ids="-".join
)
def test_gradients_where_some_outputs_are_not_used(used):
    case = project_case("", 9, 2, 16, 16, 16, 16, 32)
    assert_passed_where_used(case, tuple(OUTPUTS.index(name) for name in used))


@on_device
@pytest.mark.parametrize("place", [0, 1], ids=["delta", "residual"])
def test_rows_of_one_part_of_the_stream_further_apart(place):
    case = project_case("", 9, 2, 16, 16, 16, 16, 16)
    arguments = half(drawn(case))
    expected = evaluate(projected, arguments, case.differentiable)
    arguments[place] = padded(arguments[place])
    assert_bitwise_equal(evaluate(projected, arguments, case.differentiable), expected)


@on_device
def test_gradients_of_the_rope_key_are_summed_in_float32():
    """Three heads give 2048 + 1 - 2048, which in float16 is 0."""
    arguments = half(drawn(project_case("", 9, 3, 16, 16, 16, 16, 16)))
    k_rope = projected(arguments[0].requires_grad_(), *arguments[1:])[OUTPUTS.index("k_rope")]

    def gradient(*heads: float) -> Tensor:
        given = torch.tensor(heads).to(k_rope)[None, :, None].expand(k_rope.shape)
        return torch.autograd.grad(k_rope, arguments[0], given, retain_graph=True)[0]

    assert torch.equal(gradient(2048, 1, -2048), gradient(0, 1, 0))


@on_device
def test_a_position_that_is_none_makes_its_token_nan():
    """Its rope parts alone; the gradient of its stream, and of all weights on the way, shows it too."""
    case = project_case("", 6, 2, 16, 16, 16, 16, 16)
    arguments = half(drawn(case))
    expected = evaluate(projected, arguments, case.differentiable)
    arguments[-1][1:5] = torch.tensor([-1, P, 2**62, -(2**63)])
    with poisoned():
        found = evaluate(projected, arguments, case.differentiable)
    for place, name in enumerate(OUTPUTS):
        bad, good = found[f"output {place}"][1:5], found[f"output {place}"][[0, 5]]
        assert bad.isnan().all() == bad.isnan().any() == name.endswith("rope")
        assert torch.equal(good, expected[f"output {place}"][[0, 5]])
    assert found["grad delta"][1:5].isnan().all()
    assert torch.equal(found["grad delta"][[0, 5]], expected["grad delta"][[0, 5]])
    assert found["grad q"].isnan().any()
    assert torch.equal(found["grad kv_b"].isnan(), torch.zeros_like(found["grad kv_b"], dtype=torch.bool))


@on_device
def test_what_fills_up_a_tile_does_not_show_where_eps_is_zero():
    assert_passed_without_eps(project_case("", 5, 2, 16, 16, 16, 16, 16), (3, 7))


@on_device
def test_gradients_of_weights_are_summed_in_float32():
    assert_weights_are_summed_in_float32(project_case("", 128, 2, 16, 16, 16, 16, 16), (0, 1, 12), (2, 4, 5, 6, 8))


@on_device
def test_nothing_waits_for_the_host():
    under_the_guard(project_case("", 70, 2, 16, 16, 16, 16, 16))


def taken(dtype: torch.dtype = torch.float16, h=4, d=128, r=32, dn=32, dr=16, dv=32, device=DEVICE) -> bool:
    empty = torch.empty(3, d, dtype=dtype, device=device)
    q, kv_a, kv_b = (empty.new_empty(shape) for shape in ((h * (dn + dr), d), (r + dr, d), (h * (dn + dv), r)))
    return ops.projects_at_once(empty, q, kv_a, empty.new_empty(r), kv_b, h, empty.new_empty(7, dr // 2))


@on_device
def test_what_is_taken():
    assert taken()
    assert taken(torch.bfloat16)
    assert taken(h=3, d=97, r=17, dn=17, dr=2, dv=9)
    assert not taken(torch.float32)
    for wide in (
        {"d": 129},
        {"r": 33},
        {"dn": 33},
        {"dr": 18},
        {"dv": 33},
        {"h": 5},
        {"h": 5, "dn": 2, "dr": 2, "dv": 17},
    ):
        assert not taken(**wide), wide


class TestWhereItIsTaken(TakenContract):
    taken = staticmethod(taken)
    instead_of = INSTEAD_OF


@pytest.mark.parametrize(
    ("position", "change", "kind", "message"),
    [
        (0, lambda x: x[0], ValueError, r"mla_project: delta must have shape \[N, D\], got \[16\]"),
        (1, lambda x: x[1:], ValueError, r"mla_project: residual must have shape \[3, 16\], got \[2, 16\]"),
        (1, lambda x: x.double(), TypeError, r"mla_project: residual must be torch.float32 on"),
        (2, lambda x: x[1:], ValueError, r"mla_project: norm must have shape \[16\], got \[15\]"),
        (4, lambda x: x[1:], ValueError, r"mla_project: the rows of q, 63, must be 2 heads of Dn \+ 16"),
        (5, lambda x: x[1:], ValueError, r"mla_project: kv_a must have shape \[32, 16\], got \[31, 16\]"),
        (6, lambda x: x[None], ValueError, r"mla_project: latent_norm must have shape \[R\], got \[1, 16\]"),
        (
            8,
            lambda x: x[:, 1:],
            ValueError,
            r"mla_project: kv_b must have shape \[H \(Dn \+ Dv\), 16\], got \[64, 15\]",
        ),
        (8, lambda x: x[:32], ValueError, r"must be 2 heads of Dn \+ 16, those of kv_b, 32, 2 heads of Dn \+ Dv"),
        (4, lambda x: x[:, 1:], ValueError, r"mla_project: q must have shape \[H \(Dn \+ Dr\), 16\], got \[64, 15\]"),
        (8, lambda x: x[1:], ValueError, r"those of kv_b, 63, 2 heads of Dn \+ Dv"),
        (9, lambda x: 0, ValueError, r"mla_project: heads must be from 1 on, got 0"),
        (10, lambda x: x[0], ValueError, r"mla_project: cos must have shape \[P, Dr / 2\], got \[8\]"),
        (11, lambda x: x[1:], ValueError, r"mla_project: sin must have shape \[11, 8\], got \[10, 8\]"),
        (12, lambda x: x.int(), TypeError, r"mla_project: positions must be torch.int64 on"),
        (12, lambda x: x[1:], ValueError, r"mla_project: positions must have shape \[3\], got \[2\]"),
    ],
)
def test_bad_arguments(position, change, kind, message):
    arguments = drawn(project_case("", 3, 2, 16, 16, 16, 16, 16))
    arguments[position] = change(arguments[position])
    with ops.use("reference"), pytest.raises(kind, match=message):
        ops.mla_project(*arguments)


@pytest.mark.parametrize("name", ["norm", "q", "kv_a", "latent_norm", "kv_b", "cos", "sin"])
def test_what_is_not_in_the_tokens_dtype_is_named(name):
    arguments = dict(
        zip(signature(ops.mla_project).parameters, drawn(project_case("", 3, 2, 16, 16, 16, 16, 16)), strict=True)
    )
    arguments[name] = arguments[name].bfloat16()
    with ops.use("reference"), pytest.raises(TypeError, match=rf"^mla_project: {name} must be torch.float32 on"):
        ops.mla_project(**arguments)


@on_device
def test_a_layer_against_the_layer_operator_by_operator(monkeypatch):
    called = layer_against_apart("projects_at_once", monkeypatch)
    assert {"mla_project", "mla_project_backward"} <= called
    assert not {"rope", "rope_pair"} & called


@on_device
def test_a_layer_with_a_latent_of_the_queries_goes_operator_by_operator():
    with RecordCalls() as record:
        layer_quantities(torch.float16, 0, **{"model.q_lora_rank": 16})
    called = {str(operator).split(".")[1] for operator in record.calls}
    assert "rope_pair" in called
    assert "mla_project" not in called


@on_device
def test_a_layer_with_hooks_goes_operator_by_operator():
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    with RecordCalls() as record:
        layer_quantities(torch.float16, 0)
    handle.remove()
    called = {str(operator).split(".")[1] for operator in record.calls}
    assert {"rms_norm", "rope_pair", "mla_attention"} <= called
    assert not {"mla_project", "mla_output"} & called


test_in_the_interpreter = in_the_interpreter(__file__, ("sm_80",))
