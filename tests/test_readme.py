"""What the documents show is run: the README's Python, every command and its flags, the examples of docs/TESTS.md."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dsfast import ops
from dsfast.cli import COMMANDS, dispatch
from dsfast.config import load_config
from dsfast.data import load_prompts
from dsfast.model import DeepseekV3, parameter_counts

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "docs/RUNNING.md", "docs/TESTS.md", "CONTRIBUTING.md", "benchmarks/README.md")
CONFIGS = sorted((ROOT / "configs").glob("*.json"))


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def fenced(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(document), re.DOTALL | re.MULTILINE)


def shown_commands() -> list[tuple[str, str]]:
    """(command and subcommand, the line it stands in) of every `python -m dsfast.X` in the documents."""
    found = []
    for document in DOCUMENTS:
        for line in text_of(document).splitlines():
            for command, word in re.findall(r"python3? -m dsfast\.([a-z]+)(?: ([a-z]+)\b)?", line):
                found.append((f"{command} {word}".strip(), line))
    return found


def run_python(folder: Path, code: str) -> subprocess.CompletedProcess:
    """Run code as if `folder` were the repository's; the tokenizer is cached there."""
    environment = {**os.environ, "DSFAST_CACHE": str(folder / "cache")}
    line = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_readme_python_runs_as_it_stands(tmp_path):
    """On the shipped config with two short rows a step and few articles; the block sets the steps itself."""
    [block] = fenced("README.md", "python")
    [path] = re.findall(r"configs/\w+\.json", block)
    values = json.loads(text_of(path))
    values["data"] |= {"sequence_length": 32, "max_articles": 20}
    values["train"] |= {"batch_size": 2}
    values["runtime"] |= {"threads": 1}
    (tmp_path / path).parent.mkdir()
    (tmp_path / path).write_text(json.dumps(values), encoding="utf-8")
    checks = """
assert list(logits.shape) == [*input_ids.shape, config.model.vocab_size] and logits.isfinite().all()
assert type(loss) is float and 8 < loss < 10, loss  # untrained: about log 8000
torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-6))
"""
    run = run_python(tmp_path, block + checks)
    assert run.returncode == 0, run.stderr
    assert re.search(r"step +\d+/\d+ ", run.stdout), "Trainer.train shows its steps"
    assert [folder.name for folder in (tmp_path / "runs" / "first").glob("step-*")] == ["step-000050"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_load_and_have_the_size_the_readme_says(path):
    config = load_config(path)
    counts = parameter_counts(DeepseekV3(config.model))
    assert config.name == path.stem
    assert f"{counts['total']:,} parameters" in text_of("README.md")
    whole, rest = config.model.vocab_size * config.model.hidden_size, counts["total"] - counts["embedding"]
    assert round(whole / rest) == 4
    assert "four times" in text_of("README.md")


@pytest.mark.parametrize(("command", "line"), shown_commands())
def test_commands_and_their_flags_exist(command, line, capsys):
    words = command.split()
    words = words[:2] if words[0] == "bench" else words[:1]
    with pytest.raises(SystemExit, match="0"):
        dispatch([*words, "--help"])
    usage = capsys.readouterr().out
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", line))
    assert flags <= set(re.findall(r"--[a-z][a-z-]*", usage)), usage


def test_readme_lists_every_command_of_dsfast():
    table = text_of("README.md").partition("\n## Commands\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `python -m dsfast\.([a-z]+)", table, re.MULTILINE)) == set(COMMANDS)


def test_readme_lists_every_operator():
    listed = re.search(r"The operators \(`dsfast.ops.<name>`\): ([\w,\s]+)\.", text_of("README.md"))[1]
    assert tuple(re.split(r",\s+", listed)) == ops.OPERATORS


@pytest.mark.parametrize("document", DOCUMENTS)
def test_shell_blocks_parse_and_make_knows_the_targets(document):
    for block in fenced(document, "bash"):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
        for target in re.findall(r"^make ([\w-]+)", block, re.MULTILINE):
            subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_why_did_it_fail_shows_the_newest_file(tmp_path):
    [block] = [block for block in fenced("docs/TESTS.md", "bash") if "python -c" in block]
    for day, failed in (("01", ["older"]), ("02", ["newest", "and more"])):
        path = tmp_path / f"test_results_fast_500k_202601{day}_120000.json"
        path.write_text(json.dumps({"verdict": {"failed": failed}}))
    shell = f'python() {{ "{sys.executable}" "$@"; }}\n{block}'
    run = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["newest", "and more"]


def test_the_example_of_a_prompts_file_loads(tmp_path):
    [block] = [block for block in fenced("docs/TESTS.md", "json") if '"fast"' in block]
    (tmp_path / "prompts.json").write_text(block, encoding="utf-8")
    prompts = load_prompts(tmp_path / "prompts.json")
    assert [prompt.answer for prompt in (*prompts.fast, *prompts.full)] == ["Paris", "Hamlet"]
