"""The C++ SIMD kernels as a backend. The extension ``ghostfused._cpu`` registers them; nothing here fails without one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import Args, GhostArgs
from ..spec.arguments import memory_format
from ..spec.takes import COMMON, TAKES, kernel_refusal, placement_refusal
from .extension import Extension, op

extension = Extension("_cpu")
build_info = extension.build_info
DEVICES = ("cpu",)


def unavailable() -> str | None:
    """Why the kernel can't run on this machine; None if it can."""
    return extension.failure


def supports(args: Args) -> str | None:
    """Why the kernel can't run ``args``; None if it can."""
    if extension.failure is not None:
        return extension.failure
    if args.x.device.type != "cpu":
        return f"tensors on {args.x.device} (the kernel takes CPU tensors)"
    return kernel_refusal(args, "cpu") or placement_refusal(args)


def declines(args: Args, any_format: bool = False) -> str | None:
    """Why ``"auto"`` leaves a call to PyTorch: its own larger convolutions of many channels are faster.

    Args:
        any_format: Whether whoever asks may change the memory format of x.
    """
    if not isinstance(args, GhostArgs):
        return None
    x, weight = args.x, args.primary_weight
    if not isinstance(weight, Tensor) or weight.dim() != 4 or x.dim() != 4 or args.kernel_size == 1:
        return None  # what doesn't fit is for the checks to say, which may come later
    k = args.kernel_size
    channels_last = memory_format(x) == torch.channels_last
    pairs = x.dtype == torch.bfloat16 and (any_format or channels_last)
    most = TAKES["cpu"].auto_window_channels[0 if x.dtype == torch.float32 or pairs else 1]
    if x.shape[1] <= most:
        return None
    return (
        f"a {k}×{k} primary conv of {x.shape[1]} channels in {x.dtype}, {'channels_last' if channels_last else 'NCHW'}: beyond {most} PyTorch's own is faster; "
        "backend='cpu' takes it"
    )


def may_try(args: Args) -> bool:
    """Whether just calling the op tells as much as ``supports`` and ``declines``, at a fraction of their host time: the binding
    refuses whatever the kernel can't run. Not so where the call is compiled rather than run."""
    x = args.x
    return (
        extension.failure is None
        and type(x) is Tensor
        and x.is_cpu
        and x.dtype in COMMON.dtypes
        and not torch.compiler.is_compiling()
        and declines(args) is None
    )


def forward(args: Args) -> Tensor:
    """Runs the kernel of the op of ``args``, whose class describes inputs and output.

    Raises:
        RuntimeError: an argument doesn't fit, named in the message.
    """
    return op(f"{args.op}_cpu")(*args)
