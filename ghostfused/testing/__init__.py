"""Cases, random inputs and verdicts: what the tests and ``ghostfused verify`` share. The tolerances are in ``numerics.py``.

A result is compared with the reference in float64 on the same (already rounded) inputs. It passes if its error is
at most ``factor`` times the error that PyTorch itself makes in that dtype on those inputs, or a few units of rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import reference
from ..numerics import TOLERANCES, relative_error
from ..spec import Act, Args, DepthwiseArgs, Gate, GhostArgs, SqueezeExciteArgs

_FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@dataclasses.dataclass(frozen=True)
class Case:
    """One Ghost module and its input. ``make_args`` draws its tensors."""

    batch: int = 2
    in_channels: int = 16
    height: int = 14
    width: int = 14
    out_channels: int = 24
    ratio: int = 2
    dw_size: int = 3
    kernel_size: int = 1
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    act_primary: str = "relu"
    act_cheap: str = "relu"
    per_channel_slope: bool = False
    primary_norm: str = "bn"  # any of "bn", "bias", "bn+bias", "bn_no_affine", "none"
    cheap_norm: str = "bn"
    dtype: torch.dtype = torch.float32
    norm_dtype: torch.dtype | None = None  # None: dtype
    layout: str = "nchw"  # or "nhwc"
    sliced: bool = False  # x is a slice of a larger buffer, in every dimension
    init_channels: int | None = None  # None: ceil(out_channels / ratio)
    input_gate: bool = False
    residual: bool = False
    output_gate: bool = False
    allow_tf32: bool = False
    seed: int = 0

    def __str__(self) -> str:
        """Only what differs from the defaults."""
        changed = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name in ("batch", "in_channels", "height", "width", "out_channels")
            or getattr(self, f.name) != f.default
        }
        return ",".join(f"{k}={str(v).removeprefix('torch.')}" for k, v in changed.items())


def make_args(case: Case) -> GhostArgs:
    """Fresh random tensors for ``case`` on the CPU: signs mixed, non-zero means and shifts, unequal variances."""
    c, dtype = case, case.dtype
    norm_dtype = c.norm_dtype or dtype
    gen = torch.Generator().manual_seed(c.seed)
    cp = c.init_channels or -(-c.out_channels // c.ratio)
    new = cp * (c.ratio - 1)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64) * scale

    def layout(t: Tensor) -> Tensor:
        return t.to(dtype).to(memory_format=_FORMATS[c.layout])

    def norm(kind: str, channels: int) -> list[Tensor | None]:
        """bias, mean, var, gamma, beta"""
        bias = randn(channels, scale=0.5).to(dtype) if "bias" in kind else None
        if "bn" not in kind:
            return [bias, None, None, None, None]
        var = torch.rand(channels, generator=gen, dtype=torch.float64) + 0.3
        affine = [randn(channels), randn(channels)] if kind != "bn_no_affine" else [None, None]
        return [bias, *(t if t is None else t.to(norm_dtype) for t in (randn(channels, scale=0.5), var, *affine))]

    def slope(act: str, channels: int) -> Tensor | None:
        return randn(channels if c.per_channel_slope else 1, scale=0.3).to(dtype) if act == "prelu" else None

    n, cin, h, w = c.batch, c.in_channels, c.height, c.width
    if c.sliced:
        x = layout(randn(n + 1, cin + 5, h + 2, w + 3))[1:, 2 : 2 + cin, 1 : 1 + h, 2 : 2 + w]
    else:
        x = layout(randn(n, cin, h, w))
    k = c.kernel_size
    fan_in = cin // c.groups * k * k
    primary_weight = randn(cp, cin // c.groups, k, k, scale=fan_in**-0.5).to(dtype)
    cheap_weight = randn(new, 1, c.dw_size, c.dw_size, scale=1 / c.dw_size).to(dtype)
    args = GhostArgs(  # type: ignore[call-arg]
        x, primary_weight, *norm(c.primary_norm, cp), slope(c.act_primary, cp),  # type: ignore[arg-type]
        cheap_weight, *norm(c.cheap_norm, new), slope(c.act_cheap, new),
        None, None, None,
        1e-5, int(Act[c.act_primary.upper()]), 0.1, 1e-3, int(Act[c.act_cheap.upper()]), 0.2,
        c.out_channels, c.stride, c.dilation, c.groups, c.allow_tf32,
    )  # fmt: skip
    shape = args.output_shape()
    gate_shape = (n, c.out_channels, max(shape[2] // 2, 1), max(shape[3] // 2, 1))
    return args._replace(
        input_gate=randn(n, cin).to(dtype) if c.input_gate else None,
        residual=layout(randn(*shape)) if c.residual else None,
        output_gate=layout(randn(*gate_shape)) if c.output_gate else None,
    )


@dataclasses.dataclass(frozen=True)
class DepthwiseCase:
    """One depthwise convolution with its norm and activation, and its input."""

    batch: int = 2
    channels: int = 12
    height: int = 14
    width: int = 14
    kernel: tuple[int, int] = (3, 3)
    stride: int = 2
    act: str = "none"
    per_channel_slope: bool = False
    norm: str = "bn"  # as Case.primary_norm
    dtype: torch.dtype = torch.float32
    norm_dtype: torch.dtype | None = None
    layout: str = "nchw"
    sliced: bool = False
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class SqueezeExciteCase:
    """One squeeze-and-excite gate and its input."""

    batch: int = 2
    channels: int = 24
    reduced: int = 8
    height: int = 14
    width: int = 14
    act: str = "relu"
    gate: str = "hardsigmoid"
    bias: bool = True
    dtype: torch.dtype = torch.float32
    layout: str = "nchw"
    sliced: bool = False
    seed: int = 0


def make_depthwise(case: DepthwiseCase) -> DepthwiseArgs:
    """Fresh random tensors for ``case``, as ``make_args``: a Ghost module's own depthwise conv and norm."""
    c, (kh, kw) = case, case.kernel
    a = make_args(
        Case(
            batch=c.batch, in_channels=c.channels, height=c.height, width=c.width, init_channels=c.channels,
            out_channels=2 * c.channels, dw_size=max(kh, kw), cheap_norm=c.norm, act_cheap=c.act,
            per_channel_slope=c.per_channel_slope, dtype=c.dtype, norm_dtype=c.norm_dtype, layout=c.layout,
            sliced=c.sliced, seed=c.seed,
        )
    )  # fmt: skip
    weight = a.cheap_weight[:, :, :kh, :kw].contiguous()
    norm = a.cheap_mean, a.cheap_var, a.cheap_gamma, a.cheap_beta
    settings = a.cheap_eps, a.cheap_act, a.cheap_negative_slope, c.stride
    return DepthwiseArgs(a.x, weight, a.cheap_bias, *norm, a.cheap_slope, *settings)


def make_squeeze_excite(case: SqueezeExciteCase) -> SqueezeExciteArgs:
    """Fresh random tensors for ``case``; the means differ from zero, and gates reach both ends of their range."""
    c = case
    a = make_args(
        Case(
            batch=c.batch, in_channels=c.channels, height=c.height, width=c.width, out_channels=2, dtype=c.dtype,
            layout=c.layout, sliced=c.sliced, seed=c.seed,
        )
    )  # fmt: skip
    gen = torch.Generator().manual_seed(c.seed + 1)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=gen, dtype=torch.float64) * scale).to(c.dtype)

    a.x.add_(randn(1, c.channels, 1, 1))
    biases = [randn(c.reduced), randn(c.channels)] if c.bias else [None, None]
    reduce_weight = randn(c.reduced, c.channels, scale=c.channels**-0.5)
    expand_weight = randn(c.channels, c.reduced, scale=3 * c.reduced**-0.5)
    act, gate = int(Act[c.act.upper()]), int(Gate[c.gate.upper()])
    return SqueezeExciteArgs(a.x, reduce_weight, biases[0], expand_weight, biases[1], act, gate)


def make(case: Case | DepthwiseCase | SqueezeExciteCase) -> Args:
    """Fresh random tensors for a case of any op."""
    if isinstance(case, Case):
        return make_args(case)
    return make_depthwise(case) if isinstance(case, DepthwiseCase) else make_squeeze_excite(case)


def convert(args: Args, dtype: torch.dtype) -> Args:
    """``args`` with every tensor in ``dtype``."""
    return _map(lambda t: t.to(dtype), args)


def to_device(args: Args, device: str | torch.device) -> Args:
    """``args`` on ``device`` with the same strides: whole storages are copied, and viewed as before."""

    def move(t: Tensor) -> Tensor:
        buffer = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
        return buffer.to(device).as_strided(t.shape, t.stride(), t.storage_offset())

    return _map(move, args)


def _map(fn: Callable[[Tensor], Tensor], args: Args) -> Args:
    tensors = [t if t is None else fn(t) for t in args.tensors]
    return type(args)(*tensors, *args[len(tensors) :])  # type: ignore[arg-type]


def _round_to_tf32(t: Tensor) -> Tensor:
    bits = t.float().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


VAGUE = 0.5
"""A limit above it, half of the largest output, decides nothing; infinity is one, where PyTorch's own result overflows."""


class Verdict(NamedTuple):
    error: float
    """Of the result, against float64."""
    torch_error: float
    """Of PyTorch's own operations in the same dtype."""
    limit: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit

    @property
    def decides(self) -> bool:
        """Whether the limit tells right from wrong, rather than let pass whatever is as far off as PyTorch's own result."""
        return self.limit <= VAGUE


def judge(out: Tensor, args: Args) -> Verdict:
    """Compares ``out`` with the float64 reference on ``args`` (CPU tensors, as ``make_args`` made them)."""
    expected = reference.run(convert(args, torch.float64))
    if isinstance(args, GhostArgs) and args.allow_tf32 and args.x.dtype == torch.float32:
        # what TF32 hardware computes exactly: products of rounded operands
        x = args.x if args.input_gate is None else args.x * args.input_gate[:, :, None, None]
        rounded = args._replace(
            x=_round_to_tf32(x.contiguous()), primary_weight=_round_to_tf32(args.primary_weight), input_gate=None
        )
        own, tolerance = reference.ghost_module(rounded), TOLERANCES["tf32"]
    else:
        own, tolerance = reference.run(convert(args, args.x.dtype)), TOLERANCES[args.x.dtype]
    torch_error = relative_error(own, expected)
    return Verdict(relative_error(out, expected), torch_error, max(tolerance.factor * torch_error, tolerance.floor))
