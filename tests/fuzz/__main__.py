"""``python -m tests.fuzz`` draws modules, bottlenecks, networks and malformed calls of the raw ops, and prints how many were
wrong or crashed: exit status 1 if any. ``--modules 5 --first 37`` draws those from number 37 on alone."""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import math
import os
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Generator
from pathlib import Path
from typing import Any

from ghostfused.backends import BACKENDS
from ghostfused.cli import inputs

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "helpers"))

COUNTS = {"modules": 10_000, "bottlenecks": 1_000, "networks": 500, "calls": 5_000}


def work(kind: str, backend: str, seed: int, first: int, count: int) -> None:
    """The trials in this process: a line for each, with its number and what came of it."""
    import fuzz_raw_ops
    import torch

    from .trials import trial

    if os.environ.get("TRITON_INTERPRET") == "1":
        import quick_interpreter

        quick_interpreter.install()
    on_cuda = _with_torch_on_cuda() if backend == "cuda" else None  # noqa: F841  lives as long as what runs
    torch.set_num_threads(1)
    if kind == "calls":  # what takes this much has gone wrong, and would take the machine along
        resource.setrlimit(resource.RLIMIT_AS, (fuzz_raw_ops.MEMORY, fuzz_raw_ops.MEMORY))
    for number in range(first, first + count):
        try:
            outcome = trial(kind, seed, number, backend)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
            outcome = "WRONG " + " ".join(text.split())
        print(number, outcome, flush=True)


def _with_torch_on_cuda() -> Any:
    """Under ptx-on-cpu, which runs our kernels alone, PyTorch's own by the CPU's; each tensor still is an allocation of its own,
    so that no access outside of one goes unseen."""
    import cuda_runtime
    import fake_gpu

    if not cuda_runtime.ON_CPU:
        return None
    caching = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    library = fake_gpu.install()
    os.environ.update(caching)
    return library


def outcomes(kind: str, backend: str, seed: int, first: int, count: int) -> Generator[tuple[int, str]]:
    """The trials in other processes: after one that kills its process the next goes on."""
    end = first + count
    while first < end:
        command = [
            sys.executable,
            "-m",
            "tests.fuzz",
            "--seed",
            str(seed),
            "--backend",
            backend,
            "--work",
            kind,
            str(first),
            str(end - first),
        ]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            try:
                for line in process.stdout or ():
                    number, _, outcome = line.rstrip("\n").partition(" ")
                    if number != str(first):  # somebody else's print
                        continue
                    yield first, outcome
                    first += 1
            except GeneratorExit:  # nobody asks for more
                process.kill()
                raise
        if first < end:
            yield first, f"CRASH exit status {process.returncode}"
            first += 1


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    for kind, count in COUNTS.items():
        parser.add_argument(
            f"--{kind}", type=inputs.positive, metavar="N", help=f"how many; {count} where no kind is named"
        )
    parser.add_argument("--seed", type=inputs.seed, default=0)
    parser.add_argument("--first", type=inputs.count, default=0, help="number of the first")
    parser.add_argument(
        "--backend", default="cpu", choices=list(BACKENDS), help="of the calls: cpu, reference, cuda (on a GPU, or under ptx-on-cpu's run-extension), "
        "triton or triton_two_kernel (on a GPU, or with TRITON_INTERPRET=1)"
    )  # fmt: skip
    parser.add_argument("--minutes", type=inputs.amount, default=math.inf, help="at most, for each kind")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.work:
        kind, first, count = options.work
        work(kind, options.backend, options.seed, int(first), int(count))
        return 0
    return inputs.in_one_line("python -m tests.fuzz", functools.partial(draw, options))


def draw(options: argparse.Namespace) -> int:
    """Prints what came of the trials; 1 if any was wrong or crashed."""
    if reason := BACKENDS[options.backend].unavailable():
        raise inputs.BadInput(f"--backend {options.backend}: {reason}")
    named = {kind: n for kind in COUNTS if (n := getattr(options, kind)) is not None}
    failed = 0
    for kind, count in (named or COUNTS).items():
        counts: collections.Counter[str] = collections.Counter()
        start, drawn = time.monotonic(), outcomes(kind, options.backend, options.seed, options.first, count)
        with contextlib.closing(drawn):
            for number, outcome in drawn:
                bad = outcome.startswith(("WRONG ", "CRASH "))
                counts[outcome.partition(" ")[0] if bad else outcome] += 1
                if bad:
                    print(f"{kind}: number {number} of seed {options.seed}: {outcome}", flush=True)
                if time.monotonic() - start > 60 * options.minutes:
                    break
        wrong, crashed = counts.pop("WRONG", 0), counts.pop("CRASH", 0)
        failed += wrong + crashed
        right = ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items()))
        total = wrong + crashed + counts.total()
        of = f" of {options.backend}" if kind == "calls" else ""
        print(
            f"{kind}{of}: {total} drawn by seed {options.seed} in {time.monotonic() - start:.0f} s: "
            f"{wrong} wrong, {crashed} crashed; {right or 'none right'}",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))
