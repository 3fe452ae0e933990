"""A whole training step of the 500K model in bfloat16, all kernels as Triton compiles them for an sm_90, on tests/ptx_machine.py:
gradients and updates are as near to plain PyTorch's in float32 as plain PyTorch's in bfloat16 are.

    TRITON_INTERPRET=1 DSFAST_PTX_MACHINE=1 DSFAST_INTERPRETED_CHIP=sm_90 python tests/test_ptx_step.py    prints errors, as JSON

It is a process of its own, as in tests/triton_contract.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import test_device_decode
import torch
from torch import Tensor
from triton_contract import INTERPRETED, ON_THE_MACHINE, poisoned

from dsfast import ops
from dsfast.config import OPERATORS, default_config

WORSE = 1.5
"""So many times plain PyTorch's error in bfloat16 is allowed: sums of few numbers are by chance nearer or further."""
LOSS = 1e-3


def stepped(dtype: torch.dtype, implementation: str) -> tuple[float, dict[str, Tensor]]:
    """The loss, and every gradient and parameter's change by one step of 2 x 48 tokens."""
    from launches import training_step  # imports triton, after triton_contract has said what it is to do

    changes = {"model.zero_init_output": False, "runtime.device": "cpu", "runtime.threads": 1}
    step = training_step(default_config("gpu").replace(**changes), 2, 48, dtype)
    before = [p.detach().clone() for p in step.parameters]
    with ops.use(implementation), poisoned():
        step()
    names = [name for name, _ in step.model.named_parameters()]
    found = {f"gradient of {name}": x.double() for name, x in zip(names, step.gradients, strict=True)}
    for name, new, old in zip(names, step.parameters, before, strict=True):
        found[f"update of {name}"] = new.detach().double() - old.double()
    return step.measured[0, 0].item(), found


def measured() -> dict:
    """What is apart from plain PyTorch's step in float32, relative to norms: `found` on the machine, `reference` by plain PyTorch
    in bfloat16; and which operators fell back."""
    loss, expected = stepped(torch.float32, "reference")
    apart, losses = {}, {}
    for name, implementation in (("reference", "reference"), ("found", "triton")):
        losses[name], values = stepped(torch.bfloat16, implementation)
        apart[name] = {key: ((x - expected[key]).norm() / expected[key].norm()).item() for key, x in values.items()}
        losses[name] = abs(losses[name] - loss)
    fell_back = [row["operator"] for row in ops.fallbacks() if row["operator"] in OPERATORS]
    return {"losses": losses, "apart": apart, "fell back": fell_back}


@pytest.fixture
def on_the_machine(monkeypatch):
    """For processes that begin inside."""
    monkeypatch.setenv("DSFAST_PTX_MACHINE", "1")
    monkeypatch.setenv("DSFAST_INTERPRETED_CHIP", "sm_90")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is what starts the process")
def test_a_step_is_as_near_to_float32_as_plain_pytorchs_in_bfloat16(on_the_machine):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-4000:]
    result = json.loads(child.stdout.splitlines()[-1])
    found, reference = result["apart"]["found"], result["apart"]["reference"]
    assert result["fell back"] == []
    assert result["losses"]["found"] < LOSS
    assert len(found) == len(reference) > 50
    assert {key: (x, reference[key]) for key, x in found.items() if not x <= WORSE * reference[key] + 1e-4} == {}


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="likewise")
def test_a_tiny_model_generates_the_same_tokens(on_the_machine):
    test_device_decode.test_tokens_with_the_triton_kernels_in_the_interpreter()


if __name__ == "__main__":
    assert ON_THE_MACHINE, "set TRITON_INTERPRET=1 DSFAST_PTX_MACHINE=1"
    print(json.dumps(measured()))
