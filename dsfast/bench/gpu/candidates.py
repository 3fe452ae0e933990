"""The starting values in the kernels' modules that a case takes, and what to try in their place."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import ExitStack
from itertools import combinations
from typing import Any, NamedTuple

from dsfast.bench.gpu.cases import OPERATORS
from dsfast.bench.gpu.replaced import replaced

PARTS = ("attention", "experts", "head", "decode", "mlp", "norm", "rope", "embedding", "project", "output")
"""Of `bench gpu`, with something to choose."""
MODULES = {part: (OPERATORS[part],) for part in PARTS} | {
    "attention": ("attention_pieces", "mla_attention", "mla_attention_kept"), "mlp": ("moe_experts",),
}  # fmt: skip
"""Of dsfast.triton_kernels, with the tables of a part's kernels."""
CONSTANTS = {
    "attention": ("HEADS_TOGETHER", "KEPT"), "experts": ("TILES_TOGETHER",), "head": ("_WORDS", "_COMBINED", "_SCALED"),
    "norm": ("ELEMENTS",), "rope": ("ELEMENTS",), "embedding": ("_ELEMENTS", "_KEYS"),
    "project": ("_FORWARD", "_BACKWARD", "_WEIGHTS"), "output": ("_FORWARD", "_BACKWARD"),
}  # fmt: skip
"""Of modules, numbers and tiles that are in no table."""
SIDES = ("bt", "bs", "bm", "bn", "rows", "columns")
"""Of a tile of results: powers of two, as are bk and slice."""
BOUNDS = {"warps": (4, 8), "stages": (1, 5), "resident": (1, 4), "groups": (1, 4)}
SIDE_BOUNDS = (16, 256)
_ONE_BY_ONE = ("stages", "resident")  # not powers of two
_TAKES = {"warps": -1, "resident": 0, "groups": -1}
"""What one more takes of a program's registers and shared memory, where that is not 1: more warps have more registers."""
_DIVIDE = {"forward": ("bs", "bt"), "backward_q": ("bs", "bt"), "backward_kv": ("bt", "bs")}
"""Kernels of attention: the first side is to divide the second."""


class Entry(NamedTuple):
    """A starting value, `table[key]`; `name` is what the source calls it."""

    name: str
    table: dict
    key: Any


class _Watched(dict):
    """A row of a table that tells which of its entries are read."""

    def __init__(self, row: dict, read: Callable[[Any], object]):
        super().__init__(row)
        self._read = read

    def __getitem__(self, key):
        self._read(key)
        return super().__getitem__(key)


def entries(part: str, call: Callable[[], object]) -> list[Entry]:
    """The entries of the tables of `part`'s modules that `call` reads, in the order in which it does; then its constants."""
    modules = {name: vars(importlib.import_module(f"dsfast.triton_kernels.{name}")) for name in MODULES[part]}
    found: dict[str, Entry] = {}

    def watched(name: str, row: dict) -> _Watched:
        return _Watched(row, lambda key: found.setdefault(f"{name}[{key!r}]", Entry(f"{name}[{key!r}]", row, key)))

    with ExitStack() as stack:
        for module, values in modules.items():
            for name, table in values.items():
                if isinstance(table, dict) and table and all(isinstance(row, dict) for row in table.values()):
                    rows = {key: watched(f"{module}.{name}[{key!r}]", row) for key, row in table.items()}
                    stack.enter_context(replaced(values, name, rows))
        call()
    constants = [
        Entry(f"{module}.{name}", values, name)
        for module, values in modules.items() for name in CONSTANTS.get(part, ()) if name in values
    ]  # fmt: skip
    return [*found.values(), *constants]


def candidates(entry: Entry) -> list:
    """Values near the shipped one: one number of the tiles the next smaller or larger, or two, where one takes what the other
    gives. Of a constant its halves and doubles."""
    shipped = entry.table[entry.key]
    if isinstance(shipped, int):
        return [value for value in (shipped // 2, shipped * 2, shipped // 4, shipped * 4) if value]
    steps = [step for name, value in shipped._asdict().items() for step in _steps(name, value)]
    one = [{name: value} for name, value, _ in steps]
    two = [{a: x, b: y} for (a, x, s), (b, y, t) in combinations(steps, 2) if a != b and s + t == 0]
    found = [shipped._replace(**change) for change in (*one, *two)]
    small, large = next((sides for kernel, sides in _DIVIDE.items() if f"'{kernel}'" in entry.name), ("", ""))
    return [tiles for tiles in found if not hasattr(tiles, small) or getattr(tiles, small) <= getattr(tiles, large)]


def _steps(name: str, value: int) -> list[tuple[str, int, int]]:
    """(name, the next smaller number, what it takes more), and of the next larger one, as far as the field `name` has them; of a
    choice of two the other one."""
    if isinstance(value, bool):
        return [(name, not value, 0)]
    least, most = BOUNDS.get(name, SIDE_BOUNDS)
    near = (value - 1, value + 1) if name in _ONE_BY_ONE else (value // 2, value * 2)
    takes = _TAKES.get(name, 1)
    return [(name, n, more) for n, more in zip(near, (-takes, takes), strict=True) if least <= n <= most]
