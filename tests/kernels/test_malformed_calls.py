"""Malformed calls of the raw ops by the thousand: an error that names an argument, or the right result."""

import os
import subprocess
import sys
from pathlib import Path

import fuzz_raw_ops
import pytest

from ghostfused.backends import cpu

needs_kernel = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
FUZZ = Path(fuzz_raw_ops.__file__)


@needs_kernel
@pytest.mark.parametrize("seed", [1, 2])
def test_malformed_calls(seed, tmp_path):
    """GHOSTFUSED_FUZZ_CALLS makes it more of them, and GHOSTFUSED_FUZZ_SEED others."""
    calls = int(os.environ.get("GHOSTFUSED_FUZZ_CALLS", "2500"))
    seed += int(os.environ.get("GHOSTFUSED_FUZZ_SEED", "0"))
    trace = tmp_path / "trace"
    command = [sys.executable, FUZZ, "--calls", str(calls), "--seed", str(seed), "--trace", trace]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    last = trace.read_text() if trace.exists() else "none"
    assert run.returncode == 0, f"exit {run.returncode} at call {last}of seed {seed}: {run.stderr[-6000:]}"
    print(run.stdout)
    assert f"{calls} calls" in run.stdout


def test_malformed_calls_of_the_reference():
    counts = fuzz_raw_ops.run(seed=3, calls=150, backend="reference")
    assert counts["error"] > 0, counts
    assert counts["right result"] > 0, counts
