// The cheap operation: a depthwise conv over x1 in shared memory, norm and activation; the result is staged there too.
#pragma once

#include "cuda/activation.cuh"
#include "cuda/ghost/tile.cuh"

namespace ghostfused {

// Channels per thread: as many as leave the weights (d * d * channels) in registers.
template <int kD>
constexpr int kCheapChannels = kD == 3 ? 4 : 2;

// Where a thread finds x1 and leaves x2.
struct CheapOperands {
  const unsigned char* x1;  // [halo pixel][channel], rows of plan.x1_pitch bytes
  const float *affines, *weights;
  unsigned char* staging;  // channels_last: [tile pixel][channel]; NCHW: [channel][tile pixel]
  NewChannels channels;
};

template <typename T, int kV>
__device__ __forceinline__ void load_x1(float (&v)[kV], const unsigned char* p) {
  Vector<T, kV> x;
  x.load(p);
#pragma unroll
  for (int i = 0; i < kV; ++i) v[i] = to_float(x.at[i]);
}

// Stages neighbouring channels of one tile pixel at ``p``; in NCHW they lie ``pitch`` apart.
template <typename T, int kV, bool kChannelsLast>
__device__ __forceinline__ void stage(unsigned char* p, int pitch, const float (&v)[kV]) {
  if constexpr (kChannelsLast) {
    Vector<T, kV> x;
#pragma unroll
    for (int i = 0; i < kV; ++i) x.at[i] = from_float<T>(v[i]);
    x.store(p);
  } else {
#pragma unroll
    for (int i = 0; i < kV; ++i) *reinterpret_cast<T*>(p + i * pitch) = from_float<T>(v[i]);
  }
}

// kD = 3: ratio 2 and a 3×3 kernel, unrolled. kD = 0: any size and ratio.
template <Path kPath, typename T, int kD, bool kChannelsLast>
__device__ __forceinline__ void cheap(const KernelParams& p, const BlockTile& t, const CheapOperands& op) {
  constexpr int kV = kCheapChannels<kD>;
  const GhostShape& s = p.args.shape;
  const int block_c = p.plan.block_c, x1_pitch = p.plan.x1_pitch, row_pitch = t.halo_cols * x1_pitch;
  const int strips = (t.rows + p.plan.strip_h - 1) / p.plan.strip_h, positions = strips * t.cols;
  const ThreadShare share = ThreadShare::of<kChannelsLast>((op.channels.count + kV - 1) / kV, positions);
  if (share.first >= positions) return;
  const int c = share.vector * kV;
  const float *affines = op.affines + c, *weights = op.weights + c;

  const int pitch = p.plan.staging_pitch, element = sizeof(T);
  const int pixel_pitch = kChannelsLast ? pitch : element, channel_pitch = kChannelsLast ? element : pitch;
  const auto emit = [&](float (&y)[kV], unsigned char* out) {
    float slope[kV];
#pragma unroll
    for (int i = 0; i < kV; ++i) {
      y[i] += affines[i];
      slope[i] = affines[block_c + i];
    }
    activate<kV, kPath == Path::kFloat32>(y, p.args.cheap.act, slope);
    stage<T, kV, kChannelsLast>(out, pitch, y);
  };

  float w[kD > 0 ? kD * kD : 1][kV];
  if constexpr (kD > 0) {
#pragma unroll
    for (int tap = 0; tap < kD * kD; ++tap) {
#pragma unroll
      for (int i = 0; i < kV; ++i) w[tap][i] = weights[tap * block_c + i];
    }
  }
  for (int position = share.first; position < positions; position += share.step) {
    const int strip = position / t.cols, col = position - strip * t.cols;
    const int first = t.h0 + strip * p.plan.strip_h, end = min(first + p.plan.strip_h, t.h0 + t.rows);
    unsigned char* out = op.staging + ((first - t.h0) * t.cols + col) * pixel_pitch + c * channel_pitch;
    if constexpr (kD > 0) {
      const int left = t.w0 + col - kD / 2;
      const unsigned char* row = op.x1 + (first - kD / 2 - t.halo_h0) * row_pitch + (left - t.halo_w0) * x1_pitch +
                                 c * static_cast<int>(sizeof(T));
      // Sliding down, row h adds to the kD output rows that it touches: sums[0] is the oldest and complete after it.
      float sums[kD][kV] = {};
#pragma unroll 1
      for (int h = first - kD / 2; h < end + kD / 2; ++h, row += row_pitch) {
        const bool inside = h >= 0 && h < s.height;
#pragma unroll
        for (int kw = 0; kw < kD; ++kw) {
          float v[kV] = {};
          if (inside && left + kw >= 0 && left + kw < s.width) load_x1<T>(v, row + kw * x1_pitch);
#pragma unroll
          for (int kh = 0; kh < kD; ++kh) {
#pragma unroll
            for (int i = 0; i < kV; ++i) sums[kD - 1 - kh][i] = fmaf(v[i], w[kh * kD + kw][i], sums[kD - 1 - kh][i]);
          }
        }
        if (h - kD / 2 >= first) {
          emit(sums[0], out);
          out += t.cols * pixel_pitch;
        }
#pragma unroll
        for (int i = 0; i < kV; ++i) {
#pragma unroll
          for (int r = 0; r + 1 < kD; ++r) sums[r][i] = sums[r + 1][i];
          sums[kD - 1][i] = 0.f;
        }
      }
    } else {
      const int d = s.dw_size, pad = d / 2, left = t.w0 + col - pad;
      const int kw_begin = max(0, -left), kw_end = min(d, s.width - left);
      int source[kV];  // new channel j is made from x1 channel j / (ratio - 1)
#pragma unroll
      for (int i = 0; i < kV; ++i) source[i] = (op.channels.first + c + i) / (s.ratio - 1) - t.c0;
      for (int h = first; h < end; ++h, out += t.cols * pixel_pitch) {
        float sum[kV] = {};
        const int top = h - pad, kh_end = min(d, s.height - top);  // the window's part inside the image
        for (int kh = max(0, -top); kh < kh_end; ++kh) {
          const unsigned char* x1 =
              op.x1 + (top + kh - t.halo_h0) * row_pitch + (left + kw_begin - t.halo_w0) * x1_pitch;
          const float* weight = weights + (kh * d + kw_begin) * block_c;
          for (int kw = kw_begin; kw < kw_end; ++kw, x1 += x1_pitch, weight += block_c) {
#pragma unroll
            for (int i = 0; i < kV; ++i) {
              sum[i] = fmaf(to_float(reinterpret_cast<const T*>(x1)[source[i]]), weight[i], sum[i]);
            }
          }
        }
        emit(sum, out);
      }
    }
  }
}

// NCHW only: x1 of the tile without its halo, from [pixel][channel] to [channel][pixel].
template <typename T>
__device__ __forceinline__ void transpose_x1(const KernelParams& p, const BlockTile& t, const unsigned char* x1,
                                             unsigned char* staging) {
  constexpr int kV = 4;
  const int positions = t.rows * t.cols;
  const ThreadShare share = ThreadShare::of<false>((t.channels + kV - 1) / kV, positions);
  const FastDivisor by_cols(t.cols);
  for (int position = share.first; position < positions; position += share.step) {
    const int h = by_cols.divide(position), w = position - h * t.cols;
    const int pixel = (t.h0 + h - t.halo_h0) * t.halo_cols + t.w0 + w - t.halo_w0;
    float v[kV];
    load_x1<T>(v, x1 + pixel * p.plan.x1_pitch + share.vector * kV * sizeof(T));
    stage<T, kV, false>(staging + share.vector * kV * p.plan.staging_pitch + position * sizeof(T), p.plan.staging_pitch,
                        v);
  }
}

}  // namespace ghostfused
