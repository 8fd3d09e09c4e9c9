"""The planted faults. ``old`` must occur once in ``file``: code that moves breaks this table, so it can't rot unseen."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    file: str
    """In csrc/."""
    old: str
    new: str
    kernels: tuple[str, ...]
    """That are built and run with the fault; ``subset.SHAPES`` has the cases of each."""
    order: str = "asc"
    """The order of threads (SHIM_ORDER) that is tried first; a race may show in one only."""


NCHW, NHWC, ANY, FP32 = "float16_dw3_nchw", "float16_dw3_nhwc", "float16_any_nchw", "float32_dw3_nchw"

NHWC_RELU, NHWC_ANY = ("float16_nhwc_dw3_relu",), ("float16_nhwc_dw3_any",)
DEPTHWISE, PLANES = "float16_depthwise_w3_s2_nhwc", "float16_depthwise_w5_s2_nchw"
SQUEEZE_EXCITE = ("float16_squeeze_nhwc",)
TRAINING = ("float32_training_dw3_nchw",)

MUTANTS = [
    # the channels_last kernel
    Mutant(
        "channels_last: no barrier between the padding and the 1×1 conv",
        "cuda/ghost/nhwc/primary.cuh",
        "  __syncthreads();  // weights, scales and padding are there\n",
        "",
        NHWC_RELU,
        "desc",
    ),
    Mutant(
        "channels_last: no barrier before the cheap conv",
        "cuda/ghost/nhwc/forward.cuh",
        "  __syncthreads();  // x1 is complete\n",
        "",
        NHWC_RELU,
    ),
    Mutant(
        "channels_last: the halo starts a row late",
        "cuda/ghost/nhwc/load.cuh",
        "t.top = max(t.h0 - kPad, 0);",
        "t.top = max(t.h0 - kPad + 1, 0);",
        NHWC_RELU,
    ),
    Mutant(
        "channels_last: the halo ends a row early",
        "cuda/ghost/nhwc/load.cuh",
        "min(t.h0 + plan.tile_h + kPad, s.height) - t.top;",
        "min(t.h0 + plan.tile_h, s.height) - t.top;",
        NHWC_RELU,
    ),
    Mutant(
        "channels_last: the columns around the image are not cleared",
        "cuda/ghost/nhwc/load.cuh",
        "(inside ? kPad * pixel : per_row - kPad * pixel)",
        "(inside ? -kPad * pixel : per_row - kPad * pixel)",
        NHWC_RELU,
    ),
    Mutant(
        "channels_last: the rows around the image are not cleared",
        "cuda/ghost/nhwc/load.cuh",
        "const bool inside = below >= 0 && below < t.rows;",
        "const bool inside = true;",
        NHWC_RELU,
    ),
    Mutant(
        "channels_last: the rows between a block's images are not cleared",
        "cuda/ghost/nhwc/load.cuh",
        "if (plan.images > 1 && below > 0) below -=",
        "if (plan.images > 1 && below > 0) below = 0 *",
        NHWC_RELU,
    ),
    Mutant(
        "channels_last: the last tile begins where it would if tiles divided the map",
        "cuda/ghost/nhwc/load.cuh",
        "t.h0 = min(tile * plan.tile_h, s.height - plan.tile_h);",
        "t.h0 = tile * plan.tile_h;",
        NHWC_RELU,
    ),
    Mutant(
        "channels_last: the last images are taken for a whole group",
        "cuda/ghost/nhwc/load.cuh",
        "s.batch - plan.images);",
        "s.batch);",
        NHWC_RELU,
    ),
    Mutant(
        "channels_last: lanes beyond the last input channel multiply what is there",
        "cuda/ghost/nhwc/load.cuh",
        "a = load_global16_or_zero(inside, row_a), b = load_global16_or_zero(inside, row_b);",
        "a = load_global16(row_a), b = load_global16(row_b);",
        NHWC_RELU,
    ),
    Mutant(
        "channels_last: the last pixels of a tile are not moved back",
        "cuda/ghost/nhwc/primary.cuh",
        "const int last = pixels - kNhwcPixels;",
        "const int last = pixels;",
        NHWC_RELU,
    ),
    Mutant(
        "channels_last: a warp stores channels beyond the block's",
        "cuda/ghost/nhwc/primary.cuh",
        "< channels ? done - first : kNhwcPixels;",
        "< 999 ? done - first : kNhwcPixels;",
        NHWC_RELU,
        "desc",
    ),
    Mutant(
        "channels_last: a row's end is taken for that of another pixel of four",
        "cuda/ghost/nhwc/primary.cuh",
        "fours = p.width.divisor % 4 == 0;",
        "fours = true;",
        NHWC_RELU,
    ),
    Mutant(
        "channels_last: an odd number of K blocks loses the last",
        "cuda/ghost/nhwc/primary.cuh",
        "      if (k < blocks) {",
        "      if (k < blocks - 1) {",
        NHWC_RELU,
    ),
    Mutant(
        "channels_last: x is loaded a K block ahead of its weights",
        "cuda/ghost/nhwc/primary.cuh",
        "if (k + 2 < blocks) fetch(b[1], from, k + 2);",
        "if (k + 2 < blocks) fetch(b[1], from, k + 1);",
        NHWC_RELU,
    ),
    Mutant(
        "channels_last: the last strip begins where it would if strips divided the tile",
        "cuda/ghost/nhwc/cheap.cuh",
        "plan.tile_h - plan.strip_h),",
        "plan.tile_h),",
        NHWC_RELU,
    ),
    Mutant(
        "channels_last: the last columns are not moved back",
        "cuda/ghost/nhwc/cheap.cuh",
        "min(column * kThreadColumns, s.width - kThreadColumns)};",
        "column * kThreadColumns};",
        NHWC_RELU,
    ),
    Mutant(
        "channels_last: paired lanes exchange x2 the wrong way",
        "cuda/ghost/nhwc/cheap.cuh",
        "      if (!has_x2) {",
        "      if (has_x2) {",
        NHWC_RELU,
    ),
    Mutant(
        "channels_last: cut-off ghosts are stored",
        "cuda/ghost/nhwc/cheap.cuh",
        "s.init_channels + c < s.out_channels && (odd_lane",
        "(odd_lane",
        NHWC_RELU,
    ),
    Mutant(
        "channels_last: a strip is a row shorter",
        "cuda/ghost/nhwc/cheap.cuh",
        "      if (r + 1 == strip_h) return end<0>();",
        "      if (r + 2 == strip_h) return end<0>();",
        NHWC_RELU,
    ),
    Mutant(
        "channels_last: the residual is that of the row above",
        "cuda/ghost/nhwc/cheap.cuh",
        "v = finish(v, true, row_h - 1 - kPad, col_w + column);",
        "v = finish(v, true, max(row_h - 2 - kPad, 0), col_w + column);",
        NHWC_ANY,
    ),
    # barriers and waits
    Mutant(
        "no barrier between the 1×1 conv and the depthwise conv",
        "cuda/ghost/forward.cuh",
        "  __syncthreads();  // x1 is complete, and the pipeline's memory is free\n",
        "",
        (NHWC,),
    ),
    Mutant(
        "no barrier before the staged output is stored",
        "cuda/ghost/forward.cuh",
        "    __syncthreads();  // the group is staged\n",
        "",
        (NCHW,),
    ),
    Mutant(
        "no barrier before the staging is reused",
        "cuda/ghost/forward.cuh",
        "    __syncthreads();  // and gone: the next group may take its place\n",
        "",
        (NCHW,),
    ),
    Mutant(
        "no barrier between the stages of the pipeline",
        "cuda/ghost/forward.cuh",
        "      __syncthreads();  // this chunk has come, for all threads; and all are done with the slot that is loaded next\n",
        "",
        (NHWC,),
    ),
    Mutant(
        "cp.async is waited for one group too late",
        "cuda/ghost/forward.cuh",
        "cp_async_wait(plan.stages - 2);",
        "cp_async_wait(plan.stages - 1);",
        (NHWC,),
    ),
    # padding and halos
    Mutant(
        "act(shift) in the padding",
        "cuda/ghost/cheap.cuh",
        "          float v[kV] = {};\n",
        "          float v[kV];  // the shifts of the 1×1 conv lie two rows of block_c before the cheap one's\n"
        "          for (int i = 0; i < kV; ++i) v[i] = fmaxf(affines[i - 2 * block_c], 0.f);\n",
        (NCHW,),
    ),
    Mutant(
        "the kernel for any size takes the column left of the image for part of it",
        "cuda/ghost/cheap.cuh",
        "&& ww >= 0 && ww < s.width;",
        "&& ww >= -1 && ww < s.width;",
        (ANY,),
    ),
    Mutant(
        "the halo starts a row late",
        "cuda/ghost/tile.cuh",
        "t.halo_h0 = max(t.h0 - pad, 0);",
        "t.halo_h0 = max(t.h0 - pad + 1, 0);",
        (NHWC,),
    ),
    Mutant(
        "the halo ends a column early",
        "cuda/ghost/tile.cuh",
        "min((t.w0 + t.cols + pad + align - 1)",
        "min((t.w0 + t.cols + pad - 1 + align - 1)",
        (NHWC,),
    ),
    Mutant(
        "the plan leaves no room for the lower and right halo",
        "cuda/ghost/plan.cpp",
        "round_up(std::min(start + tile, size) + pad, align)",
        "round_up(std::min(start + tile, size), align)",
        (NCHW,),
    ),
    # tails
    Mutant(
        "the last channel block is taken for a whole one",
        "cuda/ghost/tile.cuh",
        "t.channels = min(plan.block_c, s.init_channels - t.c0);",
        "t.channels = plan.block_c;",
        (NHWC,),
    ),
    Mutant(
        "pixels that don't fill a chunk are dropped",
        "cuda/ghost/forward.cuh",
        "(t.pixels + block_m - 1) / block_m * plan.k_chunks",
        "max(1, t.pixels / block_m) * plan.k_chunks",
        (NCHW,),
    ),
    Mutant(
        "the last strip of rows is taken for a whole one",
        "cuda/ghost/cheap.cuh",
        "end = min(first + p.plan.strip_h, t.h0 + t.rows);",
        "end = first + p.plan.strip_h;",
        (NCHW,),
        "desc",
    ),
    Mutant(
        "K beyond Cin is not zero-filled",
        "cuda/ghost/load.cuh",
        "const int vectors = (kChannelsLast ? pixels : p.plan.block_k) * per_row;",
        "const int vectors = (kChannelsLast ? pixels : min(p.plan.block_k, p.args.shape.in_channels - k0)) * per_row;",
        (NCHW,),
    ),
    Mutant(
        "K beyond Cin is read",
        "cuda/ghost/load.cuh",
        "kChannelsLast ? p.args.shape.in_channels - k : ",
        "kChannelsLast ? count : ",
        (NHWC,),
    ),
    # indices
    Mutant(
        "the input gate's halves of a K step are swapped",
        "cuda/ghost/primary.cuh",
        "gate + r / 2 * kHalf",
        "gate + r % 2 * kHalf",
        (NCHW,),
    ),
    Mutant(
        "the input gate of the first K chunk is used for all",
        "cuda/ghost/forward.cuh",
        "reinterpret_cast<const T*>(smem + plan.gate_offset) + k_chunk * plan.block_k;",
        "reinterpret_cast<const T*>(smem + plan.gate_offset);",
        (NHWC,),
    ),
    Mutant(
        "the input gate of the first image is used for all",
        "cuda/ghost/load.cuh",
        "static_cast<const T*>(p.args.input_gate) + int64_t{t.n} * p.args.input_gate_stride_n;",
        "static_cast<const T*>(p.args.input_gate);",
        (NCHW,),
    ),
    Mutant(
        "resident weights of another K chunk",
        "cuda/ghost/forward.cuh",
        "w_stage(plan.weights_resident ? k_chunk : slot)",
        "w_stage(slot)",
        (NCHW,),
    ),
    Mutant(
        "the new channels get the residual of the first half",
        "cuda/ghost/store.cuh",
        "at<T>(p.residual, n, c, h, w)",
        "at<T>(p.residual, n, c % a.shape.init_channels, h, w)",
        (NHWC,),
    ),
    Mutant(
        "the output gate is rounded up to the next row",
        "cuda/ghost/store.cuh",
        "nearest(h, a.gate_height, a.shape.height)",
        "min((h + 1) / 2, a.gate_height - 1)",
        (NHWC,),
    ),
    Mutant(
        "x1 is transposed as if the tile lay at the halo's corner",
        "cuda/ghost/cheap.cuh",
        "const int pixel = (t.h0 + h - t.halo_h0) * t.halo_cols + t.w0 + w - t.halo_w0;",
        "const int pixel = h * t.halo_cols + w;",
        (NCHW,),
    ),
    Mutant(
        "new channels are made from x1's in turn",
        "cuda/ghost/cheap.cuh",
        "(op.channels.first + c + i) / (s.ratio - 1) - t.c0",
        "(op.channels.first + c + i) % s.init_channels - t.c0",
        (ANY,),
    ),
    # parameters
    Mutant("no eps", "cuda/norm.cuh", "sqrtf(var + p.eps)", "sqrtf(var)", (FP32,)),
    Mutant(
        "norm parameters are taken for x's type",
        "common/checker.h",
        "mean && mean->scalar_type() == ScalarType::Float;",
        "false;",
        (NCHW,),
    ),
    # between the Ghost modules
    Mutant(
        "no barrier before the depthwise weights are scaled",
        "cuda/bottleneck/depthwise_conv.cuh",
        "  __syncthreads();  // the scales are there\n",
        "",
        (DEPTHWISE,),
    ),
    Mutant(
        "the window reaches a column too far",
        "cuda/bottleneck/depthwise_conv.cuh",
        "left + j < a.width",
        "left + j <= a.width",
        (DEPTHWISE,),
    ),
    Mutant(
        "positions of the last block beyond the image",
        "cuda/bottleneck/depthwise_conv.cuh",
        "t.positions = min(plan.block_p, p.args.out_height * plan.row_groups - t.first);",
        "t.positions = plan.block_p;",
        (PLANES,),
    ),
    Mutant(
        "no barrier before the sums of pixels are added",
        "cuda/bottleneck/squeeze_excite.cuh",
        "  __syncthreads();  // all threads' sums are there\n",
        "",
        SQUEEZE_EXCITE,
    ),
    Mutant(
        "the sums of later chunks are left out",
        "cuda/bottleneck/squeeze_excite.cuh",
        "part < p.plan.parts; ++part",
        "part < p.plan.channel_blocks; ++part",
        SQUEEZE_EXCITE,
    ),
    Mutant(
        "no barrier before the next tile of the hidden layer",
        "cuda/bottleneck/squeeze_excite.cuh",
        "    __syncthreads();  // and may be overwritten\n",
        "",
        SQUEEZE_EXCITE,
    ),
    Mutant(
        "a group of images gets the first one's gate",
        "cuda/bottleneck/squeeze_excite.cuh",
        "p.parts + int64_t{n0 + g} * p.plan.parts",
        "p.parts + int64_t{n0} * p.plan.parts",
        SQUEEZE_EXCITE,
    ),
    # training
    Mutant(
        "the transposed conv isn't mirrored",
        "cuda/training/backward.cuh",
        "const int h = cell.h + kPad - kh;",
        "const int h = cell.h - kPad + kh;",
        TRAINING,
    ),
    Mutant(
        "the padding of dy2 is what the norm's backward makes of zeros",
        "cuda/training/backward.cuh",
        "if (cell.w - kPad + i >= 0 && cell.w - kPad + i < s.width) continue;",
        "continue;",
        TRAINING,
    ),
    Mutant(
        "no barrier between the steps of a block's sum",
        "cuda/reduce.cuh",
        "      __syncthreads();\n      if (t.position < apart",
        "      if (t.position < apart",
        TRAINING,
        "desc",
    ),
    Mutant(
        "rows of partial statistics count alike, whatever their length",
        "cuda/reduce.cuh",
        "all.add(__ldcg(row + c.at[0]), mean, m2);",
        "all.add(1.f, mean, m2);",
        TRAINING,
    ),
    Mutant(
        "vectors from addresses that aren't aligned",
        "cuda/ghost/plan.cpp",
        "reinterpret_cast<uintptr_t>(data) % (vector * element) == 0",
        "true",
        (NHWC,),
    ),
]
