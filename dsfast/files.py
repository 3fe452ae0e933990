"""Files: JSON that is read strictly; what commands write, tried out before the work and written whole or not at all; caches."""

from __future__ import annotations

import fcntl
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dsfast.errors import FileError, UserError

Json = dict[str, Any]
"""What a JSON file holds, or a part of it."""
_PROBE = 2**16
"""Bytes that have to fit where something is to be written."""
_NAMED = 40
"""Characters of a file's name that its half-written one keeps: that has more beside them, and no name may be too long."""


@contextmanager
def os_errors_as(message: str, *others: type[Exception]) -> Iterator[None]:
    """Inside, an OSError or one of `others` becomes a FileError: `message`, a colon and the reason."""
    try:
        yield
    except (OSError, *others) as error:
        raise FileError(f"{message}: {getattr(error, 'strerror', None) or error}") from None


def check_output_file(path: str, argument: str) -> Path:
    """`path`, given as `argument`, as a Path; of a link, what it leads to. Raises UserError where a file could not be written
    there, and for what is none, such as a pipe, or where this process's standard output or error goes: the file that is written
    takes its place."""
    target = Path(os.path.realpath(path) if os.path.islink(path) else path)
    with os_errors_as(f"{argument} {path}: cannot be written"):
        if os.path.isdir(path):
            raise UserError(f"{argument} {path}: expected a file, this is a folder")
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{argument} {path}: expected a file, this is a device or a pipe")
        if _takes_what_is_printed(path):
            raise UserError(f"{argument} {path}: expected another file than the one that takes what is printed")
        _try_out(target.parent)
        with suppress(FileNotFoundError):
            target.lstat()  # a name that is too long for a file
        if target.is_file():
            target.open("ab").close()
    return target


def _takes_what_is_printed(path: str) -> bool:
    """Whether this process's standard output or error goes to the file at `path`."""
    for stream in (1, 2):
        with suppress(OSError):  # no such file, or a stream that is closed
            if os.path.samestat(os.stat(path), os.fstat(stream)):
                return True
    return False


def check_output_folder(path: str, argument: str) -> Path:
    """`path` as a Path, tried out and left as it was. Raises UserError where nothing could be written into it."""
    folder = Path(path)
    absent = [p for p in (folder, *folder.parents) if not os.path.exists(p)]
    with os_errors_as(f"{argument} {path}: cannot be written to"):
        if os.path.lexists(folder) and not folder.is_dir():
            raise UserError(
                f"{argument} {path}: expected a folder, this is {'a file' if folder.exists() else 'a broken link'}"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _try_out(folder)
        finally:
            for created in filter(Path.exists, absent):
                created.rmdir()
    return folder


def _try_out(folder: Path) -> None:
    """Raise OSError where nothing can be written into `folder`, also where its disk is full."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(bytes(_PROBE))


@contextmanager
def for_one_run(folder: Path) -> Iterator[None]:
    """Inside, `folder` is one run's. Raises UserError where it is another's, or cannot be opened. It is free again when the run's
    process ends, however it does. Where the file system has no locks nobody is kept out."""
    with os_errors_as(f"{folder}: cannot be opened"):
        handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another run is writing into it; expected another folder, or that it ends"
            ) from None
        except OSError:
            pass  # no locks
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # a child of this process may hold it open
        os.close(handle)


def cache_folder() -> Path:
    """Where dsfast keeps what it need not make again: $DSFAST_CACHE, else $XDG_CACHE_HOME/dsfast, else ~/.cache/dsfast.

    UserError where nothing says whose home folder it is.
    """
    if folder := os.environ.get("DSFAST_CACHE"):
        return Path(folder)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsfast"
    except RuntimeError:
        raise UserError("no home folder is known to keep a cache in; set DSFAST_CACHE to a folder") from None


def expect_possible_name(path: str | Path) -> None:
    """Raise UserError for what the operating system would take for the end of a name."""
    if "\0" in str(path):
        raise UserError(f"{str(path)!r}: no file can have this name")


def read_json(path: str | Path) -> Any:
    """A JSON file without what Python's parser lets through: duplicate keys, NaN, Infinity, halves of surrogate pairs.

    Raises UserError, also for what the parser cannot hold: nesting too deep, numbers of thousands of digits.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for name, count in Counter(name for name, _ in pairs).items():
            if count > 1:
                raise UserError(f"{path}: key {name!r} stands twice in one object; keep one of them")
        return dict(pairs)

    def no_constants(text: str) -> Any:
        raise UserError(f"{path}: {text} is not a JSON number; expected a finite number")

    expect_possible_name(path)
    try:
        text = Path(path).read_text(encoding="utf-8").removeprefix("\ufeff")
        values = json.loads(text, object_pairs_hook=no_duplicates, parse_constant=no_constants)
        json.dumps(values, ensure_ascii=False).encode("utf-8")  # fails for a string that no UTF-8 text can hold
        return values
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except UnicodeEncodeError as error:
        near = error.object[max(error.start - 20, 0) : error.end]
        raise UserError(f"{path}: half of a surrogate pair, which no UTF-8 text can hold, ends {near!r}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except ValueError:  # Python converts no more than sys.get_int_max_str_digits() digits
        raise UserError(f"{path}: a whole number with too many digits; expected at most 64 bits") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none, in UTF-8. Raises OSError.

    What UTF-8 cannot hold, such as a file name in another encoding, is written as \\udcXX: in JSON the right escape.
    """
    partial = path.with_name(f".{path.name[:_NAMED]}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of `value` as JSON, with null for numbers that are not finite."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """`value` with None in place of inf and nan, for which JSON has no word, in dicts, lists and tuples too."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
