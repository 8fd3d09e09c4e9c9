"""A network of everything that ``capture`` makes a program of, and places for what it can't."""

import torch
import torch.nn.functional as F
from torch import nn

from ghostfused import ops
from ghostfused.backends import cpu
from ghostfused.cli.verify import calibrate
from ghostfused.models import paper


class Net(nn.Module):
    """A stem, bottlenecks, a head and a classifier, with what a forward may do between them."""

    def __init__(self, between=lambda self, x: x, act=nn.ReLU, kernel=3):
        super().__init__()
        self.stem = nn.Conv2d(3, 9, kernel, 2, kernel // 2, bias=False)
        self.norm, self.act = nn.BatchNorm2d(9), act()
        self.blocks = nn.Sequential(paper.GhostBottleneck(9, 20, 12, stride=2, se_ratio=0.25))
        self.mix = nn.Conv2d(12, 12, 5, padding=2, groups=12)
        self.pool, self.head, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 33, 1), nn.Flatten()
        self.dropout, self.classifier = nn.Dropout(), nn.Linear(33, 7)
        self.between, self.options = between, {"scale": 1.0}

    def forward(self, x):
        x = self.act(self.norm(self.stem(x)))
        x = self.between(self, x)
        x = F.hardswish(self.mix(self.blocks(x)))
        x = F.relu6(self.head(self.pool(x)), inplace=True)
        return self.classifier(self.dropout(self.flatten(x)))


def made(*args, **kwargs) -> tuple[nn.Module, torch.Tensor]:
    return calibrate(Net(*args, **kwargs), torch.randn(4, 3, 21, 18)), torch.randn(3, 3, 21, 18)


def scaled(model: nn.Module, factor: float = 1.2) -> None:
    """Writes into every parameter and statistic of floats."""
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            if t.is_floating_point():
                t.mul_(factor)


def without_packs(captured):
    """What its one program makes, with the weights read from the tensors at each call."""
    (variant,) = captured._variants.values()
    (kept,) = variant.lowered.programs
    drop = cpu.extension.module.drop_program
    return ops.KeptProgram("cpu", kept.program, drop, any_format=True)
