"""What Dynamo takes for a constant takes plain values itself: torch 2.11's has no other way to look at the arguments."""

from __future__ import annotations

import gc
import importlib
import inspect
import pkgutil

import pytest
import torch
from torch import nn

import ghostfused
from ghostfused.recognize import watch

PLAIN = {"int", "str", "bool", "float"}


def marked() -> dict[str, object]:
    modules = [
        importlib.import_module(m.name)
        for m in pkgutil.walk_packages(ghostfused.__path__, "ghostfused.")
        if "__main__" not in m.name
    ]
    functions = [f for module in modules for f in vars(module).values() if getattr(f, "_dynamo_marked_constant", False)]
    return {f"{f.__module__}.{f.__qualname__}": f for f in functions}


def test_constants_take_plain_values():
    found = marked()
    assert "ghostfused.recognize.watch.shared_changed" in found
    for name, function in found.items():
        kinds = {parameter.annotation for parameter in inspect.signature(function).parameters.values()}
        assert kinds <= PLAIN, f"{name} takes {kinds - PLAIN}"


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.watched = watch.Watched()

    def forward(self, x):
        return x * 2 if self.watched.changed(self) else x


@pytest.mark.parametrize("changed", [False, True])
def test_each_has_a_name_of_its_own(changed):
    """Two modules of one code: what Dynamo found out of the first says nothing of the second."""
    first, second = Scaled(), Scaled()
    owners = {"key": 1}, {"key": 1}
    for module, owner in zip((first, second), owners, strict=True):
        module.watched.of(owner, "key")
    owners[int(changed)]["key"] = 2
    x = torch.ones(3)
    torch._dynamo.reset()
    run = torch.compile(lambda module, x: module(x), backend="eager", fullgraph=True)
    for module in (first, second):
        assert torch.equal(run(module, x), module(x))


def test_a_name_goes_with_what_it_names():
    name = watch.Watched().name
    gc.collect()
    with pytest.raises(KeyError):
        watch.shared_changed(name)
