"""The depthwise step of the Ghost module's kernel for channels_last maps, in registers. Device code only.

A lane owns VECTOR neighbouring channels of a patch, PATCH_H × PATCH_W pixels of x2. It goes down the rows of x1 that the
patch reaches, keeps those of a window, and so loads and converts each number once for all of the patch. Lanes lie along the
channels first. Where sizes don't divide, the last patches of a row or a column move back over their neighbours: what two
lanes compute they store twice, with the same bits, and nothing but the image's edge needs a mask.
"""

# device code, of which mypy knows nothing
# mypy: ignore-errors

import triton
import triton.language as tl

from .activations import _activate
from .device import _scale_shift, _store


@triton.jit
def _row_of_x1(tile, row_inside, left, W, channels, mask, PAD: tl.constexpr, PATCH_W: tl.constexpr):
    """The PATCH_W + 2 PAD columns of a row of x1 from ``left`` - PAD on, as float32; zeros outside the image."""
    columns = ()
    for column in tl.static_range(-PAD, PATCH_W + PAD):
        inside = mask
        if row_inside is not None:
            inside = inside & row_inside
        if column < 0:
            inside = inside & (left + column >= 0)
        elif column >= PATCH_W:
            inside = inside & (left + column < W)
        value = tl.load(tile + column * channels, mask=inside, other=0.0)
        columns = columns + (value.to(tl.float32),)  # noqa: RUF005 (Triton has no unpacking)
    return columns


@triton.jit
def _cheap_patches(
    top, bottom, c0, c1, weight_ptr, Cp, norm, act, size, x1, out, residual, gate,
    ACT: tl.constexpr, RATIO: tl.constexpr, DW_SIZE: tl.constexpr, WIDTH: tl.constexpr,
    PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, VECTOR: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """x2 for the rows top … bottom and all maps made from the init channels c0 … c1, of which there are at most WIDTH."""
    HW, W, out_channels = size
    x1_ptr, x1_channels = x1
    PAD: tl.constexpr = DW_SIZE // 2
    H = HW // W
    vectors = tl.cdiv(WIDTH, VECTOR)
    lane = tl.arange(0, LANES)[:, None]
    per_step = LANES // vectors  # patches
    c = c0 + lane % vectors * VECTOR + tl.arange(0, VECTOR)[None, :]
    across = tl.cdiv(W, PATCH_W)
    patches = tl.cdiv(bottom - top, PATCH_H) * across
    for r in tl.static_range(RATIO - 1):
        j = c * (RATIO - 1) + r  # the depthwise conv's output channel
        c_mask = (c < c1) & (Cp + j < out_channels)
        scale, shift = _scale_shift(norm, j, c_mask)
        weights = ()  # stay in registers
        for tap in tl.static_range(DW_SIZE * DW_SIZE):
            weight = tl.load(weight_ptr + j * (DW_SIZE * DW_SIZE) + tap, mask=c_mask, other=0.0)
            weights = weights + (weight.to(tl.float32) * scale,)  # noqa: RUF005
        for first in range(0, patches, per_step):
            patch = first + lane // vectors
            mask = (patch < patches) & (lane // vectors < per_step) & c_mask
            h = tl.minimum(top + patch // across * PATCH_H, bottom - PATCH_H)
            w = tl.minimum(patch % across * PATCH_W, W - PATCH_W)
            p = h * W + w
            tile = x1_ptr + (p * x1_channels + c)
            out_tile = out + (p * out_channels + (Cp + j))
            window = ()
            for i in tl.static_range(DW_SIZE - 1 + PATCH_H):
                row_inside = None
                if i < PAD:
                    row_inside = h + (i - PAD) >= 0
                elif i >= PATCH_H + PAD:
                    row_inside = h + (i - PAD) < H
                row = _row_of_x1(
                    tile + (i - PAD) * W * x1_channels, row_inside, w, W, x1_channels, mask, PAD, PATCH_W
                )  # fmt: skip
                window = window + (row,)  # noqa: RUF005
                if i >= DW_SIZE - 1:
                    for column in tl.static_range(PATCH_W):
                        y = shift
                        for tap in tl.static_range(DW_SIZE * DW_SIZE):
                            y = window[i - DW_SIZE + 1 + tap // DW_SIZE][column + tap % DW_SIZE] * weights[tap] + y
                        y = _activate(y, j, c_mask, act, ACT)
                        step = (i - DW_SIZE + 1) * W + column
                        at = (p + step) * out_channels + (Cp + j)
                        _store(y, p + step, Cp + j, out_tile + step * out_channels, at, mask, W, residual, gate)
