"""What the suite and the bench print on: colour on a terminal, plain text of PLAIN_WIDTH columns elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Collection

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

PLAIN_WIDTH = 120


def make_console() -> Console:
    """Standard output. Text is printed as it is: no markup, no highlighting of numbers."""
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False, markup=False, emoji=False)


def make_table(title: str, *columns: str, right: Collection[str] = (), folded: Collection[str] = ()) -> Table:
    """A table without frame. `right`: columns of numbers; `folded`: those whose cells may take several lines."""
    table = Table(
        title=f"\n{title}" if title else None, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False,
        pad_edge=False,
    )  # fmt: skip
    for column in columns:
        justify = "right" if column in right else "left"
        table.add_column(column, justify=justify, no_wrap=column not in folded, overflow="fold")
    return table
