"""Why a module is left as it is: the report says what stands in the way, and where."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ghostfused import FusedGhostBottleneck, fuse, fuse_with_report
from ghostfused.cli.verify import calibrate
from ghostfused.models import paper
from ghostfused.nn.layers import SqueezeExcite


class Base(paper.GhostModule):
    def __init__(self):
        super().__init__(6, 12)


def forward(function):
    """A Ghost module with ``function`` as its forward."""
    return lambda: type("Odd", (Base,), {"forward": function})()


def layer(half, place, new):
    """A Ghost module with another layer."""

    def make():
        module = Base()
        getattr(module, half)[place] = new()
        return module

    return make


class MyConv(nn.Conv2d):
    pass


class Twice(Base):
    def forward(self, x):
        out = super().forward(x)
        return torch.cat((out, out.relu()), 1)


class Reversed(Base):
    """Every second map and then the others, as GSConv, but the odd ones first."""

    def forward(self, x):
        even, odd = super().forward(x).unflatten(1, (-1, 2)).unbind(2)
        return torch.cat((odd, even), 1)


class Pads(Base):
    def forward(self, x):
        return super().forward(F.pad(x, (0, 1)) if x.shape[-1] % 2 else x)


class Counts(Base):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Keeps(Base):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x.shape)
        return super().forward(x)


class Scaled(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x):
        return super().forward(x) * self.scale


class OwnReduce(Base):
    def __reduce__(self):
        return type(self), (), self.__dict__


def ghosts_first(self, x):
    one = self.primary_conv(x)
    return torch.cat([self.cheap_operation(one), one], 1)


def below(self, x):
    one = self.primary_conv(x)
    return torch.cat([one, self.cheap_operation(one)], 2)


def summed(self, x):
    one = self.primary_conv(x)
    return torch.cat([one, one + self.cheap_operation(one)], 1)


def noisy(self, x):
    return paper.GhostModule.forward(self, x + torch.randn_like(x))


class Plain(nn.Module):
    """A Ghost module by its convolutions, not by its name."""

    def __init__(self, act):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), act())
        self.two = nn.Sequential(nn.Conv2d(6, 6, 3, 1, 1, groups=6), nn.BatchNorm2d(6), act())

    def forward(self, x):
        one = self.one(x)
        return torch.cat([one, self.two(one)], 1)


REASONS = {
    "a copy of the result": (forward(lambda self, x: paper.GhostModule.forward(self, x).clone()), "clone (method) is no step"),
    "another cut": (forward(lambda self, x: paper.GhostModule.forward(self, x)[:, 1:]), "getitem (function) is no step"),
    "two results": (forward(lambda self, x: (paper.GhostModule.forward(self, x), x)), "its output is a tuple, not a tensor"),
    "a cast": (forward(lambda self, x: paper.GhostModule.forward(self, x.float())), "float is no layer"),
    "ghosts first": (forward(ghosts_first), "it concatenates its ghost maps before its primary maps"),
    "another dimension": (forward(below), "it concatenates along dimension 2, not 1"),
    "a sum": (forward(summed), "add is no layer"),
    "noise": (forward(noisy), "Odd.forward calls torch.randn_like"),
    "padding": (Pads, "Pads.forward decides by its input"),
    "a counter": (Counts, "Counts.forward changes calls"),
    "a list": (Keeps, "Keeps.forward reads its attribute seen, a list, whose contents may change"),
    "a buffer": (Scaled, "Scaled.forward reads scale, a tensor whose values may change"),
    "__reduce__": (OwnReduce, "OwnReduce overrides __reduce__"),
    "two concatenations": (Twice, "it concatenates more than once"),
    "another order": (Reversed, "its output differs from the fused one's"),
    "a subclass": (layer("primary_conv", 0, lambda: MyConv(6, 6, 1)), "computes with primary_conv.0.weight outside of the layers"),
    "Softplus": (lambda: Plain(nn.Softplus), "one: Softplus is no layer that a kernel computes"),
    "ELU": (lambda: Plain(nn.ELU), "one: ELU is no layer that a kernel computes"),
    "GroupNorm": (layer("cheap_operation", 1, lambda: nn.GroupNorm(2, 6)), "cheap_operation: GroupNorm is no layer"),
    "an even kernel": (
        layer("cheap_operation", 0, lambda: nn.Conv2d(6, 6, 2, padding="same", groups=6)),
        "the cheap operation's kernel is not odd and square",
    ),
    "reflection": (
        layer("cheap_operation", 0, lambda: nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect", groups=6)),
        "the cheap operation's padding is (1, 1) (reflect), not 1 zeros",
    ),
    "fewer groups": (
        layer("cheap_operation", 0, lambda: nn.Conv2d(6, 6, 3, padding=1, groups=2)),
        "the second conv is not depthwise over the 6 maps of the first",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REASONS)
def test_a_reason_says_what_stands_in_the_way(what):
    make, reason = REASONS[what]
    model, x = nn.Sequential(make()).eval(), torch.randn(2, 6, 9, 8)
    fused, (swap,) = fuse_with_report(model)
    assert not swap.fused
    assert reason in swap.reason
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    torch.testing.assert_close(fused(x), expected)


class Unpacks(nn.Module):
    """Squeeze-and-excite that takes its input's size apart."""

    def __init__(self):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 12), nn.Sigmoid())

    def forward(self, x):
        n, c, _, _ = x.shape
        return x * self.fc(self.pool(x).view(n, c)).view(n, c, 1, 1)


def test_a_size_that_is_unpacked_is_no_obstacle():
    block = paper.GhostBottleneck(6, 12, 6)
    block.se = Unpacks()
    fused = fuse(calibrate(nn.Sequential(block), torch.randn(4, 6, 9, 8)))
    assert any(isinstance(step, SqueezeExcite) for step in fused[0]._main)


class Celu(nn.Module):
    def forward(self, x):
        return F.celu(x, alpha=0.5)


@pytest.mark.usefixtures("trained_by_kernels")
@pytest.mark.parametrize(
    "between",
    [nn.Softplus, nn.GELU, lambda: nn.GELU("tanh"), Celu, nn.ELU, lambda: nn.ChannelShuffle(4), lambda: nn.AvgPool2d(3, 1, 1)],
    ids=["softplus", "gelu", "gelu tanh", "function", "elu", "shuffle", "pool"],
)  # fmt: skip
@pytest.mark.parametrize("depthwise", [False, True], ids=["alone", "after a depthwise conv"])
def test_a_step_that_no_kernel_computes_runs_itself_between_ghost_modules(between, depthwise):
    block = paper.GhostBottleneck(6, 12, 6)
    layers = [nn.Conv2d(12, 12, 3, 1, 1, groups=12, bias=False), nn.BatchNorm2d(12)] if depthwise else []
    block.se = nn.Sequential(*layers, between())
    model, x = calibrate(nn.Sequential(block), torch.randn(4, 6, 9, 8)), torch.randn(2, 6, 8, 9)
    fused = fuse(model)
    assert isinstance(fused[0], FusedGhostBottleneck)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
    for each in (model, fused):
        each.train()
    torch.testing.assert_close(fused(x), model(x), rtol=1e-3, atol=1e-4)


def test_what_is_made_of_a_module_says_so():
    fused = fuse(calibrate(nn.Sequential(paper.GhostBottleneck(6, 12, 6)), torch.randn(4, 6, 9, 8)))
    assert isinstance(fused[0], FusedGhostBottleneck)
    for arguments in ((), (6, 12, 6)):
        with pytest.raises(TypeError, match=r"FusedGhostBottleneck is made by ghostfused\.fuse of somebody's module"):
            type(fused[0])(*arguments)


class Catches(paper.GhostModule):
    def forward(self, x):
        try:
            return super().forward(x)
        except RuntimeError:
            return x


class CatchesAll(paper.GhostModule):
    def forward(self, x):
        try:
            return super().forward(x)
        except:  # noqa: E722
            return x


class Finally(paper.GhostModule):
    def forward(self, x):
        try:
            return super().forward(x)
        finally:
            x.dim()


@pytest.mark.parametrize("form", [Catches, CatchesAll, Finally])
def test_a_forward_that_catches_what_its_layers_raise(form):
    """Too few channels are another result, not an error."""
    model = calibrate(nn.Sequential(form(6, 8)), torch.randn(4, 6, 5, 5))
    fused, report = fuse_with_report(model)
    assert [swap.reason for swap in report] == [
        None if form is Finally else f"{form.__name__}.forward catches exceptions in forward"
    ]
    x = torch.randn(2, 5, 4, 4)
    if form is not Finally:
        assert fused(x) is x
