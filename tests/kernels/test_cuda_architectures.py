"""The CUDA kernels on architectures that the default build lacks, and for an aarch64 host: what compilers say to them."""

from __future__ import annotations

import re
import subprocess
import sysconfig
from pathlib import Path

import aarch64
import pytest
import torch
from torch.utils import cpp_extension

from ghostfused.backends import cuda
from tools.sass import build

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "tests" / "helpers" / "architecture_kernels.cu"
CUDA_HOME = build.setup_functions()["find_cuda_home"]()
needs_nvcc = pytest.mark.skipif(CUDA_HOME is None, reason="no nvcc")
needs_cross = pytest.mark.skipif(
    aarch64.NATIVE or aarch64.compiler() is None, reason="no g++ that compiles for aarch64"
)


def nvcc(*arguments: object) -> str:
    """What it says."""
    command = [f"{CUDA_HOME}/bin/nvcc", "-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("architectures", "served", "others"),
    [
        (build.setup_functions()["ARCHITECTURES"], "8.0 8.6 8.9 9.0 10.0 10.3 12.0 12.1 13.0", "7.5 8.7 11.0"),
        ("8.7", "8.7", "8.0 8.6 8.9 9.0"),
        ("8.0+PTX", "8.0 8.6 8.7 8.9 9.0 12.0", "7.5"),
        ("8.6;9.0a+PTX", "8.6 8.9 9.0", "8.0 8.7 10.0"),
        ("Ampere", "8.0 9.0", ""),
    ],
)
def test_the_gpus_that_a_build_serves(architectures, served, others):
    """The default serves every GPU from 8.0 on but Jetson's; docs/install.md says so."""
    for names, expected in ((served, True), (others, False)):
        for name in names.split():
            major, minor = map(int, name.split("."))
            assert cuda.runs_on(architectures, (major, minor)) is expected, name


def test_a_gpu_without_code_is_refused(monkeypatch):
    monkeypatch.setattr(cuda, "_device_refusals", {})
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    monkeypatch.setattr(cuda, "build_info", lambda: {"architectures": "9.0 10.0"})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6 + index))
    assert cuda._device_refusal(0) == "a GPU of compute capability 8.6 (this build has code for 9.0 10.0)"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert cuda._device_refusal(1) is None


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_87", "sm_100", "sm_121"])
def test_kernels_spill_nothing(arch, tmp_path):
    """Those of sm_87, a Jetson's, with host code for aarch64 where there is a compiler for it."""
    made = tmp_path / "x.o"
    cross = aarch64.compiler() if arch == "sm_87" else None
    host = ["-ccbin", cross, f"-I{CUDA_HOME}/include", "-c"] if cross else ["-cubin"]
    told = nvcc(*host, f"-arch={arch}", "--resource-usage", "-o", made, KERNELS)
    usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", told)
    assert len(usage) >= KERNELS.read_text().count("Path::k")  # and the functions that they call
    assert set(usage) == {("0", "0", "0")}
    if cross:
        assert made.read_bytes()[18:20] == b"\xb7\x00"  # ELF's number of aarch64


@needs_nvcc
@needs_cross
@pytest.mark.parametrize("name", ["cuda", "cpu"])
def test_the_bindings_compile_for_aarch64(name):
    """By the headers of this machine's PyTorch, Python and CUDA: there is nothing of theirs for aarch64 to link with."""
    extension = build.setup_functions()[f"{name}_extension"]()
    flags = extension.extra_compile_args
    includes = [*extension.include_dirs, *cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    command = [str(aarch64.compiler()), *(flags["cxx"] if isinstance(flags, dict) else flags), "-fsyntax-only"]
    command += [f"-I{path}" for path in [*includes, f"{CUDA_HOME}/include"]]
    done = subprocess.run(
        [*command, str(ROOT / f"csrc/{name}/binding.cpp")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
