"""The CUDA C++ kernel as a backend. The extension ``ghostfused._C`` registers it; nothing here fails without one."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from ..ops import forward_op
from ..spec import TENSORS, GhostArgs
from .common import kernel_refusal

_MAX_SIZE = 2**31 - 1
"""The kernel counts each dimension, and its blocks, in 32 bits; offsets are of 64."""


def _load() -> str | None:
    """Why the extension can't be loaded; None if it is."""
    if importlib.util.find_spec("ghostfused._C") is None:
        note = Path(__file__).parents[1] / "_build_failure.txt"
        return "the extension ghostfused._C is not built" + (f": {note.read_text().strip()}" if note.exists() else "")
    try:
        importlib.import_module("ghostfused._C")
    except ImportError as error:  # built for another Python, torch or CUDA runtime
        return f"the extension ghostfused._C can't be loaded: {error}"
    return None


_load_failure = _load()


def unavailable() -> str | None:
    """Why the kernel can't run on this machine; None if it can."""
    if _load_failure is not None:
        return _load_failure
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    return None


_device_refusals: dict[int, str | None] = {}  # asking costs microseconds, and this is on the way of every call


@torch.compiler.assume_constant_result
def _device_refusal(index: int) -> str | None:
    if index not in _device_refusals:
        reason = unavailable()
        if reason is None:
            major, minor = torch.cuda.get_device_capability(index)
            if major < 8:
                reason = f"a GPU of compute capability {major}.{minor} (the kernel takes 8.0 and later)"
        _device_refusals[index] = reason
    return _device_refusals[index]


def supports(args: GhostArgs) -> str | None:
    """Why the kernel can't run ``args``; None if it can."""
    device = args.x.device
    if device.type != "cuda":
        return f"tensors on {device} (the kernel takes CUDA tensors)"
    reason = _device_refusal(device.index or 0) or kernel_refusal(args)
    if reason is not None:
        return reason
    for name in TENSORS:
        t = getattr(args, name)
        if t is not None and t.device != device:
            return f"{name} on {t.device}, x on {device}"
    if max(*args.x.shape, args.out_channels) > _MAX_SIZE:
        return f"a dimension beyond {_MAX_SIZE}: x of shape {tuple(args.x.shape)}, {args.out_channels} output channels"
    return None


def forward(args: GhostArgs) -> Tensor:
    """Runs the kernel: x of shape (N, Cin, H, W), any strides, to (N, out_channels, H, W).

    Raises:
        RuntimeError: an argument doesn't fit, named in the message; or the launch failed.
    """
    return forward_op("cuda")(*args)
