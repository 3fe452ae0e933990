"""What a step launches, counted without a GPU: in the process of fake_driver, where operators call their Triton kernels on CPU
tensors.

    DSFAST_FAKE_GPU=1 PYTHONPATH=tests python tests/launches.py    prints a training step's of the 500K model, in order
"""

from __future__ import annotations

from unittest.mock import patch

import torch
from fake_driver import FAKED
from torch.utils._python_dispatch import TorchDispatchMode

from dsfast.bench.gpu.whole import trainer_on
from dsfast.bench.workload import random_batch
from dsfast.config import Config, default_config
from dsfast.model import FixedWeights
from dsfast.train.device_step import DeviceStep
from dsfast.train.runtime import DeviceSteps

NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "is_same_size"}
"""Operators of aten that make no view and yet launch nothing."""


def training_step(config: Config, batch: int, length: int, dtype: torch.dtype = torch.bfloat16) -> DeviceStep:
    """A GPU's step of `batch` rows of `length` random tokens, on CPU tensors, in `dtype`."""
    trainer = trainer_on(config.replace(**{"runtime.whole_step": False}), *random_batch(config, batch, length), steps=2)
    steps = DeviceSteps(trainer, lambda step: step)
    steps.prepare()
    step = steps.step
    step.weights = FixedWeights(trainer.model, dtype)
    step.parameters = step.weights.parameters
    for part in trainer.optimizer.parts:
        if hasattr(part, "dtype"):
            part.dtype = dtype  # Muon iterates in the dtype of the run
    return step


class _Recording(TorchDispatchMode):
    """Writes down each operator that launches something; inside one of dsfast's, what that itself calls."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "dsfast":
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        name = func.overloadpacket.__name__
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not view and name not in NOTHING:
            shapes = [list(x.shape) for x in args if isinstance(x, torch.Tensor)]
            self.found.append(f"torch {name} {shapes}")
        return func(*args, **kwargs)


def launches_of(step) -> list[str]:
    """In order: "triton" and a kernel's name, or "torch", an operator's and its tensors' shapes. No kernel is started.

    An operator of PyTorch's counts once, though some launch several kernels.
    """
    from dsfast.triton_kernels.launch import Launch

    assert FAKED, "call it in the process of fake_driver"
    found: list[str] = []

    def run(launch: Launch) -> None:
        if 0 not in launch.grid:
            found.append(f"triton {launch.kernel.__module__.split('.')[-1]}.{launch.kernel.__name__}")

    with patch.object(Launch, "run", run):
        step()  # what is made in the first call alone
        found.clear()
        with _Recording(found):
            step()
    return found


if __name__ == "__main__":
    found = launches_of(training_step(default_config("cpu"), 32, 256))
    print("\n".join(found))
    print(len(found), "launches,", sum(row.startswith("triton") for row in found), "of them Triton's")
