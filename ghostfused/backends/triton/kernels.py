"""The Triton kernels: the whole Ghost module in one launch, or in two for comparison. Device code only.

A program owns one image, a run of consecutive pixels and WIDTH init channels. It goes in two steps.

``_primary``: x1 = act(norm(conv of x)) for the run *and its halo*, the pixels that the depthwise conv
reaches from the run, stored to global memory. The conv is 1×1, or in window.py any other.
After a barrier, x2 = act(norm(depthwise conv of x1)) for the run: in channels_last by ``_cheap_patches`` (patches.py), whose
runs are whole rows, otherwise by ``_cheap``, from shifted loads of x1.

So x1 makes a round trip through the output, of which it is the first half; the loads hit L1 or L2. Halo pixels
belong to a neighbour's run and are stored by the neighbour as well. That race is benign: a pixel's value does not
depend on its place in a tile (the sum over input channels has one order), so both store the same bits, and each
program reads only what it stored itself before its own barrier. Within a program the barrier orders the accesses:
``bar.sync`` makes a block's writes visible to the block (PTX ISA, "Parallel synchronization: barrier"), and on AMD
Triton emits a workgroup fence on either side of ``s_barrier``. With a gate or a residual the output's first half is no
longer x1, which then goes to a scratch buffer; or nowhere, if there are no ghosts to make of it.

Channels are constants: a module has one number of each, and offsets become immediates. Sizes of maps are not.
"""

# device code, of which mypy knows nothing
# mypy: ignore-errors

import triton
import triton.language as tl

from .device import _dot, _multiple, _norm_affine, _offset, _pixel_offset, _round, _scale_shift, _store, _wide
from .patches import _cheap_patches
from .window import _window_sums


@triton.jit
def _primary(
    lo, hi, begin, end, c0, c1, x, x_size, x_pixels, input_gate, weight_ptr, Cin, norm, act, size, x1, out, residual, gate,
    NHWC: tl.constexpr, ACT: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
    TAPS_FIRST: tl.constexpr, PRECISION: tl.constexpr, ONE_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x1 for the pixels lo … hi and the channels c0 … c1, BLOCK_N at most; the final output too for begin … end if they differ."""
    HW, W, out_channels = size
    x1_ptr, x1_channels = x1
    stride_h, stride_w = x_pixels
    c = c0 + tl.arange(0, BLOCK_N)
    c_mask = c < c1
    scale, shift = _scale_shift(norm, c, c_mask)
    for m in range(lo, hi, BLOCK_M):
        p = m + tl.arange(0, BLOCK_M)
        p_mask = p < hi
        if KERNEL > 1 or STRIDE > 1:
            acc = _window_sums(
                p, p_mask, c, c_mask, W, x, x_size, x_pixels, input_gate, weight_ptr, Cin,
                KERNEL, STRIDE, DILATION, TAPS_FIRST, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            x_pixel = _pixel_offset(p, W, stride_h, stride_w)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            # the weight is read transposed: (input channels, init channels)
            weight_row = weight_ptr + (c * Cin)[None, :]
            if ONE_K:  # no inner loop, so that the compiler can prefetch the next tile of x in this one
                acc = _dot(
                    acc, x, x_pixel, p_mask, weight_row, c_mask, tl.arange(0, BLOCK_K), Cin, input_gate, PRECISION
                )  # fmt: skip
            else:
                for k0 in range(0, Cin, BLOCK_K):
                    k = k0 + tl.arange(0, BLOCK_K)
                    acc = _dot(acc, x, x_pixel, p_mask, weight_row, c_mask, k, Cin, input_gate, PRECISION)
        y = _norm_affine(acc, scale, shift, c, c_mask, act, ACT)
        mask = p_mask[:, None] & c_mask[None, :]
        if x1_ptr is not None:
            tl.store(x1_ptr + _offset(p, c, HW, x1_channels, NHWC), _round(y, x1_ptr.dtype.element_ty), mask=mask)
        if residual[0] is not None or gate[0] is not None:
            mask &= ((p >= begin) & (p < end))[:, None]
            at = _offset(p, c, HW, out_channels, NHWC)
            _store(y, p[:, None], c[None, :], out + at, at, mask, W, residual, gate)


@triton.jit
def _cheap(
    begin, end, c0, weight_ptr, Cp, norm, act, size, x1, out, residual, gate,
    NHWC: tl.constexpr, ACT: tl.constexpr, RATIO: tl.constexpr, DW_SIZE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x2 for the pixels begin … end and all maps made from BLOCK_C init channels from c0."""
    HW, W, out_channels = size
    x1_ptr, x1_channels = x1
    PAD: tl.constexpr = DW_SIZE // 2
    c = c0 + tl.arange(0, BLOCK_C)
    for r in tl.static_range(RATIO - 1):
        j = c * (RATIO - 1) + r  # the depthwise conv's output channel
        c_mask = (c < Cp) & (Cp + j < out_channels)
        scale, shift = _scale_shift(norm, j, c_mask)
        weights = ()  # stay in registers over the run
        for tap in tl.static_range(DW_SIZE * DW_SIZE):
            weight = tl.load(weight_ptr + j * (DW_SIZE * DW_SIZE) + tap, mask=c_mask, other=0.0)
            weights = weights + (weight.to(tl.float32),)  # noqa: RUF005 (Triton has no unpacking)
        for q in range(begin, end, BLOCK_P):
            p = q + tl.arange(0, BLOCK_P)
            column = p % W
            x1_tile = x1_ptr + _offset(p, c, HW, x1_channels, NHWC)
            acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
            for tap in tl.static_range(DW_SIZE * DW_SIZE):
                dy = tap // DW_SIZE - PAD
                dx = tap % DW_SIZE - PAD
                row = p + dy * W
                # zero outside the image, for the padding comes after norm and activation
                inside = (p < end) & (row >= 0) & (row < HW) & (column + dx >= 0) & (column + dx < W)
                step = x1_channels if NHWC else 1
                tile = tl.load(x1_tile + dy * W * step + dx * step, mask=inside[:, None] & c_mask[None, :], other=0.0)
                acc += tile.to(tl.float32) * weights[tap][None, :]
            y = _norm_affine(acc, scale, shift, j, c_mask, act, ACT)
            at = _offset(p, Cp + j, HW, out_channels, NHWC)
            _store(
                y, p[:, None], (Cp + j)[None, :], out + at, at, (p < end)[:, None] & c_mask[None, :], W, residual, gate
            )


SCALARS = """
primary_eps primary_negative_slope primary_slope_stride cheap_eps cheap_negative_slope cheap_slope_stride
gate_scale_h gate_scale_w H W x_h x_w run x_sn x_sc x_sh x_sw
residual_sn residual_sc residual_sh residual_sw gate_h gate_w gate_sn gate_sc gate_sh gate_sw
""".split()  # noqa: SIM905


# Triton would compile a variant for each scalar that is 1 or a multiple of 16. The *_ALIGN constants say more in fewer.
@triton.jit(do_not_specialize=SCALARS)
def ghost_kernel(
    x_ptr, primary_weight_ptr, primary_bias_ptr, primary_mean_ptr, primary_var_ptr, primary_gamma_ptr, primary_beta_ptr,
    primary_slope_ptr, cheap_weight_ptr, cheap_bias_ptr, cheap_mean_ptr, cheap_var_ptr, cheap_gamma_ptr, cheap_beta_ptr,
    cheap_slope_ptr, input_gate_ptr, residual_ptr, output_gate_ptr, x1_ptr, out_ptr,
    primary_eps, primary_negative_slope, primary_slope_stride, cheap_eps, cheap_negative_slope, cheap_slope_stride,
    gate_scale_h, gate_scale_w, H, W, x_h, x_w, run, x_sn, x_sc, x_sh, x_sw,
    residual_sn, residual_sc, residual_sh, residual_sw, gate_h, gate_w, gate_sn, gate_sc, gate_sh, gate_sw,
    Cin: tl.constexpr, Cp: tl.constexpr, out_channels: tl.constexpr,
    PRIMARY: tl.constexpr, CHEAP: tl.constexpr, RATIO: tl.constexpr, DW_SIZE: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, TAPS_FIRST: tl.constexpr,
    PRIMARY_ACT: tl.constexpr, CHEAP_ACT: tl.constexpr,
    NHWC: tl.constexpr, X_UNIT: tl.constexpr, X_FLAT: tl.constexpr, RESIDUAL_LIKE_OUT: tl.constexpr,
    X_ALIGN: tl.constexpr, HW_ALIGN: tl.constexpr, INDEX_64: tl.constexpr, PRECISION: tl.constexpr, ONE_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    WIDTH: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, VECTOR: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A Ghost module (PRIMARY and CHEAP), or one of its two steps."""
    if INDEX_64:
        # whatever is multiplied by one of these becomes 64 bits wide
        H, W = _wide(H), _wide(W)
        x_sc, x_sh, x_sw = _wide(x_sc), _wide(x_sh), _wide(x_sw)
        residual_sc, residual_sh, residual_sw = _wide(residual_sc), _wide(residual_sh), _wide(residual_sw)
        gate_sc, gate_sh, gate_sw = _wide(gate_sc), _wide(gate_sh), _wide(gate_sw)
    x_sn, x_sh = _multiple(x_sn, X_ALIGN), _multiple(x_sh, X_ALIGN)
    if X_UNIT == "c":
        x_sc = 1
        x_sw = _multiple(x_sw, X_ALIGN)
    elif X_UNIT == "w":
        x_sw = 1
        x_sc = _multiple(x_sc, X_ALIGN)
    HW = _multiple(H * W, HW_ALIGN)

    # Channel blocks fastest: the programs that read the same pixels of x run together and meet in L2.
    blocks, runs = tl.cdiv(Cp, WIDTH), tl.cdiv(HW, run)
    c0 = tl.program_id(0) % blocks * WIDTH
    c1 = tl.minimum(c0 + WIDTH, Cp)
    if INDEX_64:
        c0, c1 = _wide(c0), _wide(c1)
    unit = tl.program_id(0) // blocks
    image = (unit // runs).to(tl.int64)
    begin = unit % runs * run
    if PATCH_H is None:
        end = tl.multiple_of(tl.minimum(begin + run, HW), HW_ALIGN)
    else:  # whole rows, and the last run moves back
        begin = tl.minimum(begin, HW - run)
        end = begin + run

    x1_channels = out_channels  # x1 is the output's first half, unless something is still to be done to that
    if residual_ptr is not None or output_gate_ptr is not None:
        x1_channels = Cp
    size = (HW, W, out_channels)
    x1 = (None, x1_channels)
    if x1_ptr is not None:
        x1 = (x1_ptr + image * HW * x1_channels, x1_channels)
    out = out_ptr + image * HW * out_channels
    residual = (None, None, None, None)
    if residual_ptr is not None:
        residual = (residual_ptr + image * residual_sn, None, None, None)
        if not RESIDUAL_LIKE_OUT:
            residual = (residual_ptr + image * residual_sn, residual_sc, residual_sh, residual_sw)
    gate = (None, None, None, None, None, None, None, None)
    if output_gate_ptr is not None:
        gate_ptr = output_gate_ptr + image * gate_sn
        gate = (gate_ptr, gate_h, gate_w, gate_scale_h, gate_scale_w, gate_sc, gate_sh, gate_sw)

    if PRIMARY:
        input_gate = None
        if input_gate_ptr is not None:
            input_gate = input_gate_ptr + image * Cin
        x_pixels = (x_sh, x_sw)
        if X_FLAT and KERNEL == 1 and STRIDE == 1:
            x_pixels = (None, x_sw)
        if PATCH_H is None:
            halo = DW_SIZE // 2 * (W + 1) if CHEAP else 0
            lo = tl.multiple_of(tl.maximum(begin - halo, 0) // 16 * 16, 16)  # wide accesses start at multiples of 16
            hi = tl.multiple_of(tl.minimum((end + halo + 15) // 16 * 16, HW), HW_ALIGN)
        else:
            halo = DW_SIZE // 2 * W if CHEAP else 0
            lo = tl.maximum(begin - halo, 0)
            hi = tl.minimum(end + halo, HW)
        _primary(
            lo, hi, begin, end, c0, c1, (x_ptr + image * x_sn, x_sc), (x_h, x_w), x_pixels, input_gate,
            primary_weight_ptr, Cin,
            (primary_bias_ptr, primary_mean_ptr, primary_var_ptr, primary_gamma_ptr, primary_beta_ptr, primary_eps),
            (primary_slope_ptr, primary_slope_stride, primary_negative_slope), size, x1, out, residual, gate,
            NHWC, PRIMARY_ACT, KERNEL, STRIDE, DILATION, TAPS_FIRST, PRECISION, ONE_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if PRIMARY and CHEAP:
        tl.debug_barrier()
    if CHEAP:
        norm = (cheap_bias_ptr, cheap_mean_ptr, cheap_var_ptr, cheap_gamma_ptr, cheap_beta_ptr, cheap_eps)
        act = (cheap_slope_ptr, cheap_slope_stride, cheap_negative_slope)
        if PATCH_H is not None:
            _cheap_patches(
                begin // W, end // W, c0, c1, cheap_weight_ptr, Cp, norm, act, size, x1, out,
                residual, gate, CHEAP_ACT, RATIO, DW_SIZE, WIDTH, PATCH_H, PATCH_W, VECTOR, LANES,
            )  # fmt: skip
        elif BLOCK_C == BLOCK_N:
            _cheap(
                begin, end, c0, cheap_weight_ptr, Cp, norm, act, size, x1, out, residual, gate,
                NHWC, CHEAP_ACT, RATIO, DW_SIZE, BLOCK_P, BLOCK_C,
            )  # fmt: skip
        else:
            for c in range(c0, c1, BLOCK_C):
                _cheap(
                    begin, end, c, cheap_weight_ptr, Cp, norm, act, size, x1, out, residual, gate,
                    NHWC, CHEAP_ACT, RATIO, DW_SIZE, BLOCK_P, BLOCK_C,
                )  # fmt: skip
