"""Runs all the tests that this machine can run: ``make test``.

Three environments, since each has to be set before torch or Triton is imported:

1. as it is: everything that needs no kernel, and on a GPU the kernels too;
2. Triton's interpreter, where there is no GPU;
3. the compiled CUDA extension on the CPU, where there is no GPU and PTX_ON_CPU names a ptx-on-cpu folder; its kernels are
   translated while the other two run.

The marks ``triton`` and ``cuda`` tell which tests the last two run; on a GPU, ``-m "cuda or triton"`` are those that use it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
sys.path.insert(0, str(ROOT))
from tests.helpers import ptx_in_parts  # noqa: E402

PLACES = {
    "triton": ["tests/kernels", "tests/training"],
    "cuda": ["tests/kernels", "tests/training", "tests/export", "tests/bench/test_bench_on_gpu.py"],
}
"""Where tests with these marks are: importing all the others takes as long as many tests. tests/docs/test_rooms.py checks it."""
PYTEST = [sys.executable, "-m", "pytest", "-rfEs", "--durations=25", "-p", "no:cacheprovider"]


def run(title: str, command: list[str], **environment: str) -> bool:
    print(f"\n== {title}", flush=True)
    ok = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}).returncode == 0
    if not ok:
        print(f"== FAILED: {title}", flush=True)
    return ok


def main() -> int:
    import torch

    gpu = torch.cuda.is_available()
    # each worker takes a half in order, so that few fixtures of a module are made twice, and whoever is done takes from the other
    workers = [] if gpu else ["-n", "2", "--dist", "worksteal"]
    if workers:
        os.environ.setdefault(
            "OMP_NUM_THREADS", "1"
        )  # two processes with threads for all cores would wait for each other
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # a hundred processes would compile the same files
    os.environ["PYTHON"] = sys.executable  # the one whose triton has the disassembler that run-extension needs
    tool = os.environ.get("PTX_ON_CPU")
    if tool:
        os.environ["PTX_ON_CPU"] = tool = str((ROOT / tool).resolve())
        os.environ.update(ptx_in_parts.variables())
    extension = next((ROOT / "ghostfused").glob("_C*.so"), None)
    pytest = [*PYTEST, *workers]
    now = "" if gpu else "not triton and not cuda" if tool and extension else "not triton"
    runner = [f"{tool}/run-extension", str(extension)]
    translated = None
    if tool and extension and not gpu:
        # of the PTX: to optimize the kernels too takes longer than all the tests
        os.environ.setdefault("OPT", "-O1")
        os.environ.setdefault("FLAGS", "-include tests/helpers/ptx_kernels.h")
        # It is cached. Beside the tests, with what they leave of the cores: its beginning, and each stage's end, keep
        # one busy alone. nproc, by which the tool counts its compilers, is what OMP_NUM_THREADS says.
        every_core = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count())}
        translated = subprocess.Popen(["nice", "-n", "19", *runner, "true"], cwd=ROOT, env=every_core)
    results = [run("tests", [*pytest, "tests", "-m", now])]
    if not gpu:
        results.append(
            run("Triton kernels in the interpreter", [*pytest, *PLACES["triton"], "-m", "triton"], TRITON_INTERPRET="1")
        )
    if translated:
        results.append(translated.wait() == 0)
        if results[-1]:
            results.append(run("compiled CUDA kernels on the CPU", [*runner, *pytest, *PLACES["cuda"], "-m", "cuda"]))
        else:
            print("== FAILED: translation of the compiled CUDA kernels", flush=True)
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
