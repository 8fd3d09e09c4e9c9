"""The Triton kernels of training, forward: docs/training.md has their formulas, ``training_step.TrainingKernels`` their contract.

Device code only; triton_training_device.py says what a program does. Rows of statistics are combined by the program that is
last of its channel block.
"""

# device code, of which mypy knows nothing
# mypy: ignore-errors

import triton
import triton.language as tl

from .activations import _activate
from .device import _dot, _offset, _pixel_offset, _round, _store, _sum_products
from .training_device import _center_rstd, _depthwise, _row, _scale_shift, _tile


@triton.jit
def _gather_statistics(y, mask, n, tile_n, shift, s, q):
    """Sums over a tile y (pixels, channels): of ones, y - shift and its square; the shift is the first tile's mean."""
    if n == 0.0:
        shift = tl.sum(tl.where(mask, y, 0.0), 0) / tile_n
    d = tl.where(mask, y - shift[None, :], 0.0)
    return n + tile_n, shift, s + tl.sum(d, 0), q + _sum_products(d, d, mask, 0)


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
        s += _sum_products(n, means - shift[None, :], n > 0.0, 0)
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
    m2 = q - s * s / n
    tl.store(at + 2 * C, tl.where(m2 < 0.0, 0.0, m2), mask=mask)  # NaN stays NaN, of which maximum would make 0
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
        y = _round(acc, out_ptr.dtype.element_ty)
        tl.store(out_ptr + image * HW * out_channels + _offset(p, c, HW, out_channels, NHWC), y, mask=mask)
        tile_n = tl.sum(p_mask.to(tl.float32), 0)
        n, shift, s, q = _gather_statistics(y.to(tl.float32), mask, n, tile_n, shift, s, q)
    _finish_statistics(
        n, shift, s, q, block, row, rows, c, c_mask, Cp, partial_ptr, counter_ptr, mean_ptr, var_ptr
    )  # fmt: skip


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
        )  # fmt: skip
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
    HW, W, out_channels = size
    center, rstd = _center_rstd(norm, channel, c_mask)
    scale, shift = _scale_shift(norm, rstd, channel, c_mask)
    residual_sn, residual_sc, residual_sh, residual_sw = residual_strides
    for i in range(0, count):
        image, p = _tile(first + i, tiles, HW, BLOCK_P)
        out = out_ptr + image * HW * out_channels
        mask = (p < HW)[:, None] & c_mask[None, :]
        at = _offset(p, c, HW, out_channels, NHWC)
        y = tl.load(out + at, mask=mask, other=0.0).to(tl.float32)
        y = _activate((y - center[None, :]) * scale[None, :] + shift[None, :], channel, c_mask, act, ACT)
        residual = (None, None, None, None)
        if residual_ptr is not None:
            residual = (residual_ptr + image * residual_sn, residual_sc, residual_sh, residual_sw)
        gate = (None, None, None, None, None, None, None, None)
        if gate_ptr is not None:
            gate_h, gate_w, scale_h, scale_w, gate_sc, gate_sh, gate_sw = gate_rest
            gate = (gate_ptr + image * gate_sn, gate_h, gate_w, scale_h, scale_w, gate_sc, gate_sh, gate_sw)
        _store(y, p[:, None], c[None, :], out + at, at, mask, W, residual, gate)


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
