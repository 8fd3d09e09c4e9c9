"""Networks as their users have them, written anew where no package ships them: what fuse() has to recognize."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ghostfused.models import seed
from ghostfused.models.paper import make_divisible


def hard_sigmoid(x):
    return F.relu6(x + 3.0) / 6.0


class OfficialSE(nn.Module):
    """Official repository: the gate is a function, not a module."""

    def __init__(self, channels, ratio=0.25, gate_fn=hard_sigmoid):
        super().__init__()
        self.gate_fn = gate_fn
        reduced = make_divisible(channels * ratio)
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv_reduce = nn.Conv2d(channels, reduced, 1, bias=True)
        self.act1 = nn.ReLU(inplace=True)
        self.conv_expand = nn.Conv2d(reduced, channels, 1, bias=True)

    def forward(self, x):
        gate = self.conv_expand(self.act1(self.conv_reduce(self.avg_pool(x))))
        return x * self.gate_fn(gate)


def half(conv, act):
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), act() if act else nn.Sequential())


class OfficialGhost(nn.Module):
    """Official V1 and V2 in one, by ``mode``; NanoDet's and GhostFaceNets' by ``act`` and ``cut``."""

    def __init__(self, cin, cout, act=lambda: nn.ReLU(inplace=True), mode="original", cut=True):
        super().__init__()
        self.mode, self.oup, self.cut = mode, cout, cut
        init = -(-cout // 2)
        self.gate_fn = nn.Sigmoid()
        self.primary_conv = half(nn.Conv2d(cin, init, 1, bias=False), act)
        self.cheap_operation = half(nn.Conv2d(init, init, 3, 1, 1, groups=init, bias=False), act)
        if mode == "attn":
            self.short_conv = nn.Sequential(
                nn.Conv2d(cin, cout, 1, bias=False),
                nn.BatchNorm2d(cout),
                nn.Conv2d(cout, cout, (1, 5), 1, (0, 2), groups=cout, bias=False),
                nn.BatchNorm2d(cout),
                nn.Conv2d(cout, cout, (5, 1), 1, (2, 0), groups=cout, bias=False),
                nn.BatchNorm2d(cout),
            )

    def forward(self, x):
        x1 = self.primary_conv(x)
        out = torch.cat([x1, self.cheap_operation(x1)], dim=1)
        if self.cut:
            out = out[:, : self.oup]
        if self.mode == "attn":
            res = self.short_conv(F.avg_pool2d(x, kernel_size=2, stride=2))
            out = out * F.interpolate(self.gate_fn(res), size=(out.shape[-2], out.shape[-1]), mode="nearest")
        return out


class OfficialBottleneck(nn.Module):
    def __init__(self, cin, mid, cout, k=3, stride=1, se=False, ghost=OfficialGhost, mode="original", **kwargs):
        super().__init__()
        self.stride = stride
        self.ghost1 = ghost(cin, mid, mode=mode, **kwargs)
        if stride > 1:
            self.conv_dw = nn.Conv2d(mid, mid, k, stride, (k - 1) // 2, groups=mid, bias=False)
            self.bn_dw = nn.BatchNorm2d(mid)
        self.se = OfficialSE(mid) if se else None
        self.ghost2 = ghost(mid, cout, **{**kwargs, "act": None})
        if cin == cout and stride == 1:
            self.shortcut = nn.Sequential()
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(cin, cin, k, stride, (k - 1) // 2, groups=cin, bias=False),
                nn.BatchNorm2d(cin),
                nn.Conv2d(cin, cout, 1, bias=False),
                nn.BatchNorm2d(cout),
            )

    def forward(self, x):
        residual = x
        x = self.ghost1(x)
        if self.stride > 1:
            x = self.bn_dw(self.conv_dw(x))
        if self.se is not None:
            x = self.se(x)
        x = self.ghost2(x)
        x += self.shortcut(residual)
        return x


def official(mode="original", **kwargs):
    """A stem and four bottlenecks: every combination of stride, SE and shortcut; odd widths."""
    return nn.Sequential(
        nn.Conv2d(3, 14, 3, 2, 1, bias=False),
        nn.BatchNorm2d(14),
        nn.ReLU(inplace=True),
        OfficialBottleneck(14, 22, 14, mode=mode, **kwargs),
        OfficialBottleneck(14, 27, 19, stride=2, mode=mode, **kwargs),
        OfficialBottleneck(19, 31, 19, k=5, se=True, mode=mode, **kwargs),
        OfficialBottleneck(19, 36, 21, k=5, stride=2, se=True, mode=mode, **kwargs),
    )


def nanodet():
    """LeakyReLU, and channels beyond the number asked for are kept."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, 2, 1),
        OfficialBottleneck(12, 24, 12, act=lambda: nn.LeakyReLU(0.1, inplace=True), cut=False),
        OfficialBottleneck(12, 24, 20, stride=2, se=True, act=lambda: nn.LeakyReLU(0.1, inplace=True), cut=False),
    )


def ghostfacenets():
    """PReLU with a slope for each channel."""

    class PReLUGhost(OfficialGhost):
        def __init__(self, cin, cout, act="prelu", mode="original"):
            init = -(-cout // 2)
            super().__init__(cin, cout, act=(lambda: nn.PReLU(init)) if act else None, mode=mode)

    return nn.Sequential(
        nn.Conv2d(3, 12, 3, 2, 1),
        OfficialBottleneck(12, 24, 12, ghost=PReLUGhost),
        OfficialBottleneck(12, 24, 20, stride=2, se=True, ghost=PReLUGhost),
    )


YOLOV5S_GHOST = {
    "nc": 5, "depth_multiple": 0.33, "width_multiple": 0.5,
    "anchors": [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119], [116, 90, 156, 198, 373, 326]],
    "backbone": [
        [-1, 1, "Conv", [64, 6, 2, 2]], [-1, 1, "GhostConv", [128, 3, 2]], [-1, 3, "C3Ghost", [128]],
        [-1, 1, "GhostConv", [256, 3, 2]], [-1, 6, "C3Ghost", [256]], [-1, 1, "GhostConv", [512, 3, 2]],
        [-1, 9, "C3Ghost", [512]], [-1, 1, "GhostConv", [1024, 3, 2]], [-1, 3, "C3Ghost", [1024]], [-1, 1, "SPPF", [1024, 5]],
    ],
    "head": [
        [-1, 1, "GhostConv", [512, 1, 1]], [-1, 1, "nn.Upsample", [None, 2, "nearest"]], [[-1, 6], 1, "Concat", [1]],
        [-1, 3, "C3Ghost", [512, False]], [-1, 1, "GhostConv", [256, 1, 1]], [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[-1, 4], 1, "Concat", [1]], [-1, 3, "C3Ghost", [256, False]], [-1, 1, "GhostConv", [256, 3, 2]],
        [[-1, 14], 1, "Concat", [1]], [-1, 3, "C3Ghost", [512, False]], [-1, 1, "GhostConv", [512, 3, 2]],
        [[-1, 10], 1, "Concat", [1]], [-1, 3, "C3Ghost", [1024, False]], [[17, 20, 23], 1, "Detect", ["nc"]],
    ],
}  # fmt: skip
"""The layers that YOLOv5s-ghost consists of, for ultralytics' own builder."""


class LeakyNoSlice(nn.Module):
    """As NanoDet has it: LeakyReLU or none, not sliced."""

    def __init__(self, cin, cout, ratio=2, activation=True):
        super().__init__()
        init = -(-cout // ratio)
        new = init * (ratio - 1)
        act = (lambda: nn.LeakyReLU(0.1, inplace=True)) if activation else None
        self.primary_conv = half(nn.Conv2d(cin, init, 1, bias=False), act)
        self.cheap_operation = half(nn.Conv2d(init, new, 3, 1, 1, groups=init, bias=False), act)

    def forward(self, x):
        x1 = self.primary_conv(x)
        return torch.cat([x1, self.cheap_operation(x1)], dim=1)


class PReLUGhost(seed.GhostModule):
    """As GhostFaceNets has it: PReLU with a slope per channel."""

    def __init__(self, cin, cout):
        super().__init__(cin, cout)
        self.primary_conv[2] = nn.PReLU(self.primary_conv[0].out_channels)
        self.cheap_op[2] = nn.PReLU(self.cheap_op[0].out_channels)


def ultralytics_ghost(*args, fused=False, **kwargs):
    modules = pytest.importorskip("ultralytics.nn.modules", reason="ultralytics' own GhostConv is what is recognized")
    m = modules.GhostConv(*args, **kwargs)
    for bn in (m.cv1.bn, m.cv2.bn):
        bn.eps, bn.momentum = 1e-3, 0.03
    if fused:
        ultralytics_fuse(m)
    return m


def ultralytics_fuse(m):
    """Their model.fuse(), which works on whole detectors only, does this to each Conv."""
    from ultralytics.utils.torch_utils import fuse_conv_and_bn

    for conv in (m.cv1, m.cv2):
        conv.eval()
        conv.conv = fuse_conv_and_bn(conv.conv, conv.bn)
        delattr(conv, "bn")
        conv.forward = conv.forward_fuse


def timm_ghost(name, *args, **kwargs):
    ghostnet = pytest.importorskip("timm.models.ghostnet", reason="timm's own Ghost module is what is recognized")
    return getattr(ghostnet, name)(*args, **kwargs)


def timm_v3_deployed(**kwargs):
    m = timm_ghost("GhostModuleV3", 6, 12, **kwargs)
    m.switch_to_deploy()
    return m
