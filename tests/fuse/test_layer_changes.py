"""What people do to layers inside public networks after ``fuse``: found by drawing changes of each attribute, child and tensor."""

import copy

import pytest
import torch
from torch import nn

from ghostfused import FusedGhostBottleneck, FusedGhostModule, fuse_with_report
from ghostfused.cli.verify import calibrate
from ghostfused.models import paper


def v2():
    timm = pytest.importorskip("timm")
    blocks = timm.create_model("ghostnetv2_100").blocks
    return nn.Sequential(*blocks[2:4]), blocks[2][0].ghost1.primary_conv[0].in_channels


def yolo():
    tasks = pytest.importorskip("ultralytics.nn.tasks")
    return nn.Sequential(*list(tasks.DetectionModel("yolov8n-ghost.yaml", verbose=False).model)[1:3]), 16


class ShortcutFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.ghost1, self.ghost2 = paper.GhostModule(6, 12), paper.GhostModule(12, 6, relu=False)
        self.shortcut = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))

    def forward(self, x):
        rest = self.shortcut(x)
        return self.ghost2(self.ghost1(x)) + rest


class MainFirst(ShortcutFirst):
    def forward(self, x):
        return self.ghost2(self.ghost1(x)) + self.shortcut(x)


def bottleneck(kind):
    return lambda: (nn.Sequential(kind()), 6)


def reverse(module):
    children = list(module._modules.items())[::-1]
    module._modules.clear()
    module._modules.update(children)


def rename(module, name):
    module._modules = {f"another_{n}" if n == name else n: child for n, child in module._modules.items()}


def child(name, change):
    return lambda m: change(m.get_submodule(name))


def class_of_its_own(module):
    kind = type(module)
    module.__class__ = type("Mine", (kind,), {"forward": lambda self, x: kind.forward(self, x) * 2})


def writes_into_its_input(module):
    module[2], module[0] = module[0], module[2]


CHANGES = {
    "attention of another class": (v2, child("0.0.ghost1.short_conv", class_of_its_own)),
    "attention's name": (v2, child("0.0.ghost1.short_conv", lambda m: rename(m, "5"))),
    "attention's order": (v2, child("0.0.ghost1.short_conv", reverse)),
    "attention without a layer": (v2, child("0.0.ghost1.short_conv", lambda m: setattr(m, "4", None))),
    "dilation of nought": (v2, lambda m: setattr(m.get_submodule("0.0.ghost1.short_conv.0"), "dilation", (3, 0))),
    "shortcut's order": (v2, child("0.0.shortcut", reverse)),
    "shortcut's names": (v2, child("0.0.shortcut", lambda m: rename(m, "0"))),
    "a norm that is gone": (yolo, lambda m: delattr(next(b for n, b in m.named_modules() if n.endswith("cv2") and hasattr(b, "bn")), "bn")),
    "a bottleneck's order": (yolo, child("1.m.0.conv", reverse)),
    "main first writes": (bottleneck(MainFirst), child("0.ghost1.primary_conv", writes_into_its_input)),
    "main second writes": (bottleneck(ShortcutFirst), child("0.ghost1.primary_conv", writes_into_its_input)),
    "the shortcut's input is written": (bottleneck(MainFirst), lambda m: m[0].shortcut.insert(0, nn.ReLU(inplace=True))),
    "the shortcut writes first": (bottleneck(ShortcutFirst), lambda m: m[0].shortcut.insert(0, nn.ReLU(inplace=True))),
}  # fmt: skip


def outcome(model, x, grad):
    try:
        with torch.set_grad_enabled(grad):
            return model(x.clone()).detach()
    except Exception as error:
        return error


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("what", CHANGES)
def test_a_change_inside(what, ran):
    make, change = CHANGES[what]
    model, channels = make()
    model, x = calibrate(model, torch.randn(4, channels, 16, 16)), torch.randn(2, channels, 12, 12)
    fused, _ = fuse_with_report(model)
    assert any(isinstance(m, FusedGhostModule | FusedGhostBottleneck) for m in fused.modules())
    model, fused = copy.deepcopy(model), copy.deepcopy(fused)
    if ran:
        outcome(fused, x, False)
    for each in (model, fused):
        change(each)
    for grad in (True, False, False):
        expected, ours = outcome(model, x, grad), outcome(fused, x, grad)
        if isinstance(expected, Exception):
            assert isinstance(ours, type(expected)), repr(ours)
        else:
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
