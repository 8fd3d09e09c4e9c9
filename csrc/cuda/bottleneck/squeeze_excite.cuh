// A squeeze-and-excite block's gate in two kernels.
//
//   squeeze   a block takes the mean of 64 channels over a chunk of pixels, for a few images, and multiplies it by its
//             columns of the first matrix at once. The product is linear, so the blocks' parts have only to be added.
//   excite    a block adds up the parts in one order, applies the activation, and multiplies by its rows of the second
//             matrix.
//
// So each matrix is read once per group of images, by blocks all over the device, and no block waits for another. Every
// sum is made in a fixed order; there are no atomics.
#pragma once

#include "cuda/activation.cuh"
#include "cuda/bottleneck/bottleneck.h"
#include "cuda/vector.cuh"

namespace ghostfused {

constexpr int kRowLanes = 8;  // threads that share a row of a matrix
constexpr int kRowGroups = kBottleneckThreads / kRowLanes;
constexpr int kHiddenTile = kBottleneckThreads;  // numbers of the hidden layer in shared memory, per image

// Adds the products of kRowLanes threads; all get the sum.
__device__ __forceinline__ float add_lanes(float v) {
#pragma unroll
  for (int lane = 1; lane < kRowLanes; lane *= 2) v += __shfl_xor_sync(0xffffffffu, v, lane);
  return v;
}

// sums[g] += row · values[g] for the thread's share of ``count`` columns; ``values`` has a row of kPitch per image.
template <typename T, int kV, int kPitch>
__device__ __forceinline__ void multiply_row(float (&sums)[kMaxImages], const T* row, int64_t stride, int count,
                                             const float (*values)[kPitch]) {
#pragma unroll 1
  for (int c = threadIdx.x % kRowLanes * kV; c < count; c += kRowLanes * kV) {
    Vector<T, kV> w;
    w.load(row + c * stride);
#pragma unroll
    for (int e = 0; e < kV; ++e) {
      const float weight = to_float(w.at[e]);
#pragma unroll
      for (int g = 0; g < kMaxImages; ++g) sums[g] = fmaf(weight, values[g][c + e], sums[g]);
    }
  }
}

// Where pixel ``i`` of a plane lies.
__device__ __forceinline__ uint64_t pixel_offset(const SqueezeExciteKernelParams& p, int i) {
  if (p.plan.flat) return uint64_t{static_cast<uint32_t>(i)} * p.x.stride_w;
  const int h = i / p.args.width;
  return offset_in_image(p.x, 0, h, i - h * p.args.width);
}

// The sums of ``channels`` neighbouring channels from x on over pixels [begin, end), to ``sums``; by all threads. A
// thread has one vector of channels and every so many pixels. ``partial``: kV numbers for each thread.
template <typename T, int kV>
__device__ __forceinline__ void sum_pixels(const SqueezeExciteKernelParams& p, const T* x, int channels, int begin,
                                           int end, float* partial, float* sums) {
  const ThreadShare share = ThreadShare::of<true>(channels / kV, end - begin);
  float acc[kV] = {};
#pragma unroll 4
  for (int i = begin + share.first; i < end; i += share.step) {
    Vector<T, kV> v;
    v.load(x + share.vector * kV + pixel_offset(p, i));
#pragma unroll
    for (int e = 0; e < kV; ++e) acc[e] += to_float(v.at[e]);
  }
  const int lane = threadIdx.x / (channels / kV);
  if (lane < share.step) {
#pragma unroll
    for (int e = 0; e < kV; ++e) partial[lane * channels + share.vector * kV + e] = acc[e];
  }
  __syncthreads();  // all threads' sums are there
  for (int c = threadIdx.x; c < channels; c += blockDim.x) {
    float sum = 0.f;
#pragma unroll 8
    for (int i = 0; i < share.step; ++i) sum += partial[i * channels + c];
    sums[c] = sum;
  }
  __syncthreads();  // and may be overwritten
}

// The same for planes: a warp has one channel at a time, its threads every so many vectors of pixels.
template <typename T, int kV>
__device__ __forceinline__ void sum_planes(const SqueezeExciteKernelParams& p, const T* x, int channels, int begin,
                                           int end, float* sums) {
  const int lane = threadIdx.x % 32;
  for (int c = threadIdx.x / 32; c < channels; c += blockDim.x / 32) {
    const T* plane = x + uint64_t{static_cast<uint32_t>(c)} * p.x.stride_c;
    float sum = 0.f;
#pragma unroll 4
    for (int i = begin + lane * kV; i < end; i += 32 * kV) {
      Vector<T, kV> v;
      v.load(plane + pixel_offset(p, i));
#pragma unroll
      for (int e = 0; e < kV; ++e) sum += to_float(v.at[e]);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == 0) sums[c] = sum;
  }
}

template <Path kPath, bool kChannelsAdjacent>
__global__ void __launch_bounds__(kBottleneckThreads, 3) squeeze(const __grid_constant__ SqueezeExciteKernelParams p) {
  using T = typename PathType<kPath>::T;
  __shared__ __align__(16) float means[kMaxImages][kSqueezeC];
  __shared__ __align__(16) float partial[kChannelsAdjacent ? kBottleneckThreads * 16 / sizeof(T) : 1];
  const SqueezeExciteParams& a = p.args;
  const int part = blockIdx.x % p.plan.parts, n0 = blockIdx.x / p.plan.parts * p.plan.images;
  const int images = min(p.plan.images, a.batch - n0);
  const int c0 = part % p.plan.channel_blocks * kSqueezeC, channels = min(kSqueezeC, a.channels - c0);
  const int pixels = a.height * a.width, begin = part / p.plan.channel_blocks * p.plan.chunk;
  const int end = min(begin + p.plan.chunk, pixels);
  for (int i = threadIdx.x; i < kMaxImages * kSqueezeC; i += blockDim.x) means[i / kSqueezeC][i % kSqueezeC] = 0.f;
  __syncthreads();  // zero, also for images that aren't there
  for (int g = 0; g < images; ++g) {
    const T* x = static_cast<const T*>(p.x.data) + (n0 + g) * p.x.stride_n + int64_t{c0} * p.x.stride_c;
    with_vector<T>(p.plan.x_vector, [&]<int kV>(Vector<T, kV>) {
      if constexpr (kChannelsAdjacent) {
        sum_pixels<T, kV>(p, x, channels, begin, end, partial, means[g]);
      } else {
        sum_planes<T, kV>(p, x, channels, begin, end, means[g]);
      }
    });
  }
  __syncthreads();  // the sums are there
  const float count = static_cast<float>(pixels);
  for (int i = threadIdx.x; i < kMaxImages * kSqueezeC; i += blockDim.x) means[i / kSqueezeC][i % kSqueezeC] /= count;
  __syncthreads();  // and the means

  const int lane = threadIdx.x % kRowLanes;
  for (int r0 = 0; r0 < a.reduced; r0 += kRowGroups) {
    const int r = r0 + threadIdx.x / kRowLanes;
    float sums[kMaxImages] = {};
    if (r < a.reduced) {
      const T* row = static_cast<const T*>(a.reduce.data) + r * a.reduce.stride_row + c0 * a.reduce.stride_col;
      with_vector<T>(p.plan.reduce_vector, [&]<int kV>(Vector<T, kV>) {
        multiply_row<T, kV, kSqueezeC>(sums, row, a.reduce.stride_col, channels, means);
      });
    }
#pragma unroll
    for (int g = 0; g < kMaxImages; ++g) {
      const float sum = add_lanes(sums[g]);
      if (lane == g && g < images && r < a.reduced) {
        p.parts[(int64_t{n0 + g} * p.plan.parts + part) * a.reduced + r] = sum;
      }
    }
  }
}

__device__ __forceinline__ float apply_gate(Gate gate, float x) {
  if (gate == Gate::kSigmoid) return 1.f / (1.f + expf(-x));
  if (gate == Gate::kHardsigmoid) x += 3.f;
  x = x < 0.f ? 0.f : x;  // NaN stays
  x = x > 6.f ? 6.f : x;
  return gate == Gate::kHardsigmoid ? x * (1.f / 6.f) : x;
}

template <Path kPath>
__global__ void __launch_bounds__(kBottleneckThreads, kStepsApart ? 2 : 3)
    excite(const __grid_constant__ SqueezeExciteKernelParams p) {
  using T = typename PathType<kPath>::T;
  __shared__ __align__(16) float hidden[kMaxImages][kHiddenTile];
  const SqueezeExciteParams& a = p.args;
  const int blocks = (a.channels + p.plan.excite_c - 1) / p.plan.excite_c;
  const int n0 = blockIdx.x / blocks * p.plan.images, images = min(p.plan.images, a.batch - n0);
  const int c0 = blockIdx.x % blocks * p.plan.excite_c, end = min(c0 + p.plan.excite_c, a.channels);
  const int group = threadIdx.x / kRowLanes, lane = threadIdx.x % kRowLanes;

  float sums[kMaxExciteRows][kMaxImages] = {};
  for (int r0 = 0; r0 < a.reduced; r0 += kHiddenTile) {
    const int r = r0 + threadIdx.x;
#pragma unroll
    for (int g = 0; g < kMaxImages; ++g) {
      float h[1] = {0.f};
      if (g < images && r < a.reduced) {
        const float* parts = p.parts + int64_t{n0 + g} * p.plan.parts * a.reduced + r;
#pragma unroll 4
        for (int part = 0; part < p.plan.parts; ++part) h[0] += parts[int64_t{part} * a.reduced];
        if (a.reduce_bias.data != nullptr) {
          h[0] += to_float(static_cast<const T*>(a.reduce_bias.data)[r * a.reduce_bias.stride]);
        }
        const float slope[1] = {1.f};
        activate<1, kPath == Path::kFloat32>(h, a.act, slope);
      }
      hidden[g][threadIdx.x] = h[0];
    }
    __syncthreads();  // this tile of the hidden layer is there
#pragma unroll
    for (int i = 0; i < kMaxExciteRows; ++i) {
      const int c = c0 + i * kRowGroups + group;
      if (c < end) {
        const T* row = static_cast<const T*>(a.expand.data) + c * a.expand.stride_row + r0 * a.expand.stride_col;
        with_vector<T>(p.plan.expand_vector, [&]<int kV>(Vector<T, kV>) {
          multiply_row<T, kV, kHiddenTile>(sums[i], row, a.expand.stride_col, min(kHiddenTile, a.reduced - r0), hidden);
        });
      }
    }
    __syncthreads();  // and may be overwritten
  }
#pragma unroll
  for (int i = 0; i < kMaxExciteRows; ++i) {
    const int c = c0 + i * kRowGroups + group;
#pragma unroll
    for (int g = 0; g < kMaxImages; ++g) {
      float y = add_lanes(sums[i][g]);
      if (lane == g && g < images && c < end) {
        if (a.expand_bias.data != nullptr) {
          y += to_float(static_cast<const T*>(a.expand_bias.data)[c * a.expand_bias.stride]);
        }
        static_cast<T*>(a.out)[int64_t{n0 + g} * a.channels + c] = from_float<T>(apply_gate(a.gate, y));
      }
    }
  }
}

}  // namespace ghostfused
