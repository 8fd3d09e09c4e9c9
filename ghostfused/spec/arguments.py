"""What one call of an op consists of: the tuples that every layer of the package hands on.

Each op has one: ``GhostArgs``, and for what lies between the Ghost modules of a bottleneck ``DepthwiseArgs`` and
``SqueezeExciteArgs``. It lists the arguments in the order of the op's schema, tensors first, so that a layer can
pass ``*args`` to the next and none has to repeat the list.

A Ghost module (Han et al., "GhostNet: More Features from Cheap Operations", CVPR 2020, section 3.1) computes::

    x1  = act1(norm1(conv(x * input_gate)))           # primary_conv,    init_channels maps
    x2  = act2(norm2(depthwise_conv(x1)))             # cheap_operation, init_channels * (ratio - 1) maps
    out = concat([x1, x2])[:, :out_channels] * output_gate + residual
"""

import enum
from typing import NamedTuple

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
        return _new_output(self)


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
        return _new_output(self)


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
        return torch.empty(self.output_shape(), dtype=self.x.dtype, device=self.x.device)


class GlobalPoolArgs(NamedTuple):
    """The mean over height and width: a step of the CPU's programs, and no op of its own."""

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
        return torch.empty(self.output_shape(), dtype=self.x.dtype, device=self.x.device)


class LinearArgs(NamedTuple):
    """A fully connected layer: a step of the CPU's programs, and no op of its own."""

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
        return torch.empty(self.output_shape(), dtype=self.x.dtype, device=self.x.device)


class CastArgs(NamedTuple):
    """x in another dtype: a step of the CPU's programs, and no op of its own."""

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
    """Maps one after the other along the channels: a step of the CPU's programs, and no op of its own."""

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
        return _new_output(self)


class MaxPoolArgs(NamedTuple):
    """The maxima under a window, padded by half of it: a step of the CPU's programs, and no op of its own."""

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
        return _new_output(self)


MAX_POOL_KERNEL = 1023
"""The largest that a program takes."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Those of the kernels, to which a program may cast."""

Args = GhostArgs | DepthwiseArgs | SqueezeExciteArgs
Step = Args | GlobalPoolArgs | LinearArgs | CastArgs | ConcatArgs | MaxPoolArgs

OPS: dict[str, type[Args]] = {"forward": GhostArgs, "depthwise": DepthwiseArgs, "squeeze_excite": SqueezeExciteArgs}
"""The ops and their arguments."""
STEPS: dict[str, type[Step]] = {
    **OPS, "global_pool": GlobalPoolArgs, "linear": LinearArgs, "cast": CastArgs, "concat": ConcatArgs, "max_pool": MaxPoolArgs,
}  # fmt: skip
"""What a program is made of, in the order of ``csrc/common/program.h``."""


def _new_output(args: GhostArgs | DepthwiseArgs | ConcatArgs | MaxPoolArgs) -> Tensor:
    x = args.x
    return torch.empty(args.output_shape(), dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last if x's strides say so and it is not contiguous as well; else contiguous (NCHW)."""
    if not x.is_contiguous() and x.stride(1) == 1 and x.shape[1] > 1:
        return torch.channels_last
    return torch.contiguous_format


_TENSOR_NAMES: dict[type[Step], list[str]] = {
    args: [name for name, kind in args.__annotations__.items() if kind in (Tensor, Tensor | None)]
    for args in STEPS.values()
}


def tensor_names(args: type[Step]) -> list[str]:
    """Names of the tensor arguments, which come first."""
    return _TENSOR_NAMES[args]


TENSORS = tensor_names(GhostArgs)
"""Those of GhostArgs."""
