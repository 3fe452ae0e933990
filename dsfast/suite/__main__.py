"""`python -m dsfast.suite`: train the 500K model, verify it, question it, time it; write a results file.

Exit status: 0 all tests passed, 1 some failed, 2 it could not run, or a GPU or a file failed on the way.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from dsfast import info
from dsfast.command import CommandParser, run_command, whole_number
from dsfast.config import Config, default_config, load_config
from dsfast.data import PromptSets, load_prompts
from dsfast.errors import FileError, GpuError, UserError
from dsfast.files import check_output_folder, os_errors_as
from dsfast.model.gpu import gpu_errors_while
from dsfast.suite.phases import (
    DEVICE_NAMES,
    REMEDY,
    Plan,
    Session,
    compare,
    fast_plan,
    full_plan,
    line_of,
    run_test,
    set_up,
    skipped_test,
)
from dsfast.suite.report import Reporter
from dsfast.suite.results import SCHEMA_VERSION, write_results
from dsfast.suite.verdict import judge_comparison, verdict
from dsfast.train.run_folder import expect_utf8
from dsfast.train.runtime import prepare

DEVICES = {name: device for device, name in DEVICE_NAMES.items()}  # "cpu", "gpu" -> torch's names
TITLES = {"cpu": "Test 1: fast CPU training", "gpu": "Test 2: fast GPU training", "full": "Test 3: full training"}


def main(argv: list[str]) -> int:
    """Run the suite; 0 passed, 1 failed. Raises UserError where it cannot run, before anything is trained; and after the results
    are written FileError where another file could not be, as on a full disk, and GpuError where a GPU failed."""
    arguments = _parser().parse_args(argv)
    prompts = load_prompts(arguments.prompts)
    configs, skipped = choose_configs(arguments)
    folder = check_output_folder(arguments.output_dir, "--output-dir")
    expect_utf8(folder)
    plans = make_plans(configs, prompts, arguments.full_training)
    for plan in plans:  # a mistake in the second test's input must not come out after the first has trained
        with gpu_errors_while("setting up", REMEDY):
            set_up(Session(plan))
    if not arguments.full_training:
        skipped["full"] = "not asked for (--full-training)"
    reporter = Reporter()
    now = datetime.now()
    runs = _own_folder(folder / "runs" / f"suite_{now:%Y%m%d_%H%M%S}")
    path = None
    try:
        results = run(plans, skipped, runs, reporter, ["python", "-m", "dsfast.suite", *argv])
    except KeyboardInterrupt:
        _remove_empty(runs)
        raise
    try:
        path = write_results(folder, results, now)
    finally:
        reporter.summary(results, path)
    for kind, error in (("gpu_failed", GpuError), ("file_failed", FileError)):
        if line := next(filter(None, (line_of(test, kind) for test in results["tests"].values())), None):
            raise error(f"{line}; what was found until then is in {path}")
    return 0 if results["verdict"]["passed"] else 1


def _own_folder(path: Path) -> Path:
    """A new folder called `path`, or where there is one `path`_2, _3, ... Raises UserError where none can be made."""
    with os_errors_as(f"{path}: cannot be made"):
        for name in (path, *(path.with_name(f"{path.name}_{n}") for n in range(2, 1000))):
            try:
                name.mkdir(parents=True)
                return name
            except FileExistsError:
                continue
    raise UserError(f"{path}: cannot be made: there are a thousand of that name")


def _remove_empty(runs: Path) -> None:
    """Remove the folders where an interrupted suite has left nothing."""
    for folder in (runs, runs.parent):
        with suppress(OSError):  # it holds something
            folder.rmdir()


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m dsfast.suite", description=__doc__.split("\n")[0])
    device = parser.add_mutually_exclusive_group()
    device.add_argument("--cpu-only", action="store_true", help="run the CPU test alone")
    device.add_argument("--gpu-only", action="store_true", help="run the GPU test alone; there must be a GPU")
    parser.add_argument("--full-training", action="store_true", help="also train longer and ask all prompts (Test 3)")
    parser.add_path("--output-dir", metavar="DIR", default=".", help="where the results file goes (default: here)")
    parser.add_argument("--seed", metavar="N", type=whole_number, help="in place of the configs'")
    parser.add_path("--config", metavar="FILE", help="a config of your own; its runtime.device is the one tested")
    parser.add_path("--prompts", metavar="FILE", help="prompts of your own (format: docs/TESTS.md)")
    return parser


def choose_configs(arguments: Namespace) -> tuple[dict[str, Config], dict[str, str]]:
    """(test -> config of each fast test to run, test -> why it is skipped). Raises UserError if none is left."""
    given = load_config(arguments.config) if arguments.config else None
    skipped = {name: reason for name in DEVICES if (reason := _why_skipped(name, arguments, given))}
    if len(skipped) == len(DEVICES):
        raise UserError("nothing to run: " + "; ".join(f"{name}: {reason}" for name, reason in skipped.items()))
    configs = {name: given or default_config(name) for name in DEVICES if name not in skipped}
    if arguments.seed is not None:
        configs = {name: config.replace(where="--seed", seed=arguments.seed) for name, config in configs.items()}
    return configs, skipped


def _why_skipped(name: str, arguments: Namespace, given: Config | None) -> str | None:
    """Why the fast test called `name` ("cpu" or "gpu") is not run; None where it is."""
    if {"cpu": arguments.gpu_only, "gpu": arguments.cpu_only}[name]:
        return f"not asked for ({'--gpu-only' if name == 'cpu' else '--cpu-only'})"
    if given is not None and given.runtime.device != DEVICES[name]:
        return f"{arguments.config} has runtime.device {given.runtime.device!r}"
    if name == "gpu" and not torch.cuda.is_available():
        return "no CUDA device is available on this machine"
    if name == "gpu" and not arguments.gpu_only and given is None:
        return _why_unfit()
    return None


def _why_unfit() -> str | None:
    """Why the GPU that is here cannot run the shipped config, in which case the CPU's test goes on alone; None where it can."""
    try:
        prepare(default_config("gpu"))
    except UserError as error:
        return str(error)
    return None


def make_plans(configs: dict[str, Config], prompts: PromptSets, full_training: bool) -> list[Plan]:
    """The tests in the order they run. The full one takes the GPU where the GPU is tested, else the CPU."""
    plans = [fast_plan(config, prompts) for config in configs.values()]
    if full_training:
        plans.append(full_plan(configs.get("gpu") or configs["cpu"], prompts))
    return plans


def run(
    plans: list[Plan], skipped: dict[str, str], folder: Path, reporter: Reporter, command: list[str]
) -> dict[str, Any]:
    """Run the tests, each in `folder`/<its name>, and return the content of the results file."""
    started, created = time.perf_counter(), datetime.now().astimezone()
    environment = run_environment(reporter)
    tests = {name: skipped_test(TITLES[name], reason) for name, reason in skipped.items()}
    checks, errors = [], []
    for plan in plans:
        if plan.device == "gpu" and any(line_of(test, "gpu_failed") for test in tests.values()):
            tests[plan.name] = skipped_test(plan.title, "the GPU failed in the test before")
            continue
        tests[plan.name], found, wrong = run_test(plan, folder, reporter)
        checks += found
        errors += wrong
    comparison = compare(tests["cpu"], tests["gpu"])
    checks += judge_comparison(comparison)
    return {
        "schema_version": SCHEMA_VERSION,
        "created": created.isoformat(timespec="seconds"),
        "command": command,
        "seconds": time.perf_counter() - started,
        **environment,
        "caches": info.caches(),
        "tests": {name: tests[name] for name in TITLES},
        "comparison": comparison,
        "errors": errors,
        "verdict": verdict(tests, checks),
    }


def run_environment(reporter: Reporter) -> dict[str, Any]:
    """Where this runs: commit, machine, versions, the native build."""
    start = time.perf_counter()
    facts = info.collect()
    phase = {"name": "environment", "status": "passed", "seconds": time.perf_counter() - start}
    reporter.environment(facts)
    kept = {name: facts[name] for name in ("commit", "machine", "versions", "native")}
    return {**kept, "phases": [phase]}


if __name__ == "__main__":
    sys.exit(run_command(main))
