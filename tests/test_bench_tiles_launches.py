"""`bench tiles` with a GPU that is not there: what it compiles and starts, in the process of fake_driver."""

from __future__ import annotations

import torch
from fake_driver import InstantCompiler, fake_gpu, in_its_own_process, on_the_fake_gpu

from dsfast.bench.gpu import cases, tuning
from dsfast.bench.gpu.clock import HostClock

test_on_the_fake_gpu = in_its_own_process(__file__)


@on_the_fake_gpu
def test_candidates_are_compiled_together_before_one_is_started(monkeypatch):
    """And what is timed is what was compiled: nothing is compiled again."""
    from dsfast.triton_kernels.ahead import Compiled

    def compile_named(launch, chip, name):
        return Compiled(name, chip, 128, 0, 1024, 1, 1, 1.0, False, ()), []

    monkeypatch.setattr(tuning, "compile_named", compile_named)
    compiler, compiled = InstantCompiler(), []

    def check(case, device):
        compiled.append(len(compiler.sources))
        return ""

    monkeypatch.setattr(tuning, "check_ours", check)
    case = cases.build("decode", "tiny", rehearsal=True)
    with fake_gpu(compiler) as driver:
        arguments = cases.draw(case.timed, "cpu", torch.bfloat16)
        found = tuning.Tuner(case, arguments, "cpu", "sm_90", HostClock(), lambda: False, rounds=2)
        *_, row = found.rows()
    assert row["status"] == "timed"
    tried = len(row["candidates"])
    assert tried == 1 + tuning.MOST
    assert compiled == [len(compiler.sources)] * tried  # all of them before the first was checked
    kernels = [name for name, *_ in compiler.sources]
    assert kernels.count("attend_kernel") == tried
    assert driver.started.count("attend_kernel") == 1 + tried * (tuning.WARMUP + 2)  # 1: for what later kernels read
