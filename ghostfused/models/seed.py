"""The GhostNet of the blog "GhostNet网络解析": its signatures, its state_dict keys and what it computes.

It differs from the paper's (``ghostfused.models.paper``) in many places. docs/semantics.md lists them, and the few
where this file departs from the blog because the blog's code fails.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def conv3x3_bn_relu6(in_channels: int, out_channels: int, stride: int, groups: int = 1) -> nn.Sequential:
    """A 3×3 convolution without bias, BatchNorm, ReLU6; dense unless ``groups`` says otherwise."""
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU6(inplace=True))


class SqueezeAndExcite(nn.Module):
    """Scales (N, in_channels, H, W) by a gate per channel: mean, Linear, ReLU6, Linear, ReLU6.

    The gate lies in [0, 6], not in [0, 1]: the blog ends it with ReLU6, not with a sigmoid.

    Args:
        divide: ``in_channels // divide`` is the width of the hidden layer.

    Raises:
        ValueError: ``divide`` leaves no hidden channel, or ``out_channels`` is not ``in_channels``.
    """

    def __init__(self, in_channels: int, out_channels: int, divide: int = 4):
        super().__init__()
        if not 1 <= divide <= in_channels:
            raise ValueError(f"divide: expected 1 to in_channels = {in_channels}, got {divide}")
        if out_channels != in_channels:
            raise ValueError(
                f"out_channels: expected in_channels = {in_channels}, whose maps it scales, got {out_channels}"
            )
        hidden = in_channels // divide
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.SEblock = nn.Sequential(
            nn.Linear(in_channels, hidden), nn.ReLU6(inplace=True),
            nn.Linear(hidden, out_channels), nn.ReLU6(inplace=True),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        gate = self.SEblock(self.pool(x).flatten(1))
        return x * gate[:, :, None, None]


class GhostModule(nn.Module):
    """(N, in_channels, H, W) → (N, out_channels, H', W'): primary maps, and ghost maps made from them.

    ReLU6 follows the cheap op whatever ``use_relu`` says. If ``s`` doesn't divide ``out_channels``,
    ceil(out_channels / s) primary maps are made and the surplus ghost maps dropped.

    Args:
        s: primary and ghost maps for each primary map.
        kernel_size, stride: of the primary conv; the cheap op is a 3×3 at stride 1.
        use_relu: whether ReLU follows the primary conv.

    Raises:
        ValueError: ``s`` < 2.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        s: int = 2,
        kernel_size: int = 1,
        stride: int = 1,
        use_relu: bool = True,
    ):
        super().__init__()
        if s < 2:
            raise ValueError(
                f"s: expected at least 2, got {s}; with one map for each there are no ghosts: use nn.Conv2d"
            )
        self.out_channels = out_channels
        init_channels = -(-out_channels // s)
        self.primary_conv = nn.Sequential(
            nn.Conv2d(in_channels, init_channels, kernel_size, stride, kernel_size // 2, bias=False),
            nn.BatchNorm2d(init_channels),
            nn.ReLU(inplace=True) if use_relu else nn.Sequential(),
        )
        self.cheap_op = conv3x3_bn_relu6(init_channels, init_channels * (s - 1), stride=1, groups=init_channels)

    def forward(self, x: Tensor) -> Tensor:
        primary = self.primary_conv(x)
        return torch.cat([primary, self.cheap_op(primary)], dim=1)[:, : self.out_channels]


class GhostBottleneck(nn.Module):
    """Ghost module, depthwise 3×3 if stride > 1, SE if ``use_se``, Ghost module; plus a convolution of the input.

    ``kernel_size`` is accepted and unused, as in the blog; ``se_kernel_size`` is what the SE takes as ``divide``.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        use_se: bool,
        se_kernel_size: int = 1,
    ):
        super().__init__()
        self.stride = stride
        down, se = nn.Sequential(), nn.Sequential()
        if stride > 1:
            down = conv3x3_bn_relu6(mid_channels, mid_channels, stride, groups=mid_channels)
        self.bottleneck = nn.Sequential(
            GhostModule(in_channels, mid_channels),
            down,
            SqueezeAndExcite(mid_channels, mid_channels, se_kernel_size) if use_se else se,
            GhostModule(mid_channels, out_channels, use_relu=False),
        )
        self.shortcut: nn.Module = (
            conv3x3_bn_relu6(in_channels, out_channels, stride)
            if stride > 1
            else nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.bottleneck(x) + self.shortcut(x)


# in, mid and out channels, kernel_size, stride, and the SE's divide or None
BLOCKS: tuple[tuple[int, int, int, int, int, int | None], ...] = (
    (16, 16, 16, 3, 1, None),
    (16, 64, 24, 3, 2, None),
    (24, 72, 24, 3, 1, None),
    (24, 72, 40, 5, 2, 28),
    (40, 120, 40, 5, 1, 28),
    (40, 120, 40, 5, 1, 28),
    (40, 240, 80, 3, 1, None),
    (80, 200, 80, 3, 1, None),
    (80, 184, 80, 3, 2, None),
    (80, 184, 80, 3, 1, None),
    (80, 480, 112, 3, 1, 14),
    (112, 672, 112, 3, 1, 14),
    (112, 672, 160, 5, 2, 7),
    (160, 960, 160, 5, 1, 7),
    (160, 960, 160, 5, 1, 7),
)


class GhostNet(nn.Module):
    """(N, 3, H, W) → (N, num_classes), any H and W; the same as the blog's at its 224×224."""

    def __init__(self, num_classes: int = 1000):
        super().__init__()
        self.first_conv = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU6(inplace=True)
        )
        self.features = nn.Sequential(
            *(
                GhostBottleneck(cin, mid, cout, k, stride, divide is not None, divide or 1)
                for cin, mid, cout, k, stride, divide in BLOCKS
            )
        )
        self.last_stage = nn.Sequential(
            nn.Conv2d(160, 960, 1), nn.BatchNorm2d(960), nn.ReLU6(inplace=True),
            nn.AdaptiveAvgPool2d(1),  # the blog's AvgPool2d(7), which fits a 7×7 map only
            nn.Conv2d(960, 1280, 1), nn.ReLU6(inplace=True),
        )  # fmt: skip
        self.classifier = nn.Linear(1280, num_classes)

    def init_params(self) -> None:
        """The blog's initialization: Kaiming for convolutions, ones for Linear and BatchNorm weights, zero biases."""
        for module in self.modules():
            if not isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
                continue
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            else:
                nn.init.ones_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.features(self.first_conv(x))
        return self.classifier(self.last_stage(maps).flatten(1))
