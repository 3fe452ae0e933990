"""metrics.jsonl: one JSON object per training step, appended as it is done."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from math import inf, isfinite, isnan
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from dsfast.errors import UserError
from dsfast.files import finite, os_errors_as, write_text


class MetricsFile:
    """Opened for appending after the lines up to `keep_steps`; later ones, of a run that went further, are dropped."""

    def __init__(self, path: Path, keep_steps: int):
        self._failed = f"{path}: cannot be written"
        with os_errors_as(self._failed):
            _truncate(path, keep_steps)
            self._file = path.open("a", encoding="utf-8", buffering=1)  # a line at a time

    def write(self, values: dict[str, Any]) -> None:
        """Numbers that are not finite become null: JSON has no word for them. UserError where there is no room."""
        with os_errors_as(self._failed):
            self._file.write(json.dumps(finite(values), allow_nan=False) + "\n")

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with os_errors_as(self._failed) if kind is None else suppress(OSError):
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a metrics file; a last line cut short by a kill is left out. UserError for one that is not a step's."""
    lines = []
    for number, text in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not text.endswith(b"\n"):
            break
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):  # not JSON, or nested too deeply for Python; or not UTF-8
            values = None
        if not isinstance(values, dict) or type(values.get("step")) is not int:
            raise UserError(f'{path}: line {number}: expected one JSON object per step, with its number as "step"')
        lines.append(values)
    return lines


def _truncate(path: Path, keep_steps: int) -> None:
    kept = [line for line in read_metrics(path) if line["step"] <= keep_steps] if path.exists() else []
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def experts_used(load: Tensor) -> float:
    """How many experts that were chosen equally often would share the work as those with this `load` [E], times chosen, do:
    1 / the sum of the shares' squares. All of them where the loads are even, 1 where all fell on one, 0 where there was none."""
    load = load.to("cpu", torch.float64)
    total = float(load.sum())
    return total**2 / float(load.square().sum()) if total else 0.0


def relative_differences(losses: Sequence[float], others: Sequence[float]) -> list[float]:
    """How far each step's loss lies from the other run's, as a share of that one's, for the steps that both have.

    Of two NaN, or of equal infinities, 0; where one of the two is not finite, or the other is 0, inf.
    """
    return [_relative_difference(a, b) for a, b in zip(losses, others, strict=False)]


def _relative_difference(a: float, b: float) -> float:
    if a == b or (isnan(a) and isnan(b)):
        return 0.0
    return abs(a / b - 1) if isfinite(a) and isfinite(b) and b else inf


def largest_difference(differences: Sequence[float]) -> dict[str, float | int]:
    """`largest` of the differences of all steps, and the step it is `at_step`, from 1."""
    largest = max(differences)
    return {"largest": largest, "at_step": differences.index(largest) + 1}
