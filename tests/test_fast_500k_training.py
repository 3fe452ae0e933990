"""The specification's entry to the suite, and the suite from end to end as a test.

    python tests/test_fast_500k_training.py [--cpu-only] [--gpu-only] [--full-training] [--output-dir DIR] ...

is `python -m dsfast.suite` with the same flags. Under pytest the slow tests train for real.
"""

from __future__ import annotations

import json
import subprocess
import sys

from dsfast.command import run_command
from dsfast.suite.__main__ import main

if __name__ == "__main__":  # before pytest is imported: dsfast is installed without it
    sys.exit(run_command(main))

import pytest
import torch

from dsfast.data import load_prompts

# The specification's prompts and answers, by set and priority ("Test Prompts").
FAST = {
    "The atomic bombing of Hiroshima occurred in": "1945",
    "World War II ended in the year": "1945",
    "The first atomic bomb was dropped on": "Hiroshima",
}
FULL = {
    ("high", "The capital of France is"): "Paris",
    ("high", "The Earth orbits the"): "Sun",
    ("high", "Water is composed of hydrogen and"): "oxygen",
    ("high", "The first President of the United States was"): "George Washington",
    ("medium", "The speed of light is approximately"): "300000",
    ("medium", "DNA stands for"): "deoxyribonucleic acid",
    ("medium", "The largest planet in our solar system is"): "Jupiter",
    ("medium", "Albert Einstein developed the theory of"): "relativity",
    ("low", "The Battle of Waterloo took place in"): "1815",
    ("low", "Shakespeare wrote"): "Hamlet",
}


def test_the_prompts_are_the_specifications():
    prompts = load_prompts()
    assert {p.text: p.answer for p in prompts.fast} == FAST
    assert {(p.priority, p.text): p.answer for p in prompts.full} == FULL


# Runs this file as a program where pytest cannot be imported.
WITHOUT_PYTEST = """
import runpy, sys
sys.modules["pytest"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_this_file_is_the_suites_entry_without_pytest_too():
    command = [sys.executable, "-c", WITHOUT_PYTEST, __file__, "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    for flag in ("--cpu-only", "--gpu-only", "--full-training", "--output-dir", "--seed", "--config", "--prompts"):
        assert flag in shown


def run_suite(tmp_path, *flags: str) -> dict:
    assert run_command(main, [*flags, "--output-dir", str(tmp_path)]) == 0
    [path] = tmp_path.glob("*.json")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_fast_cpu_training(tmp_path):
    results = run_suite(tmp_path, "--cpu-only")
    assert results["tests"]["cpu"]["status"] == "passed"
    assert results["tests"]["gpu"]["status"] == "skipped"


@pytest.mark.slow
def test_full_training_on_the_cpu(tmp_path):
    results = run_suite(tmp_path, "--cpu-only", "--full-training")
    assert results["tests"]["full"]["status"] == "passed"


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fast_gpu_training(tmp_path):
    results = run_suite(tmp_path, "--gpu-only")
    assert results["tests"]["gpu"]["status"] == "passed"
