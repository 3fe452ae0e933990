"""A GPU that is not there: Triton takes it for an sm_90, dsfast's operators call their Triton kernels on CPU tensors, and what
would be started is written down. Nothing computes: what a kernel should write keeps what is in memory.

Triton and dsfast look for a GPU when they are imported, so this is for a process of its own, `in_its_own_process(__file__)`,
in which this module is imported before others.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

FAKED = os.environ.get("DSFAST_FAKE_GPU") == "1"

if FAKED:  # dsfast's operators as in the interpreter's process, but Triton itself is not to interpret
    os.environ["TRITON_INTERPRET"] = "1"
    assert importlib.import_module("dsfast.ops").triton.INTERPRETED, "dsfast was imported before"
    os.environ["TRITON_INTERPRET"] = "0"
pytest.importorskip("triton")

on_the_fake_gpu = pytest.mark.skipif(not FAKED, reason="runs in a process of its own, with a GPU that is not there")


def in_its_own_process(path: str):
    """A test that runs those of `path` that are marked `on_the_fake_gpu`, in a process that believes in the GPU."""

    @pytest.mark.skipif(FAKED, reason="this is what starts the process")
    def test():
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", path]
        environment = {**os.environ, "DSFAST_FAKE_GPU": "1"}
        child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-2000:]

    return test


class FakeDriver:
    """What Triton asks of a driver. `started`: names of the kernels, in order; `launchers`: of those whose launcher was made."""

    def __init__(self):
        self.started: list[str] = []
        self.launchers: list[str] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            load_binary=lambda name, binary, shared, device: ("module", "function", 32, 0, 1024),
            unload_module=lambda module: None,
            launch=None,
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def map_python_to_cpp_type(self, name: str) -> str:
        from triton.backends.nvidia.driver import ty_to_cpp

        return ty_to_cpp(name)

    def launcher_cls(self, source, metadata):
        """What is called to start the kernel made of `source`."""
        name = source.fn.__name__
        self.launchers.append(name)
        return lambda *grid_and_arguments: self.started.append(name)


class InstantCompiler:
    """Stands for Triton's `compile`: makes kernels of no code. `sources`: what it was given; `threads`: in which it was.

    The first two compilations wait for each other where `together` says so: one after the other they would fail.
    """

    def __init__(self, together: bool = False):
        self.sources: list[tuple[str, ...]] = []
        self.threads: set[int] = set()
        self.failing: dict[str, Exception] = {}
        """Name of a kernel -> what its compilation raises."""
        self._meeting = threading.Barrier(2 if together else 1)
        self._lock = threading.Lock()

    def __call__(self, source, target=None, options=None, _env_vars=None):
        from triton.runtime import driver

        name = source.fn.__name__
        with self._lock:
            self.sources.append((name, *map(str, (source.signature, source.constants, source.attrs, options))))
            self.threads.add(threading.get_ident())
            meets = len(self.sources) <= self._meeting.parties
        if meets:
            self._meeting.wait(timeout=60)
        if name in self.failing:
            raise self.failing[name]
        return SimpleNamespace(
            src=source, metadata=None, function=None, packed_metadata=None, launch_metadata=lambda *arguments: None,
            run=lambda *arguments: driver.active.started.append(name),
        )  # fmt: skip


@contextmanager
def fake_gpu(compiler: InstantCompiler | None = None) -> Iterator[FakeDriver]:
    """Inside, Triton finds the driver that is returned, and no kernel is compiled yet; by `compiler` instead of Triton's own."""
    import triton

    found = FakeDriver()
    former = triton.runtime.driver._active, triton.compiler.compile
    triton.runtime.driver.set_active(found)
    triton.compiler.compile = compiler or former[1]
    _forget_kernels()
    try:
        yield found
    finally:
        _forget_kernels()
        triton.runtime.driver._active, triton.compiler.compile = former


def _forget_kernels() -> None:
    from triton.runtime import JITFunction

    for name, module in list(sys.modules.items()):
        if name.startswith("dsfast.triton_kernels."):
            for value in vars(module).values():
                if isinstance(value, JITFunction):
                    value.device_caches.clear()
