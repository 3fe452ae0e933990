"""What every command shares: one-line complaints and exit codes."""

from __future__ import annotations

import argparse
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from dsfast.errors import Interrupted, UserError, first_line

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CommandParser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors, so that they come out as one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message} (see {self.prog} --help)")

    def add_path(self, *names: str, **options) -> None:
        """`add_argument` for the name of a file or folder. An empty one is refused: to pathlib it is the working folder."""
        self.add_argument(*names, type=_path, **options)


def _path(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a path, got an empty name")
    return text


def run_command(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Run `main(argv)` (default: the process's arguments) and return the exit code.

    A UserError becomes one line on stderr and 2, and so do too little memory and an output that takes no more; a signal, 128 +
    its number, and so a reader of the output that has gone. Any other exception is a defect and keeps its traceback.
    """
    _prepare_output()
    try:
        code = _status(main, sys.argv[1:] if argv is None else argv)
    except SystemExit:  # of --help
        if failed := _flush():
            return failed
        raise
    failed = _flush(quiet=code != 0)
    return code or failed


def _status(main: Callable[[list[str]], int | None], argv: list[str]) -> int:
    try:
        with _sigterm_interrupts():
            return main(argv) or 0
    except UserError as error:
        return _complain(str(error))
    except BrokenPipeError:  # `| head` has read enough
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.filename is not None or error.errno not in _NO_ROOM:
            raise
        return _complain(f"an output cannot be written: {error.strerror}")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        return _complain(f"out of memory; a smaller model, batch or text takes less ({first_line(error)})")
    except KeyboardInterrupt as interrupt:  # an Interrupted says which signal it was, and of training what was saved
        print(str(interrupt) or "interrupted", file=sys.stderr)
        return getattr(interrupt, "exit_code", EXIT_INTERRUPTED)


def _complain(message: str) -> int:
    print("error: " + " ".join(message.splitlines()), file=sys.stderr)
    return EXIT_USER_ERROR


def _flush(quiet: bool = False) -> int:
    """Write what standard output still holds; where it takes no more, nowhere, or Python would complain when it ends. 0, or the
    status of that; `quiet`: nothing more is said."""
    try:
        sys.stdout.flush()
        return 0
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return EXIT_BROKEN_PIPE
        return EXIT_USER_ERROR if quiet else _complain(f"an output cannot be written: {error.strerror}")


def _prepare_output() -> None:
    """Have somewhere to write to where the process was started without, and no text that cannot be written."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (for as long as the process lives)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Inside, SIGTERM raises Interrupted: what is to be cleaned up is, and processes that were started are ended. Python gives
    signals to the main thread alone; elsewhere this does nothing."""

    def interrupt(number: int, frame: object) -> NoReturn:
        raise Interrupted(number, "terminated")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
