// Copies x where the multiplication can't read it as it lies.
#pragma once

#include "plan.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

template <typename T>
GHOSTFUSED_INLINE Vec load_strided(const T* p, int64_t stride, int count) {
  if (stride == 1 && count == kLanes) return load_float(p);
  Vec v{};
  for (int i = 0; i < count; ++i) v[i] = to_float(p[i * stride]);
  return v;
}

// x * gate, rounded as in PyTorch.
template <typename T>
GHOSTFUSED_INLINE Vec gated(Vec v, Vec factor) {
  v *= factor;
  if constexpr (sizeof(T) == sizeof(float)) {
    return v;
  } else {
    return widen(narrow(v, T{}), T{});
  }
}

// ``rows`` rows of image n from row ``top`` on, as fp32, through the input gate (null: none): (channel, pixel) in NCHW,
// (pixel, channel) in channels_last, ``to_row`` floats from one to the next.
template <typename T, bool kChannelsLast>
void pack_x(const GhostForwardParams& p, const T* gate, int64_t n, int64_t top, int64_t rows, float* to,
            int64_t to_row) {
  const GhostShape& s = p.shape;
  const int64_t pixels = rows * s.width;
  const T* x = static_cast<const T*>(p.x.data) + n * p.x.stride_n + top * p.x.stride_h;
  if constexpr (kChannelsLast) {
    for (int64_t i = 0; i < pixels; ++i, to += to_row) {
      const T* from = x + i / s.width * p.x.stride_h + i % s.width * p.x.stride_w;
      for (int64_t k = 0; k < s.in_channels; k += kLanes) {
        const int count = min_of<int64_t>(s.in_channels - k, kLanes);
        Vec v = load_strided(from + k * p.x.stride_c, p.x.stride_c, count);
        if (gate) {
          v = gated<T>(v, load_strided(gate + k * p.input_gate_stride_c, p.input_gate_stride_c, count));
        }
        store_part(to + k, v, count);
      }
    }
  } else {
    const bool flat = s.height == 1 || p.x.stride_h == s.width * p.x.stride_w;
    const int64_t run = flat ? pixels : s.width;  // pixels at one stride
    for (int64_t k = 0; k < s.in_channels; ++k, to += to_row) {
      const Vec factor = splat(gate ? to_float(gate[k * p.input_gate_stride_c]) : 1.f);
      const T* from = x + k * p.x.stride_c;
      for (int64_t begin = 0; begin < pixels; begin += run, from += p.x.stride_h) {
        for (int64_t i = 0; i < run; i += kLanes) {
          const int count = min_of<int64_t>(run - i, kLanes);
          Vec v = load_strided(from + i * p.x.stride_w, p.x.stride_w, count);
          if (gate) v = gated<T>(v, factor);
          store(to + begin + i, v);
        }
      }
    }
  }
}

// The input gate of image n, or null.
template <typename T>
const T* gate_of(const GhostForwardParams& p, int64_t n) {
  return p.input_gate ? static_cast<const T*>(p.input_gate) + n * p.input_gate_stride_n : nullptr;
}

// Image n as fp32, through the input gate, in panels of whole vectors: (panel, channel, pixel of the panel).
template <typename T>
void pack_panels(const GhostForwardParams& p, const T* gate, int64_t n, float* to) {
  const GhostShape& s = p.shape;
  const int64_t pixels = int64_t{s.height} * s.width, panels = div_up(div_up(pixels, kLanes), kMaxVecs);
  const T* x = static_cast<const T*>(p.x.data) + n * p.x.stride_n;
  for (int64_t i = 0; i < panels; ++i) {
    const PanelPixels panel(i, pixels);
    const T* from = x + panel.begin;
    for (int64_t k = 0; k < s.in_channels; ++k, from += p.x.stride_c) {
      const Vec factor = splat(gate ? to_float(gate[k * p.input_gate_stride_c]) : 1.f);
      for (int64_t j = 0; j < panel.vecs; ++j, to += kLanes) {
        const Vec v = load_float(from + j * kLanes);
        store(to, gate ? gated<T>(v, factor) : v);
      }
    }
  }
}

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
