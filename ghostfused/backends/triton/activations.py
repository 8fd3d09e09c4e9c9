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
GELU = tl.constexpr(int(Act.GELU))
GELU_TANH = tl.constexpr(int(Act.GELU_TANH))
MISH = tl.constexpr(int(Act.MISH))
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
        if len(channel.shape) == 1:
            slope = slope[None, :]
        y = tl.where(y > 0.0, y, y * slope)
    elif ACT == GELU:
        y = y * _normal_cdf(y)
    elif ACT == GELU_TANH:
        y = y / (1.0 + tl.exp(-y * (1.5957691216 + 0.0713548163 * y * y)))
    elif ACT == MISH:
        y = y * _tanh_softplus(y)[0]
    return y


@triton.jit
def _normal_cdf(x):
    return 0.5 + 0.5 * tl.erf(x * 0.7071067812)


@triton.jit
def _tanh_softplus(x):
    """tanh(ln(1 + e^x)) and its derivative: with n = e^x (e^x + 2) the first is n / (n + 2)."""
    e = tl.exp(tl.minimum(x, 30.0))  # it is 1 from there on
    n = e * (e + 2.0)
    return n / (n + 2.0), 4.0 * e * (e + 1.0) / ((n + 2.0) * (n + 2.0))


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
    elif ACT == GELU:
        grad = grad * (_normal_cdf(z) + z * tl.exp(-0.5 * z * z) * 0.3989422804)
    elif ACT == GELU_TANH:
        # of s = 1 / (1 + e^-a) both s and s (1 - s), which loses no digits where s is near 1
        e = tl.exp(-tl.abs(z * (1.5957691216 + 0.0713548163 * z * z)))
        sigmoid = tl.where(z < 0.0, e, 1.0) / (1.0 + e)
        grad = grad * (sigmoid + z * e / ((1.0 + e) * (1.0 + e)) * (1.5957691216 + 0.2140644488 * z * z))
    elif ACT == MISH:
        gate, slope = _tanh_softplus(z)
        grad = grad * (gate + z * slope)
    return grad
