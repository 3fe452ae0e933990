"""`bench gpu` as far as it goes without a GPU: its logic with clocks and peers of the tests' own, and a rehearsal in Triton's
interpreter. No time is judged here."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from dsfast.bench import __main__ as bench
from dsfast.bench import timing
from dsfast.bench.cases import Work
from dsfast.bench.gpu import cases, child, operators, peers, recall, run, show, training, whole
from dsfast.bench.gpu import clock as clock_module
from dsfast.bench.gpu import tests as gpu_tests
from dsfast.bench.gpu.bounds import Bounds, measure_bounds
from dsfast.bench.gpu.child import rows_of
from dsfast.bench.gpu.clock import GpuClock, HostClock
from dsfast.bench.gpu.figures import FIGURES, Figure, figures
from dsfast.bench.gpu.peers.peer import GpuPeer, Prepared, RefusedError, direct
from dsfast.bench.peers import operators as eager
from dsfast.bench.report import plain
from dsfast.command import run_command
from dsfast.ops import native, triton

BOUNDS = Bounds(bandwidth=4e12, bfloat16=8e14, tf32=4e14, float32=5e13, size=8192)
needs_interpreter = pytest.mark.skipif(
    bool(triton.missing() or triton.cannot_interpret()), reason="Triton cannot interpret"
)
needs_native = pytest.mark.skipif(native.status()[0] is None, reason="the C++ kernels stand in for Triton's here")


def never() -> bool:
    return False


def step_rows(part: str = "step", expired=never) -> list[dict]:
    """What a rehearsed step's row is like each time it is there; the same dict, which grows."""
    return [json.loads(json.dumps(row)) for row in whole.run_step(HostClock(), None, True, part, expired, 1)]


def test_a_step_is_recorded_in_each_way_and_one_that_fails_is_left_out(monkeypatch):
    count, seen = torch.zeros(()), []

    class Counting:
        def __call__(self):
            count.add_(1)

        def state(self):
            return [count]

    def record(step, branched):
        step()
        seen.append(branched)
        if branched:
            raise RuntimeError
        return SimpleNamespace(replay=len(seen))

    monkeypatch.setattr(whole, "record", record)
    assert whole._recordings(Counting()) == {"dsfast, one chain": 1}
    assert seen == [False, True]
    assert count == 0


def run_tiny(part: str, expired=never) -> dict:
    *_, row = operators.run_case(
        cases.build(part, "tiny", rehearsal=True), HostClock(), BOUNDS, "cpu", expired, rounds=1
    )
    return row


# clock, bounds


class Events:
    """Stands for a GPU: an event recorded takes the time of a clock that the calls move on."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def event(self):
        events = self

        class Event:
            def record(self):
                self.at = events.now
                events.log.append("event")

            def synchronize(self):
                events.log.append("wait")

            def elapsed_time(self, end):
                return end.at - self.at  # milliseconds

        return Event()

    def take(self, name: str, milliseconds: float) -> None:
        self.log.append(name)
        self.now += milliseconds


def test_a_call_is_timed_between_two_events_after_the_flush():
    events = Events()
    clock = GpuClock(events.event, lambda: events.take("flush", 50.0), lambda: events.take("head start", 2.0))
    assert clock.seconds(lambda: events.take("call", 3.0)) == pytest.approx(3e-3)
    assert events.log == ["flush", "head start", "event", "call", "event", "wait"]


def test_launches_are_part_of_the_time_of_whole_steps_alone(monkeypatch):
    """Which PyTorch launches one by one; an operator's are hidden in a graph."""

    class Clock:
        def __init__(self, ahead: bool = True):
            self.ahead = ahead

        @classmethod
        def from_the_host(cls):
            return cls(ahead=False)

    monkeypatch.setattr(child, "GpuClock", Clock)
    for name in ("run_step", "run_generation"):
        monkeypatch.setattr(child, name, lambda clock, *_: [clock.ahead])
    monkeypatch.setattr(child, "_operator", lambda part, rehearsal, run, expired: [run.keywords["clock"].ahead])
    found = {part: list(rows_of(part, False, None, 1.0)) for part in ("step", "compiled", "generate", "norm")}
    assert found == {"step": [False], "compiled": [False], "generate": [False], "norm": [True]}


def test_variants_take_turns_by_the_clock():
    events = Events()
    clock = GpuClock(events.event, lambda: None, lambda: None)
    calls = {name: (lambda name=name, ms=ms: events.take(name, ms),) for name, ms in (("a", 1.0), ("b", 2.0))}
    taken = timing.take_turns(calls, 3, 10.0, clock.seconds)
    assert taken == {"a": [(pytest.approx(1e-3),)] * 3, "b": [(pytest.approx(2e-3),)] * 3}
    assert [name for name in events.log if name in calls] == ["a", "b"] * 3


def test_bounds_are_the_best_of_what_was_reached():
    found = measure_bounds(HostClock(), "cpu", copy_bytes=4096, size=16)
    assert set(found) == {field.name for field in dataclasses.fields(Bounds)}
    assert found["size"] == 16
    assert all(value > 0 for value in found.values())
    assert torch.get_float32_matmul_precision() == "highest"


def test_bounds_are_all_that_was_moved_and_computed_over_the_shortest_time(monkeypatch):
    products, taken = [], iter([1 / 32, 1 / 64] * 20)
    mm = torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda x, y: (products.append((x.dtype, torch.get_float32_matmul_precision())), mm(x, y))[1]
    )
    found = measure_bounds(SimpleNamespace(seconds=lambda call: (call(), next(taken))[1]), "cpu", 4096, size=16)
    assert found["bandwidth"] == 64 * 2 * 4096  # read and written
    assert found["bfloat16"] == found["tf32"] == found["float32"] == 64 * 2 * 16**3
    assert list(dict.fromkeys(products)) == [
        (torch.bfloat16, "highest"), (torch.float32, "high"), (torch.float32, "highest"),
    ]  # fmt: skip


def test_a_call_in_a_graph_has_its_share_of_the_graphs_time(monkeypatch):
    """The median of the replays, of which one is not timed."""
    times, count = iter([90.0, 60.0, 20.0, 40.0, 50.0, 400.0]), []
    events = Events()
    graph = SimpleNamespace(replay=lambda: events.take("replay", next(times)))
    monkeypatch.setattr(clock_module, "record", lambda calls: (calls(), graph)[1])
    clock = GpuClock(events.event, lambda: None, lambda: None)
    assert clock.graph_seconds(lambda: count.append(None)) == pytest.approx(50e-3 / len(count))
    assert len(count) == clock_module.GRAPH_CALLS > 1
    assert events.log.count("replay") == 1 + clock_module.REPLAYS


def test_the_ideal_time_is_that_of_the_narrower_bound():
    assert BOUNDS.ideal_seconds(Work(8 * 10**14, 1), torch.bfloat16) == 1.0
    assert BOUNDS.ideal_seconds(Work(5 * 10**13, 1), torch.float32) == 1.0
    assert BOUNDS.ideal_seconds(Work(1, 10**12), torch.bfloat16) == 0.5  # 2 bytes each
    assert BOUNDS.ideal_seconds(Work(1, 10**12), torch.float32) == 1.0


# cases


@pytest.mark.parametrize("part", cases.SIZES)
def test_every_size_can_be_built_and_is_checked_no_larger(part):
    assert set(cases.SIZES) == set(cases.TINY) == set(cases.OPERATORS)
    for name in cases.SIZES[part]:
        case = cases.build(part, name)
        assert case.forward.bytes_of(2) > 0
        assert case.dtype == (torch.float32 if part in ("route", "adamw", "muon") else torch.bfloat16)
        for letter, size in case.checked_sizes.items():
            assert (sum(size) <= sum(case.sizes[letter])) if letter == "lengths" else size <= case.sizes[letter]


@needs_native
@pytest.mark.filterwarnings("ignore")
def test_a_paged_cache_is_timed_beside_peers_that_gather_it(monkeypatch):
    sizes = {"B": 2, "C": 24, "H": 4, "R": 16, "Dn": 16, "Dr": 16, "Dv": 16, "S": 8}
    monkeypatch.setitem(cases.TINY["decode"], "tiny", (sizes, sizes))
    row = run_tiny("decode")
    assert row["check"] == ""
    assert set(row["passes"]["forward"]["variants"]) == {"dsfast", "eager", "SDPA expanded"}
    assert cases.SIZES["decode"]["V3 H16 paged"][0]["S"] == 64


def test_mixed_documents_have_as_many_tokens_as_the_dense_ones():
    assert sum(cases.MIXED) == cases.SIZES["attention"]["V3"][0]["N"]


def test_work_of_the_500k_norm_is_counted_by_hand():
    case = cases.build("norm", "500K")
    assert case.forward.bytes_of(2) == 2 * (4 * 8192 * 128 + 128)  # x, residual, y, h, and the weight


# one case


@needs_native
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", cases.TINY)
def test_a_case_is_checked_and_timed_with_the_peers_that_run_here(part):
    row = run_tiny(part)
    assert row["check"] == ""
    ready = [name for name, peer in row["peers"].items() if peer["status"] == "ready"]
    assert ready, row["peers"]
    assert {peer["status"] for peer in row["peers"].values()} <= {"ready", "missing", "refused"}
    assert all(peer["reason"] for peer in row["peers"].values() if peer["status"] != "ready")
    assert list(row["passes"]) == {
        "adamw": ["update"],
        "muon": ["update"],
        "decode": ["forward"],
        "newton_schulz": ["forward"],
    }.get(part, ["forward", "forward+backward"])
    for timed in row["passes"].values():
        assert set(timed["variants"]) == {"dsfast", *ready}
        for variant in timed["variants"].values():
            median = variant["seconds"]["median"]
            assert variant["bytes_per_second"] == timed["bytes"] / median
            assert variant["bound_share"] == timed["ideal_seconds"] / median
            assert variant["over_dsfast"] == median / timed["variants"]["dsfast"]["seconds"]["median"]


def peer(what: str, function, missing=lambda: "") -> GpuPeer:
    return GpuPeer(what, lambda arguments, positions: direct(function, arguments, positions), missing)


def broken(*arguments):
    raise RuntimeError("no kernel\nfor this")


def refusing(arguments, positions) -> Prepared:
    raise RefusedError("heads of 48")


def forward_only(x, weight, eps, residual):
    y, h = eager.rms_norm(x, weight, eps, residual)
    return y.detach(), h.detach()


@needs_native
def test_what_is_missing_wrong_or_broken_is_named_and_the_rest_goes_on(monkeypatch, caplog):
    caplog.set_level("DEBUG", "dsfast.bench")
    others = {
        "right": peer("it", eager.rms_norm),
        "wrong": peer("1% off", lambda *a: tuple(x * 1.01 for x in eager.rms_norm(*a))),
        "broken": peer("raises", broken),
        "missing": peer("not here", broken, lambda: "not installed"),
        "refusing": GpuPeer("refuses", refusing),
        "no backward": peer("no derivative", forward_only),
    }
    monkeypatch.setitem(peers.PEERS, "norm", others)
    row = run_tiny("norm")
    found = {name: (state["status"], state["reason"]) for name, state in row["peers"].items()}
    assert found["right"] == found["no backward"] == ("ready", "")
    assert found["wrong"][0] == "wrong"
    assert found["wrong"][1].startswith("output 0: error")
    assert found["broken"] == ("failed", "RuntimeError: no kernel")
    assert 'raise RuntimeError("no kernel' in caplog.text
    assert found["missing"] == ("missing", "not installed")
    assert found["refusing"] == ("refused", "heads of 48")
    both = row["passes"]["forward+backward"]["variants"]
    assert set(both) == {"dsfast", "right", "no backward"}
    assert "failed" in both["no backward"]
    assert "seconds" in both["right"]


@needs_native
def test_a_peer_that_updates_otherwise_is_wrong(monkeypatch):
    def off(*arguments):
        ours(*arguments)
        arguments[0][-1].mul_(1.01)

    ours = cases.build("adamw", "tiny", rehearsal=True).ours
    monkeypatch.setattr(operators, "peers_of", lambda case: {"right": peer("it", ours), "wrong": peer("1% off", off)})
    found = run_tiny("adamw")["peers"]
    assert {name: state["status"] for name, state in found.items()} == {"right": "ready", "wrong": "wrong"}


@needs_native
def test_a_wrong_kernel_is_not_timed(monkeypatch):
    right = operators.checks.check
    monkeypatch.setattr(operators.checks, "check", lambda *a, **o: [{**row, "passed": False} for row in right(*a, **o)])
    row = run_tiny("rope")
    assert row["check"].startswith("output: error")
    assert row["passes"] == {}
    assert not run.sound({"parts": {}, "rows": [row]})


@needs_native
@needs_native
@pytest.mark.parametrize(("looks", "ready"), [(0, []), (1, []), (2, []), (3, ["a"]), (4, ["a", "b"])])
def test_what_is_ready_when_the_time_is_up_is_timed(looks, ready, monkeypatch):
    """There is a look at the time before each of two peers is checked, and before each is prepared."""
    others = {name: peer("it", eager.swiglu_mlp) for name in ("a", "b")} | {"c": peer("", broken, lambda: "gone")}
    monkeypatch.setitem(peers.PEERS, "mlp", others)
    turns = iter([*[False] * looks, *[True] * 4])
    row = run_tiny("mlp", lambda: next(turns))
    assert set(row["passes"]["forward+backward"]["variants"]) == {"dsfast", *ready}
    assert {name: state["status"] for name, state in row["peers"].items()} == {
        "a": "ready" if "a" in ready else "skipped", "b": "ready" if "b" in ready else "skipped", "c": "missing"
    }  # fmt: skip
    assert ("skipped: mlp tiny: b: out of time" in plain(document(run_document([row])))) == ("b" not in ready)


@needs_native
def test_a_case_says_what_it_has_so_far():
    grown = [
        json.loads(json.dumps(row))
        for row in operators.run_case(cases.build("mlp", "tiny", True), HostClock(), BOUNDS, "cpu", never, rounds=1)
    ]
    assert [list(row["passes"]) for row in grown] == [[], ["forward+backward"], ["forward", "forward+backward"]]
    assert [row["check"] for row in grown] == [""] * 3


def test_sdpa_refuses_documents_of_unequal_lengths_and_says_why():
    arguments = cases.draw(cases.cases.attention((3, 5), "", 2, 8, 8, 8)[0], "cpu", torch.float32)
    with pytest.raises(RefusedError, match="a mask of 8 x 8"):
        peers.PEERS["attention"]["SDPA math"].prepare(arguments, ())


@pytest.mark.parametrize("lengths", [(16, 16), (21, 1, 10)], ids=["equal", "mixed"])
@pytest.mark.filterwarnings("ignore")
def test_flex_attention_masks_what_the_reference_masks(lengths, monkeypatch):
    """Uncompiled, as it runs without a GPU: inputs, masks and the way back to the operator's shape."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    case = cases.cases.attention(lengths, "", 2, 16, 8, 16)[0]
    arguments = cases.draw(case, "cpu", torch.float32)
    prepared = peers.PEERS["attention"]["FlexAttention"].prepare(arguments, ())
    with operators.ops.use("reference"):
        torch.testing.assert_close(prepared.result(prepared.run()), case.function(*arguments), rtol=1e-4, atol=1e-5)


def test_short_calls_are_also_timed_in_a_graph():
    class Clock(HostClock):
        on_gpu = True
        failed = False

        def graph_seconds(self, call):
            self.failed = self.failed or call() == "cannot"
            if self.failed:  # as in torch 2.11, where no capture succeeds after one that failed
                raise RuntimeError("capture: waits for the host")
            return 2e-6

        def kernels(self, call):
            return [{"name": call(), "begin": 0.0, "time": 1.0}]

    makes = {
        "dsfast": lambda: lambda: "fine",
        "other": lambda: lambda: "cannot",
        "long": lambda: lambda: time.sleep(2e-3),
        "broken": lambda: 1 / 0,
    }
    passes, calls, clock = {}, {}, Clock()
    for name in ("forward+backward", "forward"):
        passes[name], calls[name] = operators.time_pass(makes, Work(0, 10), torch.float32, clock, BOUNDS, 3)
    operators.time_in_graphs(passes, calls, clock)
    for found in (passes[name]["variants"] for name in passes):
        assert found["dsfast"]["graph_seconds"] == 2e-6
        assert found["dsfast"]["launches"] == 1
        assert found["dsfast"]["kernels"][0]["name"] == "fine"
        assert found["other"]["graph_reason"] == "RuntimeError: capture: waits for the host"
        assert not {"launches", "kernels"} & (set(found["other"]) | set(found["long"]))
        assert not {"graph_seconds", "graph_reason"} & set(found["long"])
        assert found["broken"] == {"failed": "ZeroDivisionError: division by zero"}


def test_what_a_call_starts_is_in_the_order_in_which_it_begins(monkeypatch):
    def event(name, begin, end, device=torch.autograd.DeviceType.CUDA):
        return SimpleNamespace(name=name, time_range=SimpleNamespace(start=begin, end=end), device_type=device)

    events = [event("b", 12.5, 14.0), event("host", 0.0, 1.0, torch.autograd.DeviceType.CPU), event("a", 10.0, 13.0)]
    profile = nullcontext(SimpleNamespace(events=lambda: events))
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    clock = GpuClock(event=lambda: None, flush=lambda: None, wait=lambda: None)
    assert clock.kernels(lambda: None) == [
        {"name": "a", "begin": 0.0, "time": 3.0}, {"name": "b", "begin": 2.5, "time": 1.5}
    ]  # fmt: skip
    events.clear()
    assert clock.kernels(lambda: None) == []


# figures


def variants(**over: float) -> dict:
    ours = {"seconds": {"median": 1e-3}, "over_dsfast": 1.0, "flops_per_second": 4e14, "bytes_per_second": 3.5e12,
            "bound_share": 0.9, "graph_seconds": 1e-5, "launches": 1, "tokens_per_second": 6000.0, "memory_gb": 0.5}  # fmt: skip
    return {"dsfast": ours} | {name: {"over_dsfast": ratio} for name, ratio in over.items()}


def row(part: str, case: str, run: str, **over: float) -> dict:
    return {"part": part, "case": case, "passes": {run: {"variants": variants(**over)}}}


def test_generation_with_other_tokens_than_launched_one_by_one_is_not_timed(monkeypatch):
    right, clock = whole.OperatorDecoder.step, HostClock()
    [*rows] = whole.run_generation(clock, True, 1)
    assert [list(row["passes"]) for row in rows] == [["2 tokens", "one step"]] * 2
    assert {"dsfast", whole.UNCAPTURED} <= set(rows[0]["passes"]["2 tokens"]["variants"])
    for batch, row in enumerate(rows, 1):
        for name, tokens in (("2 tokens", 2 * batch), ("one step", batch)):
            variant = row["passes"][name]["variants"]["dsfast"]
            assert variant["tokens_per_second"] == tokens / variant["seconds"]["median"]
    assert run.sound({"parts": {}, "rows": rows})
    monkeypatch.setattr(whole.OperatorDecoder, "step", lambda self: [token + 1 for token in right(self)])
    rows = list(whole.run_generation(clock, True, 1))
    assert [(row["check"], row["passes"]) for row in rows] == [(f"other tokens than {whole.UNCAPTURED}", {})] * 2
    assert not run.sound({"parts": {}, "rows": rows})


def test_a_step_is_also_timed_in_a_graph_and_its_launches_counted():
    class Clock(HostClock):
        on_gpu = True

        def graph_seconds(self, call):
            call()
            return 1e-4

        def kernels(self, call):
            return [{}] * 40

    row = next(whole.run_generation(Clock(), True, 1))
    variant = row["passes"]["one step"]["variants"]["dsfast"]
    assert (variant["graph_seconds"], variant["launches"]) == (1e-4, 40)


def test_nothing_is_claimed_where_nothing_was_measured():
    found = figures([])
    assert len(found) == len(FIGURES) > 20
    assert {(figure["got"], figure["met"]) for figure in found} == {(None, "not measured")}


def test_figures_follow_from_the_rows():
    rows = [
        row("attention", "V3", "forward+backward", **{"FlexAttention": 1.3, "SDPA flash": 2.0, "SDPA cudnn": 0.8}),
        row("attention", "V3 mixed", "forward+backward"),
        row("decode", "V3 H16", "forward"), row("decode", "V3 H128", "forward"),
        row("route", "V3", "forward", transformers=30.0), row("norm", "V3", "forward"),
        row("adamw", "500K", "update"), row("generate", "batch 1", "64 tokens"),
        {"part": "tests", "case": "kernels", "status": "passed"},
    ]  # fmt: skip
    found = {figure["what"]: (figure["got"], figure["met"]) for figure in figures(rows)}
    assert found["mla_attention 192/128 over FlexAttention"] == (1.3, "yes")
    assert found["mla_attention 192/128 over the fastest SDPA"] == (0.8, "no")
    assert found["documents of mixed length, rate over dense"] == (1.0, "stretch")
    assert found["mla_decode B128 S4096, 16 heads"] == (3.5, "yes")
    assert found["mla_decode B128 S4096, 128 heads"] == (400.0, "yes")
    assert found["moe_route with permutation over transformers"] == (30.0, "yes")
    assert found["moe_route 8192 x 256, permutation"] == (pytest.approx(10.0), "stretch")  # in a graph
    assert found["rms_norm, share of copy bandwidth"] == (90.0, "yes")
    assert found["adamw 500K with the clip's factor"] == (pytest.approx(10.0), "no")
    assert found["adamw 500K with the factor, launches"] == (1, "yes")
    assert found["generation, one stream"] == (6000.0, "yes")
    assert found["moe_experts E128 over liger"] == (None, "not measured")


def test_every_figure_names_what_the_parts_measure():
    """A figure whose case, pass or peer no part has would stay "not measured" for ever."""
    rows = [
        row(part, name, run, **dict.fromkeys(peers.peers_of(cases.build(part, name)), 1.0))
        for part in cases.SIZES for name in cases.SIZES[part] for run in ("forward", "forward+backward", "update")
    ]  # fmt: skip
    by_run = {}
    for one in rows:
        by_run.setdefault((one["part"], one["case"]), {**one, "passes": {}})["passes"] |= one["passes"]
    config = whole.comparable(whole.whole_config(False))
    size = f"{config.train.batch_size} x {config.data.sequence_length}"
    steps = [
        row("step", size, "step", eager=1.0),
        row("compiled", size, "step", **{"reduce-overhead": 1.0}),
    ]
    trained = [
        {
            **row("training", case, "training"),
            "passes": {run: {"variants": variants()} for run in ("process", "training")},
        }
        for case in ("cold", "warm", "CPU")
    ]
    generated = [row("generate", f"batch {b}", f"{whole.NEW_TOKENS} tokens") for b in whole.BATCHES]
    recalled = [{"part": "recall", "case": "seed 0", "passes": {}, "overlap": True}]
    assert [
        f["what"] for f in figures([*by_run.values(), *steps, *trained, *generated, *recalled]) if f["got"] is None
    ] == []


class TestTheStep:
    """What is timed is what a GPU's trainer launches for a step, here on CPU tensors."""

    @pytest.fixture(autouse=True)
    def alone(self, monkeypatch):
        monkeypatch.setattr(whole, "GPU_PEERS", {})

    def test_is_the_one_that_is_recorded(self, monkeypatch):
        launched = []
        make = whole.DeviceSteps
        monkeypatch.setattr(
            whole, "DeviceSteps", lambda trainer, launch: make(trainer, lambda step: lambda: launched.append(step()))
        )
        (found,) = step_rows()
        assert len(launched) == 1 + whole.WARM_CALLS + 1  # checked, warm, timed
        assert found["check"] == ""
        assert found["preparation_seconds"] > 0
        assert found["passes"]["step"]["variants"]["dsfast"]["seconds"]["count"] == 1

    @pytest.mark.parametrize(("what", "at"), [("loss", 0), ("gradient norm", 1)])
    def test_is_held_against_plain_pytorch(self, what, at, monkeypatch):
        step = whole.DeviceStep.__call__

        def wrong(self):
            step(self)
            self.measured[:, at] *= 1.05

        monkeypatch.setattr(whole.DeviceStep, "__call__", wrong)
        check = step_rows()[0]["check"]
        assert re.fullmatch(rf"the recorded step's {what} is \d\.\d{{6}}, plain PyTorch's \d\.\d{{6}}", check)


def test_a_step_is_held_against_the_bound_and_against_dsfasts():
    calls, taken = {"dsfast": lambda: 0.5, "eager": lambda: 2.0}, SimpleNamespace(seconds=lambda call: call())
    variants = whole._time_step(calls, taken, 10**12, torch.bfloat16, BOUNDS, 2)["variants"]
    assert [x["flops_per_second"] for x in variants.values()] == [2e12, 5e11]
    assert [x["bound_share"] for x in variants.values()] == [1 / 400, 1 / 1600]
    assert [x["over_dsfast"] for x in variants.values()] == [1.0, 4.0]


def test_compiled_peers_of_the_step_are_a_part_of_their_own_that_comes_late(monkeypatch):
    names = ("compile", "eager", "reduce-overhead")
    monkeypatch.setattr(whole, "GPU_PEERS", {name: whole.GPU_PEERS[name] for name in names})
    rows = [list(rows_of(part, True, None, 60.0))[-1] for part in ("step", "compiled")]
    assert [(row["part"], row["case"]) for row in rows] == [("step", "1 x 8"), ("compiled", "1 x 8")]
    assert [{name: state["status"] for name, state in row["peers"].items()} for row in rows] == [
        {"eager": "ready"},
        {"compile": "missing", "reduce-overhead": "missing"},
    ]
    assert [set(row["passes"]["step"]["variants"]) for row in rows] == [{"dsfast", "eager"}, {"dsfast"}]
    before = {
        "attention",
        "experts",
        "head",
        "decode",
        "route",
        "norm",
        "rope",
        "adamw",
        "step",
        "training",
        "generate",
    }
    assert set(run.PARTS[: run.PARTS.index("compiled")]) == before  # all that figures are asked of


def test_no_number_of_rounds_and_peers_runs_out_of_batches(monkeypatch):
    """A step beyond them ends the process on a GPU; here it is an IndexError."""
    eager = whole.GPU_PEERS["eager"]
    monkeypatch.setattr(whole, "GPU_PEERS", dict.fromkeys("abc", eager))
    monkeypatch.setattr(whole, "WARM_CALLS", 1)
    monkeypatch.setattr(whole, "WAYS", {})
    *_, row = whole.run_step(HostClock(), None, True, "step", never, 7)
    assert [row["peers"][name]["status"] for name in "abc"] == ["ready"] * 3
    assert row["passes"]["step"]["variants"]["dsfast"]["seconds"]["count"] == 7


def test_transformers_is_not_asked_for_a_model_it_cannot_have(monkeypatch):
    monkeypatch.setattr(whole, "_SMALL", {**whole._SMALL, "model.scoring_func": "softmax"})
    monkeypatch.setattr(whole, "GPU_PEERS", {"transformers": whole.GPU_PEERS["transformers"]})
    *_, row = step_rows()
    assert row["peers"]["transformers"]["status"] == "missing"
    assert "softmax" in row["peers"]["transformers"]["reason"]


def test_peers_in_bfloat16_may_be_a_hundredth_off():
    assert {peer.tolerance for peer in whole.GPU_PEERS.values()} == {1e-2}


def test_a_peer_that_fails_after_its_first_step_costs_the_others_nothing(monkeypatch):
    def build(model):
        module, loss = whole.GPU_PEERS["eager"].build(model)
        calls = []

        def fails(*rows):
            if calls:
                raise RuntimeError("overwritten by a later run")
            calls.append(None)
            return loss(*rows)

        return module, fails

    eager = whole.GPU_PEERS["eager"]
    monkeypatch.setattr(whole, "GPU_PEERS", {"broken": dataclasses.replace(eager, build=build), "right": eager})
    monkeypatch.setitem(whole.GPU_PEERS, "eager", dataclasses.replace(eager, missing=lambda: "not asked for"))
    first, second, last, _ = step_rows()
    assert first["peers"]["right"]["status"] == second["peers"]["right"]["status"] == "skipped"
    assert [set(row["passes"]["step"]["variants"]) for row in (first, second)] == [{"dsfast"}] * 2
    assert last["peers"]["broken"]["status"] == "failed"
    assert last["peers"]["broken"]["reason"] == "RuntimeError: overwritten by a later run"
    assert set(last["passes"]["step"]["variants"]) == {"dsfast", "right"}
    (row,) = step_rows(expired=lambda: True)
    assert {(peer["status"], peer["reason"]) for peer in row["peers"].values()} == {("skipped", "out of time")}


TOOK = {
    "seconds": 0.08, "preparation_seconds": 11.0, "utilisation": 0.9, "tokens_per_second": 2e7, "memory_gb": 0.4,
    "losses": [9.0, 0.7], "fallbacks": [], "dtype": "bfloat16",
}  # fmt: skip


class TestTheTrainingPart:
    def test_cold_warm_and_on_the_cpu_in_processes_of_their_own(self, monkeypatch):
        """The second finds what the first has left, and nobody else's."""
        commands, folders, times = [], [], []

        def run_process(command, caches, timeout):
            commands.append(command[3:])
            times.append(timeout)
            folders.append((caches, [path.name for path in Path(caches).iterdir()]))
            (Path(caches) / "kept").write_text("")
            return 17.0, TOOK if command[3] == "gpu" else {
                **TOOK,
                "preparation_seconds": None,
                "tokens_per_second": 1e5,
            }

        monkeypatch.setattr(training, "run_process", run_process)
        found = list(training.run_training(False, 100.0))
        assert times[0] == pytest.approx(50.0, abs=5) == times[1]
        assert times[2] == pytest.approx(100.0, abs=5)
        assert commands == [["gpu", "200"], ["gpu", "200"], ["cpu", "200"]]
        (folder,) = {folder for folder, _ in folders}
        assert [names for _, names in folders] == [[], ["kept"], ["kept"]]
        assert not Path(folder).exists()
        assert [list(row["passes"]) for row in found] == [["process", "preparation", "training"]] * 2 + [
            ["process", "training"]
        ]
        got = {figure["what"]: (figure["got"], figure["met"]) for figure in figures(found)}
        assert got["training, 200 steps"] == (0.08, "yes")
        assert got["training, whole process, empty caches"] == (17.0, "yes")
        assert got["training, whole process, warm caches"] == (17.0, "no")
        assert got["training over dsfast on the CPU"] == (200.0, "yes")
        assert got["training, memory of the GPU"] == (0.4, "yes")
        shown = plain(document({**run_document(found)}))
        assert "training cold  steps=200  bfloat16" in shown
        assert "11,000,000.0" in shown

    def test_one_that_fails_or_hangs_costs_the_others_nothing(self, monkeypatch):
        ends = iter((RuntimeError("no GPU"), subprocess.TimeoutExpired("it", 3.0), (17.0, TOOK)))

        def run_process(command, caches, timeout):
            end = next(ends)
            if isinstance(end, Exception):
                raise end
            return end

        monkeypatch.setattr(training, "run_process", run_process)
        found = list(training.run_training(False, 100.0))
        assert [(row["case"], row.get("status")) for row in found] == [
            ("cold", "failed: RuntimeError: no GPU"), ("warm", "not measured: out of time"), ("CPU", None)
        ]  # fmt: skip
        assert not run.sound({"parts": {}, "rows": found[:1]})
        assert run.sound({"parts": {}, "rows": found[1:]})

    def test_a_loss_that_rose_is_not_sound(self):
        found = training.row("cold", 200, 17.0, {**TOOK, "losses": [9.0, 9.1]})
        assert found["check"] == "the loss rose from 9.0000 to 9.1000"
        assert not run.sound({"parts": {}, "rows": [found]})

    def test_a_process_has_its_caches_and_its_last_word(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
        said = "import json, os; e = os.environ; print('x'); print(json.dumps([e['DSFAST_CACHE'], e.get('TRITON_CACHE_DIR')]))"
        seconds, found = training.run_process([sys.executable, "-c", said], str(tmp_path), 60.0)
        assert found == [str(tmp_path), None]
        assert seconds > 0
        with pytest.raises(RuntimeError, match=r"^no GPU$"):
            training.run_process([sys.executable, "-c", "raise SystemExit('no GPU')"], str(tmp_path), 60.0)
        for seconds in (0.5, -1.0):
            with pytest.raises(subprocess.TimeoutExpired):
                training.run_process([sys.executable, "-c", "import time; time.sleep(60)"], str(tmp_path), seconds)

    def test_what_a_run_took(self):
        found = training.train(training.trainer_for("cpu", 1, rehearsal=True))
        assert found["losses"][0] == found["losses"][1]
        assert found["preparation_seconds"] is None
        assert found.keys() == TOOK.keys()
        assert training.trainer_for("cpu", 20, rehearsal=False).config.train.steps == 20


class TestTheRecallPart:
    KNOWN = {"asked": 800, "correct": 776, "fraction": 0.97, "low": 0.955, "high": 0.98}  # noqa: RUF012

    def found(self, monkeypatch, cpu_low: float, cpu_high: float) -> list[dict]:
        commands = []

        def run_process(command, caches, timeout):
            commands.append(command[3:])
            known = self.KNOWN if command[3] == "gpu" else {**self.KNOWN, "low": cpu_low, "high": cpu_high}
            return 30.0, {"taught": known, "heldout": self.KNOWN}

        monkeypatch.setattr(recall, "run_process", run_process)
        rows = list(recall.run_recall(False, 100.0))
        assert commands == [[device, str(seed)] for seed in range(5) for device in ("gpu", "cpu")]
        return rows

    @pytest.mark.parametrize(("low", "high", "got", "met"), [(0.97, 0.99, 5.0, "yes"), (0.985, 0.99, 0.0, "no")])
    def test_the_intervals_of_each_seed(self, monkeypatch, low, high, got, met):
        rows = self.found(monkeypatch, low, high)
        figure = next(figure for figure in figures(rows) if figure["what"] == "recall as on the CPU, seeds")
        assert (figure["got"], figure["met"]) == (got, met)
        shown = plain(document(run_document(rows)))
        assert f"recall, seed 4, CPU, taught phrasings: 97.0% ({low:.1%} .. {high:.1%})" in shown

    def test_only_on_request(self):
        assert "recall" not in run.choose_parts(None)
        assert run.choose_parts(["recall"]) == ("recall",)
        assert {row["status"] for row in recall.run_recall(False, 0.0)} == {"not measured: out of time"}

    def test_what_a_run_knows(self, monkeypatch):
        assert recall.recall(recall.seeded("cpu", 3, rehearsal=True)) == {"taught": None, "heldout": None}
        assert recall.overlap({"taught": None, "heldout": None}, {"taught": None, "heldout": None}) is None
        assert recall.seeded("cpu", 3, rehearsal=False).config.seed == 3


@pytest.mark.parametrize(
    ("taught", "heldout", "same"),
    [((0.4, 0.6), (0.6, 0.9), True), ((0.4, 0.6), (0.1, 0.49), False), ((0.71, 0.8), (0.4, 0.6), False)],
)
def test_recalls_are_the_same_where_the_intervals_of_both_phrasings_overlap(taught, heldout, same):
    ours = {"taught": {"low": taught[0], "high": taught[1]}, "heldout": {"low": heldout[0], "high": heldout[1]}}
    theirs = {name: {"low": 0.5, "high": 0.7} for name in recall.PHRASINGS}
    assert recall.overlap(ours, theirs) is recall.overlap(theirs, ours) is same


def test_each_figure_of_a_variant_is_shown_in_its_unit():
    variant = {
        "seconds": {"median": 2e-6, "lower": 1.5e-6, "upper": 2.5e-6}, "bytes_per_second": 3.25e12, "flops_per_second": 4e14,
        "bound_share": 0.5, "graph_seconds": 1e-6, "launches": 3, "tokens_per_second": 12345.0, "over_dsfast": 1.25,
    }  # fmt: skip
    assert show._cells(variant, {"flops": 1}) == {
        "us": "2.0", "quartiles": "1.5 .. 2.5", "in a graph": "1.0", "launches": "3", "TB/s": "3.25", "TFLOP/s": "400.0",
        "of bound": "50%", "tokens/s": "12,345", "over dsfast": "1.25 x",
    }  # fmt: skip


def test_a_figure_is_shown_with_what_was_asked_what_came_of_it_and_the_bound():
    row = {
        "what": "norm", "asked": "20", "stretch": "12", "met": "yes", "got": 12.5, "unit": "us", "bound_seconds": 2.5e-6,
        "bound_share": 0.2,
    }  # fmt: skip
    console = Console(file=io.StringIO(), width=120)
    show._figures(
        console, [row, row | {"got": None, "met": "not measured", "bound_seconds": None, "bound_share": None}]
    )
    lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    assert "norm 20 12 12.50 us yes 2.5 20%" in lines
    assert "norm 20 12 - not measured" in lines


def test_what_failed_stands_out_from_what_was_not_measured(monkeypatch):
    said = []
    monkeypatch.setattr(show, "_say", lambda console, text, style: said.append((text, style)))
    show._not_done(None, {name: {"status": name} for name in ("done", "failed: x", run.OUT_OF_TIME)})
    assert said == [("failed: x: failed: x", "red"), (f"{run.OUT_OF_TIME}: {run.OUT_OF_TIME}", "yellow")]


def run_document(rows: list) -> dict:
    return {"gpu": None, "bounds": None, "rows": rows, "parts": {}, "figures": figures(rows)}


def test_at_most_and_at_least():
    at_most = Figure("", "us", 20, 12, None, at_most=True)
    assert [run_met(at_most, got) for got in (12, 13, 21)] == ["stretch", "yes", "no"]
    assert [run_met(Figure("", "x", 1, None, None), got) for got in (0.9, 1)] == ["no", "yes"]


def run_met(figure: Figure, got: float) -> str:
    from dsfast.bench.gpu.figures import _met

    return _met(figure, got)


# the run


@pytest.fixture
def parts_run(monkeypatch):
    """What was run, for how long; every part takes 30 seconds of a clock of its own."""
    now, asked = [0.0], []

    def run_part(child, part, bounds, rehearsal, seconds, watch):
        asked.append((part, seconds))
        now[0] += 30.0
        if part == "bounds":
            return {"status": "done", "seconds": 1.0}, [dataclasses.asdict(BOUNDS)], "measured\n"
        return {"status": "done", "seconds": 30.0}, [{"part": part, "case": "a", "status": "done"}], f"{part} said\n"

    monkeypatch.setattr(run, "run_part", run_part)
    monkeypatch.setattr(run, "Child", lambda: SimpleNamespace(end=lambda: ""))
    monkeypatch.setattr(run, "compile_parts", lambda parts, rehearsal, seconds: dict.fromkeys(parts, "done"))
    monkeypatch.setattr(run, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(run, "gpu_facts", lambda: {"name": "G", "memory_gb": 1, "driver": "1", "cuda": "13"})
    return asked


def test_parts_run_in_their_order_until_the_time_is_up(parts_run):
    kept = []

    def keep(found, said):
        kept.append((said, [row["part"] for row in found["rows"]], found["parts"]["step"]["status"]))

    found = run.run_gpu(run.PARTS[:-1], 130, False, lambda text: None, keep)
    assert kept[:2] == [("measured\n", [], run.NOT_YET), ("norm said\n", ["norm"], run.NOT_YET)]
    assert len(kept) == 6
    assert kept[-1] == ("", ["norm", "rope", "adamw", "route"], run.OUT_OF_TIME)
    assert parts_run == [("bounds", 100.0), ("norm", 100.0), ("rope", 70.0), ("adamw", 40.0), ("route", 10.0)]
    assert found["parts"]["step"]["status"] == "not measured: out of time"
    assert found["bounds"]["bandwidth"] == 4e12
    assert found["measured_on"] == "GPU"
    assert run.sound(found)


def test_some_of_the_time_is_the_tests(parts_run):
    found = run.run_gpu(run.PARTS, 130, False, lambda text: None, lambda found, said: None)
    assert parts_run == [("bounds", 97.5), ("norm", 67.5), ("rope", 37.5), ("tests", 40.0)]
    assert found["parts"]["adamw"]["status"] == run.OUT_OF_TIME


def test_the_kernels_tests_are_those_of_the_contract(monkeypatch):
    asked = {}
    monkeypatch.setattr(gpu_tests, "run_pytest", lambda name, arguments, seconds, root: asked.update({name: arguments}))
    list(gpu_tests.run_tests(60))
    assert [Path(path).name for path in asked["marked gpu"] if path.endswith(".py")][:2] == list(gpu_tests.FIRST)
    kernels = {Path(path).name for path in asked["kernels"] if path.endswith(".py")}
    assert {"test_triton_rope.py", "test_mla_project.py", "test_mla_output.py", "test_after_step.py"} <= kernels
    assert not kernels & {"test_triton_compile.py", "test_watched.py"}
    others = "not (in_the_interpreter or whenever_its_branches_run or those_of_the_native_path or on_a_gpu_that_is_not_there)"
    marks = {name: [arguments[arguments.index(flag) + 1] for flag in ("-m", "-k")] for name, arguments in asked.items()}
    assert marks == {
        "marked gpu": ["gpu and not slow", others],
        "kernels": ["not gpu and not slow", others],
    }


@pytest.mark.parametrize("part", gpu_tests.WITHOUT_A_GPU)
def test_names_of_tests_that_need_no_gpu_are_those_of_tests(part):
    own = Path(__file__)
    files = (path.read_text(encoding="utf-8") for path in own.parent.glob("test_*.py") if path != own)
    assert any(re.search(rf"^(def )?test\w*{part}\b", text, re.MULTILINE) for text in files)


@pytest.mark.parametrize(("seconds", "first", "all_of_it"), [(120.0, 50.0, 100.0), (30.0, 7.5, 15.0)])
def test_whole_steps_have_half_of_the_time_and_some_is_left_to_end_in(seconds, first, all_of_it, monkeypatch):
    asked = {}
    monkeypatch.setattr(gpu_tests, "time", SimpleNamespace(perf_counter=lambda: 7.0))
    monkeypatch.setattr(gpu_tests, "run_pytest", lambda name, arguments, seconds, root: asked.update({name: seconds}))
    list(gpu_tests.run_tests(seconds))
    assert asked == {"marked gpu": first, "kernels": all_of_it}


@pytest.mark.parametrize(("processors", "expected"), [(1, "1"), (8, "8"), (64, "16")])
def test_so_many_tests_share_the_gpu(processors, expected, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    assert gpu_tests._together() == ["-n", expected]


def test_all_parts_compile_at_once_before_the_first_is_timed(monkeypatch):
    """Each waits for the other two here."""
    meet, asked = threading.Barrier(3), []

    class Child:
        def run(self, request, seconds, look):
            asked.append((json.loads(request), seconds))
            meet.wait(timeout=30)
            return (run.OUT_OF_TIME if "muon" in request else "done"), ""

    monkeypatch.setattr(run, "Child", Child)
    assert run.compile_parts(["norm", "muon", "step"], True, 7.0) == {
        "norm": "done", "muon": "not ready in time", "step": "done"
    }  # fmt: skip
    assert sorted(request["part"] for request, _ in asked) == ["muon", "norm", "step"]
    assert all(set(request) == {"part", "rehearsal"} and seconds == 7.0 for request, seconds in asked)
    assert run.compile_parts([], True, 7.0) == {}
    assert set(run.PARTS) - set(run.COMPILED) == {"training", "recall", "tests"}


@needs_native
@pytest.mark.filterwarnings("ignore")
def test_what_is_compiled_before_is_what_is_checked_and_what_is_timed(monkeypatch):
    """Of dsfast's kernels the checks have all; torch.compile makes others for the sizes that are timed, and for gradients."""
    prepared = []

    def peer(name: str, **how) -> GpuPeer:
        def prepare(arguments, positions):
            prepared.append((name, arguments[0].size(0), list(positions)))
            return operators.direct(cases.build("norm", "tiny", True).ours, arguments, positions)

        return GpuPeer(name, prepare, **how)

    monkeypatch.setattr(operators, "peers_of", lambda case: {"plain": peer("plain"), "it": peer("it", compiled=True)})
    monkeypatch.setitem(cases.TINY["norm"], "tiny", ({"N": 12, "D": 24}, {"N": 5, "D": 24}))
    child.compile_part("norm", True)
    assert prepared == [("plain", 5, []), ("it", 5, []), *[("it", 12, [0, 1, 3])] * 2]


@needs_native
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["step", "generate"])
def test_whole_steps_are_compiled_before_as_they_are_timed(part):
    child.compile_part(part, True)


def test_rows_are_kept_as_they_come_in(parts_run, monkeypatch):
    """What a part that hangs, or a command that is ended, had found until then."""
    kept, inner = [], run.run_part

    def run_part(child, part, bounds, rehearsal, seconds, watch):
        for count in (1, 2, 2) if part == "norm" else ():
            watch([{"part": part, "case": str(i)} for i in range(count)])
        return inner(child, part, bounds, rehearsal, seconds, watch)

    monkeypatch.setattr(run, "run_part", run_part)
    run.run_gpu(("norm",), 100, False, lambda text: None, lambda found, said: kept.append(len(found["rows"])))
    assert kept == [0, 1, 2, 1, 1]


def test_what_is_ended_ends_what_it_has_started(tmp_path):
    """SIGTERM to the command while its parts compile."""
    lasting = "import os, sys, time; open(sys.argv[1] + str(os.getpid()), 'w'); time.sleep(600)"
    code = (
        "import sys; from dsfast.bench.gpu import run; from dsfast.command import run_command;"
        f" run._CHILD, run.LOOK = [sys.executable, '-c', {lasting!r}, sys.argv[1]], 0.1;"
        " sys.exit(run_command(lambda argv: run.compile_parts(['norm', 'rope'], True, 600.0)))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, f"{tmp_path}/"], stderr=subprocess.PIPE, text=True)
    while len(children := list(tmp_path.iterdir())) < 2:
        assert parent.poll() is None
        time.sleep(0.05)
    parent.terminate()
    assert parent.communicate(timeout=60)[1] == "terminated\n"
    assert parent.returncode == 143
    assert not [path for path in children if Path(f"/proc/{path.name}").exists()]


@pytest.mark.parametrize("gpu", [False, True])
def test_what_peers_need_is_imported_before_a_gpu_is_waited_for(gpu, monkeypatch):
    """And one that is not there costs nothing else."""
    imported = []

    def import_module(name):
        imported.append(name)
        raise ImportError(name)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(child, "importlib", SimpleNamespace(import_module=import_module))
    child.import_peers()
    assert imported == (["torch._inductor.compile_fx", *child.IMPORTED] if gpu else [])


def test_what_was_not_asked_for_is_said(parts_run):
    found = run.run_gpu(("norm",), 100, False, lambda text: None, lambda found, said: None)
    assert [part for part, _ in parts_run] == ["bounds", "norm"]
    assert found["parts"]["attention"]["status"] == "not measured: not asked for (--only)"


def test_a_part_that_hangs_is_ended_and_one_that_dies_is_named():
    begin = time.perf_counter()
    hangs = "import sys, time; print('so far', file=sys.stderr, flush=True); time.sleep(60)"
    assert run.Child([sys.executable, "-c", hangs]).run("", 3) == (run.OUT_OF_TIME, "so far\n")
    assert time.perf_counter() - begin < 30
    assert run.Child([sys.executable, "-c", "raise SystemExit('a\\nb')"]).run("", 30) == ("failed: b", "a\nb\n")
    assert run.Child([sys.executable, "-c", "pass"]).run("", 30) == ("done", "")


def test_the_next_part_gets_ready_while_one_runs_and_the_last_that_waits_is_ended(monkeypatch, tmp_path):
    code = "import os, sys; open(sys.argv[1] + str(os.getpid()), 'w'); sys.stdin.read()"
    monkeypatch.setattr(run, "_CHILD", [sys.executable, "-c", code, f"{tmp_path}/"])

    def ready(count: int) -> list[Path]:
        while len(found := list(tmp_path.iterdir())) < count:
            time.sleep(0.01)
        return found

    with run.Children() as children:
        ready(1)
        child = children.take()
        ready(2)  # though the first has no request yet
        assert child.run("", 30) == ("done", "")
        assert len(list(tmp_path.iterdir())) == 2
    assert not [path for path in ready(2) if Path(f"/proc/{path.name}").exists()]


def test_rows_written_before_a_part_was_cut_are_kept():
    def cut(request, seconds, look):
        rows = '{"part": "norm", "case": "V3"}\n{"part": "norm", "case": "V3", "passes": {}}\n{"part": "no'
        Path(json.loads(request)["file"]).write_text(rows, encoding="utf-8")
        return run.OUT_OF_TIME, "said"

    state, rows, said = run.run_part(SimpleNamespace(run=cut), "norm", None, False, 20.0)
    assert said == "said"
    assert rows == [{"part": "norm", "case": "V3", "passes": {}}]
    assert state["status"] == "cut: out of time, the rest is not measured"


@pytest.mark.parametrize(("seconds", "own"), [(100.0, 85.0), (20.0, 10.0)])
def test_a_part_ends_before_its_process_is_ended(seconds, own):
    asked = []
    child = SimpleNamespace(
        run=lambda request, limit, look: (asked.append((json.loads(request)["seconds"], limit)), ("", ""))[1]
    )
    run.run_part(child, "norm", None, False, seconds)
    assert asked == [(own, seconds)]


def test_cases_that_are_not_begun_are_rows_as_well():
    found = list(rows_of("norm", True, None, -1.0))
    assert found == [{"part": "norm", "case": "tiny", "status": "not measured: out of time"}]


def document(found: dict) -> dict:
    return {
        "machine": {"processor": "P", "threads": 2}, "versions": {"torch": "2", "triton": "3"}, "native": {"reason": ""},
        "fallbacks": [], "commit": {"hash": "abc"}, "settings": {"bench": "gpu"}, "results": found,
    }  # fmt: skip


@needs_native
def test_everything_found_is_shown(parts_run, monkeypatch):
    found = run.run_gpu(("norm",), 100, False, lambda text: None, lambda found, said: None)
    timed = run_tiny("norm")
    timed["passes"]["forward"]["variants"]["eager"] = {"failed": "RuntimeError: no"}
    timed["passes"]["forward"]["variants"]["dsfast"] |= {"graph_seconds": 1.25e-6, "graph_reason": "memory"}
    failing = gpu_tests._row("kernels", "failed", "") | {"counts": {"failures": 1}, "failures": ["a::b: c", "a::d: e"]}
    timed["fallbacks"] = [{"operator": "decode_step", "device": "cuda", "reason": "capture failed"}]
    found["rows"] += [timed, failing, {**timed, "check": "output: error 1", "passes": {}}]
    shown = plain(document(found))
    for text in ("copy 4.00 TB/s", "at 8192: bfloat16 800, tf32 400, float32 50 TFLOP/s",
                 "norm tiny", "the bound", "1.2", "failed: forward: eager: RuntimeError: no",
                 "missing: norm tiny: liger: ", "failed: a::b: c", "failed: a::d: e", "not captured: forward: dsfast: memory",
                 "fell back: norm tiny: decode_step: capture failed", "dsfast: output: error 1",
                 "attention: not measured: not asked for (--only)", "Figures asked for on an H200"):  # fmt: skip
        assert text in shown
    assert "REHEARSAL" not in shown


# the tests as a part


TESTS = """
import os, pytest

@pytest.fixture
def broken():
    raise ValueError

def test_good(): assert "TRITON_INTERPRET" not in os.environ
def test_bad(): assert 1 == 2
def test_none(broken): pass
"""


def test_tests_are_counted_and_failures_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (tmp_path / "test_a.py").write_text(TESTS, encoding="utf-8")
    found = gpu_tests.run_pytest("kernels", [str(tmp_path)], 60, tmp_path)
    assert found["status"] == "failed"
    assert found["counts"] == {"tests": 3, "failures": 1, "errors": 1, "skipped": 0}
    failure, error = found["failures"]
    assert "::test_bad: " in failure
    assert "::test_none: " in error
    assert not run.sound({"parts": {}, "rows": [found]})


def test_tests_that_take_too_long_or_do_not_run_say_so(tmp_path):
    (tmp_path / "test_a.py").write_text("import time\ntime.sleep(60)\n", encoding="utf-8")
    stopped = gpu_tests.run_pytest("kernels", [str(tmp_path)], 0.5, tmp_path)
    assert (stopped["status"], stopped["reason"]) == ("not measured: out of time", "stopped after 0 s")
    assert gpu_tests.run_pytest("kernels", ["--no-such-flag"], 60, tmp_path)["status"] == "failed to run"
    assert next(gpu_tests.run_tests(60, tmp_path))["status"] == "missing"


@pytest.mark.parametrize("bad", [True, False])
def test_tests_that_ran_before_the_time_was_up_are_counted(bad, tmp_path):
    tests = f"import time\ndef test_a(): assert {not bad}\ndef test_b(): pass\ndef test_c(): time.sleep(60)\n"
    (tmp_path / "test_a.py").write_text(tests, encoding="utf-8")
    found = gpu_tests.run_pytest("kernels", [str(tmp_path)], 15, tmp_path)
    assert found["status"] == ("failed" if bad else "not measured: out of time")
    assert found["reason"] == "stopped after 15 s"
    assert (found["counts"]["tests"], len(found["failures"])) == (2, int(bad))


# the command


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "the following arguments are required: --out"),
        (["--out", "DIR", "--only", "attn"], "unknown part 'attn'; known: adamw, attention, compiled, "),
        (["--out", "DIR", "--seconds", "0"], "expected a whole number"),
        (["--out", "/proc/no/such"], "--out /proc/no/such: cannot be written to"),
        (["--out", "DIR"], "torch finds no GPU; nothing is measured. Without a GPU: `python -m dsfast.bench compile`"),
        (["--out", "DIR", "--rehearse"], "set TRITON_INTERPRET=1"),
    ],
)
def test_bad_input_is_one_line_and_2_and_nothing_is_written(arguments, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(triton, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "/proc/no/such" in arguments)
    monkeypatch.setattr(triton, "available", lambda operator: (True, ""))
    out = tmp_path / "out"
    assert run_command(bench.main, ["gpu", *(str(out) if a == "DIR" else a for a in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert complaint in line
    assert not out.exists()


@pytest.mark.parametrize(
    "reason", ["the GPU has compute capability 7.5, 8.0 or newer is needed", "triton is not installed"]
)
def test_a_gpu_that_cannot_be_used_is_one_line_and_2(reason, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton, "INTERPRETED", False)
    monkeypatch.setattr(triton, "available", lambda operator: (False, reason))
    assert run_command(bench.main, ["gpu", "--out", str(tmp_path / "out")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: bench gpu: {reason}; nothing is measured.")


@pytest.mark.parametrize("there", ["gpu.json", "gpu.txt", "gpu.log"])
def test_results_that_are_there_are_not_written_over(there, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "check_gpu", lambda rehearsal: None)
    monkeypatch.setattr(bench, "run_gpu", lambda *_: pytest.fail("it ran"))
    (tmp_path / there).write_text("eight minutes")
    assert run_command(bench.main, ["gpu", "--out", str(tmp_path)]) == 2
    assert f"--out {tmp_path}: {there} is there already; expected a folder without one" in capsys.readouterr().err
    assert (tmp_path / there).read_text() == "eight minutes"


@pytest.mark.parametrize(
    ("changed", "sound"),
    [
        ({}, True),
        ({"check": "output: error 1.0e+00"}, False),
        ({"status": "failed: RuntimeError"}, False),
        ({"peers": {"a": {"status": "wrong"}}}, False),
        ({"passes": {"forward": {"variants": {"dsfast": {"failed": "RuntimeError"}}}}}, False),
        ({"fallbacks": [{"device": "cuda"}]}, False),
    ],
    ids=str,
)
def test_what_is_dsfasts_own_makes_a_run_unsound(changed, sound):
    peers = {"a": {"status": "ready"}, "b": {"status": "failed"}}
    passes = {"forward": {"variants": {"dsfast": {}, "a": {"failed": "RuntimeError"}}}}
    right = {"part": "norm", "check": "", "peers": peers, "passes": passes, "fallbacks": [{"device": "cpu"}]}
    assert run.sound({"parts": {}, "rows": [{**right, **changed}]}) is sound


@pytest.mark.parametrize(
    ("statuses", "nothing"),
    [
        ((run.OUT_OF_TIME, run.NOT_ASKED), True), (("done", run.OUT_OF_TIME), False),
        (("cut: out of time", run.NOT_ASKED), False), ((run.NOT_ASKED, run.NOT_ASKED), False),
    ],
)  # fmt: skip
def test_a_run_that_had_time_for_nothing_is_not_sound(statuses, nothing):
    parts = {"bounds": {"status": "done"}} | {str(n): {"status": status} for n, status in enumerate(statuses)}
    assert run.sound({"parts": parts, "rows": []}) is not nothing


def test_the_interpreter_is_no_gpu(monkeypatch):
    monkeypatch.setattr(triton, "INTERPRETED", True)
    with pytest.raises(run.UserError, match="TRITON_INTERPRET is set, and nothing would run on the GPU"):
        run.check_gpu(rehearsal=False)


@needs_interpreter
@pytest.mark.parametrize("parts", ["norm", pytest.param(",".join(run.PARTS[:-1]), marks=pytest.mark.slow)])
def test_a_rehearsal_runs_the_whole_command_and_claims_nothing(parts, tmp_path):
    command = [sys.executable, "-m", "dsfast.bench", "gpu", "--out", str(tmp_path), "--rehearse", "--only", parts]
    child = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rehearsal.json", "rehearsal.log", "rehearsal.txt"]
    assert f"done: {parts.split(',')[0]} tiny" in (tmp_path / "rehearsal.log").read_text(encoding="utf-8")
    written = json.loads((tmp_path / "rehearsal.json").read_text(encoding="utf-8"))
    results = written["results"]
    assert results["measured_on"] == "CPU (rehearsal)"
    assert results["gpu"] is None
    assert set(results["compilation"].values()) <= {"done", "not ready in time"}
    assert results["environment"]["TRITON_INTERPRET"] == "1"
    assert {figure["met"] for figure in results["figures"]} == {"not measured"}
    assert {row["part"] for row in results["rows"]} == set(parts.split(","))
    assert all("seconds" in timed["variants"]["dsfast"] for row in results["rows"] for timed in row["passes"].values())
    text = (tmp_path / "rehearsal.txt").read_text(encoding="utf-8")
    assert "REHEARSAL on the CPU" in text
    assert "REHEARSAL on the CPU" in child.stdout
