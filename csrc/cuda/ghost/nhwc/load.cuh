// What a block brings into shared memory before it computes: the 1×1 weights, scales and shifts, and x1's zeros.
#pragma once

#include "cuda/ghost/nhwc/nhwc.h"
#include "cuda/half_pairs.cuh"
#include "cuda/norm.cuh"

namespace ghostfused {

// One block's work: rows [h0, h0 + tile_h) of the plan's number of images from n on, init channels [c0, c0 + block_c).
// Every block is whole: where sizes don't divide, the last one overlaps its neighbour and stores the same bits again.
struct NhwcTile {
  int n, h0, c0;
  int top, rows;  // of x1 inside the image, halo included
  int first_row;  // of shared memory's rows, the first that holds one of them
};

template <int kD>
__device__ __forceinline__ NhwcTile nhwc_tile(const NhwcParams& p) {
  const GhostShape& s = p.args.shape;
  const NhwcPlan& plan = p.plan;
  constexpr int kPad = kD / 2;
  NhwcTile t;
  const int tile = FastDivisor(p.channel_blocks).divide(blockIdx.x);
  t.c0 =
      min((static_cast<int>(blockIdx.x) - tile * plan.channel_blocks) * plan.block_c, s.init_channels - plan.block_c);
  t.h0 = min(tile * plan.tile_h, s.height - plan.tile_h);
  t.n = min(static_cast<int>(blockIdx.y) * plan.images, s.batch - plan.images);
  t.top = max(t.h0 - kPad, 0);
  t.rows = min(t.h0 + plan.tile_h + kPad, s.height) - t.top;
  t.first_row = t.top - (t.h0 - kPad);
  return t;
}

// Input channels of which the four lanes of a pixel load 16 bytes each.
template <typename T>
constexpr int kNhwcK = 64 / sizeof(T);

// A lane's channel within the kTiles m16 tiles of its warp: row g + 8 * half of tile t. Two neighbouring tiles give it
// four channels in a row, a last single one two, so that it stores x1 as one vector.
template <int kTiles>
__device__ __forceinline__ int channel_of(int t, int g, int half) {
  const bool single = kTiles % 2 == 1 && t == kTiles - 1;
  return single ? 16 * t + 2 * g + half : t / 2 * 32 + 4 * g + t % 2 * 2 + half;
}

// The 1×1 weights as mma's A fragments: [warp along channels][kNhwcK input channels][k step][tile][lane], 16 bytes
// each. Lane 4 g + q has the q-th quarter of kNhwcK input channels, in the order in which it reads x; zero beyond Cin.
// Channels beyond the block's are any: nobody stores their x1. For IEEE fp32, in the same place: [warp along
// channels][four input channels][tile][half][g], see primary_fma.cuh.
template <Path kPath, int kTiles>
__device__ __forceinline__ void load_primary_weight(const NhwcParams& p, const NhwcTile& t, unsigned char* fragments) {
  using T = typename PathType<kPath>::T;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int blocks = p.plan.k_blocks, tiles = p.plan.warps_n * kTiles, last = p.plan.block_c - 1;
  const int side = p.weight_warps.divisor, row_of_warps = FastDivisor(p.weight_warps).divide(warp);  // along the tiles
  const int rows_of_warps = p.weight_rows;                                                           // along Cin
  if (row_of_warps >= rows_of_warps) return;
  constexpr int kK = kNhwcK<T>;
  const int in_channels = p.args.shape.in_channels;
  const bool whole = in_channels % kK == 0, inside = (blocks - 1) * kK + kK / 4 * q < in_channels;
  const uint32_t row_bytes = static_cast<uint32_t>(p.args.primary_weight_stride_n) * sizeof(T);
  const unsigned char* weight = static_cast<const unsigned char*>(p.args.primary_weight) + q * 16 + row_of_warps * 64;
#pragma unroll 1
  for (int tile = warp - row_of_warps * side; tile < tiles; tile += side) {
    const int warp_n = tile / kTiles, i = tile % kTiles, c = warp_n * kTiles * 16 + channel_of<kTiles>(i, g, 0);
    const auto row = [&](int c) {
      return weight + static_cast<uint64_t>(static_cast<uint32_t>(t.c0 + min(c, last))) * row_bytes;
    };
    const unsigned char *row_a = row(c), *row_b = row(c + 1);
    unsigned char* to = fragments + (warp_n * blocks + row_of_warps) * 2 * kTiles * 512;
    to += kPath == Path::kFloat32 ? ((q * kTiles + i) * 16 + g) * 16 : i * 512 + lane * 16;
    const auto store = [&](uint4 a, uint4 b) {
      if constexpr (kPath == Path::kFloat32) {
        *reinterpret_cast<uint4*>(to) = a;
        *reinterpret_cast<uint4*>(to + 128) = b;
      } else {
        if constexpr (kPath == Path::kTF32) a = to_tf32(a), b = to_tf32(b);
        *reinterpret_cast<uint4*>(to) = uint4{a.x, b.x, a.y, b.y};
        *reinterpret_cast<uint4*>(to + kTiles * 512) = uint4{a.z, b.z, a.w, b.w};
      }
      to += rows_of_warps * 2 * kTiles * 512;
    };
    int block = row_of_warps;
    // Several loads are under way at a time.
    constexpr int kAhead = 4;
    const int loaded = whole ? blocks : blocks - 1;  // blocks without zeros
#pragma unroll 1
    for (; block + (kAhead - 1) * rows_of_warps < loaded; block += kAhead * rows_of_warps) {
      uint4 a[kAhead], b[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k, row_a += rows_of_warps * 64, row_b += rows_of_warps * 64) {
        a[k] = load_global16(row_a), b[k] = load_global16(row_b);
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) store(a[k], b[k]);
    }
#pragma unroll 1
    for (; block < blocks; block += rows_of_warps, row_a += rows_of_warps * 64, row_b += rows_of_warps * 64) {
      if (block < loaded) {
        store(load_global16(row_a), load_global16(row_b));
      } else {
        store(load_global16_or_zero(inside, row_a), load_global16_or_zero(inside, row_b));
      }
    }
  }
}

// [scale | shift | slope] of the primary conv; of the cheap one [taps | shift | slope], its weights already multiplied
// by the norm's scale. Rows of ``channels``, zero beyond the block's. One loop, which has the code of affine() once.
template <typename T, int kD>
__device__ __forceinline__ void load_channels(const NhwcParams& p, const NhwcTile& t, int channels, float* primary,
                                              float* cheap) {
  const GhostForwardParams& a = p.args;
#pragma unroll 1
  for (int i = threadIdx.x; i < (kD > 1 ? 2 : 1) * channels; i += blockDim.x) {
    const bool is_cheap = kD > 1 && i >= channels;
    const int c = is_cheap ? i - channels : i;
    float* to = is_cheap ? cheap + (kD * kD - 1) * channels : primary;  // a row before the shift
    T taps[kD * kD];
    Affine norm{0.f, 0.f, 0.f};
    if (c < p.plan.block_c) {
      const NormAct& act = is_cheap ? a.cheap : a.primary;
      const RawAffine raw = load_affine<T>(act, t.c0 + c);
      if (is_cheap) {
        const T* weight = static_cast<const T*>(a.cheap_weight) + (t.c0 + c) * a.cheap_weight_stride_c;
#pragma unroll
        for (int tap = 0; tap < kD * kD; ++tap) {
          taps[tap] = weight[tap / kD * a.cheap_weight_stride_h + tap % kD * a.cheap_weight_stride_w];
        }
      }
      norm = affine<T>(act, raw);
      if (is_cheap) {
#pragma unroll
        for (int tap = 0; tap < kD * kD; ++tap) cheap[tap * channels + c] = to_float(taps[tap]) * norm.scale;
      }
    }
    if (!is_cheap) to[c] = norm.scale;
    to[channels + c] = norm.shift;
    to[2 * channels + c] = norm.slope;
  }
}

// The padding: real zeros around each image in x1, so that the cheap conv needs no bounds. kPad rows lie between the
// images of a block; ``period`` counts from one to the next.
template <int kD>
__device__ __forceinline__ void zero_padding(const NhwcParams& p, const NhwcTile& t, unsigned char* x1) {
  constexpr int kPad = kD / 2;
  const NhwcPlan& plan = p.plan;
  const int pixel = plan.pitch / 8, per_row = plan.row_pixels * pixel, all_rows = kPad + plan.images * p.period.divisor;
  uint2* words = reinterpret_cast<uint2*>(x1);
  // A warp clears what lies between a row's pixels and those of the row before, and those pixels where there is none.
  for (int row = threadIdx.x / 32; row <= all_rows; row += blockDim.x / 32) {
    int below = row - t.first_row;
    if (plan.images > 1 && below > 0) below -= __umulhi(below, p.period.reciprocal) * p.period.divisor;
    const bool inside = below >= 0 && below < t.rows;
    const int begin = max(row * per_row - kPad * pixel, 0);
    const int end = min(row * per_row + (inside ? kPad * pixel : per_row - kPad * pixel), all_rows * per_row);
#pragma unroll 1
    for (int i = begin + static_cast<int>(threadIdx.x % 32); i < end; i += 32) words[i] = uint2{};
  }
}

// All of the above, while x is on its way.
template <Path kPath, int kTiles, int kD>
__device__ __forceinline__ void load(const NhwcParams& p, const NhwcTile& t, unsigned char* smem) {
  load_primary_weight<kPath, kTiles>(p, t, smem);
  load_channels<typename PathType<kPath>::T, kD>(p, t, p.plan.warps_n * kTiles * 16,
                                                 reinterpret_cast<float*>(smem + p.plan.affine_offset),
                                                 reinterpret_cast<float*>(smem + p.plan.cheap_offset));
  if constexpr (kD > 1) zero_padding<kD>(p, t, smem + p.plan.x1_offset);
}

}  // namespace ghostfused
