"""A FusedGhostModule to try things on, random statistics for any network, and the definition to compare with."""

from collections.abc import Callable

import torch
from torch import nn

from ghostfused import FusedGhostModule

FLOAT64 = {"rtol": 1e-10, "atol": 1e-10}


def randomize(module: nn.Module) -> nn.Module:
    """BatchNorm statistics and shifts away from 0 and 1, and slopes of both signs."""
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            if m.running_mean is not None:
                nn.init.uniform_(m.running_var, 0.5, 1.5)
                nn.init.normal_(m.running_mean, std=0.3)
            if m.affine:
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias, std=0.5)
        if isinstance(m, nn.PReLU):
            nn.init.uniform_(m.weight, -0.5, 0.5)
    return module


def unfused(m: FusedGhostModule, x, input_gate=None, residual=None, output_gate=None):
    """The definition, by running the children of ``m``."""
    primary, cheap = list(m.children())[:2]
    x1 = primary(x if input_gate is None else x * input_gate[:, :, None, None])
    out = torch.cat([x1, cheap(x1)], 1)[:, : m.out_channels]
    if output_gate is not None:
        out = out * nn.functional.interpolate(output_gate, size=out.shape[2:], mode="nearest")
    return out if residual is None else out + residual


def example(dtype=torch.float64, **kwargs) -> tuple[FusedGhostModule, torch.Tensor]:
    m = randomize(FusedGhostModule(6, 11, **kwargs)).to(dtype).eval()
    return m, torch.randn(2, 6, 7, 5, dtype=dtype) * 3


def runs_fused(m: FusedGhostModule) -> bool:
    return not isinstance(m._read(), str)


def independent_copy(module: nn.Module, x: torch.Tensor, duplicate: Callable) -> nn.Module:
    """What ``duplicate`` makes of ``module``: it computes the same, and still does when ``module``'s parameters are others."""
    expected = module(x)
    copied = duplicate(module)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    assert torch.equal(copied(x), expected)
    return copied


EXACT = {"rtol": 1e-9, "atol": 1e-9}


def randomized(model: nn.Module) -> nn.Module:
    """In eval mode and float64, with statistics and weights as after training."""
    return randomize(model).eval().double()
