"""Malformed calls of the raw ops by the thousand: an error that names an argument, or the right result.

Of CUDA's and Triton's, which take their time where no GPU is, a few here; ``python -m tests.fuzz --backend cuda --calls 5000`` and
the like draw more.
"""

import os
import subprocess
import sys
from pathlib import Path

import fuzz_raw_ops
import pytest
import torch
from kernel_backends import on

from ghostfused import ops
from ghostfused.backends import cpu
from ghostfused.spec import tensor_names
from ghostfused.testing import Case, DepthwiseCase, make

needs_kernel = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
FUZZ = Path(fuzz_raw_ops.__file__)


@needs_kernel
def test_malformed_calls(tmp_path):
    """GHOSTFUSED_FUZZ_CALLS makes it more of them, and GHOSTFUSED_FUZZ_SEED others."""
    calls = int(os.environ.get("GHOSTFUSED_FUZZ_CALLS", "2500"))
    seed = int(os.environ.get("GHOSTFUSED_FUZZ_SEED", "1"))
    trace = tmp_path / "trace"
    command = [sys.executable, FUZZ, "--calls", str(calls), "--seed", str(seed), "--trace", trace]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    last = trace.read_text() if trace.exists() else "none"
    assert run.returncode == 0, f"exit {run.returncode} at call {last}of seed {seed}: {run.stderr[-6000:]}"
    print(run.stdout)
    assert f"{calls} calls" in run.stdout


@on("reference", "cuda", "triton")
def test_malformed_calls_of_other_backends(backend):
    calls = {"reference": 150, "cuda": 150, "triton": 25}[backend.name]
    counts = fuzz_raw_ops.run(seed=3, calls=calls, backend=backend.name)
    print(backend.name, dict(counts))
    assert counts["error"] > 0, counts
    assert counts["right result"] > 0, counts


@on("reference", "cuda", "triton")
def test_no_op_returns_memory_that_nobody_filled(backend):
    """One tensor on the meta device is enough to get to an op's fake, which fills no memory."""
    a = make(Case(2, 4, 3, 3))
    needs = [t is not None for t in a.tensors]
    grad = torch.randn(a.output_shape())
    given = backend.there(a)
    for wrong in (given._replace(x=given.x.to("meta")), given._replace(primary_mean=given.primary_mean.to("meta"))):
        with pytest.raises((RuntimeError, ValueError), match="expected x's device"):
            ops.training_op("backward", backend.name)(grad.to(backend.device), *wrong, True, "", needs)
    with pytest.raises((RuntimeError, ValueError), match="grad_output: expected x's device"):
        ops.training_op("backward", backend.name)(grad.to("meta"), *given, True, "", needs)


@pytest.mark.parametrize("name", ["mean", "var"])
def test_a_gradient_that_pytorch_has_not_is_refused_by_name(name):
    a = make(DepthwiseCase())
    needs = [each == name for each in tensor_names(type(a))]
    with pytest.raises(ValueError, match=f"needs_grad: expected no gradient of {name}"):
        ops.backward_op("depthwise")(torch.randn(a.output_shape()), *a, needs)
