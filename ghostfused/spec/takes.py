"""The one table of what each backend's kernels take, and why they refuse what they don't: ``fuse``, the functions, ``info``
and the tests of the docs read it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

from .activations import WITHOUT_SLOPE, Act
from .arguments import DTYPES, Args, DepthwiseArgs, GhostArgs, SqueezeExciteArgs, memory_format
from .program_steps import tensor_names

Function = TypeVar("Function", bound=Callable)


def constant_to_dynamo(function: Function) -> Function:
    """``torch.compiler.assume_constant_result``, which imports all of Dynamo: a second more for ``import ghostfused``."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class Takes(NamedTuple):
    """What the kernels of one backend take. The defaults are what all have in common."""

    windows: bool = False
    """Primary convs of any odd kernel at any stride; else they are 1×1 at stride 1."""
    window_kernels: tuple[int, ...] = ()
    """Of a primary conv that isn't 1×1 at stride 1; none named: any odd one."""
    window_dw_sizes: tuple[int, ...] = (1, 3, 5, 7)
    window_dtypes: tuple[torch.dtype, ...] = DTYPES
    window_widths: tuple[float, float, int] = (1, math.inf, 1)
    """Of the output: the least, the greatest, and what divides them."""
    plain_windows: bool = False
    """Such a conv comes in NCHW alone, with ratio 2 and ghosts, without gates and residual."""
    auto_window_channels: tuple[float, float] = (math.inf, math.inf)
    """Most input channels of such a conv that ``backend="auto"`` leaves to the kernels: of float32, and of bfloat16 in
    channels_last; and of all else."""
    auto_nchw_windows: bool = True
    """Whether ``backend="auto"`` leaves such a conv in NCHW to the kernels."""
    dtypes: tuple[torch.dtype, ...] = DTYPES
    dw_sizes: tuple[int, ...] = (1, 3, 5, 7)
    acts: tuple[Act, ...] = tuple(Act)
    depthwise: tuple[tuple[int, int], ...] = ((3, 3), (5, 5), (7, 7), (1, 5), (5, 1))
    """Kernels of the ``depthwise`` op: those of stride-2 steps and of shortcuts, and those of DFC attention."""
    depthwise_strides: tuple[int, ...] = (1, 2)
    eps: tuple[float, float] = (0.0, math.inf)
    """The least and the greatest of a norm."""
    gate_acts: tuple[Act, ...] = (Act.NONE, *WITHOUT_SLOPE)
    """Between the two matrices of the ``squeeze_excite`` op."""


_NORMAL = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
"""Triton's reciprocal square root takes float32's normal numbers, and a variance may be 0."""
TAKES = {
    "cuda": Takes(
        windows=True,
        window_kernels=(3,),
        window_dw_sizes=(3, 5),
        window_dtypes=(torch.float16, torch.bfloat16),
        window_widths=(8, 512, 4),  # csrc/cuda/ghost/nchw/plan.cpp's: the widest fit any GPU
        plain_windows=True,
    ),
    "triton": Takes(windows=True, eps=_NORMAL, auto_nchw_windows=False),
    "triton_two_kernel": Takes(windows=True, eps=_NORMAL),
    "cpu": Takes(windows=True, auto_window_channels=(128, 16)),
}
"""By the backend's name. The reference takes everything."""
COMMON = Takes()
_NORMS = tuple(f"{half}_{name}" for half in ("primary", "cheap") for name in ("mean", "var", "gamma", "beta"))


def norm_dtype(args: GhostArgs | DepthwiseArgs) -> torch.dtype | None:
    """The one dtype of all norm tensors, x's where there are none; None if they differ among themselves."""
    names = _NORMS if isinstance(args, GhostArgs) else ("mean", "var", "gamma", "beta")
    dtypes = {t.dtype for name in names if (t := getattr(args, name)) is not None}
    return args.x.dtype if not dtypes else dtypes.pop() if len(dtypes) == 1 else None


def _eps_refusal(args: GhostArgs | DepthwiseArgs, takes: Takes) -> str | None:
    least, greatest = takes.eps
    for half in ("primary_", "cheap_") if isinstance(args, GhostArgs) else ("",):
        eps = getattr(args, f"{half}eps")
        if getattr(args, f"{half}mean") is not None and not least <= eps <= greatest:
            return f"{half}eps {eps} (the kernels take {least:.3g} to {greatest:.3g})"
    return None


def kernel_refusal(args: Args, backend: str) -> str | None:
    """Why the kernels of ``backend`` can't run ``args`` on any device; None if they can."""
    takes = TAKES[backend]
    if args.x.dtype not in takes.dtypes:
        return f"dtype {args.x.dtype} (the kernels take {', '.join(map(str, takes.dtypes))})"
    if isinstance(args, SqueezeExciteArgs):
        ours = args.act in takes.gate_acts
        return None if ours else f"{Act(args.act).name} (the kernels have the activations without a slope)"
    if isinstance(args, DepthwiseArgs):
        reason = depthwise_form_refusal(tuple(args.weight.shape[2:]), args.stride, takes) or _eps_refusal(args, takes)
    else:
        reason = form_refusal(args, takes) or (_window_refusal(args, takes) if has_window(args) else None)
    if reason is None and norm_dtype(args) not in (args.x.dtype, torch.float32):
        reason = f"norm tensors of mixed dtypes (the kernels take all {args.x.dtype} or all float32)"
    return reason


def form_refusal(args: GhostArgs, takes: Takes) -> str | None:
    """As ``kernel_refusal``, for what no change of dtype, size or device can help."""
    k = args.kernel_size
    if k != 1 and not (takes.windows and k % 2):
        return f"a {k}×{k} primary conv (the kernels take {'odd ones' if takes.windows else '1×1'})"
    if args.groups != 1 or (args.stride != 1 and not takes.windows):
        return f"a primary conv with stride {args.stride}, groups {args.groups} (the kernels take 1 and 1)"
    if has_window(args) and (reason := _window_form_refusal(args, takes)):
        return reason
    if args.dw_size not in takes.dw_sizes:
        return f"dw_size {args.dw_size} (the kernels take {takes.dw_sizes})"
    if args.out_channels < args.init_channels:
        return f"out_channels {args.out_channels} below init_channels {args.init_channels}"
    return _eps_refusal(args, takes)


def has_window(args: GhostArgs) -> bool:
    """Whether the primary conv is another than the 1×1 at stride 1."""
    return args.kernel_size > 1 or args.stride > 1


def _window(args: GhostArgs) -> str:
    return f"a {args.kernel_size}×{args.kernel_size} primary conv"


def _window_form_refusal(args: GhostArgs, takes: Takes) -> str | None:
    if takes.window_kernels and args.kernel_size not in takes.window_kernels:
        return (
            f"{_window(args)} with stride {args.stride} (the kernels take 1×1 at stride 1 and {takes.window_kernels})"
        )
    if args.dw_size not in takes.window_dw_sizes:
        return f"{_window(args)} with dw_size {args.dw_size} (the kernels take {takes.window_dw_sizes})"
    if takes.plain_windows and (args.ratio != 2 or args.out_channels == args.init_channels):
        return (
            f"{_window(args)} with ratio {args.ratio}, {args.out_channels} channels (the kernels take 2, with ghosts)"
        )
    return None


def window_dtype_refusal(args: GhostArgs, takes: Takes) -> str | None:
    """Why the kernels have no primary conv of this dtype, other than the 1×1; None if they have, or it is one."""
    if not has_window(args) or args.x.dtype in takes.window_dtypes:
        return None
    return f"{_window(args)} in {args.x.dtype} (the kernels take {', '.join(map(str, takes.window_dtypes))})"


def _window_refusal(args: GhostArgs, takes: Takes) -> str | None:
    if reason := window_dtype_refusal(args, takes):
        return reason
    if not takes.plain_windows:
        return None
    batch, channels, height, width = args.output_shape()
    for name in ("input_gate", "residual", "output_gate"):
        if getattr(args, name) is not None:
            return f"{_window(args)} with {name} (the kernels take none)"
    if memory_format(args.x) == torch.channels_last:
        return f"{_window(args)} in channels_last (the kernels take NCHW)"
    if torch.compiler.is_exporting():  # a program for all sizes must not depend on one
        return f"{_window(args)} in an exported program (the kernels take some sizes)"
    least, greatest, step = takes.window_widths
    if width % step or not least <= width <= greatest:
        return (
            f"{_window(args)} to a width of {width} (the kernels take multiples of {step} from {least} to {greatest})"
        )
    if batch > 65535 or channels * height * width >= 2**30:
        return (
            f"{_window(args)} to {batch} × {channels}×{height}×{width} (the kernels take 65535 images of 2³⁰ numbers)"
        )
    return None


def depthwise_form_refusal(kernel: tuple[int, ...], stride: int, takes: Takes) -> str | None:
    """As ``form_refusal``, for a depthwise convolution."""
    # not ``in``: torch.compile would reason about all pairs at once, for minutes, where the sizes are symbols
    if not any(kernel[0] == h and kernel[1] == w for h, w in takes.depthwise):
        return f"a {kernel[0]}×{kernel[1]} depthwise conv (the kernels take {takes.depthwise})"
    if stride not in takes.depthwise_strides:
        return f"stride {stride} (the kernels take {takes.depthwise_strides})"
    return None


_MAX_SIZE, _MAX_CHANNELS = 2**30, 2**26
"""The compiled kernels count each dimension in 32 bits, with room for what they add to it; their offsets have 64
(``csrc/common/checker.h``)."""


def placement_refusal(args: Args) -> str | None:
    """Why a compiled kernel can't run ``args`` for where its tensors are or how long they are; None if it can."""
    device = args.x.device
    for t in args.tensors:
        if t is not None and t.device != device:
            name = next(name for name in tensor_names(type(args)) if getattr(args, name) is t)
            return f"{name} on {t.device}, x on {device}"
    # a symbolic size is left to the binding: comparing it here would constrain the shapes of an exported program
    out_channels = args.out_channels if isinstance(args, GhostArgs) else 1
    if not torch.compiler.is_compiling() and (
        max(args.x.shape) > _MAX_SIZE or max(args.x.shape[1], out_channels) > _MAX_CHANNELS
    ):
        return (
            f"more than {_MAX_CHANNELS} channels or {_MAX_SIZE} along another dimension: "
            f"x of shape {tuple(args.x.shape)}, {out_channels} output channels"
        )
    return None
