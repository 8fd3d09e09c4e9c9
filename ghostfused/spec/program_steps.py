"""What the steps of a CPU's program consist of that are no ops of their own, and all steps by name."""

from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import DTYPES, OPS, Args, memory_format, names_of_tensors, new_dense, new_map


class GlobalPoolArgs(NamedTuple):
    """The mean over height and width."""

    x: Tensor  # (N, C, H, W), any strides

    @property
    def op(self) -> str:
        return "global_pool"

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:1]

    def output_shape(self) -> tuple[int, int, int, int]:
        """(N, C, 1, 1)."""
        return self.x.shape[0], self.x.shape[1], 1, 1

    def new_output(self) -> Tensor:
        """An uninitialized output."""
        return new_dense(self)


class LinearArgs(NamedTuple):
    """A fully connected layer."""

    x: Tensor  # (N, K), or (N, K, 1, 1)
    weight: Tensor  # (M, K)
    bias: Tensor | None  # (M,)

    @property
    def op(self) -> str:
        return "linear"

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:3]

    def output_shape(self) -> tuple[int, int]:
        """(N, M)."""
        return self.x.shape[0], self.weight.shape[0]

    def new_output(self) -> Tensor:
        """An uninitialized output."""
        return new_dense(self)


class CastArgs(NamedTuple):
    """x in another dtype."""

    x: Tensor  # of 2 or 4 dimensions, any strides
    dtype: int  # its place in DTYPES

    @property
    def op(self) -> str:
        return "cast"

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:1]

    def output_shape(self) -> torch.Size:
        """x's."""
        return self.x.shape

    def new_output(self) -> Tensor:
        """An uninitialized output, in x's memory format."""
        x, format = self.x, memory_format(self.x) if self.x.dim() == 4 else torch.contiguous_format
        return torch.empty(x.shape, dtype=DTYPES[self.dtype], device=x.device, memory_format=format)


class ConcatArgs(NamedTuple):
    """Maps one after the other along the channels."""

    x: Tensor  # (N, C, H, W), any strides, as are the next, but for C
    second: Tensor
    third: Tensor | None
    fourth: Tensor | None

    @property
    def op(self) -> str:
        return "concat"

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:4]

    @property
    def parts(self) -> list[Tensor]:
        """Those that there are."""
        return [t for t in self.tensors if t is not None]

    def output_shape(self) -> tuple[int, int, int, int]:
        """(N, the sum of all C, H, W)."""
        n, _, h, w = self.x.shape
        return n, sum(t.shape[1] for t in self.parts), h, w

    def new_output(self) -> Tensor:
        """An uninitialized output, in x's memory format."""
        return new_map(self)


class MaxPoolArgs(NamedTuple):
    """The maxima under a window, padded by half of it."""

    x: Tensor  # (N, C, H, W), any strides
    kernel: int  # rows and columns of the window, odd
    stride: int  # 1 or 2

    @property
    def op(self) -> str:
        return "max_pool"

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:1]

    def output_shape(self) -> tuple[int, int, int, int]:
        """(N, C, H', W')."""
        n, c, h, w = self.x.shape
        return n, c, (h - 1) // self.stride + 1, (w - 1) // self.stride + 1

    def new_output(self) -> Tensor:
        """An uninitialized output, in x's memory format."""
        return new_map(self)


class AvgPoolArgs(NamedTuple):
    """The means under a window that moves by its own size."""

    x: Tensor  # (N, C, H, W), any strides
    kernel: int  # rows and columns of the window

    @property
    def op(self) -> str:
        return "avg_pool"

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:1]

    def output_shape(self) -> tuple[int, int, int, int]:
        """(N, C, H', W'), of the whole windows."""
        n, c, h, w = self.x.shape
        return n, c, h // self.kernel, w // self.kernel

    def new_output(self) -> Tensor:
        """An uninitialized output, in x's memory format."""
        return new_map(self)


class GateArgs(NamedTuple):
    """A gate's function of every number."""

    x: Tensor  # of 2 or 4 dimensions, any strides
    gate: int  # Gate

    @property
    def op(self) -> str:
        return "gate"

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:1]

    def output_shape(self) -> torch.Size:
        """x's."""
        return self.x.shape

    def new_output(self) -> Tensor:
        """An uninitialized output, in x's memory format."""
        return new_map(self) if self.x.dim() == 4 else new_dense(self)


class UpsampleArgs(NamedTuple):
    """Each number as a square of ``scale`` rows and columns: the nearest neighbours."""

    x: Tensor  # (N, C, H, W), any strides
    scale: int

    @property
    def op(self) -> str:
        return "upsample"

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:1]

    def output_shape(self) -> tuple[int, int, int, int]:
        """(N, C, scale * H, scale * W)."""
        n, c, h, w = self.x.shape
        return n, c, self.scale * h, self.scale * w

    def new_output(self) -> Tensor:
        """An uninitialized output, in x's memory format."""
        return new_map(self)


POOL_KERNEL = 1023
"""The largest that a program takes; of an upsampling too."""

Step = Args | GlobalPoolArgs | LinearArgs | CastArgs | ConcatArgs | MaxPoolArgs | AvgPoolArgs | GateArgs | UpsampleArgs

STEPS: dict[str, type[Step]] = {
    **OPS, "global_pool": GlobalPoolArgs, "linear": LinearArgs, "cast": CastArgs, "concat": ConcatArgs, "max_pool": MaxPoolArgs,
    "avg_pool": AvgPoolArgs, "gate": GateArgs, "upsample": UpsampleArgs,
}  # fmt: skip
"""What a program is made of, in the order of ``csrc/cpu/binding.cpp``."""

_TENSOR_NAMES: dict[type[Step], list[str]] = {args: names_of_tensors(args) for args in STEPS.values()}


def tensor_names(args: type[Step]) -> list[str]:
    """Names of the tensor arguments, which come first."""
    return _TENSOR_NAMES[args]
