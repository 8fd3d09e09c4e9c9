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

// Adds up kCount numbers each of kRowLanes threads. At every step a thread keeps half of its numbers and gives the
// other half away: lane l ends with the sums from l * kCount / kRowLanes on, of which there is at least one.
template <int kCount, int kStep = kRowLanes / 2>
__device__ __forceinline__ void add_lanes(float* v) {
  if constexpr (kStep > 0 && kCount > 1) {
    constexpr int kHalf = kCount / 2;
    const bool upper = threadIdx.x & kStep;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float kept = upper ? v[i + kHalf] : v[i], given = upper ? v[i] : v[i + kHalf];
      v[i] = kept + __shfl_xor_sync(0xffffffffu, given, kStep);
    }
    add_lanes<kHalf, kStep / 2>(v);
  } else if constexpr (kStep > 0) {
    v[0] += __shfl_xor_sync(0xffffffffu, v[0], kStep);
    add_lanes<1, kStep / 2>(v);
  }
}

// kCount numbers of fp32 in shared memory, by vectors.
template <int kCount>
__device__ __forceinline__ void load_floats(float* v, const float* from) {
  constexpr int kV = kCount < 4 ? kCount : 4;
#pragma unroll
  for (int i = 0; i < kCount; i += kV) {
    Vector<float, kV> piece;
    piece.load(from + i);
#pragma unroll
    for (int e = 0; e < kV; ++e) v[i + e] = piece.at[e];
  }
}

// sums[g] += row · values[g] of kV columns.
template <typename T, int kV>
__device__ __forceinline__ void multiply_vector(float* sums, const T* row, const float (&values)[kMaxImages][kV]) {
  Vector<T, kV> w;
  w.load(row);
#pragma unroll
  for (int e = 0; e < kV; ++e) {
    const float weight = to_float(w.at[e]);
#pragma unroll
    for (int g = 0; g < kMaxImages; ++g) sums[g] = fmaf(weight, values[g][e], sums[g]);
  }
}

// Where pixel ``i`` of a plane lies.
__device__ __forceinline__ uint64_t pixel_offset(const SqueezeExciteKernelParams& p, int i) {
  if (p.plan.flat) return uint64_t{static_cast<uint32_t>(i)} * p.x.stride_w;
  const int h = i / p.args.width;
  return offset_in_image(p.x, 0, h, i - h * p.args.width);
}

// The means of ``channels`` neighbouring channels from x on, of all images of the block at once: each has as many of
// its threads. A thread has one vector of channels and every so many of the pixels [begin, end). ``partial``: kV
// numbers for each thread.
template <typename T, int kV>
__device__ __forceinline__ void mean_of_pixels(const SqueezeExciteKernelParams& p, const T* x, int images, int channels,
                                               int begin, int end, float* partial, float (*means)[kSqueezeC]) {
  const FastDivisor by_vectors(channels / kV);
  const int image_threads = p.plan.image_threads,
            image = static_cast<int>(threadIdx.x) * p.plan.images / kBottleneckThreads;
  const int id = threadIdx.x - image * image_threads, lanes = by_vectors.divide(image_threads);
  const int lane = by_vectors.divide(id), vector = id - lane * by_vectors.divisor;
  if (image < images && lane < lanes) {
    const T* from = x + image * p.x.stride_n + vector * kV;
    float acc[kV] = {};
#pragma unroll 4
    for (int i = begin + lane; i < end; i += lanes) {
      Vector<T, kV> v;
      v.load(from + pixel_offset(p, i));
#pragma unroll
      for (int e = 0; e < kV; ++e) acc[e] += to_float(v.at[e]);
    }
    constexpr int kStored = kV < 4 ? kV : 4;
    float* to = partial + (image * lanes + lane) * channels + vector * kV;
#pragma unroll
    for (int e = 0; e < kV; e += kStored) {
      Vector<float, kStored> piece;
#pragma unroll
      for (int k = 0; k < kStored; ++k) piece.at[k] = acc[e + k];
      piece.store(to + e);
    }
  }
  __syncthreads();  // all threads' sums are there
  const int g = threadIdx.x / kSqueezeC, c = threadIdx.x % kSqueezeC;
  static_assert(kMaxImages * kSqueezeC == kBottleneckThreads);
  float sum = 0.f;
  if (g < images && c < channels) {
#pragma unroll 8
    for (int i = 0; i < lanes; ++i) sum += partial[(g * lanes + i) * channels + c];
  }
  means[g][c] = sum / static_cast<float>(p.args.height * p.args.width);
}

// The same for planes: a warp has one channel of an image at a time, its threads every so many vectors of pixels.
template <typename T, int kV>
__device__ __forceinline__ void mean_of_planes(const SqueezeExciteKernelParams& p, const T* x, int images, int channels,
                                               int begin, int end, float (*means)[kSqueezeC]) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int plane = threadIdx.x / 32; plane < kMaxImages * kSqueezeC; plane += kBottleneckThreads / 32) {
    const int g = plane / kSqueezeC, c = plane % kSqueezeC;
    float sum = 0.f;
    if (g < images && c < channels) {
      const T* from = x + g * p.x.stride_n + uint64_t{static_cast<uint32_t>(c)} * p.x.stride_c;
#pragma unroll 4
      for (int i = begin + lane * kV; i < end; i += 32 * kV) {
        Vector<T, kV> v;
        v.load(from + pixel_offset(p, i));
#pragma unroll
        for (int e = 0; e < kV; ++e) sum += to_float(v.at[e]);
      }
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == 0) means[g][c] = sum / static_cast<float>(p.args.height * p.args.width);
  }
}

// The block's part of the hidden layer: its columns of the first matrix times the means, which a lane has in registers.
template <typename T, int kV>
__device__ __forceinline__ void reduce(const SqueezeExciteKernelParams& p, int n0, int images, int part, int c0,
                                       int channels, const float (*means)[kSqueezeC]) {
  constexpr int kVectors = kSqueezeC / kRowLanes / kV;  // of a lane
  const SqueezeExciteParams& a = p.args;
  const int lane = threadIdx.x % kRowLanes;
  float mean[kVectors][kMaxImages][kV];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int g = 0; g < kMaxImages; ++g) load_floats<kV>(mean[v][g], means[g] + (v * kRowLanes + lane) * kV);
  }
  const T* weight = static_cast<const T*>(a.reduce.data) + (c0 + lane * kV) * a.reduce.stride_col;
#pragma unroll 1
  for (int r0 = 0; r0 < a.reduced; r0 += kRowGroups) {
    const int r = r0 + threadIdx.x / kRowLanes;
    float sums[kMaxImages] = {};
    if (r < a.reduced) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int c = v * kRowLanes * kV;
        if (c + lane * kV < channels) {
          multiply_vector<T, kV>(sums, weight + r * a.reduce.stride_row + c * a.reduce.stride_col, mean[v]);
        }
      }
    }
    add_lanes<kMaxImages>(sums);
    const int g = lane / (kRowLanes / kMaxImages);
    if (lane % (kRowLanes / kMaxImages) == 0 && g < images && r < a.reduced) {
      p.parts[(int64_t{n0 + g} * p.plan.parts + part) * a.reduced + r] = sums[0];
    }
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
  const T* x = static_cast<const T*>(p.x.data) + n0 * p.x.stride_n + int64_t{c0} * p.x.stride_c;
  with_vector<T>(p.plan.x_vector, [&]<int kV>(Vector<T, kV>) {
    if constexpr (kChannelsAdjacent) {
      mean_of_pixels<T, kV>(p, x, images, channels, begin, end, partial, means);
    } else {
      mean_of_planes<T, kV>(p, x, images, channels, begin, end, means);
    }
  });
  __syncthreads();  // the means are there, and zeros of the images and channels that aren't
  with_vector<T>(p.plan.reduce_vector,
                 [&]<int kV>(Vector<T, kV>) { reduce<T, kV>(p, n0, images, part, c0, channels, means); });
}

__device__ __forceinline__ float apply_gate(Gate gate, float x) {
  if (gate == Gate::kSigmoid) return 1.f / (1.f + expf(-x));
  if (gate == Gate::kHardsigmoid) x += 3.f;
  x = x < 0.f ? 0.f : x;  // NaN stays
  x = x > 6.f ? 6.f : x;
  return gate == Gate::kHardsigmoid ? x * (1.f / 6.f) : x;
}

// Where column ``c`` of a tile of the hidden layer lies: a lane's eight are two vectors, of which neighbouring lanes
// have neighbouring ones.
__device__ __forceinline__ int hidden_column(int vector, int c) {
  constexpr int kColumns = 8 * kRowLanes;
  return vector == 8 ? c / kColumns * kColumns + (c & 4 ? kColumns / 2 : 0) + c % kColumns / 8 * 4 + c % 4 : c;
}

// sums[row][image] += the thread's share of ``count`` columns of its rows of the second matrix, times ``hidden``.
// ``row`` is the first of them, kRowGroups apart, and ``rows`` how many there are.
template <typename T, int kV>
__device__ __forceinline__ void expand(float (&sums)[kMaxExciteRows * kMaxImages], const T* row, const Matrix& m,
                                       int rows, int count, const float (*hidden)[kHiddenTile]) {
  const int lane = threadIdx.x % kRowLanes;
#pragma unroll 1
  for (int c = lane * kV; c < count; c += kRowLanes * kV) {
    float values[kMaxImages][kV];
#pragma unroll
    for (int g = 0; g < kMaxImages; ++g) {
      if constexpr (kV == 8) {
        const float* from = hidden[g] + hidden_column(8, c);
        load_floats<4>(values[g], from);
        load_floats<4>(values[g] + 4, from + 4 * kRowLanes);
      } else {
        load_floats<kV>(values[g], hidden[g] + c);
      }
    }
#pragma unroll
    for (int i = 0; i < kMaxExciteRows; ++i) {
      if (i < rows) {
        multiply_vector<T, kV>(sums + i * kMaxImages, row + i * kRowGroups * m.stride_row + c * m.stride_col, values);
      }
    }
  }
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
  const int first = c0 + threadIdx.x / kRowLanes, lane = threadIdx.x % kRowLanes;
  const int rows = (end - first + kRowGroups - 1) / kRowGroups;  // of the thread

  float sums[kMaxExciteRows * kMaxImages] = {};
#pragma unroll 1
  for (int r0 = 0; r0 < a.reduced; r0 += kHiddenTile) {
    const int count = min(kHiddenTile, a.reduced - r0);
    const FastDivisor by_count(count);
#pragma unroll 1
    for (int i = threadIdx.x; i < images * count; i += kBottleneckThreads) {
      const int g = by_count.divide(i), column = i - g * count, r = r0 + column;
      const float* parts = p.parts + int64_t{n0 + g} * p.plan.parts * a.reduced + r;
      float h[1] = {0.f};
#pragma unroll 4
      for (int part = 0; part < p.plan.parts; ++part, parts += a.reduced) h[0] += *parts;
      if (a.reduce_bias.data != nullptr) {
        h[0] += to_float(static_cast<const T*>(a.reduce_bias.data)[r * a.reduce_bias.stride]);
      }
      const float slope[1] = {1.f};
      activate<1, kPath == Path::kFloat32>(h, a.act, slope);
      hidden[g][hidden_column(p.plan.expand_vector, column)] = h[0];
    }
    __syncthreads();  // this tile of the hidden layer is there
    const T* row = static_cast<const T*>(a.expand.data) + first * a.expand.stride_row + r0 * a.expand.stride_col;
    with_vector<T>(p.plan.expand_vector,
                   [&]<int kV>(Vector<T, kV>) { expand<T, kV>(sums, row, a.expand, rows, count, hidden); });
    __syncthreads();  // and may be overwritten
  }
  add_lanes<kMaxExciteRows * kMaxImages>(sums);
  constexpr int kOwn = kMaxExciteRows * kMaxImages / kRowLanes;  // sums of a lane: some images of a row
  const int c = first + lane * kOwn / kMaxImages * kRowGroups;
  if (c >= end) return;
  float bias = 0.f;
  if (a.expand_bias.data != nullptr) {
    bias = to_float(static_cast<const T*>(a.expand_bias.data)[c * a.expand_bias.stride]);
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int g = lane * kOwn % kMaxImages + i;
    if (g < images) {
      static_cast<T*>(a.out)[int64_t{n0 + g} * a.channels + c] = from_float<T>(apply_gate(a.gate, sums[i] + bias));
    }
  }
}

}  // namespace ghostfused
