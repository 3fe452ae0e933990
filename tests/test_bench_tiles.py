"""`bench tiles` as far as it goes without a GPU: its candidates, what it drops, what it leaves as it was, and a rehearsal in
Triton's interpreter. No time is judged here."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from dsfast.triton_kernels import linear_cross_entropy, mla_attention, mla_decode
from dsfast.triton_kernels.ahead import Compiled
from dsfast.triton_kernels.launch import Launch

from dsfast.bench import __main__ as bench
from dsfast.bench.gpu import cases, launched, run, tiles, tuning
from dsfast.bench.gpu.candidates import BOUNDS, CONSTANTS, MODULES, PARTS, SIDE_BOUNDS, Entry, candidates, entries
from dsfast.bench.gpu.child import rows_of
from dsfast.bench.gpu.clock import HostClock
from dsfast.bench.gpu.tuning import Tuner
from dsfast.bench.report import plain
from dsfast.command import run_command
from dsfast.ops import triton

Tiles = mla_attention.Tiles


def never() -> bool:
    return False


# candidates


def of(value, name: str = "table") -> set:
    found = candidates(Entry(name, {320: value}, 320))
    assert len(found) == len(set(found))
    assert value not in found
    return set(found)


def test_candidates_are_one_step_away_or_two_that_make_up_for_each_other():
    one = {
        Tiles(64, 64, 8, 2),
        Tiles(256, 64, 8, 2),
        Tiles(128, 32, 8, 2),
        Tiles(128, 128, 8, 2),
        Tiles(128, 64, 4, 2),
        Tiles(128, 64, 8, 1),
        Tiles(128, 64, 8, 3),
    }
    sides = {
        Tiles(*numbers)
        for numbers in (
            (64, 128, 8, 2),
            (256, 32, 8, 2),
            (64, 64, 8, 3),
            (256, 64, 8, 1),
            (128, 32, 8, 3),
            (128, 128, 8, 1),
        )
    }
    fewer_warps = {Tiles(64, 64, 4, 2), Tiles(128, 32, 4, 2), Tiles(128, 64, 4, 1)}
    assert of(Tiles(128, 64, 8, 2)) == one | sides | fewer_warps


def test_candidates_stay_within_bounds():
    assert of(Tiles(16, 16, 4, 1)) == {
        Tiles(32, 16, 4, 1), Tiles(16, 32, 4, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 4, 2), Tiles(32, 16, 8, 1),
        Tiles(16, 32, 8, 1), Tiles(16, 16, 8, 2),
    }  # fmt: skip
    for part in ("attention", "experts", "head", "decode"):
        module = vars(importlib.import_module(f"dsfast.triton_kernels.{cases.OPERATORS[part]}"))
        shipped = {
            value
            for name in ("_LARGE", "_SMALL", "_FLOAT32")
            for row in module[name].values()
            for value in row.values()
        }
        for found in {found for value in shipped for found in of(value)}:
            for name, number in found._asdict().items():
                if name == "ahead":
                    continue
                least, most = BOUNDS.get(name, SIDE_BOUNDS)
                assert least <= number <= most or (name, number) == ("slice", 0), found
                assert name in ("stages", "resident") or number & (number - 1) == 0, found


class AllFields(NamedTuple):
    bn: int
    warps: int
    stages: int
    resident: int
    groups: int
    ahead: bool


def test_each_field_has_its_steps_its_bounds_and_what_it_takes():
    """Fewer groups and fewer warps take more, as a larger tile does; what is resident or a choice of two takes nothing."""
    shipped = AllFields(16, 8, 5, 3, 4, False)
    one = ({"bn": 32}, {"warps": 4}, {"stages": 4}, {"resident": 2}, {"resident": 4}, {"groups": 2}, {"ahead": True})
    two = (
        {"bn": 32, "stages": 4},
        {"warps": 4, "stages": 4},
        {"groups": 2, "stages": 4},
        *({"resident": n, "ahead": True} for n in (2, 4)),
    )
    assert of(shipped) == {shipped._replace(**change) for change in (*one, *two)}


def test_of_a_choice_the_other_one_is_tried():
    shipped = mla_decode.Tiles(64, 8, 2, 0, 1)
    assert shipped._replace(ahead=True) in of(shipped)
    assert shipped in of(shipped._replace(ahead=True))


def test_tiles_of_attention_divide_each_other_as_its_kernels_want():
    assert {x for x in of(Tiles(64, 64, 8, 2), "mla_attention._LARGE['forward'][320]") if x.bs > x.bt} == set()
    assert {x for x in of(Tiles(64, 64, 8, 2), "mla_attention._LARGE['backward_q'][320]") if x.bs > x.bt} == set()
    assert {x for x in of(Tiles(64, 64, 8, 2), "mla_attention._LARGE['backward_kv'][320]") if x.bt > x.bs} == set()


def test_a_constant_has_its_halves_and_doubles():
    assert candidates(Entry("_WORDS", {"_WORDS": 8}, "_WORDS")) == [4, 16, 2, 32]
    assert candidates(Entry("_WORDS", {"_WORDS": 2}, "_WORDS")) == [1, 4, 8]


# entries, and others in their place


def read_by(part: str, name: str) -> list[str]:
    case = cases.build(part, name)
    with launched.on_an_h100():
        arguments = cases.draw(case.timed, "cpu", case.dtype)
        return [entry.name for entry in entries(part, lambda: launched.launches(part, arguments, start=False))]


def test_the_entries_of_a_case_are_those_that_its_launches_read():
    tables = {name: value for name, value in vars(mla_attention).items() if name.startswith("_")}
    constants = ["attention_pieces.HEADS_TOGETHER", "mla_attention_kept.KEPT"]
    forward, scores, product = (
        f"mla_attention{k}[320]" for k in ("._LARGE['forward']", "_kept._LARGE['scores']", "_kept._LARGE['product']")
    )
    assert read_by("attention", "V3") == [forward, scores, product, *constants]
    narrow = [f"mla_attention._LARGE[{k}]" for k in ("'forward'][96", "'backward_q'][80", "'backward_kv'][96")]
    assert read_by("attention", "500K") == [*narrow, *constants]
    assert {name: value for name, value in vars(mla_attention).items() if name.startswith("_")} == tables
    assert all(vars(mla_attention)[name] is value for name, value in tables.items())
    assert read_by("decode", "V3 H128") == ["mla_decode._LARGE[64][576]"]
    assert "moe_experts._LARGE['matrix'][128]" in read_by("experts", "E128")
    assert "moe_experts._LARGE['matrix'][128]" in read_by("mlp", "V3")
    assert read_by("head", "V3")[0] == "linear_cross_entropy._WORDS"
    assert read_by("output", "500K") == ["mla_output._FORWARD", "mla_output._BACKWARD"]


@pytest.mark.parametrize("part", PARTS)
def test_every_part_has_passes_and_the_constants_it_names(part):
    assert part in launched.PASSES
    values = {}
    for name in MODULES[part]:
        values |= vars(importlib.import_module(f"dsfast.triton_kernels.{name}"))
    for value in (values[name] for name in CONSTANTS.get(part, ())):
        assert type(value) is int or {"bn", "warps"} <= value._asdict().keys()


def launched_by(part: str, kernel: str, **changes) -> list[dict]:
    """What each launch of a kernel is given; `changes` are of the tiny case's arguments, by their places."""
    case = cases.build(part, "tiny", rehearsal=True)
    arguments = cases.draw(case.timed, "cpu", torch.bfloat16)
    for place, change in changes.items():
        arguments[int(place[1:])] = change(arguments[int(place[1:])])
    found = launched.launches(part, arguments, start=False)
    return [launch.arguments for launch in found if launch.kernel.__name__ == kernel]


def test_passes_are_those_of_a_training_step_and_of_an_evaluation():
    """Gradients of the residual and of each reader are read; the head's loss is made with and without gradients."""
    (norm,) = launched_by("norm", "backward_kernel")
    assert isinstance(norm["dh"], torch.Tensor)
    for uses in (1, 2, 3):
        (output,) = launched_by("output", "backward_kernel", _5=lambda _, uses=uses: uses)
        assert [output[name] is not None for name in ("dy", "dy_2", "dy_3")] == [n < uses for n in range(3)]
    assert [forward["GRADS"] for forward in launched_by("head", "forward_kernel")] == [True, False]


def test_what_has_nothing_to_do_is_no_launch():
    def none(x):
        return x[:0]

    assert launched_by("output", "forward_kernel")
    assert launched_by("output", "forward_kernel", _0=none, _2=none) == []


def test_what_is_replaced_is_put_back_whatever_happens():
    row = mla_decode._LARGE[64]
    shipped, other = row[576], row[576]._replace(bn=16)
    with launched.replaced(row, 576, other):
        assert mla_decode.plan(4, 128, 1024, (512, 128, 64, 128), 0, torch.bfloat16, 9, 132).tiles == other
    with pytest.raises(RuntimeError), launched.replaced(row, 576, other):
        raise RuntimeError
    assert row[576] is shipped
    words = linear_cross_entropy._WORDS
    with launched.replaced(vars(linear_cross_entropy), "_WORDS", 16):
        assert linear_cross_entropy._WORDS == 16
    with launched.replaced(linear_cross_entropy, "_WORDS", 32):
        assert linear_cross_entropy._WORDS == 32
    assert words == linear_cross_entropy._WORDS
    assert Launch.run.__name__ == "run"


# one case


@pytest.fixture
def nothing_started(monkeypatch):
    """Launches do nothing; the operator is right."""
    monkeypatch.setattr(Launch, "run", lambda self: None)
    monkeypatch.setattr(tuning.triton, "compile_together", lambda call: call())
    monkeypatch.setattr(tuning, "check_ours", lambda case, device: "")


def tuner(part: str = "decode", clock=None, **others) -> Tuner:
    case = cases.build(part, "tiny", rehearsal=True)
    arguments = cases.draw(case.timed, "cpu", torch.bfloat16)
    return Tuner(
        case, arguments, "cpu", **{"chip": "", "clock": clock or HostClock(), "expired": never, "rounds": 3, **others}
    )


def last(rows) -> dict[str, dict]:
    return {row["entry"]: json.loads(json.dumps(row)) for row in rows}


def bn(found: list[dict]) -> list[int]:
    return [one["tiles"]["bn"] for one in found]


ENTRY = "mla_decode._LARGE[16][96]"


@pytest.mark.usefixtures("nothing_started")
def test_candidates_are_timed_beside_the_shipped_tiles_and_the_fastest_stands_first():
    class Clock(HostClock):
        def seconds(self, call):  # each launch by its tiles: 64 ships
            constants = call.__self__.arguments
            return {16: 3.0, 32: 1.0, 64: 2.0, 128: 4.0}[constants["BN"]]

    row = last(tuner(clock=Clock(), most=99).rows())[ENTRY]
    assert row["status"] == "timed"
    assert row["kernels"] == ["attend_kernel 1"]
    assert row["shipped"] == mla_decode._LARGE[16][96]._asdict()
    assert bn(row["candidates"]) == sorted(bn(row["candidates"]), key=[32, 64, 16, 128].index)
    for found in row["candidates"]:
        assert found["of_shipped"] == {32: 0.5, 64: 1.0, 128: 2.0}[found["tiles"]["bn"]]
        assert found["seconds"]["count"] == 3
        assert found["launches"] == {"attend_kernel 1": found["seconds"]["median"]}
        assert not found["in_a_graph"]
    assert [one["tiles"] for one in row["candidates"] if one["shipped"]] == [row["shipped"]]


@pytest.mark.usefixtures("nothing_started")
@pytest.mark.parametrize(("seconds", "in_a_graph", "median"), [(9.9e-4, True, 1e-6), (1e-3, False, 1e-3)])
def test_launches_below_a_millisecond_are_timed_in_a_graph(seconds, in_a_graph, median):
    class Clock(HostClock):
        on_gpu = True

        def seconds(self, call):
            return seconds

        def graph_seconds(self, call):
            return 1e-6

    row = last(tuner(clock=Clock()).rows())[ENTRY]
    found = {(one["in_a_graph"], one["seconds"]["median"]) for one in row["candidates"]}
    assert found == {(in_a_graph, median)}


@pytest.mark.usefixtures("nothing_started")
def test_a_wrong_candidate_is_dropped_and_not_timed(monkeypatch):
    """The check sees the candidate in the table."""
    seen, timed = [], []

    def check(case, device):
        seen.append(mla_decode._LARGE[16][96])
        return "output: error 1.00e+00" if seen[-1].bn == 32 else ""

    monkeypatch.setattr(tuning, "check_ours", check)
    monkeypatch.setattr(HostClock, "seconds", lambda self, call: timed.append(call.__self__.arguments["BN"]) or 1.0)
    shipped = mla_decode._LARGE[16][96]
    row = last(tuner(most=99).rows())[ENTRY]
    assert seen[0] is shipped
    assert len(set(seen)) == len(seen) > 3
    assert set(timed) == {64, 128}
    wrong = [one for one in row["dropped"] if one["reason"] == "output: error 1.00e+00"]
    assert set(bn(wrong)) == {32}
    assert mla_decode._LARGE[16][96] is shipped


@pytest.mark.usefixtures("nothing_started")
def test_where_the_shipped_tiles_are_wrong_nothing_is_timed(monkeypatch):
    checked = []
    monkeypatch.setattr(tuning, "check_ours", lambda case, device: checked.append(1) or "output: error 2")
    row = last(tuner().rows())[ENTRY]
    assert (row["status"], row["candidates"]) == ("failed: the shipped tiles: output: error 2", [])
    assert len(checked) == 1
    assert not tiles.sound({"parts": {}, "rows": [row]})


@pytest.mark.usefixtures("nothing_started")
def test_timing_that_fails_is_said(monkeypatch):
    def fails(self, call):
        raise RuntimeError("capture\nlost")

    monkeypatch.setattr(HostClock, "seconds", fails)
    row = last(tuner().rows())[ENTRY]
    assert row["status"] == "failed: RuntimeError: capture"
    assert len(row["candidates"]) == 1 + tuning.MOST or len(row["dropped"]) > 0


@pytest.mark.usefixtures("nothing_started")
@pytest.mark.parametrize(
    ("looks", "status", "timed"), [(0, run.OUT_OF_TIME, 0), (1, run.OUT_OF_TIME, 0), (2, "timed", 1), (3, "timed", 2)]
)
def test_what_there_was_no_time_for_is_said(looks, status, timed):
    """There is a look at the time before the entry, before the shipped tiles are checked, and before each candidate is."""
    turns = iter([*[False] * looks, *[True] * 99])
    row = last(tuner(expired=lambda: next(turns)).rows())[ENTRY]
    assert (row["status"], len(row.get("candidates", []))) == (status, timed)
    assert (run.OUT_OF_TIME in {one["reason"] for one in row.get("dropped", [])}) == (timed > 0)
    assert tiles.sound({"parts": {}, "rows": [row]})


@pytest.mark.usefixtures("nothing_started")
def test_what_changes_no_launch_is_dropped_and_an_entry_of_such_candidates_has_no_row():
    rows = last(tuner("experts", most=99).rows())
    up = rows["moe_experts._LARGE['up'][16]"]
    assert {16} == {one["tiles"]["bn"] // 4 for one in up["candidates"]}  # I 16 takes 16 columns, whatever the tiles
    assert tuning.SAME in {one["reason"] for one in up["dropped"]}
    assert "linear_cross_entropy._WORDS" not in last(tuner("head").rows())


@pytest.mark.usefixtures("nothing_started")
def test_candidates_run_on_the_memory_of_the_shipped_ones():
    found = tuner("attention")
    shipped = found.launches(start=False)
    entry = Entry("", mla_attention._LARGE["backward_kv"], 96)
    _, others, _ = found.trials(entry, shipped)
    for trial in others:
        assert list(trial.launches) == ["backward_kernel 1"]
        (launch,) = trial.launches.values()
        ours = shipped["backward_kernel 1"]
        assert launch.arguments["KT"] == trial.value.bt
        assert all(x is ours.arguments[name] for name, x in launch.arguments.items() if isinstance(x, torch.Tensor))


def test_only_tensors_of_the_same_shape_are_exchanged():
    case = cases.build("norm", "tiny", rehearsal=True)
    arguments = cases.draw(case.timed, "cpu", torch.bfloat16)
    fewer = [x[:5] if isinstance(x, torch.Tensor) and x.dim() == 2 else x for x in arguments]
    shipped, other = (launched.launches("norm", given, start=False)[0] for given in (arguments, fewer))
    other.arguments["weight"] = other.arguments["weight"].clone()
    found = tuning._on_the_memory_of(other, shipped).arguments
    assert found["weight"] is shipped.arguments["weight"]
    assert all(found[name] is other.arguments[name] for name in ("x", "residual", "y", "h", "rstd"))


def test_a_launch_that_the_shipped_tiles_alone_need_is_in_their_time(monkeypatch):
    found = tuner("output")
    shipped = found.launches(start=False)
    *kept, alone = shipped
    monkeypatch.setattr(Tuner, "launches", lambda tuner, start: {name: shipped[name] for name in kept})
    ours, [other], dropped = found.trials(Entry("", {"tiles": 8}, "tiles"), shipped)
    assert (list(ours.launches), list(other.launches)) == ([alone], [])
    assert {one["reason"] for one in dropped} == {tuning.SAME}


# compiled


@pytest.mark.parametrize(
    ("programs", "warps", "registers", "repeated", "expected"),
    [
        (
            1057,
            4,
            128,
            None,
            3 * 528 / 1057,
        ),  # four programs a multiprocessor, of 132: two whole rounds and one program
        (264, 4, 255, None, 12 / 8),  # two, with 8 warps of the 12 that hide what they wait for
        (528, 4, 128, 2.0, 2.0),
    ],
)
def test_an_estimate_is_of_operands_idle_multiprocessors_waits_and_work_done_twice(
    programs, warps, registers, repeated, expected
):
    compiled = Compiled("a", "sm_90", registers, 0, 1024, 1, 1, repeated, False, ())
    launch = SimpleNamespace(options={"num_warps": warps}, grid=(programs,))
    trial = tuning.Trial(Tiles(64, 128, warps, 2), {"a 1": launch}, [compiled])
    assert trial.estimate() == pytest.approx((1 / 64 + 1 / 128) * expected)


def launches_of(*kernels: str) -> dict:
    return {f"{name} 1": SimpleNamespace(kernel=SimpleNamespace(__name__=name)) for name in kernels}


def test_other_launches_are_compiled_of_the_most_promising_and_their_faults_count(monkeypatch):
    """One fault of a candidate is enough, whatever its other launches are."""
    monkeypatch.setattr(tuning, "compile_named", lambda launch, chip, name: (None, ["spilled"] if name == "b" else []))
    ours, *others = (tuning.Trial(value, launches_of("a", "b", "c")) for value in range(4))
    dropped = []
    left = tuner(chip="sm_90", most=2).compiled(ours, others, dropped)
    assert [trial.value for trial in left] == [3]
    assert dropped == [{"tiles": 1, "reason": "spilled"}, {"tiles": 2, "reason": "spilled"}]


def fake_compiler(monkeypatch, faults) -> list:
    """Compiles nothing: `faults` of a launch are what it says; registers follow from the tiles."""
    asked = []

    def compile_named(launch, chip, name):
        asked.append((name, chip))
        warps = launch.options["num_warps"]
        registers = 255 if launch.rows >= 256 else 128
        return Compiled(name, chip, registers, 0, 1024 * launch.options["num_stages"], 1, 1, 1.0, False, ()), faults(
            launch, warps
        )

    monkeypatch.setattr(tuning, "compile_named", compile_named)
    return asked


@pytest.mark.usefixtures("nothing_started")
def test_candidates_that_break_the_limits_are_dropped_with_the_reason(monkeypatch):
    asked = fake_compiler(monkeypatch, lambda launch, warps: ["spilled"] if launch.arguments.get("BT") == 256 else [])
    rows = last(rows_of("attention", False, None, 60.0, tiles_of="V3", planned=True))
    row = rows["mla_attention._LARGE['forward'][320]"]
    assert {chip for _, chip in asked} == {"sm_90"}
    assert {one["tiles"]["bt"] for one in row["dropped"]} == {256}
    assert {one["reason"] for one in row["dropped"]} == {"spilled"}
    ours, *others = row["candidates"]
    assert ours["shipped"]
    assert 256 not in {one["tiles"]["bt"] for one in others}
    assert [one["estimate"] for one in others] == sorted(one["estimate"] for one in others)
    assert (row["status"], "seconds" in ours) == ("compiled", False)
    assert tiles.sound({"parts": {}, "rows": list(rows.values())})


@pytest.mark.usefixtures("nothing_started")
def test_what_spills_for_certain_is_not_even_compiled(monkeypatch):
    """256 x 256 sums of 256 threads, 128 x 256 of 128 threads: 256 of each."""
    fake_compiler(monkeypatch, lambda launch, warps: [])
    row = last(rows_of("experts", False, None, 60.0, tiles_of="E128", planned=True))[
        "moe_experts._LARGE['project'][128]"
    ]
    assert {one["reason"] for one in row["dropped"]} == {"its sums alone take 256 registers of a thread, of 255"}
    sums = {(one["tiles"]["bm"], one["tiles"]["bn"], one["tiles"]["warps"]) for one in row["dropped"]}
    assert sums == {(256, 256, 8), (128, 256, 4)}


@pytest.mark.usefixtures("nothing_started")
def test_an_entry_of_which_nothing_is_left_has_a_row_that_says_why(monkeypatch):
    monkeypatch.setattr(tuning, "_too_many_sums", lambda value: "too many")
    row = last(tuner().rows())[ENTRY]
    assert [one["shipped"] for one in row["candidates"]] == [True]
    assert "too many" in {one["reason"] for one in row["dropped"]}


@pytest.mark.usefixtures("nothing_started")
def test_only_the_most_promising_are_timed(monkeypatch):
    fake_compiler(monkeypatch, lambda launch, warps: [])
    row = last(tuner("attention", chip="sm_90", most=2).rows())["mla_attention._LARGE['forward'][96]"]
    assert len(row["candidates"]) == 3
    assert {one["reason"] for one in row["dropped"]} == {"beyond the 2 most promising"}
    tried = candidates(Entry("mla_attention._LARGE['forward'][96]", mla_attention._LARGE["forward"], 96))
    assert 2 + len(row["dropped"]) == len(tried)
    assert [one["shipped"] for one in row["candidates"]].count(True) == 1


def test_one_that_does_not_compile_is_a_fault_and_no_error(monkeypatch):
    case = cases.build("rope", "500K")
    with launched.on_an_h100():
        (launch, _) = launched.launches("rope", cases.draw(case.timed, "cpu", case.dtype), start=False)
    compiled, faults = tuning.compile_named(launch, "sm_90", "rope_kernel")
    assert (compiled.kernel, compiled.spills, faults) == ("rope_kernel", 0, [])
    del launch.arguments["x"]
    compiled, [fault] = tuning.compile_named(launch, "sm_90", "rope_kernel")
    assert compiled is None
    assert fault.startswith("rope_kernel on sm_90: does not compile: ")


# the run


@pytest.fixture
def cases_run(monkeypatch):
    """What was run, for how long; every case takes 30 seconds of a clock of its own, and has rows of two entries."""
    now, asked = [0.0], []

    def run_part(child, part, bounds, rehearsal, seconds, watch, tiles_of, planned):
        asked.append((part, tiles_of, seconds))
        now[0] += 30.0
        rows = [{"part": part, "case": tiles_of, "entry": entry, "status": "timed"} for entry in ("a", "b")]
        watch(rows[:1])
        watch(rows[:1])
        return {"status": "done", "seconds": 30.0}, rows, f"{part} said\n"

    monkeypatch.setattr(tiles, "run_part", run_part)
    monkeypatch.setattr(run, "Child", lambda: SimpleNamespace(end=lambda: ""))
    monkeypatch.setattr(tiles, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(run, "gpu_facts", lambda: {"name": "G", "memory_gb": 1, "driver": "1", "cuda": "13"})
    return asked


def test_cases_run_until_the_time_is_up_and_what_there_is_is_kept_after_each_entry(cases_run):
    kept = []
    chosen = [("attention", "V3"), ("head", "V3"), ("decode", "500K")]
    found = tiles.run_tiles(
        chosen, 65, False, False, lambda text: None, lambda found, said: kept.append((len(found["rows"]), said))
    )
    assert cases_run == [("attention", "V3", 65.0), ("head", "V3", 35.0)]
    assert kept == [(1, ""), (2, "attention said\n"), (3, ""), (4, "head said\n"), (4, "")]
    assert found["parts"]["decode 500K"] == {"status": run.OUT_OF_TIME, "seconds": 0.0}
    assert (found["measured_on"], found["gpu"]["name"]) == ("GPU", "G")
    assert tiles.sound(found)
    found["parts"]["head V3"]["status"] = "failed: RuntimeError"
    assert not tiles.sound(found)


def test_cases_are_chosen_by_part_and_model():
    assert tiles.choose_cases(["decode", "head"], None, False) == [
        ("head", "V3"), ("head", "500K"), ("decode", "V3 H16"), ("decode", "V3 H128"), ("decode", "500K")
    ]  # fmt: skip
    assert tiles.choose_cases(["experts"], "V3", False) == [("experts", "E128")]
    assert tiles.choose_cases(["attention"], "V3", False) == [("attention", "V3")]
    assert tiles.choose_cases(["head", "experts"], "500K", False) == [("experts", "500K"), ("head", "500K")]
    assert tiles.choose_cases(["head"], "500K", True) == [("head", "tiny")]


def test_rows_are_looked_at_while_a_process_runs(monkeypatch):
    monkeypatch.setattr(run, "LOOK", 0.05)
    looks = []
    slow = "import sys, time; sys.stdin.read(); time.sleep(0.5); print('said', file=sys.stderr)"
    assert run.Child([sys.executable, "-c", slow]).run("x", 30, lambda: looks.append(1)) == ("done", "said\n")
    assert looks
    begin = time.perf_counter()
    hangs = "import time; time.sleep(60)"
    assert run.Child([sys.executable, "-c", hangs]).run("", 1, lambda: None) == (run.OUT_OF_TIME, "")
    assert time.perf_counter() - begin < 30


def test_everything_found_is_shown():
    spread = {"median": 2e-6, "lower": 1e-6, "upper": 3e-6, "count": 5}
    facts = {"tiles": {"bt": 128, "bs": 64}, "shipped": True, "registers": 99, "shared": 1024, "estimate": 0.5}
    timed = {"seconds": spread, "of_shipped": 0.875, "launches": {"a 1": 1.5e-6, "b 1": 5e-7, "c 1": 3e-7}}
    rows = [
        {"part": "head", "case": "V3", "entry": "m._LARGE['a'][1]", "kernels": ["a 1", "b 1"], "status": "timed",
         "candidates": [facts | timed, facts | timed | {"launches": dict.fromkeys("abcd", 7.7e-6)}],
         "dropped": [{"tiles": {"bt": 16}, "reason": "spilled"}, {"tiles": 7, "reason": "spilled"}]},
        {"part": "head", "case": "V3", "entry": "m.B", "status": tuning.OUT_OF_TIME},
    ]  # fmt: skip
    found = {"measured_on": "nothing", "gpu": None, "parts": {"head V3": {"status": "failed: x"}}, "rows": rows}
    shown = plain({
        "machine": {"processor": "P", "threads": 2}, "versions": {"torch": "2", "triton": "3"}, "native": {"reason": ""},
        "fallbacks": [], "commit": None, "settings": {"bench": "tiles", "plan": True}, "results": found,
    })  # fmt: skip
    for text in (
        "Measured: nothing, triton 3", "head V3  m._LARGE['a'][1]: a 1, b 1", "bt 128 bs 64 (shipped)", "2.0", "0.875 x",
        "1.5 + 0.5 + 0.3", "99", "dropped: bt 16; 7: spilled", f"head V3  m.B: {run.OUT_OF_TIME}", "head V3: failed: x",
    ):  # fmt: skip
        assert text in shown
    assert "7.7" not in shown, "four launches are too many for a line"


def command(out, *arguments: str, interpreted: bool = True) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpreted else "0"}
    words = [sys.executable, "-m", "dsfast.bench", "tiles", *arguments, "--out", str(out)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


needs_interpreter = pytest.mark.skipif(bool(triton.cannot_interpret()), reason="Triton cannot interpret")


@needs_interpreter
def test_a_rehearsal_goes_from_the_command_to_its_files(tmp_path):
    child = command(tmp_path, "decode", "--rehearse")
    assert child.returncode == 0, child.stderr
    found = json.loads((tmp_path / "rehearsal.json").read_text())
    [row] = found["results"]["rows"]
    assert (row["entry"], row["status"], len(row["candidates"])) == ("mla_decode._FLOAT32[16][96]", "timed", 3)
    assert found["results"]["measured_on"] == "CPU (rehearsal)"
    assert found["settings"] == {
        "bench": "tiles", "cases": [["decode", "tiny"]], "seconds": bench.BUDGET, "rehearsal": True, "plan": False
    }  # fmt: skip
    assert "REHEARSAL" in (tmp_path / "rehearsal.txt").read_text()
    assert "check: decode mla_decode._FLOAT32[16][96]" in (tmp_path / "rehearsal.log").read_text()


@needs_interpreter
def test_a_run_cut_by_seconds_ends_in_order(tmp_path):
    child = command(tmp_path, "decode", "--rehearse", "--seconds", "1")
    assert child.returncode == 1, child.stderr  # nothing was measured
    found = json.loads((tmp_path / "rehearsal.json").read_text())["results"]
    assert (found["rows"], found["parts"]) == ([], {"decode tiny": {"status": run.OUT_OF_TIME, "seconds": 0.0}})


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["head"], "the following arguments are required: --out"),
        (["--out", "DIR"], "bench tiles: nothing to try; name one or more of attention, experts"),
        (["head", "attn", "--out", "DIR"], "bench tiles: unknown part 'attn'; known: attention, decode, "),
        (["head", "--case", "V4", "--out", "DIR"], "bench tiles: unknown case 'V4'; known: 500K, V3"),
        (["head", "--out", "DIR", "--seconds", "0"], "expected a whole number"),
        (["head", "output", "--case", "V3", "--out", "DIR"], "bench tiles: no case V3 of output; leave --case out or"),
        (["head", "--out", "DIR"], "bench tiles: torch finds no GPU; nothing is measured"),
        (
            ["head", "--out", "DIR", "--rehearse"],
            "bench tiles --rehearse runs the kernels in Triton's interpreter: set",
        ),
        (["head", "--out", "DIR", "--plan", "--rehearse"], "bench tiles --plan compiles: it cannot --rehearse"),
        (["head", "--out", "/proc/no/such", "--plan"], "--out /proc/no/such: cannot be written to"),
    ],
)
def test_bad_input_is_one_line_and_2_and_nothing_is_written(arguments, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(triton, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "out"
    assert run_command(bench.main, ["tiles", *(str(out) if a == "DIR" else a for a in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert complaint in line
    assert not out.exists()


def test_a_gpu_whose_limits_are_not_known_is_refused(monkeypatch):
    monkeypatch.setattr(tiles, "check_gpu", lambda rehearsal, bench: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    with pytest.raises(tiles.UserError, match="the limits of sm_89 are not known; known: gfx942, sm_100, sm_80, sm_90"):
        tiles.check_can_try(False, False)
    monkeypatch.setattr(triton, "INTERPRETED", True)
    with pytest.raises(tiles.UserError, match="TRITON_INTERPRET is set, and Triton then compiles nothing"):
        tiles.check_can_try(False, True)
