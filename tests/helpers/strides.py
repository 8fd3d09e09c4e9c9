"""Tensors as they may lie in memory: views, strided parameters, addresses aligned to one element only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ghostfused.spec import Args, tensor_names

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "images expanded": lambda x: x.expand(3, -1, -1, -1),
    "rows expanded": lambda x: x[:, :, :1].expand(1, 16, 9, 12),
    "transposed": lambda x: x.transpose(2, 3),
    "CHW permuted": lambda x: x.permute(0, 2, 1, 3),
    "reversed": lambda x: x.permute(3, 2, 1, 0),
    "every other channel": lambda x: x[:, ::2],
    "every other pixel": lambda x: x[:, :, ::2, ::3],
    "channel offset": lambda x: x[:, 1:],
    "pixel offset": lambda x: x[:, :, 1:, 3:],
    "one column": lambda x: x[..., :1],
    "one pixel": lambda x: x[:, :, 3:4, 5:6],
    "one channel": lambda x: x[:, :1],
}


def strides(t: Tensor) -> list[int]:
    """Those that say where numbers lie."""
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


def view(name: str, layout: str) -> Tensor:
    """A map of at most 16 channels and of unusual strides."""
    x = torch.randn(1, 16, 11, 12)
    return VIEWS[name](x.to(memory_format=torch.channels_last) if layout == "nhwc" else x)


def shifted(t: Tensor) -> Tensor:
    """The same numbers, one element further from an aligned address."""
    buffer = torch.empty(t.numel() + 1, dtype=t.dtype)[1:]
    return buffer.as_strided(t.shape, t.stride()).copy_(t)


def with_gaps(t: Tensor) -> Tensor:
    """The same numbers with NaN between them."""
    wide = torch.full((*t.shape[:-1], 3 * t.shape[-1]), float("nan"), dtype=t.dtype)
    wide[..., ::3] = t
    return wide[..., ::3]


def transposed(t: Tensor) -> Tensor:
    """The same numbers in another order in memory."""
    return t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 1 else t


def changed(args: Args, change: Callable[[Tensor], Tensor], *but: str) -> Args:
    """``args`` with ``change`` made to each of its tensors but some."""
    tensors = zip(tensor_names(type(args)), args.tensors, strict=True)
    return args._replace(**{name: change(t) for name, t in tensors if t is not None and name not in but})
