"""`bench against`: a small repository whose tree is held against a commit of it, as a user does; and what its figures say."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from math import inf, nan
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from dsfast.bench import __main__ as bench
from dsfast.bench.against import run, side, tree
from dsfast.bench.against.run import apart, learns_less, slower, too_good
from dsfast.command import run_command
from dsfast.errors import UserError
from dsfast.ops import native
from dsfast.train.metrics import relative_differences

ROOT = Path(__file__).parents[1]
FEW = 2
"""Processes of each side, where the command has `run.PROCESSES`."""
GPU = ROOT / "configs/deepseek_v3_test_run_gpu.json"


def git(repository: Path, *arguments: str) -> str:
    named = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    ran = subprocess.run(["git", *named, *arguments], cwd=repository, capture_output=True, text=True, check=True)
    return ran.stdout.strip()


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A repository with one commit, of the sources as they stand, and their C++ kernels beside it, built and not committed."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("dsfast", "triton_kernels", "configs", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    # Turns that other tests beside these disturb are not to be left out: which they are would be chance.
    change(folder, "dsfast/bench/against/run.py", "WAITED = 0.05\n", "WAITED = inf\n")
    # Each takes seconds to import what it times.
    change(
        folder, "dsfast/bench/against/run.py", "\nPROCESSES, PROCESS_TURNS = 6,", f"\nPROCESSES, PROCESS_TURNS = {FEW},"
    )
    (folder / ".gitignore").write_text("*.so\n__pycache__/\n", encoding="utf-8")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "before")
    return folder


@pytest.fixture
def repository(clone: Path):
    """The clone, whose changes are undone afterwards."""
    yield clone
    git(clone, "checkout", "--quiet", ".")


def change(repository: Path, file: str, old: str, new: str) -> None:
    text = (repository / file).read_text(encoding="utf-8")
    assert text.count(old) == 1, "the test changes a line that is no longer there"
    (repository / file).write_text(text.replace(old, new), encoding="utf-8")


def against(
    repository: Path, folder: Path, *arguments: str, text: str | None = None, context: int = 64
) -> tuple[subprocess.CompletedProcess, dict]:
    """The command in that repository, with a small run of random words or of `text`: how it ended, and the results it wrote."""
    config = tiny.write_text_run(folder, **{"model.max_position_embeddings": context, "train.steps": 8})
    if text is not None:
        (folder / "text.txt").write_text(text, encoding="utf-8")
    options = ("--config", str(config), "--json", "out.json")
    command = [sys.executable, "-m", "dsfast.bench", "against", *options, *arguments]
    environment = {**os.environ, "DSFAST_CACHE": str(folder / "cache")}
    ended = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=300)
    file = repository / "out.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.unlink(missing_ok=True)
    return ended, found


def test_the_same_code_gives_the_same_bits(repository: Path, tmp_path: Path):
    ended, found = against(repository, tmp_path, "HEAD", "--steps", "4", "--seeds", "2")
    assert found["results"]["wrong"] == []
    said = " ".join(ended.stdout.split())
    assert re.search(
        r"float64 as they have to be, train_step within \S+ of them, decode_step within \S+ of them\.", said
    )
    # Of a few steps of some milliseconds each the times may say anything.
    assert ended.returncode in (0, 1), ended.stderr
    settings, results = found["settings"], found["results"]
    assert settings["commit"] == git(repository, "rev-parse", "HEAD")
    assert settings["changes"]["data.source"] == str(tmp_path / "text.txt")
    assert [one["seed"] for one in results["seeds"]] == [0, 1]
    for one in results["seeds"]:
        assert one["now"]["losses"] == one["before"]["losses"]
        assert len(one["now"]["losses"]) == 4
        assert one["apart"] is None
        for name in ("now", "before"):
            assert one[name]["asked"] == 13
            assert one[name]["peak_memory_bytes"] > 1e8
            assert one[name]["fallbacks"] == []
    assert results["learnt"]["now"] == results["learnt"]["before"]
    assert not [problem for problem in results["problems"] if "times as fast" not in problem]
    assert set(results["timed"]) == {"a step", *run.GENERATED}
    assert results["timed"]["a step"]["first"]["count"] == 2 * (4 - 1)
    assert "the same bits at every step" in ended.stdout
    assert git(repository, "status", "--porcelain") == "", "the repository is left as it was"


def test_a_tree_that_is_slower_and_learns_less_is_named_and_1(repository: Path, tmp_path: Path):
    slower = "        started, train = perf_counter(), self.config.train\n"
    change(repository, "dsfast/train/loop.py", slower, slower + "        __import__('time').sleep(0.2)\n")
    change(
        repository,
        "dsfast/train/loop.py",
        "            self.optimizer.step(scale,",
        "            self.optimizer.step(0 * scale,",
    )
    ended, found = against(repository, tmp_path)
    assert ended.returncode == 1, ended.stderr
    results = found["results"]
    assert results["timed"]["a step"]["verdict"] == "slower"
    assert results["timed"]["a step"]["first"]["median"] > 0.2 > results["timed"]["a step"]["other"]["median"]
    [slow] = [problem for problem in results["problems"] if problem.startswith("a step: now 0.")]
    [learnt] = [problem for problem in results["problems"] if problem.startswith("the mean loss of the last steps is")]
    assert results["wrong"] == [], "that is no operator's fault"
    assert "as near to float64 as they have to be" in ended.stdout
    [one] = results["seeds"]
    assert one["apart"]["first_step"] == 2, "the first loss is that of the same first weights"
    assert one["now"]["losses"][0] == one["before"]["losses"][0]
    for problem in (slow, learnt):
        assert problem in " ".join(ended.stdout.split())


def test_generation_that_is_wrong_is_told_though_losses_have_the_same_bits(repository: Path, tmp_path: Path):
    step = "        chosen = self._run(self._step)\n"
    wrong = "        if self._longest > 20:\n            self._cache.latent[:, :, 19] = 0\n"
    change(repository, "dsfast/model/native_decode.py", step, wrong + step)
    ended, found = against(repository, tmp_path)
    assert ended.returncode == 1, ended.stderr
    assert "the same bits at every step" in ended.stdout
    [problem] = found["results"]["wrong"]
    assert re.fullmatch(r"decode_step: the logits \S+ from the operators', 1e-03 allowed", problem)
    assert f"✗ wrong: {problem}" in " ".join(ended.stdout.split())


def test_a_tree_that_breaks_is_named_and_what_it_said_is_shown(repository: Path, tmp_path: Path):
    change(
        repository,
        "dsfast/train/loop.py",
        "        self.steps_done += 1\n",
        "        raise ArithmeticError('a new bug')\n",
    )
    ended, found = against(repository, tmp_path)
    assert ended.returncode == 1
    assert "ArithmeticError: a new bug" in ended.stderr
    assert f"failed: {repository}: its run ended with status 1" in " ".join(ended.stdout.split())
    assert found["results"]["status"] == "failed"


def test_a_tree_whose_losses_become_no_numbers_is_named_and_1(repository: Path, tmp_path: Path):
    change(
        repository,
        "dsfast/train/loop.py",
        "        value = self.gradients(*self._inputs(batch))\n",
        "        value = self.gradients(*self._inputs(batch)) * math.nan\n",
    )
    ended, found = against(repository, tmp_path)
    assert (ended.returncode, ended.stderr) == (1, "")
    assert found["results"]["status"] == "failed"
    assert "steps in a row were not finite" in found["results"]["reason"]


def test_a_mistake_that_a_side_finds_is_one_line_and_2(repository: Path, tmp_path: Path):
    ended, found = against(repository, tmp_path, text="few words")
    assert ended.returncode == 2
    [line] = ended.stderr.splitlines()
    assert line.startswith(f"error: {repository}: model.vocab_size: expected a text rich enough for 300 tokens")
    assert found == {}


def test_a_prompt_that_does_not_fit_is_named_before_anything_is_trained(repository: Path, tmp_path: Path):
    train = "    def train_batch(self"
    change(repository, "dsfast/train/loop.py", train, "    def no_" + train.removeprefix("    def "))
    ended, found = against(repository, tmp_path, context=16)
    assert ended.returncode == 2
    [line] = ended.stderr.splitlines()
    assert line.startswith(f"error: {repository}: {tmp_path / 'config.json'}: prompt 'The ")
    assert line.endswith("at most 16 (max_position_embeddings)")
    assert found == {}


def test_an_operator_that_is_slower_and_gives_other_bits_is_named(repository: Path, tmp_path: Path):
    """Beside one that does not, and one that the commit did not have."""
    turned = '    raise_out_of_range("rope", "positions", bad, x.size(0), cos.size(0))\n'
    change(repository, "dsfast/ops/rope.py", turned, turned + "    y += 1e-3\n    __import__('time').sleep(0.02)\n")
    sizes = "SIZES: dict[str, dict[str, dict[str, int]]] = {\n"
    change(repository, "dsfast/bench/cases.py", sizes, sizes + "    'new_one': {},\n")
    ended, found = against(repository, tmp_path, "--operators", "rope,rms_norm,new_one")
    assert ended.returncode == 1, ended.stderr
    results = found["results"]
    assert results["bits"] == {"rope": "others", "rms_norm": "the same", "new_one": "not in the other tree"}
    forward, backward = "rope", "rope, forward and backward"
    assert set(results["timed"]) == {forward, backward, "rms_norm", "rms_norm, forward and backward"}
    assert len(results["timed"]["rms_norm"]["pairs"]) == FEW * (run.PROCESS_TURNS - 1)
    for name, least in ((forward, 0.02), (backward, 0.04)):
        assert results["timed"][name]["verdict"] == "slower"
        assert results["timed"][name]["first"]["median"] > least > results["timed"][name]["other"]["median"]
        assert any(problem.startswith(f"{name}: now 0.") for problem in results["problems"])
    assert "Bits of results and gradients: others: rope." in ended.stdout
    [wrong] = results["wrong"]
    assert re.match(r"rope, native, 500K: output: error 1\.00e-03, at most \d\.\d\de-0[67] is right$", wrong)
    assert f"✗ wrong: {wrong}" in ended.stdout


def test_a_kernel_that_is_wrong_is_named_whatever_the_model_learns(repository: Path, tmp_path: Path):
    """Of a run: a model may learn as well with it."""
    turned = '    raise_out_of_range("rope", "positions", bad, x.size(0), cos.size(0))\n'
    change(repository, "dsfast/ops/rope.py", turned, turned + "    y += 1e-3\n")
    ended, found = against(repository, tmp_path, "--steps", "2")
    assert ended.returncode == 1, ended.stderr
    [wrong] = found["results"]["wrong"]
    assert wrong.startswith("rope, native, 500K: output: error 1.00e-03")
    assert not [problem for problem in found["results"]["problems"] if "times as fast" not in problem]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["no-such"], "'no-such': expected a commit of this repository: a hash, a branch, a tag or the like of HEAD~1"),
        (["HEAD:dsfast"], "'HEAD:dsfast': expected a commit of this repository"),
        (["HEAD", "--operators", "rop"], "unknown operator 'rop'; known: adamw, embedding"),
        (["HEAD", "--operators", "rope", "--config", str(GPU)], "timed on the CPU; runtime.device is 'cuda' in "),
        (["HEAD", "--operators", "rope", "--steps", "5"], "--steps is for whole runs, without --operators"),
        (["HEAD", "--operators", "rope", "--seeds", "1"], "--seeds is for whole runs, without --operators"),
        (["HEAD", "--size", "5m"], "--size is of --operators"),
        (["HEAD", "--steps", "0"], "argument --steps: expected a whole number from 1 to 999999, got '0'"),
    ],
)
def test_bad_input_is_one_line_and_2(arguments, complaint, repository, capsys, monkeypatch):
    look_at(repository, monkeypatch)
    assert run_command(bench.main, ["against", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert complaint in line


def look_at(repository: Path, monkeypatch) -> None:
    """Have this process take `repository` for the one its code is from."""
    monkeypatch.setattr("dsfast.info.ROOT", repository)
    monkeypatch.setattr(tree, "ROOT", repository)


def test_what_is_no_clone_is_said(tmp_path: Path, monkeypatch):
    look_at(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=f"git finds no clone of it in {tmp_path}"):
        tree.resolve("HEAD")


class TestTree:
    @pytest.fixture(autouse=True)
    def here(self, repository: Path, tmp_path: Path, monkeypatch):
        look_at(repository, monkeypatch)
        monkeypatch.setenv("DSFAST_CACHE", str(tmp_path / "cache"))

    def test_the_kernels_of_the_same_sources_are_taken_and_a_tree_is_made_once(self, repository, monkeypatch):
        made = tree.tree_of(tree.resolve("HEAD"))
        [module] = made.glob("dsfast/_native*.so")
        assert module.read_bytes() == Path(native.module().__file__).read_bytes()
        assert (made / "csrc/gemm.h").read_bytes() == (repository / "csrc/gemm.h").read_bytes()
        assert (made / "dsfast/triton_kernels/rope.py").samefile(made / "triton_kernels/rope.py")
        monkeypatch.setattr(tree, "_unpack", None)
        assert tree.tree_of(tree.resolve("HEAD")) == made

    def test_without_kernels_here_there_are_none_there(self, monkeypatch):
        monkeypatch.setattr(native, "status", lambda: (None, "no compiler"))
        monkeypatch.setattr(native, "built", lambda: False)
        made = tree.tree_of(tree.resolve("HEAD"))
        assert list(made.glob("dsfast/_native*")) == []

    def test_kernels_older_than_their_sources_are_not_passed_over(self, tmp_path, monkeypatch):
        """Plain PyTorch would run beside the commit's kernels."""
        monkeypatch.setattr(native, "status", lambda: (None, "built from other sources"))
        with pytest.raises(UserError, match="built from other sources"):
            tree.tree_of(tree.resolve("HEAD"))
        assert not (tmp_path / "cache").exists()

    def test_another_process_may_have_made_it_meanwhile(self, tmp_path, monkeypatch):
        def add(made: Path, complaint: str) -> None:
            (made.parents[1] / f"{commit}.{tag}" / "there").mkdir(parents=True)

        commit, tag = tree.resolve("HEAD"), Path(native.module().__file__).stem.split(".", 1)[1]
        monkeypatch.setattr(tree, "_add_kernels", add)
        assert [path.name for path in tree.tree_of(commit).iterdir()] == ["there"]

    def test_what_is_under_way_ends_with_the_command(self, tmp_path, monkeypatch):
        """And what that has started."""
        begun = tmp_path / "begun"
        shell = f"sleep 60 & echo $! > {begun}; wait"

        def interrupt(child: subprocess.Popen):
            while not begun.exists() or not begun.read_text().strip():
                time.sleep(0.01)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(subprocess.Popen, "communicate", interrupt)
            with pytest.raises(KeyboardInterrupt):
                tree._run(["bash", "-c", shell], {})
        # A killed process may still be seen for a moment; unkilled it would sleep for a minute.
        deadline = time.monotonic() + 20
        while _runs(begun.read_text().strip()):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def test_a_failed_build_is_one_line_and_leaves_nothing(self, repository, tmp_path, monkeypatch):
        """pip finds no project there: it has neither pyproject.toml nor setup.py."""
        native.status()  # of this tree, before
        monkeypatch.setattr(native, "source_hash", lambda sources: "others")
        with pytest.raises(UserError, match=r"the C\+\+ kernels of commit [0-9a-f]{12} could not be built: ERROR: "):
            tree.tree_of(tree.resolve("HEAD"))
        assert list((tmp_path / "cache/trees").iterdir()) == []


def _runs(process: str) -> bool:
    """Whether there is such a process and it is not a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_gpus_turn_is_a_whole_run(tmp_path: Path):
    """Begun anew: on a GPU a turn of some steps would end with others launched ahead."""
    asked = side.Run(str(tiny.write_text_run(tmp_path)), {"train.steps": 3}, turn=1)
    for _ in range(2):
        asked.trainer.device = torch.device("cuda")
        whole = asked.train()
        assert len(whole["losses"]) == 3
        assert whole["seconds"] > 0
    stepwise = side.Run(str(tiny.write_text_run(tmp_path)), {"train.steps": 3}, turn=2)
    assert [*stepwise.train()["losses"], *stepwise.train()["losses"]] == whole["losses"]


def test_a_gpus_turn_has_the_seconds_of_one_of_its_steps(tmp_path: Path, monkeypatch):
    asked = side.Run(str(tiny.write_text_run(tmp_path)), {"train.steps": 3}, turn=1)
    asked.trainer.device = torch.device("cuda")
    whole = SimpleNamespace(losses=[3.0, 2.0, 1.0], seconds=6.0)
    monkeypatch.setattr(side.Trainer, "train", lambda self, quiet: whole)
    assert asked.train()["seconds"] == 2.0


class TrainedSide:
    """A side without a process, whose losses are 100, 99 in its first turn, then 98, 97 and so on."""

    def __init__(self):
        self.losses = iter(range(100, 0, -1))

    def ask(self, method: str, **arguments) -> dict:
        if method == "train":
            return {"losses": [next(self.losses), next(self.losses)], "seconds": 1.0, "waited": 0.0}
        if method == "save":
            Path(arguments["folder"]).mkdir()
            return {"peak_memory_bytes": 7, "fallbacks": []}
        if method == "answers":
            answers = {"exact": 2, "probes": [{}] * 5, "recall": {"taught": {"fraction": 0.5}}}
            Path(arguments["file"]).write_text(json.dumps(answers), encoding="utf-8")
        return {"calls": []} if method == "one_calls" else {"seconds": 1.0, "waited": 0.0}


@pytest.mark.parametrize(
    ("device", "losses"),
    [("cpu", [*range(100, 70, -1)]), ("cuda", [102 - 2 * run.GPU_TURNS, 101 - 2 * run.GPU_TURNS])],
)
def test_the_losses_are_those_of_all_turns_or_of_a_gpus_last(device, losses, monkeypatch):
    """Of 30 steps, two a turn on a CPU; a turn on a GPU has trained anew."""

    @contextmanager
    def both_sides(trees, runs):
        yield {name: TrainedSide() for name in run.SIDES}, {name: {"device": device} for name in run.SIDES}

    monkeypatch.setattr(run, "both_sides", both_sides)
    changes = {"seed": 4, "train.steps": 30}
    found = run._one_seed({}, dict.fromkeys(run.SIDES, "config.json"), changes, lambda text: None)
    assert found["now"]["losses"] == found["before"]["losses"] == losses
    assert (found["seed"], found["apart"]) == (4, None)


def test_what_is_kept_of_a_side_is_its_last_loss_the_mean_of_ten_and_its_answers(tmp_path: Path):
    losses = [float(20 - step) for step in range(20)]
    found = run._known(TrainedSide(), tmp_path / "now", losses)
    expected = {"loss": 1.0, "mean_loss": 5.5, "exact": 2, "asked": 5, "recall": {"taught": {"fraction": 0.5}}}
    assert found == expected | {"losses": losses, "peak_memory_bytes": 7, "fallbacks": []}


def test_what_is_learnt_is_the_mean_over_the_seeds():
    def of_seed(mean_loss: float, exact: int, taught: float) -> dict:
        recall = {"taught": {"fraction": taught}, "heldout": None}
        return {"mean_loss": mean_loss, "exact": exact, "recall": recall}

    found = run._means([of_seed(1.0, 2, 0.25), of_seed(2.0, 5, 0.75)])
    assert found == {"mean_loss": 1.5, "exact": 3.5, "recall": {"taught": 0.5, "heldout": None}}


@pytest.mark.parametrize(("drawn", "said"), [(1.0, "the same"), (2.0, "of other inputs")])
def test_results_of_other_inputs_say_nothing(drawn, said, monkeypatch):
    """Of a tree that draws 1.0 and one that draws another number of the same sign."""
    case, numbers = SimpleNamespace(function=torch.sign, differentiable=()), iter([1.0, drawn])
    bench_case = SimpleNamespace(case=case, backward=None)
    monkeypatch.setattr(side, "_case", lambda name, size: (bench_case, (torch.tensor([next(numbers)]),)))
    asked = SimpleNamespace(trainer=SimpleNamespace(kernels=nullcontext))

    def ask(method: str, **arguments) -> dict:
        return side.Run.bits(asked, **arguments) if method == "bits" else {"seconds": 1.0, "waited": 0.0}

    assert run._operator({name: SimpleNamespace(ask=ask) for name in run.SIDES}, "sign", "500k")[0] == said


def test_each_side_always_follows_the_other():
    order = []

    class Asked:
        def __init__(self, name):
            self.ask = lambda method: order.append(name) or {"seconds": len(order), "waited": 1 / len(order)}

    turns = run._turns({name: Asked(name) for name in run.SIDES}, 3, "train")
    assert order == ["now", "before"] * 3
    assert run._pairs(turns) == [(3, 4, 1 / 3), (5, 6, 1 / 5)]
    assert run._pairs(turns[:1]) == [(1, 2, 1)]


def test_a_pair_has_the_wait_of_the_side_that_waited_more():
    turns = [{name: {"seconds": 1.0, "waited": waited[name]} for name in run.SIDES} for waited in
             ({"now": 0.5, "before": 0.5}, {"now": 0.3, "before": 0.1}, {"now": 0.1, "before": 0.2})]  # fmt: skip
    assert [pair.waited for pair in run._pairs(turns)] == [0.3, 0.2]


def pairs(count: int, ratio: float, waited: float = 0.0) -> list[run.Pair]:
    return [run.Pair(1.0, ratio, waited)] * count


def test_a_verdict_needs_the_median_on_one_side():
    def verdict(*ratios: float) -> str:
        return run._compared([[run.Pair(2.0, 2.0 * ratio, 0.0) for ratio in ratios]])["verdict"]

    assert verdict(1.1, 1.2, 1.3, 1.2, 1.01, 1.1) == "faster"
    assert verdict(0.9, 0.8, 0.7, 0.8, 0.99, 0.9) == "slower"
    assert verdict(1.1, 1.2, 1.3, 1.2, 0.99, 1.1) == "unclear"
    assert verdict(1.1, 1.1, 1.14, 1.1, 0.99, 1.1) == verdict(0.86, 0.9, 0.9, 0.9, 0.9, 1.01) == "as fast"
    assert verdict(1, 1, 1, 1, 1, 1.16) == verdict(1, 1, 1, 1, 1, 0.84) == "unclear"
    assert verdict(1.01, 1.02, 1.03, 1.04, 1.05, 1.03) == verdict(*[0.97] * 6) == "as fast"
    assert verdict(1.1, 1.2, 1.3, 1.2, 1.3) == "too few turns"
    assert run._compared([[run.Pair(2.0, 3.0, 0.0)]])["median_of_ratios"] == 1.5


def test_a_change_is_more_than_what_processes_lie_apart():
    def verdict(*medians: float) -> str:
        found = run._compared([pairs(4, ratio) for ratio in medians])
        assert found["processes_apart"] == max(medians) - min(medians)
        return found["verdict"]

    assert verdict(2.0, 2.0) == verdict(1.1, 1.11, 1.12, 1.1, 1.09, 1.1) == "faster"
    assert verdict(1.19, 1.2, 1.2, 1.2, 1.2, 1.58) == "faster"
    assert verdict(1.19, 1.2, 1.2, 1.2, 1.2, 1.60) == "unclear"
    assert verdict(0.81, 0.8, 0.8, 0.8, 0.8, 0.43) == "slower"
    assert verdict(0.81, 0.8, 0.8, 0.8, 0.8, 0.40) == "unclear"
    assert verdict(1.06, 1.06, 1.12) == verdict(1.08, 1.1, 1.12, 1.1, 1.02, 1.23) == "as fast"  # of none more than WIDE
    assert verdict(1.1, 1.1, 1.17) == "faster"
    assert verdict(2.0, 2.0, 0.5) == "unclear"


def test_pairs_that_waited_are_left_out():
    """They stay in the file. WAITED itself is not too much, and half of them is enough."""
    for quiet, disturbed in ((10, 4), (6, 6)):
        found = run._compared([pairs(quiet, 2.0, run.WAITED) + pairs(disturbed, 0.1, run.WAITED + 1e-6)])
        assert (found["verdict"], found["median_of_ratios"], found["interval"]) == ("faster", 2.0, (2.0, 2.0))
        assert (found["left_out"], len(found["pairs"])) == (disturbed, quiet + disturbed)
        assert found["first"]["count"] == found["other"]["count"] == quiet


@pytest.mark.parametrize("ratio", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("processes", [[(6, 7)], [(0, 20)], [(8, 0), (3, 5)], [(8, 0), (8, 0), (0, 1)]])
def test_what_mostly_waited_is_unclear_whatever_it_says(processes, ratio):
    """And of all pairs. One process is enough, as each has to say the same."""
    found = run._compared([pairs(quiet, ratio) + pairs(disturbed, ratio, 1.0) for quiet, disturbed in processes])
    assert (found["verdict"], found["median_of_ratios"]) == ("unclear", ratio)
    assert found["left_out"] == sum(disturbed for _, disturbed in processes)
    assert found["first"]["count"] == sum(map(sum, processes))


@pytest.mark.parametrize(("quiet", "disturbed"), [(5, 4), (0, 5), (1, 0)])
def test_too_few_turns_are_too_few_however_many_are_left_out(quiet, disturbed):
    assert run._compared([pairs(quiet, 2.0) + pairs(disturbed, 2.0, 1.0)])["verdict"] == "too few turns"


def test_what_is_left_out_is_said(repository: Path, tmp_path: Path):
    change(repository, "dsfast/bench/against/run.py", "WAITED = inf\n", "WAITED = -1\n")
    ended, found = against(repository, tmp_path, "--steps", "2")
    timed, count = found["results"]["timed"], FEW * (run.PROCESS_TURNS - 1)
    assert {name: (one["verdict"], one["left_out"]) for name, one in timed.items()} == {
        "a step": ("too few turns", 1), "one sequence": ("unclear", count), "32 sequences": ("unclear", count),
    }  # fmt: skip
    for one in timed.values():
        assert one["first"]["count"] == len(one["pairs"]) == one["left_out"]
        assert all(waited >= 0 for _, _, waited in one["pairs"])
    each = f"a step: 1 of 1, one sequence: {count} of {count}, 32 sequences: {count} of {count}."
    said = " ".join(ended.stdout.split())
    assert f"Pairs of turns left out, as other work took the processors: {each}" in said


def test_a_side_says_how_long_it_waited_for_a_processor(tmp_path: Path, monkeypatch):
    """On one processor with another that always works it gets half of it; what else this machine does may take of that."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    asked = run.Side(ROOT)
    try:
        asked.ask("ready", config=str(tiny.write_text_run(tmp_path)), changes={"train.steps": 99_999}, turn=500)
        asked.ask("train")
        deadline = time.monotonic() + 60
        while asked.ask("train")["waited"] > 0.05:
            if time.monotonic() > deadline:
                pytest.skip("other work leaves no processor free for a moment, so how long a side waits is not its own")
        command = [sys.executable, "-c", "while True: pass"]
        with subprocess.Popen(command, start_new_session=True) as busy:  # Linux shares out among sessions first
            for thread in (busy.pid, *map(int, os.listdir(f"/proc/{asked._child.pid}/task"))):
                os.sched_setaffinity(thread, {min(os.sched_getaffinity(0))})
            waited = [asked.ask("train")["waited"] for _ in range(5)]
            busy.kill()
    finally:
        asked.end()
    assert 0.2 < sorted(waited)[2] < 0.8, waited


class Tasks:
    """A /proc/self/task: thread -> nanoseconds waited; None: a thread without that file."""

    def __init__(self, folder: Path, monkeypatch):
        self.folder = folder
        monkeypatch.setattr(side, "Path", lambda path: folder if path == "/proc/self/task" else Path(path))

    def become(self, **waits: int | None) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        for thread, waited in waits.items():
            (self.folder / thread).mkdir(parents=True)
            if waited is not None:
                (self.folder / thread / "schedstat").write_text(f"987654321 {waited} 12\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("before", "after", "seconds"),
    [
        ({"a": 7_000_000, "b": 50_000_000}, {"a": 107_000_000, "b": 60_000_000}, 0.1),
        ({"a": 7_000_000, "ended": 999_000_000}, {"a": 37_000_000}, 0.03),
        ({"a": 7_000_000}, {"a": 7_000_000, "begun": 40_000_000}, 0.04),
        ({"a": 7_000_000}, {"a": 12_000_000}, 0.0),  # within PLACING
        ({"a": None}, {"a": None}, 0.0),
        ({}, {}, 0.0),  # nor is there a /proc
    ],
)
def test_the_thread_that_waited_longest_counts(before, after, seconds, tmp_path, monkeypatch):
    """Of a turn of four seconds."""
    tasks = Tasks(tmp_path / "task", monkeypatch)
    monkeypatch.setattr(side, "perf_counter", iter((10.0, 14.0)).__next__)
    tasks.become(**before)

    @side._turn
    def turn(answer: int, *, other: int) -> dict:
        tasks.become(**after)
        return {"seconds": answer + other}

    found = turn(1, other=2)
    assert found == {"seconds": 3, "waited": pytest.approx(max(seconds - side.PLACING, 0) / 4)}


def test_all_that_is_timed_says_how_long_it_waited(tmp_path: Path):
    asked = side.Run(str(tiny.write_text_run(tmp_path)), {"train.steps": 3}, turn=1)
    operator = {"name": "rms_norm", "size": "500k", "backward": False}
    for answer in (asked.train(), asked.generate(batch=1, tokens=2), asked.operator(**operator)):
        assert answer["seconds"] > 0
        assert answer["waited"] >= 0  # above 1 where other work had held a thread up since before


@pytest.mark.parametrize(("count", "rank"), [(6, 1), (8, 1), (9, 2), (19, 5), (95, 38)])
def test_the_interval_of_a_median_is_that_of_the_sign_test(count, rank):
    """Ranks of tables of the binomial distribution; below, by drawing."""
    samples = [float(number) for number in range(1, count + 1)]
    assert run.median_interval(samples[::-1]) == (rank, count + 1 - rank)
    assert run.median_interval(samples[:5]) is None
    draws = np.random.default_rng(0).exponential(size=(4000, count))
    held = [low <= np.log(2) <= high for low, high in map(run.median_interval, draws)]
    assert np.mean(held) > 0.94


def test_losses_part_where_the_first_bit_differs():
    assert apart([3.0, 2.0, 1.0], [3.0, 2.0, 1.0]) is None
    assert apart([3.0, 2.0, 1.5, 1.0], [3.0, 2.5, 1.0, 1.0]) == {"first_step": 2, "largest": 0.5, "at_step": 3}


def test_a_loss_below_the_other_is_as_far_away_as_one_above():
    assert relative_differences([3.0, 5.0], [4.0, 4.0]) == [0.25, 0.25]
    assert apart([1.0, 1.0], [1.0, 2.0]) == {"first_step": 2, "largest": 0.5, "at_step": 2}


def test_losses_that_are_no_numbers_are_the_same_only_as_each_other():
    assert apart([nan, inf, 0.0], [nan, inf, 0.0]) is None
    for ours, theirs in ((1.0, nan), (nan, 1.0), (inf, 1.0), (1.0, 0.0)):
        assert apart([1.0, ours], [1.0, theirs]) == {"first_step": 2, "largest": inf, "at_step": 2}


def test_a_slow_operator_has_fewer_turns(monkeypatch):
    monkeypatch.setattr(run, "perf_counter", iter(range(0, 1000, 10)).__next__)
    sides = {name: SimpleNamespace(ask=lambda method: {}) for name in run.SIDES}
    assert [len(run._turns(sides, 20, "operator", budget)) for budget in (0, 45, 1e9)] == [3, 7, 20]


def learnt(mean_loss: float = 1.0, taught: float | None = 0.95) -> dict:
    return {"mean_loss": mean_loss, "exact": 3, "recall": {"taught": taught, "heldout": None}}


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (learnt(), []),
        (learnt(1.0199, 0.901), []),
        (learnt(0.5, 0.99), []),
        (learnt(taught=None), []),
        (learnt(1.021), ["the mean loss of the last steps is 1.0210 and was 1.0000"]),
        (learnt(nan), ["the mean loss of the last steps is nan and was 1.0000"]),
        (learnt(1.0, 0.89), ["recall in taught phrasings is 89.0% and was 95.0%"]),
    ],
)
def test_what_is_worse_than_roundings_make_it_is_a_problem(now, expected):
    assert learns_less({"now": now, "before": learnt()}) == expected
    assert learns_less({"now": now, "before": learnt(nan, None)}) == []


@pytest.mark.parametrize(("loss", "doubted"), [(0.51, False), (0.49, True), (0.0004, True), (nan, False), (1.0, False)])
def test_what_is_too_good_is_doubted(loss, doubted):
    found = too_good({"now": learnt(loss), "before": learnt()})
    assert [text.endswith("can labels be read off the input?") for text in found] == [True] * doubted


@pytest.mark.parametrize(("ratio", "verdict", "named"), [(0.93, "slower", 1), (0.95, "slower", 0), (0.9, "as fast", 0)])
def test_what_is_slower_by_little_or_within_the_noise_is_none(ratio, verdict, named):
    timed = {"a step": {"verdict": verdict, "median_of_ratios": ratio}}
    assert len(slower(timed)) == named
