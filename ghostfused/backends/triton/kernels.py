"""The Triton kernels: the whole Ghost module in one launch, or in two for comparison. Device code only.

A program owns one image, a run of consecutive pixels and a block of init channels. It goes in two steps.

``_primary_run``: x1 = act(norm(1×1 conv of x)) for the run *and its halo*, the pixels that the depthwise conv
reaches from the run, stored to global memory.
``_cheap_run``: after a barrier, x2 = act(norm(depthwise conv of x1)) for the run, from shifted loads of x1.

So x1 makes a round trip through the output, of which it is the first half; the loads hit L1 or L2. Halo pixels
belong to a neighbour's run and are stored by the neighbour as well. That race is benign: a pixel's value does not
depend on its place in a tile (the sum over input channels has one order), so both store the same bits, and each
program reads only what it stored itself before its own barrier. Within a program the barrier orders the accesses:
``bar.sync`` makes a block's writes visible to the block (PTX ISA, "Parallel synchronization: barrier"), and on AMD
Triton emits a workgroup fence on either side of ``s_barrier``. With a gate or a residual the output's first half is no
longer x1, which then goes to a scratch buffer; or nowhere, if there are no ghosts to make of it.

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
    y = tl.rsqrt(x)
    return y + y * (0.5 - 0.5 * x * y * y)  # Newton: the hardware's rsqrt is off by an ulp or two


@triton.jit
def _scale_shift(norm, channel, mask):
    """(scale, shift) with norm(y + bias) = y * scale + shift, from the raw parameters: nothing cached, nothing stale."""
    bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps = norm
    scale = tl.full(channel.shape, 1.0, tl.float32)
    shift = tl.zeros(channel.shape, tl.float32)
    if mean_ptr is not None:
        var = tl.load(var_ptr + channel, mask=mask, other=1.0).to(tl.float32) + eps
        scale = _rsqrt(var)
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
    """The output gate at pixels p × channels c."""
    gate_ptr, gate_h, gate_w, scale_h, scale_w, gate_sc, gate_sh, gate_sw = gate
    # the index rule of F.interpolate(mode="nearest"), in float32 as there
    h = tl.minimum(((p // W).to(tl.float32) * scale_h).to(tl.int32), gate_h - 1)
    w = tl.minimum(((p % W).to(tl.float32) * scale_w).to(tl.int32), gate_w - 1)
    at = (h.to(p.dtype) * gate_sh + w.to(p.dtype) * gate_sw)[:, None] + (c * gate_sc)[None, :]
    return tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)


# Arguments that belong together travel as tuples: norm, act, size, x1, residual and gate are packed in ghost_kernel.
@triton.jit
def _store(y, p, c, mask, size, out, residual, gate, NHWC: tl.constexpr):
    """out = y * upsample(gate) + residual for a tile y (pixels, channels)."""
    HW, W, out_channels = size
    offset = _offset(p, c, HW, out_channels, NHWC)
    if gate[0] is not None:
        y *= _gate(p, c, mask, W, gate)
    residual_ptr, residual_sc, residual_sh, residual_sw = residual
    if residual_ptr is not None:
        if residual_sc is None:  # of the output's strides
            at = offset
        else:
            at = _pixel_offset(p, W, residual_sh, residual_sw)[:, None] + (c * residual_sc)[None, :]
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + offset, _round(y, out.dtype.element_ty), mask=mask)


@triton.jit
def _dot(acc, x, x_pixel, p_mask, weight_row, c_mask, k, Cin, input_gate, PRECISION: tl.constexpr):
    """acc + (x * input_gate) @ weight over the input channels k."""
    x_ptr, stride_c = x
    k_mask = k < Cin
    x_tile = x_ptr + x_pixel[:, None] + (k * stride_c)[None, :]
    tile = tl.load(x_tile, mask=p_mask[:, None] & k_mask[None, :], other=0.0)
    weight = tl.load(weight_row + k[:, None], mask=k_mask[:, None] & c_mask[None, :], other=0.0)
    if input_gate is not None:  # into the weight and rounded, as training's backward has it: both see the same sums
        scale = tl.load(input_gate + k, mask=k_mask, other=0.0).to(tl.float32)
        weight = _round(weight.to(tl.float32) * scale[:, None], weight.dtype)
    if INTERPRETED:  # whose tl.dot takes bfloat16's bits for integers
        tile, weight = tile.to(tl.float32), weight.to(tl.float32)
    return tl.dot(tile, weight, acc, input_precision=PRECISION)


@triton.jit
def _primary_run(
    lo, hi, begin, end, c0, x, x_pixels, input_gate, weight_ptr, Cin, Cp, norm, act, size, x1, out, residual, gate,
    NHWC: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr, ONE_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x1 for the pixels lo … hi and BLOCK_N channels from c0; the final output too for begin … end if they differ."""
    HW, W, _ = size
    x1_ptr, x1_channels = x1
    stride_h, stride_w = x_pixels
    c = c0 + tl.arange(0, BLOCK_N)
    c_mask = c < Cp
    scale, shift = _scale_shift(norm, c, c_mask)
    for m in range(lo, hi, BLOCK_M):
        p = m + tl.arange(0, BLOCK_M)
        p_mask = p < hi
        x_pixel = _pixel_offset(p, W, stride_h, stride_w)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        # the weight is read transposed: (input channels, init channels)
        weight_row = weight_ptr + (c * Cin)[None, :]
        if ONE_K:  # no inner loop, so that the compiler can prefetch the next tile of x in this one
            acc = _dot(acc, x, x_pixel, p_mask, weight_row, c_mask, tl.arange(0, BLOCK_K), Cin, input_gate, PRECISION)
        else:
            for k0 in range(0, Cin, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                acc = _dot(acc, x, x_pixel, p_mask, weight_row, c_mask, k, Cin, input_gate, PRECISION)
        y = _activate(acc * scale[None, :] + shift[None, :], c, c_mask, act, ACT)
        mask = p_mask[:, None] & c_mask[None, :]
        if x1_ptr is not None:
            tl.store(x1_ptr + _offset(p, c, HW, x1_channels, NHWC), _round(y, x1_ptr.dtype.element_ty), mask=mask)
        if residual[0] is not None or gate[0] is not None:
            own = (p >= begin) & (p < end)
            _store(y, p, c, own[:, None] & c_mask[None, :], size, out, residual, gate, NHWC)


@triton.jit
def _cheap_run(
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
            y = _activate(acc * scale[None, :] + shift[None, :], j, c_mask, act, ACT)
            _store(y, p, Cp + j, (p < end)[:, None] & c_mask[None, :], size, out, residual, gate, NHWC)


SCALARS = """
primary_eps primary_negative_slope primary_slope_stride cheap_eps cheap_negative_slope cheap_slope_stride
gate_scale_h gate_scale_w H W Cin Cp out_channels run x_sn x_sc x_sh x_sw
residual_sn residual_sc residual_sh residual_sw gate_h gate_w gate_sn gate_sc gate_sh gate_sw
""".split()  # noqa: SIM905


# Triton would compile a variant for each scalar that is 1 or a multiple of 16. The *_ALIGN constants say more in fewer.
@triton.jit(do_not_specialize=SCALARS)
def ghost_kernel(
    x_ptr, primary_weight_ptr, primary_bias_ptr, primary_mean_ptr, primary_var_ptr, primary_gamma_ptr, primary_beta_ptr,
    primary_slope_ptr, cheap_weight_ptr, cheap_bias_ptr, cheap_mean_ptr, cheap_var_ptr, cheap_gamma_ptr, cheap_beta_ptr,
    cheap_slope_ptr, input_gate_ptr, residual_ptr, output_gate_ptr, x1_ptr, out_ptr,
    primary_eps, primary_negative_slope, primary_slope_stride, cheap_eps, cheap_negative_slope, cheap_slope_stride,
    gate_scale_h, gate_scale_w, H, W, Cin, Cp, out_channels, run, x_sn, x_sc, x_sh, x_sw,
    residual_sn, residual_sc, residual_sh, residual_sw, gate_h, gate_w, gate_sn, gate_sc, gate_sh, gate_sw,
    PRIMARY: tl.constexpr, CHEAP: tl.constexpr, RATIO: tl.constexpr, DW_SIZE: tl.constexpr,
    PRIMARY_ACT: tl.constexpr, CHEAP_ACT: tl.constexpr,
    NHWC: tl.constexpr, X_UNIT: tl.constexpr, X_FLAT: tl.constexpr, RESIDUAL_LIKE_OUT: tl.constexpr,
    X_ALIGN: tl.constexpr, CIN_ALIGN: tl.constexpr, CP_ALIGN: tl.constexpr, OUT_ALIGN: tl.constexpr,
    HW_ALIGN: tl.constexpr, INDEX_64: tl.constexpr, PRECISION: tl.constexpr, ONE_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A Ghost module (PRIMARY and CHEAP), or one of its two steps."""
    if INDEX_64:
        # whatever is multiplied by one of these becomes 64 bits wide
        H, W, Cin, Cp, out_channels = _wide(H), _wide(W), _wide(Cin), _wide(Cp), _wide(out_channels)
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
    Cin, Cp = _multiple(Cin, CIN_ALIGN), _multiple(Cp, CP_ALIGN)
    out_channels, HW = _multiple(out_channels, OUT_ALIGN), _multiple(H * W, HW_ALIGN)

    # Channel blocks fastest: the programs that read the same pixels of x run together and meet in L2.
    blocks, runs = tl.cdiv(Cp, BLOCK_N), tl.cdiv(HW, run)
    c0 = tl.program_id(0) % blocks * BLOCK_N
    unit = tl.program_id(0) // blocks
    image = (unit // runs).to(tl.int64)
    begin = unit % runs * run
    end = tl.multiple_of(tl.minimum(begin + run, HW), HW_ALIGN)

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
        if X_FLAT:
            x_pixels = (None, x_sw)
        halo = DW_SIZE // 2 * (W + 1) if CHEAP else 0
        lo = tl.multiple_of(tl.maximum(begin - halo, 0) // 16 * 16, 16)  # wide accesses start at multiples of 16
        hi = tl.multiple_of(tl.minimum((end + halo + 15) // 16 * 16, HW), HW_ALIGN)
        _primary_run(
            lo, hi, begin, end, c0, (x_ptr + image * x_sn, x_sc), x_pixels, input_gate, primary_weight_ptr, Cin, Cp,
            (primary_bias_ptr, primary_mean_ptr, primary_var_ptr, primary_gamma_ptr, primary_beta_ptr, primary_eps),
            (primary_slope_ptr, primary_slope_stride, primary_negative_slope), size, x1, out, residual, gate,
            NHWC, PRIMARY_ACT, PRECISION, ONE_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if PRIMARY and CHEAP:
        tl.debug_barrier()
    if CHEAP:
        norm = (cheap_bias_ptr, cheap_mean_ptr, cheap_var_ptr, cheap_gamma_ptr, cheap_beta_ptr, cheap_eps)
        act = (cheap_slope_ptr, cheap_slope_stride, cheap_negative_slope)
        if BLOCK_C == BLOCK_N:
            _cheap_run(
                begin, end, c0, cheap_weight_ptr, Cp, norm, act, size, x1, out, residual, gate,
                NHWC, CHEAP_ACT, RATIO, DW_SIZE, BLOCK_P, BLOCK_C,
            )  # fmt: skip
        else:
            for c1 in range(c0, tl.minimum(c0 + BLOCK_N, Cp), BLOCK_C):
                _cheap_run(
                    begin, end, c1, cheap_weight_ptr, Cp, norm, act, size, x1, out, residual, gate,
                    NHWC, CHEAP_ACT, RATIO, DW_SIZE, BLOCK_P, BLOCK_C,
                )  # fmt: skip
