"""The CPU kernels, without Torch, under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [ROOT / "tests" / "cpu_driver.cpp", *sorted((ROOT / "csrc" / "cpu").glob("kernel*.cpp"))]
ISAS = ["baseline", "avx2", "avx512vl", "avx512vl_bf16", "avx512", "avx512_bf16"]

CASES = [  # as tests/cpu_driver.cpp describes them
    "ghost 2 5 7 7 12 2 3 nchw float32 0",
    "ghost 2 5 7 7 12 2 3 nhwc float32 0",
    "ghost 1 40 9 19 20 2 5 nchw float32 0",
    "ghost 1 40 9 19 20 2 5 nhwc float32 0",
    "ghost 3 3 1 1 1 2 3 nchw float32 1",
    "ghost 3 3 1 1 1 2 3 nhwc float32 1",
    "ghost 2 17 6 3 5 3 7 nchw float16 1",
    "ghost 2 17 6 3 5 3 7 nhwc float16 1",
    "ghost 1 33 30 33 26 2 3 nchw bfloat16 1",
    "ghost 1 33 30 33 26 2 1 nhwc bfloat16 1",
    "ghost 1 300 56 56 9 2 3 nchw float32 0",
    "ghost 2 20 7 7 90 2 3 nchw float32 0",  # packed panels
    "ghost 2 20 13 14 90 2 3 nchw float32 1",
    "ghost 2 20 13 14 90 2 3 nchw bfloat16 0",
    "ghost 2 21 13 14 90 2 3 nchw bfloat16 1",
    "ghost 2 20 9 11 37 2 3 nhwc bfloat16 0",  # read as it lies where bf16 is multiplied in pairs
    "ghost 2 21 9 11 37 2 5 nhwc bfloat16 0",
    "ghost 2 20 5 3 37 2 5 nchw bfloat16 0",
    "ghost 2 20 9 11 37 1 1 nchw float32 0",
    "ghost 2 20 9 11 37 1 1 nhwc float32 1",
    "ghost 3 20 1 1 37 1 1 nchw float32 1",
    "ghost 5 21 1 1 6 1 1 nchw float16 0",
    "conv 1 3 20 30 16 3 2 nchw float32 0",
    "conv 1 3 20 30 16 3 2 nhwc float32 0",
    "conv 2 5 9 11 19 5 1 nchw bfloat16 1",
    "conv 2 5 9 11 19 5 2 nhwc bfloat16 0",
    "conv 2 5 2 35 9 3 2 nchw float16 1",
    "conv 2 5 2 35 9 7 1 nhwc float32 1",
    "conv 2 4 1 1 9 3 1 nchw float32 0",
    "depthwise 2 5 9 11 3 3 2 nchw float32 0",
    "depthwise 2 21 9 11 3 3 2 nhwc float32 1",
    "depthwise 1 5 14 14 5 5 2 nchw float32 1",
    "depthwise 1 70 7 7 5 5 1 nhwc bfloat16 0",
    "depthwise 2 3 2 40 1 5 1 nchw float16 1",
    "depthwise 2 3 40 2 5 1 1 nhwc float16 1",
    "depthwise 3 3 1 1 7 7 2 nchw float32 0",
    "squeeze 2 21 7 9 6 0 0 nchw float32 1",
    "squeeze 2 21 7 9 6 1 0 nhwc float32 0",
    "squeeze 5 200 3 3 30 2 0 nchw bfloat16 1",
    "squeeze 1 3 1 1 1 0 0 nhwc float16 0",
    "squeeze 2 21 7 9 0 0 0 nchw float32 0",
    "squeeze 2 21 7 9 0 0 0 nhwc bfloat16 0",
]


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(sanitizers, tmp_path):
    flags = ["-std=c++20", "-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    if subprocess.run(
        ["g++", *flags, "-x", "c++", "-", "-o", tmp_path / "probe"], input=b"int main() {}", capture_output=True
    ).returncode:
        pytest.skip(f"this g++ has no -fsanitize={sanitizers}")

    def compile_one(source: Path) -> Path:
        target = tmp_path / f"{source.stem}.o"
        subprocess.run(["g++", *flags, "-c", source, "-o", target], check=True, capture_output=True, text=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    driver = tmp_path / "driver"
    subprocess.run(["g++", *flags, *objects, "-o", driver], check=True)
    checksums = {}
    for isa in ISAS:
        for threads in ("1", "3"):
            run = subprocess.run(
                [driver, "--isa", isa, "--threads", threads, *" ".join(CASES).split()], capture_output=True, text=True
            )
            if "no such instruction set here" in run.stderr:
                continue
            assert run.returncode == 0, f"{isa}, {threads} threads:\n{run.stdout}{run.stderr[:6000]}"
            assert run.stdout == checksums.setdefault(isa, run.stdout)
    assert "baseline" in checksums
