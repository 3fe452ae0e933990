"""Both sides' runs in turns, and what their losses, answers and times say about the change between them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from itertools import chain
from math import ceil, comb, inf, isfinite
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, NamedTuple

from dsfast.bench.learning import LAST, LOSS, less_recall, mean_recall
from dsfast.bench.timing import BUDGET, FEWEST, summarise
from dsfast.config import OPERATORS, Config
from dsfast.errors import UserError
from dsfast.files import Json, read_json
from dsfast.model import precision_of
from dsfast.ops import check_all
from dsfast.ops.checks import in_words
from dsfast.train.metrics import largest_difference, relative_differences

SIDES = ("now", "before")
TURNS = 20
"""In how many turns a side does its steps. The first is not timed, of these and of others."""
PROCESSES, PROCESS_TURNS = 6, 5
"""Of each side, one after the other, in which operators and generation are timed, as where a process has its memory makes a
difference; how many turns each has of one."""
GPU_TURNS = 9
"""Of a run on a GPU, where a turn is all of its steps."""
GENERATED = {"one sequence": 1, "32 sequences": 32}
NEW_TOKENS = 64
NOISE = 0.04
"""By so much of their seconds two processes of the same code may differ for as long as they live."""
OF_APART = 2.5
"""This part of what the processes' ratios lie apart, over one less than how many they are, is chance: of like code 3 to 5% of
3 to 6 processes are further from 1, 13% of 2. Of rms_norm with its backward pass one may say 0.7 and the next 1.25."""
WIDE = 0.15
"""What is within this of 1 is "as fast": a turn on a machine with nothing else to do is off by as much."""
WAITED = 0.05
"""A turn in which a side waited for a processor for more of its wall time (see `side`) was held up by other work, by an
unknown part of its seconds. On 2 cores with nothing else to do 7 of 235 pairs had such a turn, beside busy loops all."""
SPEED = 0.06
"""Seconds that are more by more than this part are a failure."""
TOO_GOOD = 2
"""By how much a loss has to fall to be doubted: where labels are among the input it falls to nothing, with nothing learnt."""
_SIDE = Path(__file__).parent / "side.py"
_ALONE = """
import sys  # an editable installation's finder would give from another tree what this one lacks
sys.meta_path[:] = [x for x in sys.meta_path if not getattr(x, "__module__", "").startswith("__editable___dsfast")]
exec(compile(sys.argv[1], "side.py", "exec"))
"""

Progress = Callable[[str], None]


class Pair(NamedTuple):
    """A turn of each side: its seconds, and `waited` (see `side`) of the side that waited for more of it."""

    now: float
    before: float
    waited: float


class SideFailedError(Exception):
    """A tree could not do its run. What it said is on standard error."""


class Side:
    """A source tree's process, which waits while it is not its turn."""

    def __init__(self, tree: Path):
        self.tree = tree
        command = [sys.executable, "-c", _ALONE, _SIDE.read_text(encoding="utf-8")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._child = subprocess.Popen(command, cwd=tree, start_new_session=True, **pipes)  # Ctrl-C is for the parent

    def ask(self, method: str, **arguments: Any) -> Json:
        """What the method of `side.Run` returns. Raises UserError where it does, and SideFailedError where the process ends or
        losses or logits are not finite."""
        with suppress(BrokenPipeError):  # it has ended, as reading will tell
            print(json.dumps([method, arguments]), file=self._child.stdin, flush=True)
        line = self._child.stdout.readline()
        if not line:
            raise SideFailedError(
                f"{self.tree}: its run ended with status {self._child.wait()}; what it said, if anything, is above"
            )
        answer = json.loads(line)
        for kind, error in (("user_error", UserError), ("failed", SideFailedError)):
            if kind in answer:
                raise error(f"{self.tree}: {answer[kind]}")
        return answer

    def end(self) -> None:
        """End the process, whatever it is doing."""
        self._child.kill()
        self._child.communicate()


Take = Callable[[dict[str, Side], dict[str, Json], str], dict[str, list[Pair]]]
"""Times things in the processes of both sides, which have said the second of themselves; the third tells which processes."""


@contextmanager
def both_sides(trees: dict[str, Path], runs: dict[str, Json]) -> Iterator[tuple[dict[str, Side], dict[str, Json]]]:
    """SIDES, and what each says of itself, made with the arguments that `runs` has for `side.Run`; ended when the block is.
    Raises as `Side.ask`."""
    with ExitStack() as stack:
        sides, ready = {}, {}
        for name in SIDES:
            sides[name] = Side(trees[name])
            stack.callback(sides[name].end)
            ready[name] = sides[name].ask("ready", **runs[name])
            if not Path(ready[name]["package"]).parent.samefile(trees[name]):
                raise SideFailedError(f"{trees[name]}: Python takes dsfast from {ready[name]['package']} there")
        yield sides, ready


def _runs(configs: dict[str, Path], changes: Json, turn: int) -> dict[str, Json]:
    """What `both_sides` makes each side's `side.Run` with."""
    return {side: {"config": str(config), "changes": changes, "turn": turn} for side, config in configs.items()}


def run_operators(
    trees: dict[str, Path], configs: dict[str, Path], names: Sequence[str], size: str, progress: Progress
) -> Json:  # fmt: skip
    """The operators `names` at a size of `bench kernels`, with the kernels and products that the config in each side's file
    takes: forward, and with backward where there is one, in turns; in PROCESSES of each side.

    Returns `timed` and `problems` as `run_against`, and `bits`, operator -> "the same", "others", "of other inputs" where the
    trees draw different ones, or "not in the other tree". Of a tree that fails `status` and `reason`.
    """
    bits: dict[str, str] = {}

    def take(sides: dict[str, Side], ready: dict[str, Json], process: str) -> dict[str, list[Pair]]:
        pairs = {}
        for name in names:
            progress(f"{name} {size}, {process}")
            known = all(name in ready[side]["operators"] for side in SIDES)
            bits[name], passes = _operator(sides, name, size) if known else ("not in the other tree", {})
            pairs |= passes
        return pairs

    try:
        pairs = _in_processes(trees, _runs(configs, {}, turn=1), take)
    except SideFailedError as error:
        return {"status": "failed", "reason": str(error)}
    timed = {what: _compared(turns) for what, turns in pairs.items()}
    return {"timed": timed, "bits": bits, "problems": slower(timed)}


def _operator(sides: dict[str, Side], name: str, size: str) -> tuple[str, dict[str, list[Pair]]]:
    """What there is to say of one operator's bits, and the pairs of turns of each of its passes."""
    now, before = (sides[side].ask("bits", name=name, size=size) for side in SIDES)
    same = "the same" if now["results"] == before["results"] else "others"
    pairs = {}
    for backward in [False, True] if now["backward"] and before["backward"] else [False]:
        turns = _turns(sides, PROCESS_TURNS, "operator", BUDGET, name=name, size=size, backward=backward)
        pairs[f"{name}, forward and backward" if backward else name] = _pairs(turns)
    return same if now["inputs"] == before["inputs"] else "of other inputs", pairs


def run_against(
    trees: dict[str, Path], configs: dict[str, Path], changes: Json, seeds: Sequence[int], progress: Progress
) -> Json:  # fmt: skip
    """For each seed the run of both SIDES, each by the code of its tree and the config in its file, with the same `changes` to
    it, "train.steps" among them, in turns, and the checkpoints' answers; and generation in turns.

    Returns `seeds`, what `_one_seed` finds for each, without the pairs of turns; `timed`, of a step and of generation, both
    sides' seconds, how many times as fast "now" is, and whether that is more than noise; `learnt`, the sides' means over the
    seeds; `problems`, what is worse; and `doubts`, what is better than changes are. Of a tree that fails there is a `status`
    alone, "failed", and the `reason`.
    """
    found = []
    try:
        for seed in seeds:
            found.append(_one_seed(trees, configs, changes | {"seed": seed}, progress))
        generated = _generation(trees, configs, changes, progress)
    except SideFailedError as error:
        return {"status": "failed", "reason": str(error)}
    timed = {"a step": _compared([one.pop("pairs") for one in found])}
    timed |= {name: _compared(pairs) for name, pairs in generated.items()}
    learnt = {side: _means([one[side] for one in found]) for side in SIDES}
    problems, doubts = slower(timed) + learns_less(learnt), too_good(learnt)
    return {"seeds": found, "timed": timed, "learnt": learnt, "problems": problems, "doubts": doubts}


def _one_seed(trees: dict[str, Path], configs: dict[str, Path], changes: Json, progress: Progress) -> Json:
    """Each side's losses and what it knows afterwards; `pairs` of turns of steps."""
    seed, steps = changes["seed"], changes["train.steps"]
    turn = ceil(steps / TURNS)
    runs = _runs(configs, changes, turn)
    with TemporaryDirectory() as folder, both_sides(trees, runs) as (sides, ready):
        sides["now"].ask("check_prompts")
        whole_runs = ready["now"]["device"] == "cuda"
        progress(f"seed {seed}: {steps} steps of each side, in turns")
        trained = _turns(sides, GPU_TURNS if whole_runs else ceil(steps / turn), "train")
        last = trained[-1:] if whole_runs else trained
        losses = {name: [loss for turn in last for loss in turn[name]["losses"]] for name in SIDES}
        found = {name: _known(side, Path(folder) / name, losses[name]) for name, side in sides.items()}
        calls = sides["now"].ask("one_calls")["calls"]  # which take memory, so after it was measured
    parted = apart(losses["now"], losses["before"])
    return {"seed": seed, "pairs": _pairs(trained), "apart": parted, "one_calls": calls, **found}


def _generation(
    trees: dict[str, Path], configs: dict[str, Path], changes: Json, progress: Progress
) -> dict[str, list[list[Pair]]]:
    """The pairs of turns of GENERATED in each of PROCESSES, by the model that training begins with."""

    def take(sides: dict[str, Side], ready: dict[str, Json], process: str) -> dict[str, list[Pair]]:
        pairs = {}
        for name, batch in GENERATED.items():
            progress(f"generation, {name}, {process}")
            pairs[name] = _pairs(_turns(sides, PROCESS_TURNS, "generate", batch=batch, tokens=NEW_TOKENS))
        return pairs

    return _in_processes(trees, _runs(configs, changes, turn=1), take)


def _in_processes(trees: dict[str, Path], runs: dict[str, Json], take: Take) -> dict[str, list[list[Pair]]]:
    """In each of PROCESSES of both sides, one after the other, the pairs of turns of what `take` times there."""
    pairs: dict[str, list[list[Pair]]] = {}
    for process in range(1, PROCESSES + 1):
        with both_sides(trees, runs) as (sides, ready):
            for what, turns in take(sides, ready, f"process {process} of {PROCESSES}").items():
                pairs.setdefault(what, []).append(turns)
    return pairs


def _turns(
    sides: dict[str, Side], turns: int, method: str, budget: float = inf, **arguments: Any
) -> list[Json]:  # fmt: skip
    """What both sides say in each turn; each always follows the other. After `budget` seconds there is no further turn, but for
    the first FEWEST."""
    found, begin = [], perf_counter()
    for turn in range(turns):
        if turn >= FEWEST and perf_counter() - begin > budget:
            break
        found.append({name: sides[name].ask(method, **arguments) for name in SIDES})
    return found


def _pairs(turns: Sequence[Json]) -> list[Pair]:
    """All turns but the first, if there are others: it does what is done once."""
    return [
        Pair(**{name: turn[name]["seconds"] for name in SIDES}, waited=max(turn[name]["waited"] for name in SIDES))
        for turn in turns[1:] or turns
    ]


def _known(side: Side, folder: Path, losses: list[float]) -> Json:
    saved = side.ask("save", folder=str(folder))
    file = folder / "answers.json"
    side.ask("answers", checkpoint=str(folder), file=str(file))
    answers = read_json(file)
    return {
        "losses": losses, "loss": losses[-1], "mean_loss": fmean(losses[-LAST:]), "exact": answers["exact"],
        "asked": len(answers["probes"]), "recall": answers["recall"], **saved,
    }  # fmt: skip


def apart(ours: Sequence[float], theirs: Sequence[float]) -> Json | None:
    """The first step (from 1) whose losses differ, and the largest relative difference with its step; None: all are the same."""
    differences = relative_differences(ours, theirs)
    if not any(differences):
        return None
    first = next(step for step, difference in enumerate(differences, 1) if difference)
    return {"first_step": first, **largest_difference(differences)}


def _compared(processes: Sequence[Sequence[Pair]]) -> Json:
    """All `pairs`; how many are `left_out`, as a side WAITED; and of the others what `timing.summarise` says of their
    seconds, the `interval` that has the median of before / now in it, `processes_apart`, how far the processes' medians of it
    are, and the `verdict`: "faster" or "slower" where 1 is not in the interval and the median is further from 1 than NOISE and
    what OF_APART allows; else "as fast" where all of the interval is within WIDE of 1; else "unclear". Where fewer than half
    of a process's pairs are left, figures are of all, and it is "unclear".
    """
    quiet = [[pair for pair in process if pair.waited <= WAITED] for process in processes]
    enough = all(len(some) >= len(process) / 2 for some, process in zip(quiet, processes, strict=True))
    used = quiet if enough else processes
    summary = asdict(summarise([(pair.now, pair.before) for process in used for pair in process]))
    ratios = [[pair.before / pair.now for pair in process] for process in used]
    ratio, interval = summary["median_of_ratios"], median_interval(list(chain(*ratios)))
    each = [median(of_process) for of_process in ratios]
    span = max(each) - min(each)
    chance = max(NOISE, OF_APART * span / max(1, len(each) - 1))
    if interval is None:
        verdict = "too few turns"
    elif not enough:
        verdict = "unclear"
    elif not round(interval[0], 3) <= 1 <= round(interval[1], 3) and abs(ratio - 1) > chance:
        verdict = "faster" if ratio > 1 else "slower"
    else:
        verdict = "as fast" if max(1 - interval[0], interval[1] - 1) <= WIDE else "unclear"
    pairs = list(chain(*processes))
    left_out = len(pairs) - sum(map(len, quiet))
    found = {"pairs": pairs, "left_out": left_out, **summary}
    return found | {"interval": interval, "processes_apart": span, "verdict": verdict}


def median_interval(samples: Sequence[float]) -> tuple[float, float] | None:
    """The samples between which the median of what they are drawn from lies with a certainty of 95% or more, whatever it is: by
    the sign test. None of less than six, which are too few for that."""
    ordered, count = sorted(samples), len(samples)
    beyond, outside = 0, 0.5**count
    while outside <= 0.025:
        beyond += 1
        outside += comb(count, beyond) * 0.5**count
    return (ordered[beyond - 1], ordered[count - beyond]) if beyond else None


def _means(found: Sequence[Json]) -> Json:
    """Over the seeds: the mean loss, the prompts answered, the part of the questions; None where none were asked."""
    means = {name: fmean(one[name] for one in found) for name in ("mean_loss", "exact")}
    return means | {"recall": mean_recall(found)}


def wrong_numbers(config: Config, found: Json, progress: Progress) -> list[str] | None:
    """In words, the operators of this tree that are further from float64 than `ops.check_all` allows, and the calls for the whole
    model that are too far from these.

    They compute as config.runtime says; of a run of single operators it is those whose bits differ. None: there are none.
    """
    seeds = found.get("seeds", [])
    asked = OPERATORS if seeds else [name for name, bits in found.get("bits", {}).items() if bits == "others"]
    if not asked:
        return None
    progress("the operators beside float64" if seeds else "the operators that differ beside float64")
    precision = precision_of(config.runtime)
    wrong: dict[tuple[str, str], str] = {}
    for row in check_all(config.runtime.device, precision.tensors, precision.products, asked):
        if not row["passed"]:
            which = row["operator"], row["implementation"]
            wrong.setdefault(which, f"{', '.join(which)}, {row['case']}: {in_words(row)}")
    calls = (
        f"{one['call']}: {one['what']} {one['apart']:.1e} from the operators', {one['allowed']:.0e} allowed"
        for seed in seeds for one in seed["one_calls"] if not one["passed"]
    )  # fmt: skip
    return [*wrong.values(), *dict.fromkeys(calls)]


def slower(timed: Json) -> list[str]:
    """What is slower now than before by more than SPEED."""
    return [
        f"{name}: now {compared['median_of_ratios']:.2f} times as fast"
        for name, compared in timed.items()
        if compared["verdict"] == "slower" and compared["median_of_ratios"] < 1 - SPEED
    ]


def too_good(learnt: Json) -> list[str]:
    """What is better now than before by more than any change of a model has been."""
    now, before = (learnt[side]["mean_loss"] for side in SIDES)
    if now < before / TOO_GOOD:
        return [f"the mean loss of the last steps is {now:.4f} and was {before:.4f}: can labels be read off the input?"]
    return []


def learns_less(learnt: Json) -> list[str]:
    """What is worse now than before by more than LOSS or RECALL."""
    (now, before), found = (learnt[side] for side in SIDES), []
    if isfinite(before["mean_loss"]) and not now["mean_loss"] <= before["mean_loss"] * (1 + LOSS):  # nor is a NaN
        found.append(f"the mean loss of the last steps is {now['mean_loss']:.4f} and was {before['mean_loss']:.4f}")
    for name, recall, was in less_recall(now["recall"], before["recall"]):
        found.append(f"recall in {name} phrasings is {recall:.1%} and was {was:.1%}")
    return found
