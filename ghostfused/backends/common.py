"""What the kernel backends refuse alike."""

from __future__ import annotations

import torch

from ..spec import TENSORS, Act, GhostArgs

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNEL_DW_SIZES = (1, 3, 5, 7)
_NORMS = tuple(f"{half}_{name}" for half in ("primary", "cheap") for name in ("mean", "var", "gamma", "beta"))


def norm_dtype(args: GhostArgs) -> torch.dtype | None:
    """The one dtype of all norm tensors, x's where there are none; None if they differ among themselves."""
    dtypes = {t.dtype for name in _NORMS if (t := getattr(args, name)) is not None}
    return args.x.dtype if not dtypes else dtypes.pop() if len(dtypes) == 1 else None


def kernel_refusal(args: GhostArgs) -> str | None:
    """Why the fused kernels can't run ``args`` on any device; None if they can."""
    if args.x.dtype not in KERNEL_DTYPES:
        return f"dtype {args.x.dtype} (the kernels take float32, float16 and bfloat16)"
    if args.kernel_size != 1:
        return f"a {args.kernel_size}×{args.kernel_size} primary conv (the kernels take 1×1)"
    if args.stride != 1 or args.groups != 1:
        return f"a primary conv with stride {args.stride}, groups {args.groups} (the kernels take 1 and 1)"
    if args.dw_size not in KERNEL_DW_SIZES:
        return f"dw_size {args.dw_size} (the kernels take {KERNEL_DW_SIZES})"
    if args.out_channels < args.init_channels:
        return f"out_channels {args.out_channels} below init_channels {args.init_channels}"
    if args.primary_act == Act.GELU or args.cheap_act == Act.GELU:
        return "GELU (the kernels have the other activations)"
    if norm_dtype(args) not in (args.x.dtype, torch.float32):
        return f"norm tensors of mixed dtypes (the kernels take all {args.x.dtype} or all float32)"
    return None


_MAX_SIZE = 2**31 - 1
"""The compiled kernels count each dimension in 32 bits; their offsets have 64."""


def placement_refusal(args: GhostArgs) -> str | None:
    """Why a compiled kernel can't run ``args`` for where its tensors are or how long they are; None if it can."""
    device = args.x.device
    for name in TENSORS:
        t = getattr(args, name)
        if t is not None and t.device != device:
            return f"{name} on {t.device}, x on {device}"
    # a symbolic size is left to the binding: comparing it here would constrain the shapes of an exported program
    if not torch.compiler.is_compiling() and max(*args.x.shape, args.out_channels) > _MAX_SIZE:
        return f"a dimension beyond {_MAX_SIZE}: x of shape {tuple(args.x.shape)}, {args.out_channels} output channels"
    return None
