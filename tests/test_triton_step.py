"""Whole training steps with every Triton kernel, in Triton's interpreter: the losses of the CPU's own path.

    TRITON_INTERPRET=1 python tests/test_triton_step.py muon    prints what its steps measured, as JSON

It is a process of its own, as in tests/triton_contract.py. On a GPU `TestOnAGpu` takes its place.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from dsfast.triton_kernels.launch import Launch
from guard import GraphGuard, addresses, kept_by_step, operators_called
from operator_cases import needs_native
from test_device_step import eager
from tiny import tiny_config, tiny_dataset
from triton_contract import INTERPRETED, poisoned

from dsfast import ops
from dsfast.config import OPERATORS, default_config
from dsfast.model.capture import record, unchanged
from dsfast.ops import triton
from dsfast.train import Trainer, load_checkpoint
from dsfast.train.device_step import read
from dsfast.train.steps import DeviceSteps

STEPS = 3
RUNS = {
    "muon": {},
    "adamw": {"train.optimizer": "adamw", "model.num_nextn_predict_layers": 1},
}
TOLERANCE = 2e-5
"""Of a loss, and ten times that of a norm: float32 both, sums in another order, updates of up to 1e-2."""


def trainer_of(run: str, **changes) -> Trainer:
    """Two rows of 16 tokens: the interpreter takes seconds for a step."""
    sizes = {"train.steps": STEPS, "train.batch_size": 2, "model.vocab_size": 300}
    return Trainer(tiny_config(**{**sizes, **RUNS[run], **changes}), None, tiny_dataset())


def interpreted(run: str) -> dict:
    """What the steps measured, all under the guard after two to warm up, the first without kernels, as before a recording;
    and which operators did not run."""
    trainer = trainer_of(run)
    steps = DeviceSteps(trainer, eager)
    steps._load()
    seen, places = set(), []
    with trainer.kernels(), ops.use("triton"):
        with unchanged(steps.step.state()) as restore:
            with poisoned():
                triton.compile_together(steps.step)
            restore()
            steps.step()
        for _ in range(STEPS):
            with GraphGuard() as guard:
                assert kept_by_step(steps.step, trainer.model) == []
            seen |= set(guard.seen)
            places.append(addresses(steps.step))
    assert all(place == places[0] for place in places[1:]), "an address changed"
    others = {"mla_decode", "newton_schulz"} | (
        {"muon"} if run == "adamw" else set()
    )  # newton_schulz is inside of muon
    missing = [op for op in OPERATORS if op not in others | operators_called(seen)]
    measured = read(*steps.step.sent(0, STEPS))
    return {
        "losses": [m.loss for m in measured],
        "norms": [m.grad_norm for m in measured],
        "loads": [m.loads.tolist() for m in measured],
        "missing": missing,
    }


@pytest.mark.skipif(INTERPRETED, reason="this is what starts the interpreter's process")
@pytest.mark.parametrize("run", ["muon", pytest.param("adamw", marks=pytest.mark.slow)])
def test_losses_are_those_of_the_native_path(run):
    needs_native()
    command = [sys.executable, __file__, run]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-4000:]
    found = json.loads(child.stdout.splitlines()[-1])
    trainer = trainer_of(run)
    reports, loads = [], []
    while trainer.steps_done < STEPS:
        for report, load in trainer.steps().run():
            reports.append(report)
            loads.append([x.tolist() for x in load])
    assert found["missing"] == []
    assert found["losses"] == pytest.approx([r.loss for r in reports], rel=TOLERANCE)
    assert found["norms"] == pytest.approx([r.grad_norm for r in reports], rel=10 * TOLERANCE)
    assert found["loads"] == loads


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnAGpu:
    """CPU and GPU in step: the same seed, the same batches, 20 steps.

    float32: the first loss to 1e-5, all to 1e-3 (each update is of the size of the rate, whatever the gradient's: rounding
    grows from step to step). bfloat16: to 3e-2.
    """

    STEPS = 20

    def losses(self, device: str, dtype: str, model: str = "tiny") -> list[float]:
        changes = {"train.steps": self.STEPS, "runtime.device": device, "runtime.dtype": dtype}
        if model == "tiny":
            return trainer_of("muon", **changes).train(quiet=True).losses
        shipped = default_config("cpu" if device == "cpu" else "gpu").replace(**changes)
        return Trainer(shipped).train(quiet=True).losses

    @pytest.mark.parametrize("model", ["tiny", "500K"])
    @pytest.mark.parametrize(("dtype", "first", "every"), [("float32", 1e-5, 1e-3), ("bfloat16", 3e-2, 3e-2)])
    def test_losses_agree_with_the_cpus_step_by_step(self, dtype, first, every, model):
        """The 500K model at 32 x 256 tokens takes other kernels and tiles than the tiny one."""
        expected, found = self.losses("cpu", "float32", model), self.losses("cuda", dtype, model)
        fell_back = {row["operator"] for row in ops.fallbacks() if row["device"] == "cuda"}
        assert fell_back <= (
            {"newton_schulz"} if dtype == "float32" else set()
        )  # 128 rows of float32 are PyTorch's, said aloud
        apart = [abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)]
        parting = parting_step(found, expected, every)
        assert apart[0] <= first, parting
        assert max(apart) <= every, parting

    def test_replayed_and_launched_one_by_one_the_same_bits(self):
        changes = {"train.steps": self.STEPS, "runtime.device": "cuda"}
        replayed, launched = trainer_of("muon", **changes), trainer_of("muon", **changes)
        launched.steps = lambda: DeviceSteps(launched, eager)
        assert replayed.train(quiet=True).losses == launched.train(quiet=True).losses
        for (name, a), b in zip(replayed.model.state_dict().items(), launched.model.state_dict().values(), strict=True):
            assert torch.equal(a, b), name

    @pytest.mark.parametrize("branched", [False, True])
    def test_recorded_it_leaves_the_bits_of_launches_that_are_waited_for(self, branched, monkeypatch):
        """The 500K model: whatever runs beside others there."""
        trainer = Trainer(default_config("gpu").replace(**{"train.steps": self.STEPS}))
        steps = DeviceSteps(trainer, eager)
        steps.prepare()
        run = Launch.run
        with trainer.kernels(), unchanged(steps.step.state()) as restore:
            recording = record(steps.step, branched)
            restore()
            with monkeypatch.context() as waiting:
                waiting.setattr(Launch, "run", lambda launch: (run(launch), torch.cuda.synchronize()))
                for _ in range(self.STEPS):
                    steps.step()
            expected = [x.clone() for x in steps.step.state()]
            for _ in range(20):
                restore()
                for _ in range(self.STEPS):  # with other numbers each, so that what the one before left is wrong
                    recording.replay()
                assert all(map(torch.equal, steps.step.state(), expected))

    def test_a_block_is_launched_without_waiting_for_the_device(self):
        trainer = trainer_of("muon", **{"train.steps": self.STEPS, "train.log_every": 5, "runtime.device": "cuda"})
        steps = trainer.steps()
        steps.prepare()
        first = steps._launch()
        torch.cuda.set_sync_debug_mode("error")
        try:
            second = steps._launch()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(x.is_pinned() for x in second.sent)
        found = [report.loss for block in (first, second) for report, _ in steps._read(block)]
        assert (
            found
            == trainer_of("muon", **{"train.steps": self.STEPS, "runtime.device": "cuda"}).train(quiet=True).losses[:10]
        )

    def test_a_checkpoint_holds_the_weights_of_its_step(self, tmp_path):
        changes = {"train.steps": self.STEPS, "train.log_every": 2, "runtime.device": "cuda"}
        saving = trainer_of("muon", **changes, **{"train.checkpoint_every": 6})
        saving.output_dir = tmp_path / "run"
        saving.train(quiet=True)
        expected = trainer_of("muon", **changes)
        steps = DeviceSteps(expected, eager)
        steps.prepare()
        with expected.kernels():
            for _ in range(6):
                steps.step()
        saved, _, _ = load_checkpoint(tmp_path / "run" / "step-000006")
        for name, tensor in expected.model.state_dict().items():
            assert torch.equal(tensor.cpu(), saved.state_dict()[name].cpu()), name

    def test_preparation_and_utilisation_are_measured(self):
        result = trainer_of("muon", **{"train.steps": self.STEPS, "runtime.device": "cuda"}).train(quiet=True)
        assert result.preparation_seconds > 0
        assert 0 < result.utilisation <= 1
        assert 0 < result.peak_memory_bytes <= torch.cuda.get_device_properties(0).total_memory


def parting_step(found: list[float], expected: list[float], tolerance: float) -> str:
    """At which step two runs part, and by how much they are apart there and at most."""
    apart = [abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)]
    at = next((step for step, x in enumerate(apart) if not x <= tolerance), None)
    if at is None:
        return f"nowhere further apart than {max(apart):.1e}"
    return f"they part at step {at + 1}: {found[at]} against {expected[at]}, {apart[at]:.1e} apart (at most {max(apart):.1e})"


def test_the_parting_is_named():
    assert parting_step([1.0, 2.0], [1.0, 2.002], 0.1) == "nowhere further apart than 1.0e-03"
    message = "they part at step 2: 2.0 against 4.0, 5.0e-01 apart (at most 5.0e-01)"
    assert parting_step([1.0, 2.0, 3.0], [1.0, 4.0, 3.0], 0.1) == message
    assert parting_step([1.0, float("nan")], [1.0, 4.0], 0.1).startswith("they part at step 2: nan against 4.0")


if __name__ == "__main__":
    assert INTERPRETED, "set TRITON_INTERPRET=1"
    print(json.dumps(interpreted(sys.argv[1])))
