"""Builds csrc/ with CMake and Ninja into the one extension module, dsfast._native. All else stands in pyproject.toml."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Configure, build and place the module; without a working compiler install the Python part alone."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # One folder for each Python, so that a second build compiles only what changed.
        build = ROOT / "build" / sys.implementation.cache_tag
        _configure_anew(build)
        configure = [
            "cmake", "-S", str(ROOT / "csrc"), "-B", str(build), "-GNinja", "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}", f"-DPython_EXECUTABLE={sys.executable}",
        ]  # fmt: skip
        # cmake and ninja may be packages of this Python whose environment is not activated.
        environment = os.environ | {
            "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        }
        if importlib.util.find_spec("pybind11") is None:
            print("dsfast: pybind11 is missing here; it takes `pip install pybind11 cmake ninja`", file=sys.stderr)
        try:
            subprocess.run(configure, check=True, env=environment)
            subprocess.run(["cmake", "--build", str(build)], check=True, env=environment)
        except (OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("DSFAST_REQUIRE_NATIVE") == "1":
                raise
            print(
                f"dsfast: the C++ kernels could not be built ({error}); dsfast will run in plain PyTorch",
                file=sys.stderr,
            )


def _configure_anew(build: Path) -> None:
    """Remove what CMake has found, not what it has compiled, as `cmake --fresh` would: cmake, ninja and pybind11 may have lain in
    a temporary build environment that is gone by now."""
    (build / "CMakeCache.txt").unlink(missing_ok=True)
    for found in (build / "CMakeFiles").glob("[0-9]*"):  # by the version of CMake
        shutil.rmtree(found)


setup(ext_modules=[Extension("dsfast._native", sources=[], optional=True)], cmdclass={"build_ext": CMakeBuild})
