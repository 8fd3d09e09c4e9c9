"""The Triton kernels for what lies between a bottleneck's Ghost modules. Device code only.

``depthwise_kernel``: one program per image, run of output pixels and block of channels, from shifted loads of x.
``squeeze_kernel`` and ``excite_kernel``: a squeeze-and-excite gate in two launches. The sum over channels of the first
matrix is cut into the blocks that take the means: each multiplies its own means at once, so that neither matrix is read
more than once for a group of images, and no block waits for another. The second launch adds up those parts, in one order.

Conventions are those of ``device.py``.
"""

# device code, of which mypy knows nothing
# mypy: ignore-errors

import triton
import triton.language as tl

from ...spec import Gate
from .activations import NAN, _activate
from .device import _multiple, _norm_affine, _offset, _pixel_offset, _round, _scale_shift, _sum_products, _wide

SIGMOID = tl.constexpr(int(Gate.SIGMOID))
HARDSIGMOID = tl.constexpr(int(Gate.HARDSIGMOID))


@triton.jit
def _x_strides(sc, sh, sw, UNIT: tl.constexpr, ALIGN: tl.constexpr):
    """x's strides within an image, so that the compiler sees which is 1 and what divides the others."""
    sh = _multiple(sh, ALIGN)
    if UNIT == "c":
        sc = 1
        sw = _multiple(sw, ALIGN)
    elif UNIT == "w":
        sw = 1
        sc = _multiple(sc, ALIGN)
    return sc, sh, sw


@triton.jit
def _window_row(
    i, x, top, left, size, p_mask, c, c_mask, weight_ptr,
    KH: tl.constexpr, KW: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The products of row i of the windows, summed by themselves: one long chain would round more than PyTorch does."""
    x_tile, x_sh, x_sw = x
    H, W = size
    h = top + i
    row_mask = p_mask & (h >= 0) & (h < H)
    row = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for j in tl.static_range(KW):
        w = left + j
        inside = row_mask & (w >= 0) & (w < W)
        tile = tl.load(x_tile + (i * x_sh + j * x_sw), mask=inside[:, None] & c_mask[None, :], other=0.0)
        weight = tl.load(weight_ptr + c * (KH * KW) + i * KW + j, mask=c_mask, other=0.0)
        row += tile.to(tl.float32) * weight.to(tl.float32)[None, :]
    return row


DEPTHWISE_SCALARS = "eps negative_slope slope_stride H W C OH OW x_sn x_sc x_sh x_sw".split()  # noqa: SIM905


@triton.jit(do_not_specialize=DEPTHWISE_SCALARS)
def depthwise_kernel(
    x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, slope_ptr, out_ptr,
    eps, negative_slope, slope_stride, H, W, C, OH, OW, x_sn, x_sc, x_sh, x_sw,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE: tl.constexpr, ACT: tl.constexpr, NHWC: tl.constexpr,
    X_UNIT: tl.constexpr, X_ALIGN: tl.constexpr, C_ALIGN: tl.constexpr, OW_ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr, INDEX_64: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = act(norm(depthwise_conv(x))) for BLOCK_P flat output pixels × BLOCK_C channels of one image."""
    if INDEX_64:
        C, OH, OW = _wide(C), _wide(OH), _wide(OW)
        x_sc, x_sh, x_sw = _wide(x_sc), _wide(x_sh), _wide(x_sw)
    x_sc, x_sh, x_sw = _x_strides(x_sc, x_sh, x_sw, X_UNIT, X_ALIGN)
    C, OW, OHW = _multiple(C, C_ALIGN), _multiple(OW, OW_ALIGN), _multiple(OH * OW, OUT_ALIGN)

    # channel blocks fastest, as in ghost_kernel
    blocks, runs = tl.cdiv(C, BLOCK_C), tl.cdiv(OHW, BLOCK_P)
    unit = tl.program_id(0) // blocks
    image = (unit // runs).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    p = unit % runs * BLOCK_P + tl.arange(0, BLOCK_P)
    c_mask, p_mask = c < C, p < OHW

    top = p // OW * STRIDE - KH // 2
    left = p % OW * STRIDE - KW // 2
    x_tile = x_ptr + image * _multiple(x_sn, X_ALIGN) + (top * x_sh + left * x_sw)[:, None] + (c * x_sc)[None, :]
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    x = (x_tile, x_sh, x_sw)
    size = (H, W)
    if KH <= 3:
        for i in tl.static_range(KH):
            acc += _window_row(i, x, top, left, size, p_mask, c, c_mask, weight_ptr, KH, KW, BLOCK_P, BLOCK_C)
    else:  # unrolled, it would have more loads under way than registers for them
        for i in range(KH):
            acc += _window_row(i, x, top, left, size, p_mask, c, c_mask, weight_ptr, KH, KW, BLOCK_P, BLOCK_C)
    scale, shift = _scale_shift((bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps), c, c_mask)
    act = (slope_ptr, slope_stride, negative_slope)
    y = _norm_affine(acc, scale, shift, c, c_mask, act, ACT)
    out = out_ptr + image * OHW * C + _offset(p, c, OHW, C, NHWC)
    tl.store(out, _round(y, out_ptr.dtype.element_ty), mask=p_mask[:, None] & c_mask[None, :])


SQUEEZE_SCALARS = "N H W C R chunk x_sn x_sc x_sh x_sw".split()  # noqa: SIM905


@triton.jit(do_not_specialize=SQUEEZE_SCALARS)
def squeeze_kernel(
    x_ptr, weight_ptr, parts_ptr, N, H, W, C, R, chunk, x_sn, x_sc, x_sh, x_sw,
    X_UNIT: tl.constexpr, X_FLAT: tl.constexpr, X_ALIGN: tl.constexpr, C_ALIGN: tl.constexpr, P_ALIGN: tl.constexpr,
    INDEX_64: tl.constexpr,
    IMAGES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """parts[n, part, r] = the sum of weight[r, c] * x[n, c, p] / HW over the part's channels c and pixels p.

    A program takes IMAGES images, BLOCK_C channels and ``chunk`` flat pixels.
    """
    if INDEX_64:
        H, W = _wide(H), _wide(W)
        x_sc, x_sh, x_sw = _wide(x_sc), _wide(x_sh), _wide(x_sw)
    x_sc, x_sh, x_sw = _x_strides(x_sc, x_sh, x_sw, X_UNIT, X_ALIGN)
    C, HW = _multiple(C, C_ALIGN), _multiple(H * W, P_ALIGN)
    row = x_sh
    if X_FLAT:
        row = None

    blocks, chunks = tl.cdiv(C, BLOCK_C), tl.cdiv(HW, chunk)
    part = tl.program_id(0) % (blocks * chunks)
    n = tl.program_id(0) // (blocks * chunks) * IMAGES + tl.arange(0, IMAGES)
    c = part % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = part // blocks * chunk
    end = tl.multiple_of(tl.minimum(begin + chunk, HW), P_ALIGN)
    n_mask, c_mask = n < N, c < C

    x = x_ptr + (n.to(tl.int64) * _multiple(x_sn, X_ALIGN))[:, None, None] + (c * x_sc)[None, None, :]
    acc = tl.zeros((IMAGES, BLOCK_P, BLOCK_C), tl.float32)
    for q in range(begin, end, BLOCK_P):
        p = q + tl.arange(0, BLOCK_P)
        mask = n_mask[:, None, None] & (p < end)[None, :, None] & c_mask[None, None, :]
        acc += tl.load(x + _pixel_offset(p, W, row, x_sw)[None, :, None], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(acc, axis=1) / HW.to(tl.float32)

    parts = parts_ptr + ((n.to(tl.int64) * (blocks * chunks) + part) * R)[:, None]
    for r0 in range(0, R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        weight = tl.load(weight_ptr + r[:, None] * C + c[None, :], mask=(r < R)[:, None] & c_mask[None, :], other=0.0)
        y = _sum_products(weight.to(tl.float32)[None, :, :], mean[:, None, :], c_mask[None, None, :], 2)
        tl.store(parts + r[None, :], y, mask=n_mask[:, None] & (r < R)[None, :])


EXCITE_SCALARS = "N C R parts".split()  # noqa: SIM905


@triton.jit(do_not_specialize=EXCITE_SCALARS)
def excite_kernel(
    parts_ptr, reduce_bias_ptr, weight_ptr, bias_ptr, out_ptr, N, C, R, parts,
    ACT: tl.constexpr, GATE: tl.constexpr, R_ALIGN: tl.constexpr,
    IMAGES: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out = gate(weight @ act(sum of the parts + bias) + bias) for IMAGES images and BLOCK_C channels."""
    R = _multiple(R, R_ALIGN)
    blocks = tl.cdiv(C, BLOCK_C)
    n = tl.program_id(0) // blocks * IMAGES + tl.arange(0, IMAGES)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    n_mask, c_mask = n < N, c < C
    image = parts_ptr + (n.to(tl.int64) * (parts * R))[:, None]
    acc = tl.zeros((IMAGES, BLOCK_C), tl.float32)
    for r0 in range(0, R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        r_mask = r < R
        mask = n_mask[:, None] & r_mask[None, :]
        hidden = tl.zeros((IMAGES, BLOCK_R), tl.float32)
        for part in range(parts):
            hidden += tl.load(image + (part * R + r)[None, :], mask=mask, other=0.0)
        if reduce_bias_ptr is not None:
            hidden += tl.load(reduce_bias_ptr + r, mask=r_mask, other=0.0).to(tl.float32)[None, :]
        hidden = _activate(hidden, r, r_mask, (None, None, None), ACT)
        weight = tl.load(weight_ptr + c[:, None] * R + r[None, :], mask=c_mask[:, None] & r_mask[None, :], other=0.0)
        acc += _sum_products(weight.to(tl.float32)[None, :, :], hidden[:, None, :], r_mask[None, None, :], 2)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + c, mask=c_mask, other=0.0).to(tl.float32)[None, :]
    if GATE == SIGMOID:
        y = 1.0 / (1.0 + tl.exp(-acc))
    elif GATE == HARDSIGMOID:
        y = tl.minimum(tl.maximum(acc + 3.0, 0.0, NAN), 6.0, NAN) / 6.0
    else:
        y = tl.minimum(tl.maximum(acc, 0.0, NAN), 6.0, NAN)
    out = out_ptr + (n.to(tl.int64) * C)[:, None] + c[None, :]
    tl.store(out, _round(y, out_ptr.dtype.element_ty), mask=n_mask[:, None] & c_mask[None, :])
