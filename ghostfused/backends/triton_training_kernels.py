"""The Triton kernels of training: docs/training.md has their formulas, ``training.Kernels`` their contract. Device code only.

A program owns a block of channels and a row: consecutive tiles of pixels, of one image or several. It goes through
its tiles and at the end writes one row of partial sums, so nothing is added atomically and every result has one order. What
is per channel is combined by ``_finish_statistics`` (forward) or by torch.sum over the rows (backward).

As in triton_kernels.py pixels are flat indices, and arguments that belong together travel as tuples.
"""

# device code, of which mypy knows nothing
# mypy: ignore-errors

import triton
import triton.language as tl

from .triton_kernels import (
    HARDSWISH,
    LEAKY_RELU,
    PRELU,
    RELU,
    RELU6,
    SILU,
    _activate,
    _dot,
    _gate,
    _offset,
    _pixel_offset,
    _rsqrt,
    _store,
)


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
def _gather_statistics(y, mask, n, tile_n, shift, s, q):
    """Sums over a tile y (pixels, channels): of ones, y - shift and its square; the shift is the first tile's mean."""
    if n == 0.0:
        shift = tl.sum(tl.where(mask, y, 0.0), 0) / tile_n
    d = tl.where(mask, y - shift[None, :], 0.0)
    return n + tile_n, shift, s + tl.sum(d, 0), q + tl.sum(d * d, 0)


@triton.jit
def _rows(r0, rows, c, mask, C, partial_ptr, ROWS: tl.constexpr):
    """(n, mean, M2) of ROWS rows from r0."""
    r = r0 + tl.arange(0, ROWS)
    at = partial_ptr + (r * 3 * C)[:, None] + c[None, :]
    mask = (r < rows)[:, None] & mask[None, :]
    # .cg: other programs wrote them, so not by way of this multiprocessor's L1
    n = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    mean = tl.load(at + C, mask=mask, other=0.0, cache_modifier=".cg")
    return n, mean, tl.load(at + 2 * C, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def _combine_statistics(rows, c, mask, C, partial_ptr, mean_ptr, var_ptr):
    """Mean and biased variance from all rows, in their order, in two passes."""
    ROWS: tl.constexpr = 16
    shift = tl.load(partial_ptr + C + c, mask=mask, other=0.0, cache_modifier=".cg")
    total = tl.zeros(c.shape, tl.float32)
    s = tl.zeros(c.shape, tl.float32)
    for r0 in range(0, rows, ROWS):
        n, means, _m2 = _rows(r0, rows, c, mask, C, partial_ptr, ROWS)
        total += tl.sum(n, 0)
        s += tl.sum(n * (means - shift[None, :]), 0)
    total = tl.maximum(total, 1.0)  # lanes beyond the last channel
    mean = shift + s / total
    m2 = tl.zeros(c.shape, tl.float32)
    for r0 in range(0, rows, ROWS):
        n, means, squares = _rows(r0, rows, c, mask, C, partial_ptr, ROWS)
        d = means - mean[None, :]
        m2 += tl.sum(squares + n * d * d, 0)
    tl.store(mean_ptr + c, mean, mask=mask)
    tl.store(var_ptr + c, m2 / total, mask=mask)


@triton.jit
def _finish_statistics(n, shift, s, q, block, row, rows, c, mask, C, partial_ptr, counter_ptr, mean_ptr, var_ptr):
    """Writes this program's (n, mean, M2); the program that is last of its channel block combines them all.

    Rows are combined in order whichever program comes last, so the result has one value. The barrier and the counter's
    release make a program's row visible before it is counted; the counter's acquire comes before the rows are read.
    """
    at = partial_ptr + row * 3 * C + c
    tl.store(at, tl.full(c.shape, 1.0, tl.float32) * n, mask=mask)
    tl.store(at + C, shift + s / n, mask=mask)
    tl.store(at + 2 * C, tl.maximum(q - s * s / n, 0.0), mask=mask)
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr + block, 1, sem="acq_rel")
    if arrived == rows - 1:
        tl.debug_barrier()
        _combine_statistics(rows, c, mask, C, partial_ptr, mean_ptr, var_ptr)


@triton.jit
def primary_statistics_kernel(
    x_ptr, weight_ptr, input_gate_ptr, out_ptr, partial_ptr, counter_ptr, mean_ptr, var_ptr,
    N, HW, W, Cin, Cp, out_channels, x_sn, x_sc, x_sh, x_sw, rows, per_row,
    NHWC: tl.constexpr, X_FLAT: tl.constexpr, PRECISION: tl.constexpr, ONE_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y1 = conv(x * input_gate) to the output's first half, and its statistics."""
    block, row, first, count, tiles = _row(HW, per_row, N, BLOCK_M, tl.cdiv(Cp, BLOCK_N))
    c = block * BLOCK_N + tl.arange(0, BLOCK_N)
    c_mask = c < Cp
    n = 0.0
    shift = tl.zeros((BLOCK_N,), tl.float32)
    s = tl.zeros((BLOCK_N,), tl.float32)
    q = tl.zeros((BLOCK_N,), tl.float32)
    weight_row = weight_ptr + (c * Cin)[None, :]  # read transposed: (input channels, init channels)
    for i in range(0, count):
        image, p = _tile(first + i, tiles, HW, BLOCK_M)
        p_mask = p < HW
        x = (x_ptr + image * x_sn, x_sc)
        x_pixel = _pixel_offset(p, W, None if X_FLAT else x_sh, x_sw)
        gate = None
        if input_gate_ptr is not None:
            gate = input_gate_ptr + image * Cin
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if ONE_K:
            acc = _dot(acc, x, x_pixel, p_mask, weight_row, c_mask, tl.arange(0, BLOCK_K), Cin, gate, PRECISION)
        else:
            for k0 in range(0, Cin, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                acc = _dot(acc, x, x_pixel, p_mask, weight_row, c_mask, k, Cin, gate, PRECISION)
        mask = p_mask[:, None] & c_mask[None, :]
        y = acc.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + image * HW * out_channels + _offset(p, c, HW, out_channels, NHWC), y, mask=mask)
        tile_n = tl.sum(p_mask.to(tl.float32), 0)
        n, shift, s, q = _gather_statistics(y.to(tl.float32), mask, n, tile_n, shift, s, q)
    _finish_statistics(
        n, shift, s, q, block, row, rows, c, c_mask, Cp, partial_ptr, counter_ptr, mean_ptr, var_ptr
    )  # fmt: skip


@triton.jit
def _depthwise(y1, weight_ptr, p, c, j, c_mask, HW, W, channels, norm, act,
               NHWC: tl.constexpr, ACT: tl.constexpr, DW_SIZE: tl.constexpr):  # fmt: skip
    """y2 of the cheap channels j, made from c, at the pixels p of an image y1; x1 is computed at each tap."""
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
    return acc


@triton.jit
def cheap_statistics_kernel(
    weight_ptr, primary_bias_ptr, primary_mean_ptr, primary_var_ptr, primary_gamma_ptr, primary_beta_ptr,
    primary_slope_ptr, out_ptr, partial_ptr, counter_ptr, mean_ptr, var_ptr,
    primary_eps, primary_negative_slope, N, HW, W, Cp, new, out_channels, primary_slope_stride, rows, per_row,
    NHWC: tl.constexpr, PRIMARY_ACT: tl.constexpr, RATIO: tl.constexpr, DW_SIZE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y2 from y1, the output's first half, to its second; and the statistics of y2, of cut channels too."""
    block, row, first, count, tiles = _row(HW, per_row, N, BLOCK_P, tl.cdiv(new, BLOCK_C))
    j = block * BLOCK_C + tl.arange(0, BLOCK_C)
    j_mask = j < new
    c = j // (RATIO - 1)
    norm = (primary_bias_ptr, primary_mean_ptr, primary_var_ptr, primary_gamma_ptr, primary_beta_ptr, primary_eps)
    act = (primary_slope_ptr, primary_slope_stride, primary_negative_slope)
    center, rstd = _center_rstd(norm, c, j_mask)
    scale, shift1 = _scale_shift(norm, rstd, c, j_mask)
    n = 0.0
    shift = tl.zeros((BLOCK_C,), tl.float32)
    s = tl.zeros((BLOCK_C,), tl.float32)
    q = tl.zeros((BLOCK_C,), tl.float32)
    for i in range(0, count):
        image, p = _tile(first + i, tiles, HW, BLOCK_P)
        out = out_ptr + image * HW * out_channels
        y = _depthwise(
            out, weight_ptr, p, c, j, j_mask, HW, W, out_channels, (center, scale, shift1), act,
            NHWC, PRIMARY_ACT, DW_SIZE,
        ).to(out_ptr.dtype.element_ty)  # fmt: skip
        kept = (p < HW)[:, None] & (j_mask & (Cp + j < out_channels))[None, :]
        tl.store(out + _offset(p, Cp + j, HW, out_channels, NHWC), y, mask=kept)
        tile_n = tl.sum((p < HW).to(tl.float32), 0)
        mask = (p < HW)[:, None] & j_mask[None, :]
        n, shift, s, q = _gather_statistics(y.to(tl.float32), mask, n, tile_n, shift, s, q)
    _finish_statistics(
        n, shift, s, q, block, row, rows, j, j_mask, new, partial_ptr, counter_ptr, mean_ptr, var_ptr
    )  # fmt: skip


@triton.jit
def _normalize_half(
    first, count, tiles, c, channel, c_mask, norm, act, size, out_ptr, residual_ptr, residual_strides, gate_ptr,
    gate_rest, gate_sn, NHWC: tl.constexpr, ACT: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """out = act(norm(out)) * gate + residual for the output's channels c; ``channel`` is theirs in their half."""
    HW, _, out_channels = size
    center, rstd = _center_rstd(norm, channel, c_mask)
    scale, shift = _scale_shift(norm, rstd, channel, c_mask)
    residual_sn, residual_sc, residual_sh, residual_sw = residual_strides
    for i in range(0, count):
        image, p = _tile(first + i, tiles, HW, BLOCK_P)
        out = out_ptr + image * HW * out_channels
        mask = (p < HW)[:, None] & c_mask[None, :]
        y = tl.load(out + _offset(p, c, HW, out_channels, NHWC), mask=mask, other=0.0).to(tl.float32)
        y = _activate((y - center[None, :]) * scale[None, :] + shift[None, :], channel, c_mask, act, ACT)
        residual = (None, None, None, None)
        if residual_ptr is not None:
            residual = (residual_ptr + image * residual_sn, residual_sc, residual_sh, residual_sw)
        gate = (None, None, None, None, None, None, None, None)
        if gate_ptr is not None:
            gate_h, gate_w, scale_h, scale_w, gate_sc, gate_sh, gate_sw = gate_rest
            gate = (gate_ptr + image * gate_sn, gate_h, gate_w, scale_h, scale_w, gate_sc, gate_sh, gate_sw)
        _store(y, p, c, mask, size, out, residual, gate, NHWC)


@triton.jit
def normalize_kernel(
    primary_bias_ptr, primary_mean_ptr, primary_var_ptr, primary_gamma_ptr, primary_beta_ptr, primary_slope_ptr,
    cheap_bias_ptr, cheap_mean_ptr, cheap_var_ptr, cheap_gamma_ptr, cheap_beta_ptr, cheap_slope_ptr,
    residual_ptr, output_gate_ptr, out_ptr, primary_eps, primary_negative_slope, cheap_eps, cheap_negative_slope,
    gate_scale_h, gate_scale_w, N, HW, W, Cp, out_channels, primary_slope_stride, cheap_slope_stride,
    residual_sn, residual_sc, residual_sh, residual_sw, gate_h, gate_w, gate_sn, gate_sc, gate_sh, gate_sw, per_row,
    NHWC: tl.constexpr, PRIMARY_ACT: tl.constexpr, CHEAP_ACT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y1 and y2 become the output, in place. The channel blocks of the primary half come first."""
    primary_blocks = tl.cdiv(Cp, BLOCK_C)
    blocks = primary_blocks + tl.cdiv(out_channels - Cp, BLOCK_C)
    block, _, first, count, tiles = _row(HW, per_row, N, BLOCK_P, blocks)
    size = (HW, W, out_channels)
    residual_strides = (residual_sn, residual_sc, residual_sh, residual_sw)
    gate_rest = (gate_h, gate_w, gate_scale_h, gate_scale_w, gate_sc, gate_sh, gate_sw)
    norm1 = (primary_bias_ptr, primary_mean_ptr, primary_var_ptr, primary_gamma_ptr, primary_beta_ptr, primary_eps)
    norm2 = (cheap_bias_ptr, cheap_mean_ptr, cheap_var_ptr, cheap_gamma_ptr, cheap_beta_ptr, cheap_eps)
    act1 = (primary_slope_ptr, primary_slope_stride, primary_negative_slope)
    act2 = (cheap_slope_ptr, cheap_slope_stride, cheap_negative_slope)
    if block < primary_blocks:
        c = block * BLOCK_C + tl.arange(0, BLOCK_C)
        _normalize_half(
            first, count, tiles, c, c, c < Cp, norm1, act1, size, out_ptr, residual_ptr, residual_strides,
            output_gate_ptr, gate_rest, gate_sn, NHWC, PRIMARY_ACT, BLOCK_P,
        )  # fmt: skip
    else:
        j = (block - primary_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
        _normalize_half(
            first, count, tiles, Cp + j, j, Cp + j < out_channels, norm2, act2, size, out_ptr, residual_ptr,
            residual_strides, output_gate_ptr, gate_rest, gate_sn, NHWC, CHEAP_ACT, BLOCK_P,
        )  # fmt: skip


@triton.jit
def _grad(grad, p, c, mask, size, gate, NHWC: tl.constexpr):
    """(gradient before the output gate, grad_output) at pixels p × output channels c of an image."""
    HW, W, out_channels = size
    g = tl.load(grad + _offset(p, c, HW, out_channels, NHWC), mask=mask, other=0.0).to(tl.float32)
    gated = g
    if gate[0] is not None:
        gated = g * _gate(p, c, mask, W, gate)
    return gated, g


@triton.jit
def cheap_backward_kernel(
    grad_ptr, y1_ptr, weight_ptr, output_gate_ptr,
    primary_bias_ptr, primary_mean_ptr, primary_var_ptr, primary_gamma_ptr, primary_beta_ptr, primary_slope_ptr,
    cheap_bias_ptr, cheap_mean_ptr, cheap_var_ptr, cheap_gamma_ptr, cheap_beta_ptr, cheap_slope_ptr,
    dz2_ptr, y2_ptr, product_ptr, partial_ptr,
    primary_eps, primary_negative_slope, cheap_eps, cheap_negative_slope, gate_scale_h, gate_scale_w,
    N, HW, W, Cp, new, out_channels, primary_slope_stride, cheap_slope_stride,
    gate_h, gate_w, gate_sn, gate_sc, gate_sh, gate_sw, per_row,
    NHWC: tl.constexpr, PRIMARY_ACT: tl.constexpr, CHEAP_ACT: tl.constexpr, RATIO: tl.constexpr, DW_SIZE: tl.constexpr,
    BATCH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dz2 and y2 (BATCH), or dy2; the sums of dz2, dz2 * x̂2 and dx2 * min(z2, 0); grad_output * the ungated output."""
    block, row, first, count, tiles = _row(HW, per_row, N, BLOCK_P, tl.cdiv(new, BLOCK_C))
    j = block * BLOCK_C + tl.arange(0, BLOCK_C)
    j_mask = j < new
    kept = j_mask & (Cp + j < out_channels)
    c = j // (RATIO - 1)
    norm1 = (primary_bias_ptr, primary_mean_ptr, primary_var_ptr, primary_gamma_ptr, primary_beta_ptr, primary_eps)
    norm2 = (cheap_bias_ptr, cheap_mean_ptr, cheap_var_ptr, cheap_gamma_ptr, cheap_beta_ptr, cheap_eps)
    act1 = (primary_slope_ptr, primary_slope_stride, primary_negative_slope)
    act2 = (cheap_slope_ptr, cheap_slope_stride, cheap_negative_slope)
    center1, rstd1 = _center_rstd(norm1, c, j_mask)
    scale1, shift1 = _scale_shift(norm1, rstd1, c, j_mask)
    center2, rstd2 = _center_rstd(norm2, j, j_mask)
    scale2, shift2 = _scale_shift(norm2, rstd2, j, j_mask)
    size = (HW, W, out_channels)
    dbeta = tl.zeros((BLOCK_C,), tl.float32)
    dgamma = tl.zeros((BLOCK_C,), tl.float32)
    dslope = tl.zeros((BLOCK_C,), tl.float32)
    for i in range(0, count):
        image, p = _tile(first + i, tiles, HW, BLOCK_P)
        y1 = y1_ptr + image * HW * Cp
        y2 = _depthwise(
            y1, weight_ptr, p, c, j, j_mask, HW, W, Cp, (center1, scale1, shift1), act1, NHWC, PRIMARY_ACT, DW_SIZE
        ).to(y1_ptr.dtype.element_ty)  # fmt: skip
        centered = y2.to(tl.float32) - center2[None, :]
        z = centered * scale2[None, :] + shift2[None, :]
        gate = (None, None, None, None, None, None, None, None)
        if output_gate_ptr is not None:
            gate_image = output_gate_ptr + image * gate_sn
            gate = (gate_image, gate_h, gate_w, gate_scale_h, gate_scale_w, gate_sc, gate_sh, gate_sw)
        kept_mask = (p < HW)[:, None] & kept[None, :]
        dx, g = _grad(grad_ptr + image * HW * out_channels, p, Cp + j, kept_mask, size, gate, NHWC)
        dz = _activate_backward(dx, z, j, j_mask, act2, CHEAP_ACT)
        if partial_ptr is not None:
            dbeta += tl.sum(dz, 0)
            dgamma += tl.sum(dz * centered, 0)
            dslope += tl.sum(dx * tl.minimum(z, 0.0), 0)
        mask = (p < HW)[:, None] & j_mask[None, :]
        at = image * HW * new + _offset(p, j, HW, new, NHWC)
        if BATCH:
            tl.store(y2_ptr + at, y2, mask=mask)
        else:
            dz *= scale2[None, :]
        tl.store(dz2_ptr + at, dz.to(dz2_ptr.dtype.element_ty), mask=mask)
        if product_ptr is not None:
            product = product_ptr + image * HW * out_channels
            x2 = _activate(z, j, j_mask, act2, CHEAP_ACT)
            at = _offset(p, Cp + j, HW, out_channels, NHWC)
            tl.store(product + at, (g * x2).to(product_ptr.dtype.element_ty), mask=kept_mask)
            # x1 once for each primary channel: by its first cheap channel
            c_mask = (p < HW)[:, None] & (j_mask & (j % (RATIO - 1) == 0))[None, :]
            y = tl.load(y1 + _offset(p, c, HW, Cp, NHWC), mask=c_mask, other=0.0).to(tl.float32)
            x1 = _activate((y - center1[None, :]) * scale1[None, :] + shift1[None, :], c, j_mask, act1, PRIMARY_ACT)
            at = _offset(p, c, HW, out_channels, NHWC)
            g = tl.load(grad_ptr + image * HW * out_channels + at, mask=c_mask, other=0.0).to(tl.float32)
            tl.store(product + at, (g * x1).to(product_ptr.dtype.element_ty), mask=c_mask)
    if partial_ptr is not None:
        at = partial_ptr + row * 3 * new + j
        tl.store(at, dbeta, mask=j_mask)
        tl.store(at + new, dgamma * rstd2, mask=j_mask)
        tl.store(at + 2 * new, dslope, mask=j_mask)


@triton.jit
def primary_backward_kernel(
    grad_ptr, y1_ptr, dz2_ptr, y2_ptr, means2_ptr, weight_ptr, output_gate_ptr,
    primary_bias_ptr, primary_mean_ptr, primary_var_ptr, primary_gamma_ptr, primary_beta_ptr, primary_slope_ptr,
    cheap_bias_ptr, cheap_mean_ptr, cheap_var_ptr, cheap_gamma_ptr, cheap_beta_ptr,
    dz1_ptr, partial_ptr, weight_partial_ptr,
    primary_eps, primary_negative_slope, cheap_eps, gate_scale_h, gate_scale_w,
    N, HW, W, Cp, new, out_channels, primary_slope_stride, gate_h, gate_w, gate_sn, gate_sc, gate_sh, gate_sw, per_row,
    NHWC: tl.constexpr, PRIMARY_ACT: tl.constexpr, RATIO: tl.constexpr, DW_SIZE: tl.constexpr,
    BATCH: tl.constexpr, WEIGHTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dz1 (BATCH) or dy1, its three sums, and the cheap weight's gradient, as far as there are pointers for them.

    WEIGHTS is a power of two that the cheap weights of one primary channel fit in.
    """
    PAD: tl.constexpr = DW_SIZE // 2
    block, row, first, count, tiles = _row(HW, per_row, N, BLOCK_P, tl.cdiv(Cp, BLOCK_C))
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < Cp
    norm1 = (primary_bias_ptr, primary_mean_ptr, primary_var_ptr, primary_gamma_ptr, primary_beta_ptr, primary_eps)
    norm2 = (cheap_bias_ptr, cheap_mean_ptr, cheap_var_ptr, cheap_gamma_ptr, cheap_beta_ptr, cheap_eps)
    act1 = (primary_slope_ptr, primary_slope_stride, primary_negative_slope)
    center1, rstd1 = _center_rstd(norm1, c, c_mask)
    scale1, shift1 = _scale_shift(norm1, rstd1, c, c_mask)
    size = (HW, W, out_channels)
    step = new if NHWC else 1
    dbeta = tl.zeros((BLOCK_C,), tl.float32)
    dgamma = tl.zeros((BLOCK_C,), tl.float32)
    dslope = tl.zeros((BLOCK_C,), tl.float32)
    dw = tl.zeros((WEIGHTS, BLOCK_C), tl.float32)
    for i in range(0, count):
        image, p = _tile(first + i, tiles, HW, BLOCK_P)
        column = p % W
        mask = (p < HW)[:, None] & c_mask[None, :]
        y1_at = image * HW * Cp + _offset(p, c, HW, Cp, NHWC)
        centered = tl.load(y1_ptr + y1_at, mask=mask, other=0.0).to(tl.float32) - center1[None, :]
        z = centered * scale1[None, :] + shift1[None, :]
        x1 = tl.where(mask, _activate(z, c, c_mask, act1, PRIMARY_ACT), 0.0)
        dx = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for r in tl.static_range(RATIO - 1):
            j = c * (RATIO - 1) + r
            center2, rstd2 = _center_rstd(norm2, j, c_mask)
            scale2, _ = _scale_shift(norm2, rstd2, j, c_mask)
            if BATCH:
                mean_dz = tl.load(means2_ptr + j, mask=c_mask, other=0.0)
                mean_dz_xhat = tl.load(means2_ptr + new + j, mask=c_mask, other=0.0)
            tile = image * HW * new + _offset(p, j, HW, new, NHWC)
            for tap in tl.static_range(DW_SIZE * DW_SIZE):
                # x1[p] went to y2[p - (dy, dx)] by this tap
                dy = tap // DW_SIZE - PAD
                dx_ = tap % DW_SIZE - PAD
                source = p - dy * W
                inside = (source >= 0) & (source < HW) & (column - dx_ >= 0) & (column - dx_ < W)
                inside_mask = mask & inside[:, None]
                at = tile - dy * W * step - dx_ * step
                dy2 = tl.load(dz2_ptr + at, mask=inside_mask, other=0.0).to(tl.float32)
                if BATCH:
                    y2 = tl.load(y2_ptr + at, mask=inside_mask, other=0.0).to(tl.float32)
                    xhat = (y2 - center2[None, :]) * rstd2[None, :]
                    dy2 = scale2[None, :] * (dy2 - mean_dz[None, :] - xhat * mean_dz_xhat[None, :])
                    dy2 = tl.where(inside_mask, dy2, 0.0)
                if dz1_ptr is not None:
                    at = j * (DW_SIZE * DW_SIZE) + tap
                    weight = tl.load(weight_ptr + at, mask=c_mask, other=0.0).to(tl.float32)
                    dx += dy2 * weight[None, :]
                if weight_partial_ptr is not None:
                    of_tap = tl.arange(0, WEIGHTS)[:, None] == r * (DW_SIZE * DW_SIZE) + tap
                    dw += tl.where(of_tap, tl.sum(dy2 * x1, 0)[None, :], 0.0)
        if dz1_ptr is not None:
            gate = (None, None, None, None, None, None, None, None)
            if output_gate_ptr is not None:
                gate_image = output_gate_ptr + image * gate_sn
                gate = (gate_image, gate_h, gate_w, gate_scale_h, gate_scale_w, gate_sc, gate_sh, gate_sw)
            direct, _ = _grad(grad_ptr + image * HW * out_channels, p, c, mask, size, gate, NHWC)
            dx += direct
            dz = _activate_backward(dx, z, c, c_mask, act1, PRIMARY_ACT)
            if partial_ptr is not None:
                dz = tl.where(mask, dz, 0.0)
                dbeta += tl.sum(dz, 0)
                dgamma += tl.sum(dz * centered, 0)
                dslope += tl.sum(tl.where(mask, dx * tl.minimum(z, 0.0), 0.0), 0)
            if not BATCH:
                dz *= scale1[None, :]
            tl.store(dz1_ptr + y1_at, dz.to(dz1_ptr.dtype.element_ty), mask=mask)
    if partial_ptr is not None:
        at = partial_ptr + row * 3 * Cp + c
        tl.store(at, dbeta, mask=c_mask)
        tl.store(at + Cp, dgamma * rstd1, mask=c_mask)
        tl.store(at + 2 * Cp, dslope, mask=c_mask)
    if weight_partial_ptr is not None:
        WEIGHTS_USED: tl.constexpr = (RATIO - 1) * DW_SIZE * DW_SIZE
        k = tl.arange(0, WEIGHTS)
        at = weight_partial_ptr + (row * WEIGHTS_USED + k)[:, None] * Cp + c[None, :]
        tl.store(at, dw, mask=(k < WEIGHTS_USED)[:, None] & c_mask[None, :])


@triton.jit
def normalize_backward_kernel(
    dz1_ptr, y1_ptr, means1_ptr, primary_bias_ptr, primary_mean_ptr, primary_var_ptr, primary_gamma_ptr,
    primary_beta_ptr, primary_eps, N, HW, Cp, per_row,
    NHWC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dz1 becomes dy1 = scale1 * (dz1 - its mean - x̂1 * the mean of dz1 * x̂1), in place."""
    block, _, first, count, tiles = _row(HW, per_row, N, BLOCK_P, tl.cdiv(Cp, BLOCK_C))
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < Cp
    norm = (primary_bias_ptr, primary_mean_ptr, primary_var_ptr, primary_gamma_ptr, primary_beta_ptr, primary_eps)
    center, rstd = _center_rstd(norm, c, c_mask)
    scale, _ = _scale_shift(norm, rstd, c, c_mask)
    mean_dz = tl.load(means1_ptr + c, mask=c_mask, other=0.0)
    mean_dz_xhat = tl.load(means1_ptr + Cp + c, mask=c_mask, other=0.0)
    for i in range(0, count):
        image, p = _tile(first + i, tiles, HW, BLOCK_P)
        at = image * HW * Cp + _offset(p, c, HW, Cp, NHWC)
        mask = (p < HW)[:, None] & c_mask[None, :]
        xhat = (tl.load(y1_ptr + at, mask=mask, other=0.0).to(tl.float32) - center[None, :]) * rstd[None, :]
        dz = tl.load(dz1_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dy = scale[None, :] * (dz - mean_dz[None, :] - xhat * mean_dz_xhat[None, :])
        tl.store(dz1_ptr + at, dy.to(dz1_ptr.dtype.element_ty), mask=mask)
