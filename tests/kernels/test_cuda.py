"""What only the compiled CUDA kernels are asked: thread orders, a device's shared memory, malformed calls; on a GPU, or with
none under ptx-on-cpu. What they compute is in test_ghost.py, test_depthwise.py, test_squeeze_excite.py and test_every_op.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fuzz_raw_ops
import pytest
import torch
from cuda_runtime import _C, ON_CPU, general_only, needs_cuda
from kernel_backends import Backend
from strategies import LAYOUTS

from ghostfused.testing import Case, DepthwiseCase, SqueezeExciteCase

pytestmark = [pytest.mark.cuda, needs_cuda]

CUDA = Backend("cuda")
PATHS = {
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "tf32": {"dtype": torch.float32, "allow_tf32": True},
    "float32": {"dtype": torch.float32},
}
SMALL_DEVICE = 101376
"""Bytes of shared memory for a block on sm_86, sm_89 and sm_120."""


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sm_count", [1, 132])
def test_thread_order(path, layout, sm_count):
    """Pipelines of several chunks and stages, column tiles, several channel blocks; also run in other thread orders."""
    with CUDA.planned_for(sm_count), general_only():  # test_cuda_nchw.py and test_cuda_nhwc.py ask the others
        CUDA.check(
            Case(1, 72, 12, 20, 24, layout=layout, **PATHS[path]),
            Case(1, 8, 15, 11, 64, layout=layout, **PATHS[path]),  # rows that strips don't divide
            Case(1, 200, 7, 7, 40, dw_size=5, layout=layout, input_gate=True, residual=True, **PATHS[path]),
            Case(1, 24, 9, 24, 54, ratio=3, layout=layout, output_gate=True, **PATHS[path]),
            general_too=False,
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sm_count", [1, 132])
def test_thread_order_between_ghost_modules(layout, sm_count):
    """Several blocks of everything."""
    with CUDA.planned_for(sm_count):
        CUDA.check(
            DepthwiseCase(2, 144, 5, 13, (5, 5), dtype=torch.float16, layout=layout),
            DepthwiseCase(1, 5, 36, 33, (3, 3), 1, act="prelu", layout=layout),
            SqueezeExciteCase(5, 136, 40, 5, 7, dtype=torch.float16, layout=layout),
            SqueezeExciteCase(2, 12, 300, 24, 24, layout=layout),
        )


def test_malformed_calls():
    """The binding's own checks; more of them run on the CPU: tests/kernels/test_malformed_calls.py."""
    counts = fuzz_raw_ops.run(seed=3, calls=60, backend="cuda")
    assert counts["error"] > 0, counts
    assert counts["right result"] > 0, counts


@pytest.mark.skipif(not ON_CPU, reason="a GPU's shared memory can't be chosen")
def test_plans_ask_the_device_for_shared_memory(tmp_path):
    """The code is that of sm_80, which has 163 KB; a device may have 99. The runner refuses a launch with more."""
    shape = {"in_channels": 200, "height": 14, "width": 14, "out_channels": 64, "dw_size": 7}
    planned = _C.plan(batch=1, init_channels=32, path="float32", sm_count=4, **shape)
    assert planned["smem_bytes"] > SMALL_DEVICE
    library = tmp_path / "small_device.so"
    source = Path(__file__).parents[1] / "helpers" / "small_device.c"
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    script = (
        f"from kernel_backends import *; Backend('cuda').check(Case(1, dtype=torch.float32, layout='nhwc', **{shape}))"
    )
    environment = {
        "LD_PRELOAD": f"{library}:{os.environ['LD_PRELOAD']}",
        "SHIM_SMEM": str(SMALL_DEVICE),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    run = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
