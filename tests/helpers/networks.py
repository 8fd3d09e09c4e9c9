"""Small real networks and one comparison, for the tests of what people do with fused networks."""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ghostfused import FusedGhostBottleneck, FusedGhostModule, backends
from ghostfused.cli.verify import calibrate
from ghostfused.models import paper
from ghostfused.numerics import TOLERANCES, relative_error, rounded_anew

KERNEL = "reference" if backends.BACKENDS["cpu"].unavailable() else "cpu"
"""What runs a fused module on this machine's CPU."""


STAGES = [
    [[3, 16, 16, 0, 1]], [[3, 48, 24, 0, 2]], [[5, 72, 40, 0.25, 2], [5, 120, 40, 0.25, 1]], [[3, 480, 112, 0.25, 1]],
]  # fmt: skip
"""Of timm's GhostNet one bottleneck of each form: the depthwise kernel, channels inside and after, squeeze-and-excite, stride."""


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
    elif name in ("ghostnet", "ghostnetv2", "ghostnetv3"):
        ghostnet = pytest.importorskip("timm.models.ghostnet")
        model = ghostnet.GhostNet(STAGES, num_classes=7, width=0.5, version=name.removeprefix("ghostnet") or "v1")
    elif name == "yolov8n-ghost":
        tasks = pytest.importorskip("ultralytics.nn.tasks")
        model = tasks.DetectionModel("yolov8n-ghost.yaml", nc=3, verbose=False)
    else:
        model = pytest.importorskip("timm").create_model(name, num_classes=7)
    # a copy: ultralytics' layers all have one activation module, which another network in train mode puts in train mode
    return copy.deepcopy(calibrate(model, torch.randn(2, 3, 64, 64)))


def network(name: str) -> nn.Module:
    """A network in eval mode, whose output depends on every layer; fresh at every call."""
    return copy.deepcopy(_build(name))


def first(out) -> Tensor:
    """The tensor of a detector's output, which in eval mode has more to it."""
    return out if isinstance(out, Tensor) else out[0]


def assert_same(out, model: nn.Module, x: Tensor) -> None:
    """``out`` is as near to ``model`` of x in float64 as ``model`` itself, within the limits of all tests.

    One run's error may be small by luck: ``model``'s is the largest of several, on inputs that differ by less than rounding.
    """
    with torch.no_grad():
        expected = first(copy.deepcopy(model).double()(x.double()))
        own_error = max(relative_error(first(model(each)), expected) for each in (x, *rounded_anew(x, 2)))
    assert expected.abs().max() > 0.01
    tolerance = TOLERANCES[x.dtype]
    assert relative_error(first(out), expected) <= max(tolerance.factor * own_error, tolerance.floor)


def fused_inside(model: nn.Module) -> tuple[int, int]:
    """How many fused Ghost modules and bottlenecks ``model`` has."""
    modules = list(model.modules())
    return tuple(sum(isinstance(m, kind) for m in modules) for kind in (FusedGhostModule, FusedGhostBottleneck))


def gradients(model: nn.Module) -> Tensor:
    """Those of all parameters, in one vector."""
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def assert_same_training(
    fused: nn.Module, model: nn.Module, x: Tensor, step: Callable[[nn.Module, Tensor], Tensor]
) -> None:
    """A training step of ``fused`` is as near to ``model``'s in float64 as ``model``'s own, within the limits of all tests.

    ``step`` runs a forward and a backward pass and returns the loss. One run's error may be small by luck: PyTorch's is the
    largest of several runs, on inputs that differ by less than their rounding.
    """

    def run(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        m = copy.deepcopy(m).train()
        loss = step(m, x)
        return loss.detach().double(), gradients(m)

    expected = run(copy.deepcopy(model).double(), x.double())
    own = [run(model, each) for each in (x, *rounded_anew(x, 4))]
    tolerance = TOLERANCES[x.dtype]
    for kind, ours, exact, theirs in zip(
        ("loss", "gradients"), run(fused, x), expected, zip(*own, strict=True), strict=True
    ):
        limit = max(tolerance.factor * max(relative_error(t, exact) for t in theirs), tolerance.floor)
        assert relative_error(ours, exact) <= limit, kind
