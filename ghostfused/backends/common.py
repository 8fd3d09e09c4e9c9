"""What the kernel backends refuse alike."""

from __future__ import annotations

import torch

from ..spec import Act, GhostArgs

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNEL_DW_SIZES = (1, 3, 5, 7)
_NORMS = ("primary_mean", "primary_var", "primary_gamma", "primary_beta")
_NORMS += tuple(name.replace("primary", "cheap") for name in _NORMS)


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
