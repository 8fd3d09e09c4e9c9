"""The CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer: without Torch, and under the first
two the ops as well, with malformed calls."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cpu_sources
import pytest
import torch
from torch.utils import cpp_extension

from ghostfused.backends import cpu

ROOT = Path(__file__).parents[2]
CPU = ROOT / "csrc" / "cpu"
COMMON = [CPU / "dispatch.cpp", CPU / "pool.cpp"]
DRIVER, BINDING = ROOT / "tests" / "helpers" / "cpu_driver.cpp", CPU / "binding.cpp"
ISAS = ["baseline", "avx2", "avx512vl", "avx512vl_bf16", "avx512", "avx512_bf16", "avx512_amx"]
# Units are cut by the length of a vector, and threads share nothing else: one instruction set of each length.
ISAS_WITH_THREADS = ["baseline", "avx2", "avx512_bf16"]

CASES = [  # as tests/helpers/cpu_driver.cpp describes them
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
    "ghost 2 70 7 7 37 2 3 nhwc bfloat16 1",  # where matrices are multiplied: a part of one left, and none
    "ghost 1 64 5 6 70 2 3 nhwc bfloat16 0",
    "ghost 2 20 5 3 37 2 5 nchw bfloat16 0",
    "ghost 1 20 28 19 90 2 3 nchw float32 0",  # threads share rows; of packed panels too
    "ghost 1 21 15 17 37 2 5 nchw bfloat16 1",
    "ghost 1 40 14 14 37 2 3 nhwc float32 0",
    "ghost 1 40 14 14 70 2 3 nhwc bfloat16 0",  # a row at a tile's end has fewer pixels than a matrix
    "ghost 1 34 16 5 37 2 5 nhwc bfloat16 1",
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
    "conv 1 70 41 23 52 3 1 nchw float32 1",  # several tiles, with borders that are kept
    "conv 1 70 41 23 52 3 1 nhwc float32 0",
    "conv 1 66 33 5 40 3 1 nhwc bfloat16 0",
    "conv 1 6 9 64 12 3 2 nchw float32 0",  # rows of whole vectors
    "conv 2 5 7 32 12 5 1 nchw bfloat16 1",
    "conv 1 9 3 5 9 3 3 nchw float32 1",  # no column between two rows
    "conv 2 24 37 1 36 5 2 nchw bfloat16 1",  # more pixels in a vector than in a row
    "conv 2 33 19 18 37 3 2 nhwc bfloat16 1",
    "depthwise 2 5 9 11 3 3 2 nchw float32 0",
    "depthwise 2 21 9 11 3 3 2 nhwc float32 1",
    "depthwise 1 5 14 14 5 5 2 nchw float32 1",
    "depthwise 1 70 7 7 5 5 1 nhwc bfloat16 0",
    "depthwise 2 3 2 40 1 5 1 nchw float16 1",
    "depthwise 2 3 40 2 5 1 1 nhwc float16 1",
    "depthwise 3 3 1 1 7 7 2 nchw float32 0",
    "depthwise 1 3 28 28 3 3 2 nchw float32 0",
    "depthwise 1 130 17 9 5 5 2 nhwc float32 0",
    "depthwise 2 3 13 37 3 3 2 nchw bfloat16 0",
    "depthwise 1 3 8 66 5 5 2 nchw float16 1",
    "squeeze 2 21 7 9 6 0 0 nchw float32 1",
    "squeeze 2 21 7 9 6 1 0 nhwc float32 0",
    "squeeze 5 200 3 3 30 2 0 nchw bfloat16 1",
    "squeeze 1 21 14 3 6 1 0 nchw float32 0",
    "squeeze 1 21 14 3 6 1 0 nhwc bfloat16 0",
    "squeeze 1 3 1 1 1 0 0 nhwc float16 0",
    "squeeze 2 21 7 9 0 0 0 nchw float32 0",
    "squeeze 2 21 7 9 0 0 0 nhwc bfloat16 0",
    "convert 2 21 7 9 0 0 0 nchw float32 0",
    "convert 3 17 5 33 0 0 0 nhwc bfloat16 0",
    "convert 1 3 40 41 0 0 0 nhwc float16 0",
    "cast 3 21 1 2 0 0 0 nchw float32 0",
    "cast 2 9001 1 0 0 0 0 nchw bfloat16 0",
    "cast 70 37 3 1 0 0 0 nchw float32 0",
    "cast 1 45 2 2 0 0 0 nchw float16 0",
    "concat 2 21 7 9 3 0 0 nchw float32 0",
    "concat 1 40 20 19 7 130 1 nhwc float32 0",
    "concat 3 1 1 5 17 2 0 nchw bfloat16 1",
    "concat 1 17 30 20 33 5 0 nhwc float16 1",
    "maxpool 2 21 7 9 5 1 0 nchw float32 0",
    "maxpool 1 21 20 37 3 2 0 nchw bfloat16 0",
    "maxpool 1 5 9 530 13 2 0 nchw float32 0",
    "maxpool 1 3 28 5 5 1 0 nchw float16 0",
    "maxpool 2 37 7 9 5 1 0 nhwc float32 0",
    "maxpool 1 150 28 19 3 2 0 nhwc bfloat16 0",
    "maxpool 1 5 3 130 7 1 0 nhwc float16 0",
    "maxpool 3 70 1 1 9 2 0 nhwc float32 0",
    "avgpool 2 21 7 9 2 0 0 nchw float32 0",
    "avgpool 1 5 28 67 2 0 0 nchw bfloat16 0",
    "avgpool 1 3 20 37 3 0 0 nchw float16 0",
    "avgpool 2 37 9 7 2 0 0 nhwc bfloat16 0",
    "avgpool 1 70 14 30 7 0 0 nhwc float32 0",
    "upsample 2 21 7 9 0 2 0 nchw float32 0",
    "upsample 1 3 5 37 0 3 0 nchw bfloat16 0",
    "upsample 2 37 9 7 0 2 0 nhwc float16 0",
    "upsample 1 1 9 7 0 2 0 nhwc float16 0",
    "gate 3 21 1 0 0 0 0 nchw float32 0",
    "gate 2 9001 1 1 0 0 0 nchw bfloat16 0",
    "gate 70 37 3 0 0 0 0 nchw float16 0",
    "gate 1 45 2 2 0 0 0 nchw float32 0",
]


pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
both = pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])


def found(isas: list[str]) -> list[str]:
    """Those that this CPU has, where the extension can tell, for compiling one takes longer than running it; in the place of
    one with bf16 that it lacks, the twin without."""
    built = cpu.build_info() if cpu.unavailable() is None else None
    if built is None:
        return isas
    here = [isa if isa in built["supported"] else isa.removesuffix("_bf16") for isa in isas]
    return [isa for isa in dict.fromkeys(here) if isa in built["supported"]]


def compiler(sanitizers: str, tmp_path: Path) -> list:
    """g++ and its flags; skips the test where it lacks these sanitizers.

    What is undefined ends the process by SIGILL, without a word: the messages' tables and calls take longer to compile than
    the kernels. To read them, leave that flag out. AddressSanitizer's checks are calls for that reason too. It sees what
    is read through a null pointer or beyond an object, for all of which each access would have another check.
    """
    flags = ["-std=c++20", f"-I{ROOT / 'csrc'}", "-O0", "-g1", "-fPIC", f"-fsanitize={sanitizers}"]
    command = ["g++", *flags, "-fno-sanitize-recover=all", "-fsanitize-undefined-trap-on-error"]
    command += ["--param", "asan-instrumentation-with-call-threshold=0", "-fno-sanitize=null,object-size,vptr"]
    probe = [*command, "-x", "c++", "-", "-o", tmp_path / "probe"]
    if subprocess.run(probe, input=b"int main() {}", capture_output=True).returncode:
        pytest.skip(f"this g++ has no -fsanitize={sanitizers}")
    return command


@both
def test_the_pool(sanitizers, tmp_path):
    sources = [ROOT / "tests" / "helpers" / "cpu_pool_driver.cpp", CPU / "pool.cpp"]
    subprocess.run([*compiler(sanitizers, tmp_path), *sources, "-o", tmp_path / "pool"], check=True)
    run = subprocess.run([tmp_path / "pool"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, f"{run.stdout}{run.stderr[:6000]}"


@both
def test_sanitizers_find_nothing(sanitizers, tmp_path):
    command = compiler(sanitizers, tmp_path)
    isas = found(ISAS if "address" in sanitizers else ISAS_WITH_THREADS)
    files = [*(CPU / "isa" / f"{isa}.cpp" for isa in isas), *COMMON, tmp_path / "absent_kernels.cpp"]
    files[-1].write_text(cpu_sources.absent_kernels(isa for isa in ISAS if isa not in isas))

    def compile_one(source: Path) -> Path:
        target = tmp_path / f"{source.stem}.o"
        torch_flags = _torch_flags() if source == BINDING else []
        subprocess.run([*command, *torch_flags, "-c", source, "-o", target], check=True, capture_output=True, text=True)
        return target

    with_ops = "address" in sanitizers and cpu.unavailable() is None
    with ThreadPoolExecutor(2) as pool:
        # the longest first
        binding, main, *kernels = pool.map(compile_one, [BINDING if with_ops else DRIVER, DRIVER, *files])
    driver = tmp_path / "driver"
    subprocess.run([*command, main, *kernels, "-o", driver], check=True)
    if with_ops:
        _malformed_calls([*command, "-shared", binding, *kernels], tmp_path)
    checksums = {}
    for isa in isas:
        for threads in ("1", "3") if "address" in sanitizers else ("3",):  # one thread has no race
            run = subprocess.run(
                [driver, "--isa", isa, "--threads", threads, *" ".join(CASES).split()], capture_output=True, text=True
            )
            if "no such instruction set here" in run.stderr and cpu.unavailable() is not None:
                continue
            assert run.returncode == 0, f"{isa}, {threads} threads:\n{run.stdout}{run.stderr[:6000]}"
            assert run.stdout == checksums.setdefault(isa, run.stdout)
    assert "baseline" in checksums


def _torch_flags() -> list[str]:
    """As setup.py compiles the binding."""
    folders = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    return [
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        "-DTORCH_EXTENSION_NAME=_cpu",
        *(f"-I{path}" for path in folders),
    ]


def _malformed_calls(link: list, tmp_path: Path) -> None:
    """tests/helpers/fuzz_raw_ops.py, on a copy of the package with an extension that ``link`` makes."""
    package = tmp_path / "ghostfused"
    package.mkdir()
    for path in (ROOT / "ghostfused").iterdir():
        if path.suffix != ".so":
            (package / path.name).symlink_to(path)
    library = package / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    torch_libraries = Path(torch.__file__).parent / "lib"
    subprocess.run(
        [*link, f"-L{torch_libraries}", "-lc10", "-ltorch", "-ltorch_cpu", f"-Wl,-rpath,{torch_libraries}", "-o", library],
        check=True,
    )  # fmt: skip
    # the sanitizer wants to be first, and the library whose exceptions it watches with it
    preloaded = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(preloaded), "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "2",
        # Python and PyTorch keep what they have; what PyTorch can't allocate is an error there
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
    }  # fmt: skip
    command = [sys.executable, ROOT / "tests" / "helpers" / "fuzz_raw_ops.py", "--calls", "400", "--seed", "7"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert run.returncode == 0, f"{run.stdout}{run.stderr[-8000:]}"
    print(run.stdout)
    assert f"{library.parent}" in run.stdout
