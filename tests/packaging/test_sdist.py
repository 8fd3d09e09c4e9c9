"""The sdist has what git has and nothing of this machine; a wheel is built from it, and works where the clone is not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import cpu_sources
import environments
import pytest

ROOT = Path(__file__).parents[2]
MADE = re.compile(r"PKG-INFO|setup\.cfg|ghostfused\.egg-info/.*")
"""What setuptools adds to an sdist."""
OF_THIS_MACHINE = [
    "ghostfused/_C.abi3.so", "ghostfused/_cpu_build_failure.txt", "ghostfused/__pycache__/fuse.cpython-311.pyc", "docs/api/x.md",
    "build/lib/ghostfused/old.py", "dist/old.whl", "out/site/index.html", "csrc/cuda/old.o", "bench/results/cpu/report/x.png",
]  # fmt: skip
REFUSED = {"GHOSTFUSED_CUDA": "0", "GHOSTFUSED_CPU": "0"}
MODULE = '#include <Python.h>\nPyMODINIT_FUNC PyInit_{name}() {{ static PyModuleDef d{{PyModuleDef_HEAD_INIT, "{name}"}}; return PyModule_Create(&d); }}\n'


def files_of_git() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("this tree is no clone")
    return sorted(name for name in listed.stdout.split("\0") if (ROOT / name).is_file())


def backend(tree: Path, call: str, **environment: str) -> subprocess.CompletedProcess:
    """A call of the build backend, as a frontend makes it; ``environment`` is all that has a say in what is built."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("GHOSTFUSED_", "TORCH_CUDA"))}
    code = f"from setuptools import build_meta; build_meta.{call}"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env=kept | environment, capture_output=True, text=True, check=False
    )


def built(tree: Path, call: str, pattern: str, **environment: str) -> Path:
    done = backend(tree, call, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return next((tree / "dist").glob(pattern))


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of this tree, in which somebody has worked."""
    tree = tmp_path_factory.mktemp("tree")
    for name in [*files_of_git(), *OF_THIS_MACHINE]:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(b"" if name in OF_THIS_MACHINE else (ROOT / name).read_bytes())
    return tree


@pytest.fixture(scope="module")
def sdist(tree) -> Path:
    return built(tree, "build_sdist('dist')", "*.tar.gz")


def contents(sdist: Path) -> dict[str, bytes]:
    with tarfile.open(sdist) as tar:
        return {m.name.partition("/")[2]: tar.extractfile(m).read() for m in tar if m.isfile()}  # type: ignore[union-attr]


def test_the_sdist_is_what_git_has(tree, sdist):
    found = contents(sdist)
    assert sorted(name for name in found if not MADE.fullmatch(name)) == files_of_git()
    for name, data in found.items():
        assert str(tree).encode() not in data, f"{name} names the folder of the build"


def test_the_sdist_does_not_depend_on_what_is_asked_for(tree, sdist):
    other = built(tree, "build_sdist('dist/other')", "other/*.tar.gz", **REFUSED, CXX="no-compiler")
    assert contents(other).keys() == contents(sdist).keys()


@pytest.fixture
def source(sdist, tmp_path) -> Path:
    with tarfile.open(sdist) as tar:
        tar.extractall(tmp_path, filter="data")
    return next(tmp_path.glob("ghostfused-*"))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            {"GHOSTFUSED_CUDA": "0", "CXX": "no-compiler"},
            "no kernels can be built: .*_cpu: no C.. compiler.*GHOSTFUSED_CUDA=0 ",
        ),
        ({"GHOSTFUSED_CUDA": "0", "GHOSTFUSED_CPU": "1", "CXX": "no-compiler"}, "_cpu.*no C.. compiler"),
        ({"GHOSTFUSED_CPU": "1", "CXX": "no-compiler"}, "_cpu is asked for, and can't be built: no C.. compiler"),
        ({"GHOSTFUSED_CUDA": "maybe"}, "GHOSTFUSED_CUDA: expected 0, 1 or nothing, got 'maybe'"),
    ],
)
def test_a_build_of_nothing_fails_unless_it_is_asked_for(source, asked, said):
    done = backend(source, "build_wheel('dist')", **asked)
    assert done.returncode != 0
    assert re.search(said, done.stderr.splitlines()[-1]), done.stderr
    assert not list(source.glob("dist/*.whl"))


def test_where_no_torch_can_be_had_one_line_says_what_to_do(source, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise ModuleNotFoundError('torch is not here')")
    done = backend(source, "build_wheel('dist')", PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    said = "no kernels can be built: .*no torch at build time .torch is not here.: pip install torch first"
    assert re.search(said, done.stderr.splitlines()[-1]), done.stderr
    assert "Traceback" not in done.stderr


def test_pure_python_where_it_is_asked_for(source):
    wheel = built(source, "build_wheel('dist')", "*.whl", **REFUSED)
    assert wheel.name.endswith("-py3-none-any.whl")


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_the_reason_of_a_failed_build_is_in_the_wheel(source):
    """In small sources: one extension compiles, the other doesn't."""
    for name, text in (("cuda", MODULE.format(name="_C")), ("cpu", "#error planted\n")):
        shutil.rmtree(source / "csrc" / name)
        (source / "csrc" / name).mkdir()
        (source / "csrc" / name / "binding.cpp").write_text(text)
    (source / "ghostfused" / "_C_build_failure.txt").write_text("of an earlier build")
    wheel = built(source, "build_wheel('dist')", "*.whl", TORCH_CUDA_ARCH_LIST="8.0")
    assert "-cp311-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as opened:
        ours = {name for name in opened.namelist() if re.search(r"\.so$|failure", name)}
        assert ours == {"ghostfused/_C.abi3.so", "ghostfused/_cpu_build_failure.txt"}
        assert opened.read("ghostfused/_cpu_build_failure.txt").startswith(b"the build failed: ")


@pytest.fixture
def installed(sdist, tmp_path_factory) -> Path:
    """The Python of an environment that has the wheel and, but for ghostfused, the packages of this one.

    The wheel has the kernels of one instruction set: see ``elsewhere``.
    """
    folder = tmp_path_factory.mktemp("installed")
    with tarfile.open(sdist) as tar:
        tar.extractall(folder, filter="data")
    quick = folder / "quick-c++"  # what is proven is the way there, not the speed
    quick.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    quick.chmod(0o755)
    source = next(folder.glob("ghostfused-*"))
    for isa in (source / "csrc/cpu/isa").glob("*.cpp"):
        if isa.stem != "baseline":
            isa.write_text(cpu_sources.absent_kernels([isa.stem]))
    wheel = built(source, "build_wheel('dist')", "*.whl", GHOSTFUSED_CUDA="0", GHOSTFUSED_CPU="1", CXX=str(quick))
    assert "-cp311-abi3-linux_" in wheel.name
    packages = environments.make(folder / "venv", "--without-pip")
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(packages)
    return folder / "venv/bin/python"


def elsewhere(python: Path, tmp_path: Path, *arguments: str) -> str:
    done = subprocess.run(
        [python, *arguments],
        cwd=tmp_path,
        env={"PATH": "", "GHOSTFUSED_CPU_ISA": "baseline"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


USE = """
import torch
import ghostfused
from ghostfused.backends import cpu, cuda, reference
from ghostfused.testing import Case, judge, make_args

assert cpu.unavailable() is None, cpu.unavailable()
args = make_args(Case(in_channels=6, out_channels=9, height=5, width=7))
assert judge(cpu.forward(args), args).ok
print(ghostfused.__file__)
print(cuda.unavailable())
"""


def test_the_wheel_works_in_another_folder_and_has_types(installed, tmp_path):
    path, reason = elsewhere(installed, tmp_path, "-c", USE).splitlines()
    assert Path(path).is_relative_to(installed.parents[1])
    assert reason == "the extension ghostfused._C is not built: GHOSTFUSED_CUDA=0 when it was built"
    assert reason in elsewhere(installed, tmp_path, "-m", "ghostfused", "info")
    # in a checkout's folder Python takes the checkout
    checkout = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("*.so", "*_build_failure.txt", "__pycache__")
    shutil.copytree(ROOT / "ghostfused", checkout / "ghostfused", ignore=ignored)
    said = elsewhere(installed, checkout, "-c", "from ghostfused.backends import cpu; print(cpu.unavailable())")
    assert said.strip() == (
        f"the extension ghostfused._cpu is not built: Python takes the package from {checkout}, not the one with this "
        f"extension in {Path(path).parents[1]}"
    )
    # in this test, so that two processes of tests build one wheel
    script = tmp_path / "script.py"
    script.write_text((ROOT / "tests/typing/keeps_the_class.py").read_text())
    options = ["--config-file=", "--python-executable", str(installed), "--cache-dir", str(tmp_path / "cache")]
    assert "Success" in elsewhere(Path(sys.executable), tmp_path, "-m", "mypy", *options, "script.py")
