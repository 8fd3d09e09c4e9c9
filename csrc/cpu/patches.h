// A primary conv of any kernel, stride and dilation, as a 1×1 convolution of the patches of x under it: a pixel has
// in_channels * kernel * kernel channels, in NCHW by (channel, row, column), in channels_last by (row, column,
// channel).
#pragma once

#include "cpu/pack.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

// NCHW: what lies under one tap of the kernel, of one channel.
template <typename T>
class TapPlane {
 public:
  TapPlane(const GhostForwardParams& p, const T* gate, int64_t n, int64_t index)
      : p(p), gate(gate), step(p.stride * p.x.stride_w) {
    const int64_t c = index / (int64_t{p.kernel} * p.kernel), pad = p.dilation * (p.kernel - 1) / 2;
    x = static_cast<const T*>(p.x.data) + n * p.x.stride_n + c * p.x.stride_c;
    top = index / p.kernel % p.kernel * p.dilation - pad;
    left = index % p.kernel * p.dilation - pad;
    if (gate) factor = splat(to_float(gate[c * p.input_gate_stride_c]));
  }

  // All of output row h. Whole vectors are written, so that some may reach past it.
  void read(int64_t h, float* to) const {
    const int64_t row = h * p.stride + top, width = p.shape.width;
    const auto inside = [&](int64_t x_columns) {  // how many outputs lie before that column of x
      return min_of(max_of<int64_t>(div_up(x_columns - left, p.stride), 0), width);
    };
    const int64_t begin = inside(0), end = row < 0 || row >= p.x_height ? begin : max_of(inside(p.x_width), begin);
    __builtin_memset(to, 0, width * sizeof(float));
    const T* from = x + row * p.x.stride_h + left * p.x.stride_w;
    const auto copy = [&](int64_t w, int count) {
      const Vec v = load_strided(from + w * step, step, count);
      store_part(to + w, gate ? gated<T>(v, factor) : v, count);
    };
    int64_t w = begin;
    for (; w + kLanes <= end; w += kLanes) copy(w, kLanes);
    if (w == end) return;
    if (end - begin >= kLanes) {
      copy(end - kLanes, kLanes);
    } else {
      copy(w, static_cast<int>(end - w));
    }
  }

 private:
  const GhostForwardParams& p;
  const T *gate, *x;
  int64_t step, top, left;
  Vec factor{};
};

// Output rows top … top + rows - 1 of image n: (lane, pixel), as pack_planes. ``line`` has room for a row in whole
// vectors.
template <typename T>
void pack_patch_planes(const GhostForwardParams& p, const T* gate, int64_t n, int64_t top, int64_t rows, float* to,
                       int64_t to_row, float* line) {
  constexpr int kCount = Operand<T, false>::kChannels;
  const int64_t width = p.shape.width, channels = int64_t{p.shape.in_channels} * p.kernel * p.kernel;
  pack_lanes<T>(div_up(channels, kCount), to, to_row, rows * width, [&](int64_t k, float* row) {
    const TapPlane<T> even(p, gate, n, k * kCount), odd(p, gate, n, min_of(k * kCount + 1, channels - 1));
    for (int64_t h = 0; h < rows; ++h) {
      even.read(top + h, row + h * width);
      if (kCount == 1) continue;
      if (k * kCount + 1 < channels) odd.read(top + h, line);
      for (int64_t w = 0; w < width; w += kLanes) {
        float* pair = row + h * width + w;
        store(pair, pair_of(load(pair), load(line + w)));
      }
    }
  });
}

// The same, (pixel, channel), ``to_row`` numbers from one pixel to the next, as pack_pixels.
template <typename T, typename Number>
void pack_patch_pixels(const GhostForwardParams& p, const T* gate, int64_t n, int64_t top, int64_t rows, Number* to,
                       int64_t to_row) {
  const GhostShape& s = p.shape;
  const Tensor4& x = p.x;
  const int64_t pad = p.dilation * (p.kernel - 1) / 2, line = int64_t{p.kernel} * s.in_channels;
  const T* image = static_cast<const T*>(x.data) + n * x.stride_n;
  const T* end = image + (p.x_height - 1) * x.stride_h + (p.x_width - 1) * x.stride_w + s.in_channels;
  // a line of the kernel is a run of memory
  const bool runs = !gate && p.dilation == 1 && x.stride_c == 1 && x.stride_w == s.in_channels;
  for (int64_t pixel = 0; pixel < rows * s.width; ++pixel, to += to_row) {
    const int64_t h = (top + pixel / s.width) * p.stride - pad, w = pixel % s.width * p.stride - pad;
    Number* tap = to;
    for (int64_t i = 0; i < p.kernel; ++i) {
      const int64_t row = h + i * p.dilation;
      const T* from = image + row * x.stride_h + w * x.stride_w;
      if (runs && row >= 0 && row < p.x_height && w >= 0 && w + p.kernel <= p.x_width && from + line + kLanes <= end) {
        // what the last vector has too much is overwritten by what follows
        for (int64_t k = 0; k < line; k += kLanes) store_float(tap + k, load_float(from + k));
        tap += line;
        continue;
      }
      for (int64_t j = 0; j < p.kernel; ++j, tap += s.in_channels) {
        const int64_t column = w + j * p.dilation;
        if (row >= 0 && row < p.x_height && column >= 0 && column < p.x_width) {
          pack_pixel(p, gate, from + j * p.dilation * x.stride_w, tap);
        } else {
          for (int64_t k = 0; k < s.in_channels; ++k) tap[k] = {};
        }
      }
    }
    for (; tap < to + to_row; ++tap) *tap = {};
  }
}

// pack_channels of the weights of ``channels`` outputs from c0 on.
template <typename T, bool kChannelsLast>
void pack_patch_channels(const GhostForwardParams& p, int64_t c0, int64_t channels, int64_t depth, float* weight) {
  using Number = typename Operand<T, kChannelsLast>::Number;
  constexpr int kPerLane = Operand<T, kChannelsLast>::kChannels;
  const int64_t in_channels = p.shape.in_channels, area = int64_t{p.kernel} * p.kernel;
  const int64_t rows = kChannelsLast ? div_up(channels, kLanes) * kLanes : channels;
  __builtin_memset(weight, 0, rows * depth * sizeof(float));
  Number* to = reinterpret_cast<Number*>(weight);
  for (int64_t c = 0; c < channels; ++c) {
    const T* from = static_cast<const T*>(p.primary_weight) + (c0 + c) * p.primary_weight_stride_n;
    for (int64_t tap = 0; tap < area; ++tap) {
      const T* of_tap = from + tap / p.kernel * p.primary_weight_stride_h + tap % p.kernel * p.primary_weight_stride_w;
      for (int64_t k = 0; k < in_channels; ++k) {
        const int64_t v = kChannelsLast ? tap * in_channels + k : k * area + tap;
        const int64_t vector = kChannelsLast ? c / kLanes * kLanes : c, k_step = kChannelsLast ? kLanes : 1;
        const int64_t lane = vector * depth + v / kPerLane * k_step + (c - vector);
        const T value = of_tap[k * p.primary_weight_stride_k];
        if constexpr (kPerLane == 1) {
          to[lane] = to_float(value);
        } else {
          to[lane * kPerLane + v % kPerLane] = value;
        }
      }
    }
  }
  if (!kChannelsLast) return;
  constexpr int kRows = kLanesAtOnce<T>;
  for (int64_t i = 0; i < rows * depth; i += kRows * kLanes) {
    Vec v[kRows];
    for (int j = 0; j < kRows; ++j) v[j] = load(weight + i + j * kLanes);
    to_operand_rows<T>(v);
    for (int j = 0; j < kRows; ++j) store(weight + i + j * kLanes, v[j]);
  }
}

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
