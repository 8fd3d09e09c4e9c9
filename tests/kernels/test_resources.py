"""What the compiler made of the CUDA kernels: nothing lies in local memory. ``tools.resources`` reads it with no GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
from cuda_runtime import _C, needs_extension

from tools import resources
from tools.sass import build

pytestmark = [
    needs_extension,
    pytest.mark.skipif(
        build.nvidia_tool("cuobjdump") is None, reason="no cuobjdump: install triton or the CUDA toolkit"
    ),
]


def test_no_kernel_of_the_built_extension_spills():
    rows = list(resources.resources(Path(_C.__file__)))
    assert rows
    assert len({(row.kernel, row.arch) for row in rows}) == len(rows)
    assert [row for row in rows if row.local_bytes] == []
    assert all(0 < row.registers <= 255 for row in rows)


def test_names_and_the_systems_shared_memory(monkeypatch):
    usage = "REG:40 STACK:8 SHARED:1536 LOCAL:4 CONSTANT[0]:9"
    symbol = "_ZN10ghostfused13ghost_forwardILNS_4PathE0ELi3ELb1EEEvNS_12KernelParamsE"
    text = "".join(f"arch = {arch}\n Function {symbol}:\n  {usage}\n" for arch in ("sm_80", "sm_90"))
    run = subprocess.run

    def cuobjdump(command, **options):
        return subprocess.CompletedProcess(command, 0, text) if "-res-usage" in command else run(command, **options)

    monkeypatch.setattr(subprocess, "run", cuobjdump)
    found = list(resources.resources(Path("x.so")))
    assert found == [
        resources.Resources("ghost_forward<0, 3, true>", arch, 40, 12, shared)
        for arch, shared in (("sm_80", 1536), ("sm_90", 512))
    ]
    text = "no code"
    with pytest.raises(ValueError, match=r"x\.so: cuobjdump found no machine code"):
        list(resources.resources(Path("x.so")))


@pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))
@pytest.mark.parametrize(("arch", "shared"), [("sm_87", 512), ("sm_90", 512)])
def test_a_source_compiled_for_another_architecture(arch, shared, tmp_path):
    source = tmp_path / "small.cu"
    source.write_text("__global__ void small(int* out) { __shared__ int x[128]; x[threadIdx.x] = 1; __syncthreads();\n"
                      "out[threadIdx.x] = x[127 - threadIdx.x]; }\n")  # fmt: skip
    (row,) = resources.resources(resources.compiled(source, arch, tmp_path), arch)
    assert (row.kernel, row.arch, row.local_bytes, row.shared_bytes) == ("small", arch, 0, shared)
    source.write_text("not C++")
    with pytest.raises(RuntimeError, match=r"small\.cu"):
        resources.compiled(source, arch, tmp_path)


def test_the_command():
    command = [sys.executable, "-m", "tools.resources"]
    done = subprocess.run(command, cwd=build.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("kernels; 0 of them spill registers")
