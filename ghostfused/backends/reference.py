"""The ground truth, and a backend that runs everything everywhere: each op in plain PyTorch operations, on any device and dtype, differentiable.

Every backend is tested against these functions in float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import (
    DTYPES,
    Act,
    Args,
    AvgPoolArgs,
    CastArgs,
    ConcatArgs,
    DepthwiseArgs,
    Gate,
    GateArgs,
    GhostArgs,
    GlobalPoolArgs,
    LinearArgs,
    MaxPoolArgs,
    SqueezeExciteArgs,
    Step,
    UpsampleArgs,
    memory_format,
)
from ..spec.activations import TABLE

DEVICES = None
_NORM_ACT = "mean", "var", "gamma", "beta", "eps", "act", "negative_slope", "slope"


def unavailable() -> str | None:
    return None


def supports(args: Args) -> str | None:
    return None


def activate(x: Tensor, act: int, negative_slope: float = 0.01, slope: Tensor | None = None) -> Tensor:
    """The activation ``act`` (an ``Act``) of x; ``slope`` is PReLU's weight."""
    return x if act == Act.NONE else TABLE[Act(act)].function(x, negative_slope, slope)


@contextlib.contextmanager
def differentiable() -> Iterator[None]:
    """Autograd inside an op's kernel: under a TorchDispatchMode that runs with the autograd keys excluded."""
    key = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._SetExcludeDispatchKeyGuard(key, False), torch.enable_grad():
        yield


def normalize(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    batch_statistics: bool = False,
) -> Tensor:
    """BatchNorm with stored statistics, the identity where there are none; or with the batch's."""
    # in channels_last PyTorch reads numbers that are further apart, or expanded, as if each followed the last
    mean, var, gamma, beta = (t if t is None or t.is_contiguous() else t.contiguous() for t in (mean, var, gamma, beta))
    if batch_statistics:
        return F.batch_norm(x, None, None, gamma, beta, training=True, eps=eps)
    if mean is None:
        return x
    return F.batch_norm(x, mean, var, gamma, beta, training=False, eps=eps)


def within(distance: int, x: Tensor) -> int:
    """A stride or a dilation. Beyond the map's size the result is that of the size, and PyTorch's libraries fail."""
    return distance if distance <= 4096 else min(distance, max(x.shape[2:]))


def ghost_module(a: GhostArgs, batch_statistics: bool = False) -> Tensor:
    """The Ghost module of ``a``, shape (N, out_channels, H', W').

    With ``batch_statistics`` both halves have a norm, by the statistics of this batch.
    """
    x1 = norm_affine(a, "primary", primary(a, load(a)), batch_statistics)
    return store(a, x1, norm_affine(a, "cheap", cheap(a, x1), batch_statistics))


# The five steps of a Ghost module, by the names that they have in each backend.
def load(a: GhostArgs) -> Tensor:
    """x times the input gate."""
    return a.x if a.input_gate is None else a.x * a.input_gate[:, :, None, None]


def primary(a: GhostArgs, x: Tensor) -> Tensor:
    """The primary conv of x."""
    stride, dilation = within(a.stride, x), within(a.dilation, x)
    padding = dilation * (a.kernel_size - 1) // 2
    return F.conv2d(x, a.primary_weight, a.primary_bias, stride, padding, dilation, a.groups)


def norm_affine(a: GhostArgs, half: str, y: Tensor, batch_statistics: bool) -> Tensor:
    """Norm and activation of y, which the conv of ``half`` made: "primary" or "cheap"."""
    mean, var, gamma, beta, eps, act, negative_slope, slope = (getattr(a, f"{half}_{name}") for name in _NORM_ACT)
    return activate(normalize(y, mean, var, gamma, beta, eps, batch_statistics), act, negative_slope, slope)


def cheap(a: GhostArgs, x1: Tensor) -> Tensor:
    """The depthwise conv of x1."""
    return F.conv2d(x1, a.cheap_weight, a.cheap_bias, padding=a.dw_size // 2, groups=a.init_channels)


def store(a: GhostArgs, x1: Tensor, x2: Tensor) -> Tensor:
    """[x1 | x2], cut to ``out_channels``, times the output gate, plus the residual."""
    out = torch.cat([x1, x2], dim=1)
    if out.shape[1] != a.out_channels:
        # a copy: our output never aliases a larger buffer, as a view would, and can be written in place
        out = out[:, : a.out_channels].clone(memory_format=torch.preserve_format)
    if a.output_gate is not None:
        out = out * F.interpolate(a.output_gate, size=out.shape[2:], mode="nearest")
    if a.residual is not None:
        out = out + a.residual
    return out


def depthwise(a: DepthwiseArgs) -> Tensor:
    """The depthwise convolution of ``a``, shape (N, C, H', W')."""
    padding = a.weight.shape[2] // 2, a.weight.shape[3] // 2
    y = F.conv2d(a.x, a.weight, a.bias, within(a.stride, a.x), padding, groups=a.weight.shape[0])
    return activate(normalize(y, a.mean, a.var, a.gamma, a.beta, a.eps), a.act, a.negative_slope, a.slope)


def _matrix(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A fully connected layer of x, (N, C); or a 1×1 convolution, whose derivatives autocast treats in another way."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    return F.conv2d(x[:, :, None, None], weight, bias).flatten(1)


def squeeze_excite(a: SqueezeExciteArgs) -> Tensor:
    """The gate of ``a``, shape (N, C)."""
    hidden = activate(_matrix(a.x.mean((2, 3)), a.reduce_weight, a.reduce_bias), a.act)
    return _through_gate(_matrix(hidden, a.expand_weight, a.expand_bias), a.gate)


def _through_gate(x: Tensor, gate: int) -> Tensor:
    if gate == Gate.SIGMOID:
        return x.sigmoid()
    if gate == Gate.RELU6:
        return F.relu6(x)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return F.hardsigmoid(x)
    # of PyTorch's there is no second derivative: its value, and the gradient of what it is made of
    through = F.relu6(x + 3) / 6
    return through + (F.hardsigmoid(x) - through).detach()


def global_pool(a: GlobalPoolArgs) -> Tensor:
    """The mean of ``a``, shape (N, C, 1, 1)."""
    return a.x.mean((2, 3), keepdim=True)


def linear(a: LinearArgs) -> Tensor:
    """The fully connected layer of ``a``, shape (N, M)."""
    return F.linear(a.x.flatten(1), a.weight, a.bias)


def cast(a: CastArgs) -> Tensor:
    """``a`` in the other dtype."""
    return a.x.to(DTYPES[a.dtype])


def concat(a: ConcatArgs) -> Tensor:
    """The maps of ``a``, one after the other."""
    return torch.cat(a.parts, 1)


def max_pool(a: MaxPoolArgs) -> Tensor:
    """The maxima of ``a``, shape (N, C, H', W')."""
    return F.max_pool2d(a.x, a.kernel, a.stride, a.kernel // 2)


def avg_pool(a: AvgPoolArgs) -> Tensor:
    """The means of ``a``, shape (N, C, H', W')."""
    return F.avg_pool2d(a.x, a.kernel)


def gate(a: GateArgs) -> Tensor:
    """The gate's function of ``a``'s numbers."""
    return _through_gate(a.x, a.gate)


def upsample(a: UpsampleArgs) -> Tensor:
    """The map of ``a`` with ``scale`` times its rows and columns."""
    out = a.x.repeat_interleave(a.scale, 2).repeat_interleave(a.scale, 3)
    return out.contiguous(memory_format=memory_format(a.x))


def run(args: Step) -> Tensor:
    """What the op of ``args`` computes."""
    return _FUNCTIONS[type(args)](args)


_FUNCTIONS: dict = {
    GhostArgs: ghost_module,
    DepthwiseArgs: depthwise,
    SqueezeExciteArgs: squeeze_excite,
    GlobalPoolArgs: global_pool,
    LinearArgs: linear,
    CastArgs: cast,
    ConcatArgs: concat,
    MaxPoolArgs: max_pool,
    AvgPoolArgs: avg_pool,
    GateArgs: gate,
    UpsampleArgs: upsample,
}


def forward(args: Args) -> Tensor:
    """``run``, and a map as dense as the op's fake says, whatever the strides of x."""
    out = run(args)
    return out.contiguous(memory_format=memory_format(args.x)) if out.dim() == 4 else out
