"""A class that is changed after ``fuse``: its modules, and those around them, do what the unfused ones do."""

import copy
import gc
import io
import pickle
import sys
import types
import weakref

import pytest
import torch
from torch import nn

from ghostfused import fuse_with_report
from ghostfused.cli.verify import calibrate
from ghostfused.recognize import classes

SOURCE = """
import torch
from torch import nn
from ghostfused.models import paper

class MyReLU(nn.ReLU):
    pass

class HSwish(nn.Module):
    def forward(self, x):
        return x * nn.functional.relu6(x + 3) / 6

class Chain(nn.Sequential):
    pass

class Gate(paper.SqueezeExcite):
    pass

class Ghost(nn.Module):
    def __init__(self, cin=6, cout=12):
        super().__init__()
        ghost = paper.GhostModule(cin, cout)
        conv, norm, _ = ghost.primary_conv
        self.one, self.two = Chain(conv, norm, MyReLU(inplace=True)), ghost.cheap_operation
        self.two[2] = HSwish()
    def forward(self, x):
        y = self.one(x)
        return torch.cat([y, self.two(y)], 1)

class Bottleneck(nn.Module):
    def __init__(self):
        super().__init__()
        self.ghost1, self.ghost2, self.gate = Ghost(), Ghost(12, 6), Gate(12)
        self.shortcut = Chain(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), MyReLU())
    def forward(self, x):
        return self.ghost2(self.gate(self.ghost1(x))) + self.shortcut(x)
"""
CHILDREN = {"one", "two", "ghost1", "gate", "shortcut", "conv_reduce"}


def doubled(function):
    return lambda *args, **kwargs: function(*args, **kwargs) * 2


def getter(otherwise):
    def get(self, name):
        return doubled(nn.Module.__getattr__(self, name)) if name in CHILDREN else otherwise(self, name)

    return get


def hides_a_child(name):
    def patch(kind):
        setattr(kind, name, property(lambda self: doubled(self._modules[name])))

    return patch


PATCHES = {
    **{name: lambda kind, name=name: setattr(kind, name, doubled(getattr(kind, name))) for name in (*classes.CALLS, "forward")},
    "__getattr__": lambda kind: setattr(kind, "__getattr__", getter(nn.Module.__getattr__)),
    "__getattribute__": lambda kind: setattr(kind, "__getattribute__", getter(object.__getattribute__)),
    "__iter__": lambda kind: setattr(kind, "__iter__", lambda self: iter(list(self._modules.values())[:2])),
    "__doc__": lambda kind: setattr(kind, "__doc__", "another"),
    **{name: hides_a_child(name) for name in ("one", "shortcut")},
}  # fmt: skip
KINDS = ["Ghost", "Bottleneck", "Chain", "MyReLU", "HSwish", "Gate"]


@pytest.fixture
def fused_pair():
    space = types.ModuleType("somebodys_classes")
    sys.modules[space.__name__] = space
    exec(SOURCE, space.__dict__)
    model = calibrate(nn.Sequential(space.Bottleneck(), space.Ghost()), torch.randn(4, 6, 9, 8))
    fused, report = fuse_with_report(model)
    assert all(swap.fused for swap in report), report
    yield space, model, fused
    del sys.modules[space.__name__]


def check_same(model, fused):
    x = torch.randn(2, 6, 9, 8)
    for grad in (True, False, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(fused(x.clone()), model(x.clone()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PATCHES)
def test_a_class_of_somebodys_is_patched(name, kind, ran, fused_pair):
    space, model, fused = fused_pair
    if ran:
        check_same(model, fused)
    if name != "__iter__" or kind == "Chain":
        PATCHES[name](getattr(space, kind))
    check_same(model, fused)


@pytest.mark.parametrize(
    ("name", "kind"), [("__call__", "Chain"), ("__getattr__", "Chain"), ("one", "Ghost"), ("shortcut", "Bottleneck")]
)
def test_copies_and_pickles_see_it_too(name, kind, fused_pair, monkeypatch):
    space, model, fused = fused_pair
    pickled = pickle.dumps(fused)
    monkeypatch.setattr(classes, "_OF", weakref.WeakKeyDictionary())  # as in another process
    pickled = pickle.load(io.BytesIO(pickled))
    copied = copy.deepcopy(fused)
    for each in (pickled, copied):
        check_same(model, each)
    PATCHES[name](getattr(space, kind))
    for each in (pickled, copied):
        check_same(model, each)


def test_hooks_run_once_around_a_call_of_its_class(fused_pair):
    space, model, fused = fused_pair
    seen = []
    for each in (model, fused):
        each[1].register_forward_hook(lambda module, given, out: seen.append(type(module).__name__))
    PATCHES["__call__"](space.Ghost)
    check_same(model, fused)
    assert sorted(seen) == ["FusedGhostModule"] * 3 + ["Ghost"] * 3


class MyParameter(nn.Parameter):
    pass


def test_a_class_of_parameters_that_takes_operations_later(fused_pair, monkeypatch):
    _, model, fused = fused_pair
    for each in (model, fused):
        conv = each[1].one[0]
        conv.weight = MyParameter(conv.weight.detach())
    check_same(model, fused)

    def twice(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            out = function(*args, **(kwargs or {}))
        return out * 2 if function is torch.conv2d else out

    monkeypatch.setattr(MyParameter, "__torch_function__", classmethod(twice))
    check_same(model, fused)


def test_a_class_that_is_gone_leaves_nothing():
    kind = type("Mine", (nn.ReLU,), {})
    classes.of_bases(kind)
    gone = weakref.ref(kind)
    del kind
    gc.collect()
    assert gone() is None
