"""All tests of the CUDA kernels that are named test_thread_order, in other orders of the CPU runner's threads: there a missing
barrier shows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_runtime import ON_CPU, needs_cuda

TESTS = Path(__file__).parents[1]


@pytest.mark.cuda
@needs_cuda
@pytest.mark.skipif(not ON_CPU, reason="a GPU's order of threads can't be chosen")
@pytest.mark.parametrize("order", ["desc", "rand:7"])
def test_other_orders(order):
    """Not bfloat16's, whose barriers are float16's."""
    files = [*(TESTS / "kernels").glob("test_cuda*.py"), TESTS / "training" / "test_cuda_training.py"]
    command = [sys.executable, "-m", "pytest", *files, "-m", "cuda", "-k", "test_thread_order and not bfloat16"]
    environment = os.environ | {"SHIM_ORDER": order}
    run = subprocess.run(
        [*command, "-p", "no:cacheprovider"], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
