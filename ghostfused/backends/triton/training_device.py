"""What the Triton training kernels of both directions share. Device code only.

A program owns a block of channels and a row: consecutive tiles of pixels, of one image or several. It goes through
its tiles and at the end writes one row of partial sums, so nothing is added atomically and every result has one order.

As in device.py pixels are flat indices, and arguments that belong together travel as tuples.
"""

# device code, of which mypy knows nothing
# mypy: ignore-errors

import triton
import triton.language as tl

from .activations import _activate
from .device import _offset, _round, _rsqrt


@triton.jit
def _center_rstd(norm, channel, mask):
    """(center, rstd) with x̂ = (y - center) * rstd: the mean without the bias, for y has none."""
    bias_ptr, mean_ptr, var_ptr, _, _, eps = norm
    center = tl.zeros(channel.shape, tl.float32)
    rstd = tl.full(channel.shape, 1.0, tl.float32)
    if mean_ptr is not None:
        var = tl.load(var_ptr + channel, mask=mask, other=1.0) + eps
        rstd = _rsqrt(var)
        center += tl.load(mean_ptr + channel, mask=mask, other=0.0)
    if bias_ptr is not None:
        center -= tl.load(bias_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    return center, rstd


@triton.jit
def _scale_shift(norm, rstd, channel, mask):
    """(scale, shift) with z = (y - center) * scale + shift."""
    _, _, _, gamma_ptr, beta_ptr, _ = norm
    scale = rstd
    shift = tl.zeros(channel.shape, tl.float32)
    if gamma_ptr is not None:
        scale *= tl.load(gamma_ptr + channel, mask=mask, other=0.0)
    if beta_ptr is not None:
        shift += tl.load(beta_ptr + channel, mask=mask, other=0.0)
    return scale, shift


@triton.jit
def _row(pixels, per_row, N, BLOCK: tl.constexpr, channel_blocks):
    """(channel block, row, its first tile, how many it has, tiles of an image) of this program.

    Channel blocks fastest: the programs that read the same pixels run together and meet in L2.
    """
    block = tl.program_id(0) % channel_blocks
    row = tl.program_id(0) // channel_blocks
    tiles = tl.cdiv(pixels, BLOCK)
    first = row * per_row
    return block, row, first, tl.minimum(per_row, N * tiles - first), tiles


@triton.jit
def _tile(t, tiles, HW, BLOCK: tl.constexpr):
    """(image, pixels) of tile t."""
    return (t // tiles).to(tl.int64), t % tiles * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _depthwise(y1, weight_ptr, p, c, j, c_mask, HW, W, channels, norm, act,
               NHWC: tl.constexpr, ACT: tl.constexpr, DW_SIZE: tl.constexpr):  # fmt: skip
    """y2 of the cheap channels j, made from c, at the pixels p of an image y1, and of its type; x1 is made at each tap."""
    PAD: tl.constexpr = DW_SIZE // 2
    center, scale, shift = norm
    step = channels if NHWC else 1
    column = p % W
    y1_tile = y1 + _offset(p, c, HW, channels, NHWC)
    acc = tl.zeros((p.shape[0], c.shape[0]), tl.float32)
    for tap in tl.static_range(DW_SIZE * DW_SIZE):
        dy = tap // DW_SIZE - PAD
        dx = tap % DW_SIZE - PAD
        row = p + dy * W
        inside = (p < HW) & (row >= 0) & (row < HW) & (column + dx >= 0) & (column + dx < W)
        mask = inside[:, None] & c_mask[None, :]
        y = tl.load(y1_tile + dy * W * step + dx * step, mask=mask, other=0.0).to(tl.float32)
        x1 = _activate((y - center[None, :]) * scale[None, :] + shift[None, :], c, c_mask, act, ACT)
        weight = tl.load(weight_ptr + j * (DW_SIZE * DW_SIZE) + tap, mask=c_mask, other=0.0).to(tl.float32)
        # zero outside the image, for the padding comes after norm and activation
        acc += tl.where(mask, x1, 0.0) * weight[None, :]
    return _round(acc, y1.dtype.element_ty)
