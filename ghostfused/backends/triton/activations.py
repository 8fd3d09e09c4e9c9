"""The activations and their derivatives, in Triton."""

# device code, of which mypy knows nothing
# mypy: ignore-errors

import triton
import triton.language as tl

from ...spec import Act

RELU = tl.constexpr(int(Act.RELU))
RELU6 = tl.constexpr(int(Act.RELU6))
SILU = tl.constexpr(int(Act.SILU))
HARDSWISH = tl.constexpr(int(Act.HARDSWISH))
LEAKY_RELU = tl.constexpr(int(Act.LEAKY_RELU))
PRELU = tl.constexpr(int(Act.PRELU))
NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _activate(y, channel, mask, act, ACT: tl.constexpr):
    """The activation of y (pixels, channels); NaN stays NaN, as in PyTorch."""
    slope_ptr, slope_stride, negative_slope = act
    if ACT == RELU:
        y = tl.maximum(y, 0.0, NAN)
    elif ACT == RELU6:
        y = tl.minimum(tl.maximum(y, 0.0, NAN), 6.0, NAN)
    elif ACT == SILU:
        y = y / (1.0 + tl.exp(-y))
    elif ACT == HARDSWISH:
        y = y * tl.minimum(tl.maximum(y + 3.0, 0.0, NAN), 6.0, NAN) * (1.0 / 6.0)
    elif ACT == LEAKY_RELU:
        y = tl.where(y > 0.0, y, y * negative_slope)
    elif ACT == PRELU:
        slope = tl.load(slope_ptr + channel * slope_stride, mask=mask, other=0.0).to(tl.float32)
        y = tl.where(y > 0.0, y, y * slope[None, :])
    return y


@triton.jit
def _activate_backward(grad, z, channel, mask, act, ACT: tl.constexpr):
    """grad * act'(z), by PyTorch's conventions at the kinks."""
    slope_ptr, slope_stride, negative_slope = act
    if ACT == RELU:
        grad = tl.where(z <= 0.0, 0.0, grad)
    elif ACT == RELU6:
        grad = tl.where((z <= 0.0) | (z >= 6.0), 0.0, grad)
    elif ACT == SILU:
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        grad = grad * sigmoid * (1.0 + z * (1.0 - sigmoid))
    elif ACT == HARDSWISH:
        grad = tl.where(z <= -3.0, 0.0, tl.where(z < 3.0, grad * (z * (1.0 / 3.0) + 0.5), grad))
    elif ACT == LEAKY_RELU:
        grad = tl.where(z > 0.0, grad, grad * negative_slope)
    elif ACT == PRELU:
        slope = tl.load(slope_ptr + channel * slope_stride, mask=mask, other=0.0).to(tl.float32)
        grad = tl.where(z > 0.0, grad, grad * slope[None, :])
    return grad
