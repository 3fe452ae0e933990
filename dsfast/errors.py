"""The one exception that is the user's to mend."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in an input: one clear line saying what, where, what was expected and what came.

    Commands print the line and exit with status 2; no traceback is shown.
    """


class GpuError(UserError):
    """A GPU that failed, or had too little memory, while it worked."""


def choices(names) -> str:
    """`names` as they stand in an error message: "known: a, b, c"."""
    return "known: " + ", ".join(sorted(str(name) for name in names))
