// The first training kernel: ghost/forward.cuh's 1×1 conv without norm and activation, and the statistics of what it
// stores. A block has block_c channels and a row: consecutive tiles, of one image or several.
#pragma once

#include "cuda/ghost/forward.cuh"
#include "cuda/reduce.cuh"

namespace ghostfused {

template <Path kPath, bool kChannelsLast>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks)
    primary_statistics(const __grid_constant__ KernelParams p, const __grid_constant__ StatisticsParams s) {
  using T = typename PathType<kPath>::T;
  extern __shared__ __align__(128) unsigned char smem[];
  float* scratch = reinterpret_cast<float*>(smem + p.plan.smem_bytes);
  unsigned char *x1 = smem + p.plan.x1_offset, *staging = smem + p.plan.pipeline_offset;
  const int block = blockIdx.x % p.plan.channel_blocks, row = blockIdx.x / p.plan.channel_blocks;
  // x1 lies as [pixel][channel] in both layouts
  const BlockShare share = BlockShare::of<true>(p.plan.block_c);
  const Channels<1> c = Channels<1>::of(block * p.plan.block_c + share.lane, p.args.shape.init_channels);
  // between tiles in shared memory: the pipeline leaves no registers
  static_assert(sizeof(Moments<1>[kMaxThreads]) <= kScratchBytes);
  Moments<1>& moments = reinterpret_cast<Moments<1>*>(scratch)[threadIdx.x];
  moments = Moments<1>{};
  const int64_t end = min((row + 1) * s.plan.row_tiles, s.plan.tiles);
#pragma unroll 1
  for (int64_t tile = row * s.plan.row_tiles; tile < end; ++tile) {
    const BlockTile t = block_tile(p, static_cast<unsigned>(tile * p.plan.channel_blocks + block));
    primary<kPath, T, kChannelsLast>(p, t, smem, [&] {
      load_primary_affine<T>(p, t, reinterpret_cast<float*>(smem));
      if (p.args.input_gate != nullptr) load_input_gate<T>(p, t, reinterpret_cast<T*>(smem + p.plan.gate_offset));
    });
    __syncthreads();  // x1 is complete, and the pipeline's memory is free
    if (!kChannelsLast) transpose_x1<T>(p, t, x1, staging);
    if (!share.idle()) {
      Moments<1> sums = moments;
      for (int pixel = share.position; pixel < t.pixels; pixel += share.positions) {
        float y[1];
        load_x1<T>(y, x1 + pixel * p.plan.x1_pitch + share.lane * sizeof(T));
        sums.add(y);
      }
      moments = sums;
    }
    if (!kChannelsLast) __syncthreads();  // the tile is staged
    with_vector<T>(p.width.out, [&]<int kOut>(Vector<T, kOut>) {
      if constexpr (kChannelsLast) {
        store_rows<T, kOut>(p, t, x1, staging, t.channels, NewChannels{0, 0});
      } else {
        store_planes<T, kOut>(p, t, staging, t.c0, t.channels);
      }
    });
    __syncthreads();  // and gone: the next tile may take its place
  }
  const int channels = p.args.shape.init_channels, first = block * p.plan.block_c;
  const RowCombination rows{s.plan.rows, s.partial, s.counters + block * (s.plan.rows.groups + 1), row,
                            channels,    first,     min(first + p.plan.block_c, channels)};
  finish_statistics<kMaxThreads>(moments, c, share, rows, s.mean, s.var, scratch);
}

}  // namespace ghostfused

#define GHOSTFUSED_STATISTICS_KERNELS(PATH, NAME)                                                                  \
  namespace ghostfused {                                                                                           \
  const Kernel k##PATH##Statistics[2] = {                                                                          \
      {reinterpret_cast<const void*>(&primary_statistics<Path::k##PATH, false>), NAME "_primary_statistics_nchw"}, \
      {reinterpret_cast<const void*>(&primary_statistics<Path::k##PATH, true>), NAME "_primary_statistics_nhwc"},  \
  };                                                                                                               \
  }
