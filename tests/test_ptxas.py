"""Which ptxas Triton is given: one that is known to be right, or none."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from dsfast.triton_kernels import ptxas as module
from dsfast.triton_kernels.ptxas import RIGHT, PtxasError, right_ptxas, use_right_ptxas
from dsfast.triton_kernels.version import numbers

from dsfast.errors import UserError
from dsfast.ops import triton

pytestmark = pytest.mark.skipif(bool(triton.missing()), reason="needs triton")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """As in a new process, in which nobody has chosen one."""
    for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    _forget()
    yield
    _forget()


def _forget():
    from triton.backends.nvidia import compiler

    for remembered in (use_right_ptxas, triton._have_right_ptxas, compiler.get_ptxas_version):
        remembered.cache_clear()


@pytest.fixture
def shipped(monkeypatch, tmp_path):
    """Have Triton ship programs that call themselves ptxas of these versions; their paths."""
    from triton import knobs

    def ship(**versions: str) -> dict[str, str]:
        paths = {name: ptxas(tmp_path / name, version) for name, version in versions.items()}
        for name, path in paths.items():
            monkeypatch.setattr(vars(type(knobs.nvidia))[name], "default_path", path)
        return paths

    return ship


def ptxas(path, version: str) -> str:
    """A program at `path` that answers as ptxas of `version` does."""
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.93'\n")
    path.chmod(0o755)
    return str(path)


ARCH = 90


@pytest.fixture
def of_old_tritons(monkeypatch):
    """Have Triton take `ptxas`, and not the one for newer chips, as up to 3.6."""
    from triton import knobs
    from triton.backends.nvidia import compiler

    monkeypatch.setattr(compiler, "get_ptxas", lambda arch: knobs.nvidia.ptxas)


def test_this_triton_ships_one_that_is_right():
    from triton.backends.nvidia import compiler

    use_right_ptxas(ARCH)
    assert numbers(compiler.get_ptxas(ARCH).version) >= RIGHT


def test_a_right_one_stays_also_when_torch_compile_looks_for_another(shipped, of_old_tritons):
    from torch._inductor.runtime.compile_tasks import _set_triton_ptxas_path as named_by_torch

    paths = shipped(ptxas="12.9", ptxas_blackwell="13.4")
    use_right_ptxas(ARCH)
    named_by_torch.__wrapped__()
    assert os.environ["TRITON_PTXAS_PATH"] == paths["ptxas"]


@pytest.mark.parametrize(("own", "taken"), [("12.9", "ptxas"), ("12.8", "ptxas_blackwell")])
def test_an_old_one_that_torch_compile_has_named_is_not_the_users(
    shipped, of_old_tritons, monkeypatch, tmp_path, own, taken
):
    paths = shipped(ptxas=own, ptxas_blackwell="12.9")
    monkeypatch.setattr(module, "_TORCHS", tmp_path / "torchs")
    monkeypatch.setenv("TRITON_PTXAS_PATH", ptxas(tmp_path / "torchs", "12.6"))
    use_right_ptxas(ARCH)
    assert os.environ["TRITON_PTXAS_PATH"] == paths[taken]


def test_where_torch_compile_looks(monkeypatch):
    """In torch as of 2.11; later ones look where there is none."""
    from torch._inductor.runtime import compile_tasks

    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    compile_tasks._set_triton_ptxas_path.__wrapped__()
    named = Path(os.environ["TRITON_PTXAS_PATH"])
    assert named == module._TORCHS or named.is_relative_to(module._TORCHS.parents[1] / "_inductor")


def test_instead_of_an_old_one_triton_takes_the_other_that_it_ships(shipped, of_old_tritons):
    """In this process, though it had asked the old one's version before, and in one started by it."""
    from triton.backends.nvidia import compiler

    paths = shipped(ptxas="12.8", ptxas_blackwell="12.9")
    assert "12.8" in compiler.get_ptxas_version(ARCH)
    use_right_ptxas(ARCH)
    assert compiler.get_ptxas(ARCH).path == paths["ptxas_blackwell"]
    assert "12.9" in compiler.get_ptxas_version(ARCH), "of which a kernel's name in the cache is made"
    child = subprocess.run('"$TRITON_PTXAS_PATH"', shell=True, capture_output=True, text=True, check=True)
    assert "release 12.9" in child.stdout


@pytest.mark.parametrize("named", ["12.4", "12.8"])
def test_an_old_one_that_the_user_names_is_refused_in_one_line(shipped, of_old_tritons, monkeypatch, tmp_path, named):
    shipped(ptxas="12.9", ptxas_blackwell="12.9")
    path = ptxas(tmp_path / "mine", named)
    monkeypatch.setenv("TRITON_PTXAS_PATH", path)
    for _ in range(2):
        with pytest.raises(PtxasError, match=rf"{path} is ptxas {named}, .*needs a ptxas 12\.9 or newer: name one"):
            use_right_ptxas(ARCH)
    monkeypatch.setattr(triton, "INTERPRETED", False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    chips = (8, 0), (9, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(chips))
    monkeypatch.setattr(torch.cuda, "get_device_capability", chips.__getitem__)
    with pytest.raises(UserError, match="compiles some kernels wrongly") as raised, triton.kept_kernels():
        pytest.fail("kernels are compiled by it")
    assert "\n" not in str(raised.value)


def test_none_that_is_right_is_refused(shipped, of_old_tritons):
    shipped(ptxas="12.8", ptxas_blackwell="12.8")
    with pytest.raises(PtxasError, match=r"is ptxas 12\.8, .* install a newer triton"):
        use_right_ptxas(ARCH)


def test_one_that_the_user_names_for_newer_chips_is_not_taken_for_this_one(
    shipped, of_old_tritons, monkeypatch, tmp_path
):
    shipped(ptxas="12.8", ptxas_blackwell="12.9")
    monkeypatch.setenv("TRITON_PTXAS_BLACKWELL_PATH", ptxas(tmp_path / "mine", "12.9"))
    with pytest.raises(PtxasError, match="leave TRITON_PTXAS_PATH and TRITON_PTXAS_BLACKWELL_PATH unset"):
        use_right_ptxas(ARCH)


@pytest.mark.parametrize("gone", ["ptxas", "ptxas_blackwell"])
def test_one_that_is_not_there_is_refused(shipped, of_old_tritons, gone):
    paths = shipped(ptxas="12.8", ptxas_blackwell="12.9")
    os.remove(paths[gone])
    with pytest.raises(PtxasError, match=r"Cannot find ptxas.*; for this GPU Triton needs a ptxas 12\.9"):
        use_right_ptxas(ARCH)


@pytest.mark.parametrize("before", [None, "named"])
def test_behind_a_compilation_for_that_chip_others_have_what_they_had(
    before, shipped, of_old_tritons, monkeypatch, tmp_path
):
    """What is compiled for sm_80 does not depend on what was compiled before it; not behind an error either."""
    from triton.backends.nvidia import compiler

    paths = shipped(ptxas="12.8", ptxas_blackwell="12.9")
    if before:
        monkeypatch.setattr(module, "_TORCHS", tmp_path / "torchs")
        monkeypatch.setenv("TRITON_PTXAS_PATH", before := ptxas(tmp_path / "torchs", "12.6"))

    def fails() -> None:
        with right_ptxas(ARCH):
            assert compiler.get_ptxas(ARCH).path == paths["ptxas_blackwell"]
            assert "12.9" in compiler.get_ptxas_version(ARCH)
            raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            fails()
        assert os.environ.get("TRITON_PTXAS_PATH") == before
        assert ("12.6" if before else "12.8") in compiler.get_ptxas_version(80)
    with right_ptxas(80):
        assert os.environ.get("TRITON_PTXAS_PATH") == before


@pytest.mark.parametrize("chip", ["sm_80", "sm_100", "an AMD GPU"])
def test_other_chips_may_have_any(shipped, of_old_tritons, monkeypatch, chip):
    shipped(ptxas="12.8", ptxas_blackwell="12.8")
    arch = {"sm_80": 80, "sm_100": 100}.get(chip, ARCH)
    if arch == ARCH:
        monkeypatch.setattr(torch.version, "hip", "6.4")
    use_right_ptxas(arch)
    assert "TRITON_PTXAS_PATH" not in os.environ
