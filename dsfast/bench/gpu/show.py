"""The results of `bench gpu` as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from dsfast.console import make_table
from dsfast.files import Json

_COLUMNS = (
    "pass", "variant", "us", "quartiles", "in a graph", "launches", "TB/s", "TFLOP/s", "of bound", "tokens/s", "over dsfast",
)  # fmt: skip


def show_gpu(console: Console, found: Json) -> None:
    """Print everything in a document of `bench gpu`."""
    results = found["results"]
    bounds = results["bounds"]
    _where(console, found)
    if bounds is not None:
        _say(console, f"Bounds: copy {bounds['bandwidth'] / 1e12:.2f} TB/s; torch.mm at {bounds['size']}: bfloat16"
                      f" {bounds['bfloat16'] / 1e12:,.0f}, tf32 {bounds['tf32'] / 1e12:,.0f}, float32"
                      f" {bounds['float32'] / 1e12:,.0f} TFLOP/s.")  # fmt: skip
    for row in results["rows"]:
        if row["part"] == "tests":
            _tests(console, row)
        elif "passes" in row:
            _row(console, row)
        else:
            _say(console, f"{row['part']} {row['case']}: {row['status']}", "yellow")
    _not_done(console, results["parts"])
    _figures(console, results["figures"])


def show_tiles(console: Console, found: Json) -> None:
    """Print everything in a document of `bench tiles`."""
    results = found["results"]
    _where(console, found)
    for row in results["rows"]:
        title = f"{row['part']} {row['case']}  {row['entry']}"
        _not_done(console, {title: row}, ("timed", "compiled"))
        if row.get("candidates"):
            _say(console, f"\n{title}: {', '.join(row['kernels'])}", "bold")
            console.print(_candidates(row["candidates"]))
        reasons: dict[str, list[str]] = {}
        for dropped in row.get("dropped", ()):
            reasons.setdefault(dropped["reason"], []).append(_tiles(dropped["tiles"]))
        for reason, tiles in reasons.items():
            _say(console, f"dropped: {'; '.join(tiles)}: {reason}", "yellow")
    _not_done(console, results["parts"])


def _tiles(value: Any) -> str:
    return " ".join(f"{name} {number}" for name, number in value.items()) if isinstance(value, dict) else str(value)


def _candidates(candidates: list[Json]) -> Table:
    lines = []
    for found in candidates:
        line = {"tiles": _tiles(found["tiles"]) + (" (shipped)" if found["shipped"] else "")}
        if "seconds" in found:
            low, high = (f"{found['seconds'][key] * 1e6:,.1f}" for key in ("lower", "upper"))
            line |= {"us": f"{found['seconds']['median'] * 1e6:,.1f}", "quartiles": f"{low} .. {high}"}
            line["of shipped"] = f"{found['of_shipped']:.3f} x"
            if 1 < len(found["launches"]) <= 3:
                line["each launch"] = " + ".join(f"{seconds * 1e6:,.1f}" for seconds in found["launches"].values())
        line |= {name: str(found[name]) for name in ("registers", "shared") if name in found}
        line["estimate"] = f"{found['estimate']:.4f}" if found.get("estimate") else ""
        lines.append(line)
    return _filled(
        "", ("tiles", "us", "quartiles", "of shipped", "each launch", "registers", "shared", "estimate"), lines
    )


def _where(console: Console, found: Json) -> None:
    gpu = found["results"]["gpu"]
    if gpu is not None:
        _say(console, f"{gpu['name']}, {gpu['memory_gb']} GB, driver {gpu['driver']}, CUDA {gpu['cuda']},"
                      f" triton {found['versions']['triton']}, commit {(found['commit'] or {}).get('hash')}")  # fmt: skip
    elif found["settings"].get("plan"):
        _say(console, f"Measured: {found['results']['measured_on']}, triton {found['versions']['triton']}.", "bold")
    else:
        _say(
            console,
            "REHEARSAL on the CPU, in Triton's interpreter, at tiny sizes: no time below is one of a GPU.",
            "bold",
        )


def _not_done(console: Console, states: Json, done: tuple[str, ...] = ("done",)) -> None:
    for name, state in states.items():
        if state["status"] not in done:
            _say(console, f"{name}: {state['status']}", "red" if state["status"].startswith("failed") else "yellow")


def _row(console: Console, row: Json) -> None:
    sizes = " ".join(f"{k}={'mixed' if isinstance(v, list | tuple) else v}" for k, v in row["sizes"].items())
    title = f"{row['part']} {row['case']}  {sizes}  {row['dtype']}"
    if row["passes"]:
        console.print(_passes(title, row["passes"]))
    if row["check"]:
        _say(console, f"not timed: {title}: dsfast: {row['check']}", "red")
    for name, peer in row["peers"].items():
        if peer["status"] != "ready":
            _say(console, f"{peer['status']}: {row['part']} {row['case']}: {name}: {peer['reason']}", "yellow")
    for run, timed in row["passes"].items():
        for name, variant in timed["variants"].items():
            for key in ("failed", "graph_reason"):
                if key in variant:
                    _say(
                        console,
                        f"{key.replace('graph_reason', 'not captured')}: {run}: {name}: {variant[key]}",
                        "yellow",
                    )
    for device, recalls in row.get("recall", {}).items():
        for phrasing, r in recalls.items():
            if r:
                shares = f"{r['fraction']:.1%} ({r['low']:.1%} .. {r['high']:.1%})"
                _say(console, f"recall, {row['case']}, {device}, {phrasing} phrasings: {shares}")
    for fallback in row.get("fallbacks", ()):
        _say(console, f"fell back: {row['part']} {row['case']}: {fallback['operator']}: {fallback['reason']}", "yellow")


def _passes(title: str, passes: Json) -> Table:
    """A row for each variant of each pass."""
    groups = []
    for run, timed in passes.items():
        lines = [
            {"pass": run, "variant": name} | ({"us": "failed"} if "failed" in variant else _cells(variant, timed))
            for name, variant in timed["variants"].items()
        ]
        if timed["ideal_seconds"]:
            lines.append({"pass": run, "variant": "the bound", "us": f"{timed['ideal_seconds'] * 1e6:,.1f}"})
        groups.append(lines)
    return _filled(title, _COLUMNS, *groups)


def _filled(title: str, columns: tuple[str, ...], *groups: list[Json]) -> Table:
    """The lines of each group, without the columns that all of them leave empty."""
    columns = [name for name in columns if any(line.get(name) for lines in groups for line in lines)]
    table = _table(title, *columns)
    for lines in groups:
        for line in lines:
            table.add_row(*(line.get(name, "") for name in columns))
        table.add_section()
    return table


def _cells(variant: Json, timed: Json) -> dict[str, str]:
    seconds, micro = variant["seconds"], 1e6
    moved, flops, share = (variant.get(key) for key in ("bytes_per_second", "flops_per_second", "bound_share"))
    return {
        "us": f"{seconds['median'] * micro:,.1f}",
        "quartiles": f"{seconds['lower'] * micro:,.1f} .. {seconds['upper'] * micro:,.1f}",
        "in a graph": f"{variant['graph_seconds'] * micro:,.1f}" if "graph_seconds" in variant else "",
        "launches": f"{variant['launches']}" if "launches" in variant else "",
        "TB/s": f"{moved / 1e12:.2f}" if moved else "",
        "TFLOP/s": f"{flops / 1e12:,.1f}" if timed["flops"] and flops else "",
        "of bound": f"{share:.0%}" if share else "",
        "tokens/s": f"{variant['tokens_per_second']:,.0f}" if "tokens_per_second" in variant else "",
        "over dsfast": f"{variant['over_dsfast']:.2f} x" if "over_dsfast" in variant else "",
    }


def _tests(console: Console, row: Json) -> None:
    counts = ", ".join(f"{count} {name}" for name, count in row["counts"].items())
    said = " ".join(part for part in (row["status"], row["reason"], counts) if part)
    _say(console, f"tests, {row['case']}: {said}", None if row["status"] == "passed" else "yellow")
    for failure in row["failures"]:
        _say(console, f"failed: {failure}", "red")


def _figures(console: Console, rows: list[Json]) -> None:
    lines = [
        {
            "figure": row["what"], "asked": row["asked"], "stretch": row["stretch"], "met?": row["met"],
            "got": "-" if row["got"] is None else f"{row['got']:,.2f} {row['unit']}".rstrip(),
            "the bound, us": f"{row['bound_seconds'] * 1e6:,.1f}" if row["bound_seconds"] else "",
            "of bound": f"{row['bound_share']:.0%}" if row["bound_share"] else "",
        } for row in rows
    ]  # fmt: skip
    columns = ("figure", "asked", "stretch", "got", "met?", "the bound, us", "of bound")
    console.print(_filled("Figures asked for on an H200", columns, lines))


_WORDS = ("pass", "variant", "tiles", "figure", "asked", "stretch", "met?")


def _table(title: str, *columns: str) -> Table:
    return make_table(title, *columns, right=set(columns) - set(_WORDS))


def _say(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, markup=False)
