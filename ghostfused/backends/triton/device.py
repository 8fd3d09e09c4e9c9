"""Device functions that the Triton kernels of all ops share.

Pixels are flat indices, p = h * W + w. Maps are either NCHW or NHWC (channels_last); ``*_ALIGN`` are the powers of
two that divide a tensor's sizes and strides, without which Triton could not prove that wide accesses are aligned.
"""

# device code, of which mypy knows nothing
# mypy: ignore-errors

import triton
import triton.language as tl
from triton import knobs

from .activations import _activate

INTERPRETED = tl.constexpr(knobs.runtime.interpret)
BFLOAT16 = tl.constexpr(tl.bfloat16)


@triton.jit
def _multiple(size, ALIGN: tl.constexpr):
    """size, written so that the compiler sees a multiple of ALIGN (tl.multiple_of is lost on a kernel's argument)."""
    return size // ALIGN * ALIGN


@triton.jit
def _wide(size):
    return size.to(tl.int64)


@triton.jit
def _round(y, DTYPE: tl.constexpr):
    """y (float32) in DTYPE."""
    if INTERPRETED and DTYPE == BFLOAT16:  # the interpreter would cut the lower bits off
        bits = y.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        y = tl.where(y == y, bits.to(tl.float32, bitcast=True), y)
    return y.to(DTYPE)


@triton.jit
def _sum_products(a, b, mask, axis: tl.constexpr):
    """The sum of a * b where ``mask`` holds.

    The select comes after the product, and so keeps the compiler from fusing it with the reduction's first addition: each of
    two threads would round the other's product and not its own, and what is stored would depend on which of them stores.
    """
    return tl.sum(tl.where(mask, a * b, 0.0), axis)


@triton.jit
def _rsqrt(x):
    """One over the root of x, from float32's smallest normal number on; 0 of infinity, infinity of 0."""
    y = tl.rsqrt(x)
    newton = 0.5 - 0.5 * x * y * y  # the hardware's rsqrt is off by an ulp or two
    return y + y * tl.minimum(newton, 1.0)  # of 0 and infinity y is exact and the step NaN, of which minimum makes 1


@triton.jit
def _rstd(var, eps):
    """One over the root of var + eps, of which a quarter is taken where the sum may be beyond float32."""
    quarter = eps > 1.0  # else it isn't, and a quarter may be below the normal numbers
    part = tl.where(quarter, 0.25, 1.0)
    return _rsqrt(var * part + eps * part) * tl.where(quarter, 0.5, 1.0)


@triton.jit
def _scale_shift(norm, channel, mask):
    """(scale, shift) with norm(y + bias) = y * scale + shift, from the raw parameters: nothing cached, nothing stale."""
    bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps = norm
    scale = tl.full(channel.shape, 1.0, tl.float32)
    shift = tl.zeros(channel.shape, tl.float32)
    if mean_ptr is not None:
        scale = _rstd(tl.load(var_ptr + channel, mask=mask, other=1.0).to(tl.float32), eps)
        if gamma_ptr is not None:
            scale *= tl.load(gamma_ptr + channel, mask=mask, other=0.0).to(tl.float32)
        shift -= tl.load(mean_ptr + channel, mask=mask, other=0.0).to(tl.float32) * scale
        if beta_ptr is not None:
            shift += tl.load(beta_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + channel, mask=mask, other=0.0).to(tl.float32) * scale
    return scale, shift


@triton.jit
def _pixel_offset(p, W, stride_h, stride_w):
    """The offset of flat pixel p; stride_h is None if rows follow each other without a gap."""
    if stride_h is None:
        return p * stride_w
    else:
        return p // W * stride_h + p % W * stride_w


@triton.jit
def _offset(p, c, HW, channels, NHWC: tl.constexpr):
    """The offset of pixels p × channels c in an image of a contiguous or channels_last tensor."""
    if NHWC:
        return p[:, None] * channels + c[None, :]
    else:
        return c[None, :] * HW + p[:, None]


@triton.jit
def _gate(p, c, mask, W, gate):
    """The output gate at pixels p and channels c, of shapes that broadcast."""
    gate_ptr, gate_h, gate_w, scale_h, scale_w, gate_sc, gate_sh, gate_sw = gate
    # the index rule of F.interpolate(mode="nearest"), in float32 as there
    h = tl.minimum(((p // W).to(tl.float32) * scale_h).to(tl.int32), gate_h - 1)
    w = tl.minimum(((p % W).to(tl.float32) * scale_w).to(tl.int32), gate_w - 1)
    at = h.to(p.dtype) * gate_sh + w.to(p.dtype) * gate_sw + c * gate_sc
    return tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)


# Arguments that belong together travel as tuples: norm, act, size, x1, residual and gate are packed in ghost_kernel.
@triton.jit
def _store(y, p, c, tile, offset, mask, W, residual, gate):
    """Stores y * upsample(gate) + residual to ``tile``, the output at pixels p and channels c, and at ``offset`` in an image."""
    if gate[0] is not None:
        y *= _gate(p, c, mask, W, gate)
    residual_ptr, residual_sc, residual_sh, residual_sw = residual
    if residual_ptr is not None:
        at = offset
        if residual_sc is not None:  # of other strides than the output's
            at = _pixel_offset(p, W, residual_sh, residual_sw) + c * residual_sc
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(tile, _round(y, tile.dtype.element_ty), mask=mask)


@triton.jit
def _norm_affine(y, scale, shift, channel, mask, act, ACT: tl.constexpr):
    """The activation of y * scale + shift, for y of (pixels, channels)."""
    return _activate(y * scale[None, :] + shift[None, :], channel, mask, act, ACT)


@triton.jit
def _load(x, x_pixel, p_mask, weight_row, c_mask, k, Cin, input_gate, WEIGHT_STEP: tl.constexpr):
    """x and weight * input_gate at the input channels k, whose weights lie WEIGHT_STEP apart."""
    x_ptr, stride_c = x
    k_mask = k < Cin
    x_tile = x_ptr + x_pixel[:, None] + (k * stride_c)[None, :]
    tile = tl.load(x_tile, mask=p_mask[:, None] & k_mask[None, :], other=0.0)
    weight = tl.load(weight_row + (k * WEIGHT_STEP)[:, None], mask=k_mask[:, None] & c_mask[None, :], other=0.0)
    if input_gate is not None:  # into the weight and rounded, as training's backward has it: both see the same sums
        scale = tl.load(input_gate + k, mask=k_mask, other=0.0).to(tl.float32)
        weight = _round(weight.to(tl.float32) * scale[:, None], weight.dtype)
    return tile, weight


@triton.jit
def _dot(
    acc, x, x_pixel, p_mask, weight_row, c_mask, k, Cin, input_gate, PRECISION: tl.constexpr, WEIGHT_STEP: tl.constexpr = 1
):  # fmt: skip
    """acc + (x * input_gate) @ weight over the input channels k, whose weights lie WEIGHT_STEP apart."""
    tile, weight = _load(x, x_pixel, p_mask, weight_row, c_mask, k, Cin, input_gate, WEIGHT_STEP)
    if INTERPRETED:  # whose tl.dot takes bfloat16's bits for integers
        tile, weight = tile.to(tl.float32), weight.to(tl.float32)
    if PRECISION == "blocks":  # by fma: of a plain addition the compiler makes one chain over all channels again
        return tl.fma(tl.dot(tile, weight, input_precision="ieee"), 1.0, acc)
    else:
        return tl.dot(tile, weight, acc, input_precision=PRECISION)
