"""The C++ SIMD kernels as a backend. The extension ``ghostfused._cpu`` registers them; nothing here fails without one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import Args
from ..spec.kernels import COMMON, kernel_refusal, placement_refusal
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


def may_try(args: Args) -> bool:
    """Whether just calling the op tells as much as ``supports``, at a fraction of its host time: the binding refuses
    whatever the kernel can't run. Not so where the call is compiled rather than run."""
    x = args.x
    return (
        extension.failure is None
        and type(x) is Tensor
        and x.is_cpu
        and x.dtype in COMMON.dtypes
        and not torch.compiler.is_compiling()
    )


def forward(args: Args) -> Tensor:
    """Runs the kernel of the op of ``args``, whose class describes inputs and output.

    Raises:
        RuntimeError: an argument doesn't fit, named in the message.
    """
    return op(f"{args.op}_cpu")(*args)
