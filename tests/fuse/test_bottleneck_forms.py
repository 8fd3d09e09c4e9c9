"""Bottlenecks with more in them than Ghost modules and layers: what is idle in eval mode, and GhostNetV2's gate as people write it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import assert_same, assert_same_training
from torch import nn
from users_networks import OfficialGhost

from ghostfused import FusedGhostBottleneck, FusedGhostModule, fuse, fuse_with_report, unfuse
from ghostfused.cli.verify import calibrate
from ghostfused.models import paper

# ---- idle in eval mode


class DropPath(nn.Module):
    def __init__(self, p=0.3):
        super().__init__()
        self.p = p

    def forward(self, x):
        if self.p == 0.0 or not self.training:
            return x
        kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x * kept / (1 - self.p)


def timms(p=0.3):
    return pytest.importorskip("timm.layers").DropPath(p)


def torchvisions(p=0.3):
    return pytest.importorskip("torchvision.ops").StochasticDepth(p, "row")


class WithDrop(paper.GhostBottleneck):
    def __init__(self, *channels, drop, **settings):
        super().__init__(*channels, **settings)
        self.drop_path = drop

    def forward(self, x):
        out = self.ghost1(x)
        if self.stride > 1:
            out = self.bn_dw(self.conv_dw(out))
        if self.se is not None:
            out = self.se(out)
        return self.drop_path(self.ghost2(out)) + self.shortcut(x)


def square(model, x):
    torch.manual_seed(3)
    loss = model(x).square().mean()
    loss.backward()
    return loss


@pytest.mark.parametrize("drop", [DropPath, timms, torchvisions, nn.Dropout, nn.Dropout2d], ids=lambda f: f.__name__)
@pytest.mark.parametrize("stride", [1, 2])
def test_what_is_idle_in_eval_mode(drop, stride):
    block = WithDrop(6, 12, 6, stride=stride, se_ratio=0.25, drop=drop())
    model, x = calibrate(nn.Sequential(block), torch.randn(4, 6, 9, 8)), torch.randn(5, 6, 9, 8)
    fused = fuse(model)
    assert isinstance(fused[0], FusedGhostBottleneck)
    with torch.no_grad():
        for _ in range(3):
            assert_same(fused(x), model, x)
        assert len(fused[0]._cache._state.programs) == 1  # it is one op
        for each in (model, fused):
            each[0].drop_path.train()  # Monte Carlo dropout
        outs = []
        for each in (model, fused):
            torch.manual_seed(5)
            outs.append(each(x))
        torch.testing.assert_close(outs[1], outs[0], rtol=1e-3, atol=1e-4)
        assert not torch.allclose(outs[0], model.eval()(x), rtol=1e-2)
        fused.eval()
        assert_same(fused(x), model, x)
    if drop is not nn.Dropout:  # whose mask of all numbers depends on the dtype
        assert_same_training(fused, model, x, square)
    assert type(unfuse(fused)[0]) is WithDrop


def lower(m):
    m.drop_path.p = 0.0


def another(m):
    m.drop_path = nn.Tanh()


def patched(m):
    m.drop_path.forward = lambda x: -x


def hooked(m):
    m.drop_path.register_forward_hook(lambda module, given, out: out * 2)


@pytest.mark.parametrize("change", [lower, another, patched, hooked], ids=lambda f: f.__name__)
def test_a_change_of_what_was_idle(change):
    model = calibrate(nn.Sequential(WithDrop(6, 12, 6, drop=DropPath())), torch.randn(4, 6, 9, 8))
    fused, x = fuse(model), torch.randn(2, 6, 9, 8)
    with torch.no_grad():
        fused(x)
        for each in (model, fused):
            change(each[0])
        for _ in range(2):
            assert_same(fused(x), model, x)


class DoublesInPlace(nn.Module):
    """Gives its input out in eval mode, but not as it was."""

    def forward(self, x):
        x.mul_(2)
        return x


class CountsCalls(nn.Module):
    calls = 0

    def forward(self, x):
        CountsCalls.calls += 1
        return x


@pytest.mark.parametrize("kind", [DoublesInPlace, CountsCalls])
def test_what_is_not_idle_runs(kind):
    model = calibrate(nn.Sequential(WithDrop(6, 12, 6, drop=kind())), torch.randn(4, 6, 9, 8))
    fused, x = fuse(model), torch.randn(2, 6, 9, 8)
    with torch.no_grad():
        fused(x)
        before = CountsCalls.calls
        assert_same(fused(x), copy.deepcopy(model), x)
        fused(x)
    assert kind is DoublesInPlace or CountsCalls.calls > before + 1


def test_compiled_without_a_graph_break():
    model = calibrate(nn.Sequential(WithDrop(6, 12, 6, drop=DropPath())), torch.randn(4, 6, 9, 8))
    fused, x = fuse(model), torch.randn(2, 6, 9, 8)
    with torch.no_grad():
        assert_same(torch.compile(fused, backend="eager", fullgraph=True)(x), model, x)


# ---- GhostNetV2's gate


def long_convs(cin, cout):
    return OfficialGhost(cin, cout, mode="attn").short_conv


class Gate(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.convs = long_convs(cin, cout)

    def forward(self, x):
        return torch.sigmoid(self.convs(F.avg_pool2d(x, 2)))


class WholeGate(Gate):
    def forward(self, x):
        return F.interpolate(super().forward(x), size=x.shape[-2:], mode="nearest")


class Around(nn.Module):
    """The gate around a Ghost module."""

    def __init__(self, cin, cout):
        super().__init__()
        self.ghost, self.gate = paper.GhostModule(cin, cout), WholeGate(cin, cout)

    def forward(self, x):
        return self.ghost(x) * self.gate(x)


class AsChild(paper.GhostModule):
    def __init__(self, cin, cout):
        super().__init__(cin, cout)
        self.gate = Gate(cin, cout)

    def forward(self, x):
        out = super().forward(x)
        return out * F.interpolate(self.gate(x), size=out.shape[-2:], mode="nearest")


class AsWholeChild(AsChild):
    def __init__(self, cin, cout):
        super().__init__(cin, cout)
        self.gate = WholeGate(cin, cout)

    def forward(self, x):
        return self.gate(x) * paper.GhostModule.forward(self, x)


class PooledLast(OfficialGhost):
    def __init__(self, cin, cout):
        super().__init__(cin, cout, mode="attn")

    def forward(self, x):
        one = self.primary_conv(x)
        out = torch.cat([one, self.cheap_operation(one)], 1)[:, : self.oup]
        gate = torch.sigmoid(F.avg_pool2d(self.short_conv(x), 2))
        return out * F.interpolate(gate, size=out.shape[-2:], mode="nearest")


class Bottleneck(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.ghost1, self.ghost2, self.shortcut = first, second, nn.Sequential()

    def forward(self, x):
        return self.ghost2(self.ghost1(x)) + self.shortcut(x)


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("kind", [Around, AsChild, AsWholeChild, PooledLast])
def test_gates_of_ghostnet_v2(kind, place):
    plain = [paper.GhostModule(6, 13), paper.GhostModule(13, 6, relu=False)]
    halves = (kind(6, 13), plain[1]) if place == "first" else (plain[0], kind(13, 6))
    model = calibrate(nn.Sequential(Bottleneck(*halves)), torch.randn(4, 6, 9, 8))
    fused, report = fuse_with_report(model)
    assert isinstance(fused[0], FusedGhostBottleneck), report
    assert kind is Around or all(isinstance(m, FusedGhostModule) for m in (fused[0].ghost1, fused[0].ghost2))
    with torch.no_grad():
        for x in (torch.randn(2, 6, 9, 8), torch.randn(1, 6, 12, 17)):
            for _ in range(2):
                assert_same(fused(x), model, x)
        for each in (model, fused):
            for convs in (m for m in each.modules() if type(m) is nn.Sequential and len(m) == 6):
                convs[4].weight.mul_(-1.5)
        assert_same(fused(x), model, x)
    assert_same_training(fused, model, torch.randn(3, 6, 9, 8), square)


class ChangesItsInput(Around):
    def forward(self, x):
        return super().forward(x.mul_(1.5))


def test_a_first_step_that_may_change_its_input_is_named():
    model = calibrate(
        nn.Sequential(Bottleneck(ChangesItsInput(6, 12), paper.GhostModule(12, 6))), torch.randn(4, 6, 9, 8)
    )
    fused, report = fuse_with_report(model)
    assert not isinstance(fused[0], FusedGhostBottleneck)
    assert {swap.fqn: swap.reason for swap in report if not swap.fused} == {
        "0": "ghost1, which comes first, might change its input"
    }
    x = torch.randn(2, 6, 9, 8)
    with torch.no_grad():
        torch.testing.assert_close(fused(x.clone()), model(x.clone()), rtol=1e-3, atol=1e-4)


class OfLayers(Around):
    """Its pooling is a layer, not a function."""

    def __init__(self, cin, cout):
        super().__init__(cin, cout)
        self.gate = nn.Sequential(nn.AvgPool2d(2), long_convs(cin, cout), nn.Sigmoid())

    def forward(self, x):
        out = self.ghost(x)
        return out * F.interpolate(self.gate(x), size=out.shape[-2:], mode="nearest")


class Efficient(nn.Module):
    """ECA: no convolution in it tells how many channels come."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x):
        gate = F.adaptive_avg_pool2d(x, 1).squeeze(-1).transpose(1, 2)
        return x * self.conv(gate).sigmoid().transpose(1, 2).unsqueeze(-1).expand_as(x)


class After(Bottleneck):
    """``first`` runs before the Ghost modules."""

    def __init__(self, *first, shortcut=()):
        super().__init__(paper.GhostModule(6, 12), paper.GhostModule(12, 6, relu=False))
        self.first, self.shortcut = nn.Sequential(*first), nn.Sequential(*shortcut)

    def forward(self, x):
        return self.ghost2(self.ghost1(self.first(x))) + self.shortcut(x)


class Residual(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + x


class Listed(nn.ModuleList):
    def forward(self, x):
        out = x
        for module in self:
            out = module(out)
        return out + x


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.ghosts = nn.ModuleDict({"one": paper.GhostModule(6, 12), "two": paper.GhostModule(12, 6, relu=False)})

    def forward(self, x):
        return self.ghosts["two"](self.ghosts["one"](x)) + x


def ghosts():
    return paper.GhostModule(6, 12), paper.GhostModule(12, 6, relu=False)


FORMS = {
    "gate of layers": lambda: Bottleneck(OfLayers(6, 12), paper.GhostModule(12, 6, relu=False)),
    "norm and activation first": lambda: After(nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
    "activation first": lambda: After(nn.SiLU()),
    "activation in place first": lambda: After(nn.Hardswish(inplace=True)),
    "pooling first": lambda: After(nn.AvgPool2d(2), shortcut=[nn.AvgPool2d(2)]),
    "attention first": lambda: After(Efficient()),
    "a Sequential's subclass": lambda: Residual(*ghosts()),
    "a ModuleList's subclass": lambda: Listed(ghosts()),
    "a ModuleDict": Named,
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_bottlenecks(form):
    model = calibrate(nn.Sequential(FORMS[form]()), torch.randn(4, 6, 10, 8))
    fused, report = fuse_with_report(model)
    assert isinstance(fused[0], FusedGhostBottleneck), report
    assert all(swap.fused for swap in report)
    with torch.no_grad():
        for x in (torch.randn(2, 6, 9, 8), torch.randn(1, 6, 12, 17)):
            given, expected = x.clone(), x.clone()
            for _ in range(2):
                torch.testing.assert_close(fused(given), model(expected), rtol=1e-3, atol=1e-4)
                torch.testing.assert_close(given, expected, rtol=0, atol=0)


class AddsToItsInput(After):
    def forward(self, x):
        x += self.ghost2(self.ghost1(x))
        return x


@pytest.mark.parametrize(
    "make", [AddsToItsInput, lambda: After(nn.ReLU(inplace=True), shortcut=[nn.Conv2d(6, 6, 1)])], ids=["sum", "order"]
)
def test_what_its_input_holds_afterwards_is_what_it_was(make):
    model = calibrate(nn.Sequential(make()), torch.randn(4, 6, 10, 8))
    given = torch.randn(2, 6, 9, 8)
    expected, fused = given.clone(), fuse(model)
    assert isinstance(fused[0], FusedGhostBottleneck) == (
        make is not AddsToItsInput
    )  # in the original's order it is right
    with torch.no_grad():
        torch.testing.assert_close(fused(given), model(expected), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-4)


class EndsInNothing(Bottleneck):
    """As where DropPath has a probability of nought."""

    def __init__(self):
        super().__init__(paper.GhostModule(6, 12), paper.GhostModule(12, 6, relu=False))
        self.drop = nn.Identity()

    def forward(self, x):
        return self.drop(self.ghost2(self.ghost1(x))) + self.shortcut(x)


@pytest.mark.parametrize("change", ["hook", "pre_hook", "forward", "layer"])
def test_something_in_place_of_nothing(change):
    model = calibrate(nn.Sequential(EndsInNothing()), torch.randn(4, 6, 9, 8))
    fused = fuse(model)
    assert isinstance(fused[0], FusedGhostBottleneck)
    x = torch.randn(2, 6, 9, 8)
    with torch.no_grad():
        fused(x)
        for each in (model, fused):
            drop = each[0].drop
            {
                "hook": lambda drop: drop.register_forward_hook(lambda module, args, out: 3 * out),
                "pre_hook": lambda drop: drop.register_forward_pre_hook(lambda module, args: args[0] + 2),
                "forward": lambda drop: setattr(drop, "forward", torch.neg),
                "layer": lambda drop, each=each: setattr(each[0], "drop", nn.Tanh()),
            }[change](drop)
        for _ in range(2):
            assert_same(fused(x), model, x)
    assert_same(fused(x), model, x)
