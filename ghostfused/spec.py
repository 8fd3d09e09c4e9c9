"""What one call of a Ghost module consists of: the tuple that every layer of the package hands on.

``GhostArgs`` lists the arguments in the order of the op schema (``ops.SCHEMA``), so that a layer can pass
``*args`` to the next and none has to repeat the list.

A Ghost module (Han et al., "GhostNet: More Features from Cheap Operations", CVPR 2020, section 3.1) computes::

    x1  = act1(norm1(conv(x * input_gate)))           # primary_conv,    init_channels maps
    x2  = act2(norm2(depthwise_conv(x1)))             # cheap_operation, init_channels * (ratio - 1) maps
    out = concat([x1, x2])[:, :out_channels] * output_gate + residual
"""

import enum
from typing import NamedTuple

import torch
from torch import Tensor


class Act(enum.IntEnum):
    """Activation after either half. The numbers are the kernels' (``csrc/ghost_module.h``)."""

    NONE = 0
    RELU = 1
    RELU6 = 2
    SILU = 3
    HARDSWISH = 4
    LEAKY_RELU = 5
    PRELU = 6
    GELU = 7


class BatchNorm(NamedTuple):
    """The tensors and the epsilon of a BatchNorm, each of shape (C,); mean and var are None if it uses the batch's."""

    mean: Tensor | None
    var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5


class GhostArgs(NamedTuple):
    """The arguments of one Ghost module, in schema order.

    Shapes: N batch, Cin input channels, Cp = init_channels, r = ratio, k = kernel size of the primary conv,
    d = dw_size. All floating tensors are of x's dtype, but the norm tensors (mean, var, gamma, beta), which may
    all be float32 instead, as under ``nn.BatchNorm2d`` in a half-precision model.
    """

    x: Tensor  # (N, Cin, H, W), any strides
    primary_weight: Tensor  # (Cp, Cin / groups, k, k)
    primary_bias: Tensor | None  # (Cp,)
    primary_mean: Tensor | None  # (Cp,)  None: no norm
    primary_var: Tensor | None  # (Cp,)
    primary_gamma: Tensor | None  # (Cp,)
    primary_beta: Tensor | None  # (Cp,)
    primary_slope: Tensor | None  # (1,) or (Cp,)  PReLU only
    cheap_weight: Tensor  # (Cp * (r - 1), 1, d, d)
    cheap_bias: Tensor | None  # (Cp * (r - 1),), as are the next four
    cheap_mean: Tensor | None
    cheap_var: Tensor | None
    cheap_gamma: Tensor | None
    cheap_beta: Tensor | None
    cheap_slope: Tensor | None  # (1,) or (Cp * (r - 1),)  PReLU only
    input_gate: Tensor | None  # (N, Cin)
    residual: Tensor | None  # (N, out_channels, H', W')
    output_gate: Tensor | None  # (N, out_channels, Hg, Wg), nearest-upsampled to (H', W')
    primary_eps: float
    primary_act: int  # Act
    primary_negative_slope: float  # LeakyReLU only
    cheap_eps: float
    cheap_act: int  # Act
    cheap_negative_slope: float
    out_channels: int
    stride: int  # of the primary conv, as are dilation and groups; its padding is dilation * (k - 1) // 2
    dilation: int
    groups: int
    allow_tf32: bool

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensor arguments, which come first; their names are ``TENSORS``."""
        return self[: len(TENSORS)]  # type: ignore[return-value]

    @property
    def init_channels(self) -> int:
        return self.primary_weight.shape[0]

    @property
    def ratio(self) -> int:
        return self.cheap_weight.shape[0] // self.primary_weight.shape[0] + 1

    @property
    def kernel_size(self) -> int:
        return self.primary_weight.shape[2]

    @property
    def dw_size(self) -> int:
        return self.cheap_weight.shape[2]

    def output_shape(self) -> tuple[int, int, int, int]:
        """(N, out_channels, H', W')."""
        n, _, h, w = self.x.shape
        k = self.dilation * (self.kernel_size - 1)
        pad = 2 * (k // 2)
        return n, self.out_channels, (h + pad - k - 1) // self.stride + 1, (w + pad - k - 1) // self.stride + 1

    def new_output(self) -> Tensor:
        """An uninitialized output, in the memory format that PyTorch's convolution would choose."""
        return torch.empty(
            self.output_shape(), dtype=self.x.dtype, device=self.x.device, memory_format=memory_format(self.x)
        )


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last if x's strides say so and it is not contiguous as well; else contiguous (NCHW)."""
    if not x.is_contiguous() and x.stride(1) == 1 and x.shape[1] > 1:
        return torch.channels_last
    return torch.contiguous_format


TENSORS = [name for name, kind in GhostArgs.__annotations__.items() if kind in (Tensor, Tensor | None)]
"""Names of the tensor arguments; they come first in GhostArgs."""
