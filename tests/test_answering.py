"""On which device the model of a checkpoint answers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dsfast import ops
from dsfast.config import default_config
from dsfast.errors import GpuError, UserError
from dsfast.evaluate.__main__ import _check_not_a_runs_own
from dsfast.train.runtime import answering


class Model(SimpleNamespace):
    def to(self, device: str) -> None:
        self.device = device


def answers_on(trained: str, asked: str | None, kernels: dict[str, str] | None = None) -> str:
    model = Model()
    config = default_config("cpu").replace(**{"runtime.device": trained, "runtime.kernels": kernels or {}})
    with answering(model, config, asked):
        model.chosen = {row["operator"]: row["implementation"] for row in ops.report(model.device)}
    assert model.chosen["rope"] == ("reference" if kernels and model.device == trained else model.chosen["rms_norm"])
    return model.device


@pytest.mark.parametrize(
    ("here", "trained", "asked", "expected"),
    [
        (False, "cpu", None, "cpu"),
        (False, "cuda", "cpu", "cpu"),
        (True, "cpu", None, "cpu"),
        (True, "cuda", None, "cuda"),
        (True, "cpu", "cuda", "cuda"),
        (True, "cuda", "cpu", "cpu"),
    ],
)
def test_what_is_asked_for_else_where_it_was_trained(here, trained, asked, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here)
    monkeypatch.setattr(ops.dispatch.triton, "available", lambda operator: (True, ""))
    assert answers_on(trained, asked, {"rope": "reference"}) == expected


def test_trained_on_a_gpu_that_is_not_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="trained on a GPU, and torch finds none here: it answers on the CPU"):
        assert answers_on("cuda", None) == "cpu"


def test_a_gpu_asked_for_that_is_not_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: torch finds no GPU here; known here: cpu"):
        answers_on("cpu", "cuda")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            r"^out of GPU memory while loading the model: it takes a GPU with room, or --device cpu \(CUDA out of memory.\)$",
        ),
        (
            RuntimeError("CUDA error: device busy\nmore"),
            "^the GPU failed while loading the model: CUDA error: device busy$",
        ),
    ],
)
def test_a_gpu_that_fails(error, message, monkeypatch):
    def to(model, device):
        raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Model, "to", to)
    with pytest.raises(GpuError, match=message):
        answers_on("cuda", None)


def test_results_take_no_place_of_a_runs_own_files_or_of_the_prompts(tmp_path):
    (tmp_path / "run" / "step-000005").mkdir(parents=True)
    prompts = tmp_path / "prompts.json"
    for file in (tmp_path / "run" / "step-000005" / "manifest.json", prompts):
        file.write_text("{}")
    refused = {
        tmp_path / "run" / "step-000005" / "new.json": "that is not in a checkpoint$",
        tmp_path / "run" / "config.json": "another file than the run's own$",
        tmp_path / "run" / "metrics.jsonl": "another file than the run's own$",
        prompts: "another file than the prompts$",
    }
    for path, message in refused.items():
        with pytest.raises(UserError, match=f"^--json {path}: expected (a file )?{message}"):
            _check_not_a_runs_own(path, str(prompts))
    for path in (tmp_path / "run" / "answers.json", tmp_path / "config.json"):
        _check_not_a_runs_own(path, str(prompts))
    _check_not_a_runs_own(prompts, None)
