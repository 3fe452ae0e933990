"""What the user is to mend, what stopped on a signal, and what of an error is told in one line."""

from __future__ import annotations

from collections.abc import Collection, Iterable


class UserError(Exception):
    """A mistake in an input: one clear line saying what, where, what was expected and what came.

    Commands print the line and exit with status 2; no traceback is shown.
    """


class FileError(UserError):
    """A file or folder that cannot be read or written: the operating system, or a library, refuses."""


class GpuError(UserError):
    """A GPU that failed, or had too little memory, while it worked."""


class Interrupted(KeyboardInterrupt):
    """Stopped by a signal. `exit_code` is 128 + the signal: 129, 130 or 143."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signal_number


def first_line(error: Exception) -> str:
    """The first line of its message, or its type's name where that is empty."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def choices(names) -> str:
    """`names` as they stand in an error message: "known: a, b, c"; quoted where one holds a comma."""
    named = sorted(map(str, names))
    return "known: " + ", ".join(map(repr, named) if any("," in name for name in named) else named)


def expect_known(what: str, names: Iterable, known: Collection, where: str = "") -> None:
    """Raise UserError for the first of `names` that is not among `known`: "{where}unknown {what} 'c'; known: a, b"."""
    for name in names:
        if name not in known:
            raise UserError(f"{where}unknown {what} {name!r}; {choices(known)}")
