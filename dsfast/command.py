"""What every command shares: one-line complaints and exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from dsfast.errors import UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


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

    A UserError becomes one line on stderr and 2; a signal, 128 + its number. Any other exception is a defect and keeps
    its traceback.
    """
    try:
        return main(sys.argv[1:] if argv is None else argv) or 0
    except UserError as error:
        print("error: " + " ".join(str(error).splitlines()), file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt as interrupt:  # dsfast.train's Interrupted says what was saved, and which signal it was
        print(str(interrupt) or "interrupted", file=sys.stderr)
        return getattr(interrupt, "exit_code", EXIT_INTERRUPTED)
