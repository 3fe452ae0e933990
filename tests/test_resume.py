"""A run that was stopped and continued ends in the same bits as one that was not."""

from __future__ import annotations

import json
import math
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_config, tiny_dataset, write_text_run

from dsfast.errors import GpuError, UserError
from dsfast.files import for_one_run
from dsfast.train import Trainer, TrainingError, checkpoint


def tensors(checkpoint: Path) -> dict[str, bytes]:
    """Every tensor of model and optimizer, as bytes."""
    files = ("model.safetensors", "optimizer.safetensors")
    return {f"{f}: {name}": t.numpy().tobytes() for f in files for name, t in load_file(checkpoint / f).items()}


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"], line["expert_load"]) for line in lines]


def assert_same_run(a: Path, b: Path) -> None:
    assert tensors(a / "step-000010") == tensors(b / "step-000010")
    assert losses(a) == losses(b)
    assert len(losses(a)) == 10
    states = [json.loads((folder / "step-000010" / "state.json").read_text()) for folder in (a, b)]
    assert states[0] == states[1]


def straight(folder: Path, **changes) -> Path:
    Trainer(tiny_config(**{"train.checkpoint_every": 5, **changes}), folder, tiny_dataset()).train(quiet=True)
    return folder


def cut_back(folder: Path) -> Path:
    """The folder as it would be after a crash in step 8: the checkpoint of step 5, metrics that went on, leftovers."""
    shutil.rmtree(folder / "step-000010")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:7]) + lines[7][:20])
    (folder / ".step-000007.partial").mkdir()
    (folder / ".step-000007.partial" / "model.safetensors").write_bytes(b"half")
    return folder


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_five_and_five_equal_ten(tmp_path, kind):
    changes = {"train.optimizer": kind}
    whole = straight(tmp_path / "whole", **changes)
    parts = cut_back(shutil.copytree(whole, tmp_path / "parts"))
    config = tiny_config(**{"train.checkpoint_every": 5, **changes})
    result = Trainer(config, parts, tiny_dataset()).train(resume=parts, quiet=True)
    assert (result.steps, len(result.losses)) == (10, 5)
    assert_same_run(whole, parts)
    assert sorted(path.name for path in parts.iterdir()) == sorted(path.name for path in whole.iterdir())


def test_a_gpu_that_fails_while_resuming_is_not_the_checkpoints_fault(tmp_path, monkeypatch):
    def busy(states):
        raise torch.AcceleratorError("CUDA error: device busy\nmore")

    folder = tmp_path / "run"
    Trainer(tiny_config(**{"train.steps": 2}), folder, tiny_dataset()).train(quiet=True)
    monkeypatch.setattr(checkpoint, "restore_random_states", busy)
    again = Trainer(tiny_config(**{"train.steps": 3}), folder, tiny_dataset())
    with pytest.raises(
        GpuError, match=r"^the GPU failed after step 0: CUDA error: device busy; the last checkpoint is .*-000002$"
    ):
        again.train(resume=folder, quiet=True)


def test_resume_into_another_folder(tmp_path):
    whole = straight(tmp_path / "whole")
    config = tiny_config(**{"train.checkpoint_every": 5})
    Trainer(config, tmp_path / "other", tiny_dataset()).train(resume=whole / "step-000005", quiet=True)
    assert tensors(whole / "step-000010") == tensors(tmp_path / "other" / "step-000010")
    assert losses(tmp_path / "other") == losses(whole)[5:]
    with pytest.raises(UserError, match="other: expected a new or empty folder"):
        Trainer(config, tmp_path / "other", tiny_dataset()).train(resume=whole / "step-000005", quiet=True)


def test_a_folder_that_another_run_writes_into_is_left_alone(tmp_path):
    Trainer(tiny_config(**{"train.steps": 5}), tmp_path / "run", tiny_dataset()).train(quiet=True)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with for_one_run(tmp_path / "run"), pytest.raises(UserError, match="run: another run is writing into it"):
        Trainer(tiny_config(), tmp_path / "run", tiny_dataset()).train(resume=tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    Trainer(tiny_config(), tmp_path / "run", tiny_dataset()).train(resume=tmp_path / "run", quiet=True)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 10


def test_bad_steps_in_a_row_are_counted_across_a_resume(tmp_path):
    config = tiny_config(**{"train.max_bad_steps": 5})
    first = Trainer(config, tmp_path, tiny_dataset())
    first.steps_done, first.bad_steps = 5, 4
    saved = first.save()
    second = Trainer(config, None, tiny_dataset())
    second.model.norm.weight.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(TrainingError, match=r"step 6: 5 steps in a row .*gradient of 'norm.weight'"):
        second.train(resume=saved, quiet=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed was 0 there and is 1"),
        ({"train.batch_size": 2}, "train.batch_size was 3 there and is 2"),
        ({"train.optimizer": "adamw"}, "train.optimizer was 'muon' there and is 'adamw'"),
        ({"model.kv_lora_rank": 4}, "model.kv_lora_rank was 8 there and is 4"),
    ],
)
def test_another_run_cannot_be_resumed(tmp_path, changes, message):
    folder = cut_back(straight(tmp_path / "run"))
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(UserError, match=f"step-000005: cannot be resumed: {message}"):
        Trainer(tiny_config(**changes), folder, tiny_dataset()).train(resume=folder, quiet=True)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_other_data_cannot_be_resumed(tmp_path):
    folder = cut_back(straight(tmp_path / "run"))
    with pytest.raises(UserError, match="cannot be resumed: data: seed was 0 there and is 3"):
        Trainer(tiny_config(), folder, tiny_dataset(seed=3)).train(resume=folder, quiet=True)


def test_later_checkpoints_stand_in_the_way(tmp_path):
    folder = straight(tmp_path / "run")
    with pytest.raises(UserError, match=r"run: holds step-000010, later than step 5"):
        Trainer(tiny_config(), folder, tiny_dataset()).train(resume=folder / "step-000005", quiet=True)


def test_nothing_left_to_do(tmp_path):
    folder = straight(tmp_path / "run")
    with pytest.raises(UserError, match=r"train.steps: expected more than the 10 done already, got 10"):
        Trainer(tiny_config(), folder, tiny_dataset()).train(resume=folder, quiet=True)


def command(*arguments: object, cache: Path) -> subprocess.Popen:
    """A process that takes as many threads as its config's runtime.threads says; they wait without spinning."""
    environment = {**os.environ, "DSFAST_CACHE": str(cache), "OMP_WAIT_POLICY": "passive"}
    environment.pop("OMP_NUM_THREADS", None)
    line = [sys.executable, "-W", "ignore", "-m", "dsfast.train", *map(str, arguments)]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("threads", [1, 2])
def test_sigterm_and_resume_in_other_processes(tmp_path, threads):
    """Run whole in one process; run, stop on SIGTERM and continue in two others; the same bits."""
    changes = {"train.steps": 200, "train.log_every": 1, "runtime.threads": threads}
    config, cache = write_text_run(tmp_path, **changes), tmp_path / "cache"
    run = command("--config", config, "--output-dir", tmp_path / "parts", cache=cache)
    for line in run.stdout:
        if line.startswith("step   3/"):
            run.send_signal(signal.SIGTERM)
    assert run.wait() == 143
    message = run.stderr.read()
    (checkpoint,) = (tmp_path / "parts").glob("step-*")
    step = int(checkpoint.name.removeprefix("step-"))
    assert 3 <= step < 200
    assert f"stopped after step {step} of 200; saved as {checkpoint}" in message
    assert "Traceback" not in message
    for arguments in (
        ("--output-dir", tmp_path / "parts", "--resume"),
        ("--config", config, "--output-dir", tmp_path / "whole"),
    ):
        process = command(*arguments, cache=cache)  # one after the other: two by two threads would want four processors
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert tensors(tmp_path / "parts" / "step-000200") == tensors(tmp_path / "whole" / "step-000200")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_terminal_that_is_closed_stops_the_run_as_a_signal_does(tmp_path):
    """What the run would still show goes nowhere; the step is finished and saved."""
    config = write_text_run(tmp_path, **{"train.steps": 100_000, "train.log_every": 1, "runtime.threads": 1})
    child, terminal = pty.fork()
    if not child:
        os.environ |= {"DSFAST_CACHE": str(tmp_path / "cache"), "OMP_WAIT_POLICY": "passive"}
        os.execv(
            sys.executable, [sys.executable, "-m", "dsfast.train", "--config", config, "--output-dir", tmp_path / "run"]
        )
    shown = b""
    while b"step " not in shown:
        shown += os.read(terminal, 4096)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 129
    assert [path.name.partition("-")[0] for path in (tmp_path / "run").glob("step-*")] == ["step"]


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    config = write_text_run(tmp_path)
    process = command("--config", config, "--output-dir", tmp_path / "run", "--resume", cache=tmp_path / "cache")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors == f"error: {tmp_path / 'run'}: no such folder; expected a checkpoint or a run folder\n"
    assert not (tmp_path / "run").exists()
