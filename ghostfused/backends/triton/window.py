"""The primary conv of more than one tap, or of another stride than 1: an implicit matrix product. Device code only.

A window's taps are so many 1×1 convs of moved maps, whose sums go to one accumulator. So x is read where it lies, in the
blocks of the 1×1 conv, and what a tap reads outside of the image is zero: the padding.
"""

# device code, of which mypy knows nothing
# mypy: ignore-errors

import triton
import triton.language as tl

from .device import _dot


@triton.jit
def _window_sums(
    p, p_mask, c, c_mask, W, x, x_size, x_pixels, input_gate, weight_ptr, Cin,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, TAPS_FIRST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The conv at the output's pixels p and channels c; the weight is (Cp, k, k, Cin) in memory if TAPS_FIRST, else (Cp, Cin, k, k)."""
    x_h, x_w = x_size
    stride_h, stride_w = x_pixels
    TAPS: tl.constexpr = KERNEL * KERNEL
    TAP_STEP: tl.constexpr = Cin if TAPS_FIRST else 1
    CHANNEL_STEP: tl.constexpr = 1 if TAPS_FIRST else TAPS
    STEPS: tl.constexpr = (Cin + BLOCK_K - 1) // BLOCK_K
    top = p // W * STRIDE - KERNEL // 2 * DILATION
    left = p % W * STRIDE - KERNEL // 2 * DILATION
    corner = top * stride_h + left * stride_w
    weight_row = weight_ptr + (c * (Cin * TAPS))[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, TAPS * STEPS):
        tap = step // STEPS
        down = tap // KERNEL * DILATION
        right = tap % KERNEL * DILATION
        h = top + down
        w = left + right
        inside = p_mask & (h >= 0) & (h < x_h) & (w >= 0) & (w < x_w)
        acc = _dot(
            acc, x, corner + (down * stride_h + right * stride_w), inside, weight_row + tap * TAP_STEP, c_mask,
            step % STEPS * BLOCK_K + tl.arange(0, BLOCK_K), Cin, input_gate, PRECISION, CHANNEL_STEP,
        )  # fmt: skip
    return acc
