"""The Triton kernel as a backend: when it can run and how it is launched. The kernel is in ``kernels.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...spec import Args, DepthwiseArgs, GhostArgs, SqueezeExciteArgs, memory_format
from ...spec.takes import TAKES, has_window, kernel_refusal
from . import bottleneck
from .configs import Cheap, Primary, blocks, precision
from .launch import (
    DEVICES,
    INTERPRETED,
    INTERPRETER,
    MAX_PROGRAMS,
    align,
    is_channels_last,
    launch_kernel,
    reach,
    unavailable,
    x_strides,
)

__all__ = ["DEVICES", "INTERPRETED", "forward", "supports", "unavailable"]

_PARAMETERS = ("weight", "bias", "mean", "var", "gamma", "beta", "slope")
Choice = tuple[Primary, Cheap]
_MIN_TILE = 32, 8
"""The smallest tile of one program, in pixels and init channels."""
_MAX_WINDOW = 2**30
"""Most pixels from end to end of a primary conv's window, whose coordinates have 32 bits."""


def supports(args: Args) -> str | None:
    """Why the kernel can't run ``args``; None if it can."""
    reason = unavailable()
    if reason is not None:
        return reason
    if not args.x.is_cuda and not INTERPRETED:
        return f"x is on {args.x.device} and Triton needs a GPU ({INTERPRETER})"
    n, _, h, w = args.output_shape() if isinstance(args, GhostArgs) else args.x.shape
    channels = args.init_channels if isinstance(args, GhostArgs) else args.x.shape[1]
    if n * -(-h * w // _MIN_TILE[0]) * -(-channels // _MIN_TILE[1]) > MAX_PROGRAMS:
        return f"batch {n} at {h}×{w} may need more than {MAX_PROGRAMS} programs"
    if isinstance(args, GhostArgs) and max(args.kernel_size * args.dilation, args.stride) > _MAX_WINDOW:
        return f"a primary conv with stride {args.stride}, dilation {args.dilation}: more than {_MAX_WINDOW} pixels"
    return kernel_refusal(args, "triton")


def scratch(args: GhostArgs, out: Tensor) -> Tensor | None:
    """Where x1 goes: the output itself, or a buffer if a gate or a residual make its first half differ from x1.

    None if it goes nowhere: it differs, and no depthwise conv will read it.
    """
    if args.residual is None and args.output_gate is None:
        return out
    if not has_ghosts(args):
        return None
    shape = (out.shape[0], args.init_channels, *out.shape[2:])
    return torch.empty(shape, dtype=out.dtype, device=out.device, memory_format=memory_format(out))


def has_ghosts(args: GhostArgs) -> bool:
    """Whether the depthwise conv makes any of the output; else the module is a 1×1 conv."""
    return args.out_channels > args.init_channels


def plan(
    args: GhostArgs,
    out: Tensor,
    x1: Tensor | None,
    primary: bool = True,
    cheap: bool = True,
    choice: Choice | None = None,
) -> dict[str, Any]:
    """The arguments of ``ghost_kernel`` for a launch of both steps, or of one; ``choice`` replaces the table of blocks."""
    a, (_, cin, x_h, x_w), (h, w) = args, args.x.shape, out.shape[2:]
    window = has_window(a)
    weight = a.primary_weight
    taps_first = window and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
    cheap = cheap and has_ghosts(a)
    nhwc = is_channels_last(out)
    rs = a.residual.stride() if a.residual is not None else (0, 0, 0, 0)
    gs = a.output_gate.stride() if a.output_gate is not None else (0, 0, 0, 0)
    gate_h, gate_w = a.output_gate.shape[2:] if a.output_gate is not None else (1, 1)
    longest = max(*map(reach, (a.x, out, a.residual, a.output_gate)), a.primary_weight.numel(), a.cheap_weight.numel())
    parameters: dict[str, Any] = {f"{half}_{name}_ptr": None for half in ("primary", "cheap") for name in _PARAMETERS}
    for half in ("primary",) * primary + ("cheap",) * cheap:
        # contiguous already in any usual model, or the primary conv's weight in channels_last: then no copy
        parameters |= {
            f"{half}_{name}_ptr": t
            if (t := getattr(a, f"{half}_{name}")) is None or (taps_first and t is weight)
            else t.contiguous()
            for name in _PARAMETERS
        }
    return dict(
        x_ptr=a.x, residual_ptr=a.residual, output_gate_ptr=a.output_gate, x1_ptr=x1, out_ptr=out, **parameters,
        input_gate_ptr=None if a.input_gate is None else a.input_gate.contiguous(),
        primary_eps=a.primary_eps, primary_negative_slope=a.primary_negative_slope,
        primary_slope_stride=int(a.primary_slope is not None and a.primary_slope.numel() > 1),
        cheap_eps=a.cheap_eps, cheap_negative_slope=a.cheap_negative_slope,
        cheap_slope_stride=int(a.cheap_slope is not None and a.cheap_slope.numel() > 1),
        H=h, W=w, x_h=x_h if window else None, x_w=x_w if window else None, Cin=cin, Cp=a.init_channels, out_channels=a.out_channels,
        residual_sn=rs[0], residual_sc=rs[1], residual_sh=rs[2], residual_sw=rs[3],
        gate_h=gate_h, gate_w=gate_w, gate_scale_h=gate_h / h, gate_scale_w=gate_w / w,
        gate_sn=gs[0], gate_sc=gs[1], gate_sh=gs[2], gate_sw=gs[3],
        PRIMARY=primary, CHEAP=cheap, RATIO=a.ratio, DW_SIZE=a.dw_size,
        KERNEL=a.kernel_size, STRIDE=a.stride, DILATION=a.dilation, TAPS_FIRST=taps_first, PRIMARY_ACT=a.primary_act, CHEAP_ACT=a.cheap_act,
        NHWC=nhwc, **x_strides(a.x), RESIDUAL_LIKE_OUT=a.residual is not None and rs == out.stride(),
        HW_ALIGN=align(h * w),
        INDEX_64=longest >= 2**31, PRECISION=precision(a), **blocks(a, nhwc, primary, cheap, choice),
    )  # fmt: skip


def launch(
    args: GhostArgs,
    out: Tensor,
    x1: Tensor | None,
    primary: bool = True,
    cheap: bool = True,
    choice: Choice | None = None,
) -> None:
    """Launches both steps, or one."""
    from .kernels import ghost_kernel

    kwargs = plan(args, out, x1, primary, cheap, choice)
    launch_kernel(ghost_kernel, programs(kwargs, args.x.shape[0]), kwargs, args.x.device)


def programs(plan: dict[str, Any], images: int) -> int:
    """How many a launch of ``plan`` has."""
    return images * -(-plan["H"] * plan["W"] // plan["run"]) * -(-plan["Cp"] // plan["WIDTH"])


def declines(args: Args) -> str | None:
    """Windows in NCHW: each number under a tap is a load of its own, and by the counts of docs/counts.md that takes longer
    than PyTorch's convolution would move its maps."""
    if TAKES["triton"].auto_nchw_windows or not isinstance(args, GhostArgs):
        return None
    if has_window(args) and not is_channels_last(args.x):
        k = args.kernel_size
        return f"a {k}×{k} primary conv with stride {args.stride} in NCHW is for backend='triton' alone; channels_last is not"
    return None


def forward(args: Args) -> Tensor:
    """Runs the op of ``args``: a Ghost module or a depthwise conv in one launch, a squeeze-and-excite gate in two.

    Returns:
        A fresh tensor of ``args.output_shape()``.
    """
    if isinstance(args, DepthwiseArgs):
        return bottleneck.depthwise(args)
    if isinstance(args, SqueezeExciteArgs):
        return bottleneck.squeeze_excite(args)
    out = args.new_output()
    if out.numel():
        launch(args, out, scratch(args, out))
    return out
