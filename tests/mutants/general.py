"""Faults for the general forward kernel."""

from .mutant import ANY, FP32, NCHW, NHWC, Mutant

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
        "const int kw_begin = max(0, -left),",
        "const int kw_begin = max(0, -left - 1),",
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
    Mutant(
        "vectors from addresses that aren't aligned",
        "cuda/ghost/plan.cpp",
        "reinterpret_cast<uintptr_t>(data) % (vector * element) == 0",
        "true",
        (NHWC,),
    ),
]
