"""`bench compile`: what it compiles, what it makes of the limits, what it writes and shows. The kernels' own limits are in
tests/test_triton_compile.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton
from dsfast.triton_kernels.limits import CHIPS

from dsfast.bench import __main__ as bench
from dsfast.bench import compile as module
from dsfast.bench.compile import Example, compile_example, examples, operators, plan, run_compile
from dsfast.command import run_command
from dsfast.ops import triton as ops_triton

ROPE = Example("rope", "500K", "rope_kernel", "bfloat16", "sm_90")


@pytest.fixture
def nothing_compiled(monkeypatch):
    """Instead of compiling, a row that keeps the limits; the second kernel's on sm_80 does not."""

    def compile_example(example):
        spills = 8 * (example.kernel == "rope_kernel, inverse" and example.chip == "sm_80")
        figures = {"registers": 32, "spills": spills, "shared": 1024, "matrix": 0, "copies": 0}
        return {**figures, **example._asdict(), "faults": [f"{example.kernel}: 8 bytes spilled"] if spills else []}

    monkeypatch.setattr(module, "compile_example", compile_example)
    monkeypatch.setattr(module, "PROCESSES", 1)


def test_every_launch_of_every_operator_on_every_chip():
    planned = plan([], None, ["bfloat16"], None)
    assert {example.operator for example in planned} == set(operators())
    for operator in operators():
        launches = module.kernels_of(operator)
        for size in launches.EXAMPLES:
            for chip in CHIPS:
                found = [e.kernel for e in planned if (e.operator, e.size, e.chip) == (operator, size, chip)]
                there = launches.example_launches(size, module.DTYPES["bfloat16"], CHIPS[chip].large)
                assert len(found) == len(there)
                assert set(found) == there.keys()


def test_a_launch_that_some_chips_have_is_planned_for_these():
    """Two experts' wide matrices are summed in parts on some chips, and at once on others."""
    planned = plan(["moe_experts"], None, ["bfloat16"], ["two wide experts, top 1"])
    chips = {name: {e.chip for e in planned if e.kernel == name} for name in {e.kernel for e in planned}}
    assert chips["sum_kernel, backward 4"] == {"sm_90", "sm_100"}
    assert chips["matrix_kernel, backward 4"] == {"sm_80", "gfx942"}
    assert all(example.launch().grid for example in planned)


@pytest.mark.parametrize("dtype", module.DTYPES)
def test_every_dtype_has_a_plan(dtype):
    planned = plan([], None, [dtype], None)
    assert {example.dtype for example in planned} == {dtype}
    assert len({example.operator for example in planned}) > 10


def test_named_ones_once():
    planned = plan(["rope", "rope"], ["sm_90", "gfx942"], ["float32"], ["500K"])
    assert [(example.kernel, example.chip) for example in planned] == [
        (name + variant, chip) for name in ("rope_kernel", "pair_kernel") for variant in ("", ", in place", ", inverse")
        for chip in ("sm_90", "gfx942")
    ]  # fmt: skip
    assert planned == examples(["rope"], ["sm_90", "gfx942"], ["float32"], "500K".__eq__)


def test_a_kernel_is_compiled():
    row = compile_example(ROPE)
    assert row["registers"] > 0
    assert {"operator", "size", "kernel", "dtype", "chip", "spills", "shared", "matrix", "copies"} <= set(row)
    assert row["faults"] == []


def test_what_breaks_a_limit_is_a_fault(monkeypatch):
    monkeypatch.setitem(CHIPS, "sm_90", CHIPS["sm_90"]._replace(shared=-1))
    [fault] = compile_example(ROPE)["faults"]
    assert fault.startswith("rope_kernel on sm_90: ")
    assert fault.endswith("bytes of shared memory, -1 are there")


def test_what_does_not_compile_is_a_fault(monkeypatch):
    monkeypatch.setitem(CHIPS, "sm_90", CHIPS["sm_90"]._replace(backend="no such backend"))
    [fault] = compile_example(ROPE)["faults"]
    assert fault.startswith("rope_kernel on sm_90: does not compile: ")


@pytest.mark.slow
def test_several_processes_give_the_same_rows(monkeypatch):
    planned = plan(["rope"], ["sm_90"], ["bfloat16"], None)
    monkeypatch.setattr(module, "FEW", 1)
    told = []
    assert run_compile(planned, told.append)["kernels"] == [compile_example(example) for example in planned]
    assert len(told) == len(planned)


def test_it_writes_and_shows_every_figure(nothing_compiled, tmp_path: Path, capsys):
    out = tmp_path / "out.json"
    arguments = ["compile", "rope", "--chip", "sm_90", "gfx942", "--size", "500K", "--json", str(out)]
    assert run_command(bench.main, arguments) == 0
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written["command"] == ["python", "-m", "dsfast.bench", *arguments]
    assert {"machine", "versions", "commit", "created"} <= set(written)
    assert written["settings"] == {
        "bench": "compile", "operators": ["rope"], "sizes": ["500K"], "dtypes": ["bfloat16"], "chips": ["sm_90", "gfx942"],
    }  # fmt: skip
    assert len(written["results"]["kernels"]) == 12
    assert written["results"]["limits"]["sm_90"]["shared"] == 232_448
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("rope, 500K, bfloat16", "rope_kernel, inverse", "gfx942", "1,024", "ok"))
    assert f"Compiled by triton {triton.__version__}: 12, of which 0 break a limit." in " ".join(shown.split())
    assert "✗" not in shown


def test_what_breaks_a_limit_is_marked_named_and_1(nothing_compiled, capsys):
    assert run_command(bench.main, ["compile", "rope", "--size", "500K"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "24, of which 1 break a limit." in shown
    assert "✗ rope, 500K, bfloat16: rope_kernel, inverse: 8 bytes spilled" in shown
    assert shown.count("✗") == 2


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["rop"], "unknown operator 'rop'; known: adamw, "),
        (["rope", "--chip", "sm_75"], "unknown chip 'sm_75'; known: gfx942, sm_100, sm_80, sm_90"),
        (["rope", "--dtype", "float64"], "unknown dtype 'float64'; known: bfloat16, float16, float32"),
        (["rope", "--size", "7M"], "unknown size '7M'; known: 500K, "),
        (
            ["newton_schulz", "--size", "7M"],
            "unknown size '7M'; known: '16 rows, as many columns as stay in registers', '",
        ),
        (["mla_project", "--dtype", "float32"], "no kernel of mla_project in float32 at these sizes on these chips"),
        (["rope", "--chip"], "argument --chip: expected at least one argument"),
        (["rope", "--repeats", "3"], "unrecognized arguments: --repeats"),
        (["--json", "/no/such/folder/out.json"], "--json /no/such/folder/out.json: cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_2(arguments, complaint, nothing_compiled, capsys):
    assert run_command(bench.main, ["compile", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert complaint in line


@pytest.mark.parametrize(
    ("target", "name", "value", "complaint"),
    [
        (
            module.importlib.util,
            "find_spec",
            lambda name: None,
            "triton is not installed; run `pip install dsfast[gpu]`",
        ),
        (
            triton,
            "__version__",
            "3.5rc1",
            "triton 3.5rc1 is too old, 3.6 or newer is needed; run `pip install -U dsfast",
        ),
        (ops_triton, "INTERPRETED", True, "TRITON_INTERPRET is set, and Triton then compiles nothing; unset it"),
    ],
    ids=["missing", "too old", "interpreted"],
)
def test_without_a_compiler_it_is_one_line_and_2(target, name, value, complaint, monkeypatch, capsys):
    monkeypatch.setattr(target, name, value)
    assert run_command(bench.main, ["compile"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: bench compile: {complaint}")
