"""Checkpoints: what is saved comes back bit for bit; what is damaged, foreign or of another shape is named."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_dataset
from torch import nn
from unreadable import unreadable

from dsfast.data import train_tokenizer
from dsfast.errors import UserError
from dsfast.files import write_json
from dsfast.model import DeepseekV3
from dsfast.train import checkpoint as ckpt
from dsfast.train.optimizer import build_optimizer


def saved(folder: Path, step: int = 7, config=None, model=None) -> Path:
    """A checkpoint of a tiny model whose optimizer has made one update."""
    config = config or tiny_config()
    torch.manual_seed(step)
    model = model or DeepseekV3(config.model)
    optimizer = build_optimizer(model, config.train)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step(1.0)
    state = ckpt.TrainingState(step=step, bad_steps=2, random=ckpt.random_states())
    data = tiny_dataset()
    folder.mkdir(exist_ok=True)
    return ckpt.save_checkpoint(folder, model, optimizer, data.tokenizer, config, state, data.manifest)


def test_round_trip_is_bitwise(tmp_path):
    config = tiny_config()
    torch.manual_seed(3)
    model = DeepseekV3(config.model)
    model.layers[1].mlp.gate.e_score_correction_bias += 0.25
    path = saved(tmp_path, model=model)
    assert path == tmp_path / "step-000007"
    assert sorted(p.name for p in path.iterdir()) == sorted([*ckpt.FILES, "manifest.json"])
    assert [p.name for p in tmp_path.iterdir()] == ["step-000007"]
    loaded, tokenizer, loaded_config = ckpt.load_checkpoint(tmp_path)
    assert loaded_config == config
    assert not loaded.training
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert tokenizer.to_str() == tiny_dataset().tokenizer.to_str()
    text = "a text that mentions <|eos|>"
    assert tokenizer.encode(text).ids == tiny_dataset().tokenizer.encode(text).ids
    assert tokenizer.token_to_id("<|eos|>") not in tokenizer.encode(text).ids
    assert len({(path / name).stat().st_mode for name in ckpt.FILES}) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_checkpoint_is_read_whatever_the_default_dtype_is(dtype, tmp_path):
    path = saved(tmp_path)
    torch.set_default_dtype(dtype)
    try:
        loaded, _, _ = ckpt.load_checkpoint(path)
    finally:
        torch.set_default_dtype(torch.float32)
    stored = load_file(path / "model.safetensors")
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, stored[name], rtol=0, atol=0)  # their dtypes too
    assert torch.equal(loaded.rope.cos, DeepseekV3(tiny_config().model).rope.cos)


def test_training_state_round_trip(tmp_path):
    path = saved(tmp_path)
    draws = (random.random(), np.random.rand(), torch.rand(3))
    config = tiny_config()
    model = DeepseekV3(config.model)
    optimizer = build_optimizer(model, config.train)
    state = ckpt.load_training_state(path, model, optimizer)
    assert (state.step, state.bad_steps) == (7, 2)
    assert random.random() == draws[0]
    assert np.random.rand() == draws[1]
    assert torch.equal(torch.rand(3), draws[2])
    stored = load_file(path / "optimizer.safetensors")
    assert any(tensor.count_nonzero() for name, tensor in stored.items() if name.startswith("muon."))
    for name, tensor in optimizer.state_dict().items():
        assert torch.equal(tensor, stored[name]), name


def test_the_second_of_two_gaussians_is_kept():
    """Python and NumPy draw them by twos."""

    def draw():
        return random.gauss(0.0, 1.0), np.random.normal()

    random.seed(0)
    np.random.seed(0)
    draw()
    states = json.loads(json.dumps(ckpt.random_states()))
    expected = draw()
    draw()
    ckpt.restore_random_states(states)
    assert draw() == expected


def test_tied_weights_are_saved_once():
    model = nn.Module()
    model.first, model.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    model.second.weight = model.first.weight
    assert list(ckpt.unique_tensors(model)) == ["first.weight"]


def test_newest_complete_checkpoint_is_taken(tmp_path):
    for step in (7, 999_999, 1_000_000):
        saved(tmp_path, step)
    (tmp_path / "step-2000000").mkdir()
    (tmp_path / ".step-3000000.partial").mkdir()
    with pytest.warns(
        UserWarning, match=r"step-2000000 has no manifest.json and is passed over; step-1000000 is taken"
    ):
        assert ckpt.find_checkpoint(tmp_path).name == "step-1000000"
    assert ckpt.find_checkpoint(tmp_path / "step-000007").name == "step-000007"


def test_a_copy_and_an_older_one_that_is_not_complete_are_passed_over_without_a_word(tmp_path):
    saved(tmp_path, 7)
    for name in ("step-000005", "step-000009-copy"):
        (tmp_path / name).mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ckpt.find_checkpoint(tmp_path).name == "step-000007"
    assert [path.name for path in ckpt.checkpoints(tmp_path)] == ["step-000005", "step-000007"]


def test_what_a_kill_left_of_the_same_step_is_written_anew(tmp_path):
    left = tmp_path / ".step-000007.partial"
    left.mkdir()
    (left / "other.json").write_text("{}")
    path = saved(tmp_path)
    assert sorted(p.name for p in path.iterdir()) == sorted([*ckpt.FILES, "manifest.json"])
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_is_never_overwritten(tmp_path):
    path = saved(tmp_path)
    before = (path / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="step-000007: exists already"):
        saved(tmp_path)
    assert (path / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("name", ckpt.FILES)
def test_truncated_damaged_and_missing_files_are_named(tmp_path, name):
    path = saved(tmp_path)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:-5])
    with pytest.raises(UserError, match=rf"{name}: truncated .*{len(content) - 5} bytes, expected {len(content)}"):
        ckpt.load_checkpoint(path)
    middle = len(content) // 2
    (path / name).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(UserError, match=rf"{name}: damaged: SHA-256"):
        ckpt.load_checkpoint(path)
    (path / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: missing"):
        ckpt.load_checkpoint(path)


def test_foreign_folders_are_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: is no folder; expected a checkpoint or a run folder"):
        ckpt.load_checkpoint(tmp_path / "file")
    with pytest.raises(UserError, match="absent: no such folder"):
        ckpt.load_checkpoint(tmp_path / "absent")
    with pytest.raises(UserError, match="no checkpoint here"):
        ckpt.load_checkpoint(tmp_path)
    for manifest in ('{"format_version": 2}', "[]", '{"files": {}}'):
        (tmp_path / "manifest.json").write_text(manifest)
        with pytest.raises(UserError, match=r"manifest.json: not a dsfast checkpoint of format_version 1"):
            ckpt.load_checkpoint(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format_version": 1')
    with pytest.raises(UserError, match=r"manifest.json: not valid JSON"):
        ckpt.load_checkpoint(tmp_path)
    for files in ("{}", '{"model.safetensors": 3}', '{"model.safetensors": {"bytes": 3}}'):
        (tmp_path / "manifest.json").write_text(f'{{"format_version": 1, "data": {{}}, "files": {files}}}')
        with pytest.raises(UserError, match=r"manifest.json: files: expected sha256 and bytes for 'model.safetensors'"):
            ckpt.load_checkpoint(tmp_path)
    for objects in ('"data": {}, "files": null', '"data": [], "files": {}', '"files": {}'):
        (tmp_path / "manifest.json").write_text(f'{{"format_version": 1, {objects}}}')
        with pytest.raises(UserError, match=r"manifest.json: expected the objects 'data' and 'files'"):
            ckpt.load_checkpoint(tmp_path)


def refresh_manifest(path: Path) -> None:
    """Make the manifest agree with the files, as in a checkpoint that was written that way."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = {name: ckpt._fingerprint(path / name) for name in ckpt.FILES}
    write_json(path / "manifest.json", manifest)


def test_another_shape_names_file_tensor_expected_and_found(tmp_path):
    path = saved(tmp_path, config=tiny_config(), model=DeepseekV3(tiny_config(**{"model.kv_lora_rank": 12}).model))
    with pytest.raises(UserError, match=r"model.safetensors: tensor 'layers.0.*' is float32 \[16, 24\].* \[12, 24\]"):
        ckpt.load_checkpoint(path)
    config = tiny_config(**{"train.optimizer": "adamw"})
    model = DeepseekV3(config.model)
    before = [p.detach().clone() for p in model.parameters()]
    other = saved(tmp_path, step=8)
    with pytest.raises(
        UserError, match=r"optimizer.safetensors: tensor 'adamw.exp_avg.embed_tokens.projection' is missing"
    ):
        ckpt.load_training_state(other, model, build_optimizer(model, config.train))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_tensor_that_has_no_place_is_named(tmp_path, name):
    path = saved(tmp_path)
    save_file(load_file(path / name) | {"more": torch.zeros(2, 3)}, path / name)
    refresh_manifest(path)
    model = DeepseekV3(tiny_config().model)
    with pytest.raises(UserError, match=rf"{name}: tensor 'more' \(float32 \[2, 3\]\) has no place in this model$"):
        ckpt.load_training_state(path, model, build_optimizer(model, tiny_config().train))


def test_a_tokenizer_reads_no_special_token_in_a_text(tmp_path):
    tokenizer = train_tokenizer(["x"], 259)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    found = ckpt._load_tokenizer(tmp_path / "tokenizer.json").encode("a<|eos|>").ids
    assert found == tokenizer.encode("a<|eos|>").ids
    assert min(found) > 2


def test_of_more_gpus_than_are_here_the_states_of_those_that_are_come_back(monkeypatch):
    given = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", given.extend)
    monkeypatch.setattr(
        torch.cuda, "get_rng_state_all", lambda: [torch.full((4,), n, dtype=torch.uint8) for n in range(3)]
    )
    ckpt.restore_random_states(json.loads(json.dumps(ckpt.random_states())))
    assert [state.tolist() for state in given] == [[0] * 4, [1] * 4]


def test_garbage_with_a_right_manifest_is_still_one_line(tmp_path):
    model = DeepseekV3(tiny_config().model)
    optimizer = build_optimizer(model, tiny_config().train)

    def resume(path: Path) -> None:
        ckpt.load_training_state(path, model, optimizer)

    loaders = {
        "model.safetensors": ckpt.load_checkpoint,
        "tokenizer.json": ckpt.load_checkpoint,
        "state.json": resume,
        "optimizer.safetensors": resume,
    }
    for name, load in loaders.items():
        path = saved(tmp_path / name.split(".")[0])
        (path / name).write_text('{"step": 3}')
        refresh_manifest(path)
        with pytest.raises(UserError, match=rf"{name}: not "):
            load(path)


@pytest.mark.parametrize("values", [{"step": "six"}, {"step": -3}, {"step": 3, "bad_steps": 0.5}])
def test_a_state_that_no_run_can_stand_at_is_one_line(values, tmp_path):
    model = DeepseekV3(tiny_config().model)
    path = saved(tmp_path)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | values))
    refresh_manifest(path)
    with pytest.raises(UserError, match=r"state.json: not the training state .* must be whole numbers from 0"):
        ckpt.load_training_state(path, model, build_optimizer(model, tiny_config().train))


def test_files_folder_and_the_folders_new_name_are_flushed_to_the_disk(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda number: flushed.append(Path(os.readlink(f"/proc/self/fd/{number}"))))
    saved(tmp_path)
    partial = tmp_path / ".step-000007.partial"
    assert flushed[-2:] == [partial, tmp_path]
    assert sorted(flushed[:-2]) == sorted(partial / name for name in [*ckpt.FILES, "manifest.json"])


def test_unwritable_folder(tmp_path):
    config, data = tiny_config(), tiny_dataset()
    model = DeepseekV3(config.model)
    optimizer = build_optimizer(model, config.train)
    state = ckpt.TrainingState(step=7)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="step-000007: cannot be written: Not a directory"):
        ckpt.save_checkpoint(tmp_path / "file" / "run", model, optimizer, data.tokenizer, config, state, data.manifest)


def test_a_full_disk_is_one_line_and_leaves_no_checkpoint(tmp_path):
    with file_size_limit(1000), pytest.raises(UserError, match=r"step-000007: cannot be written: .*File too large"):
        saved(tmp_path)
    assert list(tmp_path.iterdir()) == []
    saved(tmp_path)


@contextmanager
def file_size_limit(size: int):
    """Inside, files stop growing at `size` bytes, as on a full disk."""
    handler, (soft, hard) = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("closed", [".", "step-000007", "step-000007/manifest.json", "step-000007/model.safetensors"])
def test_what_may_not_be_read_is_one_line(tmp_path, monkeypatch, closed):
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)  # pytest's is closed to all but its owner
    saved(tmp_path)
    for path in (".", "step-000007"):
        with unreadable(Path(closed)), pytest.raises(UserError, match=r": cannot be read: Permission denied$"):
            ckpt.load_checkpoint(path)


SAVE_FOREVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_checkpoint import saved
step = int(sys.argv[3])
while True:
    saved(Path(sys.argv[1]), step)
    print(step, flush=True)
    step += 1
"""


def test_a_kill_while_saving_leaves_only_whole_checkpoints(tmp_path):
    run, delays = tmp_path / "run", random.Random(0)
    for kill in range(3):
        arguments = [str(run), str(Path(__file__).parent), str(1000 * kill + 1)]
        process = subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, *arguments], stdout=subprocess.PIPE)
        process.stdout.readline()  # the first is saved
        time.sleep(delays.uniform(0.0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        found = ckpt.checkpoints(run)
        assert ckpt.checkpoint_step(found[-1]) > 1000 * kill
        for path in found:
            ckpt.load_checkpoint(path)
        for path in found:
            shutil.rmtree(path)
