"""What every command shares: one-line complaints and exit codes."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from dsfast.errors import Interrupted, UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


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

    A UserError becomes one line on stderr and 2; a signal, 128 + its number, and so a reader of the output that has gone. Any
    other exception is a defect and keeps its traceback.
    """
    try:
        with _sigterm_interrupts():
            code = main(sys.argv[1:] if argv is None else argv) or 0
            sys.stdout.flush()
            return code
    except UserError as error:
        print("error: " + " ".join(str(error).splitlines()), file=sys.stderr)
        return EXIT_USER_ERROR
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt as interrupt:  # an Interrupted says which signal it was, and of training what was saved
        print(str(interrupt) or "interrupted", file=sys.stderr)
        return getattr(interrupt, "exit_code", EXIT_INTERRUPTED)


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
