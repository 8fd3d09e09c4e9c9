"""What the cross compiler makes of setup.py on aarch64: a file with flags of its own has SVE's vectors, and torch is linked."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("aarch64-linux-gnu-g++")
COMMON = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc/exports.map"]
MODULE = """#include <Python.h>
extern "C" int32_t aoti_torch_dtype_float32();
void add(float*, const float*);
#ifdef __ARM_FEATURE_SVE
#error this file has the flags of another
#endif
#ifndef GHOSTFUSED_SVE512
#error expected to be told that there is SVE
#endif
PyMODINIT_FUNC PyInit__cpu() {
  float x[16] = {float(aoti_torch_dtype_float32())};
  add(x, x);
  static PyModuleDef d{PyModuleDef_HEAD_INIT, "_cpu"};
  return PyModule_Create(&d);
}
"""
VECTORS = """#if __ARM_FEATURE_SVE_BITS != 512
#error expected vectors of 512 bits
#endif
typedef float Vec __attribute__((vector_size(64)));
void add(float* to, const float* from) { *(Vec*)to += *(const Vec*)from; }
"""


@pytest.mark.skipif(COMPILER is None, reason="no g++ for aarch64 (Debian's package g++-aarch64-linux-gnu)")
def test_a_wheel_has_torch_and_one_file_with_vectors_of_512_bits(tmp_path):
    for name in COMMON:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    for name, text in {
        "ghostfused/__init__.py": '__version__ = "0"\n',
        "csrc/cpu/binding.cpp": MODULE,
        "csrc/cpu/isa/sve512.cpp": VECTORS,
        "csrc/common/manylinux.cpp": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    stubs = [ROOT / "tools/torch_stubs.sh", sys.executable, str(COMPILER).replace("g++", "gcc"), tmp_path]
    subprocess.run(stubs, check=True)
    environment = {
        "CC": str(COMPILER), "CXX": str(COMPILER), "LDSHARED": f"{COMPILER} -shared", "LDCXXSHARED": f"{COMPILER} -shared",
        "LDFLAGS": f"-L{tmp_path}", "_PYTHON_HOST_PLATFORM": "linux-aarch64", "GHOSTFUSED_CUDA": "0", "GHOSTFUSED_CPU": "1",
    }  # fmt: skip
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    wheel = next((tmp_path / "dist").glob("*-linux_aarch64.whl"))
    with zipfile.ZipFile(wheel) as opened:
        extension = opened.extract("ghostfused/_cpu.abi3.so", tmp_path)
    needed = subprocess.run(["readelf", "-d", extension], capture_output=True, text=True, check=True).stdout
    assert re.search(r"NEEDED.*\[libtorch_cpu\.so\]", needed), "it would find no torch where it is loaded"
    objdump = [str(COMPILER).replace("g++", "objdump"), "-d", extension]
    code = subprocess.run(objdump, capture_output=True, text=True, check=True).stdout
    assert re.search(r"fadd\s+z\d+\.s", code), "there is no addition of SVE's vectors"
