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

WIDE8, WIDE8_ANY = "float16_nchw_w8_dw3", "float16_nchw_w8_dw3_any"
WIDE4, FOURTEEN, SEVEN = "float16_nchw_w4_dw3", "float16_nchw_w14_dw3", "float16_nchw_w7_dw3"
DEPTHWISE, PLANES = "float16_depthwise_w3_s2_nhwc", "float16_depthwise_w5_s2_nchw"
SQUEEZE_EXCITE = ("float16_squeeze_nhwc",)
TRAINING = ("float32_training_dw3_nchw",)

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
    # the NCHW kernel
    Mutant(
        "NCHW: no barrier between the weights and the 1×1 conv",
        "cuda/ghost/nchw/primary.cuh",
        "  load_rest();\n  __syncthreads();\n",
        "  load_rest();\n",
        (WIDE8,),
        "desc",
    ),
    Mutant(
        "NCHW: no barrier before the cheap conv of a wide map",
        "cuda/ghost/nchw/forward.cuh",
        "    __syncthreads();  // x1 is complete\n",
        "",
        (WIDE8,),
    ),
    Mutant(
        "NCHW: no barrier before the cheap conv of a small map",
        "cuda/ghost/nchw/forward.cuh",
        "    __syncthreads();  // x1 is complete, and what lay in the stage is used up\n",
        "",
        (FOURTEEN,),
    ),
    Mutant(
        "NCHW: no barrier before the staged maps are stored",
        "cuda/ghost/nchw/forward.cuh",
        "    __syncthreads();  // x2, and x1 of 7 × 7, are staged\n",
        "",
        (FOURTEEN,),
    ),
    Mutant(
        "NCHW: nobody waits for the copies of x",
        "cuda/ghost/nchw/primary_seven.cuh",
        '  asm volatile("cp.async.wait_all;" ::: "memory");\n',
        "",
        (SEVEN,),
    ),
    Mutant(
        "NCHW: no barrier after the copies of x",
        "cuda/ghost/nchw/primary_seven.cuh",
        "  __syncthreads();\n\n  SevenInput x(",
        "  SevenInput x(",
        (SEVEN,),
    ),
    Mutant(
        "NCHW: no barrier before the sums take the place of x",
        "cuda/ghost/nchw/primary_seven.cuh",
        "  __syncthreads();  // all have read x: the sums take its place\n",
        "",
        (SEVEN,),
    ),
    Mutant(
        "NCHW: no barrier before the sums are added",
        "cuda/ghost/nchw/primary_seven.cuh",
        "  __syncthreads();  // all sums are there\n",
        "",
        (SEVEN,),
    ),
    Mutant(
        "NCHW: the halo starts a row late",
        "cuda/ghost/nchw/tile.cuh",
        "b.top = max(b.h0 - C::kPad, 0);",
        "b.top = max(b.h0 - C::kPad + 1, 0);",
        (WIDE8,),
    ),
    Mutant(
        "NCHW: the halo ends a row early",
        "cuda/ghost/nchw/tile.cuh",
        "min(b.h0 + p.plan.tile_h + C::kPad, s.height)",
        "min(b.h0 + p.plan.tile_h, s.height)",
        (WIDE8,),
    ),
    Mutant(
        "NCHW: the column right of the last row is not cleared",
        "cuda/ghost/nchw/load.cuh",
        "r <= rows; r += p.plan.warps",
        "r < rows; r += p.plan.warps",
        (WIDE8,),
    ),
    Mutant(
        "NCHW: the rows around the image are not cleared",
        "cuda/ghost/nchw/load.cuh",
        "if (k < C::kPad ? r >= above : r >= rows) continue;",
        "continue;",
        (WIDE4,),
    ),
    Mutant(
        "NCHW: chunks beyond the halo are not moved back",
        "cuda/ghost/nchw/primary.cuh",
        "min(max(chunk, 0), last)",
        "max(chunk, 0)",
        (WIDE8,),
    ),
    Mutant(
        "NCHW: chunks beyond the map are not moved back",
        "cuda/ghost/nchw/primary.cuh",
        ": min(chunk, last);",
        ": chunk;",
        (FOURTEEN,),
    ),
    Mutant(
        "NCHW: the chunks before the first are not counted",
        "cuda/ghost/nchw/primary.cuh",
        "groups = (chunks + shift + 7) / 8;",
        "groups = (chunks + 7) / 8;",
        (WIDE4,),
    ),
    Mutant(
        "NCHW: the last 8 input channels are lost",
        "cuda/ghost/nchw/primary.cuh",
        "    if (has_tail) {\n      uint2 w",
        "    if (false) {\n      uint2 w",
        (WIDE8,),
    ),
    Mutant(
        "NCHW: a K step too many",
        "cuda/ghost/nchw/primary.cuh",
        "if (slot > 0 && s0 + slot >= steps) break;",
        "if (slot > 0 && s0 + slot > steps) break;",
        (WIDE4,),
    ),
    Mutant(
        "NCHW: x1 is stored for a channel beyond the block",
        "cuda/ghost/nchw/primary.cuh",
        "c + g < b.channels",
        "c + g <= b.channels",
        (WIDE8,),
    ),
    Mutant(
        "NCHW: rows below the image are stored",
        "cuda/ghost/nchw/cheap.cuh",
        "store_words<kV / 2>(to, v, h < rows);",
        "store_words<kV / 2>(to, v, true);",
        (WIDE8,),
    ),
    Mutant(
        "NCHW: cut-off ghosts are stored",
        "cuda/ghost/nchw/tile.cuh",
        "b.ghosts = min(b.channels, s.out_channels - s.init_channels - b.c0);",
        "b.ghosts = b.channels;",
        (WIDE8,),
    ),
    Mutant(
        "NCHW: the rows around a small map are not zero",
        "cuda/ghost/nchw/cheap.cuh",
        "outside ? zeros : from",
        "from",
        (FOURTEEN,),
    ),
    Mutant(
        "NCHW: odd rows of 7 × 7 take the channels in the wrong order",
        "cuda/ghost/nchw/primary_seven.cuh",
        "parity ? 0x1076u : 0x7610u",
        "0x7610u",
        (SEVEN,),
    ),
    Mutant(
        "NCHW: the last share of K is taken for a whole one",
        "cuda/ghost/nchw/primary_seven.cuh",
        "min(share, all_steps - first_step)",
        "share",
        (SEVEN,),
    ),
    Mutant(
        "NCHW: the last vector of the maps is not stored",
        "cuda/ghost/nchw/store.cuh",
        "i < bytes;",
        "i + 16 < bytes;",
        (SEVEN,),
    ),
    Mutant(
        "NCHW: weights of channels beyond the last are read",
        "cuda/ghost/nchw/load.cuh",
        "min(channel, b.channels - 1)",
        "channel",
        (WIDE8,),
    ),
    Mutant(
        "NCHW: the input gate stays at the first channels",
        "cuda/ghost/nchw/primary.cuh",
        "      step_gate += kSlots * 16;\n",
        "",
        (WIDE8_ANY,),
    ),
    Mutant(
        "NCHW: residual and output gate are those of the pixel before",
        "cuda/ghost/nchw/store.cuh",
        "place(2 * i + e)",
        "place(2 * i)",
        (WIDE8_ANY,),
    ),
    Mutant(
        "NCHW: x1 has the residual of another row",
        "cuda/ghost/nchw/store.cuh",
        "int3{b.c0 + c, b.h0 + row,",
        "int3{b.c0 + c, b.h0,",
        (WIDE8_ANY,),
    ),
]
