// The first training kernel where nhwc_plan.cpp says so: y1 = W1 x for maps in channels_last of 2-byte elements, and
// its statistics. primary.cuh has it for everything else.
//
// A pixel is one number: no tiles, no rows. W1 is mma's A operand, 16 channels a tile, and lies in shared memory as
// fragments; x is B, 8 pixels a tile, straight from global memory: a lane loads 8 neighbouring input channels of a
// pixel at once, and takes 4 of them in each of two k steps, as W1's fragments do. y1 and its moments come from the
// accumulators. A block has warps_n warps side by side along the channels; the others lie along the pixels.
#pragma once

#include "cuda/ghost/primary.cuh"
#include "cuda/reduce.cuh"
#include "cuda/training/uniform_act.cuh"

namespace ghostfused {

constexpr int kStepPixels = kMmaPixels * kPixelTiles;

// The channel within a warp's kTiles tiles of row 8 half + lane / 4 in a tile: such that a lane has four neighbouring
// channels in two tiles.
template <int kTiles>
__device__ __forceinline__ int channel_in_warp(int tile, int group, int half) {
  const bool alone = kTiles % 2 != 0 && tile == kTiles - 1;
  return alone ? 16 * tile + 2 * group + half : tile / 2 * 32 + 4 * group + tile % 2 * 2 + half;
}

struct PrimaryWork {
  int block, row, begin, live;  // of the block's channels: the first, and how many there are
  int warp_n, warp_m, warps_m;
  int group, quad;  // of the lane: 8 groups of 4

  __device__ __forceinline__ PrimaryWork(const TrainingParams& p, int lane, int warp)
      : group(lane / 4), quad(lane % 4) {
    const PrimaryPlan& plan = p.plan.primary;
    row = blockIdx.x / p.plan.channel_blocks;
    block = blockIdx.x - row * p.plan.channel_blocks;
    begin = block * p.plan.block_c;
    live = min(p.plan.block_c, p.args.shape.init_channels - begin);
    warp_n = warp % plan.warps_n;
    warp_m = warp / plan.warps_n;
    warps_m = kPrimaryWarps / plan.warps_n;
  }
};

// W1 as fragments [warp_n][k block][k step][tile], zero beyond its channels. A barrier follows.
template <int kTiles>
__device__ __forceinline__ void fill_fragments(const TrainingParams& p, const PrimaryWork& t, unsigned char* fragments,
                                               int lane, int warp) {
  const GhostForwardParams& a = p.args;
  const int k_blocks = p.plan.primary.k_blocks;
  const auto load = [&](int c, int k) {
    Vector<uint32_t, 4> v;
    const char* weight = static_cast<const char*>(a.primary_weight);
    if (c < t.live && k < a.shape.in_channels) v.load(weight + ((t.begin + c) * a.primary_weight_stride_n + k) * 2);
    return v;
  };
  for (int n = 0; n < p.plan.primary.warps_n; ++n) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int c = 16 * kTiles * n;
      for (int kb = warp; kb < k_blocks; kb += kPrimaryWarps) {
        const auto v = load(c + channel_in_warp<kTiles>(i, t.group, 0), 32 * kb + 8 * t.quad);
        const auto w = load(c + channel_in_warp<kTiles>(i, t.group, 1), 32 * kb + 8 * t.quad);
        uint4* to =
            reinterpret_cast<uint4*>(fragments + ((n * k_blocks + kb) * 2 * kTiles + i) * kFragmentBytes) + lane;
        to[0] = uint4{v.at[0], w.at[0], v.at[1], w.at[1]};
        to[kTiles * kFragmentBytes / 16] = uint4{v.at[2], w.at[2], v.at[3], w.at[3]};
      }
    }
  }
}

// x of a lane: 8 input channels of the k-th block of 32, of pixel ``group`` of each tile. A lane that has none in the
// last block reads zeros.
struct PrimaryInput {
  const char *base, *tail;
  uint32_t pixel, tail_pixel;  // bytes from a pixel to the next
  int pixels, k_blocks;

  __device__ __forceinline__ PrimaryInput(const TrainingParams& p, const PrimaryWork& t)
      : base(static_cast<const char*>(p.args.x.data) + 16 * t.quad),
        pixel(p.plan.primary.x_pixel),
        pixels(p.plan.primary.pixels),
        k_blocks(p.plan.primary.k_blocks) {
    const bool has = 32 * (k_blocks - 1) + 8 * t.quad < p.args.shape.in_channels;
    tail = has ? base + (k_blocks - 1) * 64 : reinterpret_cast<const char*>(p.counters);  // zeros, as the plan says
    tail_pixel = has ? pixel : 0;
    asm volatile("" : "+l"(base), "+l"(tail), "+r"(pixel), "+r"(tail_pixel));  // not to be computed again and again
  }

  __device__ __forceinline__ static const char* times(const char* from, uint32_t bytes, uint32_t n) {
    const char* there;
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(there) : "r"(bytes), "r"(n), "l"(from));
    return there;
  }
  __device__ __forceinline__ void load(uint4 (&to)[kPixelTiles], int first, int group, int kb) const {
    const bool at_end = kb + 1 == k_blocks;
    const char* from = at_end ? tail : base + kb * 64;
    const uint32_t step = at_end ? tail_pixel : pixel;
    if (first + kStepPixels <= pixels) {
      from = times(from, step, first + group);
#pragma unroll
      for (int j = 0; j < kPixelTiles; ++j) {
        to[j] = __ldg(reinterpret_cast<const uint4*>(times(from, step, kMmaPixels * j)));
      }
    } else {
#pragma unroll
      for (int j = 0; j < kPixelTiles; ++j) {  // beyond the last: not used
        to[j] =
            __ldg(reinterpret_cast<const uint4*>(times(from, step, min(first + kMmaPixels * j + group, pixels - 1))));
      }
    }
  }
};

template <Path kPath, int kTiles>
__device__ __forceinline__ void multiply(float (&acc)[kTiles][kPixelTiles][4], const uint4 (&x)[kPixelTiles],
                                         const uint4* fragments) {
#pragma unroll
  for (int step = 0; step < 2; ++step) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const uint4 w = fragments[(step * kTiles + i) * (kFragmentBytes / 16)];
      const uint32_t a[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int j = 0; j < kPixelTiles; ++j) {
        mma<kPath>(acc[i][j], a, step ? x[j].z : x[j].x, step ? x[j].w : x[j].y);
      }
    }
  }
}

template <Path kPath, int kTiles>
__global__ void __launch_bounds__(kPrimaryThreads, kPrimaryBlocksPerSm[kTiles - 1])
    primary_statistics_nhwc(const __grid_constant__ TrainingParams p) {
  using T = typename PathType<kPath>::T;
  extern __shared__ __align__(128) unsigned char smem[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const PrimaryWork t(p, lane, warp);
  const PrimaryPlan& plan = p.plan.primary;
  const PrimaryInput x(p, t);
  const int end = min((t.row + 1) * plan.row_pixels, plan.pixels), step = kStepPixels * t.warps_m;
  int first = t.row * plan.row_pixels + t.warp_m * kStepPixels;
  uint4 loaded[2][kPixelTiles];
  x.load(loaded[0], first, t.group, 0);
  fill_fragments<kTiles>(p, t, smem, lane, warp);
  __syncthreads();
  const uint4* fragments =
      reinterpret_cast<const uint4*>(smem + t.warp_n * plan.k_blocks * 2 * kTiles * kFragmentBytes) + lane;
  constexpr int kBlockFragments = 2 * kTiles * kFragmentBytes / 16;  // of a k block

  // a lane's moments about its first y, of channels channel_in_warp(i, group, 0) and (…, 1)
  float shift[2 * kTiles], sums[2 * kTiles] = {}, squares[2 * kTiles] = {};
  int n = 0;
  const int live = t.live - 16 * kTiles * t.warp_n;  // of this warp
  const uint32_t out_pixel = plan.out_pixel;
  char* y = static_cast<char*>(p.maps.out) + int64_t{first + 2 * t.quad} * out_pixel +
            (t.begin + 16 * kTiles * t.warp_n + 4 * t.group) * 2;
  asm volatile("" : "+l"(y));
#pragma unroll 1
  for (; first < end; first += step) {
    float acc[kTiles][kPixelTiles][4] = {};
    int kb = 0;
#pragma unroll 1
    for (; kb + 2 <= plan.k_blocks; kb += 2) {
      x.load(loaded[1], first, t.group, kb + 1);
      multiply<kPath, kTiles>(acc, loaded[0], fragments + kb * kBlockFragments);
      if (kb + 2 < plan.k_blocks) x.load(loaded[0], first, t.group, kb + 2);
      multiply<kPath, kTiles>(acc, loaded[1], fragments + (kb + 1) * kBlockFragments);
    }
    if (kb < plan.k_blocks) multiply<kPath, kTiles>(acc, loaded[0], fragments + kb * kBlockFragments);
    if (first + step < end) x.load(loaded[0], first + step, t.group, 0);
    if (n == 0) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const float2 v = unpack<T>(pack<T>(acc[i][0][0], acc[i][0][2]));
        shift[2 * i] = v.x;
        shift[2 * i + 1] = v.y;
      }
    }
    const bool all = first + kStepPixels <= end;
#pragma unroll
    for (int j = 0; j < kPixelTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int pixel = kMmaPixels * j + e;  // from this lane's first
        if (!all && first + pixel + 2 * t.quad >= end) continue;
        ++n;
        uint32_t v[kTiles];
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          v[i] = pack<T>(acc[i][j][e], acc[i][j][2 + e]);
          const float2 f = unpack<T>(v[i]);
          const float d[2] = {f.x - shift[2 * i], f.y - shift[2 * i + 1]};
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            sums[2 * i + half] += d[half];
            squares[2 * i + half] = fmaf(d[half], d[half], squares[2 * i + half]);
          }
        }
        const char* to = PrimaryInput::times(y, out_pixel, pixel);
#pragma unroll
        for (int i = 0; i + 1 < kTiles; i += 2) {
          if (16 * i + 4 * t.group >= live) continue;
          asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to + 32 * i), "r"(v[i]), "r"(v[i + 1]) : "memory");
        }
        if (kTiles % 2 != 0 && 16 * (kTiles - 1) + 2 * t.group < live) {
          asm volatile("st.global.u32 [%0], %1;" ::"l"(to + 32 * (kTiles - 1) - 4 * t.group), "r"(v[kTiles - 1])
                       : "memory");
        }
      }
    }
    y += int64_t{step} * out_pixel;
  }

  // Over the lanes and warps that share a channel: first the block's mean, then M2 about it.
  __syncthreads();
  const int block_c = p.plan.block_c;
  float* common = reinterpret_cast<float*>(smem);  // [channel]: the block's first y, then its mean
  float* counts = common + block_c;                // [warp_m]
  float* partial = counts + kPrimaryWarps;         // [warp_m][channel]: sums, then squares
  int* last = reinterpret_cast<int*>(partial + t.warps_m * block_c);
  const auto channel = [&](int i) { return 16 * kTiles * t.warp_n + channel_in_warp<kTiles>(i / 2, t.group, i % 2); };
  const auto over_quad = [](float v) {
    v += __shfl_xor_sync(~0u, v, 1);
    return v + __shfl_xor_sync(~0u, v, 2);
  };
  const auto over_warps = [&](const float* of_warp, int stride) {
    float all = 0.f;
    for (int m = 0; m < t.warps_m; ++m) all += of_warp[m * stride];
    return all;
  };
  if (t.warp_m == 0 && t.quad == 0) {
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) common[channel(i)] = shift[i];
  }
  const float own = static_cast<float>(n), of_quad = over_quad(own);
  if (t.warp_n == 0 && lane == 0) counts[t.warp_m] = of_quad;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    const float s = over_quad(n > 0 ? sums[i] + own * (shift[i] - common[channel(i)]) : 0.f);
    if (t.quad == 0) partial[t.warp_m * block_c + channel(i)] = s;
  }
  __syncthreads();
  for (int c = threadIdx.x; c < t.live; c += kPrimaryThreads) {
    common[c] += over_warps(partial + c, block_c) / over_warps(counts, 1);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    const float d = n > 0 ? shift[i] - common[channel(i)] : 0.f;
    const float q = over_quad(squares[i] + d * (2.f * sums[i] + own * d));
    if (t.quad == 0) partial[t.warp_m * block_c + channel(i)] = q;
  }
  __syncthreads();
  const RowCombination rows = row_combination<3>(p, 0, t.block, t.row, p.args.shape.init_channels, kZeroWords);
  for (int c = threadIdx.x; c < t.live; c += kPrimaryThreads) {
    *rows.at<3>(t.row, 0, t.begin + c) = over_warps(counts, 1);
    *rows.at<3>(t.row, 1, t.begin + c) = common[c];
    *rows.at<3>(t.row, 2, t.begin + c) = not_negative(over_warps(partial + c, block_c));
  }
  write_statistics(rows, p.mean, p.var, last);
}

}  // namespace ghostfused
