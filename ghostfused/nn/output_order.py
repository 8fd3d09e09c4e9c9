"""The order of a Ghost module's output channels, where that isn't the halves one after the other: GSConv shuffles them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..recognize.equivalence import output_format
from ..recognize.ghost import Recognized

Order = tuple[int, int] | torch.memory_format
"""What the channels are taken for before the two are transposed; or, if they stay, in which memory format."""


def orders(module: nn.Module, recognized: Recognized) -> list[Order | None]:
    """Those that the output of ``module`` may have: as the halves come (None), the first and second half's maps in turn, or every
    second map and then the others."""
    if not recognized.shuffled:
        return [None]
    channels, kept = recognized.out_channels(module), output_format(module, recognized.in_channels)
    found: list[Order | None] = [] if kept is None else [None if kept == torch.preserve_format else kept]
    return found if channels % 2 else [*found, (2, channels // 2), (channels // 2, 2)]


def fits(order: Order, channels: int) -> bool:
    return not isinstance(order, tuple) or math.prod(order) == channels


def reordered(out: Tensor, order: Order) -> Tensor:
    if isinstance(order, tuple):
        return out.unflatten(1, order).transpose(1, 2).flatten(1, 2)
    return out.contiguous(memory_format=order)
