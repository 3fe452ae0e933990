"""What the bench shows on the console: tables with a bar in each row. Colour on a terminal, plain text elsewhere."""

from __future__ import annotations

import io
from collections.abc import Iterable
from functools import partial
from itertools import groupby
from operator import itemgetter

from rich.console import Console
from rich.table import Table

from dsfast.bench import timing
from dsfast.bench.against.run import NOISE, WIDE
from dsfast.bench.gpu.show import show_gpu, show_tiles
from dsfast.bench.memory import IDLE
from dsfast.console import make_console, make_table
from dsfast.files import Json

FILE_WIDTH = 150
BAR = 12  # columns of the longest bar

COMPILED = ("registers", "spills", "shared", "matrix")  # what `bench compile` shows of a kernel


class Reporter:
    """Prints results to standard output, and what is under way to standard error if that is a terminal."""

    def __init__(self, console: Console | None = None):
        self.console = console or make_console()
        self._errors = Console(stderr=True, highlight=False)

    def progress(self, text: str) -> None:
        if self._errors.is_terminal:
            self._errors.print(f"… {text}", style="dim", markup=False)

    def show(self, found: Json) -> None:
        """Print a whole document (see results)."""
        machine, build = found["machine"], found["native"]
        self._say(
            f"{machine['processor']}, {machine['threads']} threads, torch {found['versions']['torch']}; {build['reason']}"
        )
        self._fallbacks(found["fallbacks"])
        shows = {
            "step": self._step, "kernels": self._kernels, "generate": self._generate, "growth": self._growth,
            "learning": self._learning, "against": self._against, "compile": self._compile,
            "gpu": partial(show_gpu, self.console), "tiles": partial(show_tiles, self.console),
        }  # fmt: skip
        shows[found["settings"]["bench"]](found)

    def _step(self, found: Json) -> None:
        settings, results = found["settings"], found["results"]
        title = f"One training step, {settings['batch']} x {settings['length']} tokens: forward, backward, clip, AdamW"
        table = _table(title, "variant", "median ms", "quartiles", "dsfast is", "pairwise", "ms in bars", "what")
        timed = {n: p["comparison"] for n, p in results["peers"].items() if p["status"] == "timed"}
        longest = max((c[side]["median"] for c in timed.values() for side in ("first", "other")), default=0.0)
        for name, c in timed.items():
            ratios = (f"{c['ratio_of_medians']:.2f} x", f"{c['median_of_ratios']:.2f} x")
            table.add_row("dsfast", *_times(c["first"]), "", "", _bar(c["first"]["median"], longest), "beside the next")
            bar = _bar(c["other"]["median"], longest)
            table.add_row(name, *_times(c["other"]), *ratios, bar, results["peers"][name]["what"], end_section=True)
        if timed:
            self.console.print(table)
        for name, peer in results["peers"].items():
            if peer["status"] != "timed":
                self._say(f"{peer['status']}: {name}: {peer['reason']}", "yellow")
        self._say("Freed memory stays with the process (mallopt, set by dsfast's trainer); the peers gain by it too.")
        counts = {f"dsfast against {name}": c["first"]["count"] for name, c in timed.items()}
        self._fewer(settings["repeats"], {**counts, "dsfast alone": results["dsfast"]["count"]})
        self._work(results["work"], results["ceilings"], results["dsfast"]["products"])
        self._operators(results["operators"])
        if "memory" in results:
            self._memory(results["memory"], results["memory_failed"])

    def _work(self, work: Json, ceilings: Json, products: str) -> None:
        shares = ", ".join(
            f"{work['share_of'][d]:.0%} of torch.mm in {d} at {ceilings[f'{d}_size']}" for d in ("float32", "bfloat16")
        )
        self._say(
            f"Matrix products of the step: {work['flops'] / 1e9:,.1f} GFLOP. dsfast's whole step does"
            f" {work['flops_per_second'] / 1e9:,.0f} GFLOP/s: {shares} (measured in this run)."
            f" Its products multiply {products}."
        )

    def _operators(self, rows: list[Json]) -> None:
        table = _table("dsfast's step by operator (the head computes its gradients in the forward pass)",
                       "operator", "forward ms", "backward ms", "share", "")  # fmt: skip
        longest = max(row["share"] for row in rows)
        for row in rows:
            milliseconds = (_milliseconds(row[f"{side}_seconds"]) for side in ("forward", "backward"))
            table.add_row(row["operator"], *milliseconds, f"{row['share']:.1%}", _bar(row["share"], longest))
        self.console.print(table)

    def _memory(self, peaks: dict[str, int], failed: dict[str, str]) -> None:
        table = _table("Peak resident memory, each in a process of its own", "variant", "MB", f"over {IDLE!r}", "")
        for name, peak in peaks.items():
            over = f"{(peak - peaks[IDLE]) / 1e6:,.0f}" if IDLE in peaks else "-"
            table.add_row(name, f"{peak / 1e6:,.0f}", over, _bar(peak, max(peaks.values())))
        self.console.print(table)
        for name, reason in failed.items():
            self._say(f"✗ the memory of {name} was not measured: {reason}", "red")

    def _kernels(self, found: Json) -> None:
        ceilings = found["results"]["ceilings"]
        self._say(
            f"Ceilings: torch.mm {_giga(ceilings['float32'])} GFLOP/s in float32 at {ceilings['float32_size']},"
            f" {_giga(ceilings['bfloat16'])} in bfloat16 at {ceilings['bfloat16_size']} rows and columns; copy"
            f" {_giga(ceilings['bandwidth'])} GB/s. Share: time at the ceilings over time taken; above 100% where the data"
            " stays in the caches or a kernel beats torch.mm."
        )
        for case in found["results"]["cases"]:
            self._case(case, found["settings"]["repeats"])

    def _case(self, case: Json, repeats: int) -> None:
        sizes = " ".join(f"{letter}={n}" for letter, n in case["sizes"].items())
        title = f"{case['operator']} {case['size']}  {sizes}"
        table = _table(
            title, "pass", "implementation", "median ms", "quartiles", "GFLOP/s", "GB/s", "share", "over eager", ""
        )
        for name, timed in case["passes"].items():
            figures = timed["implementations"]
            fastest = max(1 / f["seconds"]["median"] for f in figures.values())
            for implementation, f in figures.items():
                rate = _giga(f["flops_per_second"]) if timed["flops"] else "-"
                speed = f"{f['speedup_median_of_pairs']:.2f} x" if "speedup_median_of_pairs" in f else ""
                table.add_row(
                    name, implementation, *_times(f["seconds"]), rate, _giga(f["bytes_per_second"]),
                    f"{f['ceiling_share']:.0%}", speed, _bar(1 / f["seconds"]["median"], fastest),
                )  # fmt: skip
            table.add_section()
        self.console.print(table)
        passes = {name: timed["implementations"] for name, timed in case["passes"].items()}
        self._fewer(repeats, {f"{i} {p}": f["seconds"]["count"] for p, fs in passes.items() for i, f in fs.items()})
        for implementation, problem in case["checks"].items():
            if problem:
                self._say(f"not timed: {implementation}: {problem}", "red")

    def _generate(self, found: Json) -> None:
        results = found["results"]
        table = _table(f"Greedy generation, {found['settings']['new_tokens']} tokens after the prompt",
                       "batch", "variant", "tokens/s", "median ms", "quartiles", "dsfast is", "pairwise", "")  # fmt: skip
        for row in results["batches"]:
            fastest, pair = row["tokens_per_second"], row.get("comparison")
            fastest = max(fastest, row.get("peer_tokens_per_second", 0.0))
            bar = _bar(row["tokens_per_second"], fastest)
            table.add_row(
                str(row["batch"]), "dsfast", f"{row['tokens_per_second']:,.0f}", *_times(row["seconds"]), "", "", bar
            )
            if pair:
                ratios = (f"{pair['ratio_of_medians']:.2f} x", f"{pair['median_of_ratios']:.2f} x")
                bar = _bar(row["peer_tokens_per_second"], fastest)
                rate = f"{row['peer_tokens_per_second']:,.0f}"
                table.add_row(str(row["batch"]), "transformers", rate, *_times(pair["other"]), *ratios, bar)
            table.add_section()
        self.console.print(table)
        counts = {f"batch {row['batch']}": row["seconds"]["count"] for row in results["batches"]}
        self._fewer(found["settings"]["repeats"], counts)
        if results["reason"]:
            self._say(f"{results['status']}: transformers: {results['reason']}", "yellow")

    def _growth(self, found: Json) -> None:
        results = found["results"]
        for name, rows in results["series"].items():
            self._series(name, rows)
        self._say(
            "growth: the time over the first row's, made larger by the ratio of FLOPs, plus"
            f" {results['bytes_per_parameter']} bytes for each parameter that row does not have at the"
            f" {_giga(results['bandwidth'])} GB/s of a copy (measured in this run). ✗: above {results['tolerance']},"
            " and the quartiles apart."
        )
        self._fewer(found["settings"]["repeats"], {n: r[0]["seconds"]["count"] for n, r in results["series"].items()})
        for name, rows in results["series"].items():
            for row in rows:
                if row["grows_faster"]:
                    self._say(f"grows faster than its work: {name} {row['name']}: {row['growth']:.2f}", "red")

    def _series(self, name: str, rows: list[Json]) -> None:
        table = _table(f"One training step by {name}: forward, backward, clip, AdamW", name, "tokens", "M params",
                       "median ms", "quartiles", "GFLOP", "time", "FLOPs", "growth", "ns/token", "")  # fmt: skip
        longest = max(row["seconds_per_token"] for row in rows)
        for row in rows:
            growth = f"{row['growth']:.2f} {'✗' if row['grows_faster'] else ' '}"
            table.add_row(
                row["name"], f"{row['tokens']:,}", f"{row['parameters'] / 1e6:.2f}", *_times(row["seconds"]),
                _giga(row["flops"]), f"{row['time_ratio']:.2f}x", f"{row['flops_ratio']:.2f}x", growth,
                f"{row['seconds_per_token'] * 1e9:,.0f}", _bar(row["seconds_per_token"], longest),
            )  # fmt: skip
        self.console.print(table)

    def _learning(self, found: Json) -> None:
        results, steps = found["results"], found["settings"]["config"]["train"]["steps"]
        table = _table(f"{steps} steps, by dsfast (d) and by plain PyTorch in float32 (p)", "seed", "loss d", "loss p",
                       "last ten d", "last ten p", "differs", "taught d", "taught p", "heldout d", "heldout p",
                       "s d", "s p")  # fmt: skip
        for row in results["seeds"]:
            runs = row["dsfast"], row["reference"]
            recalls = [_percent(run["recall"][name]) for name in ("taught", "heldout") for run in runs]
            table.add_row(
                str(row["seed"]), *(f"{run['loss']:.4f}" for run in runs), *(f"{run['mean_loss']:.4f}" for run in runs),
                f"{row['difference']:+.2%}", *recalls, *(f"{run['seconds']:,.1f}" for run in runs),
            )  # fmt: skip
        self.console.print(table)
        products = results["seeds"][0]["dsfast"]["products"]
        self._say(
            "loss: of the last step; differs: the mean loss of the last ten; taught, heldout: facts answered in phrasings read"
            f" and never read. dsfast's products multiply {products}. Over the seeds the mean loss differs by"
            f" {results['difference']:+.2%}, of {results['tolerance']:.1%} at most."
        )
        for problem in results["problems"]:
            self._say(f"✗ {problem}", "red")

    def _against(self, found: Json) -> None:
        settings, results = found["settings"], found["results"]
        if "status" in results:
            self._say(f"✗ failed: {results['reason']}", "red")
            return
        self._times_in_turns(settings, results["timed"])
        if "bits" in results:
            for bits, names in groupby(sorted(results["bits"], key=results["bits"].get), results["bits"].get):
                self._say(f"Bits of results and gradients: {bits}: {', '.join(names)}.")
        else:
            self._learnt(results)
        if settings["configs"]["now"] != settings["configs"]["before"]:
            self._say("The two sides' configs differ: each is its own tree's.", "yellow")
        for problem in results["problems"]:
            self._say(f"✗ worse: {problem}", "red")
        for doubt in results.get("doubts", []):
            self._say(f"? {doubt}", "yellow")
        self._numbers(results)

    def _times_in_turns(self, settings: Json, timed: Json) -> None:
        before = f"{settings['revision']} ({settings['commit'][:12]})"
        table = _table(f"Now beside {before}, in turns",
                       "", "now ms", "before ms", "now is", "95%", "verdict")  # fmt: skip
        for name, c in timed.items():
            medians = (_milliseconds(c[side]["median"]) for side in ("first", "other"))
            interval = "{:.3f} .. {:.3f}".format(*c["interval"]) if c["interval"] else ""
            table.add_row(name, *medians, f"{c['median_of_ratios']:.3f} x", interval, c["verdict"])
        self.console.print(table)
        self._say(
            "Now is: before / now, the median of the pairs and where it lies by 95%. Faster, slower: all of that on one side of"
            f" 1, the median by more than {NOISE:.0%} and than by how much processes of the same code differ, as they do here; as"
            f" fast: all within {WIDE:.0%} of 1; unclear: neither, as where a machine has other work or a run few steps."
        )
        waited = {name: c for name, c in timed.items() if c["left_out"]}
        if waited:
            few = ", ".join(f"{name}: {c['left_out']} of {len(c['pairs'])}" for name, c in waited.items())
            self._say(
                f"Pairs of turns left out, as other work took the processors: {few}. Where that is more than half of a"
                " process's, figures are of all and unclear.",
                "yellow",
            )

    def _numbers(self, results: Json) -> None:
        """Whether the working tree's operators are right, where that was looked at."""
        wrong = results.get("wrong")
        if wrong == []:
            where = "Where bits differ, the" if "bits" in results else "The"
            self._say(f"{where} operators as they are now are as near to float64 as they have to be{_calls(results)}.")
        for problem in wrong or []:
            self._say(f"✗ wrong: {problem}", "red")

    def _learnt(self, results: Json) -> None:
        seeds = ", ".join(str(one["seed"]) for one in results["seeds"])
        table = _table(
            f"Learnt, mean over seeds {seeds}" if "," in seeds else f"Learnt, seed {seeds}", "", "now", "before"
        )
        now, before = results["learnt"]["now"], results["learnt"]["before"]
        table.add_row("loss of the last steps", *(f"{side['mean_loss']:.4f}" for side in (now, before)))
        for name in now["recall"]:
            table.add_row(f"recall, {name} phrasings", *(_part(side["recall"].get(name)) for side in (now, before)))
        table.add_row("prompts answered", *(f"{side['exact']:g}" for side in (now, before)))
        peaks = (max(one[name]["peak_memory_bytes"] for one in results["seeds"]) for name in ("now", "before"))
        table.add_row("peak memory, MB", *(f"{peak / 1e6:,.0f}" for peak in peaks))
        self.console.print(table)
        for one in results["seeds"]:
            said = "the same bits at every step"
            if apart := one["apart"]:
                largest = f"{100 * apart['largest']:.3g}%"
                said = f"apart from step {apart['first_step']} on, by at most {largest}, at step {apart['at_step']}"
            self._say(f"Losses of seed {one['seed']}, {len(one['now']['losses'])} steps: {said}.")
        for name in ("now", "before"):
            self._fallbacks(results["seeds"][0][name]["fallbacks"], f"{name}: ")

    def _compile(self, found: Json) -> None:
        rows = found["results"]["kernels"]
        for (operator, size, dtype), together in groupby(rows, itemgetter("operator", "size", "dtype")):
            columns = ("kernel", "chip", "registers", "spilled B", "shared B", "matrix", "limits")
            table = _table(f"{operator}, {size}, {dtype}", *columns)
            for kernel, of_kernel in groupby(together, itemgetter("kernel")):
                for row in of_kernel:
                    figures = (f"{row[name]:,}" if name in row else "-" for name in COMPILED)
                    table.add_row(kernel, row["chip"], *figures, "✗" if row["faults"] else "ok")
                table.add_section()
            self.console.print(table)
        faults = [(row, fault) for row in rows for fault in row["faults"]]
        self._say(
            "registers: of a thread; shared: bytes of a program; matrix: instructions of the matrix units in its code. Limits:"
            f" triton_kernels/limits.py. Compiled by triton {found['versions']['triton']}: {len(rows)}, of which"
            f" {len({id(row) for row, _ in faults})} break a limit."
        )
        for row, fault in faults:
            self._say(f"✗ {row['operator']}, {row['size']}, {row['dtype']}: {fault}", "red")

    def _fallbacks(self, fallbacks: list[Json], whose: str = "") -> None:
        for fallback in fallbacks:
            self._say(f"{whose}plain PyTorch, not a kernel: {fallback['operator']}: {fallback['reason']}", "yellow")

    def _fewer(self, asked: int, counts: dict[str, int]) -> None:
        """Name what was timed less often than asked."""
        few = ", ".join(f"{name}: {count}" for name, count in counts.items() if count < asked)
        if few:
            over = f"{timing.BUDGET:.0f} s were over"
            self._say(f"timed less often than the {asked} times asked for, {over}: {few}", "yellow")

    def _say(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, markup=False)  # "dsfast[bench]" is no markup


def plain(found: Json) -> str:
    """A whole document as text, for a file."""
    text = io.StringIO()
    Reporter(Console(file=text, width=FILE_WIDTH, highlight=False)).show(found)
    return text.getvalue()


def _times(spread: Json) -> Iterable[str]:
    """Median and quartiles in milliseconds."""
    yield _milliseconds(spread["median"])
    yield f"{_milliseconds(spread['lower'])} .. {_milliseconds(spread['upper'])}"


def _milliseconds(seconds: float) -> str:
    """Three or more digits, none of them without meaning."""
    ms = seconds * 1e3
    return f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" if ms < 100 else f"{ms:,.0f}"


def _percent(recall: Json | None) -> str:
    return "-" if recall is None else _part(recall["fraction"])


def _calls(results: Json) -> str:
    """How near the calls that stand for the whole model came to its operators, where there are any."""
    furthest: dict[str, float] = {}
    for seed in results.get("seeds", []):
        for one in seed["one_calls"]:
            furthest[one["call"]] = max(one["apart"], furthest.get(one["call"], 0.0))
    return "".join(f", {call} within {apart:.1e} of them" for call, apart in furthest.items())


def _part(fraction: float | None) -> str:
    return "-" if fraction is None else f"{fraction:.1%}"


def _giga(number: float) -> str:
    """`number` in 10^9, with one decimal below 100."""
    return f"{number / 1e9:,.1f}" if number < 1e11 else f"{number / 1e9:,.0f}"


def _bar(value: float, longest: float) -> str:
    return "█" * max(1, round(BAR * value / longest)) if longest else ""


_WORDS = (
    "", "what", "variant", "operator", "implementation", "pass", "ms in bars", "kernel", "chip", "limits", "verdict",
)  # fmt: skip


def _table(title: str, *columns: str) -> Table:
    return make_table(title, *columns, right=set(columns) - set(_WORDS), folded=("what",))
