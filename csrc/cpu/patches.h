// A primary conv of any kernel, stride and dilation, as a 1×1 convolution of the patches of x under it: a pixel has
// in_channels * kernel * kernel channels, in NCHW by (channel, row, column), in channels_last by (row, column,
// channel).
#pragma once

#include <memory>

#include "cpu/pack.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

// NCHW: the planes of x under a tile's rows as fp32, with zeros around them, and those columns together that a tap
// finds under one output after the other. So no tap looks for x's borders.
template <typename T>
class PaddedPlanes {
  static constexpr int kCount = Operand<T, false>::kChannels;

 public:
  // ``memory`` is of planes_size floats.
  PaddedPlanes(const GhostForwardParams& p, const Plan& plan, float* memory)
      : p(p), plan(plan), memory(memory), pitch(plan.plane_pitch), row_step(p.stride * pitch) {
    if (!plan.patches || p.shape.channels_last) return;
    taps = std::make_unique<int64_t[]>(area());
    for (int64_t i = 0; i < area(); ++i) {
      const int64_t row = i / p.kernel * p.dilation, column = i % p.kernel * p.dilation;
      taps[i] = row * row_step + column % p.stride * pitch + column / p.stride;
    }
  }

  // For the output rows begin … end - 1 of image n, through the input gate (null: none), and for the pixels that the
  // first panel has before them.
  void make(const T* gate, int64_t n, int64_t begin, int64_t end) {
    const int64_t pad = p.dilation * (p.kernel - 1) / 2, columns = p.x_width;
    first = begin - div_up(kLanes - 1, p.shape.width);
    const int64_t top = first * p.stride - pad, rows = (end - 1 - first) * p.stride + 2 * pad + 1;
    for (int64_t c = 0; c < p.shape.in_channels; ++c) {
      const T* plane = static_cast<const T*>(p.x.data) + n * p.x.stride_n + c * p.x.stride_c;
      const Vec factor = gate ? splat(to_float(gate[c * p.input_gate_stride_c])) : Vec{};
      float* to = memory + c * plan.plane_size;
      for (int64_t row = top; row < top + rows; ++row) {
        for (int64_t phase = 0; phase < p.stride; ++phase, to += pitch) {
          __builtin_memset(to, 0, pitch * sizeof(float));
          if (row < 0 || row >= p.x_height) continue;
          const int64_t from = div_up(max_of<int64_t>(pad - phase, 0), p.stride);  // the first that lies on x
          const int64_t until = min_of(div_up(columns + pad - phase, p.stride), pitch), step = p.stride * p.x.stride_w;
          const T* x = plane + row * p.x.stride_h + (phase - pad) * p.x.stride_w;
          for (int64_t i = from; i < until; i += kLanes) {
            const int lanes = static_cast<int>(min_of<int64_t>(until - i, kLanes));
            const Vec v = load_strided(x + i * step, step, lanes);
            store_part(to + i, gate ? gated<T>(v, factor) : v, lanes);
          }
        }
      }
    }
  }

  // ``count`` output pixels from row h, column w on: (lane, pixel), as pack_planes. ``line`` has room for them twice,
  // and all that is written may reach a vector further.
  void pack(int64_t h, int64_t w, int64_t count, float* to, int64_t to_row, float* line) const {
    const float* plane = memory + (h - first) * p.stride * row_step + w;
    const int64_t channels = p.shape.in_channels * area();
    int64_t tap = 0;
    const auto next = [&](float* row) {
      read(plane + taps[tap], w, row, row + count);
      if (++tap == area()) tap = 0, plane += plan.plane_size;
    };
    pack_lanes<T>(div_up(channels, kCount), to, to_row, count, [&](int64_t k, float* row) {
      if constexpr (kCount == 1) return next(row);
      float* const odd = line + count + kLanes;
      next(line);
      if (k * kCount + 1 < channels) {
        next(odd);
      } else {
        __builtin_memset(odd, 0, count * sizeof(float));
      }
      for (int64_t i = 0; i < count; i += kLanes) store(row + i, pair_of(load(line + i), load(odd + i)));
    });
  }

 private:
  int64_t area() const { return int64_t{p.kernel} * p.kernel; }

  // ``from`` is under column w of an output row.
  void read(const float* from, int64_t w, float* to, const float* stop) const {
    for (int64_t count; to < stop; to += count, from += p.stride * row_step - w, w = 0) {
      count = min_of<int64_t>(p.shape.width - w, stop - to);
      for (int64_t i = 0; i < count; i += kLanes) store(to + i, load(from + i));
    }
  }

  const GhostForwardParams& p;
  const Plan& plan;
  float* const memory;
  const int64_t pitch, row_step;  // from one phase of a row, and from one row, to the next
  int64_t first = 0;              // the output row whose patches begin in the planes' first row
  std::unique_ptr<int64_t[]> taps;
};

// NCHW: ``rows`` output rows from ``top`` on, as pack_panels has them.
template <typename T>
void pack_patch_panels(const PaddedPlanes<T>& planes, const Plan& plan, int64_t width, int64_t top, int64_t rows,
                       float* to, float* line) {
  const int64_t pixels = rows * width, panels = div_up(div_up(pixels, kLanes), kMaxVecs<T>);
  for (int64_t i = 0; i < panels; ++i) {
    const PanelPixels panel(i, pixels, kMaxVecs<T>);
    const int64_t row = panel.vecs * kLanes;
    const int64_t h = (panel.begin + kLanes * width) / width - kLanes;  // it may begin above
    planes.pack(top + h, panel.begin - h * width, row, to, row, line);
    to += plan.depth * row;
  }
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
