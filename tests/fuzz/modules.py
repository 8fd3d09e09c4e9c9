"""Ghost modules as people may build and write them, drawn at random."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from ghost_forms import Written
from torch import Tensor, nn
from users_networks import OfficialGhost

from ghostfused import FusedGhostModule
from ghostfused.models import paper, seed
from ghostfused.spec import Act

ACTS = [act.name.lower() for act in Act]


class HSwish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * F.relu6(x + 3) / 6


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class MyReLU(nn.ReLU):
    pass


LAYERS: list[Callable[[], nn.Module]] = [
    nn.ReLU, lambda: nn.ReLU(inplace=True), nn.ReLU6, nn.SiLU, lambda: nn.SiLU(inplace=True), nn.Hardswish,
    nn.GELU, lambda: nn.GELU("tanh"), nn.Mish, lambda: nn.LeakyReLU(0.2), nn.PReLU, nn.Identity, HSwish, Swish, MyReLU, nn.Sequential,
]  # fmt: skip
UNKNOWN: list[Callable[[], nn.Module]] = [nn.Softplus, nn.CELU, nn.ELU, nn.Tanh]
"""Of which no kernel is: the module stays as it is, or runs its layers."""
FUNCTIONS = [torch.relu, F.relu, F.relu6, F.silu, F.hardswish, F.gelu, F.mish, lambda x: x.relu(), lambda x: x]


NORMS: list[Callable[[int], nn.Module]] = [
    nn.BatchNorm2d, nn.BatchNorm2d, lambda c: nn.BatchNorm2d(c, eps=1e-3), lambda c: nn.BatchNorm2d(c, affine=False),
    lambda c: nn.BatchNorm2d(c, momentum=None), lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    lambda c: nn.Identity(),
]  # fmt: skip


def written(rng: random.Random, cin: int, cout: int, act: bool = True, plain: bool = False) -> nn.Module:
    """(N, cin, H, W) → (N, cout, H, W); unless ``plain``, perhaps at half the size."""
    if rng.random() < 0.2:
        return rng.choice((seed.GhostModule, paper.GhostModule, OfficialGhost))(cin, cout)
    if rng.random() < 0.1:
        return OfficialGhost(cin, cout, mode="attn")
    ratio = rng.choice((2, 2, 2, 3, 4))
    form = rng.choice(("flat", "functions", "backwards", "plain", "plain"))
    choices = FUNCTIONS if form == "functions" else LAYERS + (UNKNOWN if rng.random() < 0.1 else [])
    primary: dict[str, Any] = {"kernel_size": 1, "bias": rng.random() < 0.5}
    if not plain and rng.random() < 0.25:
        primary = {"kernel_size": 3, "padding": 1, "stride": rng.choice((1, 2))}
    chosen = rng.choice(choices) if act else (lambda x: x) if form == "functions" else nn.Identity
    norms = [rng.choice(NORMS) for _ in range(2)]
    init = -(-cout // ratio)
    cut = None if init * ratio == cout and rng.random() < 0.5 else cout
    return Written(form, cin, init, ratio, primary, rng.choice((1, 3, 3, 5, 7)), norms, chosen, cut)


def settings(rng: random.Random) -> dict[str, Any]:
    """Arguments of a FusedGhostModule."""
    groups = rng.choice((1, 1, 1, 1, 2))
    ratio = rng.choice((2, 2, 2, 3, 4))
    out = rng.randint(ratio, 40)
    if groups == 2:
        out = 2 * ratio * rng.randint(1, 5)
    kernel = rng.choice((1, 1, 1, 3, 5))
    return {
        "in_channels": groups * rng.randint(1, 24 // groups), "out_channels": out, "s": ratio, "kernel_size": kernel,
        "stride": rng.choice((1, 1, 1, 2)), "dw_size": rng.choice((1, 3, 3, 5, 7)), "groups": groups,
        "dilation": rng.choice((1, 1, 2)) if kernel > 1 else 1, "act_primary": rng.choice(ACTS), "act_cheap": rng.choice(ACTS),
        "keys": rng.choice(("seed", "paper", "ultralytics")),
    }  # fmt: skip


class Unfused(nn.Module):
    """The definition: the layers of a FusedGhostModule one after the other."""

    def __init__(self, fused: FusedGhostModule):
        super().__init__()
        self.out_channels = fused.out_channels
        for name, child in fused.named_children():
            self.add_module(name, child)

    def forward(
        self,
        x: Tensor,
        input_gate: Tensor | None = None,
        residual: Tensor | None = None,
        output_gate: Tensor | None = None,
    ) -> Tensor:
        primary, cheap = self.children()
        one = primary(x if input_gate is None else x * input_gate[:, :, None, None])
        out = torch.cat([one, cheap(one)], 1)[:, : self.out_channels]
        if output_gate is not None:
            out = out * F.interpolate(output_gate, size=out.shape[2:], mode="nearest")
        return out if residual is None else out + residual
