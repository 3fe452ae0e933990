"""`bench learning`: whether a run learns with dsfast's kernels what it learns in plain PyTorch in float32, seed by seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import nan
from statistics import fmean

from dsfast.config import Config
from dsfast.evaluate import check_taught, measure_taught
from dsfast.evaluate.recall import as_json
from dsfast.files import Json
from dsfast.train import Trainer, TrainingError
from dsfast.triton_kernels.launch import dtype_name

REFERENCE = {"runtime.dtype": "float32", "runtime.kernels": {"default": "reference"}}
LAST = 10
"""Steps whose losses are averaged: one step's is that of one batch."""
LOSS, RECALL = 0.02, 0.05
"""A run's mean loss that is further off, relatively, or a part of questions answered that is lower by more, is another run's.
Where roundings alone differ the losses come apart by up to 0.9% and the answers by 2 points, in 200 steps of the 500K model."""
TOLERANCE = 0.005
"""Relative, of the mean loss over the seeds: of five it differed by 0.1 to 0.2%, plain PyTorch from itself by as much."""


def run_learning(config: Config, seeds: Iterable[int], progress: Callable[[str], None]) -> Json:
    """Train `config` with each seed twice, as it stands ("dsfast") and by REFERENCE; data and first weights are the same.

    Returns `tolerance`; `seeds`, for each seed what `_run` returns of both, and `difference`, that of their mean losses over the
    reference's; `difference`, the same of the means over the seeds; `problems`, what is wrong, a line each; and `status`:
    "right" or "wrong".
    """
    rows = []
    for seed in seeds:
        runs = {}
        for name, changes in (("reference", REFERENCE), ("dsfast", {})):
            progress(f"seed {seed}: {name}")
            runs[name] = _run(config.replace(**{"seed": seed, **changes}))
        rows.append({"seed": seed, **runs, "difference": _difference([runs])})
    difference = _difference(rows)
    problems = _problems(rows, difference)
    return {
        "tolerance": TOLERANCE, "seeds": rows, "difference": difference, "problems": problems,
        "status": "wrong" if problems else "right",
    }  # fmt: skip


def _difference(rows: Sequence[Json]) -> float:
    """How far the mean over `rows` of dsfast's mean losses is from the reference's, as a part of that."""
    ours, reference = (fmean(row[name]["mean_loss"] for row in rows) for name in ("dsfast", "reference"))
    return ours / reference - 1


def mean_recall(runs: Sequence[Json]) -> dict[str, float | None]:
    """Phrasings -> the part of the questions answered, the mean of `runs`; None where none were asked."""
    recalls = {name: [run["recall"][name] for run in runs] for name in runs[0]["recall"]}
    return {name: None if None in each else fmean(one["fraction"] for one in each) for name, each in recalls.items()}


def less_recall(now: dict[str, float | None], before: dict[str, float | None]) -> Iterator[tuple[str, float, float]]:
    """(phrasings, now, before) where less is answered, by more than RECALL."""
    for name, recall in now.items():
        was = before.get(name)
        if None not in (recall, was) and recall < was - RECALL:
            yield name, recall, was


def _problems(rows: Sequence[Json], difference: float) -> list[str]:
    """Runs that failed; else mean losses that are off by more than LOSS, or over all seeds TOLERANCE, and recall that is lower
    over all seeds by more than RECALL."""
    failed = [
        f"seed {row['seed']}: {name}: {row[name]['failed']}"
        for row in rows
        for name in ("dsfast", "reference")
        if "failed" in row[name]
    ]
    if failed:
        return failed
    found = [
        f"seed {row['seed']}: the mean loss of the last {LAST} steps differs by {row['difference']:+.2%}"
        for row in rows
        if not abs(row["difference"]) <= LOSS
    ]
    if not abs(difference) <= TOLERANCE:
        found.append(f"the mean loss of the last {LAST} steps differs by {difference:+.2%} over the seeds")
    ours, reference = (mean_recall([row[side] for row in rows]) for side in ("dsfast", "reference"))
    return found + [
        f"recall in {name} phrasings is {recall:.1%}, in plain PyTorch {was:.1%}"
        for name, recall, was in less_recall(ours, reference)
    ]


def _run(config: Config) -> Json:
    """Train once: `loss` of the last step, `mean_loss` of the LAST ones, `seconds` of training, `recall` of taught facts.

    Of a run whose losses became no numbers these are none either, and `failed` says why.
    """
    trainer = Trainer(config)
    data = trainer.dataset
    check_taught(data.tokenizer, data.taught, config.model.max_position_embeddings)
    products = {"products": dtype_name(trainer.precision.products)}
    try:
        result = trainer.train(quiet=True)
    except TrainingError as error:
        recall = {"taught": None, "heldout": None}
        return {"loss": nan, "mean_loss": nan, "seconds": nan, **products, "recall": recall, "failed": str(error)}
    recall = measure_taught(trainer.model, data.tokenizer, data.taught)
    return {
        "loss": result.final_loss,
        "mean_loss": fmean(result.losses[-LAST:]),
        "seconds": result.seconds,
        **products,
        "recall": as_json(recall),
    }
