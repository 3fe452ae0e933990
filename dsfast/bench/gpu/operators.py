"""One operator's case: checked against the reference, its peers checked and prepared, then all timed in turns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsfast import ops
from dsfast.bench.cases import UPDATES, Work
from dsfast.bench.gpu.bounds import Bounds
from dsfast.bench.gpu.cases import OPERATORS, GpuCase, draw
from dsfast.bench.gpu.peers import peers_of
from dsfast.bench.gpu.peers.peer import GpuPeer, Prepared, direct
from dsfast.bench.step import attempt
from dsfast.bench.timing import Call, gradients_call, spread, take_turns
from dsfast.files import Json
from dsfast.ops import checks, triton
from dsfast.ops.checks import as_tuple
from dsfast.triton_kernels.launch import dtype_name

ROUNDS = 20
BUDGET = 0.5  # seconds of each variant of a pass
WARMUP = 3
GRAPHED = 1e-3
"""A call shorter than this many seconds is also timed in a CUDA graph."""
PEER_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 3e-2, torch.float32: 1e-3}
"""Of the largest value: a peer may round, but not compute something else."""
ITERATED = {"newton_schulz": 4}
"""So many times as much where steps enlarge the rounding of those before: five of them in bfloat16 make some 3e-2."""

SKIPPED = {"status": "skipped", "reason": "out of time"}


def run_case(
    case: GpuCase, clock: Any, bounds: Bounds | None, device: str, expired: Callable[[], bool], rounds: int = ROUNDS
) -> Iterator[Json]:
    """The row, again and again as it grows, in case there is no time for more: part, case, sizes, checked_sizes, dtype, check
    ("" or what is wrong), peers (name -> what, status, reason) and passes (name -> see `time_pass`).

    Once `expired()` is true no other peer is prepared; what is ready is timed.
    """
    row = {
        "part": case.part, "operator": OPERATORS[case.part], "case": case.name, "sizes": case.sizes,
        "checked_sizes": case.checked_sizes, "dtype": dtype_name(case.dtype), "peers": {}, "passes": {},
    }  # fmt: skip
    row["check"] = check_ours(case, device)
    yield row
    if row["check"]:
        return
    positions = case.timed.differentiable
    right = check_peers(case, device, row["peers"], expired)
    _forget_compiled()
    arguments = draw(case.timed, device, case.dtype)
    prepared = {"dsfast": direct(case.ours, arguments, positions)}
    for name, peer in right.items():
        ready, problem = (None, "") if expired() else attempt(partial(peer.prepare, arguments, positions))
        if ready is None:
            row["peers"][name] |= _failed(problem) if problem else SKIPPED
        else:
            prepared[name] = ready
    passes = {"update" if case.part in UPDATES else "forward": (case.forward, forward_call)}
    if case.backward is not None:
        passes["forward+backward"] = (case.forward + case.backward, backward_call)
    calls = {}
    for name, (work, make) in reversed(passes.items()):  # most figures are of both, and time may run out
        makes = {n: partial(make, p) for n, p in prepared.items()}
        timed, calls[name] = time_pass(makes, work, case.dtype, clock, bounds, rounds)
        row["passes"] = {name: timed} | row["passes"]
        yield row
    if clock.on_gpu:
        time_in_graphs(row["passes"], calls, clock)
        yield row


def compile_case(case: GpuCase, device: str) -> None:
    """Run what has to be compiled for `run_case`: the checks, and what torch.compile makes of the peers for the sizes timed."""
    check_ours(case, device)
    right = check_peers(case, device, {}, lambda: False)
    _forget_compiled()
    compiled = [peer for peer in right.values() if peer.compiled]
    if not compiled:
        return
    arguments, positions = draw(case.timed, device, case.dtype), case.timed.differentiable
    calls = (forward_call,) if case.backward is None else (forward_call, backward_call)
    for peer in compiled:
        attempt(lambda peer=peer: [call(peer.prepare(arguments, positions))() for call in calls])


def _forget_compiled() -> None:
    """Compiled for two shapes, a peer would get kernels for any."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def _failed(problem: str) -> Json:
    kind, _, reason = problem.partition(": ")
    return (
        {"status": "refused", "reason": reason} if kind == "RefusedError" else {"status": "failed", "reason": problem}
    )


def check_ours(case: GpuCase, device: str) -> str:
    """What is wrong with dsfast's operator, values and gradients, at the smaller size; "" if nothing is."""
    checked = case.checked

    def check() -> list[Json]:
        arguments = draw(checked, device, case.dtype)
        own = "triton" if triton.runs_on(torch.empty(0, device=device)) else "native"
        return checks.check(
            checked.operator, checked.function, arguments, checked.differentiable, [own], case.dtype, checked.name
        )

    rows, problem = attempt(check)
    wrong = [row for row in rows or () if not row["passed"]]
    for row in wrong[:1]:
        problem = f"{checks.in_words(row)} (eager's: {row['eager_error']:.2e})"
    return problem


def check_peers(case: GpuCase, device: str, found: Json, expired: Callable[[], bool]) -> dict[str, GpuPeer]:
    """The peers that are there and right, at the smaller size; every peer's state goes into `found`."""
    arguments = draw(case.checked, device, case.dtype)
    with ops.use("reference", case.checked.operator):
        wide = [checks.converted(x, torch.float64) for x in arguments]
        expected = None if case.part in UPDATES else case.canonical(as_tuple(case.checked.function(*wide)))
    right = {}
    for name, peer in peers_of(case).items():
        state = {"status": "missing", "reason": peer.missing()}
        if not state["reason"] and expired():
            state = SKIPPED
        elif not state["reason"]:
            problem = attempt(partial(_check_peer, peer, case, arguments, expected))
            state = (
                _failed(problem[1])
                if problem[1]
                else {"status": "wrong" if problem[0] else "ready", "reason": problem[0]}
            )
        found[name] = {"what": peer.what, **state}
        if state["status"] == "ready":
            right[name] = peer
    return right


def _check_peer(peer: GpuPeer, case: GpuCase, arguments: list, expected: tuple | None) -> str:
    if expected is None:
        return _check_update(peer, case, arguments)
    prepared = peer.prepare(arguments, ())
    with torch.no_grad():
        found = case.canonical(as_tuple(prepared.result(prepared.run())))
    return _difference(found, expected, PEER_TOLERANCE[case.dtype] * ITERATED.get(case.part, 1))


def _check_update(peer: GpuPeer, case: GpuCase, arguments: list) -> str:
    """An optimizer works in place: the peer's and dsfast's parameters after one update each."""
    sides = []
    for run in (case.ours, None):
        copy = [[x.clone() for x in entry] if entry and isinstance(entry, list) and isinstance(entry[0], Tensor) else entry
                for entry in arguments]  # fmt: skip
        prepared = direct(case.ours, copy, ()) if run else peer.prepare(copy, ())
        prepared.run()
        sides.append(tuple(copy[0]))
    return _difference(*sides[::-1], PEER_TOLERANCE[case.dtype])


def _difference(found: tuple, expected: tuple, tolerance: float) -> str:
    sides = ({f"output {number}": x for number, x in enumerate(side)} for side in (found, expected))
    return checks.difference(*sides, tolerance)


def forward_call(prepared: Prepared) -> Call:
    return torch.no_grad()(lambda: prepared.run())


def backward_call(prepared: Prepared) -> Call:
    return gradients_call(prepared.run, prepared.leaves)


def time_pass(
    makes: dict[str, Callable[[], Call]], work: Work, dtype: torch.dtype, clock: Any, bounds: Bounds | None, rounds: int
) -> tuple[Json, dict[str, Call]]:
    """flops, bytes, ideal_seconds (what the bounds allow) and variants, taking turns round by round:

    name -> seconds (median, quartiles), over_dsfast (its median over dsfast's), rates, bound_share; or `failed` alone. And the
    calls of those that did not fail.
    """
    variants, calls = {}, {}
    for name, make in makes.items():
        call, problem = attempt(partial(_warm, make))
        if problem:
            variants[name] = {"failed": problem}
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        else:
            calls[name] = call
    taken = take_turns({name: (call,) for name, call in calls.items()}, rounds, BUDGET, clock.seconds)
    ideal = bounds and bounds.ideal_seconds(work, dtype)
    for name in calls:
        median = spread([seconds for (seconds,) in taken[name]])
        variants[name] = {"seconds": asdict(median), **rates(work, dtype, median.median, ideal)}
    found = {"flops": work.flops, "bytes": work.bytes_of(dtype.itemsize), "ideal_seconds": ideal}
    return {**found, "variants": related(variants)}, calls


def time_in_graphs(passes: Json, calls: dict[str, dict[str, Call]], clock: Any) -> None:
    """Add to the variants of `passes` (name -> see `time_pass`), of those that are short, what `in_a_graph` finds, and to
    dsfast's what `kernels_of` does; `calls`: those of each pass. The passes of one variant after the other, dsfast's first: a
    capture that fails lets none succeed after it."""
    for variant in dict.fromkeys(name for of_pass in calls.values() for name in of_pass):
        for name, of_pass in calls.items():
            if variant not in of_pass:
                continue
            timed = passes[name]["variants"][variant]
            if timed["seconds"]["median"] < GRAPHED:
                timed |= in_a_graph(clock, of_pass[variant])
            if variant == "dsfast":
                timed |= kernels_of(clock, of_pass[variant])


def rates(work: Work, dtype: torch.dtype, seconds: float, ideal: float | None) -> Json:
    return {
        "flops_per_second": work.flops / seconds,
        "bytes_per_second": work.bytes_of(dtype.itemsize) / seconds,
        "bound_share": ideal and ideal / seconds,
    }


def related(variants: Json) -> Json:
    """`variants` with over_dsfast where dsfast was timed."""
    if "seconds" in variants.get("dsfast", {}):
        for variant in variants.values():
            if "seconds" in variant:
                variant["over_dsfast"] = variant["seconds"]["median"] / variants["dsfast"]["seconds"]["median"]
    return variants


def _warm(make: Callable[[], Call]) -> Call:
    call = make()
    for _ in range(WARMUP):
        call()
    return call


def in_a_graph(clock: Any, call: Call) -> Json:
    """graph_seconds, or graph_reason where `call` cannot be captured."""
    seconds, problem = attempt(partial(clock.graph_seconds, call))
    return {"graph_reason": problem} if problem else {"graph_seconds": seconds}


def kernels_of(clock: Any, call: Call) -> Json:
    """kernels, as `GpuClock.kernels` has them, and launches, how many there are; nothing where the profiler fails."""
    kernels, problem = attempt(partial(clock.kernels, call))
    return {} if problem else {"launches": len(kernels), "kernels": kernels}
