"""`python -m dsfast.bench <step|kernels|generate|growth|learning|against|compile|gpu|tiles>`: how fast dsfast is here, beside
peers timed in the same run; whether it learns what plain PyTorch learns, and what an earlier commit of it did; and what its GPU
kernels take of chips that are not here."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args, get_type_hints

import torch

from dsfast.bench import cases, results
from dsfast.bench.against.run import run_against, run_operators, wrong_numbers
from dsfast.bench.against.tree import resolve, tree_of
from dsfast.bench.compile import plan as plan_compile
from dsfast.bench.compile import run_compile
from dsfast.bench.generation import run_generate
from dsfast.bench.gpu.candidates import PARTS as TILED
from dsfast.bench.gpu.run import BUDGET, PARTS, check_gpu, choose_parts, run_gpu
from dsfast.bench.gpu.run import sound as gpu_is_sound
from dsfast.bench.gpu.tiles import GROUPS, check_can_try, choose_cases, run_tiles
from dsfast.bench.gpu.tiles import sound as tiles_are_sound
from dsfast.bench.growth import plan, run_growth
from dsfast.bench.kernels import run_kernels
from dsfast.bench.learning import run_learning
from dsfast.bench.memory import check_measurable
from dsfast.bench.report import Reporter, plain
from dsfast.bench.step import choose_peers, run_step
from dsfast.command import CommandParser, positive, run_command
from dsfast.config import Config, RuntimeConfig, default_config, load_config
from dsfast.data.sources import ENCYCLOPEDIA
from dsfast.errors import UserError
from dsfast.files import (
    Json,
    check_output_file,
    check_output_folder,
    for_one_run,
    os_errors_as,
    read_json,
    write_json,
    write_text,
)
from dsfast.info import ROOT
from dsfast.model import DeepseekV3
from dsfast.ops import triton
from dsfast.train import load_checkpoint
from dsfast.triton_kernels.limits import CHIPS

DTYPES = get_args(get_type_hints(RuntimeConfig)["dtype"])


def main(argv: list[str]) -> int:
    """Time (or compile), show, write; 0, or 1 where the results are not sound. Raises UserError before any timing."""
    arguments = _parser().parse_args(argv)
    if arguments.bench in ("gpu", "tiles"):
        return (_gpu if arguments.bench == "gpu" else _tiles)(arguments, argv)
    path = check_output_file(arguments.json, "--json") if arguments.json else None
    reporter = Reporter()
    settings, found = arguments.run(arguments, reporter)
    repeats = {} if arguments.repeats is None else {"repeats": arguments.repeats}
    written = results.document(argv, {"bench": arguments.bench, **repeats, **settings}, found)
    if path is not None:
        with os_errors_as(f"--json {path}: cannot be written"):
            write_json(path, written)
    reporter.show(written)
    return 0 if sound(found) else 1


def sound(found: Json) -> bool:
    """Whether everything that could run here ran, gave the right numbers, learnt as much, grew no faster than its work, is no
    worse than before, and keeps its limits."""
    states = [found.get("status"), *(peer["status"] for peer in found.get("peers", {}).values())]
    problems = [problem for case in found.get("cases", []) for problem in case["checks"].values()]
    wrong = [problem for problem in problems if problem and not problem.startswith("not available")]
    faster = any(row["grows_faster"] for rows in found.get("series", {}).values() for row in rows)
    faulty = any(row["faults"] for row in found.get("kernels", []))
    worse = found.get("problems") or found.get("wrong") or found.get("memory_failed")
    return not (wrong or faster or faulty or worse or {"failed", "wrong"} & set(states))


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m dsfast.bench", description=__doc__)
    commands = parser.add_subparsers(
        dest="bench", metavar="step|kernels|generate|growth|learning|against|compile|gpu|tiles", required=True
    )

    def command(name: str, run, purpose: str, repeats: int | None, timed: str = "pairs") -> CommandParser:
        sub = commands.add_parser(name, help=purpose, description=purpose)
        sub.set_defaults(run=run, repeats=repeats)
        if repeats is not None:
            sub.add_argument("--repeats", metavar="N", type=positive, help=f"timed {timed} (default {repeats})")
        sub.add_path("--json", metavar="FILE", help="write every figure, with machine, versions, commit and command")
        return sub

    step = command("step", _step, "one whole training step against peers, and split by operator", 20)
    step.add_path("--config", metavar="FILE", help="the model (default: the 500K model)")
    step.add_argument("--batch", metavar="B", type=positive, help="rows (default: train.batch_size)")
    step.add_argument("--length", metavar="T", type=positive, help="tokens of a row (default: data.sequence_length)")
    step.add_argument("--peers", metavar="A,B,...", type=_names, help="default: eager,compile,autocast,transformers")
    step.add_argument(
        "--dtype",
        choices=DTYPES,
        help="what dsfast computes in (default: the config's runtime.dtype)",
    )
    step.add_argument("--memory", action="store_true", help="also peak memory, each variant in a process of its own")
    kernels = command("kernels", _kernels, "operators, their implementations beside each other", 20)
    kernels.add_argument("operators", metavar="OP", nargs="*", help="default: all")
    kernels.add_argument("--size", choices=[*cases.SIZE_NAMES, "all"], default="500k", help="default: 500k")
    generate = command("generate", _generate, "tokens per second against transformers' generate", 5)
    generate.add_path("--checkpoint", metavar="DIR", help="default: the untrained 500K model")
    generate.add_argument("--batch", metavar="B,...", type=_positives, default=[1, 32], help="default: 1,32")
    generate.add_argument("--new-tokens", metavar="N", type=positive, default=64, help="default: 64")
    growth = command("growth", _growth, "whether the step's time grows faster than its work", 7, "rounds")
    growth.add_path("--config", metavar="FILE", help="the model (default: the 500K model)")
    growth.add_argument("--series", metavar="A,B,...", type=_names, help="default: batch,length,experts")
    _add_whole_runs(command)
    compiled = command("compile", _compile, "GPU kernels compiled without a GPU and held to each chip's limits", None)
    compiled.add_argument("operators", metavar="OP", nargs="*", help="default: all that have a Triton kernel")
    compiled.add_argument("--chip", metavar="CHIP", nargs="+", help=f"default: all, {', '.join(CHIPS)}")
    compiled.add_argument("--dtype", metavar="DTYPE", nargs="+", default=["bfloat16"], help="default: bfloat16")
    compiled.add_argument("--size", metavar="SIZE", nargs="+", help='default: all; for example "500K" DeepSeek-V3')
    _add_gpu(commands)
    return parser


def _add_whole_runs(command: Callable[..., CommandParser]) -> None:
    learning = command("learning", _learning, "the loss and recall of whole runs beside plain PyTorch in float32", None)
    learning.add_path("--config", metavar="FILE", help="the run (default: the 500K model's)")
    learning.add_argument("--seeds", metavar="N", type=positive, default=5, help="seeds 0 .. N - 1 (default 5)")
    against = command(
        "against", _against, "this tree beside a commit of it: whether it learns as much, and how fast", None
    )
    against.add_argument("revision", metavar="REVISION", nargs="?", default="HEAD", help="default: HEAD")
    against.add_argument("--operators", metavar="OP,...", type=_names, help="of a run these operators alone, or all")
    against.add_argument("--size", choices=cases.SIZE_NAMES, help="theirs (default: 500k)")
    against.add_path("--config", metavar="FILE", help="the run, of both (default: each tree's own of the 500K model)")
    against.add_argument("--steps", metavar="N", type=positive, help="default: train.steps")
    against.add_argument("--seeds", metavar="N", type=positive, help="seeds 0 .. N - 1 (default 1)")


def _add_gpu(commands) -> None:
    purpose = "everything on a GPU beside its peers, within 8 minutes: DIR/gpu.json, gpu.txt and gpu.log"
    gpu = commands.add_parser("gpu", help=purpose, description=purpose)
    gpu.add_argument("--only", metavar="PART,...", type=_names, help=f"of {','.join(PARTS)}; default: all but recall")
    purpose = "tiles near the shipped ones, on a GPU: what keeps the limits and is right, timed beside these"
    tiles = commands.add_parser("tiles", help=purpose, description=purpose)
    tiles.add_argument("parts", metavar="PART", nargs="*", help=", ".join(TILED))
    tiles.add_argument("--case", metavar="CASE", help=f"{' or '.join(GROUPS)} (default: both)")
    tiles.add_argument("--plan", action="store_true", help="only compile, for an H100: DIR/plan.json, .txt and .log")
    for command in (gpu, tiles):
        command.add_path("--out", metavar="DIR", required=True, help="where the results go: a folder without such ones")
        command.add_argument("--seconds", metavar="N", type=positive, default=BUDGET, help=f"default: {BUDGET}")
        command.add_argument(
            "--rehearse",
            action="store_true",
            help="tiny sizes in Triton's interpreter (set TRITON_INTERPRET=1), without a GPU and without a figure:"
            " DIR/rehearsal.json, .txt and .log",
        )


def _gpu(arguments: Namespace, argv: list[str]) -> int:
    parts = choose_parts(arguments.only)
    check_gpu(arguments.rehearse)
    run = partial(run_gpu, parts, arguments.seconds, arguments.rehearse)
    settings = {"parts": list(parts), "seconds": arguments.seconds, "rehearsal": arguments.rehearse}
    return 0 if gpu_is_sound(_into_folder(arguments, argv, settings, run)) else 1


def _tiles(arguments: Namespace, argv: list[str]) -> int:
    cases = choose_cases(arguments.parts, arguments.case, arguments.rehearse)
    check_can_try(arguments.rehearse, arguments.plan)
    run = partial(run_tiles, cases, arguments.seconds, arguments.rehearse, arguments.plan)
    settings = {
        "cases": cases, "seconds": arguments.seconds, "rehearsal": arguments.rehearse, "plan": arguments.plan
    }  # fmt: skip
    return 0 if tiles_are_sound(_into_folder(arguments, argv, settings, run)) else 1


def _into_folder(arguments: Namespace, argv: list[str], settings: Json, run: Callable[..., Json]) -> Json:
    """A whole command: what run(progress, keep) gives it to keep it writes into a folder, its table as well. Raises UserError for
    a folder that has such files, or gets them from another run."""
    folder = check_output_folder(arguments.out, "--out")
    reporter = Reporter()
    settings = {"bench": arguments.bench, **settings}
    name = "rehearsal" if arguments.rehearse else "plan" if settings.get("plan") else arguments.bench
    log = []

    def keep(found: Json, said: str) -> None:
        written = results.document(argv, settings, found)
        log.append(said)
        with os_errors_as(f"--out {folder}: cannot be written to"):
            write_json(folder / f"{name}.json", written)
            write_text(folder / f"{name}.txt", plain(written))
            write_text(folder / f"{name}.log", "".join(log))

    with os_errors_as(f"--out {folder}: cannot be written to"):
        folder.mkdir(parents=True, exist_ok=True)
    with for_one_run(folder):
        for file in (f"{name}.{kind}" for kind in ("json", "txt", "log")):
            if os.path.lexists(folder / file):
                raise UserError(f"--out {folder}: {file} is there already; expected a folder without one")
        triton.use_kernel_cache()  # else each part's process would say, in the log alone, that it cannot
        found = run(reporter.progress, keep)
    reporter.show(results.document(argv, settings, found))
    return found


def _step(arguments: Namespace, reporter: Reporter) -> tuple[Json, Json]:
    """(settings, results), as the others."""
    config = _config(arguments)
    if arguments.dtype:
        config = config.replace(**{"runtime.dtype": arguments.dtype})
    batch = arguments.batch or config.train.batch_size
    length = arguments.length or config.data.sequence_length
    peers = choose_peers(arguments.peers, config.model)
    if arguments.memory:
        check_measurable()
    settings = {"batch": batch, "length": length, **_named(config), "dtype": config.runtime.dtype}
    found = run_step(config, batch, length, arguments.repeats, peers, arguments.memory, reporter.progress)
    return settings, found


def _kernels(arguments: Namespace, reporter: Reporter) -> tuple[Json, Json]:
    names = cases.operators(arguments.operators)
    sizes = cases.SIZE_NAMES if arguments.size == "all" else [arguments.size]
    found = run_kernels(names, sizes, arguments.repeats, reporter.progress)
    return {"operators": names, "sizes": list(sizes)}, found


def _generate(arguments: Namespace, reporter: Reporter) -> tuple[Json, Json]:
    if arguments.checkpoint:
        model, _, config = load_checkpoint(arguments.checkpoint)
    else:
        config = default_config().replace(**{"model.zero_init_output": False})
        torch.manual_seed(config.seed)
        model = DeepseekV3(config.model)
    settings = {"batches": arguments.batch, "new_tokens": arguments.new_tokens, "model": config.to_dict()["model"]}
    return settings, run_generate(model, arguments.batch, arguments.new_tokens, arguments.repeats, reporter.progress)


def _growth(arguments: Namespace, reporter: Reporter) -> tuple[Json, Json]:
    config = _config(arguments)
    series = plan(config, arguments.series)
    return {"series": list(series), **_named(config)}, run_growth(series, arguments.repeats, reporter.progress)


def _learning(arguments: Namespace, reporter: Reporter) -> tuple[Json, Json]:
    config = _config(arguments)
    return {"seeds": arguments.seeds, **_named(config)}, run_learning(config, range(arguments.seeds), reporter.progress)


def _refuse_idle(arguments: Namespace) -> None:
    """Raise UserError for a flag of `against` that would change nothing, with --operators or without."""
    for name in ("steps", "seeds") if arguments.operators else ("size",):
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name} is {'for whole runs, without' if arguments.operators else 'of'} --operators")


def _against(arguments: Namespace, reporter: Reporter) -> tuple[Json, Json]:
    _refuse_idle(arguments)
    asked, size, seeds = arguments.operators, arguments.size or "500k", arguments.seeds or 1
    names = cases.operators([] if asked == ["all"] else asked) if asked else []
    commit, config = resolve(arguments.revision), _config(arguments)
    changes = {"train.steps": arguments.steps or config.train.steps}
    if names and config.runtime.device != "cpu":
        raise UserError(
            f"--operators are timed on the CPU; runtime.device is {config.runtime.device!r} in {arguments.config}"
        )
    if config.data.source != ENCYCLOPEDIA:
        changes["data.source"] = str(Path(config.data.source).absolute())  # the sides work in other folders
    reporter.progress(f"the sources of {commit[:12]}, and their kernels where they are others than here")
    trees = {"now": ROOT, "before": tree_of(commit)}
    own = Path("configs") / "deepseek_v3_test_run_cpu.json"
    configs = {side: Path(arguments.config or tree / own).absolute() for side, tree in trees.items()}
    settings = {
        "revision": arguments.revision, "commit": commit, "seeds": seeds, "changes": changes,
        "configs": {side: read_json(path) for side, path in configs.items()},
    }  # fmt: skip
    if names:
        settings |= {"operators": names, "size": size}
        found = run_operators(trees, configs, names, size, reporter.progress)
    else:
        found = run_against(trees, configs, changes, range(seeds), reporter.progress)
    return settings, found | {"wrong": wrong_numbers(config, found, reporter.progress)}


def _compile(arguments: Namespace, reporter: Reporter) -> tuple[Json, Json]:
    planned = plan_compile(arguments.operators, arguments.chip, arguments.dtype, arguments.size)
    names = ("operator", "size", "dtype", "chip")
    settings = {f"{name}s": list(dict.fromkeys(getattr(example, name) for example in planned)) for name in names}
    return settings, run_compile(planned, reporter.progress)


def _config(arguments: Namespace) -> Config:
    return load_config(arguments.config) if arguments.config else default_config()


def _named(config: Config) -> Json:
    """The config as it stands among the settings."""
    return {"config": config.to_dict(), "config_hash": config.hash()}


def _positives(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


if __name__ == "__main__":
    sys.exit(run_command(main))
