"""`dsfast <command> [arguments]`, the same as `python -m dsfast.<command> [arguments]`."""

from __future__ import annotations

import importlib

import dsfast
from dsfast.command import run_command
from dsfast.errors import UserError, choices, expect_known

# Command -> the module whose main(argv) it is, and what it does.
COMMANDS = {
    "suite": ("dsfast.suite.__main__", "train, verify and question the 500K model; write a results file"),
    "train": ("dsfast.train.__main__", "train a model from a config"),
    "generate": ("dsfast.generate.__main__", "continue a prompt with a checkpoint"),
    "evaluate": ("dsfast.evaluate.__main__", "put prompts to a checkpoint and score the answers"),
    "export": ("dsfast.export", "write a checkpoint for Hugging Face transformers"),
    "bench": ("dsfast.bench.__main__", "time kernels and whole training steps"),
    "info": ("dsfast.info", "versions, what is built, which kernels run here and why"),
}


def dispatch(argv: list[str]) -> int:
    """Run a command with its arguments. Raises UserError for an unknown one."""
    if not argv:
        raise UserError(f"dsfast: which command? {choices(COMMANDS)}")
    command, *arguments = argv
    if command in ("-h", "--help", "--version"):
        if arguments:
            raise UserError(f"dsfast {command}: expected nothing behind it, got {arguments[0]!r}")
        print(f"dsfast {dsfast.__version__}" if command == "--version" else usage())
        return 0
    expect_known("command", [command], COMMANDS)
    module = importlib.import_module(COMMANDS[command][0])
    return module.main(arguments)


def usage() -> str:
    lines = [f"  {name:<10} {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(["usage: dsfast <command> [arguments]", "", *lines, "", "dsfast <command> --help says more."])


def main(argv: list[str] | None = None) -> int:
    """The console script `dsfast`; returns the exit code."""
    return run_command(dispatch, argv)
