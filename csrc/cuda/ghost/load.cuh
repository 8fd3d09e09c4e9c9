// Global to shared memory: x and the 1×1 weights through the cp.async pipeline, parameters once.
#pragma once

#include "cuda/ghost/primary.cuh"
#include "cuda/ghost/tile.cuh"
#include "cuda/norm.cuh"

namespace ghostfused {

// Calls f(i, copy) for this thread's share of ``count`` vectors; copy(offset, source, valid bytes) fills one of
// ``stage``. cp.async can't copy 2 bytes, so those go through a register, a few at a time; the barrier before the stage
// is read covers both ways.
template <typename F>
__device__ __forceinline__ void for_each_vector(int count, int bytes, unsigned char* stage, F f) {
  if (bytes == 2) {
#pragma unroll 4
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      f(i, [stage](int offset, const void* src, int valid) {
        *reinterpret_cast<uint16_t*>(stage + offset) = valid > 0 ? *static_cast<const uint16_t*>(src) : uint16_t{0};
      });
    }
  } else {
    const uint32_t address = smem_address(stage);
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      f(i, [=](int offset, const void* src, int valid) { cp_async(address + offset, src, bytes, valid); });
    }
  }
}

// Halo pixels [m0, m0 + block_m) × input channels [k0, k0 + block_k) of image ``x``, as [pixel][k] for channels_last
// and [k][pixel] for NCHW. K beyond Cin is zero; rows of pixels beyond the halo stay as they are, and nobody reads x1
// there.
template <typename T, bool kChannelsLast>
__device__ __forceinline__ void load_x(const KernelParams& p, const BlockTile& t, const FastDivisor& halo_cols,
                                       unsigned char* stage, const T* x, int m0, int k0, int block_m) {
  const int bytes = p.width.x, count = bytes / static_cast<int>(sizeof(T));
  const int pixels = min(block_m, t.pixels - m0);
  const int per_row = kChannelsLast ? p.plan.block_k / count : (pixels + count - 1) / count;
  const int vectors = (kChannelsLast ? pixels : p.plan.block_k) * per_row;
  const FastDivisor by_row = kChannelsLast ? FastDivisor(p.x_row) : FastDivisor(per_row);
  for_each_vector(vectors, bytes, stage, [&](int i, auto copy) {
    const int row = by_row.divide(i), col = (i - row * per_row) * count;
    const int m = m0 + (kChannelsLast ? row : col), k = k0 + (kChannelsLast ? col : row);
    const int left = kChannelsLast ? p.args.shape.in_channels - k : k < p.args.shape.in_channels ? t.pixels - m : 0;
    const int valid = max(0, min(left, count)) * static_cast<int>(sizeof(T));
    const int h = halo_cols.divide(m), w = m - h * t.halo_cols;
    const T* src = x + offset_in_image(p.x, k, t.halo_h0 + h, t.halo_w0 + w);
    copy(row * p.plan.a_pitch + col * static_cast<int>(sizeof(T)), valid > 0 ? src : x, valid);
  });
}

// 1×1 weights of the block's channels × [k0, k0 + block_k), as [channel][k], zero outside.
template <typename T>
__device__ __forceinline__ void load_primary_weight(const KernelParams& p, const BlockTile& t, unsigned char* stage,
                                                    int k0) {
  const int bytes = p.width.primary_weight, count = bytes / static_cast<int>(sizeof(T));
  const int per_row = p.plan.block_k / count;
  const T* weight = static_cast<const T*>(p.args.primary_weight);
  const FastDivisor by_row(p.weight_row);
  for_each_vector(p.plan.block_c * per_row, bytes, stage, [&](int i, auto copy) {
    const int row = by_row.divide(i), col = (i - row * per_row) * count;
    const int left = row < t.channels ? p.args.shape.in_channels - k0 - col : 0;
    const int valid = max(0, min(left, count)) * static_cast<int>(sizeof(T));
    const T* src = weight + (t.c0 + row) * p.args.primary_weight_stride_n + (k0 + col) * p.args.primary_weight_stride_k;
    copy(row * p.plan.w_pitch + col * static_cast<int>(sizeof(T)), valid > 0 ? src : weight, valid);
  });
}

// [scale | shift | slope] of the block's init channels, zero for those beyond the last.
template <typename T>
__device__ __forceinline__ void load_primary_affine(const KernelParams& p, const BlockTile& t, float* out) {
  const int block_c = p.plan.block_c;
  for (int c = threadIdx.x; c < block_c; c += blockDim.x) {
    const Affine a = c < t.channels ? affine<T>(p.args.primary, t.c0 + c) : Affine{0.f, 0.f, 0.f};
    out[c] = a.scale;
    out[block_c + c] = a.shift;
    out[2 * block_c + c] = a.slope;
  }
}

// A group of new channels: [shift | slope], and the weights as [tap][channel], in fp32 and already multiplied by the
// norm's scale, so that the depthwise conv ends with shift and activation.
template <typename T, int kD>
__device__ __forceinline__ void load_cheap(const KernelParams& p, const BlockTile& t, int group, float* affines,
                                           float* weights) {
  const NewChannels g = new_channels<kD>(p, t, group);
  if (g.count == 0) return;  // sliced off
  const int block_c = p.plan.block_c, d = kD > 0 ? kD : p.args.shape.dw_size;
  const T* weight = static_cast<const T*>(p.args.cheap_weight);
  for (int i = threadIdx.x; i < block_c * d * d; i += blockDim.x) {
    const int c = i / (d * d), tap = i - c * (d * d), kh = tap / d, kw = tap - kh * d;
    Affine a{0.f, 0.f, 0.f};
    float w = 0.f;
    if (c < g.count) {
      a = affine<T>(p.args.cheap, g.first + c);
      w = a.scale * to_float(weight[(g.first + c) * p.args.cheap_weight_stride_c + kh * p.args.cheap_weight_stride_h +
                                    kw * p.args.cheap_weight_stride_w]);
    }
    weights[tap * block_c + c] = w;
    if (tap == 0) {
      affines[c] = a.shift;
      affines[block_c + c] = a.slope;
    }
  }
}

// The image's gate in x's type, zero beyond Cin.
template <typename T>
__device__ __forceinline__ void load_input_gate(const KernelParams& p, const BlockTile& t, T* out) {
  const T* gate = static_cast<const T*>(p.args.input_gate) + int64_t{t.n} * p.args.input_gate_stride_n;
  for (int k = threadIdx.x; k < p.plan.k_chunks * p.plan.block_k; k += blockDim.x) {
    out[k] = k < p.args.shape.in_channels ? gate[k * p.args.input_gate_stride_c] : from_float<T>(0.f);
  }
}

}  // namespace ghostfused
