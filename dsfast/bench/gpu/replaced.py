"""An entry of a table, or an attribute, that is another for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, the entry `name` of `owner`, where that is a dict, else its attribute, is `value`."""
    get, put = (dict.__getitem__, dict.__setitem__) if isinstance(owner, dict) else (getattr, setattr)
    former = get(owner, name)
    put(owner, name, value)
    try:
        yield
    finally:
        put(owner, name, former)
