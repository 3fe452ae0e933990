"""`bench learning`: whether a run learns with dsfast's kernels what it learns in plain PyTorch in float32, seed by seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import nan
from statistics import fmean

from dsfast.config import Config
from dsfast.evaluate import check_taught, measure_taught
from dsfast.evaluate.recall import as_json
from dsfast.files import Json
from dsfast.train import Trainer, TrainingError
from dsfast.triton_kernels.launch import dtype_name

REFERENCE = {"runtime.dtype": "float32", "runtime.kernels": {"default": "reference"}}
TOLERANCE = 0.005
"""Relative, of the last step's loss."""
LAST = 10
"""Steps over which the loss is also averaged: one step's is that of one batch."""


def run_learning(config: Config, seeds: Iterable[int], progress: Callable[[str], None]) -> Json:
    """Train `config` with each seed twice, as it stands ("dsfast") and by REFERENCE; data and first weights are the same.

    Returns `tolerance`, `seeds` (for each seed what `_run` returns of both, `difference`, that of the last losses over the
    reference's, and whether that is `right`: within the tolerance, so a number) and `status`: "right" or "wrong".
    """
    rows = []
    for seed in seeds:
        runs = {}
        for name, changes in (("reference", REFERENCE), ("dsfast", {})):
            progress(f"seed {seed}: {name}")
            runs[name] = _run(config.replace(**{"seed": seed, **changes}))
        difference = runs["dsfast"]["loss"] / runs["reference"]["loss"] - 1
        rows.append({"seed": seed, **runs, "difference": difference, "right": abs(difference) <= TOLERANCE})
    return {"tolerance": TOLERANCE, "seeds": rows, "status": "right" if all(row["right"] for row in rows) else "wrong"}


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
