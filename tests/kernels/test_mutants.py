"""Faults planted in the CUDA kernels: the cases must find each. See tests/mutants.

Each takes a compiler and a run of its own, up to half a minute of a core, so one of each table is planted here, of a kernel that
compiles in seconds. ``python -m tests.mutants``, or GHOSTFUSED_ALL_MUTANTS=1, plants all.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from cuda_runtime import ON_CPU, needs_cuda
from mutants import harness
from mutants.mutants import MUTANTS

needs_tools = pytest.mark.skipif(harness.missing() is not None, reason=str(harness.missing()))
QUICK = {
    "no barrier before the staged output is stored",
    "no ghosts: no barrier between the weights and the 1×1 conv",
    "NCHW: the halo starts a row late",
    "no barrier before the sums of pixels are added",
    "no barrier between a tile's rows and its columns",
}
SOME = [mutant for mutant in MUTANTS if mutant.name in QUICK]
PLANTED = MUTANTS if "GHOSTFUSED_ALL_MUTANTS" in os.environ else SOME
ORDERS = sorted({mutant.order for mutant in PLANTED})
"""In which the faults are found."""
KERNELS = sorted({kernel for mutant in PLANTED for kernel in mutant.kernels})


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_the_fault_has_its_place(mutant):
    assert (harness.CSRC / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.new != mutant.old


def test_kernels_have_their_names():
    assert {mutant.name for mutant in MUTANTS} >= QUICK
    harness.kernel_tables({kernel for mutant in MUTANTS for kernel in mutant.kernels})
    with pytest.raises(ValueError, match="got float16_dw5_nhwc"):
        harness.kernel_tables(["float16_any_nhwc", "float16_dw5_nhwc"])


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("order", ORDERS if ON_CPU else ORDERS[:1])
def test_cases_pass_without_a_fault(order):
    """In the extension itself, so that what finds a fault below is the fault's."""
    command = [sys.executable, harness.SUBSET, *KERNELS]
    folders = os.pathsep.join(map(str, (harness.ROOT, harness.ROOT / "tests" / "helpers")))
    environment = os.environ | {"PYTHONPATH": folders, "SHIM_ORDER": order}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]


@needs_tools
@pytest.mark.parametrize("mutant", PLANTED, ids=lambda m: m.name)
def test_cases_find_the_fault(mutant, host_objects, tmp_path):
    found = harness.find(tmp_path / "mutant", host_objects, mutant.kernels, mutant)
    assert found is not None
    assert found.startswith(tuple(ORDERS)), "the test above runs the cases in other orders"
