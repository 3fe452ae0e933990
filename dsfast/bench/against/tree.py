"""A commit of dsfast as a folder that can be run: its sources, and its C++ kernels built for this Python."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory

from dsfast.errors import UserError
from dsfast.files import cache_folder, os_errors_as
from dsfast.info import ROOT, git, in_a_clone
from dsfast.ops import native


def resolve(revision: str) -> str:
    """The hash of the commit that `revision` names. Raises UserError where there is no such one, or no repository."""
    if not in_a_clone():
        raise UserError(f"bench against takes commits of dsfast's git repository; git finds no clone of it in {ROOT}")
    found = git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if not found or found.startswith("^"):
        raise UserError(
            f"{revision!r}: expected a commit of this repository: a hash, a branch, a tag or the like of HEAD~1"
        )
    return found


def tree_of(commit: str) -> Path:
    """The folder of `commit`, made once and kept among dsfast's caches.

    Its C++ kernels are those that run here where their sources are the same, and none where none run here; else pip builds them.
    Raises UserError where that fails, the cache cannot be written to, or the kernels here are older than their sources.
    """
    kernels, reason = native.status()
    if kernels is None and native.built():
        raise UserError(reason)
    built_for = Path(sysconfig.get_config_var("EXT_SUFFIX")).stem if kernels else ".without-kernels"
    folder = cache_folder().absolute() / "trees" / f"{commit}{built_for}"
    if folder.exists():
        return folder
    with os_errors_as(f"{folder.parent}: cannot be written to"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=".partial-") as partial:
            tree = Path(partial) / "tree"
            _unpack(commit, tree)
            if kernels is not None:
                _add_kernels(tree, f"the C++ kernels of commit {commit[:12]} could not be built")
            try:
                os.rename(tree, folder)
            except OSError:
                if not folder.exists():  # else another process has made it meanwhile
                    raise
    return folder


def _unpack(commit: str, tree: Path) -> None:
    archive = tree.with_suffix(".zip")
    status, said = _run(["git", "-C", str(ROOT), "archive", f"--output={archive}", commit], {})
    if status:
        raise UserError(f"the sources of commit {commit[:12]} could not be written: {said[-1]}")
    shutil.unpack_archive(archive, tree)
    for name in ("configs", "triton_kernels"):  # where an installation has them, and commits of before looked for them
        (tree / "dsfast" / name).symlink_to(Path("..") / name)


def _add_kernels(tree: Path, complaint: str) -> None:
    ours = Path(native.module().__file__)
    if native.source_hash(tree / "csrc") == native.module().source_hash:
        shutil.copy2(ours, tree / "dsfast")
        return
    site = tree.with_name("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(tree)]
    status, said = _run(command, {"DSFAST_REQUIRE_NATIVE": "1", "TMPDIR": str(tree.parent)})
    if status:
        errors = [line for line in said if "error" in line.lower() and "subprocess-exited" not in line]
        raise UserError(f"{complaint}: {(errors or said)[0].strip()}")
    shutil.copy2(site / "dsfast" / ours.name, tree / "dsfast")
    shutil.rmtree(tree / "build", ignore_errors=True)


def _run(command: list[str], environment: dict[str, str]) -> tuple[int, list[str]]:
    """Its status and what it said, a line at least. What ends this in between ends all it has started, such as compilers."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with subprocess.Popen(command, env=os.environ | environment, start_new_session=True, **options) as child:
        try:
            said, _ = child.communicate()
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            raise
    return child.returncode, said.strip().splitlines() or [f"{command[0]} ended with status {child.returncode}"]
