"""A checkpoint is one directory `step-000200`, written beside its final name and committed by one rename.

    model.safetensors      parameters and persistent buffers; tied weights once
    optimizer.safetensors  Optimizer.state_dict()
    state.json             step, steps skipped in a row, states of the random generators
    config.json            the run's config
    tokenizer.json         the tokenizer, in the format of the tokenizers library
    manifest.json          format version, the data manifest, SHA-256 and size of every other file

The data position is the step: PackedRows.batch is a pure function of (seed, step, batch size). Nothing is pickled.
"""

from __future__ import annotations

import base64
import hashlib
import os
import random
import re
import shutil
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor, nn

from dsfast.config import Config, load_config
from dsfast.data import reading_no_special_tokens
from dsfast.errors import UserError
from dsfast.files import expect_possible_name, os_errors_as, read_json, write_json
from dsfast.model import DeepseekV3
from dsfast.model.tensors import read_tensors, write_tensors
from dsfast.train.optimizer import Optimizer
from dsfast.triton_kernels.launch import dtype_name

FORMAT_VERSION = 1
FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "config.json", "tokenizer.json")
_NAME = re.compile(r"step-\d{6,}")
_PARTIAL = ".partial"


@dataclass
class TrainingState:
    """Where a run stands. `step` counts the steps done; `random` is what `random_states` returned."""

    step: int
    bad_steps: int = 0
    random: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    run_dir: str | Path,
    model: nn.Module,
    optimizer: Optimizer,
    tokenizer: Tokenizer,
    config: Config,
    state: TrainingState,
    data_manifest: dict[str, Any],
) -> Path:
    """Write `run_dir/step-NNNNNN` and return it. At any moment it is there whole or not at all.

    Raises UserError when it exists already or cannot be written.
    """
    expect_possible_name(run_dir)
    final = Path(run_dir) / f"step-{state.step:06d}"
    partial = final.with_name(f".{final.name}{_PARTIAL}")
    if final.exists():
        raise UserError(f"{final}: exists already; a checkpoint is never overwritten")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with os_errors_as(f"{final}: cannot be written", SafetensorError):
            partial.mkdir(parents=True)
            write_json(partial / "config.json", config.to_dict())
            write_json(partial / "state.json", asdict(state))
            (partial / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
            for name, tensors in (("model", unique_tensors(model)), ("optimizer", optimizer.state_dict())):
                write_tensors(partial / f"{name}.safetensors", _cpu(tensors), partial / "config.json")
            files = {name: _fingerprint(partial / name) for name in FILES}
            write_json(
                partial / "manifest.json", {"format_version": FORMAT_VERSION, "data": data_manifest, "files": files}
            )
            for path in (*partial.iterdir(), partial):
                _sync(path)
            partial.rename(final)
            _sync(final.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def find_checkpoint(path: str | Path) -> Path:
    """`path` itself when it is a checkpoint, else the newest complete one in it, with a warning where others are newer. Raises
    UserError."""
    path = Path(path)
    with os_errors_as(f"{path}: cannot be read"):
        if is_checkpoint(path):
            return path
        if not path.is_dir():
            problem = "is no folder" if path.exists() else "no such folder"
            raise UserError(f"{path}: {problem}; expected a checkpoint or a run folder")
        steps = checkpoints(path)
        found = [step for step in steps if is_checkpoint(step)]
    if not found:
        raise UserError(
            f"{path}: no checkpoint here; expected manifest.json, or folders step-NNNNNN with one. A run that ended before its"
            " first can only be begun anew, in another folder"
        )
    if steps[-1] != found[-1]:
        warnings.warn(f"{steps[-1]} has no manifest.json and is passed over; {found[-1].name} is taken", stacklevel=2)
    return found[-1]


def checkpoints(run_dir: Path) -> list[Path]:
    """What is named as a checkpoint in a run folder, complete or not, oldest first."""
    return sorted((p for p in run_dir.iterdir() if _NAME.fullmatch(p.name)), key=checkpoint_step)


def is_checkpoint(path: Path) -> bool:
    """Whether a complete checkpoint lies in `path`."""
    return (path / "manifest.json").is_file()


def checkpoint_step(path: Path) -> int:
    """The step in the name of a folder that `checkpoints` returns."""
    return int(path.name.removeprefix("step-"))


def load_checkpoint(path: str | Path) -> tuple[DeepseekV3, Tokenizer, Config]:
    """(model in float32 on the CPU, in evaluation mode; tokenizer; config) of a checkpoint or of a run folder's newest one.

    Raises UserError when a file is missing, damaged or foreign, or a tensor has another shape than the config says.
    """
    path = find_checkpoint(path)
    _verify(path)
    config = load_config(path / "config.json")
    model = DeepseekV3(config.model).float()  # whatever torch's default dtype is
    _load_model(path / "model.safetensors", model)
    return model.eval(), _load_tokenizer(path / "tokenizer.json"), config


def load_training_state(path: str | Path, model: nn.Module, optimizer: Optimizer) -> TrainingState:
    """Fill model and optimizer in place, set the random generators, return where the run stood. Raises UserError."""
    path = find_checkpoint(path)
    _verify(path)
    file = path / "optimizer.safetensors"
    moments = read_tensors(file)
    _check_tensors(optimizer.state_dict(), moments, file)
    try:
        state = TrainingState(**read_json(path / "state.json"))
        if not all(type(count) is int and count >= 0 for count in (state.step, state.bad_steps)):
            raise ValueError(
                f"step and bad_steps must be whole numbers from 0, got {state.step!r} and {state.bad_steps!r}"
            )
        restore_random_states(state.random)
    except (torch.AcceleratorError, torch.OutOfMemoryError):
        raise  # the checkpoint is not to blame
    except (TypeError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        message = f"not the training state of a dsfast checkpoint: {type(error).__name__}: {error}"
        raise UserError(f"{path / 'state.json'}: {message}") from None
    _load_model(path / "model.safetensors", model)
    optimizer.load_state_dict(moments)
    return state


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint at `path`; UserError when it is not one of this format."""
    file = path / "manifest.json"
    manifest = read_json(file)
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{file}: not a dsfast checkpoint of format_version {FORMAT_VERSION}; found {version!r}")
    data, files = manifest.get("data"), manifest.get("files")
    if not isinstance(data, dict) or not isinstance(files, dict):
        raise UserError(f"{file}: expected the objects 'data' and 'files'; not a dsfast checkpoint")
    for name in FILES:
        entry = files.get(name)
        if not isinstance(entry, dict) or entry.keys() != {"sha256", "bytes"}:
            raise UserError(f"{file}: files: expected sha256 and bytes for {name!r}, got {entry!r}")
    return manifest


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """state_dict without the second name of tied weights."""
    names: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), name)
    kept = set(names.values())
    return {name: tensor for name, tensor in model.state_dict().items() if name in kept}


def random_states() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's global generators, JSON-able; a GPU's where this process uses one."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "python": [version, _encode(np.array(numbers, dtype=np.uint32)), gauss],
        "numpy": [kind, _encode(keys), position, has_gauss, cached],
        "torch": _encode(torch.get_rng_state().numpy()),
        "cuda": [_encode(state.numpy()) for state in cuda],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Go back to what `random_states` returned. KeyError, ValueError, TypeError, RuntimeError or OverflowError for all else."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(_decode(numbers, np.uint32).tolist()), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, _decode(keys, np.uint32), *rest))
    torch.set_rng_state(torch.from_numpy(_decode(states["torch"], np.uint8)))
    if states["cuda"] and torch.cuda.is_initialized():
        known = states["cuda"][: torch.cuda.device_count()]  # the run may have been saved where there were more
        torch.cuda.set_rng_state_all([torch.from_numpy(_decode(state, np.uint8)) for state in known])


def _verify(path: Path) -> None:
    """Every file is there with the size and the hash that the manifest gives."""
    files = read_manifest(path)["files"]
    for name in FILES:
        file, expected = path / name, files[name]
        with os_errors_as(f"{file}: cannot be read"):
            if not file.is_file():
                raise UserError(f"{file}: missing; the checkpoint is not complete")
            found = _fingerprint(file)
        if found["bytes"] != expected["bytes"]:
            raise UserError(f"{file}: truncated or damaged: {found['bytes']} bytes, expected {expected['bytes']}")
        if found["sha256"] != expected["sha256"]:
            raise UserError(f"{file}: damaged: SHA-256 {found['sha256']}, expected {expected['sha256']}")


def _load_model(file: Path, model: nn.Module) -> None:
    tensors, expected = read_tensors(file), unique_tensors(model)
    _check_tensors(expected, tensors, file)
    for name, tensor in expected.items():
        tensor.copy_(tensors[name])


def _check_tensors(expected: dict[str, Tensor], found: dict[str, Tensor], file: Path) -> None:
    """Raise UserError for the first tensor of `file` that is missing, unknown, or of another shape or dtype."""
    for name, tensor in expected.items():
        if name not in found:
            raise UserError(f"{file}: tensor {name!r} is missing; expected {_describe(tensor)}")
        if _describe(found[name]) != _describe(tensor):
            raise UserError(f"{file}: tensor {name!r} is {_describe(found[name])}; expected {_describe(tensor)}")
    unknown = sorted(found.keys() - expected.keys())
    if unknown:
        raise UserError(f"{file}: tensor {unknown[0]!r} ({_describe(found[unknown[0]])}) has no place in this model")


def _describe(tensor: Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"


def _load_tokenizer(file: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(f"{file}: not a readable tokenizer: {error}") from None
    return reading_no_special_tokens(tokenizer)


def _cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _fingerprint(file: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
            size += len(chunk)
    return {"sha256": digest.hexdigest(), "bytes": size}


def _sync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _encode(numbers: np.ndarray) -> str:
    return base64.b64encode(numbers.tobytes()).decode("ascii")


def _decode(text: str, dtype: type) -> np.ndarray:
    return np.frombuffer(bytearray(base64.b64decode(text)), dtype=dtype)
