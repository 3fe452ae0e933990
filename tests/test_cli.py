"""The commands: dispatch, one line and status 2 for a user's mistake, nothing half-written."""

from __future__ import annotations

import importlib
import json
import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsfast import cli, info
from dsfast.command import CommandParser, number, positive, run_command, whole_number
from dsfast.errors import UserError

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "deepseek_v3_test_run_cpu.json"


def run(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess:
    """`python -m dsfast...` (or `python -c code`) in a process of its own, without a GPU."""
    command = [sys.executable, *(["-c", code] if code else ["-m"]), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def one_line(result: subprocess.CompletedProcess) -> str:
    """The complaint of a run that must have ended with status 2, one line on stderr and nothing on stdout."""
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    return line


def test_every_command_has_a_main():
    for module, _ in cli.COMMANDS.values():
        assert callable(importlib.import_module(module).main)


def test_the_commands_are_those_promised():
    assert set(cli.COMMANDS) == {"suite", "train", "generate", "evaluate", "export", "bench", "info"}


SWALLOWS = """
import os, signal, sys, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)
except KeyboardInterrupt:
    pass
os.write(1, b"went on")
os._exit(0)
"""
STARTS = {
    "a command": (["-m", "dsfast", "info"], True),
    "a command's own module": (["-m", "dsfast.train", "--config", "absent"], True),
    "the script": (["bin/dsfast", "info"], True),
    "a program": (["program.py", "-m", "dsfast"], False),
    "a line": (["-c", "import dsfast", "-m", "dsfast"], False),
    "a package": (["-m", "package.dsfast", "-m", "dsfast"], False),
    "a command that ignores it": (["-m", "dsfast", "info"], None),
}


@pytest.mark.parametrize(("arguments", "ends"), STARTS.values(), ids=STARTS)
def test_ctrl_c_ends_a_command_that_is_still_importing(arguments, ends, tmp_path):
    """A torch that is interrupted and swallows that stands in for the real one. Programs that import dsfast are left alone."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "package").mkdir()
    (tmp_path / "torch.py").write_text(SWALLOWS)
    for program in ("bin/dsfast", "program.py", "package/__init__.py"):
        (tmp_path / program).write_text("from dsfast.cli import main")
    (tmp_path / "package" / "dsfast.py").touch()
    ignored = (lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if ends is None else None
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    ways = {"cwd": tmp_path, "env": environment, "preexec_fn": ignored, "timeout": 60}
    child = subprocess.run([sys.executable, *arguments], capture_output=True, **ways)
    expected = (-signal.SIGINT, b"", b"") if ends else (0, b"went on", b"")
    assert (child.returncode, child.stdout, child.stderr) == expected


def test_a_command_that_is_imported_has_pythons_way_with_ctrl_c():
    """So that a run finishes its step, and anything else says that it was interrupted."""
    code = "import sys, signal; sys.argv, sys.orig_argv = ['-m'], ['python', '-m', 'dsfast.info']; import dsfast;"
    child = run(code=code + "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)")
    assert (child.returncode, child.stdout) == (0, "True\n")


def test_run_command_gives_the_mains_status():
    assert run_command(lambda argv: len(argv), ["a", "b", "c"]) == 3
    assert run_command(lambda argv: None, []) == 0


def test_a_user_error_is_one_line_and_2(capsys):
    def main(argv):
        raise UserError("a line\nand another")

    assert run_command(main, []) == 2
    assert capsys.readouterr().err == "error: a line and another\n"


@pytest.mark.parametrize(("attributes", "code"), [({}, 130), ({"exit_code": 143}, 143)])
def test_an_interrupt_is_128_plus_the_signal(attributes, code, capsys):
    def main(argv):
        interrupt = KeyboardInterrupt("saved as x")
        vars(interrupt).update(attributes)
        raise interrupt

    assert run_command(main, []) == code
    assert capsys.readouterr().err == "saved as x\n"


@pytest.mark.parametrize("lines", [1, 100_000], ids=["at the end", "before"])
def test_the_work_outlasts_a_reader_of_the_output(lines, tmp_path):
    code = f"""
import sys
from pathlib import Path
from rich.console import Console
from dsfast.command import run_command

def main(argv):
    print("x\\n" * {lines})
    Console().print("y\\n" * {lines})
    Path("done").touch()

sys.exit(run_command(main))
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    writer = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, **pipes)
    writer.stdout.close()
    assert writer.stderr.read() == b""
    assert writer.wait() == 141
    assert (tmp_path / "done").exists()


def test_an_output_that_is_to_be_unbuffered_is():
    code = (
        "import sys; from dsfast.command import run_command; run_command(lambda argv: (print('x'), sys.stdin.read(1)))"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": {**os.environ, "PYTHONUNBUFFERED": "1"}}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as writer:
        ready, _, _ = select.select([writer.stdout], [], [], 30)
        writer.communicate(b"\n")
    assert ready


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_the_work_outlasts_a_reader_of_both_outputs(unbuffered, tmp_path):
    code = """
import sys
from pathlib import Path
from dsfast.command import run_command

def main(argv):
    print("x", file=sys.stderr)
    Path("done").touch()

sys.exit(run_command(main))
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    writer = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment, **pipes)
    writer.stdout.close()
    assert writer.wait() == 141
    assert (tmp_path / "done").exists()


def test_a_warning_is_one_line():
    main = "lambda argv: __import__('warnings').warn('a line\\nand another')"
    code = f"import sys; from dsfast.command import run_command; sys.exit(run_command({main}, []))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (child.returncode, child.stderr) == (0, "warning: a line and another\n")


def test_an_output_that_is_closed_is_none():
    closed = f"{sys.executable} -c 'from dsfast.command import run_command as run; import sys; sys.exit(run(print, [1]))' >&-"
    child = subprocess.run(closed, shell=True, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (child.returncode, child.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("main", "said"),
    [
        ("lambda a: print('x' * 10**5)", "error: standard output cannot be written: No space left on device"),
        ("lambda a: print('x')", "error: standard output cannot be written: No space left on device"),
        ("lambda a: (print('x'), CommandParser().parse_args(['--no']))", "unrecognized arguments: --no"),
        (
            "lambda a: CommandParser().parse_args(['--help'])",
            "error: standard output cannot be written: No space left on device",
        ),
    ],
)
def test_an_output_that_takes_no_more_is_one_line_and_2(main, said):
    code = f"from dsfast.command import *; import sys; sys.exit(run_command({main}, []))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    streams = {"stderr": subprocess.PIPE, "text": True}
    with open("/dev/full", "w") as full:
        child = subprocess.run([sys.executable, "-c", code], stdout=full, cwd=ROOT, env=environment, **streams)
    [line] = child.stderr.splitlines()
    assert child.returncode == 2
    assert said in line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_the_work_outlasts_an_output_that_takes_no_more(tmp_path):
    code = """
import sys
from pathlib import Path
from dsfast.command import run_command

def main(argv):
    print("x" * 10**5, flush=True)
    print("y" * 10**5, flush=True)
    Path("done").touch()

sys.exit(run_command(main))
"""
    with open("/dev/full", "w") as full:
        child = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )
    assert child.returncode == 2
    assert child.stderr == (
        "error: standard output cannot be written: No space left on device; what it did not take is lost, all else is done\n"
    )
    assert (tmp_path / "done").exists()


def test_an_output_that_cannot_be_written_at_all_is_one_line_and_2():
    code = "import sys; from dsfast.command import run_command as run; sys.exit(run(lambda a: print('x'), []))"
    streams = {"stderr": subprocess.PIPE, "text": True}
    with open(os.devnull) as readable:
        child = subprocess.run([sys.executable, "-c", code], stdout=readable, cwd=ROOT, **streams)
    assert child.returncode == 2
    assert re.fullmatch(r"error: standard output cannot be written: Bad file descriptor; .*\n", child.stderr)


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/stderr", "log.txt", "link"])
def test_a_file_that_takes_what_is_printed_is_no_output_file(name, tmp_path):
    log = tmp_path / "log.txt"
    (tmp_path / "link").symlink_to(log)
    command = [sys.executable, "-m", "dsfast", "evaluate", "--checkpoint", "absent", "--json", name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("w") as out:
        child = subprocess.run(command, stdout=out, stderr=out, timeout=60, cwd=tmp_path, env=environment)
    expected = f"error: --json {name}: expected another file than the one that takes what is printed\n"
    assert (child.returncode, log.read_text()) == (2, expected)


@pytest.mark.parametrize(
    ("streams", "status"), [("> log.txt", 1), ("2> log.txt", 1), ("> other.txt", 0), (">&-", 0), ("2>&- >&-", 0)]
)
def test_an_output_file_is_compared_with_each_stream_that_is_open(streams, status, tmp_path):
    (tmp_path / "log.txt").write_text("before")
    code = "from dsfast.files import check_output_file as check; check('log.txt', '--json'), check('new.txt', '--json')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = f'"{sys.executable}" -c "{code}" {streams}'
    assert subprocess.run(command, shell=True, timeout=60, cwd=tmp_path, env=environment).returncode == status


def test_text_that_the_output_cannot_hold_is_written_as_escapes():
    code = "from dsfast.command import run_command as run; import sys; sys.exit(run(lambda a: print('\u00e9'), []))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", code]
    child = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, env=environment)
    assert (child.returncode, child.stdout, child.stderr) == (0, "\\xe9\n", "")


def test_too_little_memory_is_one_line_and_2(capsys):
    def main(argv):
        torch.empty(2**60)

    assert run_command(main, []) == 2
    assert re.match(
        r"error: out of memory; a smaller model, batch or text takes less \(.*can't allocate memory",
        capsys.readouterr().err,
    )


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda argv: 1 / 0, [])


def test_the_parser_complains_in_one_line():
    parser = CommandParser(prog="p")
    parser.add_argument("--seed", type=whole_number)
    parser.add_argument("--rate", type=number)
    parser.add_argument("--steps", type=positive)
    given = parser.parse_args(["--seed", "-7", "--rate", "1e-3", "--steps", "010"])
    assert (given.seed, given.rate, given.steps) == (-7, 1e-3, 10)
    for arguments, complaint in (
        (["--seed", "x"], "argument --seed: expected a whole number of up to 20 digits, got 'x'"),
        (["--seed", "1.5"], "argument --seed: expected a whole number of up to 20 digits, got '1.5'"),
        (["--rate", "hot"], "argument --rate: expected a number, got 'hot'"),
        (["--steps", "0"], "argument --steps: expected a whole number from 1 to 999999, got '0'"),
    ):
        with pytest.raises(UserError, match=f"^p: {complaint} "):
            parser.parse_args(arguments)


def test_dispatch_hands_on_the_arguments(monkeypatch):
    seen = []
    monkeypatch.setattr(importlib.import_module("dsfast.info"), "main", lambda argv: seen.append(argv) or 7)
    assert cli.main(["info", "--json"]) == 7
    assert seen == [["--json"]]


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {command} " in printed for command in cli.COMMANDS)


@pytest.mark.parametrize("flag", ["-h", "--help", "--version"])
def test_nothing_stands_behind_a_flag_of_the_whole_program(flag, capsys):
    assert cli.main([flag, "junk"]) == 2
    assert capsys.readouterr() == ("", f"error: dsfast {flag}: expected nothing behind it, got 'junk'\n")


@pytest.mark.parametrize("argv", [[], ["bogus"]])
def test_a_missing_or_unknown_command_lists_the_known_ones(argv, capsys):
    assert cli.main(argv) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert all(command in line for command in cli.COMMANDS)


def test_unknown_command_in_a_process():
    assert "unknown command 'bogus'; known: bench, evaluate" in one_line(run("dsfast", "bogus"))


def test_info_prints_one_json_object():
    result = run("dsfast", "info", "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["versions"]["torch"]
    assert {row["operator"] for row in facts["operators"]["cpu"]} >= {"rms_norm", "mla_attention", "adamw"}
    assert all(row["implementation"] and row["reason"] for row in facts["operators"]["cpu"])


@pytest.mark.parametrize(("said", "dirty"), [("", False), (" M README.md", True), (None, None)])
def test_a_tree_whose_changes_git_cannot_tell_is_not_called_clean(said, dirty, monkeypatch):
    monkeypatch.setattr(info, "in_a_clone", lambda: True)
    monkeypatch.setattr(info, "git", lambda *arguments: "f00" if arguments[0] == "rev-parse" else said)
    assert info.commit() == {"hash": "f00", "dirty": dirty}


def test_info_is_readable_text_too():
    result = run("dsfast.info")
    assert result.returncode == 0, result.stderr
    assert "C++ kernels" in result.stdout
    assert "mla_attention" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--gpu-only"], "no CUDA device is available"),
        (["--cpu-only", "--gpu-only"], "not allowed with argument"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--output-dir", ""], "--output-dir: expected a path"),
        (["--output-dir", "{file}/below"], "--output-dir"),
        (["--config", "{absent}"], "cannot be read"),
        (["--prompts", "{file}"], "prompts.json"),
        (["--seed", "-1"], "seed must be at least 0"),
        (["--seed", "many"], "argument --seed: expected a whole number of up to 20 digits, got 'many'"),
    ],
)
def test_the_suite_refuses_bad_input_before_it_starts(arguments, complaint, tmp_path, capsys):
    (tmp_path / "prompts.json").write_text('{"fast": []}')
    names = {"file": tmp_path / "prompts.json", "absent": tmp_path / "absent.json"}
    main = importlib.import_module("dsfast.suite.__main__").main
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        patch.chdir(tmp_path)
        assert run_command(main, [argument.format(**names) for argument in arguments]) == 2
    output = capsys.readouterr()
    [line] = output.err.splitlines()
    assert complaint in line
    assert output.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.json"]


CONFIG_MISTAKES = {
    "unknown key": ('"steps": 200', '"stepz": 200', "unknown key 'train.stepz'; known: "),
    "missing key": ('"hidden_size": 128,', "", "missing key 'model.hidden_size'"),
    "mistyped": ('"steps": 200', '"steps": "200"', "train.steps must be a whole number, got str '200'"),
    "duplicate key": ('"steps": 200', '"steps": 200, "steps": 300', "key 'steps' stands twice"),
    "NaN": ('"learning_rate": 0.01', '"learning_rate": NaN', "NaN is not a JSON number"),
    "top-k above experts": (
        '"num_experts_per_tok": 1',
        '"num_experts_per_tok": 3',
        "num_experts_per_tok must be at most",
    ),
    "odd rope width": ('"qk_rope_head_dim": 16', '"qk_rope_head_dim": 15', "qk_rope_head_dim must be even"),
    "unknown kernel": ('"device": "cpu"', '"device": "cpu", "kernels": {"rope": "fast"}', "known: auto, native"),
    "too few articles": ('"max_articles": 1000', '"max_articles": 1', "articles"),
}


@pytest.mark.parametrize("mistake", CONFIG_MISTAKES)
def test_the_suite_refuses_a_bad_config(mistake, tmp_path, capsys):
    right, wrong, complaint = CONFIG_MISTAKES[mistake]
    text = CONFIG.read_text()
    assert right in text
    (tmp_path / "bad.json").write_text(text.replace(right, wrong, 1))
    main = importlib.import_module("dsfast.suite.__main__").main
    arguments = ["--config", str(tmp_path / "bad.json"), "--output-dir", str(tmp_path / "out")]
    assert run_command(main, arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert complaint in line
    assert not (tmp_path / "out").exists()


def test_mistakes_in_a_process_leave_one_line_and_no_file(tmp_path):
    output = tmp_path / "out"
    assert "no CUDA device" in one_line(run("dsfast.suite", "--gpu-only", "--output-dir", str(output)))
    (tmp_path / "prompts.json").write_bytes(b'{"fast": "\xff"}')
    prompts = str(tmp_path / "prompts.json")
    assert "not UTF-8" in one_line(run("dsfast", "suite", "--prompts", prompts, "--output-dir", str(output)))
    assert not output.exists()


@pytest.mark.parametrize("command", ["generate", "evaluate", "export"])
def test_a_checkpoint_that_is_not_there(command, tmp_path, capsys):
    more = {"generate": ["--prompt", "x"], "evaluate": [], "export": ["--to", "huggingface", str(tmp_path / "out")]}
    assert cli.main([command, "--checkpoint", str(tmp_path / "absent"), *more[command]]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "no such folder" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--config", str(CONFIG), "--output-dir", ""],
        ["train", "--output-dir", "run", "--resume", ""],
        ["train", "--output-dir", "run", "--config", " "],
        ["generate", "--prompt", "x", "--checkpoint", ""],
        ["evaluate", "--checkpoint", ""],
        ["evaluate", "--checkpoint", "run", "--json", ""],
        ["evaluate", "--checkpoint", "run", "--prompts", ""],
        ["export", "--to", "huggingface", "--checkpoint", "", "out"],
        ["export", "--to", "huggingface", "--checkpoint", "run", ""],
        ["bench", "step", "--config", ""],
        ["bench", "step", "--json", ""],
        ["bench", "generate", "--checkpoint", ""],
        ["suite", "--config", ""],
        ["suite", "--prompts", ""],
    ],
)
def test_an_empty_path_is_not_the_working_folder(argv, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "expected a path, got an empty name" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv",
    [
        ["evaluate", "--checkpoint", "absent", "--json", "."],
        ["evaluate", "--checkpoint", "absent", "--json", "a_checkpoint/model.safetensors"],
        ["train", "--config", str(CONFIG), "--output-dir", "file"],
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(argv, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("a_checkpoint").mkdir()
    Path("a_checkpoint/manifest.json").touch()
    monkeypatch.setattr("dsfast.train.loop.Trainer.train", lambda *_: pytest.fail("trained"))
    assert cli.main(argv) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {argv[-2]} {argv[-1]}: ")


GENERATE_IS_THE_FUNCTION = """
import inspect, importlib, sys
{imports}
assert inspect.isfunction(dsfast.generate), dsfast.generate
assert callable(importlib.import_module("dsfast.generate.__main__").main)
assert inspect.isfunction(dsfast.generate), dsfast.generate
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import dsfast",
        "import dsfast.generate",
        "import dsfast.generate.__main__",
        "from dsfast.generate.__main__ import main; import dsfast",
        "from dsfast import generate; import dsfast",
    ],
)
def test_dsfast_generate_stays_the_function(imports):
    result = run(code=GENERATE_IS_THE_FUNCTION.format(imports=imports))
    assert result.returncode == 0, result.stderr


def test_the_generate_command_runs_without_a_warning():
    result = run("dsfast.generate", "--help")
    assert result.returncode == 0
    assert result.stderr == ""
    assert "--max-new-tokens" in result.stdout
