// A depthwise convolution with norm and activation, as one kernel: the stride-2 step of a bottleneck, the first half of
// a shortcut, the row and column filters of DFC attention.
//
// A block takes one image, block_c channels and block_p positions; a position is 4 neighbouring output columns
// (channels_last), or those of 8 input columns (NCHW). Weights, multiplied by the norm's scale, lie in shared memory; x
// comes through L1, where the rows of a window that a thread doesn't hold were read by its neighbours.
//
//   channels_last   a thread has one vector of channels; each pixel of its window is one load of up to 16 bytes
//   NCHW            a thread has one channel; its columns start where vectors do, and the window's rims are single
//                   loads
//   any             what the others aren't compiled for, and channels that make no vectors: single loads
#pragma once

#include "cuda/bottleneck/bottleneck.h"
#include "cuda/norm.cuh"
#include "cuda/vector.cuh"

namespace ghostfused {

constexpr int kDepthwiseColumns = 4;  // of output, in a position of channels_last and of the kernel for any
constexpr int kSpan = 8;              // columns of input that a position of NCHW starts with

// What a block works on: channels [c0, c0 + channels) and positions [first, first + positions) of image n.
struct DepthwiseBlock {
  int64_t n;
  int c0, channels, first, positions;
};

__device__ __forceinline__ DepthwiseBlock depthwise_block(const DepthwiseKernelParams& p) {
  const DepthwisePlan& plan = p.plan;
  unsigned b = blockIdx.x;
  DepthwiseBlock t;
  t.c0 = b % plan.channel_blocks * plan.block_c;
  b /= plan.channel_blocks;
  t.first = b % plan.position_blocks * plan.block_p;
  t.n = b / plan.position_blocks;
  t.channels = min(plan.block_c, p.args.channels - t.c0);
  t.positions = min(plan.block_p, p.args.out_height * plan.row_groups - t.first);
  return t;
}

// Where channel ``c`` of a block lies in a tap's row of weights. A thread's eight channels are two vectors, of which
// neighbouring threads have neighbouring ones: the first fours of all, then the second ones.
__device__ __forceinline__ int weight_column(const DepthwisePlan& plan, int c) {
  return plan.split_weights ? c / 8 * 4 + c % 4 + (c & 4 ? plan.block_c / 2 : 0) : c;
}

// In shared memory: the weights as [tap][weight_column], multiplied by scale; then [shift | slope | scale].
struct DepthwiseParameters {
  float *weights, *shift, *slope, *scale;
  __device__ __forceinline__ DepthwiseParameters(float* smem, const DepthwiseKernelParams& p)
      : weights(smem),
        shift(weights + p.args.kernel_h * p.args.kernel_w * p.plan.block_c),
        slope(shift + p.plan.block_c),
        scale(slope + p.plan.block_c) {}
};

template <typename T, int kW>
__device__ __forceinline__ void load_parameters(const DepthwiseKernelParams& p, const DepthwiseBlock& t,
                                                const DepthwiseParameters& out) {
  for (int c = threadIdx.x; c < t.channels; c += blockDim.x) {
    const Affine a = affine<T>(p.args.norm, t.c0 + c);
    out.scale[c] = a.scale;
    out.shift[c] = a.shift;
    out.slope[c] = a.slope;
  }
  __syncthreads();  // the scales are there
  const T* weight = static_cast<const T*>(p.args.weight) + t.c0 * p.args.weight_stride_c;
  const int columns = kW > 0 ? kW : p.args.kernel_w, taps = p.args.kernel_h * columns;
  const FastDivisor by_channels(t.channels);
#pragma unroll 1
  for (int i = threadIdx.x; i < t.channels * taps; i += blockDim.x) {
    const int tap = by_channels.divide(i), c = i - tap * t.channels, kh = tap / columns, kw = tap - kh * columns;
    const float w =
        to_float(weight[c * p.args.weight_stride_c + kh * p.args.weight_stride_h + kw * p.args.weight_stride_w]);
    out.weights[tap * p.plan.block_c + weight_column(p.plan, c)] = out.scale[c] * w;
  }
}

// Adds column ``i`` of a window's row to the sums of those output columns that it belongs to.
template <int kW, int kStride, int kColumns, int kV>
__device__ __forceinline__ void add_column(float (&sums)[kColumns][kV], const float (&w)[kW][kV], int i,
                                           const float (&x)[kV]) {
#pragma unroll
  for (int col = 0; col < kColumns; ++col) {
    const int kw = i - col * kStride;
    if (kw >= 0 && kw < kW) {
#pragma unroll
      for (int e = 0; e < kV; ++e) sums[col][e] = fmaf(x[e], w[kw][e], sums[col][e]);
    }
  }
}

// Calls row(kh, h) for the window's rows inside the image.
template <typename F>
__device__ __forceinline__ void for_each_row(const DepthwiseParams& a, int oh, F row) {
  const int top = oh * a.stride - a.kernel_h / 2;
  const int begin = max(0, -top), end = min(a.kernel_h, a.height - top);
#pragma unroll 1
  for (int kh = begin; kh < end; ++kh) row(kh, top + kh);
}

template <Path kPath, typename T, int kW, int kStride, int kV>
__device__ __forceinline__ void conv_channels_last(const DepthwiseKernelParams& p, const DepthwiseBlock& t,
                                                   const DepthwiseParameters& in) {
  constexpr int kColumns = kDepthwiseColumns, kWindow = (kColumns - 1) * kStride + kW;
  constexpr int kQuarter = kV < 4 ? kV : 4;  // a vector of weights
  const DepthwiseParams& a = p.args;
  const ThreadShare share = ThreadShare::of<true>(t.channels / kV, t.positions);
  const int c = share.vector * kV;
  const T* x = static_cast<const T*>(p.x.data) + t.n * p.x.stride_n + t.c0 + c;
  T* out = static_cast<T*>(p.out.data) + t.n * p.out.stride_n + t.c0 + c;
  for (int i = share.first; i < t.positions; i += share.step) {
    const int position = t.first + i, oh = position / p.plan.row_groups;
    const int ow = (position - oh * p.plan.row_groups) * kColumns, left = ow * kStride - kW / 2;
    float sums[kColumns][kV] = {};
    // bit j: column j of the window is in the image
    const uint32_t inside = (1u << min(kWindow, a.width - left)) - (1u << max(0, -left));
    for_each_row(a, oh, [&](int kh, int h) {
      float w[kW][kV];
#pragma unroll
      for (int kw = 0; kw < kW; ++kw) {
        const float* row = in.weights + (kh * kW + kw) * p.plan.block_c + (kV == 8 ? c / 2 : c);
#pragma unroll
        for (int e = 0; e < kV; e += kQuarter) {
          Vector<float, kQuarter> four;
          four.load(row + (e > 0 ? p.plan.block_c / 2 : 0));
#pragma unroll
          for (int k = 0; k < kQuarter; ++k) w[kw][e + k] = four.at[k];
        }
      }
      const T* pixel = x + int64_t{h} * p.x.stride_h + int64_t{left} * p.x.stride_w;
#pragma unroll
      for (int j = 0; j < kWindow; ++j, pixel += p.x.stride_w) {
        Vector<T, kV> x_pixel;
        if (inside & 1u << j) x_pixel.load(pixel);
        float v[kV];
#pragma unroll
        for (int e = 0; e < kV; ++e) v[e] = to_float(x_pixel.at[e]);
        add_column<kW, kStride>(sums, w, j, v);
      }
    });
    float slope[kV];
#pragma unroll
    for (int e = 0; e < kV; ++e) {
      slope[e] = in.slope[c + e];
      const float shift = in.shift[c + e];
#pragma unroll
      for (int col = 0; col < kColumns; ++col) sums[col][e] += shift;
    }
    activate_rows<kPath == Path::kFloat32>(sums, a.norm.act, slope);
#pragma unroll
    for (int col = 0; col < kColumns; ++col) {
      if (ow + col < a.out_width) {
        Vector<T, kV> y;
#pragma unroll
        for (int e = 0; e < kV; ++e) y.at[e] = from_float<T>(sums[col][e]);
        y.store(out + offset_in_image(p.out, 0, oh, ow + col));
      }
    }
  }
}

// Columns [w, w + kCount) of the row at x, zero beyond the image, in vectors that lie inside or outside as a whole.
template <typename T, int kCount, int kV>
__device__ __forceinline__ void load_columns(float* v, const T* x, int w, int width, uint32_t stride_w) {
#pragma unroll
  for (int i = 0; i < kCount; i += kV) {
    Vector<T, kV> piece;
    if (w + i >= 0 && w + i < width) piece.load(x + int64_t{w + i} * stride_w);
#pragma unroll
    for (int e = 0; e < kV; ++e) v[i + e] = to_float(piece.at[e]);
  }
}

template <Path kPath, typename T, int kW, int kStride>
__device__ __forceinline__ void conv_planes(const DepthwiseKernelParams& p, const DepthwiseBlock& t,
                                            const DepthwiseParameters& in) {
  constexpr int kColumns = kSpan / kStride, kWindow = (kColumns - 1) * kStride + kW, kPad = kW / 2;
  constexpr int kRight = kWindow - kPad > kSpan ? kWindow - kPad - kSpan : 0;
  const DepthwiseParams& a = p.args;
  const ThreadShare share = ThreadShare::of<false>(t.channels, t.positions);
  const int c = share.vector;
  const T* x = static_cast<const T*>(p.x.data) + t.n * p.x.stride_n + int64_t{t.c0 + c} * p.x.stride_c;
  T* out = static_cast<T*>(p.out.data) + t.n * p.out.stride_n + int64_t{t.c0 + c} * p.out.stride_c;
  for (int i = share.first; i < t.positions; i += share.step) {
    const int position = t.first + i, oh = position / p.plan.row_groups;
    const int group = position - oh * p.plan.row_groups, w0 = group * kSpan, ow = group * kColumns;
    float sums[kColumns][1] = {};
    for_each_row(a, oh, [&](int kh, int h) {
      float w[kW][1];
#pragma unroll
      for (int kw = 0; kw < kW; ++kw) w[kw][0] = in.weights[(kh * kW + kw) * p.plan.block_c + c];
      const T* row = x + int64_t{h} * p.x.stride_h;
      float window[kPad + kSpan + kRight];
      load_columns<T, kPad, 1>(window, row, w0 - kPad, a.width, p.x.stride_w);
      with_vector<T>(p.plan.x_vector, [&]<int kV>(Vector<T, kV>) {
        load_columns<T, kSpan, kV>(window + kPad, row, w0, a.width, p.x.stride_w);
      });
      load_columns<T, kRight, 1>(window + kPad + kSpan, row, w0 + kSpan, a.width, p.x.stride_w);
#pragma unroll
      for (int j = 0; j < kWindow; ++j) {
        const float v[1] = {window[j]};
        add_column<kW, kStride>(sums, w, j, v);
      }
    });
    float y[kColumns], slope[kColumns];
#pragma unroll
    for (int col = 0; col < kColumns; ++col) {
      y[col] = sums[col][0] + in.shift[c];
      slope[col] = in.slope[c];
    }
    activate<kColumns, kPath == Path::kFloat32>(y, a.norm.act, slope);
    T* row = out + int64_t{oh} * p.out.stride_h;
    with_vector<T>(p.plan.out_vector, [&]<int kV>(Vector<T, kV>) {
      if constexpr (kV <= kColumns) {
#pragma unroll
        for (int col = 0; col < kColumns; col += kV) {
          if (ow + col < a.out_width) {
            Vector<T, kV> v;
#pragma unroll
            for (int e = 0; e < kV; ++e) v.at[e] = from_float<T>(y[col + e]);
            v.store(row + ow + col);
          }
        }
      }
    });
  }
}

template <Path kPath, typename T>
__device__ __forceinline__ void conv_any(const DepthwiseKernelParams& p, const DepthwiseBlock& t,
                                         const DepthwiseParameters& in) {
  constexpr int kColumns = kDepthwiseColumns;
  const DepthwiseParams& a = p.args;
  const ThreadShare share = a.channels_last ? ThreadShare::of<true>(t.channels, t.positions)
                                            : ThreadShare::of<false>(t.channels, t.positions);
  const int c = share.vector;
  const T* x = static_cast<const T*>(p.x.data) + t.n * p.x.stride_n + uint64_t{p.x.stride_c} * (t.c0 + c);
  T* out = static_cast<T*>(p.out.data) + t.n * p.out.stride_n + uint64_t{p.out.stride_c} * (t.c0 + c);
  for (int i = share.first; i < t.positions; i += share.step) {
    const int position = t.first + i, oh = position / p.plan.row_groups;
    const int ow = (position - oh * p.plan.row_groups) * kColumns, left = ow * a.stride - a.kernel_w / 2;
    float sums[kColumns] = {}, slope[kColumns];
    for_each_row(a, oh, [&](int kh, int h) {
      const T* row = x + uint64_t{p.x.stride_h} * h;
#pragma unroll 1
      for (int kw = 0; kw < a.kernel_w; ++kw) {
        const float weight = in.weights[(kh * a.kernel_w + kw) * p.plan.block_c + c];
#pragma unroll
        for (int col = 0; col < kColumns; ++col) {
          const int w = left + col * a.stride + kw;
          if (w >= 0 && w < a.width) sums[col] = fmaf(to_float(row[uint64_t{p.x.stride_w} * w]), weight, sums[col]);
        }
      }
    });
#pragma unroll
    for (int col = 0; col < kColumns; ++col) {
      sums[col] += in.shift[c];
      slope[col] = in.slope[c];
    }
    activate<kColumns, kPath == Path::kFloat32>(sums, a.norm.act, slope);
#pragma unroll
    for (int col = 0; col < kColumns; ++col) {
      if (ow + col < a.out_width) out[offset_in_image(p.out, 0, oh, ow + col)] = from_float<T>(sums[col]);
    }
  }
}

// kW = 0: any number of columns, stride and layout.
template <Path kPath, int kW, int kStride, bool kChannelsLast>
__global__ void __launch_bounds__(kBottleneckThreads, kW > 0 && kStride == 1 && !kChannelsLast ? 3 : 2)
    depthwise_conv(const __grid_constant__ DepthwiseKernelParams p) {
  using T = typename PathType<kPath>::T;
  extern __shared__ __align__(16) float depthwise_smem[];
  const DepthwiseBlock t = depthwise_block(p);
  const DepthwiseParameters parameters(depthwise_smem, p);
  load_parameters<T, kW>(p, t, parameters);
  __syncthreads();  // the parameters are there
  if constexpr (kW == 0) {
    conv_any<kPath, T>(p, t, parameters);
  } else if constexpr (kChannelsLast) {
    constexpr int kFull = 16 / sizeof(T);
    if (p.plan.x_vector == kFull) {
      conv_channels_last<kPath, T, kW, kStride, kFull>(p, t, parameters);
    } else {
      conv_channels_last<kPath, T, kW, kStride, kFull / 2>(p, t, parameters);
    }
  } else {
    conv_planes<kPath, T, kW, kStride>(p, t, parameters);
  }
}

}  // namespace ghostfused
