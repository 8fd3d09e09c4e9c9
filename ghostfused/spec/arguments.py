"""What one call of an op consists of: the tuples that every layer of the package hands on.

Each op has one: ``GhostArgs``, and for what lies between the Ghost modules of a bottleneck ``DepthwiseArgs`` and
``SqueezeExciteArgs``; the steps that only programs have are in ``program_steps.py``. It lists the arguments in the order of the
op's schema, tensors first, so that a layer can pass ``*args`` to the next and none has to repeat the list.

A Ghost module (Han et al., "GhostNet: More Features from Cheap Operations", CVPR 2020, section 3.1) computes::

    x1  = act1(norm1(conv(x * input_gate)))           # primary_conv,    init_channels maps
    x2  = act2(norm2(depthwise_conv(x1)))             # cheap_operation, init_channels * (ratio - 1) maps
    out = concat([x1, x2])[:, :out_channels] * output_gate + residual
"""

import enum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Gate(enum.IntEnum):
    """What makes a squeeze-and-excite block's gate of the last 1×1 convolution."""

    SIGMOID = 0
    HARDSIGMOID = 1  # relu6(x + 3) / 6
    RELU6 = 2  # as in the seed's network


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
    def op(self) -> str:
        return "forward"

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
        return new_map(self)


class DepthwiseArgs(NamedTuple):
    """``act(norm(depthwise_conv(x)))``: in a bottleneck, what shrinks the map or mixes rows and columns of a gate.

    The conv pads by ``kernel // 2`` in each direction and makes one map of each. Dtypes as in GhostArgs.
    """

    x: Tensor  # (N, C, H, W), any strides
    weight: Tensor  # (C, 1, kh, kw), both odd
    bias: Tensor | None  # (C,), as are the next four
    mean: Tensor | None  # None: no norm
    var: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    slope: Tensor | None  # (1,) or (C,)  PReLU only
    eps: float
    act: int  # Act
    negative_slope: float  # LeakyReLU only
    stride: int

    @property
    def op(self) -> str:
        return "depthwise"

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:8]

    def output_shape(self) -> tuple[int, int, int, int]:
        """(N, C, H', W')."""
        n, c, h, w = self.x.shape
        return n, c, (h - 1) // self.stride + 1, (w - 1) // self.stride + 1

    def new_output(self) -> Tensor:
        """An uninitialized output, in the memory format that PyTorch's convolution would choose."""
        return new_map(self)


class SqueezeExciteArgs(NamedTuple):
    """The gate of a squeeze-and-excite block (Hu et al., CVPR 2018): ``gate(expand(act(reduce(mean(x)))))``.

    The mean is over height and width; reduce and expand are matrices. All tensors are of x's dtype.
    """

    x: Tensor  # (N, C, H, W), any strides
    reduce_weight: Tensor  # (R, C), or of a 1×1 conv: (R, C, 1, 1)
    reduce_bias: Tensor | None  # (R,)
    expand_weight: Tensor  # (C, R), or (C, R, 1, 1)
    expand_bias: Tensor | None  # (C,)
    act: int  # Act, but none with a slope
    gate: int  # Gate

    @property
    def op(self) -> str:
        return "squeeze_excite"

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:5]

    def output_shape(self) -> tuple[int, int]:
        """(N, C)."""
        return self.x.shape[0], self.x.shape[1]

    def new_output(self) -> Tensor:
        """An uninitialized output."""
        return new_dense(self)


Args = GhostArgs | DepthwiseArgs | SqueezeExciteArgs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Those of the kernels."""
OPS: dict[str, type[Args]] = {"forward": GhostArgs, "depthwise": DepthwiseArgs, "squeeze_excite": SqueezeExciteArgs}
"""The ops and their arguments."""


class _Shaped(Protocol):
    @property
    def x(self) -> Tensor: ...

    def output_shape(self) -> tuple[int, ...]: ...


def new_map(args: _Shaped) -> Tensor:
    """An uninitialized output, in x's memory format."""
    x = args.x
    return torch.empty(args.output_shape(), dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def new_dense(args: _Shaped) -> Tensor:
    """An uninitialized output."""
    return torch.empty(args.output_shape(), dtype=args.x.dtype, device=args.x.device)


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last if x's strides say so and it is not contiguous as well; else contiguous (NCHW)."""
    if not x.is_contiguous() and x.stride(1) == 1 and x.shape[1] > 1:
        return torch.channels_last
    return torch.contiguous_format


def names_of_tensors(args: type) -> list[str]:
    return [name for name, kind in args.__annotations__.items() if kind in (Tensor, Tensor | None)]


TENSORS = names_of_tensors(GhostArgs)
"""The tensor arguments of GhostArgs, which come first."""
