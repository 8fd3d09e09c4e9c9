"""The Triton kernels of training, backward: docs/training.md has their formulas, ``training_step.TrainingKernels`` their contract.

Device code only; triton_training_device.py says what a program does. Rows of partial sums are added up by Torch.
"""

# device code, of which mypy knows nothing
# mypy: ignore-errors

import triton
import triton.language as tl

from .activations import _activate, _activate_backward
from .device import _gate, _offset, _round, _sum_products
from .training_device import _center_rstd, _depthwise, _row, _scale_shift, _tile


@triton.jit
def _grad(grad, p, c, mask, size, gate, NHWC: tl.constexpr):
    """(gradient before the output gate, grad_output) at pixels p × output channels c of an image."""
    HW, W, out_channels = size
    g = tl.load(grad + _offset(p, c, HW, out_channels, NHWC), mask=mask, other=0.0).to(tl.float32)
    gated = g
    if gate[0] is not None:
        gated = g * _gate(p[:, None], c[None, :], mask, W, gate)
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
        )  # fmt: skip
        centered = y2.to(tl.float32) - center2[None, :]
        z = centered * scale2[None, :] + shift2[None, :]
        gate = (None, None, None, None, None, None, None, None)
        if output_gate_ptr is not None:
            gate_image = output_gate_ptr + image * gate_sn
            gate = (gate_image, gate_h, gate_w, gate_scale_h, gate_scale_w, gate_sc, gate_sh, gate_sw)
        kept_mask = (p < HW)[:, None] & kept[None, :]
        dx, g = _grad(grad_ptr + image * HW * out_channels, p, Cp + j, kept_mask, size, gate, NHWC)
        dz = _activate_backward(dx, z, j, j_mask, act2, CHEAP_ACT)
        mask = (p < HW)[:, None] & j_mask[None, :]
        if partial_ptr is not None:
            dbeta += tl.sum(tl.where(mask, dz, 0.0), 0)
            dgamma += _sum_products(dz, centered, mask, 0)
            dslope += _sum_products(dx, tl.minimum(z, 0.0), mask, 0)
        at = image * HW * new + _offset(p, j, HW, new, NHWC)
        if BATCH:
            tl.store(y2_ptr + at, y2, mask=mask)
        else:
            dz *= scale2[None, :]
        tl.store(dz2_ptr + at, _round(dz, dz2_ptr.dtype.element_ty), mask=mask)
        if product_ptr is not None:
            product = product_ptr + image * HW * out_channels
            x2 = _activate(z, j, j_mask, act2, CHEAP_ACT)
            at = _offset(p, Cp + j, HW, out_channels, NHWC)
            tl.store(product + at, _round(g * x2, product_ptr.dtype.element_ty), mask=kept_mask)
            # x1 once for each primary channel: by its first cheap channel
            c_mask = (p < HW)[:, None] & (j_mask & (j % (RATIO - 1) == 0))[None, :]
            y = tl.load(y1 + _offset(p, c, HW, Cp, NHWC), mask=c_mask, other=0.0).to(tl.float32)
            x1 = _activate((y - center1[None, :]) * scale1[None, :] + shift1[None, :], c, j_mask, act1, PRIMARY_ACT)
            at = _offset(p, c, HW, out_channels, NHWC)
            g = tl.load(grad_ptr + image * HW * out_channels + at, mask=c_mask, other=0.0).to(tl.float32)
            tl.store(product + at, _round(g * x1, product_ptr.dtype.element_ty), mask=c_mask)
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
                    dw += tl.where(of_tap, _sum_products(dy2, x1, inside_mask, 0)[None, :], 0.0)
        if dz1_ptr is not None:
            gate = (None, None, None, None, None, None, None, None)
            if output_gate_ptr is not None:
                gate_image = output_gate_ptr + image * gate_sn
                gate = (gate_image, gate_h, gate_w, gate_scale_h, gate_scale_w, gate_sc, gate_sh, gate_sw)
            direct, _ = _grad(grad_ptr + image * HW * out_channels, p, c, mask, size, gate, NHWC)
            dx += direct
            dz = _activate_backward(dx, z, c, c_mask, act1, PRIMARY_ACT)
            if partial_ptr is not None:
                dbeta += tl.sum(tl.where(mask, dz, 0.0), 0)
                dgamma += _sum_products(dz, centered, mask, 0)
                dslope += _sum_products(dx, tl.minimum(z, 0.0), mask, 0)
            if not BATCH:
                dz *= scale1[None, :]
            tl.store(dz1_ptr + y1_at, _round(dz, dz1_ptr.dtype.element_ty), mask=mask)
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
        tl.store(dz1_ptr + at, _round(dy, dz1_ptr.dtype.element_ty), mask=mask)
