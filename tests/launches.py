"""What a step launches, counted without a GPU: in the process of fake_driver, where operators call their Triton kernels on CPU
tensors.

    DSFAST_FAKE_GPU=1 PYTHONPATH=tests python tests/launches.py    prints a training step's of the 500K model, in order
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from unittest.mock import patch

import torch
from fake_driver import FAKED
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dsfast.bench.gpu.whole import trainer_on
from dsfast.bench.workload import random_batch
from dsfast.config import Config, default_config
from dsfast.model import FixedWeights
from dsfast.train.device_step import DeviceStep
from dsfast.train.steps import DeviceSteps


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


class _Called(TorchFunctionMode):
    """Writes down what is called in Python and fills or makes a tensor, but for memory that is only taken. A launcher is called
    where modes of dispatch are off."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result, name = func(*args, **(kwargs or {})), getattr(func, "__name__", "")
        places = [x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)]
        made = isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in places
        if isinstance(func, torch._ops.OpOverloadPacket):  # an operator of dsfast's, in which modes of dispatch are on
            return result
        if (made and "empty" not in name) or (name.endswith("_") and not name.startswith("__")):
            self.found.append(f"torch {name} {[list(x.shape) for x in args if isinstance(x, torch.Tensor)]}")
        return result


class _Recording(TorchDispatchMode):
    """Writes down each operator that launches something; inside one of dsfast's, what that itself calls."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "dsfast":
            with _Called(self.found):
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        from dsfast.triton_kernels.branches import launches_something

        shapes = [list(x.shape) for x in args if isinstance(x, torch.Tensor)]
        # The gradient where the backward pass begins, which dsfast.model.precision has on the CPU.
        begins = func.overloadpacket.__name__ == "ones_like" and "_Begin" in type(args[0].grad_fn).__name__
        if launches_something(func) and not begins:
            self.found.append(f"torch {func.overloadpacket.__name__} {shapes}")
        return func(*args, **kwargs)


def launches_of(step) -> list[str]:
    """In order: "triton" and a kernel's name, or "torch", an operator's and its tensors' shapes; "aside" before what a recorded
    step has on branches. No kernel is started.

    An operator of PyTorch's counts once, though some launch several kernels.
    """
    found: list[str] = []

    def note(launch, where: str = "") -> None:
        if 0 not in launch.grid:
            found.append(f"{where}triton {launch.kernel.__module__.split('.')[-1]}.{launch.kernel.__name__}")

    on_paper(step, note, lambda launch, urgent: note(launch, "aside "), lambda: _Recording(found))
    return found


def launches_aside(step) -> list:
    """Those of a recorded step that run on branches, but for the first stage of urgent ones."""
    found = []
    on_paper(step, lambda launch: None, lambda launch, urgent: urgent or found.append(launch), nullcontext)
    return found


def on_paper(step, run: Callable, aside: Callable, watch: Callable) -> None:
    """Call the step, as it is recorded, within `watch()`. Instead of starting its launches `run` is called with them, `aside`
    with those on branches and with whether the chain soon needs them."""
    from dsfast.triton_kernels.branches import Branches
    from dsfast.triton_kernels.launch import Launch

    assert FAKED, "call it in the process of fake_driver"

    class OnPaper(Branches):
        def _beside(self, stages, urgent):
            for number, (launches, _) in enumerate(stages):
                for launch in launches:
                    aside(launch, urgent and not number)
            return [object() for _ in stages]

        def _join(self, end):
            pass

    with patch.object(Launch, "run", lambda launch: None):
        step()  # what is made in the first call alone
    with patch.object(Launch, "run", run), watch(), OnPaper((), None):
        step()


if __name__ == "__main__":
    found = launches_of(training_step(default_config("cpu"), 32, 256))
    print("\n".join(found))
    aside = sum(row.startswith("aside") for row in found)
    print(f"{len(found)} launches, {aside} of them aside")
