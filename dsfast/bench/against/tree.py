"""A commit of dsfast as a folder that can be run: its sources, and its C++ kernels built for this Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory

from dsfast.errors import UserError
from dsfast.files import cache_folder, os_errors_as
from dsfast.info import ROOT, git
from dsfast.ops import native


def resolve(revision: str) -> str:
    """The hash of the commit that `revision` names. Raises UserError where there is no such one, or no repository."""
    if git("rev-parse", "--show-toplevel") != str(ROOT):
        raise UserError(f"bench against takes commits of dsfast's git repository; {ROOT} is not a clone of it")
    found = git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if not found:
        raise UserError(
            f"{revision!r}: expected a commit of this repository: a hash, a branch, a tag or the like of HEAD~1"
        )
    return found


def tree_of(commit: str) -> Path:
    """The folder of `commit`, made once and kept among dsfast's caches.

    Its C++ kernels are those that run here where their sources are the same, and none where none run here; else pip builds them.
    Raises UserError where that fails, or the cache cannot be written to.
    """
    built_for = Path(sysconfig.get_config_var("EXT_SUFFIX")).stem if native.status()[0] else ".without-kernels"
    folder = cache_folder() / "trees" / f"{commit}{built_for}"
    if folder.exists():
        return folder
    with os_errors_as(f"{folder.parent}: cannot be written to"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=".partial-") as partial:
            tree = Path(partial) / "tree"
            _unpack(commit, tree)
            if native.status()[0] is not None:
                _add_kernels(tree, f"the C++ kernels of commit {commit[:12]} could not be built")
            os.rename(tree, folder)
    return folder


def _unpack(commit: str, tree: Path) -> None:
    archive = tree.with_suffix(".zip")
    if git("archive", f"--output={archive}", commit) is None:
        raise UserError(
            f"git could not write the sources of commit {commit[:12]}; `git archive {commit[:12]}` says why"
        )
    shutil.unpack_archive(archive, tree)


def _add_kernels(tree: Path, complaint: str) -> None:
    ours = Path(native.module().__file__)
    if native.source_hash(tree / "csrc") == native.module().source_hash:
        shutil.copy2(ours, tree / "dsfast")
        return
    site = tree.with_name("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(tree)]
    build = subprocess.run(
        command, env={**os.environ, "DSFAST_REQUIRE_NATIVE": "1"}, capture_output=True, text=True, check=False
    )
    if build.returncode:
        said = build.stderr.strip().splitlines() or [f"pip ended with status {build.returncode}"]
        raise UserError(f"{complaint}: {said[-1].strip()}")
    shutil.copy2(site / "dsfast" / ours.name, tree / "dsfast")
    shutil.rmtree(tree / "build", ignore_errors=True)
