"""Ghost modules as people write them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Backwards(nn.Module):
    """Registered in another order than run."""

    def __init__(self, conv: nn.Module, norm: nn.Module, act: nn.Module):
        super().__init__()
        self.act, self.norm, self.conv = act, norm, conv

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Written(nn.Module):
    """A Ghost module in one of the forms in which they are written."""

    def __init__(
        self,
        form: str,
        cin: int,
        init: int,
        ratio: int,
        primary: dict,
        dw_size: int,
        norms: list,
        act: Any,
        cut: int | None,
    ):
        super().__init__()
        self.form, self.cut = form, cut
        new = init * (ratio - 1)
        convs = nn.Conv2d(cin, init, **primary), nn.Conv2d(init, new, dw_size, 1, dw_size // 2, groups=init)
        layers = [
            (conv, norm(conv.out_channels), nn.Identity() if form == "functions" else act())
            for conv, norm in zip(convs, norms, strict=True)
        ]
        if form in ("flat", "functions"):
            (self.conv1, self.bn1, self.act), (self.conv2, self.bn2, _) = layers
            self.f = act if form == "functions" else None
        else:
            kind = Backwards if form == "backwards" else nn.Sequential
            self.cheap, self.primary = kind(*layers[1]), kind(*layers[0])

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "flat":
            one = self.act(self.bn1(self.conv1(x)))
            two = self.act(self.bn2(self.conv2(one)))
        elif self.form == "functions":
            one = self.f(self.bn1(self.conv1(x)))
            two = self.f(self.bn2(self.conv2(one)))
        else:
            one = self.primary(x)
            two = self.cheap(one)
        out = torch.cat([one, two], dim=1)
        return out if self.cut is None else out[:, : self.cut]
