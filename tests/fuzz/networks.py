"""Bottlenecks and networks, drawn at random from what people write."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from users_networks import OfficialBottleneck, OfficialSE

from ghostfused.models import paper, seed

from .modules import LAYERS, written


class LinearSE(nn.Module):
    def __init__(self, channels: int, act: Callable[[], nn.Module], gate: Callable[[Tensor], Tensor]):
        super().__init__()
        self.gate = gate
        self.fc = nn.Sequential(nn.Linear(channels, 4), act(), nn.Linear(4, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc(x.mean((2, 3))))[:, :, None, None]


class ECA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv(x.mean((2, 3)).unsqueeze(1)).sigmoid().squeeze(1)[:, :, None, None]


class DropPath(nn.Module):
    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0.0 or not self.training:
            return x
        return x * (torch.arange(len(x)) % 2).to(x)[:, None, None, None]


class Joined(nn.Module):
    """A bottleneck: a branch that may end in DropPath, and a shortcut, added in one of the ways."""

    def __init__(self, branch: list[nn.Module], shortcut: nn.Module, way: str):
        super().__init__()
        self.way = way
        self.branch, self.shortcut = nn.Sequential(*branch), shortcut

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "add":
            return torch.add(self.branch(x), self.shortcut(x))
        if self.way == "shortcut first":
            rest = self.shortcut(x)
            return rest + self.branch(x)
        out = self.branch(x)
        if self.way == "in place":
            out += self.shortcut(x)
            return out
        if self.way == "activated":
            return torch.relu(out + self.shortcut(x))
        return out + self.shortcut(x)


def _between(rng: random.Random, channels: int) -> nn.Module:
    gates: list[Callable[[Tensor], Tensor]] = [
        torch.sigmoid, F.hardsigmoid, lambda y: torch.clamp(y, 0, 1), torch.tanh, lambda y: F.relu6(y + 3) / 6,
    ]  # fmt: skip
    makers: list[Callable[[], nn.Module]] = [
        lambda: paper.SqueezeExcite(channels), lambda: OfficialSE(channels), ECA, nn.Identity,
        lambda: LinearSE(channels, rng.choice(LAYERS), rng.choice(gates)),
        lambda: seed.SqueezeAndExcite(channels, channels, 1), lambda: nn.Dropout2d(0.0),
    ]  # fmt: skip
    return rng.choice(makers)()


def bottleneck(rng: random.Random, cin: int, cout: int, stride: int) -> nn.Module:
    """(N, cin, H, W) → (N, cout, H / stride, W / stride)."""
    mid = rng.randint(2, 24)
    kind = rng.randrange(8)
    if kind == 0:
        return paper.GhostBottleneck(cin, mid, cout, rng.choice((3, 5)), stride, rng.choice((0.0, 0.25)))
    if kind == 1:
        return seed.GhostBottleneck(cin, mid, cout, 3, stride, rng.random() < 0.5)
    if kind == 2:
        act = rng.choice((lambda: nn.ReLU(inplace=True), lambda: nn.LeakyReLU(0.1), nn.PReLU, nn.SiLU))
        options: dict[str, Any] = {"mode": rng.choice(("original", "original", "attn")), "act": act}
        return OfficialBottleneck(cin, mid, cout, rng.choice((3, 5)), stride, rng.random() < 0.5, **options)
    branch: list[nn.Module] = [written(rng, cin, mid, plain=True)]
    if stride > 1 or rng.random() < 0.2:
        k = rng.choice((3, 5))
        branch += [nn.Conv2d(mid, mid, k, stride, k // 2, groups=mid, bias=False), nn.BatchNorm2d(mid)]
        branch += [rng.choice(LAYERS)()] if rng.random() < 0.3 else []
    if rng.random() < 0.5:
        branch.append(_between(rng, mid))
    branch.append(written(rng, mid, cout, act=rng.random() < 0.3, plain=True))
    if rng.random() < 0.3:
        branch.append(DropPath(0.3))
    shortcut: nn.Module = nn.Identity() if rng.random() < 0.5 else nn.Sequential()
    if stride > 1 or cin != cout or rng.random() < 0.2:
        shortcut = rng.choice((
            lambda: nn.Sequential(
                nn.Conv2d(cin, cin, 3, stride, 1, groups=cin, bias=False), nn.BatchNorm2d(cin),
                nn.Conv2d(cin, cout, 1, bias=False), nn.BatchNorm2d(cout),
            ),
            lambda: nn.Conv2d(cin, cout, 1, stride),
            lambda: nn.Sequential(nn.Conv2d(cin, cout, 3, stride, 1), nn.BatchNorm2d(cout), nn.ReLU()),
        ))()  # fmt: skip
    return Joined(branch, shortcut, rng.choice(("sum", "sum", "in place", "add", "shortcut first", "activated")))


class Net(nn.Module):
    """A stem, stages, perhaps maps of two sizes joined, and a head."""

    def __init__(self, rng: random.Random):
        super().__init__()
        channels = rng.choice((4, 7, 8, 12))
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, rng.choice((1, 2)), 1), nn.BatchNorm2d(channels), nn.ReLU())
        stages = []
        for stage in range(rng.randint(1, 3)):
            blocks: list[nn.Module] = []
            for i in range(rng.randint(1, 3)):
                cout = rng.choice((channels, channels, rng.randint(4, 20)))
                stride = 2 if stage and not i else 1
                kind = rng.randrange(6)
                if kind == 0 and stride == 1:
                    blocks.append(written(rng, channels, cout, plain=True))
                elif kind == 1 and stride == 1:
                    blocks.append(paper.ConvBnAct(channels, cout))
                else:
                    blocks.append(bottleneck(rng, channels, cout, stride))
                channels = cout
            stages.append(nn.Sequential(*blocks))
        self.stages, self.joins, self.head_kind = nn.Sequential(*stages), rng.random() < 0.3, rng.randrange(4)
        self.classifier = nn.Linear(channels, 5) if self.head_kind < 2 else nn.Conv2d(channels, 5, 1)

    def forward(self, x: Tensor) -> Any:
        maps = [self.stem(x)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        out = maps[-1]
        if self.joins:
            out = out + F.interpolate(maps[0], size=out.shape[-2:]).mean(1, keepdim=True)
        if self.head_kind == 0:
            return self.classifier(out.mean((2, 3)))
        if self.head_kind == 1:
            return {"logits": self.classifier(F.adaptive_avg_pool2d(out, 1).flatten(1)), "maps": maps[1:]}
        return (self.classifier(out), out) if self.head_kind == 2 else self.classifier(out)
