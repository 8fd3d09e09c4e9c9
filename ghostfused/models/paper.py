"""GhostNet v1 (Han et al., "GhostNet: More Features from Cheap Operations", CVPR 2020), table 7.

Written from the paper, with the state_dict keys of the authors' repository, which timm's ``ghostnet_*`` share.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_DIVISOR = 4  # all channel counts are rounded to a multiple of it


def make_divisible(channels: float) -> int:
    """``channels`` rounded to a multiple of 4, at least 4, and never down by more than a tenth (MobileNetV2's rule)."""
    rounded = max(_DIVISOR, int(channels + _DIVISOR / 2) // _DIVISOR * _DIVISOR)
    return rounded + _DIVISOR if rounded < 0.9 * channels else rounded


class GhostModule(nn.Module):
    """(N, in_channels, H, W) → (N, out_channels, H', W'): ceil(out_channels / ratio) primary maps, the rest ghosts.

    Args:
        kernel_size, stride: of the primary conv.
        ratio: primary and ghost maps for each primary map.
        dw_size: kernel size of the depthwise cheap operation.
        relu: whether ReLU follows both.

    Raises:
        ValueError: ``ratio`` < 2.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        ratio: int = 2,
        dw_size: int = 3,
        stride: int = 1,
        relu: bool = True,
    ):
        super().__init__()
        if ratio < 2:
            raise ValueError(f"ratio: expected at least 2, got {ratio}; with one map for each there are no ghosts")
        self.out_channels = out_channels
        init_channels = -(-out_channels // ratio)
        new_channels = init_channels * (ratio - 1)

        def act() -> nn.Module:
            return nn.ReLU(inplace=True) if relu else nn.Sequential()

        self.primary_conv = nn.Sequential(
            nn.Conv2d(in_channels, init_channels, kernel_size, stride, kernel_size // 2, bias=False),
            nn.BatchNorm2d(init_channels),
            act(),
        )
        self.cheap_operation = nn.Sequential(
            nn.Conv2d(init_channels, new_channels, dw_size, padding=dw_size // 2, groups=init_channels, bias=False),
            nn.BatchNorm2d(new_channels),
            act(),
        )

    def forward(self, x: Tensor) -> Tensor:
        primary = self.primary_conv(x)
        return torch.cat([primary, self.cheap_operation(primary)], dim=1)[:, : self.out_channels]


class SqueezeExcite(nn.Module):
    """Scales (N, channels, H, W) by a gate per channel: mean, 1×1 conv, ReLU, 1×1 conv, hard sigmoid."""

    def __init__(self, channels: int, se_ratio: float = 0.25):
        super().__init__()
        reduced = make_divisible(channels * se_ratio)
        self.conv_reduce = nn.Conv2d(channels, reduced, 1)
        self.act1 = nn.ReLU(inplace=True)
        self.conv_expand = nn.Conv2d(reduced, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.conv_expand(self.act1(self.conv_reduce(pooled))))


class GhostBottleneck(nn.Module):
    """Ghost module, depthwise conv if stride > 1, SE if ``se_ratio``, Ghost module with no ReLU; plus a shortcut.

    The shortcut is the identity, or a depthwise and a 1×1 conv, each with BatchNorm, where the shape changes.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        dw_kernel_size: int = 3,
        stride: int = 1,
        se_ratio: float = 0.0,
    ):
        super().__init__()
        self.stride = stride
        padding = dw_kernel_size // 2
        self.ghost1 = GhostModule(in_channels, mid_channels)
        if stride > 1:
            self.conv_dw = nn.Conv2d(
                mid_channels, mid_channels, dw_kernel_size, stride, padding, groups=mid_channels, bias=False
            )
            self.bn_dw = nn.BatchNorm2d(mid_channels)
        self.se = SqueezeExcite(mid_channels, se_ratio) if se_ratio > 0 else None
        self.ghost2 = GhostModule(mid_channels, out_channels, relu=False)
        self.shortcut = nn.Sequential()
        if stride > 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, in_channels, dw_kernel_size, stride, padding, groups=in_channels, bias=False),
                nn.BatchNorm2d(in_channels),
                nn.Conv2d(in_channels, out_channels, 1, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.ghost1(x)
        if self.stride > 1:
            out = self.bn_dw(self.conv_dw(out))
        if self.se is not None:
            out = self.se(out)
        return self.ghost2(out) + self.shortcut(x)


class ConvBnAct(nn.Module):
    """1×1 convolution, BatchNorm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.act1 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act1(self.bn1(self.conv(x)))


# Table 7, a tuple a stage: depthwise kernel, expanded channels, output channels, SE ratio, stride of each bottleneck
STAGES: tuple[tuple[tuple[int, int, int, float, int], ...], ...] = (
    ((3, 16, 16, 0, 1),),
    ((3, 48, 24, 0, 2),),
    ((3, 72, 24, 0, 1),),
    ((5, 72, 40, 0.25, 2),),
    ((5, 120, 40, 0.25, 1),),
    ((3, 240, 80, 0, 2),),
    ((3, 200, 80, 0, 1), (3, 184, 80, 0, 1), (3, 184, 80, 0, 1), (3, 480, 112, 0.25, 1), (3, 672, 112, 0.25, 1)),
    ((5, 672, 160, 0.25, 2),),
    ((5, 960, 160, 0, 1), (5, 960, 160, 0.25, 1), (5, 960, 160, 0, 1), (5, 960, 160, 0.25, 1)),
)


class GhostNet(nn.Module):
    """(N, 3, H, W) → (N, num_classes). At width 1.0, 5.18 M parameters, and 141 M multiply-adds at 224×224.

    Args:
        width: factor on all channel counts but the head's 1280; the paper has 0.5, 1.0 and 1.3.
        dropout: probability, before the classifier.
    """

    def __init__(self, num_classes: int = 1000, width: float = 1.0, dropout: float = 0.2):
        super().__init__()
        channels = make_divisible(16 * width)
        self.conv_stem = nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU(inplace=True)
        stages: list[nn.Module] = []
        expanded = channels
        for stage in STAGES:
            blocks = []
            for kernel_size, mid, out, se_ratio, stride in stage:
                expanded = make_divisible(mid * width)
                out_channels = make_divisible(out * width)
                blocks.append(GhostBottleneck(channels, expanded, out_channels, kernel_size, stride, se_ratio))
                channels = out_channels
            stages.append(nn.Sequential(*blocks))
        stages.append(nn.Sequential(ConvBnAct(channels, expanded)))
        self.blocks = nn.Sequential(*stages)
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.conv_head = nn.Conv2d(expanded, 1280, 1)
        self.act2 = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(1280, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.act1(self.bn1(self.conv_stem(x))))
        x = self.act2(self.conv_head(self.global_pool(x)))
        return self.classifier(self.dropout(x.flatten(1)))
