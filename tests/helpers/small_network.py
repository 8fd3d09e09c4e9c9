"""A network for commands that take ``file.py:function``, small enough for kernels that the CPU runs in a GPU's place."""

from torch import nn

from ghostfused.models import paper


def small() -> nn.Module:
    bottleneck = paper.GhostBottleneck(8, 16, 8, stride=2, se_ratio=0.25)
    return nn.Sequential(paper.ConvBnAct(3, 8), bottleneck, paper.GhostBottleneck(8, 16, 8))
