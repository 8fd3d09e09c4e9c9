"""GELU in both forms and Mish, however they are written: ``fuse`` finds them, and they run in the kernels."""

import math

import pytest
import torch
import torch.nn.functional as F
from ghost_forms import Written
from networks import assert_same
from torch import nn

from ghostfused import Act, FusedGhostBottleneck, FusedGhostModule, fuse, ghost_module
from ghostfused.cli.verify import calibrate
from ghostfused.models import paper
from ghostfused.nn.layers import SqueezeExcite
from ghostfused.recognize.activations import Activations
from ghostfused.spec.activations import of_layer


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Erf(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


class Cubic(nn.Module):
    """GELU's tanh form as GPT-2 has it."""

    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


class OwnMish(nn.Module):
    def forward(self, x):
        return x.mul(F.softplus(x).tanh())


class MishOfLogs(nn.Module):
    def forward(self, x):
        return x * torch.tanh(torch.log(1 + torch.exp(x)))


class FromF(nn.Module):
    def forward(self, x):
        return F.gelu(x, approximate="tanh")


class Gate(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 4, 1), act, nn.Conv2d(4, 12, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.gate(x)


def timms(name):
    def make():
        return getattr(pytest.importorskip("timm.layers.activations"), name)()

    return make


FORMS = {
    "nn.GELU": (nn.GELU, Act.GELU),
    "nn.GELU('tanh')": (lambda: nn.GELU("tanh"), Act.GELU_TANH),
    "nn.Mish": (nn.Mish, Act.MISH),
    "nn.Mish in place": (lambda: nn.Mish(inplace=True), Act.MISH),
    "erf": (Erf, Act.GELU),
    "cubic": (Cubic, Act.GELU_TANH),
    "F.gelu of the tanh form": (FromF, Act.GELU_TANH),
    "own Mish": (OwnMish, Act.MISH),
    "own Mish of logs": (MishOfLogs, Act.MISH),
    "timm's GELU": (timms("GELU"), Act.GELU),
    "timm's GELUTanh": (timms("GELUTanh"), Act.GELU_TANH),
    "timm's Mish": (timms("Mish"), Act.MISH),
}


def fused_with(style, act) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A Ghost module with that activation, unfused and fused, which are the same on the input that comes with them."""
    written = Written(style, 6, 7, 2, {"kernel_size": 1}, 3, [nn.BatchNorm2d] * 2, act, 12)
    model, x = calibrate(nn.Sequential(written), torch.randn(4, 6, 9, 8)), torch.randn(2, 6, 9, 8)
    fused = fuse(model)
    assert isinstance(fused[0], FusedGhostModule)
    with torch.no_grad():
        assert_same(fused(x), model, x)
    return model, fused, x


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    make, act = FORMS[form]
    layer = make()
    if of_layer(layer) is None:
        assert list(Activations.of(nn.Sequential(layer)).acts.values()) == [act]
    else:
        assert of_layer(layer) == act
    model, fused, x = fused_with("flat", make)
    with torch.no_grad():
        for layer in [m for m in fused.modules() if isinstance(m, nn.GELU)]:  # read at each call
            layer.approximate = "none" if layer.approximate == "tanh" else "tanh"
        for layer in [m for m in model.modules() if isinstance(m, nn.GELU)]:
            layer.approximate = "none" if layer.approximate == "tanh" else "tanh"
        assert_same(fused(x), model, x)


@pytest.mark.parametrize("function", [F.gelu, F.mish], ids=["gelu", "mish"])
def test_functions_in_a_forward(function):
    fused_with("functions", function)


@pytest.mark.parametrize("act", [nn.GELU, lambda: nn.GELU("tanh"), nn.Mish], ids=["gelu", "gelu_tanh", "mish"])
def test_inside_a_bottleneck(act):
    conv = nn.Sequential(nn.Conv2d(12, 12, 3, 1, 1, groups=12, bias=False), nn.BatchNorm2d(12), act())
    for between in (Gate(act()), conv):
        block = paper.GhostBottleneck(6, 12, 6)
        block.se = between
        model, x = calibrate(nn.Sequential(block), torch.randn(4, 6, 9, 8)), torch.randn(2, 6, 8, 9)
        fused = fuse(model)
        assert isinstance(fused[0], FusedGhostBottleneck)
        step = fused[0]._main[1]
        if between is conv:
            assert step.kind(fused[0]) == "depthwise"
        else:
            assert isinstance(step, SqueezeExcite)
            assert step.act == of_layer(act())
        with torch.no_grad():
            assert_same(fused(x), model, x)


@pytest.mark.parametrize("act", [Act.GELU, Act.GELU_TANH, Act.MISH, Act.SILU], ids=lambda act: act.name.lower())
def test_each_number(act):
    """An activation alone, of every size of number, beside PyTorch's own error in float32; infinities and NaN in kind."""
    function = {
        Act.GELU: F.gelu,
        Act.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
        Act.MISH: F.mish,
        Act.SILU: F.silu,
    }[act]
    far = torch.logspace(-30, 30, 400)
    x = torch.cat([-far, torch.linspace(-14, 14, 100_000 - 800), far]).view(1, 1, 250, 400)
    one = torch.ones(1, 1, 1, 1)

    def ours(x):
        return ghost_module(x, one, one, act_primary=act, act_cheap="none", backend="cpu")[:, :1]

    right, own, out = function(x.double()), function(x).double(), ours(x).double()
    near = x.abs() < 14
    for part in (near & (x > 0), near & (x < 0)):
        # a number's own size counts where it is positive, the minimum of about -0.2 where it is not
        size = right.abs().clamp_min(0.0 if bool((x[part] > 0).all()) else 0.15)[part]
        limit = max(2 * float(((own - right).abs()[part] / size).max()), 4 * 2**-24)
        assert float(((out - right).abs()[part] / size).max()) <= limit
    assert bool(((out - right).abs() <= 1e-6 * right.abs().clamp_min(0.5)).all())
    special = torch.tensor([math.inf, -math.inf, math.nan]).repeat_interleave(20).view(1, 1, 6, 10)
    torch.testing.assert_close(ours(special)[0, 0, :2], torch.full((2, 10), math.inf))
    assert bool(ours(special)[0, 0, 2:].isnan().all())
