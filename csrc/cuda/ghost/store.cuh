// Shared to global memory: [x1 | x2], times the output gate, plus the residual, in the widest aligned vectors.
#pragma once

#include "cuda/ghost/tile.cuh"

namespace ghostfused {

template <typename T>
__device__ __forceinline__ const T* at(const DeviceTensor& t, int n, int c, int h, int w) {
  return static_cast<const T*>(t.data) + n * t.stride_n + offset_in_image(t, c, h, w);
}

// Stores kV numbers that are neighbours in memory, the first of them at (c, h, w): along the channels for
// channels_last, else along the pixels, where they may run on into the next rows and channels. Where the residual or
// the gate can't be read as such a vector, kV is 1.
template <typename T, int kV>
__device__ __forceinline__ void store(const KernelParams& p, int n, int c, int h, int w, Vector<T, kV> y) {
  const GhostForwardParams& a = p.args;
  if (p.residual.data != nullptr || p.output_gate.data != nullptr) {
    float v[kV];
#pragma unroll
    for (int i = 0; i < kV; ++i) v[i] = to_float(y.at[i]);
    if (p.output_gate.data != nullptr) {
      Vector<T, kV> gate;
      gate.load(at<T>(p.output_gate, n, c, nearest(h, a.gate_height, a.shape.height),
                      nearest(w, a.gate_width, a.shape.width)));
#pragma unroll
      for (int i = 0; i < kV; ++i) v[i] *= to_float(gate.at[i]);
    }
    if (p.residual.data != nullptr) {
      Vector<T, kV> residual;
      residual.load(at<T>(p.residual, n, c, h, w));
#pragma unroll
      for (int i = 0; i < kV; ++i) v[i] += to_float(residual.at[i]);
    }
#pragma unroll
    for (int i = 0; i < kV; ++i) y.at[i] = from_float<T>(v[i]);
  }
  y.store(const_cast<T*>(at<T>(p.out, n, c, h, w)));
}

// Of each tile pixel, x1's first n1 channels and the staged new ones. They are one row; a vector may straddle the two
// parts only if they are neighbours in the output as well (vector_widths sees to that).
template <typename T, int kV>
__device__ __forceinline__ void store_rows(const KernelParams& p, const BlockTile& t, const unsigned char* x1,
                                           const unsigned char* staging, int n1, NewChannels g) {
  constexpr int kPiece = sizeof(T) * kV > 8 && kV > 1 ? kV / 2 : kV;  // of a vector; lies in one part
  const int per_pixel = (n1 + g.count) / kV, vectors = t.rows * t.cols * per_pixel;
  const FastDivisor by_pixel(per_pixel), by_cols(t.cols);
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    const int pixel = by_pixel.divide(i), u = (i - pixel * per_pixel) * kV;
    const int h = by_cols.divide(pixel), w = pixel - h * t.cols;
    const unsigned char* x1_row = x1 + ((t.h0 + h - t.halo_h0) * t.halo_cols + t.w0 + w - t.halo_w0) * p.plan.x1_pitch;
    const unsigned char* x2_row = staging + pixel * p.plan.staging_pitch;
    Vector<T, kV> y;
#pragma unroll
    for (int piece = 0; piece < kV; piece += kPiece) {
      Vector<T, kPiece> part;
      const int v = u + piece;
      part.load(v < n1 ? x1_row + v * sizeof(T) : x2_row + (v - n1) * sizeof(T));
#pragma unroll
      for (int e = 0; e < kPiece; ++e) y.at[piece + e] = part.at[e];
    }
    const int c = u < n1 ? t.c0 + u : p.args.shape.init_channels + g.first + u - n1;
    store<T, kV>(p, t.n, c, t.h0 + h, t.w0 + w, y);
  }
}

// The staged [channel][pixel] block as channels [c, c + channels) of the output. What is one piece of memory there is
// one run here: all channels of a tile that is the whole map, a channel of a full-width tile, or a row.
template <typename T, int kV>
__device__ __forceinline__ void store_planes(const KernelParams& p, const BlockTile& t, const unsigned char* staging,
                                             int c, int channels) {
  const int pixels = t.rows * t.cols;
  const bool whole_map = p.plan.tiles_h == 1 && p.plan.tiles_w == 1, full_width = p.plan.tiles_w == 1;
  const int length = whole_map ? channels * pixels : full_width ? pixels : t.cols;
  const int runs_per_channel = full_width ? 1 : t.rows, runs = whole_map ? 1 : channels * runs_per_channel;
  const int per_run = length / kV;
  const FastDivisor by_run(per_run), by_channel(runs_per_channel);
  for (int i = threadIdx.x; i < runs * per_run; i += blockDim.x) {
    const int run = by_run.divide(i), e = (i - run * per_run) * kV;
    int ch = by_channel.divide(run), row = run - ch * runs_per_channel;
    Vector<T, kV> y;
    y.load(staging + ch * p.plan.staging_pitch + (row * t.cols + e) * sizeof(T));
    int col = e;
    if (full_width) {  // e counts pixels, or channels and pixels
      ch += col / pixels, col %= pixels;
      row += col / t.cols, col %= t.cols;
    }
    store<T, kV>(p, t.n, c + ch, t.h0 + row, t.w0 + col, y);
  }
}

}  // namespace ghostfused
