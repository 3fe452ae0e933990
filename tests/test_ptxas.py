"""Which ptxas Triton is given: one that is known to be right, or none."""

from __future__ import annotations

import os
import subprocess

import pytest
import torch
from dsfast.triton_kernels.ptxas import RIGHT, PtxasError, use_right_ptxas
from dsfast.triton_kernels.version import numbers

from dsfast.errors import UserError
from dsfast.ops import triton

pytestmark = pytest.mark.skipif(bool(triton.missing()), reason="needs triton")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """As in a new process, in which nobody has chosen one."""
    monkeypatch.setenv("TRITON_PTXAS_PATH", "")
    monkeypatch.delenv("TRITON_PTXAS_PATH")
    use_right_ptxas.cache_clear()
    yield
    use_right_ptxas.cache_clear()


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


def test_this_triton_ships_one_that_is_right():
    from triton import knobs

    use_right_ptxas()
    assert numbers(knobs.nvidia.ptxas.version) >= RIGHT


def test_a_right_one_is_left_alone(shipped):
    shipped(ptxas="12.9", ptxas_blackwell="13.4")
    use_right_ptxas()
    assert "TRITON_PTXAS_PATH" not in os.environ


def test_instead_of_an_old_one_triton_takes_the_other_that_it_ships(shipped):
    """In this process, and in one started by it."""
    from triton import knobs

    paths = shipped(ptxas="12.8", ptxas_blackwell="12.9")
    use_right_ptxas()
    assert knobs.nvidia.ptxas.path == paths["ptxas_blackwell"]
    assert knobs.nvidia.ptxas.version == "12.9"
    child = subprocess.run('"$TRITON_PTXAS_PATH"', shell=True, capture_output=True, text=True, check=True)
    assert "release 12.9" in child.stdout


@pytest.mark.parametrize("named", ["12.4", "12.8"])
def test_an_old_one_that_the_user_names_is_refused_in_one_line(shipped, monkeypatch, tmp_path, named):
    shipped(ptxas="12.9", ptxas_blackwell="12.9")
    path = ptxas(tmp_path / "mine", named)
    monkeypatch.setenv("TRITON_PTXAS_PATH", path)
    for _ in range(2):
        with pytest.raises(PtxasError, match=rf"{path} is ptxas {named}, .*; set TRITON_PTXAS_PATH to a ptxas 12\.9"):
            use_right_ptxas()
    monkeypatch.setattr(triton, "INTERPRETED", False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError, match="compiles some kernels wrongly") as raised, triton.kept_kernels():
        pytest.fail("kernels are compiled by it")
    assert "\n" not in str(raised.value)


def test_none_that_is_right_is_refused(shipped):
    shipped(ptxas="12.8", ptxas_blackwell="12.8")
    with pytest.raises(PtxasError, match=r"is ptxas 12\.8, .* install a newer triton"):
        use_right_ptxas()


def test_an_amd_gpu_needs_none(shipped, monkeypatch):
    shipped(ptxas="12.8", ptxas_blackwell="12.8")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    use_right_ptxas()
