"""Where compiled GPU kernels are kept, and what happens where they cannot be, or were not kept whole."""

from __future__ import annotations

import errno
import gc
import importlib
import json
import os
import subprocess
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dsfast import info, ops
from dsfast.errors import UserError
from dsfast.ops import triton
from dsfast.ops.triton import kept_kernels, kernel_cache

needs_triton = pytest.mark.skipif(
    bool(triton.missing()) or triton.INTERPRETED, reason="needs triton, and not interpreted"
)


VERSION = "" if triton.missing() else importlib.import_module("triton").__version__
OLD = VERSION.startswith("3.6.")
TO_DO = r"a compiled kernel could not be written or read back .*; make room, or remove"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """As in a new process, in which TRITON_CACHE_DIR is not set."""
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    triton.use_kernel_cache.cache_clear()
    yield
    triton.use_kernel_cache.cache_clear()


def compiled():
    """rope's kernel, compiled for a chip that is not here."""
    from dsfast.triton_kernels import rope
    from dsfast.triton_kernels.ahead import compile_launch
    from dsfast.triton_kernels.limits import CHIPS

    (launch, *_) = rope.example_launches("500K", torch.bfloat16, CHIPS["sm_90"].large).values()
    with kept_kernels():
        return compile_launch(launch, "sm_90")


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_the_folder_is_the_users_or_stands_in_dsfasts_own(monkeypatch, tmp_path):
    monkeypatch.delenv("DSFAST_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert kernel_cache() == tmp_path / ".cache" / "dsfast" / "triton"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert kernel_cache() == tmp_path / "xdg" / "dsfast" / "triton"
    monkeypatch.setenv("DSFAST_CACHE", str(tmp_path / "own"))
    assert kernel_cache() == tmp_path / "own" / "triton"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "theirs"))
    assert kernel_cache() == tmp_path / "theirs"
    assert info.caches() == {"tokenizers": str(tmp_path / "own"), "kernels": str(tmp_path / "theirs")}


@needs_triton
def test_kernels_are_compiled_into_it_and_read_from_it(monkeypatch, tmp_path):
    monkeypatch.setenv("DSFAST_CACHE", str(tmp_path))
    first = compiled()
    kept = {path: path.stat().st_mtime_ns for path in files_in(tmp_path / "triton")}
    assert any(path.suffix == ".cubin" for path in kept)
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton"), "for processes started later"
    assert compiled() == first
    assert {path: path.stat().st_mtime_ns for path in files_in(tmp_path / "triton")} == kept


@needs_triton
def test_one_that_cannot_be_written_to_is_told_once_and_another_serves_the_process(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        compiled()
        compiled()
    [message] = [str(warning.message) for warning in told if "kernels" in str(warning.message)]
    named = f"TRITON_CACHE_DIR {tmp_path / 'file'}: "
    assert message.startswith(f"compiled GPU kernels are kept for this process alone: {named}")
    assert "set TRITON_CACHE_DIR" in message
    assert "\n" not in message
    assert any(path.suffix == ".cubin" for path in files_in(kernel_cache()))


@needs_triton
@pytest.mark.parametrize(
    "damage",
    [
        lambda group, cubin: group.unlink(),
        lambda group, cubin: group.write_text(group.read_text()[:20]),
        lambda group, cubin: group.write_text(""),
        lambda group, cubin: (group.unlink(), (cubin.parent / "tmp.pid_1_x").mkdir(), cubin.write_bytes(b"")),
    ],
)
def test_what_a_compilation_left_half_built_is_compiled_anew(monkeypatch, tmp_path, damage):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    first = compiled()
    (group,) = tmp_path.rglob("__grp__*")
    (cubin,) = tmp_path.rglob("*.cubin")
    whole = cubin.read_bytes()
    damage(group, cubin)
    if OLD and group.exists():  # it is written in one piece; where it is torn all the same, 3.6 does not compile anew
        with pytest.raises(UserError, match=TO_DO):
            compiled()
    else:
        assert compiled() == first
        assert cubin.read_bytes() == whole


@needs_triton
def test_a_kernel_whose_code_is_gone(monkeypatch, tmp_path):
    """It is compiled anew, but by Triton 3.6 and 3.7, which do not look for it: there one line says what to do."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    first = compiled()
    (cubin,) = tmp_path.rglob("*.cubin")
    cubin.unlink()
    if OLD or VERSION.startswith("3.7."):
        with pytest.raises(UserError, match=TO_DO):
            compiled()
    else:
        assert compiled() == first


@needs_triton
@pytest.mark.filterwarnings("ignore:Exception ignored in. <function CompiledKernel.__del__")
def test_a_kernel_that_cannot_be_read_back_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled()
    (group,) = tmp_path.rglob("__grp__*")
    metadata = Path(next(p for p in json.loads(group.read_text())["child_paths"].values() if p.endswith(".json")))
    metadata.write_text("")
    with pytest.raises(UserError) as caught:
        compiled()
    assert str(caught.value).startswith(f"{tmp_path}: a compiled kernel could not be written or read back (")
    assert "remove the folder" in str(caught.value)
    assert "\n" not in str(caught.value)
    del caught
    gc.collect()  # Triton's half-made object complains when it goes: here, not in another test


@pytest.mark.parametrize(
    ("error", "of_the_cache"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (PermissionError(errno.EACCES, "Permission denied", "{cache}/entry"), True),
        (RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), True),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/nowhere/ptxas"), False),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), False),
        (ValueError("rope: expected x with 3 dimensions"), False),
    ],
)
def test_errors_of_the_cache_alone_are_the_users_to_mend(monkeypatch, tmp_path, error, of_the_cache):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton, "INTERPRETED", False)
    if getattr(error, "filename", None):
        error.filename = error.filename.format(cache=tmp_path)
    with pytest.raises(UserError if of_the_cache else type(error)) as caught, kept_kernels():
        raise error
    assert (caught.value is error) == (not of_the_cache)


def test_what_is_interpreted_is_kept_nowhere(monkeypatch, tmp_path):
    monkeypatch.setenv("DSFAST_CACHE", str(tmp_path))
    monkeypatch.setattr(triton, "INTERPRETED", True)
    with kept_kernels():
        assert os.environ["TRITON_CACHE_DIR"] == ""
    assert list(tmp_path.iterdir()) == []


@needs_triton
@pytest.mark.parametrize("operator", ops.OPERATORS)
def test_no_kernel_searches_for_its_tiles(operator):
    """They follow from device, dtype and sizes; a first run compiles and does not try."""
    from triton import Config
    from triton.runtime import Autotuner, Heuristics, JITFunction

    module = importlib.import_module(f"dsfast.triton_kernels.{operator}")
    found = vars(module).values()
    assert operator == "swiglu_mlp" or any(isinstance(value, JITFunction) for value in found)
    assert not any(isinstance(value, Autotuner | Heuristics | Config) for value in found)


@needs_triton
def test_a_c_compiler_that_is_missing_is_told_in_one_line(monkeypatch, tmp_path):
    """Triton's own look for one."""
    from triton.runtime.build import compile_module_from_src

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with (
        pytest.raises(
            UserError, match=r"^triton needs a C compiler to start kernels and finds none; install gcc, or set CC$"
        ),
        kept_kernels(),
    ):
        compile_module_from_src("int f;", "launcher")


@pytest.mark.parametrize(
    ("version", "named", "found", "starts"),
    [
        ("3.6.0", "", None, False),
        ("3.6.0", "/opt/cc", None, True),
        ("3.6.0", "", "clang", True),
        ("3.6.0", "", "gcc", True),
        ("3.7.0", "", None, True),
    ],
)
def test_an_old_triton_starts_no_kernels_without_a_c_compiler(monkeypatch, version, named, found, starts):
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(__version__=version))
    monkeypatch.setattr(triton.shutil, "which", lambda name: name if name == found else None)
    monkeypatch.setenv("CC", named)
    assert (triton._no_launcher() == "") == starts


@pytest.mark.parametrize(
    ("version", "numpy_version", "interprets"),
    [("3.6.0", "2.3.5", True), ("3.6.1", "2.4.0", False), ("3.7.0", "2.4.0", True)],
)
def test_which_triton_interprets_with_which_numpy(monkeypatch, version, numpy_version, interprets):
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(__version__=version))
    monkeypatch.setattr(triton.numpy, "__version__", numpy_version)
    assert (triton.cannot_interpret() == "") == interprets


def test_another_tool_of_tritons_that_fails_keeps_its_error():
    with pytest.raises(subprocess.CalledProcessError), kept_kernels():
        raise subprocess.CalledProcessError(1, ["ptxas", "--version"])


@needs_triton
def test_a_c_compiler_that_fails_is_told_in_one_line(monkeypatch, tmp_path):
    """Triton's own call of it."""
    from triton.runtime.build import compile_module_from_src

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    with (
        pytest.raises(
            UserError, match=r"^false could not compile what starts GPU kernels \(exit status 1\); it needs"
        ) as caught,
        kept_kernels(),
    ):
        compile_module_from_src("int f;", "launcher")
    assert "\n" not in str(caught.value)
