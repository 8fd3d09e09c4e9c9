"""Faults planted in the CUDA kernels: the cases must find each. See tests/mutants.

Each takes a compiler and a run of its own, half a minute of a core, so one or two of each table are planted here. ``python -m tests.mutants``, or
GHOSTFUSED_ALL_MUTANTS=1, plants all.
"""

from __future__ import annotations

import os

import pytest
from mutants import bottleneck, general, harness, nchw, nhwc, training
from mutants.mutants import MUTANTS

needs_tools = pytest.mark.skipif(harness.missing() is not None, reason=str(harness.missing()))
SOME = [
    *general.MUTANTS[:13:12],
    *bottleneck.MUTANTS[:4:3],
    *nhwc.MUTANTS[:11:10],
    *nchw.MUTANTS[:9:8],
    training.MUTANTS[8],
]
PLANTED = MUTANTS if "GHOSTFUSED_ALL_MUTANTS" in os.environ else SOME
KERNELS = sorted({kernel for mutant in PLANTED for kernel in mutant.kernels})


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_the_fault_has_its_place(mutant):
    assert (harness.CSRC / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.new != mutant.old


def test_kernels_have_their_names():
    harness.kernel_tables({kernel for mutant in MUTANTS for kernel in mutant.kernels})
    with pytest.raises(ValueError, match="got float16_dw5_nhwc"):
        harness.kernel_tables(["float16_any_nhwc", "float16_dw5_nhwc"])


@needs_tools
def test_cases_pass_without_a_fault(host_objects, tmp_path):
    assert harness.find(tmp_path / "sound", host_objects, KERNELS, None) is None


@needs_tools
@pytest.mark.parametrize("mutant", PLANTED, ids=lambda m: m.name)
def test_cases_find_the_fault(mutant, host_objects, tmp_path):
    assert harness.find(tmp_path / "mutant", host_objects, mutant.kernels, mutant) is not None
