"""Forwards that ask which children there are, and of which classes: after a change inside they compute what they would."""

import copy
import sys
import types

import pytest
import torch
from torch import nn

from ghostfused import FusedGhostBottleneck, FusedGhostModule, fuse_with_report
from ghostfused.cli.verify import calibrate

SOURCE = """
import builtins, functools, operator
import torch
from torch import nn
from ghostfused.models import paper

def layers(channels):
    return nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))

class Ghost(nn.Module):
    def __init__(self):
        super().__init__()
        ghost = paper.GhostModule(6, 12)
        self.one, self.two = ghost.primary_conv, ghost.cheap_operation
    def yes(self, x):
        y = self.one(x)
        return torch.cat([y, self.two(y)], 1)
    def forward(self, x):
        return self.yes(x) if {condition} else self.yes(x) * 2

class Bottleneck(Ghost):
    def __init__(self):
        super().__init__()
        self.ghost1, self.ghost2 = paper.GhostModule(6, 12), paper.GhostModule(12, 6, relu=False)
        self.one, self.two = layers(6), layers(12)
    def yes(self, x):
        return self.ghost2(self.two(self.ghost1(x))) + self.one(x)
"""
LOOKS = [
    "len(self.one) == 3", "self.one[2:]", "len([*self.one]) == 3", "len(list(self.one.children())) == 3", "len(self.one._modules) == 3",
    "[*map(len, (self.one,))] == [3]", "operator.length_hint(self.one) == 3", "sum(1 for _ in self.one) == 3",
    "functools.reduce(lambda n, m: n + 1, self.one, 0) == 3", "(lambda a, b, c: True)(*self.one)", "max(len(m) for m in (self.one, self.two)) == 3",
    "type(self.one) is nn.Sequential", "isinstance(self.one[1], nn.BatchNorm2d)", "self.one[2].__class__ is nn.ReLU",
    "builtins.isinstance(self.one[2], nn.ReLU)", "issubclass(type(self.one[2]), nn.ReLU)", "list(map(type, self.one))[2] is nn.ReLU",
    "any(isinstance(m, nn.ReLU) for m in self.one)", "next(reversed(self.one)).__class__.__name__ == 'ReLU'",
    "'2' in self.one._modules", "'2' in dict(self.one.named_children())", "self.one[2] in self.one",
    "isinstance(self.one.get_submodule('2'), nn.ReLU)", "self.one.get_submodule('2') is not None", "[*zip(self.one, self.two)][2][0].__class__ is nn.ReLU",
    "self.one[1].training == self.training", "all(m.training == self.training for m in self.one)", "self.one[2].inplace",
]  # fmt: skip
REFUSED = {
    "f'{self.one[2]}'[:4] == 'ReLU'": "prints one.2", "str(self.one[2])[:4] == 'ReLU'": "prints one.2",
    "self.one is self.two": "compares self.two, a module", "self.one == self.two": "compares self.two, a module",
}  # fmt: skip
INTO_GHOSTS = [
    "not any(isinstance(m, nn.Tanh) for m in self.modules())", "len(self.ghost1._modules) == 2", "hasattr(self.ghost1, 'primary_conv')",
    "self.get_submodule('ghost1.primary_conv.2') is not None", "'primary_conv' in dict(self.ghost1.named_children())",
]  # fmt: skip


def other_activation(one):
    one[2] = nn.Hardswish()


def other_class(one):
    one[2] = type("Mine", (nn.ReLU,), {})()


def not_in_place(one):
    one[2].inplace = False


def no_norm(one):
    one[1] = nn.Identity()


def norm_deleted(one):
    del one[1]


def activation_deleted(one):
    del one[2]


def appended(one):
    one.append(nn.Identity())


def child_of_a_layer(one):
    one[2].add_module("inner", nn.Identity())


def other_names(one):
    one._modules = dict(zip("abc", one._modules.values(), strict=True))


def norm_trains(one):
    one[1].train()


CHANGES = [other_activation, other_class, not_in_place, no_norm, norm_deleted, activation_deleted, appended, child_of_a_layer,
           other_names, norm_trains]  # fmt: skip


def made(place, condition):
    space = types.ModuleType("somebodys_looks")
    sys.modules[space.__name__] = space
    exec(SOURCE.format(condition=condition), space.__dict__)
    return calibrate(nn.Sequential(getattr(space, place)()), torch.randn(4, 6, 9, 8))


def outcome(model, x, grad):
    try:
        with torch.set_grad_enabled(grad):
            return copy.deepcopy(model)(x).detach()
    except Exception as error:
        return type(error)


def check_same(model, fused, x, what):
    for grad in (True, False, False):
        expected, ours = outcome(model, x, grad), outcome(fused, x, grad)
        if isinstance(expected, type):
            assert ours is expected, what
        else:
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("place", ["Ghost", "Bottleneck"])
@pytest.mark.parametrize("condition", LOOKS)
def test_what_a_forward_sees_of_its_children_is_watched(condition, place):
    model, x = made(place, condition), torch.randn(2, 6, 9, 8)
    fused, report = fuse_with_report(model)
    assert isinstance(fused[0], FusedGhostModule if place == "Ghost" else FusedGhostBottleneck), report
    check_same(model, fused, x, "as it is")
    for change in CHANGES:
        pair = copy.deepcopy(model), copy.deepcopy(fused)
        outcome(pair[1], x, False)
        for each in pair:
            change(each[0].one)
        check_same(*pair, x, change.__name__)


@pytest.mark.parametrize("condition", [*REFUSED, *INTO_GHOSTS])
def test_what_cannot_be_watched_is_left(condition, capsys):
    model, x = made("Bottleneck", condition), torch.randn(2, 6, 9, 8)
    fused, report = fuse_with_report(model)
    (reason,) = (swap.reason for swap in report if swap.fqn == "0")
    assert REFUSED.get(condition, "looks into ghost1, which may change inside") in reason
    check_same(model, fused, x, "as it is")
    assert not capsys.readouterr().err


WHICH = [
    "self.one[2] is not self.two[2]", "self.one[2] != self.two[2]", "(self.one[2],) != (self.two[2],)", "self.one[2] not in [self.two[2]]",
    "self.one[2] not in list(self.two)", "len({self.one[2], self.two[2]}) == 2", "len({m for m in (self.one[2], self.two[2])}) == 2",
    "len({self.one[2]: 1, self.two[2]: 2}) == 2", "len(set(self.one) | set(self.two)) == 6", "[self.one[2]].count(self.two[2]) == 0",
    "not operator.is_(self.one[2], self.two[2])", "len({*self.one, *self.two}) == 6",
]  # fmt: skip
BY_ATTRIBUTE = [
    condition.replace("self.one[2]", "getattr(self.one, '2')").replace("self.two[2]", "getattr(self.two, '2')")
    for condition in WHICH
    if "[2]" in condition and " != self" not in condition
]


@pytest.mark.parametrize("condition", [*WHICH, *BY_ATTRIBUTE, "len(list(self.modules())) == 9"])
def test_a_module_under_two_names(condition):
    """A forward that may tell one module from another sees that they are one, later or from the start."""
    model, x = made("Ghost", condition), torch.randn(2, 6, 9, 8)
    fused, _ = fuse_with_report(model)
    check_same(model, fused, x, "as it is")
    pair = copy.deepcopy(model), copy.deepcopy(fused)
    outcome(pair[1], x, False)
    for each in pair:
        each[0].two[2] = each[0].one[2]
    check_same(*pair, x, "shared later")
    model[0].two[2] = model[0].one[2]
    fused, report = fuse_with_report(model)
    check_same(model, fused, x, "shared from the start")
    assert "two.2 is there under two names" in (report[-1].reason or "") or "compares" in (report[-1].reason or "")
