"""What the launches of all Triton kernels share: whether Triton works here, alignment and strides as the kernels take them."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
from typing import Any

import torch
from torch import Tensor

from ...spec import memory_format
from ...spec.takes import constant_to_dynamo

# As Triton reads it, which is imported when first needed: it takes half a second.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
INTERPRETER = "TRITON_INTERPRET=1, set before Python starts, runs the kernels on the CPU, slowly"
DEVICES = ("cpu", "cuda") if INTERPRETED else ("cuda",)
MAX_PROGRAMS = 2**31 - 1


@functools.cache
@constant_to_dynamo  # Dynamo, which looks through the cache, need not trace into the CUDA runtime
def unavailable() -> str | None:
    """Why no Triton kernel can run here; None if they can."""
    if importlib.util.find_spec("triton") is None:  # Windows, macOS, CPU-only installations
        return "triton is not installed"
    if not INTERPRETED and not torch.cuda.is_available():
        return f"no GPU ({INTERPRETER})"
    if not INTERPRETED and torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "the GPU is older than sm_80"
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton can't be imported ({error})"
    return None


def is_channels_last(t: Tensor) -> bool:
    """Whether ``t``, as an op's ``new_output`` made it, is channels_last and not contiguous as well."""
    return memory_format(t) == torch.channels_last


def align(*sizes: int) -> int:
    """The largest power of two up to 16 that divides all ``sizes``."""
    return math.gcd(16, *sizes)


def reach(t: Tensor | None) -> int:
    """The largest offset within an image of ``t``."""
    return 0 if t is None else sum((n - 1) * s for n, s in zip(t.shape[1:], t.stride()[1:], strict=True))


def x_strides(x: Tensor) -> dict[str, Any]:
    """The kernels' arguments on x's strides: which is 1 (X_UNIT), and what divides the others (X_ALIGN)."""
    _, cin, h, w = x.shape
    xs = x.stride()
    unit = "c" if xs[1] == 1 and cin > 1 else "w" if xs[3] == 1 else ""
    others = {"c": (xs[0], xs[2], xs[3]), "w": (xs[0], xs[1], xs[2]), "": xs}[unit]
    return {
        "x_sn": xs[0], "x_sc": xs[1], "x_sh": xs[2], "x_sw": xs[3],
        "X_UNIT": unit, "X_FLAT": h == 1 or xs[2] == w * xs[3], "X_ALIGN": align(*others),
    }  # fmt: skip


def launch_kernel(kernel: Any, programs: int, kwargs: dict[str, Any], device: torch.device) -> None:
    """Launches ``kernel`` on ``device``, whichever is current."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[programs,](**kwargs)
