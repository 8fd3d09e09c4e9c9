"""The functions under the fused modules, for those who have tensors and no module."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from . import backends
from .backends import reference
from .ops.autograd import call
from .ops.transforms import refuse_transforms, runs_plain
from .spec import Act, Args, BatchNorm, DepthwiseArgs, Gate, GhostArgs, SqueezeExciteArgs
from .spec.checks import validate
from .spec.conversions import activation, gate_kind, norm_of
from .spec.takes import constant_to_dynamo

Norm = BatchNorm | nn.modules.batchnorm._BatchNorm
"""The tensors of a BatchNorm, or PyTorch's module of it, of which the stored statistics count in either mode."""


def ghost_module(
    x: Tensor,
    primary_weight: Tensor,
    cheap_weight: Tensor,
    *,
    primary_bias: Tensor | None = None,
    primary_bn: Norm | None = None,
    act_primary: str | Act = "relu",
    primary_slope: float | Tensor | None = None,
    cheap_bias: Tensor | None = None,
    cheap_bn: Norm | None = None,
    act_cheap: str | Act = "relu",
    cheap_slope: float | Tensor | None = None,
    out_channels: int | None = None,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    input_gate: Tensor | None = None,
    residual: Tensor | None = None,
    output_gate: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """A Ghost module (Han et al., CVPR 2020) with stored BatchNorm statistics, in one kernel where there is one.

    ``x1 = act(bn(conv(x * input_gate)))``, ``x2 = act(bn(depthwise(x1)))``,
    ``concat([x1, x2])[:, :out_channels] * upsample(output_gate) + residual``.

    Args:
        x: (N, Cin, H, W), any strides; float32, float16, bfloat16 or float64.
        primary_weight: (Cp, Cin / groups, k, k), x's dtype. The conv pads by ``dilation * (k - 1) // 2``.
        cheap_weight: (Cp * (ratio - 1), 1, d, d), d odd, x's dtype; ratio is read off its shape.
        primary_bias, cheap_bias: (Cp,) and (Cp * (ratio - 1),), added before the norm.
        primary_bn, cheap_bn: statistics and affine tensors, of x's dtype or float32: a ``BatchNorm``, or an ``nn.BatchNorm2d``,
            whose stored statistics count even in train mode; None for no norm.
        act_primary, act_cheap: "none", "relu", "relu6", "silu", "hardswish", "leaky_relu", "prelu", "gelu", "gelu_tanh" or "mish".
        primary_slope, cheap_slope: LeakyReLU's negative slope (a float, default 0.01), or PReLU's weight, of
            shape (1,) or one per channel.
        out_channels: the output's channels; the default is all Cp * ratio.
        stride, dilation, groups: of the primary conv.
        input_gate: (N, Cin), multiplies x: the scale of a squeeze-and-excite block.
        residual: (N, out_channels, H', W'), added last.
        output_gate: (N, out_channels, Hg, Wg), multiplies the output after nearest upsampling to (H', W'), as
            GhostNetV2's DFC attention does.
        backend: "auto", or a name in ``ghostfused.backends.BACKENDS``.

    Returns:
        (N, out_channels, H', W'), a fresh tensor, channels_last if x is, else contiguous.

    Raises:
        ValueError, TypeError: an argument doesn't fit; the message names it, what was expected and what came. They are
            RuntimeErrors too, as PyTorch's own layers raise of most such inputs.
        RuntimeError: the backend asked for can't run this call; the message says why.
    """
    args = arguments(
        x, primary_weight, cheap_weight, primary_bias, primary_bn, act_primary, primary_slope, cheap_bias, cheap_bn,
        act_cheap, cheap_slope, out_channels, stride, dilation, groups, input_gate, residual, output_gate,
    )  # fmt: skip
    return run(args, backend)


def arguments(
    x: Tensor, primary_weight: Tensor, cheap_weight: Tensor,
    primary_bias: Tensor | None = None, primary_bn: Norm | None = None,
    act_primary: str | Act = "relu", primary_slope: float | Tensor | None = None,
    cheap_bias: Tensor | None = None, cheap_bn: Norm | None = None,
    act_cheap: str | Act = "relu", cheap_slope: float | Tensor | None = None,
    out_channels: int | None = None, stride: int = 1, dilation: int = 1, groups: int = 1,
    input_gate: Tensor | None = None, residual: Tensor | None = None, output_gate: Tensor | None = None,
) -> GhostArgs:  # fmt: skip
    """``ghost_module``'s arguments as a GhostArgs, cast as autocast asks."""
    primary_act, primary_negative_slope, primary_prelu = activation(
        "act_primary", act_primary, "primary_slope", primary_slope
    )
    cheap_act, cheap_negative_slope, cheap_prelu = activation("act_cheap", act_cheap, "cheap_slope", cheap_slope)
    if dtype := _autocast_dtype(x):
        x, primary_weight, cheap_weight, primary_bias, cheap_bias, primary_prelu, cheap_prelu = _cast(  # type: ignore[assignment]
            dtype, x, primary_weight, cheap_weight, primary_bias, cheap_bias, primary_prelu, cheap_prelu
        )
        input_gate, residual, output_gate = (
            t if t is None else t.to(x.dtype) for t in (input_gate, residual, output_gate)
        )
    p, c = norm_of("primary_bn", primary_bn), norm_of("cheap_bn", cheap_bn)
    return GhostArgs(
        x, primary_weight, primary_bias, p.mean, p.var, p.weight, p.bias, primary_prelu,
        cheap_weight, cheap_bias, c.mean, c.var, c.weight, c.bias, cheap_prelu,
        input_gate, residual, output_gate,
        p.eps, primary_act, primary_negative_slope, c.eps, cheap_act, cheap_negative_slope,
        cheap_weight.shape[0] + primary_weight.shape[0] if out_channels is None else out_channels,
        stride, dilation, groups, x.is_cuda and x.dtype == torch.float32 and tf32_allowed(),
    )  # fmt: skip


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of x's convolutions; None where it is off."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a Tensor, got {type(x).__name__}")
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as autocast to ``dtype`` hands them to a convolution; what is float64 or None stays."""
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def conv1x1(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    bn: Norm | None = None,
    act: str | Act = "none",
    slope: float | Tensor | None = None,
    input_gate: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``act(bn(conv1x1(x * input_gate))) + residual``: a Ghost module whose ghosts are all cut off, in the same kernels.

    Args:
        x: (N, Cin, H, W), any strides.
        weight: (Cout, Cin, 1, 1), x's dtype.
        bias: (Cout,).
        bn, act, slope, input_gate, residual, backend: as in ``ghost_module``.

    Returns:
        (N, Cout, H, W), a fresh tensor.

    Raises:
        ValueError, TypeError, RuntimeError: as ``ghost_module``.
    """
    return ghost_module(
        x,
        weight,
        weight[:, :1],  # of the right shape, and never used
        primary_bias=bias,
        primary_bn=norm_of("bn", bn),
        act_primary=act,
        primary_slope=slope,
        act_cheap=Act.NONE,
        out_channels=weight.shape[0],
        input_gate=input_gate,
        residual=residual,
        backend=backend,
    )


def depthwise(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    bn: Norm | None = None,
    act: str | Act = "none",
    slope: float | Tensor | None = None,
    stride: int = 1,
    backend: str = "auto",
) -> Tensor:
    """``act(bn(depthwise_conv(x)))`` with stored BatchNorm statistics.

    Args:
        x: (N, C, H, W), any strides.
        weight: (C, 1, kh, kw), both odd, x's dtype. The conv pads by ``(kh // 2, kw // 2)``.
        bias: (C,).
        bn, act, slope, backend: as in ``ghost_module``.
        stride: in both directions.

    Returns:
        (N, C, H', W'), a fresh tensor, channels_last if x is, else contiguous.

    Raises:
        ValueError, TypeError, RuntimeError: as ``ghost_module``.
    """
    kind, negative_slope, prelu = activation("act", act, "slope", slope)
    if dtype := _autocast_dtype(x):
        x, weight, bias, prelu = _cast(dtype, x, weight, bias, prelu)  # type: ignore[assignment]
    n = norm_of("bn", bn)
    norm = n.mean, n.var, n.weight, n.bias
    return run(DepthwiseArgs(x, weight, bias, *norm, prelu, n.eps, kind, negative_slope, stride), backend)


def squeeze_excite(
    x: Tensor,
    reduce_weight: Tensor,
    expand_weight: Tensor,
    *,
    reduce_bias: Tensor | None = None,
    expand_bias: Tensor | None = None,
    act: str | Act = "relu",
    gate: str | Gate = "sigmoid",
    backend: str = "auto",
) -> Tensor:
    """The gate of a squeeze-and-excite block: ``gate(expand(act(reduce(mean of x over H and W))))``.

    Args:
        x: (N, C, H, W), any strides.
        reduce_weight, expand_weight: (R, C) and (C, R), or those of 1×1 convolutions; x's dtype.
        reduce_bias, expand_bias: (R,) and (C,).
        act: an activation without a slope.
        gate: "sigmoid", "hardsigmoid" or "relu6".
        backend: as in ``ghost_module``.

    Returns:
        (N, C), what ``ghost_module`` takes as ``input_gate``.

    Raises:
        ValueError, TypeError, RuntimeError: as ``ghost_module``.
    """
    kind = activation("act", act, "slope", None)[0]
    if dtype := _autocast_dtype(x):
        x, reduce_weight, reduce_bias, expand_weight, expand_bias = _cast(  # type: ignore[assignment]
            dtype, x, reduce_weight, reduce_bias, expand_weight, expand_bias
        )
    weights = reduce_weight, reduce_bias, expand_weight, expand_bias
    return run(SqueezeExciteArgs(x, *weights, kind, gate_kind(gate)), backend)


_CHOICES = {"primary_act", "cheap_act", "act", "gate", "stride", "dilation", "groups"}
"""Integers that choose what is computed: a symbol in their place, as ``torch.compile(dynamic=True)`` makes of those in a tuple,
equals no ``Act`` and no ``Gate``."""


def run(args: Args, backend: str = "auto") -> Tensor:
    """The op of ``args``: choose a backend, check, call it."""
    if torch.compiler.is_compiling():
        chosen: Any = {name: operator.index(getattr(args, name)) for name in args._fields if name in _CHOICES}
        args = args._replace(**chosen)
    if runs_plain(backend, *args.tensors):
        validate(args)
        return reference.run(args)
    refused = False
    if backend == "auto" and backends.cpu.may_try(args):
        try:
            return call("cpu", args)
        except RuntimeError:
            refused = True  # the reference can run it, or validate says why nobody can
    try:
        name = "reference" if refused else backends.choose(args, backend)
        if name != "reference":
            refuse_transforms(name)
            return call(name, args)  # each op checks all that validate does
        validate(args)
        return reference.run(args)  # without an op: autograd and torch.compile see through it
    except Exception:
        validate(args)  # if an argument is to blame, this says which
        raise


@constant_to_dynamo  # it can't trace the getter; its guard on global state covers a change
def tf32_allowed() -> bool:
    """Whether PyTorch's setting for float32 matrix products allows TF32 (by default it doesn't).

    The 1×1 convolution is a matrix product, so the stricter of PyTorch's two settings counts, not cuDNN's.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
