"""How far a result is from the right one, and how far it may be: the one table of tolerances."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    factor: float
    """Allowed multiple of PyTorch's own error."""
    floor: float
    """Allowed error in any case, relative to the largest output: 4 units of rounding."""


TOLERANCES = {
    torch.float64: Tolerance(2, 4 * 2**-53),
    torch.float32: Tolerance(2, 4 * 2**-24),
    "tf32": Tolerance(2, 4 * 2**-11),
    torch.float16: Tolerance(2, 4 * 2**-11),
    torch.bfloat16: Tolerance(2, 4 * 2**-8),
}


def relative_error(out: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected magnitude; infinite where either is not finite."""
    if out.shape != expected.shape:
        raise AssertionError(f"shape {tuple(out.shape)}, expected {tuple(expected.shape)}")
    difference = (out.detach().to(expected.device).double() - expected.detach()).abs().max()
    error = float(difference / expected.detach().abs().max().clamp_min(1e-300))
    return error if math.isfinite(error) else math.inf


def rounded_anew(x: Tensor, count: int, seed: int = 0, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Tensors that differ from x by less than its rounding, or that to ``dtype``; PyTorch's random state stays as it is.

    One run's error may be small or large by luck; those of several such inputs say more.
    """
    generator = torch.Generator().manual_seed(seed)
    half_unit = torch.finfo(dtype or x.dtype).eps / 2
    noise = (torch.rand(x.shape, generator=generator, dtype=x.dtype) for _ in range(count))
    return [torch.empty_like(x).copy_(x * (1 + half_unit * (2 * each - 1))) for each in noise]
