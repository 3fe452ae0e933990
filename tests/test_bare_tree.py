"""A source tree that nothing has installed, such as a copy on a machine without a network, runs as it stands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = "import dsfast.configs as c, dsfast.triton_kernels as k; print(c.__path__[0], k.__path__[0])"


def test_kernels_and_configs_are_found(tmp_path):
    """With -S nothing but these paths: not what finds the packages of an editable installation."""
    packages = [path for path in sys.path if path.endswith("-packages")]
    child = subprocess.run(
        [sys.executable, "-S", "-c", CODE], env={"PYTHONPATH": os.pathsep.join([str(ROOT), *packages])},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == [str(ROOT / "configs"), str(ROOT / "triton_kernels")]
