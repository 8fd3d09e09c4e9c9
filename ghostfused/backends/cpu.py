"""The C++ SIMD kernel as a backend. The extension ``ghostfused._cpu`` registers it; nothing here fails without one."""

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
"""The kernel counts each dimension in 32 bits; offsets are of 64."""


def _load() -> str | None:
    """Why the extension can't be used; None if it can."""
    if importlib.util.find_spec("ghostfused._cpu") is None:
        note = Path(__file__).parents[1] / "_cpu_build_failure.txt"
        return "the extension ghostfused._cpu is not built" + (f": {note.read_text().strip()}" if note.exists() else "")
    try:
        extension = importlib.import_module("ghostfused._cpu")
    except ImportError as error:  # built for another Python or torch
        return f"the extension ghostfused._cpu can't be loaded: {error}"
    return extension.build_info()["error"]


_load_failure = _load()


def unavailable() -> str | None:
    """Why the kernel can't run on this machine; None if it can."""
    return _load_failure


def build_info() -> dict | None:
    """Instruction sets: those compiled, those that this CPU has, and the chosen one; None where there is no extension."""
    try:
        return importlib.import_module("ghostfused._cpu").build_info()
    except ImportError:
        return None


def supports(args: GhostArgs) -> str | None:
    """Why the kernel can't run ``args``; None if it can."""
    if _load_failure is not None:
        return _load_failure
    if args.x.device.type != "cpu":
        return f"tensors on {args.x.device} (the kernel takes CPU tensors)"
    reason = kernel_refusal(args)
    if reason is not None:
        return reason
    for name in TENSORS:
        t = getattr(args, name)
        if t is not None and t.device.type != "cpu":
            return f"{name} on {t.device}, x on the CPU"
    # a symbolic size is left to the binding: comparing it here would constrain the shapes of an exported program
    if not torch.compiler.is_compiling() and max(*args.x.shape, args.out_channels) > _MAX_SIZE:
        return f"a dimension beyond {_MAX_SIZE}: x of shape {tuple(args.x.shape)}, {args.out_channels} output channels"
    return None


def forward(args: GhostArgs) -> Tensor:
    """Runs the kernel: x of shape (N, Cin, H, W), any strides, to (N, out_channels, H, W).

    Raises:
        RuntimeError: an argument doesn't fit, named in the message.
    """
    return forward_op("cpu")(*args)
