"""The training kernels in plain PyTorch, for any device and dtype: what the others are compared with, step by step."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import GhostArgs
from .reference import activate, differentiable
from .training_step import KERNELS, TrainingKernels, primary_conv

_aten = torch.ops.aten


class _Half(NamedTuple):
    """One half's norm and activation, in the dtype of the statistics: z = (y - center) * scale + shift."""

    center: Tensor  # the mean without the bias
    rstd: Tensor
    scale: Tensor
    shift: Tensor
    act: int
    negative_slope: float
    slope: Tensor | None

    def normed(self, y: Tensor) -> Tensor:
        return (y - self.center) * self.scale + self.shift

    def xhat(self, y: Tensor) -> Tensor:
        return (y - self.center) * self.rstd

    def activate(self, z: Tensor) -> Tensor:
        return activate(z, self.act, self.negative_slope, self.slope)

    def activate_backward(self, grad: Tensor, z: Tensor) -> Tensor:
        with differentiable():
            z = z.detach().requires_grad_()
            return torch.autograd.grad(self.activate(z), z, grad)[0]

    def sums(self, grad: Tensor, dz: Tensor, z: Tensor, y: Tensor) -> Tensor:
        return torch.stack([t.sum((0, 2, 3)) for t in (dz, dz * self.xhat(y), grad * z.clamp(max=0))])


def _half(a: GhostArgs, half: str) -> _Half:
    bias, mean, var, gamma, beta, slope = (
        getattr(a, f"{half}_{name}") for name in ("bias", "mean", "var", "gamma", "beta", "slope")
    )
    dtype = _dtype(a)
    one, zero = torch.ones((), dtype=dtype, device=a.x.device), torch.zeros((), dtype=dtype, device=a.x.device)
    bias = zero if bias is None else bias.to(dtype).view(-1, 1, 1)
    if mean is None:
        center, rstd = -bias, one
    else:
        # rounded once: what they are off by, all of a channel's gradients are off by
        center, rstd = mean.view(-1, 1, 1) - bias, (var.double() + getattr(a, f"{half}_eps")).rsqrt().view(-1, 1, 1)
    scale = (rstd if gamma is None else rstd * gamma.view(-1, 1, 1)).to(dtype)
    rstd = rstd.to(dtype)
    shift = zero if beta is None else beta.view(-1, 1, 1)
    slope = None if slope is None else slope.to(dtype)
    return _Half(center, rstd, scale, shift, getattr(a, f"{half}_act"), getattr(a, f"{half}_negative_slope"), slope)


def _dtype(a: GhostArgs) -> torch.dtype:
    """Elementwise work and depthwise convolutions: float32 for half precision."""
    return torch.float64 if a.x.dtype == torch.float64 else torch.float32


def _depthwise(a: GhostArgs, y1: Tensor) -> Tensor:
    """y2, rounded to x's dtype."""
    p = _half(a, "primary")
    x1 = p.activate(p.normed(y1))
    weight = a.cheap_weight.to(x1.dtype)
    return F.conv2d(x1, weight, padding=a.dw_size // 2, groups=a.init_channels).to(a.x.dtype)


def _statistics(y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if y.numel() == 0:
        return y.new_zeros(y.shape[1], dtype=dtype), y.new_zeros(y.shape[1], dtype=dtype)
    var, mean = torch.var_mean(y.to(dtype), (0, 2, 3), correction=0)
    return mean, var


def supports(a: GhostArgs) -> str | None:
    return None


def primary_statistics(a: GhostArgs, out: Tensor) -> tuple[Tensor, Tensor]:
    y1 = primary_conv(a)
    out[:, : a.init_channels] = y1[:, : a.out_channels]
    return _statistics(y1, _dtype(a))


def cheap_statistics(a: GhostArgs, out: Tensor) -> tuple[Tensor, Tensor]:
    y2 = _depthwise(a, _y1(a, out))
    out[:, a.init_channels :] = y2[:, : max(a.out_channels - a.init_channels, 0)]
    return _statistics(y2, _dtype(a))


def _y1(a: GhostArgs, out: Tensor) -> Tensor:
    """From the output, which may have cut it."""
    return out[:, : a.init_channels] if a.out_channels >= a.init_channels else primary_conv(a)


def normalize(a: GhostArgs, out: Tensor) -> None:
    for half, maps in (("primary", out[:, : a.init_channels]), ("cheap", out[:, a.init_channels :])):
        h = _half(a, half)
        cut = [t if t.dim() == 0 else t[: maps.shape[1]] for t in h[:4]]
        slope = h.slope if h.slope is None or h.slope.numel() == 1 else h.slope[: maps.shape[1]]
        h = h._replace(center=cut[0], rstd=cut[1], scale=cut[2], shift=cut[3], slope=slope)
        if maps.shape[1]:
            maps.copy_(h.activate(h.normed(maps)))
    if a.output_gate is not None:
        out.mul_(F.interpolate(a.output_gate, size=out.shape[2:], mode="nearest"))
    if a.residual is not None:
        out.add_(a.residual)


def _grad_halves(a: GhostArgs, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x1 and x2 but for what reaches x1 by the cheap operation; zero for channels that are cut."""
    grad = grad.to(_dtype(a))
    if a.output_gate is not None:
        grad = grad * F.interpolate(a.output_gate.to(grad.dtype), size=grad.shape[2:], mode="nearest")
    cp, new = a.init_channels, a.cheap_weight.shape[0]
    grad = F.pad(grad, (0, 0, 0, 0, 0, cp + new - grad.shape[1]))
    return grad[:, :cp], grad[:, cp:]


def cheap_backward(
    a: GhostArgs, grad: Tensor, y1: Tensor, batch_statistics: bool, sums: bool, product: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    c = _half(a, "cheap")
    y2 = _depthwise(a, y1)
    z2 = c.normed(y2)
    if product is not None:
        p = _half(a, "primary")
        ungated = torch.cat([p.activate(p.normed(y1)), c.activate(z2)], 1)[:, : a.out_channels]
        product.copy_(grad.to(ungated.dtype) * ungated)
    _, g2 = _grad_halves(a, grad)
    dz2 = c.activate_backward(g2, z2)
    totals = c.sums(g2, dz2, z2, y2) if sums else None
    if batch_statistics:
        return dz2.to(a.x.dtype), y2, totals
    return (dz2 * c.scale).to(a.x.dtype), None, totals


def primary_backward(
    a: GhostArgs, grad: Tensor, y1: Tensor, dz2: Tensor | None, y2: Tensor | None, means2: Tensor | None,
    batch_statistics: bool, primary: bool, sums: bool, weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    p = _half(a, "primary")
    z1 = p.normed(y1)
    dx1, _ = _grad_halves(a, grad)
    dw2 = None
    if dz2 is not None:
        c = _half(a, "cheap")
        dy2 = dz2.to(_dtype(a))
        if batch_statistics:
            assert y2 is not None
            assert means2 is not None
            dy2 = c.scale * (dy2 - means2[0].view(-1, 1, 1) - c.xhat(y2) * means2[1].view(-1, 1, 1))
        padding = [a.dw_size // 2] * 2
        through_x2, dw2, _ = _aten.convolution_backward(
            dy2, p.activate(z1), a.cheap_weight.to(dy2.dtype), None, [1, 1], padding, [1, 1], False, [0, 0],
            a.init_channels, [primary, weight, False],
        )  # fmt: skip
        if primary:
            dx1 = dx1 + through_x2
    if not primary:
        return None, None, dw2
    dz1 = p.activate_backward(dx1, z1)
    totals = p.sums(dx1, dz1, z1, y1) if sums else None
    return (dz1 if batch_statistics else dz1 * p.scale).to(a.x.dtype), totals, dw2


def normalize_backward(a: GhostArgs, dz1: Tensor, y1: Tensor, means1: Tensor) -> None:
    p = _half(a, "primary")
    dz1.copy_(p.scale * (dz1 - means1[0].view(-1, 1, 1) - p.xhat(y1) * means1[1].view(-1, 1, 1)))


KERNELS["reference"] = TrainingKernels(
    supports, primary_statistics, cheap_statistics, normalize, cheap_backward, primary_backward, normalize_backward
)
