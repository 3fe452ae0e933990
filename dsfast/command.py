"""What every command shares: one-line complaints and exit codes."""

from __future__ import annotations

import argparse
import errno
import gc
import io
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from dsfast.errors import Interrupted, UserError, first_line

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def ctrl_c_ends_at_once() -> Iterator[None]:
    """Inside, where the process was started as a command of dsfast, SIGINT ends it: an import of torch can swallow Python's
    KeyboardInterrupt, and go on with the half of a module. A program that imports dsfast keeps its own way, and so does what
    ignores the signal."""
    if not _is_a_command() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_a_command() -> bool:
    """Whether this process was started as `python -m dsfast...` or by the script `dsfast`, as shows while dsfast is imported."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # stands there while Python looks for the module
        module = sys.orig_argv[sys.orig_argv.index("-m") + 1] if "-m" in sys.orig_argv else ""
        return module.split(".")[0] == "dsfast"
    return os.path.basename(program) == "dsfast"


class CommandParser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors, which come out as one line like all others; options are not abbreviated."""

    def __init__(self, *args, **options):
        super().__init__(*args, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message} (see {self.prog} --help)")

    def parse_known_args(self, args=None, namespace=None):
        """Parse, and refuse an argument that a command does not know in its own name, not in that of the parser above it."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def add_path(self, *names: str, **options) -> None:
        """`add_argument` for the name of a file or folder. An empty one is refused: to pathlib it is the working folder."""
        self.add_argument(*names, type=_path, **options)


def positive(text: str) -> int:
    """A whole number from 1 to 999999, as an argument's `type`: a slip of the keyboard ends here, not in an allocator."""
    if not re.fullmatch("0*[1-9][0-9]{0,5}", text):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to 999999, got {text[:80]!r}")
    return int(text)


def whole_number(text: str) -> int:
    """One of up to 20 digits, as an argument's `type`."""
    if not re.fullmatch("[+-]?[0-9]{1,20}", text):
        raise argparse.ArgumentTypeError(f"expected a whole number of up to 20 digits, got {text[:80]!r}")
    return int(text)


def number(text: str) -> float:
    """As an argument's `type`."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text[:80]!r}") from None


def _path(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a path, got an empty name")
    return text


def run_command(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Run `main(argv)` (default: the process's arguments) and return the exit code.

    A UserError becomes one line on stderr and 2, and so does too little memory; a signal, 128 + its number. Where standard output
    takes no more the work goes on, and what would be 0 is 141 if its reader has gone, else 2, with a line. Any other exception is
    a defect and keeps its traceback.
    """
    if argv is None:
        gc.freeze()  # the process is this command's: what it has imported stays, and no collection need look at it again
    outputs = _prepare_output()
    warnings.formatwarning = _format_warning
    try:
        code = _status(main, sys.argv[1:] if argv is None else argv)
    except SystemExit:  # of --help
        if failed := _finish(outputs):
            return failed
        raise
    failed = _finish(outputs, quiet=code != 0)
    return code or failed


def _status(main: Callable[[list[str]], int | None], argv: list[str]) -> int:
    try:
        with _sigterm_interrupts():
            return main(argv) or 0
    except UserError as error:
        return _complain(str(error))
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


def _format_warning(message, category, filename, lineno, line=None) -> str:
    """One line; of those that are not for the user the place too."""
    place = "" if issubclass(category, UserWarning) else f"{filename}:{lineno}: {category.__name__}: "
    return f"warning: {place}{' '.join(str(message).splitlines())}\n"


def _complain(message: str) -> int:
    print("error: " + " ".join(message.splitlines()), file=sys.stderr)
    return EXIT_USER_ERROR


def _finish(outputs: list[_Output], quiet: bool = False) -> int:
    """Write what standard output still holds. 0, or the status of an output that took no more; `quiet`: nothing is said of it."""
    sys.stdout.flush()
    failed = [output.failed for output in outputs if output.failed]
    if failed and not quiet:
        _complain(f"standard output cannot be written: {failed[0]}; what it did not take is lost, all else is done")
    return EXIT_USER_ERROR if failed else EXIT_BROKEN_PIPE if any(output.abandoned for output in outputs) else 0


def _discard(file: int) -> None:
    """Make what is written to `file` from now on go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, file)
    os.close(nowhere)


class _Output(io.FileIO):
    """Standard output or error that outlasts its reader: `| head` may read as much as it wants, a terminal be closed, or the disk
    of a file be full or fail, and no run is lost for it."""

    abandoned = False
    failed: str | None = None
    """Why it took no more, other than that nobody read it."""

    def __init__(self, file: int):
        super().__init__(file, "wb", closefd=False)
        self._gone = {errno.EPIPE, errno.EIO} if self.isatty() else {errno.EPIPE}

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno in self._gone:
                self.abandoned = True
            else:
                self.failed = error.strerror
            _discard(self.fileno())
            return super().write(data)


def _prepare_output() -> list[_Output]:
    """Have somewhere to write to where the process was started without, no text that cannot be written, and what outlasts its
    reader: those, of the streams that are the process's own."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (for as long as the process lives)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    outputs = []
    for name in ("stdout", "stderr"):
        given = getattr(sys, name)
        if given is getattr(sys, f"__{name}__") and isinstance(given, io.TextIOWrapper):
            given.flush()
            outputs.append(_Output(given.fileno()))
            ways = {way: getattr(given, way) for way in ("encoding", "errors", "line_buffering", "write_through")}
            unbuffered = isinstance(given.buffer, io.FileIO)  # as PYTHONUNBUFFERED asks for
            buffer = outputs[-1] if unbuffered else io.BufferedWriter(outputs[-1])
            setattr(sys, name, io.TextIOWrapper(buffer, **ways))
    return outputs


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
