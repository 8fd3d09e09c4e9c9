"""Small real networks and one comparison, for the tests of what people do with fused networks."""

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

from ghostfused import FusedGhostBottleneck, FusedGhostModule, backends
from ghostfused.models import paper
from ghostfused.testing import TOLERANCES, relative_error
from ghostfused.verify import calibrate

KERNEL = "reference" if backends.BACKENDS["cpu"].unavailable() else "cpu"
"""What runs a fused module on this machine's CPU."""


@functools.cache
def _build(name: str) -> nn.Module:
    torch.manual_seed(1)
    if name == "small":
        model: nn.Module = nn.Sequential(
            paper.ConvBnAct(3, 8),
            paper.GhostBottleneck(8, 17, 12, stride=2, se_ratio=0.25),
            paper.GhostBottleneck(12, 24, 12),
        )
    elif name == "attention":
        ghostnet = pytest.importorskip("timm.models.ghostnet")
        model = nn.Sequential(
            paper.ConvBnAct(3, 8),
            ghostnet.GhostBottleneck(8, 16, 12, mode="attn"),
            ghostnet.GhostBottleneck(12, 25, 12, mode="attn"),
        )
    elif name == "yolov8n-ghost":
        tasks = pytest.importorskip("ultralytics.nn.tasks")
        model = tasks.DetectionModel("yolov8n-ghost.yaml", nc=3, verbose=False)
    else:
        model = pytest.importorskip("timm").create_model(name, num_classes=7)
    return calibrate(model, torch.randn(2, 3, 64, 64))


def network(name: str) -> nn.Module:
    """A network in eval mode, whose output depends on every layer; fresh at every call."""
    return copy.deepcopy(_build(name))


def first(out) -> Tensor:
    """The tensor of a detector's output, which in eval mode has more to it."""
    return out if isinstance(out, Tensor) else out[0]


def assert_same(out, model: nn.Module, x: Tensor) -> None:
    """``out`` is as near to ``model`` of x in float64 as ``model`` itself, within the limits of all tests."""
    with torch.no_grad():
        expected = first(copy.deepcopy(model).double()(x.double()))
        own_error = relative_error(first(model(x)), expected)
    assert expected.abs().max() > 0.01
    tolerance = TOLERANCES[x.dtype]
    assert relative_error(first(out), expected) <= max(tolerance.factor * own_error, tolerance.floor)


def fused_inside(model: nn.Module) -> tuple[int, int]:
    """How many fused Ghost modules and bottlenecks ``model`` has."""
    modules = list(model.modules())
    return tuple(sum(isinstance(m, kind) for m in modules) for kind in (FusedGhostModule, FusedGhostBottleneck))
