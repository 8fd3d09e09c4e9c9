"""The CPU kernels compile for aarch64 from the same source. Nothing here runs them there."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def cross_compiler() -> list[str] | None:
    """g++ or clang++ for aarch64; zig's, which ``pip install ziglang`` brings, will do."""
    if gcc := shutil.which("aarch64-linux-gnu-g++"):
        return [gcc]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu"]
    return None


@pytest.mark.skipif(cross_compiler() is None, reason="no aarch64-linux-gnu-g++, and ziglang is not installed")
@pytest.mark.parametrize(
    "source",
    ["csrc/cpu/dispatch.cpp", "csrc/cpu/pool.cpp", "csrc/cpu/isa/baseline.cpp", "tests/helpers/cpu_driver.cpp"],
)
def test_compiles_for_aarch64(source, tmp_path):
    command = [
        *cross_compiler(),
        "-std=c++20",
        "-O2",
        "-Wall",
        "-Werror",
        f"-I{ROOT / 'csrc'}",
        "-c",
        ROOT / source,
        "-o",
        tmp_path / "a.o",
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
