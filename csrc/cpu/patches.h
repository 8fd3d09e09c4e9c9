// A primary conv of any kernel, stride and dilation, as a 1×1 convolution of the patches of x under it: a pixel has
// kernel * kernel * in_channels channels, by (row, column, channel).
#pragma once

#include <memory>

#include "cpu/pack_x.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

// NCHW: the planes of x under a tile's rows, as operands, with zeros around them, in the order of PatchPlanes. So the
// multiplication reads a tap of many pixels where it lies, and nothing else looks for x's borders. Lanes that are
// summed at once lie together.
template <typename T>
class PaddedPlanes {
  static constexpr int kAtOnce = kLanesAtOnce<T>;

 public:
  PaddedPlanes(const GhostForwardParams& p, const Plan& plan, float* memory)
      : p(p), plan(plan), planes(plan.planes), memory(memory) {
    if (!planes.size) return;
    const int64_t area = int64_t{p.kernel} * p.kernel;
    taps = std::make_unique<int64_t[]>(area);
    for (int64_t i = 0; i < area; ++i) {
      const int64_t row = i / p.kernel, column = i % p.kernel;
      const int64_t phase = row % planes.phases * planes.phases + column % planes.phases;
      const int64_t down = row * p.dilation / p.stride, right = column * p.dilation / p.stride;
      taps[i] = ((phase * planes.rows + down) * planes.pitch + right) * kAtOnce;
    }
  }

  // For the output rows begin … end - 1 of image n, through the input gate (null: none), and for the pixels that the
  // first vector has before them.
  void make(const T* gate, int64_t n, int64_t begin, int64_t end) {
    first = begin - div_up(kLanes - 1, p.shape.width);
    for (int64_t k = 0; k < plan.lanes; k += kAtOnce) {
      const T* x = static_cast<const T*>(p.x.data) + n * p.x.stride_n + k * LaneChannels<T>::kCount * p.x.stride_c;
      make_plane(gate, k, x, end - first + planes.reach, memory + k / kAtOnce * planes.step);
    }
  }

  // The first tap of the pixel at row h, column w.
  const float* at(int64_t h, int64_t w) const { return memory + ((h - first) * planes.pitch + w) * kAtOnce; }
  const int64_t* offsets() const { return taps.get(); }

 private:
  void make_plane(const T* gate, int64_t lane, const T* x, int64_t lines, float* plane) const {
    const int64_t step = p.stride * p.x.stride_w;
    const auto make = step == 1   ? &PaddedPlanes::make_lines<1>
                      : step == 2 ? &PaddedPlanes::make_lines<2>
                                  : &PaddedPlanes::make_lines<0>;
    for (int64_t phase = 0; phase < planes.phases * planes.phases; ++phase) {
      const int64_t row = first * p.stride + offset(phase / planes.phases), column = offset(phase % planes.phases);
      (this->*make)(gate, lane, x + column * p.x.stride_w, row, column, lines,
                    plane + phase * planes.rows * planes.pitch * kAtOnce);
    }
  }

  // From an output's place times the stride to the phase's first tap.
  int64_t offset(int64_t phase) const { return phase * p.dilation % p.stride - p.dilation * (p.kernel - 1) / 2; }

  // One phase, whose first tap lies ``row`` and ``column`` behind x's first pixel. kStep: from one number to the next,
  // 0: any. Lines in the order of memory: what the last vector of one has too much is overwritten by the next.
  template <int kStep>
  void make_lines(const T* gate, int64_t lane, const T* x, int64_t row, int64_t column, int64_t lines,
                  float* to) const {
    const auto has = [&](int i) { return (lane + i) * LaneChannels<T>::kCount < p.shape.in_channels; };
    const LaneChannels<T> channels(p, gate, lane), more(p, gate, has(kAtOnce - 1) ? lane + kAtOnce - 1 : lane);
    // the columns that lie on x
    const int64_t begin = min_of(div_up(max_of<int64_t>(-column, 0), p.stride), planes.pitch);
    const int64_t end = min_of(div_up(max_of<int64_t>(p.x_width - column, 0), p.stride), planes.pitch);
    const int64_t step = kStep ? kStep : p.stride * p.x.stride_w;
    const auto zero = [&](int64_t from, int64_t until) {
      for (int64_t i = from * kAtOnce; i < until * kAtOnce; i += kLanes) store(to + i, Vec{});
    };
    const auto copy = [&](const T* from, int pixels, float* to) __attribute__((always_inline)) {
      Vec v[kAtOnce] = {channels.read(from, step, pixels)};
      if constexpr (kAtOnce > 1) {
        if (has(1)) v[1] = more.read(from + LaneChannels<T>::kCount * p.x.stride_c, step, pixels);
        to_operand_rows<T>(v);
      }
      for (int j = 0; j < kAtOnce; ++j) store(to + j * kLanes, v[j]);
    };
    for (int64_t i = 0; i < lines; ++i, row += p.stride, to += planes.pitch * kAtOnce) {
      const bool on_x = row >= 0 && row < p.x_height;
      zero(0, on_x ? begin : planes.pitch);
      if (!on_x) continue;
      const T* line = x + row * p.x.stride_h;
      int64_t w = begin;
      for (; w + kLanes <= end; w += kLanes) copy(line + w * step, kLanes, to + w * kAtOnce);
      if (w < end) copy(line + w * step, static_cast<int>(end - w), to + w * kAtOnce);
      zero(end, planes.pitch);
    }
  }

  const GhostForwardParams& p;
  const Plan& plan;
  const PatchPlanes& planes;
  float* const memory;
  int64_t first = 0;  // the output row whose patches begin in the planes' first lines
  std::unique_ptr<int64_t[]> taps;
};

// channels_last: the patches of ``rows`` output rows from ``top`` on, (pixel, channel), ``to_row`` numbers from one
// pixel to the next, as pack_pixels.
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

// pack_channels of the weights of ``channels`` outputs from c0 on. In NCHW each tap has lanes of its own.
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
    const int64_t stride = p.primary_weight_stride_k;
    for (int64_t tap = 0; tap < area; ++tap) {
      const T* x = from + tap / p.kernel * p.primary_weight_stride_h + tap % p.kernel * p.primary_weight_stride_w;
      const auto value = [&](int64_t k) {
        if constexpr (kPerLane == 1) {
          return to_float(x[k * stride]);
        } else {
          return x[k * stride];
        }
      };
      if constexpr (kChannelsLast) {
        const int64_t vector = c / kLanes * kLanes, first = tap * in_channels;
        Number* column = to + (vector * depth + (c - vector)) * kPerLane;
        for (int64_t v = first; v < first + in_channels; ++v) {
          column[v / kPerLane * kLanes * kPerLane + v % kPerLane] = value(v - first);
        }
      } else {
        Number* row = to + (c * depth + tap * (depth / area)) * kPerLane;
        for (int64_t k = 0; k < in_channels; ++k) row[k] = value(k);
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
