"""What the kernel backends refuse alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from .activations import Act
from .arguments import Args, DepthwiseArgs, GhostArgs, SqueezeExciteArgs, tensor_names

Function = TypeVar("Function", bound=Callable)


def constant_to_dynamo(function: Function) -> Function:
    """``torch.compiler.assume_constant_result``, which imports all of Dynamo: a second more for ``import ghostfused``."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_PATCH_CHANNELS = 16
"""Input channels of a primary conv beyond 1×1 (``csrc/common/parameters.h``)."""
KERNEL_DW_SIZES = (1, 3, 5, 7)
KERNEL_DEPTHWISE = ((3, 3), (5, 5), (7, 7), (1, 5), (5, 1))
"""Kernels of the ``depthwise`` op: those of stride-2 steps and of shortcuts, and those of DFC attention."""
KERNEL_GATE_ACTS = tuple(act for act in Act if act not in (Act.LEAKY_RELU, Act.PRELU, Act.GELU))
"""Activations between the two matrices of the ``squeeze_excite`` op: those without a slope, but GELU."""
_NORMS = tuple(f"{half}_{name}" for half in ("primary", "cheap") for name in ("mean", "var", "gamma", "beta"))


def norm_dtype(args: GhostArgs | DepthwiseArgs) -> torch.dtype | None:
    """The one dtype of all norm tensors, x's where there are none; None if they differ among themselves."""
    names = _NORMS if isinstance(args, GhostArgs) else ("mean", "var", "gamma", "beta")
    dtypes = {t.dtype for name in names if (t := getattr(args, name)) is not None}
    return args.x.dtype if not dtypes else dtypes.pop() if len(dtypes) == 1 else None


def kernel_refusal(args: Args, any_primary: bool = False) -> str | None:
    """Why the fused kernels can't run ``args`` on any device; None if they can.

    ``any_primary``: they take primary convs of any odd kernel, of few channels, and any stride, as those for the CPU do.
    """
    if args.x.dtype not in KERNEL_DTYPES:
        return f"dtype {args.x.dtype} (the kernels take float32, float16 and bfloat16)"
    if isinstance(args, DepthwiseArgs):
        return _depthwise_refusal(args)
    if isinstance(args, SqueezeExciteArgs):
        return _squeeze_excite_refusal(args)
    if reason := form_refusal(args, any_primary):
        return reason
    if norm_dtype(args) not in (args.x.dtype, torch.float32):
        return f"norm tensors of mixed dtypes (the kernels take all {args.x.dtype} or all float32)"
    return None


def form_refusal(args: GhostArgs, any_primary: bool = False) -> str | None:
    """As ``kernel_refusal``, for what no change of dtype, size or device can help."""
    if args.kernel_size != 1 and not (any_primary and args.kernel_size % 2):
        takes = "odd ones" if any_primary else "1×1"
        return f"a {args.kernel_size}×{args.kernel_size} primary conv (the kernels take {takes})"
    if args.kernel_size > 1 and args.x.shape[1] > MAX_PATCH_CHANNELS:
        return f"a {args.kernel_size}×{args.kernel_size} primary conv of {args.x.shape[1]} channels (the kernels take {MAX_PATCH_CHANNELS})"
    if args.groups != 1 or (args.stride != 1 and not any_primary):
        return f"a primary conv with stride {args.stride}, groups {args.groups} (the kernels take 1 and 1)"
    if args.dw_size not in KERNEL_DW_SIZES:
        return f"dw_size {args.dw_size} (the kernels take {KERNEL_DW_SIZES})"
    if args.out_channels < args.init_channels:
        return f"out_channels {args.out_channels} below init_channels {args.init_channels}"
    if args.primary_act == Act.GELU or args.cheap_act == Act.GELU:
        return "GELU (the kernels have the other activations)"
    return None


def depthwise_form_refusal(kernel: tuple[int, ...], stride: int, act: int) -> str | None:
    """As ``form_refusal``, for a depthwise convolution."""
    if kernel not in KERNEL_DEPTHWISE:
        return f"a {kernel[0]}×{kernel[1]} depthwise conv (the kernels take {KERNEL_DEPTHWISE})"
    if stride not in (1, 2):
        return f"stride {stride} (the kernels take 1 and 2)"
    return "GELU (the kernels have the other activations)" if act == Act.GELU else None


def _depthwise_refusal(args: DepthwiseArgs) -> str | None:
    if reason := depthwise_form_refusal(tuple(args.weight.shape[2:]), args.stride, args.act):
        return reason
    if norm_dtype(args) not in (args.x.dtype, torch.float32):
        return f"norm tensors of mixed dtypes (the kernels take all {args.x.dtype} or all float32)"
    return None


def _squeeze_excite_refusal(args: SqueezeExciteArgs) -> str | None:
    if args.act not in KERNEL_GATE_ACTS:
        return f"{Act(args.act).name} (the kernels have the activations without a slope, but GELU)"
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
