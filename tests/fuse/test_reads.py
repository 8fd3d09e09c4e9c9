"""Forwards that depend on more than tensors and children: fused or not, they compute what they did, also after a change."""

import copy
import math
import random

import pytest
import torch
from networks import assert_same
from torch import nn

from ghostfused import FusedGhostModule, fuse, fuse_with_report
from ghostfused.cli.verify import calibrate
from ghostfused.models import paper
from ghostfused.nn.bottleneck import FusedGhostBottleneck

FLAG, TABLE = True, {"scale": 1.0}


def switched(x):
    return x if FLAG else -x


def keeps(function):
    def wrapper(self, x):
        return function(self, x) * TABLE["scale"]

    return wrapper


class Bottleneck(nn.Module):
    """``how`` is the rest of its forward; each test has a class of its own."""

    def __init__(self):
        super().__init__()
        self.ghost1, self.ghost2 = paper.GhostModule(6, 12), paper.GhostModule(12, 6, relu=False)
        self.skip, self.times, self.table, self.log, self.calls = True, 1, {"on": True}, [], 0
        self.scale = torch.nn.functional.relu

    def body(self, x):
        return self.ghost2(self.ghost1(x))


class Ghost(nn.Module):
    """The same for a Ghost module."""

    def __init__(self):
        super().__init__()
        ghost = paper.GhostModule(6, 12)
        self.primary_conv, self.cheap_operation, self.out = ghost.primary_conv, ghost.cheap_operation, 10
        self.skip, self.times, self.table, self.log, self.calls = True, 1, {"on": True}, [], 0

    def body(self, x):
        x1 = self.primary_conv(x)
        return torch.cat([x1, self.cheap_operation(x1)], dim=1)


def flag(self, x):
    return self.body(x) + x if self.skip else self.body(x)


def number(self, x):
    y = self.body(x)
    for _ in range(self.times):
        y = y + x
    return y


def signed(self, x):
    return self.body(x) + x if math.copysign(1, self.times) > 0 else self.body(x)


def content(self, x):
    return self.body(x) + x if self.table["on"] else self.body(x)


def collects(self, x):
    self.log.append(x.shape)
    return self.body(x) + x


def counts(self, x):
    self.calls += 1
    return self.body(x) + x if self.calls < 1000 else self.body(x)


def a_global(self, x):
    return self.body(x) + x if FLAG else self.body(x)


def through_a_function(self, x):
    return self.body(x) + switched(x)


def by_chance(self, x):
    return self.body(x) + x if random.random() < 2 * self.times else self.body(x)


def looks_inside(self, x):
    return self.body(x) + x if len(self.ghost1.primary_conv) == 3 else self.body(x)


def looks_at_a_layer(self, x):
    return self.body(x) + x if isinstance(self.ghost1.primary_conv[2], nn.ReLU) else self.body(x)


decorated = keeps(flag)


class Kind(Bottleneck):
    keep = True

    @property
    def on(self):
        return self.skip

    @on.setter
    def on(self, value):
        self.skip = value

    def helped(self, x):
        return x if self.skip else -x


def a_property(self, x):
    return self.body(x) + x if self.on else self.body(x)


def a_method(self, x):
    return self.body(x) + self.helped(x)


def of_the_class(self, x):
    return self.body(x) + x if self.keep else self.body(x)


def set_flag(value):
    globals()["FLAG"] = value


def inherited(self, x):
    return super(Inherits, self).forward(x)


class Flagged(Kind):
    def forward(self, x):
        return flag(self, x)


class Inherits(Flagged):
    forward = inherited


WATCHED = {
    "a base class's": (inherited, lambda m: setattr(m, "skip", False)),
    "a flag": (flag, lambda m: setattr(m, "skip", False)),
    "a number": (number, lambda m: setattr(m, "times", 2)),
    "one is not True": (number, lambda m: setattr(m, "times", True)),
    "a property": (a_property, lambda m: setattr(m, "skip", 0)),
    "a property that is set": (a_property, lambda m: setattr(m, "on", False)),
    "an attribute by a property": (flag, lambda m: setattr(m, "on", False)),
    "hidden by a property": (number, lambda m: setattr(Kind, "times", property(lambda self: 2))),
    "a zero of another sign": (signed, lambda m: setattr(m, "times", -0.0)),
    "a method": (a_method, lambda m: setattr(m, "skip", False)),
    "a global": (a_global, lambda m: set_flag(False)),
    "a function's global": (through_a_function, lambda m: set_flag(False)),
    "the class's": (of_the_class, lambda m: setattr(Kind, "keep", False)),
    "of its own name": (of_the_class, lambda m: setattr(m, "keep", 0)),
}
UNFUSED = {
    "a dict": (content, lambda m: m.table.update(on=False), "reads its attribute table, a dict"),
    "a list": (collects, lambda m: None, "reads its attribute log, a list"),
    "a counter": (counts, lambda m: setattr(m, "calls", 2000), "changes calls"),
    "chance": (by_chance, lambda m: setattr(m, "times", 0), "uses the module random"),
    "the length of a half": (
        looks_inside,
        lambda m: m.ghost1.primary_conv.append(nn.Identity()),
        "looks into ghost1",
    ),
    "a layer's kind": (
        looks_at_a_layer,
        lambda m: m.ghost1.primary_conv.__setitem__(2, nn.SiLU()),
        "looks into ghost1",
    ),
    "a decorator's": (decorated, lambda m: TABLE.update(scale=3.0), "reads the global TABLE"),
}


@pytest.fixture(autouse=True)
def globals_as_they_were():
    yield
    set_flag(True)
    TABLE["scale"] = 1.0
    Kind.keep = True
    if "times" in vars(Kind):
        del Kind.times


def made(how) -> nn.Module:
    kind = type("Made", (Inherits if how is inherited else Kind,), {"forward": how})
    module = kind()
    if how is signed:
        module.times = 0.0
    return calibrate(nn.Sequential(module), torch.randn(4, 6, 9, 8))


def check_change(model: nn.Module, fused: nn.Module, change, x: torch.Tensor) -> None:
    """Both before and after ``change`` of each, with gradients and without, at the first call and at later ones."""
    for step in (lambda m: None, change):
        for each in (model, fused):
            step(each)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                for _ in range(3):
                    assert_same(fused(x), copy.deepcopy(model), x)


@pytest.mark.parametrize("what", WATCHED)
def test_an_attribute_that_a_bottleneck_reads_is_watched(what):
    how, change = WATCHED[what]
    model = made(how)
    fused, x = fuse(model), torch.randn(2, 6, 9, 8)
    assert isinstance(fused[0], FusedGhostBottleneck)
    check_change(model, fused, lambda m: change(m[0]), x)


@pytest.mark.parametrize("what", UNFUSED)
def test_what_cannot_be_watched_is_left_unfused(what):
    how, change, reason = UNFUSED[what]
    model = made(how)
    fused, report = fuse_with_report(model)
    (own,) = (swap for swap in report if swap.fqn == "0")
    assert not own.fused
    assert reason in own.reason
    assert sum(swap.fused for swap in report) == 2  # the Ghost modules in it
    check_change(model, fused, lambda m: change(m[0]), torch.randn(2, 6, 9, 8))
    assert len(fused[0].log) == len(model[0].log) + 12 * (how is collects)


def cut(self, x):
    return self.body(x)[:, : self.out]


def watched_log(self, x):
    self.log.append(1)
    return self.body(x)


def test_a_ghost_module_of_another_width():
    """timm's own ``out_chs``, the official repository's ``oup``."""
    kind = type("Made", (Ghost,), {"forward": cut})
    model = calibrate(nn.Sequential(kind()), torch.randn(4, 6, 9, 8))
    fused, x = fuse(model), torch.randn(2, 6, 9, 8)
    assert isinstance(fused[0], FusedGhostModule)
    with torch.no_grad():
        for out in (10, 7, 10):
            model[0].out = fused[0].out = out
            for _ in range(3):
                assert_same(fused(x), model, x)
                gates = {"input_gate": torch.rand(2, 6), "residual": torch.randn(2, out, 9, 8)}
                expected = model[0](x * gates["input_gate"][:, :, None, None]) + gates["residual"]
                torch.testing.assert_close(fused[0](x, **gates), expected, rtol=1e-4, atol=1e-5)


def test_a_ghost_module_that_collects_is_left_unfused():
    kind = type("Made", (Ghost,), {"forward": watched_log})
    model = calibrate(nn.Sequential(kind()), torch.randn(4, 6, 9, 8))
    fused, report = fuse_with_report(model)
    assert not any(swap.fused for swap in report)
    assert "reads its attribute log" in report[0].reason
    fused(torch.randn(2, 6, 9, 8))
    assert len(fused[0].log) == len(model[0].log) + 1, "fuse itself has run nothing that collects"


class Block(nn.Sequential):
    """A half with a forward of its own."""

    on = None

    def __init__(self, *layers):
        super().__init__(*layers)
        self.through = True

    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x if self.through else x * 2


def test_a_block_inside_that_reads_a_flag():
    model = calibrate(nn.Sequential(paper.GhostModule(6, 12)), torch.randn(4, 6, 9, 8))
    model[0].primary_conv = Block(*model[0].primary_conv)
    fused, x = fuse(model), torch.randn(2, 6, 9, 8)
    assert isinstance(fused[0], FusedGhostModule)
    check_change(model, fused, lambda m: setattr(m[0].primary_conv, "through", False), x)


def test_timms_own_attributes():
    timm = pytest.importorskip("timm")
    model = calibrate(timm.create_model("ghostnet_050"), torch.randn(2, 3, 64, 64))
    fused, x = fuse(model), torch.randn(1, 3, 64, 64)
    for change in (
        lambda m: setattr(m.blocks[2][0].ghost1, "out_chs", 10),
        lambda m: setattr(m.blocks[4][0], "has_skip", False),
    ):
        one, two = copy.deepcopy(model), copy.deepcopy(fused)
        with torch.no_grad():
            two(x)
            for each in (one, two):
                change(each)
            try:
                expected = one(x)
            except RuntimeError:  # channels that don't fit
                with pytest.raises((RuntimeError, ValueError)):
                    two(x)
                continue
            for _ in range(2):
                torch.testing.assert_close(two(x), expected, rtol=1e-3, atol=1e-4)


class GhostOfItsChildren(nn.Module):
    def __init__(self):
        super().__init__()
        ghost = paper.GhostModule(6, 12)
        self.primary_conv, self.cheap_operation = ghost.primary_conv, ghost.cheap_operation

    def forward(self, x):
        maps = [x]
        for child in self.children():
            maps.append(child(maps[-1]))
        return torch.cat(maps[1:], 1)


@pytest.mark.parametrize("child", [nn.Tanh, nn.Identity, lambda: nn.Conv2d(6, 3, 1)])
def test_one_more_child_of_a_ghost_module(child):
    model = calibrate(nn.Sequential(GhostOfItsChildren()), torch.randn(4, 6, 9, 8))
    fused = fuse(model)
    assert isinstance(fused[0], FusedGhostModule)
    x, added = torch.randn(2, 6, 9, 8), child()
    with torch.no_grad():
        fused(x)
        for each in (model, fused):
            each[0].further = added
        for _ in range(2):
            assert_same(fused(x), model, x)
    assert_same(fused(x), model, x)


class Scaled(nn.Dropout):
    scale = 1.0

    def forward(self, x):
        return super().forward(x) if self.training else x * self.scale


class Always(nn.Dropout2d):
    """Monte Carlo dropout, by a flag."""

    drops = False

    def forward(self, x):
        return nn.functional.dropout2d(x, self.p, True) if self.drops else super().forward(x)


class Ends(Bottleneck):
    def __init__(self, last):
        super().__init__()
        self.last = last

    def forward(self, x):
        return self.last(self.body(x)) + x


@pytest.mark.parametrize(("kind", "name", "value"), [(Scaled, "scale", 3.0), (Always, "drops", True)])
def test_a_subclass_of_dropout_does_what_its_forward_says(kind, name, value):
    model = calibrate(nn.Sequential(Ends(kind(0.3))), torch.randn(4, 6, 9, 8))
    fused, x = fuse(model), torch.randn(2, 6, 9, 8)
    with torch.no_grad():
        for each in (model, fused):
            before = [each(x) for _ in range(2)][1]
            setattr(each[0].last, name, value)
        outs = []
        for each in (model, fused, fused):
            torch.manual_seed(5)
            outs.append(each(x))
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(before, outs[0], rtol=1e-2)
