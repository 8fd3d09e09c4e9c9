"""The package's rooms: each file imports from its own room and from lower ones, and the call path of docs/kernels.md exists."""

import ast
import itertools
import re
import runpy
from pathlib import Path

import call_path
import documents
import pytest

import ghostfused
from ghostfused.backends import cpu, reference
from ghostfused.ops import autograd, programs

PACKAGE = Path(ghostfused.__file__).parent
ROOMS = {  # what each may import, beside itself
    "numerics": "",
    "spec": "",
    "models": "",
    "backends": "spec",
    "ops": "backends spec",
    "functional": "ops backends spec",
    "recognize": "numerics spec",
    "nn": "functional recognize ops backends spec",
    "fuse": "nn recognize backends spec numerics",
    "capture": "fuse ops backends spec numerics",
    "testing": "ops backends spec numerics",
    "cli": "capture fuse nn functional models testing ops backends spec numerics",
    "__main__": "cli",
}


def imported(path: Path) -> set[str]:
    """The rooms that the file imports, wherever in it: first parts of names inside the package."""
    package = path.relative_to(PACKAGE).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[1] for name in node.names if name.name.startswith("ghostfused.")}
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".") if node.module else []
            if node.level:
                module = [*package[: len(package) - node.level + 1], *module]
            elif module[:1] != ["ghostfused"]:
                continue
            else:
                module = module[1:]
            found |= {module[0]} if module else {name.name for name in node.names}
    return found


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_imports_go_one_way(path):
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    own_version = {"__version__"} if room in ("cli", "__main__") else set()
    assert imported(path) <= {room, *ROOMS[room].split()} | own_version


def test_the_rooms_have_an_order():
    for room, lower in ROOMS.items():
        for each in lower.split():
            assert room not in ROOMS[each].split(), f"{room} and {each} import each other"


def test_backends_do_not_import_each_other():
    backends = PACKAGE / "backends"
    names = {"cpu", "cuda", "triton", "reference"}
    for path in backends.rglob("*.py"):
        own = path.relative_to(backends).parts[0].removesuffix(".py").removesuffix("_training")
        if own in names:
            tree = ast.walk(ast.parse(path.read_text()))
            top = [
                n for n in tree if isinstance(n, ast.ImportFrom) and n.level == len(path.relative_to(backends).parts)
            ]
            others = {name.name for n in top if n.module is None for name in n.names} | {
                n.module for n in top if n.module
            }
            assert not {each.removesuffix("_training") for each in others} & names - {own}, path


@pytest.mark.parametrize("backend", [*call_path.BACKENDS, call_path.REPLAY])
def test_the_call_path_exists(backend):
    hops = call_path.listed(backend)
    assert [hop.number for hop in hops] == list(range(1, 5 if backend == call_path.REPLAY else 7))
    for _, name, file in hops:
        text = (documents.ROOT / file).read_text()
        last = name.rpartition("::")[2].rpartition(".")[2]
        if name.startswith("ghostfused::"):
            last = last.partition("_")[0]  # the op's names are made of those of spec.OPS
        assert re.search(rf"\b{last}\b", text), f"{file} has no {name}"


def test_the_call_path_to_an_op_is_what_runs(monkeypatch):
    files = call_path.files_until(monkeypatch, autograd, "forward_op", "auto")
    for backend in call_path.BACKENDS:
        assert files == [hop.file for hop in call_path.listed(backend)][:3]


def test_the_call_path_to_the_reference_is_what_runs(monkeypatch):
    """To Triton's kernel: tests/kernels/test_triton.py."""
    assert call_path.files_until(monkeypatch, reference, "store", "reference") == [
        "ghostfused/nn/ghost_module.py",
        "ghostfused/functional.py",
        "ghostfused/backends/reference.py",
    ]


@pytest.mark.skipif(cpu.unavailable() is not None, reason="no CPU kernels")
def test_the_call_path_of_a_second_call_is_what_runs(monkeypatch):
    hops = call_path.listed(call_path.REPLAY)
    files = call_path.files_until(monkeypatch, programs, "below_autograd", "auto", replayed=True)
    assert files == [hop.file for hop in hops[:3]]


STEPS = ("load", "primary", "norm_affine", "cheap", "store")
OTHER_NAMES = re.compile(r"\b(?:def|void|auto) _?(?:pointwise|epilogue|finish|put|put_run|put_x1)\(")
"""What the steps were called in one place or another."""


def steps_of_the_page() -> dict[str, list[list[str]]]:
    """Per folder the files of each step, by the table of docs/kernels.md."""
    rows = [line.strip("|").split("|") for line in call_path.PAGE.read_text().splitlines() if line.startswith("|")]
    start = next(i for i, row in enumerate(rows) if [cell.strip() for cell in row] == ["folder", *STEPS])
    table = itertools.takewhile(lambda row: len(row) == 6, rows[start + 2 :])
    return {row[0].strip(" `"): [re.findall(r"`(\S+)`", cell) for cell in row[1:]] for row in table}


def defined(path: Path) -> set[str]:
    """The functions and classes of a file, in Python's spelling, without a leading underscore."""
    text = path.read_text()
    if path.suffix == ".py":
        names = re.findall(r"^def (\w+)\(", text, re.MULTILINE)
    else:
        names = re.findall(r"\b(?:void|Vec|auto) (\w+)\(", text) + re.findall(
            r"^(?:class|struct) (\w+)", text, re.MULTILINE
        )
    return {re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().strip("_") for name in names}


def test_each_step_has_one_name():
    table = steps_of_the_page()
    assert len(table) == 6
    for folder, cells in table.items():
        for step, files in zip(STEPS, cells, strict=True):
            assert files
            for file in files:
                names = defined(documents.ROOT / folder / file)
                assert any(name == step or name.startswith(f"{step}_") for name in names), f"{folder}/{file}: no {step}"
        for path in (documents.ROOT / folder).glob("*.*"):
            if path.suffix in (".py", ".h", ".cuh", ".cpp"):
                assert not OTHER_NAMES.findall(path.read_text()), path


def test_an_activation_goes_to_five_places():
    """Those that docs/development.md names: of an activation with a formula of its own, nothing else has any code."""
    text = (documents.ROOT / "docs" / "development.md").read_text()
    table = text[text.index("An **activation** goes") : text.index("A **dtype** is")]
    named = re.findall(r"^\| `(\S+)` \|", table, re.MULTILINE)
    code = re.compile(r"HARDSWISH|kHardswish|\b(nn|F|aten)\.[Hh]ardswish")
    folders = (documents.ROOT / folder for folder in ("ghostfused", "csrc"))
    files = [p for folder in folders for p in folder.rglob("*") if p.suffix in (".py", ".h", ".cuh", ".cpp", ".cu")]
    assert {str(p.relative_to(documents.ROOT)) for p in files if code.search(p.read_text())} == set(named)
    # nor has recognition a list of their names
    assert not [path for path in (PACKAGE / "recognize").rglob("*.py") if '"hardswish"' in path.read_text()]
    assert len(named) <= 5


def test_no_test_is_imported_by_another():
    for path in (documents.ROOT / "tests").rglob("*.py"):
        names = re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.MULTILINE)
        assert not [name for name in names if name.startswith("test_")], path


def test_files_are_short():
    folders = ("ghostfused", "csrc", "tests", "bench", "tools", "examples")
    files = [path for folder in folders for path in (documents.ROOT / folder).rglob("*")]
    code = [path for path in files if path.suffix in (".py", ".cpp", ".h", ".cuh", ".cu", ".c", ".sh")]
    assert len(code) > 200
    long = {str(path): count for path in code if (count := len(path.read_text().splitlines())) > 400}
    assert not long


@pytest.mark.parametrize("mark", ["cuda", "triton"])
def test_kernels_tests_are_where_they_are_run(mark):
    """``make test`` looks for them there alone."""
    tests = PACKAGE.parent / "tests"
    run = runpy.run_path(str(tests / "run.py"))
    places = [PACKAGE.parent / place for place in run["PLACES"][mark]]
    marks = re.compile(rf"\bmark\.{mark}\b|^(from|import) (kernel_backends|training_runtime)\b", re.MULTILINE)
    marked = [
        path
        for path in tests.rglob("*.py")
        if path.name.startswith(("test_", "conftest")) and marks.search(path.read_text())
    ]
    assert len(marked) > 5
    assert [path for path in marked if not any(path.is_relative_to(place) for place in places)] == []
