"""The CUDA C++ kernels as a backend. The extension ``ghostfused._C`` registers them; nothing here fails without one."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ..spec import Args, GhostArgs, SqueezeExciteArgs
from ..spec.takes import TAKES, constant_to_dynamo, kernel_refusal, placement_refusal, window_dtype_refusal
from .extension import Extension, op

extension = Extension("_C")
build_info = extension.build_info
DEVICES = ("cuda",)


def unavailable() -> str | None:
    """Why the kernel can't run on this machine; None if it can."""
    if extension.failure is not None:
        return extension.failure
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    return None


TEGRA = ((8, 7),)
"""Jetson's: these GPUs run the machine code of no other, and no other runs theirs."""


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU of a compute capability runs what is built for ``architectures``, a TORCH_CUDA_ARCH_LIST.

    Machine code runs on later minor versions of its major one, PTX on everything later; code for 9.0a on that alone.
    A list with other words (Ampere) is left to the driver.
    """
    entries = [re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry) for entry in architectures.replace(";", " ").split()]
    for entry in entries:
        if entry is None:
            return True
        built = int(entry[1]), int(entry[2])
        everywhere = not entry[3] and built <= capability
        if built == capability or (everywhere and entry[4]):
            return True
        if everywhere and built[0] == capability[0] and not {built, capability} & set(TEGRA):
            return True
    return not entries


_device_refusals: dict[int, str | None] = {}  # asking costs microseconds, and this is on the way of every call


@constant_to_dynamo
def _device_refusal(index: int) -> str | None:
    if index not in _device_refusals:
        reason = unavailable()
        if reason is None:
            major, minor = torch.cuda.get_device_capability(index)
            architectures = (build_info() or {}).get("architectures", "")
            if major < 8:
                reason = f"a GPU of compute capability {major}.{minor} (the kernel takes 8.0 and later)"
            elif not runs_on(architectures, (major, minor)):
                reason = f"a GPU of compute capability {major}.{minor} (this build has code for {architectures})"
        _device_refusals[index] = reason
    return _device_refusals[index]


def supports(args: Args) -> str | None:
    """Why the kernel can't run ``args``; None if it can."""
    device = args.x.device
    if device.type != "cuda":
        return f"tensors on {device} (the kernel takes CUDA tensors)"
    return (
        _device_refusal(device.index or 0)
        or kernel_refusal(args, "cuda")
        or placement_refusal(args)
        or _stride_refusal(args)
    )


def declines(args: Args) -> str | None:
    """Windows of a dtype without kernels, so that ``fuse`` doesn't take a model in float32 for them."""
    return window_dtype_refusal(args, TAKES["cuda"]) if isinstance(args, GhostArgs) else None


def _stride_refusal(args: Args) -> str | None:
    """Offsets have 64 bits, strides within an image 32. Symbolic ones are left to the binding, as sizes are."""
    if torch.compiler.is_compiling():
        return None
    longest = max(args.x.stride()[1:])
    if not isinstance(args, SqueezeExciteArgs):
        _, channels, height, width = args.output_shape()
        longest = max(longest, height * width, width * channels)
    if isinstance(args, GhostArgs):
        for t in (args.residual, args.output_gate):
            if t is not None:
                longest = max(longest, *t.stride()[1:])
    return None if longest < 2**31 else f"a stride of {longest} elements within an image (the kernel takes 2³¹ - 1)"


def forward(args: Args) -> Tensor:
    """Runs the kernels of the op of ``args``, whose class describes inputs and output.

    Raises:
        RuntimeError: an argument doesn't fit, named in the message; or the launch failed.
    """
    return op(f"{args.op}_cuda")(*args)
