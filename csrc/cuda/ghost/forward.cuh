// The Ghost module as one kernel. A block takes one image's tile of pixels with its halo × block_c init channels:
//
//   load        x and the 1×1 weights → shared memory, by cp.async, ``stages`` deep             load.cuh
//   primary     x * w on tensor cores (FMA for IEEE fp32), sums in registers                    primary.cuh
//   norm_affine bias, norm, activation → x1 in shared memory, in x's type, halo included
//   --- barrier ---
//   cheap       x1 → x2, staged where the pipeline was                                          cheap.cuh
//   --- barrier ---
//   store       [x1 | x2] → output, gate and residual applied                                   store.cuh
//
// Every sum is made by one thread in a fixed order, so results are bitwise the same from run to run.
// plan.cpp chooses the tile; only instructions of sm_80 are used.
#pragma once

#include "cuda/ghost/cheap.cuh"
#include "cuda/ghost/load.cuh"
#include "cuda/ghost/primary.cuh"
#include "cuda/ghost/store.cuh"
#include "cuda/ghost/tile.cuh"

namespace ghostfused {

// x1 = act(norm(sums)) for the warp's pixels from m0 on.
template <Path kPath, typename T>
__device__ __forceinline__ void norm_affine(const KernelParams& p, const BlockTile& t, const Accumulators& acc,
                                            const float* affines, unsigned char* x1, int m0, int first_channel,
                                            int n_tiles, int lane) {
  const int block_c = p.plan.block_c, own = first_channel + lane % 4 * 2;
  float y[4][8], slopes[8];  // pixels 8 apart × two channels of each tile
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int c = own + 8 * min(j, n_tiles - 1);
    const float2 scale = *reinterpret_cast<const float2*>(affines + c);
    const float2 shift = *reinterpret_cast<const float2*>(affines + block_c + c);
    const float2 slope = *reinterpret_cast<const float2*>(affines + 2 * block_c + c);
    slopes[2 * j] = slope.x, slopes[2 * j + 1] = slope.y;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      y[r][2 * j] = fmaf(acc[r / 2][j][r % 2 * 2], scale.x, shift.x);
      y[r][2 * j + 1] = fmaf(acc[r / 2][j][r % 2 * 2 + 1], scale.y, shift.y);
    }
  }
  activate_rows<kPath == Path::kFloat32>(y, p.args.primary.act, slopes);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int pixel = m0 + 8 * r + lane / 4;
      if (j < n_tiles && pixel < t.pixels) {
        Vector<T, 2> v;
        v.at[0] = from_float<T>(y[r][2 * j]);
        v.at[1] = from_float<T>(y[r][2 * j + 1]);
        v.store(x1 + pixel * p.plan.x1_pitch + (own + 8 * j) * sizeof(T));
      }
    }
  }
}

// The 1×1 conv over all halo pixels: one pipeline over (pixel chunk, K chunk), K inside. ``load_rest`` runs once, while
// the first stages are on their way.
template <Path kPath, typename T, bool kChannelsLast, typename F>
__device__ __forceinline__ void primary(const KernelParams& p, const BlockTile& t, unsigned char* smem, F load_rest) {
  const LaunchPlan& plan = p.plan;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_n = warp % plan.warps_n, warp_m = warp / plan.warps_n;
  const int block_m = static_cast<int>(blockDim.x) / 32 / plan.warps_n * kWarpPixels;
  const int tiles = plan.block_c / 8, tiles_per_warp = (tiles + plan.warps_n - 1) / plan.warps_n;
  const int n_tiles = max(0, min(tiles_per_warp, tiles - warp_n * tiles_per_warp));
  const int first_channel = warp_n * tiles_per_warp * 8;
  const int k_steps = plan.block_k * static_cast<int>(sizeof(T)) / kKStepBytes;
  const int chunks = (t.pixels + block_m - 1) / block_m * plan.k_chunks;

  const T* x = static_cast<const T*>(p.x.data) + t.n * p.x.stride_n;
  const float* affines = reinterpret_cast<const float*>(smem);
  unsigned char* x1 = smem + plan.x1_offset;
  const FastDivisor halo_cols(t.halo_cols);

  const auto a_stage = [&](int slot) { return smem + plan.pipeline_offset + slot * plan.a_stage; };
  const auto w_stage = [&](int slot) { return smem + plan.resident_offset + slot * plan.w_stage; };
  int load_chunk = 0, load_m = 0, load_k = 0, load_slot = 0;
  const auto load_next = [&] {
    if (load_chunk < chunks) {
      load_x<T, kChannelsLast>(p, t, halo_cols, a_stage(load_slot), x, load_m, load_k * plan.block_k, block_m);
      if (!plan.weights_resident || load_m == 0) {
        load_primary_weight<T>(p, t, w_stage(plan.weights_resident ? load_k : load_slot), load_k * plan.block_k);
      }
      if (++load_k == plan.k_chunks) load_k = 0, load_m += block_m;
      if (++load_slot == plan.stages) load_slot = 0;
      ++load_chunk;
    }
    cp_async_commit();  // an empty group at the end keeps the count that cp_async_wait goes by
  };

  Accumulators acc = {};
  int m0 = 0, k_chunk = 0, slot = 0;
  for (int chunk = 1 - plan.stages; chunk < chunks; ++chunk) {  // negative: fill the pipeline, nothing to multiply yet
    if (chunk == 0) load_rest();
    if (chunk >= 0) {
      cp_async_wait(plan.stages - 2);
      __syncthreads();  // this chunk has come, for all threads; and all are done with the slot that is loaded next
    }
    load_next();
    if (chunk < 0) continue;
    const int warp_pixel = m0 + warp_m * kWarpPixels;
    const bool busy = n_tiles > 0 && warp_pixel < t.pixels;
    if (busy) {
      WarpOperands<T> op;
      op.a = smem_address(a_stage(slot)) +
             warp_m * kWarpPixels * (kChannelsLast ? plan.a_pitch : static_cast<int>(sizeof(T)));
      op.w = smem_address(w_stage(plan.weights_resident ? k_chunk : slot));
      op.a_pitch = plan.a_pitch;
      op.w_pitch = plan.w_pitch;
      op.first_channel = first_channel;
      op.last_channel = plan.block_c - 1;
      op.n_tiles = n_tiles;
      op.gate = p.args.input_gate == nullptr
                    ? nullptr
                    : reinterpret_cast<const T*>(smem + plan.gate_offset) + k_chunk * plan.block_k;
#pragma unroll 1
      for (int step = 0; step < k_steps; ++step) {
        if constexpr (kPath == Path::kFloat32) {
          fma_step<kChannelsLast>(acc, op, step, lane);
        } else {
          mma_step<kPath, T, kChannelsLast>(acc, op, step, lane);
        }
      }
    }
    if (++slot == plan.stages) slot = 0;
    if (++k_chunk == plan.k_chunks) {
      if (busy) norm_affine<kPath, T>(p, t, acc, affines, x1, warp_pixel, first_channel, n_tiles, lane);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[i][j][e] = 0.f;
        }
      }
      k_chunk = 0;
      m0 += block_m;
    }
  }
  cp_async_wait(0);
}

// The output's channels of one block, group by group: block_c new channels are made from block_c init channels
// (ratio - 1) times over; x1 leaves with the first group. Unrolled kernels (kD > 0) are for ratio 2 and have one group.
template <Path kPath, typename T, int kD, bool kChannelsLast>
__device__ __forceinline__ void cheap_and_store(const KernelParams& p, unsigned char* smem) {
  unsigned char *x1 = smem + p.plan.x1_offset, *staging = smem + p.plan.pipeline_offset;
  float* affines = reinterpret_cast<float*>(smem + p.plan.cheap_offset);
  float* weights = reinterpret_cast<float*>(smem + p.plan.dw_offset);

  // Group -1, NCHW only, is x1: channels_last stores x1 from where it lies, together with group 0.
  for (int group = kChannelsLast ? 0 : -1; group < (kD > 0 ? 1 : p.args.shape.ratio - 1); ++group) {
    {
      const BlockTile t = block_tile(p);
      const NewChannels g = new_channels<kD>(p, t, max(group, 0));
      if (g.count == 0 && group >= (kChannelsLast ? 1 : 0)) break;  // sliced off
      if (group > 0) {
        load_cheap<T, kD>(p, t, group, affines, weights);
        __syncthreads();
      }
      if (!kChannelsLast && group < 0) {
        transpose_x1<T>(p, t, x1, staging);
      } else if (g.count > 0) {
        cheap<kPath, T, kD, kChannelsLast>(p, t, CheapOperands{x1, affines, weights, staging, g});
      }
    }
    __syncthreads();  // the group is staged
    {
      const BlockTile t = block_tile(p);
      const NewChannels g = new_channels<kD>(p, t, max(group, 0));
      with_vector<T>(p.width.out, [&]<int kV>(Vector<T, kV>) {
        if constexpr (kChannelsLast) {
          store_rows<T, kV>(p, t, x1, staging, group == 0 ? t.channels : 0, g);
        } else {
          store_planes<T, kV>(p, t, staging, group < 0 ? t.c0 : p.args.shape.init_channels + g.first,
                              group < 0 ? t.channels : g.count);
        }
      });
    }
    __syncthreads();  // and gone: the next group may take its place
  }
}

template <Path kPath, int kD, bool kChannelsLast>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks) ghost_forward(const __grid_constant__ KernelParams p) {
  using T = typename PathType<kPath>::T;
  extern __shared__ __align__(128) unsigned char smem[];
  {
    const BlockTile t = block_tile(p);
    primary<kPath, T, kChannelsLast>(p, t, smem, [&] {
      load_primary_affine<T>(p, t, reinterpret_cast<float*>(smem));
      load_cheap<T, kD>(p, t, 0, reinterpret_cast<float*>(smem + p.plan.cheap_offset),
                        reinterpret_cast<float*>(smem + p.plan.dw_offset));
      if (p.args.input_gate != nullptr) load_input_gate<T>(p, t, reinterpret_cast<T*>(smem + p.plan.gate_offset));
    });
  }
  __syncthreads();  // x1 is complete, and the pipeline's memory is free
  cheap_and_store<kPath, T, kD, kChannelsLast>(p, smem);
}

template <Path kPath, int kD, bool kChannelsLast>
const void* kernel() {
  return reinterpret_cast<const void*>(&ghost_forward<kPath, kD, kChannelsLast>);
}

}  // namespace ghostfused

// The kernels of one path, in the order that launch.h gives.
#define GHOSTFUSED_KERNELS(PATH, NAME)                       \
  namespace ghostfused {                                     \
  const Kernel k##PATH##Kernels[kKernelsPerPath] = {         \
      {kernel<Path::k##PATH, 3, false>(), NAME "_dw3_nchw"}, \
      {kernel<Path::k##PATH, 0, false>(), NAME "_any_nchw"}, \
      {kernel<Path::k##PATH, 0, true>(), NAME "_any_nhwc"},  \
  };                                                         \
  }
#define GHOSTFUSED_FLOAT_KERNELS(PATH, NAME)                 \
  namespace ghostfused {                                     \
  const Kernel k##PATH##Kernels[kFloatKernelsPerPath] = {    \
      {kernel<Path::k##PATH, 0, false>(), NAME "_any_nchw"}, \
      {kernel<Path::k##PATH, 0, true>(), NAME "_any_nhwc"},  \
  };                                                         \
  }
