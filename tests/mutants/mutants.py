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

DEPTHWISE, PLANES = "float16_depthwise_w3_s2_nhwc", "float16_depthwise_w5_s2_nchw"
SQUEEZE_EXCITE = ("float16_squeeze_nhwc",)
TRAINING = ("float32_training_dw3_nchw",)
STRIPS, MASKED = ("float16_training_strips_nhwc",), ("float16_training_masked_nhwc",)

MUTANTS = [
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
        "      __syncthreads();\n      if (t.position >= count - half) continue;",
        "      if (t.position >= count - half) continue;",
        TRAINING,
        "desc",
    ),
    Mutant(
        "rows of partial statistics count alike, whatever their length",
        "cuda/reduce.cuh",
        "all.add(__ldcg(t.at<3>(r, 0, c)), mean, m2);",
        "all.add(1.f, mean, m2);",
        TRAINING,
    ),
    Mutant(
        "no barrier before a block's sums are added in order",
        "cuda/reduce.cuh",
        "    __syncthreads();\n    for (int i = t.position; i < together",
        "    for (int i = t.position; i < together",
        STRIPS,
        "desc",
    ),
    Mutant(
        "moments are combined as if all threads had the same shift",
        "cuda/reduce.cuh",
        "const float d = own.n > 0.f ? own.shift[e] - shift[e] : 0.f;",
        "const float d = 0.f;",
        TRAINING,
    ),
    Mutant(
        "the last group has as many rows as the others",
        "cuda/reduce.cuh",
        "const int count = min(groups.group_rows, groups.rows - begin);",
        "const int count = groups.group_rows;",
        TRAINING,
    ),
    # training in channels_last
    Mutant(
        "no barrier after a block's numbers per channel",
        "cuda/training/strip.cuh",
        "tap / 3, tap % 3));\n  }\n  __syncthreads();\n",
        "tap / 3, tap % 3));\n  }\n",
        STRIPS,
        "desc",
    ),
    Mutant(
        "channels beyond a block's last",
        "cuda/training/strip.cuh",
        "return !share.idle() && channel < end; }",
        "return !share.idle(); }",
        STRIPS,
    ),
    Mutant(
        "columns outside the image aren't zero",
        "cuda/training/strip.cuh",
        "x[i] = s.inside(i / 2 - 1) ? x[i] : 0.f;",
        "x[i] = x[i];",
        STRIPS,
    ),
    Mutant(
        "the row above the image is read",
        "cuda/training/strip.cuh",
        "load(window[0], s.h > 0);",
        "load(window[0], true);",
        STRIPS,
    ),
    Mutant(
        "the row below the image is read",
        "cuda/training/strip.cuh",
        "s.h + r + i + 1 < height);",
        "true);",
        STRIPS,
    ),
    Mutant(
        "the last strip is as high as the others",
        "cuda/training/strip.cuh",
        "s.rows = min(plan.strip_h, p.args.shape.height - s.h);",
        "s.rows = plan.strip_h;",
        STRIPS,
    ),
    Mutant(
        "columns beyond a cut strip",
        "cuda/training/strip.cuh",
        "(!kMasked && i < kStripColumns) || i < rest;",
        "i < kStripColumns || i < rest;",
        MASKED,
    ),
    Mutant(
        "columns beyond a cut strip count in the moments",
        "cuda/training/strip_kernels.cuh",
        "n += kMasked ? min(s.rest, kStripColumns) : kStripColumns;",
        "n += kStripColumns;",
        MASKED,
    ),
    Mutant(
        "x1 beyond a cut strip counts in the weights' gradient",
        "cuda/training/strip_kernels.cuh",
        "if (!s.inside(i)) x[2 * i] = x[2 * i + 1] = 0.f;",
        "",
        MASKED,
    ),
    Mutant(
        "the strips' transposed conv isn't mirrored",
        "cuda/training/strip_kernels.cuh",
        "add(below, 0);\n      add(at, 1);\n      add(above, 2);",
        "add(above, 0);\n      add(at, 1);\n      add(below, 2);",
        STRIPS,
    ),
    Mutant(
        "act' of x1 instead of z",
        "cuda/training/strip_kernels.cuh",
        "if (!act.simple) normalize<T>(x, y, center, scale, shift);  // z, which x1 doesn't tell",
        "",
        STRIPS,
    ),
    Mutant(
        "no barrier after the numbers of normalize",
        "cuda/training/pixels.cuh",
        "  __syncthreads();\n  if (!t.works) return;\n  float center[kV]",
        "  if (!t.works) return;\n  float center[kV]",
        STRIPS,
        "desc",
    ),
    Mutant(
        "pixels beyond a block's last",
        "cuda/training/pixels.cuh",
        "if (i * t.positions < left) y[i].store(out + at + i * step);",
        "y[i].store(out + at + i * step);",
        STRIPS,
    ),
    Mutant(
        "no barrier after the weights' fragments",
        "cuda/training/primary_nhwc.cuh",
        "  fill_fragments<kTiles>(p, t, smem, lane, warp);\n  __syncthreads();\n",
        "  fill_fragments<kTiles>(p, t, smem, lane, warp);\n",
        STRIPS,
        "desc",
    ),
    Mutant(
        "no barrier before the fragments give way to sums",
        "cuda/training/primary_nhwc.cuh",
        "  // To moments about the block's first y, and over the lanes and warps that share a channel.\n  __syncthreads();\n",
        "",
        STRIPS,
        "desc",
    ),
    Mutant(
        "pixels beyond the last are read",
        "cuda/training/primary_nhwc.cuh",
        "min(first + kMmaPixels * j + group, pixels - 1)",
        "first + kMmaPixels * j + group",
        STRIPS,
    ),
    Mutant(
        "pixels beyond a block's last count in the moments of y1",
        "cuda/training/primary_nhwc.cuh",
        "if (!all && first + pixel + 2 * t.quad >= end) continue;",
        "",
        STRIPS,
    ),
    Mutant(
        "lanes have no input channels of their own in the last k block",
        "cuda/training/primary_nhwc.cuh",
        "const bool has = 32 * (k_blocks - 1) + 8 * t.quad < p.args.shape.in_channels;",
        "const bool has = true;",
        STRIPS,
    ),
    Mutant(
        "moments of y1 are combined as if all lanes had the same shift",
        "cuda/training/primary_nhwc.cuh",
        "const float d = n > 0 ? shift[i] - common[channel(i)] : 0.f;",
        "const float d = 0.f;",
        STRIPS,
    ),
    Mutant(
        "vectors from addresses that aren't aligned",
        "cuda/ghost/plan.cpp",
        "reinterpret_cast<uintptr_t>(data) % (vector * element) == 0",
        "true",
        (NHWC,),
    ),
]
