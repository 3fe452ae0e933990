"""Files: whole or absent, and refused before the work begins where they could not be written."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest
from unreadable import unreadable

from dsfast import files
from dsfast.errors import UserError
from dsfast.files import (
    cache_folder,
    check_output_file,
    check_output_folder,
    finite,
    for_one_run,
    os_errors_as,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_os_error_becomes_one_line_with_its_reason():
    with pytest.raises(UserError, match=r"^here: cannot be read: gone$"), os_errors_as("here: cannot be read"):
        raise FileNotFoundError(2, "gone", "elsewhere")
    with pytest.raises(UserError, match=r"^here: odd$"), os_errors_as("here"):
        raise OSError("odd")
    with pytest.raises(UserError, match=r"^here: 3$"), os_errors_as("here", KeyError):
        raise KeyError(3)
    with pytest.raises(ValueError, match="mine"), os_errors_as("here", KeyError):
        raise ValueError("mine")


def test_text_replaces_what_was_there_and_leaves_nothing_beside_it(tmp_path):
    for text in ("one\n", "zwei ü\n"):
        write_text(tmp_path / "out.txt", text)
        assert (tmp_path / "out.txt").read_bytes() == text.encode("utf-8")
        assert names(tmp_path) == ["out.txt"]


@pytest.mark.parametrize("step", ["write", "replace"])
def test_a_full_disk_leaves_what_is_there(tmp_path, monkeypatch, step):
    path = tmp_path / "out.json"
    path.write_text("before", encoding="utf-8")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((Path, "write_text") if step == "write" else (files.os, "replace")), full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"a": 1})
    assert path.read_bytes() == b"before"
    assert names(tmp_path) == ["out.json"]


def test_json_holds_what_json_can(tmp_path):
    value = {"a": [1.5, float("nan"), {"b": (float("-inf"), 2)}], "name": "ü \udcff", "no": None, "yes": True}
    write_json(tmp_path / "out.json", value)
    text = (tmp_path / "out.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"a": [1.5, None, {"b": [None, 2]}], "name": "ü \udcff", "no": None, "yes": True}
    assert '"ü \\udcff"' in text
    assert finite(value["a"]) == [1.5, None, {"b": [None, 2]}]
    with pytest.raises(TypeError):
        write_json(tmp_path / "other.json", {"a": object()})
    assert names(tmp_path) == ["out.json"]


def test_the_output_file_is_tried_and_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here").write_text("before")
    assert check_output_file("here", "--json") == Path("here")
    assert check_output_file("new", "--json") == Path("new")
    assert (names(tmp_path), Path("here").read_text()) == (["here"], "before")
    with pytest.raises(UserError, match=r"^--json \.: expected a file, this is a folder$"):
        check_output_file(".", "--json")
    for absent, reason in (("no/new", "No such file or directory"), ("here/new", "Not a directory")):
        with pytest.raises(UserError, match=rf"^--json {absent}: cannot be written: {reason}$"):
            check_output_file(absent, "--json")
    with pytest.raises(UserError, match=r"^--json n{256}: cannot be written: File name too long$"):
        check_output_file("n" * 256, "--json")
    for closed in (".", "here"):
        tmp_path.chmod(0o777)
        with unreadable(Path(closed)), pytest.raises(UserError, match=r"^--json here: .*: Permission denied$"):
            check_output_file("here", "--json")


@pytest.mark.parametrize("name", ["n" * 255, "\u20ac" * 85])
def test_the_longest_name_is_written(tmp_path, name):
    write_json(check_output_file(str(tmp_path / name), "--json"), 1)
    assert (names(tmp_path), (tmp_path / name).read_text()) == ([name], "1\n")


def test_an_output_file_takes_the_place_of_no_link_and_of_nothing_else(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for special in ("/dev/null", str(tmp_path / "pipe")):
        with pytest.raises(UserError, match=rf"^--json {special}: expected a file, this is a device or a pipe$"):
            check_output_file(special, "--json")
    for name in ("there", "absent"):
        (tmp_path / name).symlink_to(tmp_path / f"{name}.json")
    (tmp_path / "there.json").write_text("before")
    for name in ("there", "absent"):
        write_json(check_output_file(str(tmp_path / name), "--json"), 1)
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / f"{name}.json").read_text() == "1\n"


def test_a_folder_is_one_run_s_at_a_time(tmp_path):
    with for_one_run(tmp_path):
        with pytest.raises(UserError, match="another run is writing into it"), for_one_run(tmp_path):
            pass
        assert names(tmp_path) == []
    with for_one_run(tmp_path):
        pass


def test_no_home_folder_is_one_line(monkeypatch):
    monkeypatch.delenv("DSFAST_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    with pytest.raises(UserError, match="no home folder is known to keep a cache in; set DSFAST_CACHE"):
        cache_folder()


def test_a_disk_that_is_full_is_noticed_before_the_work_begins(tmp_path):
    """A file as large as it may be stands for it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(UserError, match=r"^--output-dir .*/a/b: cannot be written to: File too large$"):
            check_output_folder(str(tmp_path / "a" / "b"), "--output-dir")
        with pytest.raises(UserError, match=r"^--json .*/c\.json: cannot be written: File too large$"):
            check_output_file(str(tmp_path / "c.json"), "--json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_the_output_folder_is_tried_and_left_alone(tmp_path, monkeypatch):
    assert check_output_folder(str(tmp_path / "a" / "b"), "--output-dir") == tmp_path / "a" / "b"
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("nowhere")
    for folder, message in (
        ("file", "expected a folder, this is a file"), ("link", "expected a folder, this is a broken link"),
        ("file/below", "cannot be written to: Not a directory"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=rf"^--output-dir {folder}: {message}$"):
            check_output_folder(folder, "--output-dir")
    with unreadable(Path(".")), pytest.raises(UserError, match="new: cannot be written to: Permission denied"):
        check_output_folder("new", "--output-dir")
