"""Training in CUDA C++: the kernels of ``csrc/cuda/training``. Nothing here fails without the extension."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..spec import GhostArgs, memory_format
from ..spec.takes import COMMON, form_refusal
from . import cuda
from .extension import op
from .training_step import KERNELS, TrainingKernels

_MAX_PIXELS = 2**31 - 2**16
_NORMS = [f"{half}_{name}" for half in ("primary", "cheap") for name in ("mean", "var", "gamma", "beta")]


def supports(a: GhostArgs) -> str | None:
    """Why the kernels can't train ``a``; None if they can."""
    reason = cuda.supports(a) or form_refusal(a, COMMON)  # of the windows that the forward takes, the 1×1 alone
    if reason is None and not torch.compiler.is_compiling():
        _, _, height, width = a.output_shape()
        if height * width > _MAX_PIXELS:
            reason = f"an image of {height * width} pixels (the kernels take {_MAX_PIXELS})"
    return reason


def _run(kernel: str, a: GhostArgs, *tensors: Tensor | bool | None) -> None:
    op(f"{kernel}_cuda")(*a, *tensors)


def _without_norms(a: GhostArgs, *halves: str) -> GhostArgs:
    """The norms that a forward kernel doesn't reach yet have no statistics."""
    return a._replace(**{name: None for name in _NORMS if name.startswith(halves)})  # type: ignore[arg-type]


def _floats(a: GhostArgs, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=a.x.device)


def _map(a: GhostArgs, channels: int) -> Tensor:
    """An uninitialized dense map of the output's height and width."""
    n, _, h, w = a.output_shape()
    layout = memory_format(a.x)
    return torch.empty((n, channels, h, w), dtype=a.x.dtype, device=a.x.device, memory_format=layout)


def primary_statistics(a: GhostArgs, out: Tensor) -> tuple[Tensor, Tensor]:
    mean, var = _floats(a, a.init_channels), _floats(a, a.init_channels)
    _run("primary_statistics", _without_norms(a, "primary", "cheap"), out, mean, var)
    return mean, var


def cheap_statistics(a: GhostArgs, out: Tensor) -> tuple[Tensor, Tensor]:
    new = a.cheap_weight.shape[0]
    mean, var = _floats(a, new), _floats(a, new)
    _run("cheap_statistics", _without_norms(a, "cheap"), out, mean, var)
    return mean, var


def normalize(a: GhostArgs, out: Tensor) -> None:
    _run("normalize", a, out)


def cheap_backward(
    a: GhostArgs, grad: Tensor, y1: Tensor, batch_statistics: bool, sums: bool, product: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    new = a.cheap_weight.shape[0]
    dz2, y2 = _map(a, new), _map(a, new) if batch_statistics else None
    totals = _floats(a, 3, new) if sums else None
    _run("cheap_backward", a, grad, y1, dz2, y2, product, totals)
    return dz2, y2, totals


def primary_backward(
    a: GhostArgs, grad: Tensor, y1: Tensor, dz2: Tensor | None, y2: Tensor | None, means2: Tensor | None,
    batch_statistics: bool, primary: bool, sums: bool, weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    dz1 = _map(a, a.init_channels) if primary else None
    totals = _floats(a, 3, a.init_channels) if sums else None
    dw = torch.empty(a.cheap_weight.shape, dtype=a.x.dtype, device=a.x.device) if weight else None
    _run("primary_backward", a, grad, y1, dz2, y2, means2, batch_statistics, dz1, totals, dw)
    return dz1, totals, dw


def normalize_backward(a: GhostArgs, dz1: Tensor, y1: Tensor, means1: Tensor) -> None:
    _run("normalize_backward", a, dz1, y1, means1)


_LEAST_BYTES = 4 * 2**20
"""Of x and the output together: with less, the copies' launches would cost about what faster kernels save. An estimate from
counts of instructions; no GPU has tuned it yet."""


def layout(a: GhostArgs) -> torch.memory_format:
    """channels_last for large maps with a 3×3 depthwise conv, whose fast kernels are for that layout."""
    elements = a.x.numel() + math.prod(a.output_shape())
    several = a.x.shape[1] > 1 and a.x.shape[2] * a.x.shape[3] > 1  # else both layouts are one
    if several and a.cheap_weight.shape[2] == 3 and elements * a.x.element_size() >= _LEAST_BYTES:
        return torch.channels_last
    return memory_format(a.x)


def copy(x: Tensor, out: Tensor) -> None:
    op("change_layout_cuda")(x, out)


if cuda.build_info() is not None:
    KERNELS["cuda"] = TrainingKernels(
        supports,
        primary_statistics,
        cheap_statistics,
        normalize,
        cheap_backward,
        primary_backward,
        normalize_backward,
        layout,
        copy,
    )
