"""Where no kernel could run, a fused model runs the layers that it was made from: the same bits, in the same time."""

import pytest
import torch
from networks import KERNEL, network
from spies import Ops
from torch import nn

from ghostfused import FusedGhostModule, fuse
from ghostfused.models import paper
from ghostfused.nn import batch_statistics


def assert_runs_as_unfused(model: nn.Module, fused: nn.Module, x: torch.Tensor) -> None:
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            with Ops() as unfused_ops:
                expected = model(x)
            for _ in range(3):  # a program would be kept by then
                assert torch.equal(fused(x), expected)
            with Ops() as ops:
                fused(x)
        assert ops.names == unfused_ops.names


@pytest.mark.parametrize("name", ["small", "attention", "ghostnet_100"])
def test_float64(name):
    model = network(name).double()
    assert_runs_as_unfused(model, fuse(model), torch.randn(2, 3, 32, 24, dtype=torch.float64))


def test_float64_compiled():
    model, x = network("small").double(), torch.randn(2, 3, 12, 10, dtype=torch.float64)
    compiled = torch.compile(fuse(model), backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("training", [False, True])
def test_an_input_of_float64_is_named(training):
    """Of a module of float32."""
    fused = fuse(nn.Sequential(paper.GhostModule(6, 8)).eval())
    with torch.no_grad(), pytest.raises((TypeError, RuntimeError), match="float64"):
        fused.train(training)(torch.randn(2, 6, 7, 7, dtype=torch.float64))


@pytest.mark.parametrize("name", ["small", "attention"])
def test_a_device_without_kernels(name, monkeypatch):
    model, x = network(name), torch.randn(2, 3, 32, 24)
    fused = fuse(model)
    monkeypatch.setattr(batch_statistics, "_has_kernels", lambda device: False)
    assert_runs_as_unfused(model, fused, x)


def test_a_backend_by_name_runs_or_says_why_not():
    model = nn.Sequential(paper.GhostModule(6, 8)).double().eval()
    x = torch.randn(2, 6, 7, 7, dtype=torch.float64)
    expected = model(x)
    by_reference = FusedGhostModule.from_module(model[0], backend="reference")
    with Ops() as ops, torch.no_grad():
        torch.testing.assert_close(by_reference(x), expected)
    assert "aten.batch_norm" in ops.names
    if KERNEL == "cpu":
        by_kernels = FusedGhostModule.from_module(model[0])
        by_kernels.backend = "cpu"
        with torch.no_grad(), pytest.raises(RuntimeError, match="float64"):
            by_kernels(x)
