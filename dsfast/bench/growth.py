"""`bench growth`: whether a training step's time grows faster than its work, by batch, by length of rows, by experts.

The rows of a series take turns. Each is held against the first of its series:

    expected seconds = first seconds * FLOPs / first FLOPs + bytes of the parameters that the first does not have / bandwidth
    growth           = seconds / expected seconds

The second term is what more experts cost although each token still meets one of them: their weights are read and their
gradients and averages moved, at the rate of a plain copy. It is zero where the model stays the same. What a step costs
whatever its size makes growth smaller, never larger.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from dsfast.bench.ceilings import measure_bandwidth
from dsfast.bench.timing import repeat, spread
from dsfast.bench.workload import comparable, matrix_flops, random_batch
from dsfast.config import Config
from dsfast.errors import expect_known
from dsfast.files import Json
from dsfast.train import Trainer

TOLERANCE = 1.15
"""The growth above which a row is marked, if the spreads are apart too: room for the machine's noise."""
FACTORS = (1, 2, 4, 8)
LENGTHS = (256, 512, 1024, 2048, 4096)
EXPERTS = (2, 4, 8, 16, 32, 64)
# In float32: the weights are read forward and backward, the gradient is written, then AdamW's eight (see cases.py).
BYTES_PER_PARAMETER = 4 * (2 + 1 + 8)


@dataclass(frozen=True)
class Row:
    """A step to time: `batch` rows of `length` tokens through the model of `config`. `name`: what changes in the series."""

    name: str
    config: Config
    batch: int
    length: int


def _sized(config: Config, batch: int, length: int) -> Row:
    return Row(f"{batch} x {length}", config, batch, length)


def _by_batch(config: Config) -> list[Row]:
    """Up to the config's own batch, or to 8 rows where it is smaller."""
    least, length = max(1, config.train.batch_size // FACTORS[-1]), config.data.sequence_length
    return [_sized(config, factor * least, length) for factor in FACTORS]


def _by_length(config: Config) -> list[Row]:
    """Batches of rows of growing length, with as many tokens each as the config's batch has: at least one row of the longest."""
    context = max(config.model.max_position_embeddings, LENGTHS[-1])
    config = config.replace(**{"model.max_position_embeddings": context})
    tokens = LENGTHS[-1] * max(1, config.train.batch_size * config.data.sequence_length // LENGTHS[-1])
    return [_sized(config, tokens // length, length) for length in LENGTHS]


def _by_experts(config: Config) -> list[Row]:
    """The config's batch; each token meets one routed expert, of one group."""
    top1 = {"model.num_experts_per_tok": 1, "model.n_group": 1, "model.topk_group": 1}
    models = {count: config.replace(**top1, **{"model.n_routed_experts": count}) for count in EXPERTS}
    batch, length = config.train.batch_size, config.data.sequence_length
    return [Row(str(count), model, batch, length) for count, model in models.items()]


SERIES: dict[str, Callable[[Config], list[Row]]] = {"batch": _by_batch, "length": _by_length, "experts": _by_experts}


def plan(config: Config, names: Sequence[str] | None) -> dict[str, list[Row]]:
    """Series -> its rows, the smallest first, with AdamW as in `bench step`; all series if `names` is None.

    Raises UserError for an unknown series and, as comparable does, for a config that the bench does not time.
    """
    expect_known("series", names or (), SERIES, "bench growth: ")
    config = comparable(config)
    return {name: SERIES[name](config) for name in (SERIES if names is None else dict.fromkeys(names))}


def run_growth(series: dict[str, list[Row]], repeats: int, progress: Callable[[str], None]) -> Json:
    """Time `series` (from `plan`); `progress` is told what comes next.

    Returns `tolerance`, `bandwidth` (bytes per second), `bytes_per_parameter` and `series`, name -> rows as `judge`
    returns them.
    """
    progress("bandwidth")
    bandwidth = measure_bandwidth()
    found = {}
    for name, rows in series.items():
        progress(f"step by {name}: {', '.join(row.name for row in rows)}")
        found[name] = judge(_timed(rows, repeats), bandwidth)
    return {
        "tolerance": TOLERANCE,
        "bandwidth": bandwidth,
        "bytes_per_parameter": BYTES_PER_PARAMETER,
        "series": found,
    }


def judge(rows: list[Json], bandwidth: float) -> list[Json]:
    """`rows`, each with seconds_per_token, time_ratio, flops_ratio, growth and grows_faster.

    A row has `seconds` (a Spread), `flops`, `parameters` and `tokens`; the first is what all are held against. One grows
    faster if its growth is above TOLERANCE and its lower quartile above what the first's upper quartile lets expect.
    """
    return [{**row, **_ratios(row, rows[0], bandwidth)} for row in rows]


def _ratios(row: Json, first: Json, bandwidth: float) -> Json:
    taken, before = row["seconds"], first["seconds"]
    flops_ratio = row["flops"] / first["flops"]
    moving = BYTES_PER_PARAMETER * (row["parameters"] - first["parameters"]) / bandwidth
    growth = taken["median"] / (before["median"] * flops_ratio + moving)
    apart = taken["lower"] > before["upper"] * flops_ratio + moving
    return {
        "seconds_per_token": taken["median"] / row["tokens"],
        "time_ratio": taken["median"] / before["median"],
        "flops_ratio": flops_ratio,
        "growth": growth,
        "grows_faster": growth > TOLERANCE and apart,
    }


def _timed(rows: list[Row], repeats: int) -> list[Json]:
    """The rows' steps, taking turns after an untimed one of each; what `judge` wants to know of them."""
    trainers = [Trainer(row.config) for row in rows]
    steps = [
        partial(trainer.step, *random_batch(row.config, row.batch, row.length))
        for trainer, row in zip(trainers, rows, strict=True)
    ]
    for step in steps:
        step()
    taken = zip(*repeat(steps, repeats), strict=True)
    return [
        {
            "name": row.name,
            "batch": row.batch,
            "length": row.length,
            "tokens": row.batch * row.length,
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            "flops": matrix_flops(row.config.model, row.batch, row.length),
            "seconds": asdict(spread(samples)),
        }
        for row, trainer, samples in zip(rows, trainers, taken, strict=True)
    ]
