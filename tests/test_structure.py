"""The rules of the house: imports run one way, files stand where their names say, functions stay short, documents are true."""

from __future__ import annotations

import ast
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

from dsfast import ops

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dsfast"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "triton_kernels").glob("*.py")])
TESTS = sorted((ROOT / "tests").glob("*.py"))
KERNELS = sorted([*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc").glob("*.h")])

# Each part may import the parts named and itself; cli stands for everything a command line calls.
LEAVES = {"errors", "files", "tokens"}
OPS = LEAVES | {"config", "triton_kernels", "_native"}
MODEL = OPS | {"ops", "huggingface_config"}
TRAIN = MODEL | {"model", "data"}
BENCH = TRAIN | {"train", "evaluate", "info"}
SUITE = BENCH | {"bench", "command", "console"}
ALLOWED = {
    "errors": set(),
    "files": {"errors"},
    "tokens": set(),
    "huggingface_config": {"errors"},
    "config": LEAVES | {"huggingface_config"},
    "triton_kernels": set(),
    "command": LEAVES,
    "console": set(),
    "data": LEAVES | {"config"},
    "ops": OPS,
    "model": MODEL,
    "train": TRAIN | {"command"},
    "evaluate": TRAIN | {"command", "train"},
    "bench": BENCH | {"command", "console"},
    "suite": SUITE,
    "info": MODEL | {"command"},
    "generate": SUITE,
    "export": SUITE,
    "cli": SUITE | {"suite", "generate", "export", "package"},
}


def part(path: Path) -> str:
    """The part of the house a file belongs to."""
    if path.is_relative_to(ROOT / "triton_kernels"):
        return "triton_kernels"
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return {"__init__": "package", "__main__": "cli"}.get(first, first)


def imported_modules(path: Path) -> list[str]:
    """Full names of the modules of dsfast's that a file imports, anywhere in it."""
    found = []
    package = (
        ["dsfast", *path.relative_to(PACKAGE).parts[:-1]]
        if path.is_relative_to(PACKAGE)
        else ["dsfast", "triton_kernels"]
    )
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [f"{module}.{name.name}" for name in node.names] if module == "dsfast" else [module]
    return [name for name in found if name.split(".")[0] == "dsfast"]


class TestImports:
    @pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
    def test_run_one_way(self, path):
        where = part(path)
        if where == "package":  # dsfast/__init__.py gathers the public names of all parts
            return
        assert where in ALLOWED, f"say in ALLOWED what dsfast/{where} may import"
        for module in imported_modules(path):
            target = module.split(".")[1] if "." in module else "package"
            assert target in ALLOWED[where] | {where}, f"{path.relative_to(ROOT)} imports {module}"

    def test_the_rule_itself_has_no_circle(self):
        below: dict[str, set[str]] = {}
        for where in ALLOWED:  # listed from the bottom up, but for what stands beside each other
            reached, new = set(), {where}
            while new:
                new = set().union(*(ALLOWED.get(name, set()) for name in new)) - reached
                reached |= new
            below[where] = reached
        assert not [where for where in ALLOWED if where in below[where]]

    def test_nothing_but_data_and_up_needs_the_command_line(self):
        assert not [
            path for path in SOURCES if part(path) in ("ops", "model", "data") and "argparse" in path.read_text()
        ]


class TestOperators:
    def test_list_is_what_the_package_has(self):
        """And what stands for several of them on a GPU, whose choice it follows."""
        public = {name for name in ops.__all__ if name in {path.stem for path in (PACKAGE / "ops").glob("*.py")}}
        assert public == {*ops.OPERATORS, "mla_output", "mla_project"}

    @pytest.mark.parametrize("operator", ops.OPERATORS)
    def test_one_name_in_every_place(self, operator):
        for path in (f"dsfast/ops/{operator}.py", f"csrc/{operator}.cpp", f"triton_kernels/{operator}.py"):
            assert (ROOT / path).is_file(), path
        assert f"{operator}.cpp" in (ROOT / "csrc/CMakeLists.txt").read_text()
        assert "OperatorContract" in (ROOT / f"tests/test_{operator}.py").read_text()
        assert "TritonContract" in (ROOT / f"tests/test_triton_{operator}.py").read_text()

    @pytest.mark.parametrize("operator", ops.OPERATORS)
    def test_module_opens_with_the_maths_and_its_source(self, operator):
        text = ast.get_docstring(ast.parse((PACKAGE / "ops" / f"{operator}.py").read_text()))
        assert re.search(r"arXiv:? ?\d{4}\.\d{5}", text), "which paper?"
        assert re.search(r"^ *[\w\[\], {}]+ += ", text, re.MULTILINE), "which formula?"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_docstring_begins_with_what_it_is_about(path):
    """It is read alone, in a tooltip: "Those of both passes." would say nothing there."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    opening = re.compile(r"(Of|Those|That|With|By|From|Which)\b")
    assert [node.name for node in nodes if opening.match(ast.get_docstring(node) or "")] == []


def long_functions(path: Path, limit: int) -> list[str]:
    """Python functions longer than `limit` lines, signature and docstring left out."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            if body[-1].end_lineno - body[0].lineno >= limit:
                found.append(f"{path.relative_to(ROOT)}: {node.name}")
    return found


def blocks(text: str) -> list[tuple[str, int]]:
    """First line and length of every brace block in C++ that is not a namespace."""
    text = re.sub(r"//.*|\"(\\.|[^\"\\\n])*\"|'(\\.|[^'\\\n])'", "", text)
    found, open_at = [], []
    for number, line in enumerate(text.splitlines()):
        for character in line:
            if character == "{":
                open_at.append((number, line.strip()))
            elif character == "}":
                start, opening = open_at.pop()
                if not opening.startswith("namespace"):
                    found.append((opening, number - start + 1))
    assert not open_at
    return found


class TestLengths:
    @pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=lambda p: str(p.relative_to(ROOT)))
    def test_python_functions(self, path):
        limit = 120 if path.is_relative_to(ROOT / "triton_kernels") else 50
        assert long_functions(path, limit) == []

    @pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
    def test_kernels(self, path):
        found = blocks(path.read_text())
        assert [block for block in found if block[1] > 120] == []

    def test_the_count_counts(self):
        assert blocks('namespace a {\nint f() { return 1; }\nvoid g() {\n  // }\n  h("}");\n}\n}\n') == [
            ("int f() { return 1; }", 1),
            ("void g() {", 4),
        ]
        assert len(blocks((ROOT / "csrc/mla_attention.cpp").read_text())) > 10


DOCUMENTS = [
    *(
        ROOT / name
        for name in (
            "README.md",
            "CONTRIBUTING.md",
            "CHANGELOG.md",
            "benchmarks/README.md",
            "benchmarks/h200/README.md",
        )
    ),
    *(ROOT / "docs").glob("*.md"),
]
# What stands for something still to be written.
PLACEHOLDER = re.compile(
    r"SUITE_EXCERPT|MEASURED_TABLE|LEAD:|\b(?:TODO|FIXME|TBD|XXX)\b|to be (?:measured|filled in|written)"
)
IGNORED = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").split()]
FOLDERS = sorted(
    path.name
    for path in ROOT.iterdir()
    if path.is_dir() and not path.name.startswith(".") and not any(fnmatch(path.name, pattern) for pattern in IGNORED)
)
"""Those of the project: what its commands make comes and goes."""
TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_every_package_is_installed():
    """In a clone all of them are there; a wheel has those that are listed."""
    listed = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("\npackages = [")[2].partition("]")[0]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")}
    assert set(re.findall(r'"([\w.]+)"', listed)) == found | {"dsfast.configs", "dsfast.triton_kernels"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
class TestDocuments:
    def test_paths_exist(self, document):
        text = document.read_text(encoding="utf-8")
        # A name with a part left open, as in step-<date>.json, is none.
        named = set(re.findall(rf"(?<![\w/.-])((?:{'|'.join(FOLDERS)})/[\w./-]*\w(?![\w.-]*<)|[A-Z]+\.md)", text))
        named |= {link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link}
        named = {name for name in named if not re.search(r"(^|_)X$", Path(name).stem)}  # X stands for any operator
        missing = [name for name in named if not (ROOT / name).exists() and not (document.parent / name).exists()]
        assert missing == []

    def test_modules_and_commands_exist(self, document):
        text = document.read_text(encoding="utf-8")
        for name in set(re.findall(r"python3? -m (dsfast[\w.]*)", text)):
            path = ROOT / name.rstrip(".").replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), name

    def test_make_targets_exist(self, document):
        text = document.read_text(encoding="utf-8")
        code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))
        named = set(re.findall(r"\bmake ([a-z][\w-]*)", code))
        assert named <= TARGETS

    def test_nothing_is_still_to_be_filled_in(self, document):
        assert PLACEHOLDER.findall(document.read_text(encoding="utf-8")) == []

    def test_it_names_files_or_commands(self, document):
        """The pattern above finds something: a document that names nothing would pass unread."""
        assert re.search(
            rf"(?:{'|'.join(FOLDERS)})/|python3? -m dsfast|make [a-z]", document.read_text(encoding="utf-8")
        )


class TestContributing:
    TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

    def test_table_of_imports_has_every_part(self):
        table = self.TEXT.partition("\n## Where things are\n")[2].partition("\n## ")[0]
        rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
        named = {Path(name).stem for row in rows for name in re.findall(r"`([^`]+)`", row)}
        assert named - {"csrc", "configs"} == set(ALLOWED)

    def test_how_to_add_an_operator_names_every_list_of_them(self):
        howto = self.TEXT.partition("\n## How to add an operator\n")[2].partition("\n## ")[0]
        files = [*PACKAGE.rglob("*.py"), *(ROOT / "csrc").iterdir(), *TESTS, ROOT / "README.md"]
        words = {path: set(re.findall(r"[a-z]+(?:_[a-z]+)*", path.read_text(encoding="utf-8"))) for path in files}
        # A function's name may go on after the operator's: adamw_case, adamw_forward.
        lists = [p for p in files if all(any(w.startswith(op) for w in words[p]) for op in ops.OPERATORS)]
        assert len(lists) > 5
        assert [str(path.relative_to(ROOT)) for path in lists if str(path.relative_to(ROOT)) not in howto] == []
