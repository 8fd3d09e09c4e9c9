"""What the compiled extensions ask of the system, of Python and of torch: the symbols that one wheel may have."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from torch.utils import cpp_extension

import ghostfused

ROOT = Path(__file__).parents[2]
EXTENSIONS = sorted(Path(ghostfused.__file__).parent.glob("_*.abi3.so"))
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (8, 0, 0)}
"""What the base system of manylinux_2_28 has; torch's own wheels need it too."""
LIBRARIES = re.compile(
    r"(libc10|libtorch_cpu|libtorch_cuda|libcudart|libstdc\+\+|libgcc_s|libm|libc|ld-linux-[\w-]+)\.so"
)
WEAK = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__", "__cxa_finalize"}

NONE = pytest.param(None, marks=pytest.mark.skip("no extension is built: pip install -e . --no-build-isolation"))
each = pytest.mark.parametrize("extension", EXTENSIONS or [NONE], ids=lambda path: path and path.name)


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def declared(prelude: str, folders: list[str], *flags: str) -> set[str]:
    """The names in the declarations of ``prelude``'s headers, as the preprocessor leaves them."""
    command = ["g++", "-std=c++20", "-E", "-P", "-x", "c++", *flags, *(f"-I{folder}" for folder in folders), "-"]
    source = subprocess.run(command, input=prelude, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\b[A-Za-z_]\w+", source))


@pytest.fixture(scope="module")
def limited_api() -> set[str]:
    names = declared("#include <Python.h>", [sysconfig.get_path("include")], "-DPy_LIMITED_API=0x030b0000")
    assert "PyType_FromSpec" in names
    assert not {"_PyObject_GetDictPtr", "PyDict_AddWatcher"} & names, "these are outside the limited API"
    return {name for name in names if name.startswith(("Py", "_Py"))}


@pytest.fixture(scope="module")
def stable_abi() -> set[str]:
    """torch's C functions of the oldest torch: its own headers, which `make check` keeps, else what today's have of them."""
    kept = Path(sys.prefix, "oldest-torch/torch/include")
    folders = [str(kept)] if kept.exists() else cpp_extension.include_paths()
    shims = ("inductor/aoti_torch/c/shim.h", "inductor/aoti_torch/generated/c_shim_aten.h", "stable/c/shim.h")
    prelude = "\n".join(f"#include <torch/csrc/{shim}>" for shim in shims)
    names = declared(prelude, folders, "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA")
    assert "torch_call_dispatcher" in names
    return {name for name in names if name.startswith(("torch_", "aoti_torch_"))}


def undefined(extension: Path) -> list[tuple[str, str]]:
    """Names and versions; the version is empty where there is none."""
    lines = run("nm", "-D", "--undefined-only", str(extension)).splitlines()
    return [(name, version) for line in lines for name, _, version in [line.split()[-1].partition("@")]]


@each
def test_each_symbol_is_of_a_stable_set(extension, limited_api, stable_abi):
    others = []
    for name, version in undefined(extension):
        library, _, number = version.rpartition("_")
        if version.startswith("libcudart.so."):
            continue
        if library in NEWEST:
            if tuple(map(int, number.split("."))) > NEWEST[library]:
                others.append(f"{name}@{version}")
        elif version or name not in WEAK | limited_api | stable_abi:
            others.append(name)
    assert others == []


@each
def test_its_libraries_are_the_systems_and_torchs(extension):
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", str(extension)))
    assert "libtorch_cpu.so" in needed
    assert [name for name in needed if not LIBRARIES.match(name)] == []
    assert not re.search("RPATH|RUNPATH", run("readelf", "-d", str(extension))), "it would name folders of this machine"


@each
def test_it_shows_its_entry_alone(extension):
    shown = [
        line.split()[-1] for line in run("nm", "-D", "--defined-only", str(extension)).splitlines() if " t " not in line
    ]
    assert shown == [f"PyInit_{extension.name.partition('.')[0]}"]


def test_what_stands_in_for_newer_symbols(tmp_path):
    """It must do as libstdc++ does: csrc/common/manylinux.cpp."""
    sources = [ROOT / "tests/helpers/manylinux_driver.cpp", ROOT / "csrc/common/manylinux.cpp"]
    link = ["-Wl,--wrap=dlsym", f"-Wl,--version-script={ROOT / 'csrc/exports.map'}"]  # as setup.py does
    run("g++", "-std=c++20", "-O1", *map(str, sources), "-o", str(tmp_path / "driver"), *link)
    subprocess.run([tmp_path / "driver"], check=True)
    asked = {name for name, _ in undefined(tmp_path / "driver")}
    assert "_ZNSt15__exception_ptr13exception_ptrD1Ev" in asked, "nothing stood in"
    assert "_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv" not in asked
