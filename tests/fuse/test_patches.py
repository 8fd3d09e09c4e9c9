"""What is patched after ``fuse`` for all modules, or looks at all of them, reaches the layers that a fused module leaps over."""

import pytest
import torch
import torch.nn.functional as F
from networks import assert_same
from torch import nn

from ghostfused import fuse
from ghostfused.cli.verify import calibrate
from ghostfused.models import paper


def doubled(function):
    return lambda *args, **kwargs: function(*args, **kwargs) * 2


def without_activations(iterate):
    return lambda self: iter([m for m in iterate(self) if not isinstance(m, nn.ReLU)])


PATCHES = [
    (F, "conv2d", doubled), (F, "batch_norm", doubled), (torch, "batch_norm", doubled), (F, "relu", doubled), (torch, "relu", doubled),
    (nn.Conv2d, "forward", doubled), (nn.Conv2d, "_conv_forward", doubled), (nn.BatchNorm2d, "forward", doubled),
    (nn.modules.batchnorm._BatchNorm, "forward", doubled), (nn.ReLU, "forward", doubled), (nn.Sequential, "forward", doubled),
    (nn.Sequential, "__iter__", without_activations), (nn.Module, "_call_impl", doubled),
    (nn.Conv2d, "__call__", doubled), (nn.BatchNorm2d, "_call_impl", doubled), (nn.modules.conv._ConvNd, "__call__", doubled),
    (nn.ReLU, "_wrapped_call_impl", doubled), (nn.Sequential, "__call__", doubled),
]  # fmt: skip


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    bottleneck = paper.GhostBottleneck(12, 24, 12, stride=2, se_ratio=0.25)
    model = calibrate(nn.Sequential(paper.GhostModule(6, 12), bottleneck), torch.randn(4, 6, 9, 9))
    return model, fuse(model)


@pytest.mark.parametrize(("owner", "name", "change"), PATCHES, ids=[f"{o.__name__}.{n}" for o, n, _ in PATCHES])
@torch.no_grad()
def test_a_patch_for_all_modules(owner, name, change, pair, monkeypatch):
    model, fused = pair
    x = torch.randn(3, 6, 7, 7)
    for _ in range(2):
        assert_same(fused(x), model, x)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, change(getattr(owner, name)))
        expected = model(x)
        for _ in range(2):
            torch.testing.assert_close(fused(x), expected, rtol=1e-3, atol=1e-4)
    assert_same(fused(x), model, x)


@torch.no_grad()
def test_hooks_of_all_modules(pair):
    model, fused = pair
    x, hooks = torch.randn(3, 6, 7, 7), nn.modules.module
    for register, hook in (
        (hooks.register_module_forward_hook, lambda m, given, out: out * 2 if isinstance(m, nn.Conv2d) else None),
        (
            hooks.register_module_forward_pre_hook,
            lambda m, given: (given[0] * 2,) if isinstance(m, nn.Conv2d) else None,
        ),
    ):
        handle = register(hook)
        try:
            torch.testing.assert_close(fused(x), model(x), rtol=1e-3, atol=1e-4)
        finally:
            handle.remove()
    assert_same(fused(x), model, x)
