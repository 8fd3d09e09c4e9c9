// Copies x as an operand where the multiplication can't read it as it lies.
#pragma once

#include "cpu/plan.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

// The operand's lanes of ``channels`` numbers of a row, or of the first that a vector holds; zeros after them.
template <int kChannels, typename T>
GHOSTFUSED_INLINE Vec load_operand(const T* p, int64_t stride, int64_t channels) {
  constexpr int kAll = kLanes * kChannels;
  if constexpr (kChannels == 1) {
    return load_strided(p, stride, min_of<int64_t>(channels, kAll));
  } else {
    if (stride == 1 && channels >= kAll) return load(p);
    T numbers[kAll] = {};
    for (int64_t i = 0; i < min_of<int64_t>(channels, kAll); ++i) numbers[i] = p[i * stride];
    return load(numbers);
  }
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

// The channels of one pixel of x, through the input gate (null: none).
template <typename T, typename Number>
GHOSTFUSED_INLINE void pack_pixel(const GhostForwardParams& p, const T* gate, const T* from, Number* to) {
  const int64_t channels = p.shape.in_channels;
  for (int64_t k = 0; k < channels; k += kLanes) {
    const int count = min_of<int64_t>(channels - k, kLanes);
    Vec v = load_strided(from + k * p.x.stride_c, p.x.stride_c, count);
    if (gate) {
      v = gated<T>(v, load_strided(gate + k * p.input_gate_stride_c, p.input_gate_stride_c, count));
    }
    store_part(to + k, v, count);
  }
}

// The same for ``pixels`` that follow each other, through a gate. Its numbers wait in registers' form while they pass.
template <typename T, typename Number>
void pack_gated_run(const GhostForwardParams& p, const T* gate, const T* from, int64_t pixels, Number* to,
                    int64_t to_row) {
  constexpr int64_t kChunk = 32 * kLanes;
  const int64_t channels = p.shape.in_channels, stride = p.input_gate_stride_c;
  alignas(64) float factors[kChunk];
  for (int64_t first = 0; first < channels; first += kChunk) {
    const int64_t count = min_of<int64_t>(channels - first, kChunk), whole = count / kLanes * kLanes;
    for (int64_t k = 0; k < count; ++k) factors[k] = to_float(gate[(first + k) * stride]);
    const int rest = static_cast<int>(count - whole);
    for (int64_t i = 0; i < pixels; ++i) {
      const T* x = from + i * p.x.stride_w + first;
      Number* y = to + i * to_row + first;
      for (int64_t k = 0; k < whole; k += kLanes) store_float(y + k, gated<T>(load_float(x + k), load(factors + k)));
      if (rest) store_part(y + whole, gated<T>(load_part(x + whole, rest), load_part(factors + whole, rest)), rest);
    }
  }
}

// channels_last: ``rows`` rows of image n from row ``top`` on, through the input gate (null: none), ``to_row`` numbers
// from one pixel to the next, zeros after the last channel.
template <typename T, typename Number>
void pack_pixels(const GhostForwardParams& p, const T* gate, int64_t n, int64_t top, int64_t rows, Number* to,
                 int64_t to_row) {
  const GhostShape& s = p.shape;
  const int64_t pixels = rows * s.width;
  const T* x = static_cast<const T*>(p.x.data) + n * p.x.stride_n + top * p.x.stride_h;
  const bool by_rows = gate && p.x.stride_c == 1;
  for (int64_t h = 0; by_rows && h < rows; ++h) {
    pack_gated_run(p, gate, x + h * p.x.stride_h, s.width, to + h * s.width * to_row, to_row);
  }
  for (int64_t i = 0; i < pixels; ++i, to += to_row) {
    if (!by_rows) pack_pixel(p, gate, x + i / s.width * p.x.stride_h + i % s.width * p.x.stride_w, to);
    for (int64_t k = s.in_channels; k < to_row; ++k) to[k] = {};
  }
}

// NCHW: the channels that one lane of an operand holds, through the input gate (null: none).
template <typename T>
class LaneChannels {
 public:
  static constexpr int kCount = Operand<T, false>::kChannels;

  LaneChannels(const GhostForwardParams& p, const T* gate, int64_t lane)
      : stride(p.x.stride_c), whole((lane + 1) * kCount <= p.shape.in_channels), gate(gate) {
    for (int i = 0; gate && has(i); ++i) {
      factor[i] = splat(to_float(gate[(lane * kCount + i) * p.input_gate_stride_c]));
    }
  }

  // Pixels ``step`` numbers apart, the first channel's at ``from``.
  GHOSTFUSED_INLINE Vec read(const T* from, int64_t step, int pixels) const {
    Vec v[kCount] = {};
    for (int i = 0; has(i); ++i) {
      v[i] = load_strided(from + i * stride, step, pixels);
      if (gate) v[i] = gated<T>(v[i], factor[i]);
    }
    return kCount == 1 ? v[0] : pair_of(v[0], v[kCount - 1]);
  }

  // The same for ``vecs`` whole vectors of neighbours.
  void read_run(const T* from, int64_t vecs, float* to) const {
    const auto each = [&](auto vector_at) {
      for (int64_t i = 0; i < vecs; ++i) store(to + i * kLanes, vector_at(from + i * kLanes));
    };
    if constexpr (kCount == 2) {  // no number need become fp32 on its way
      const int64_t next = stride;
      const auto halves = [](Halves even, Halves odd) {
        return reinterpret_cast<Vec>(widen(even) | (widen(odd) << 16));
      };
      if (whole && !gate) {
        return each([=](const T* x) { return halves(load<Halves>(x), load<Halves>(x + next)); });
      }
      if (whole) {
        return each([=, even = factor[0], odd = factor[1]](const T* x) {
          return halves(narrow(load_float(x) * even, T{}), narrow(load_float(x + next) * odd, T{}));
        });
      }
    }
    each([&](const T* x) { return read(x, 1, kLanes); });
  }

 private:
  bool has(int i) const { return i == 0 || (i < kCount && whole); }

  int64_t stride;
  bool whole;
  const T* gate;
  Vec factor[kCount] = {};
};

// NCHW: pack_row(k, to) writes the k-th of ``depth`` rows of ``count`` lanes, ``to_row`` from one to the next. Where
// two rows are summed at once they lie zipped, and zeros are the second of the last. The first waits where the next two
// will begin, so that there is room for a row behind the last.
template <typename T, typename PackRow>
GHOSTFUSED_INLINE void pack_lanes(int64_t depth, float* to, int64_t to_row, int64_t count, const PackRow& pack_row) {
  if constexpr (kLanesAtOnce<T> == 1) {
    for (int64_t k = 0; k < depth; ++k, to += to_row) pack_row(k, to);
  } else {
    for (int64_t k = 0; k < depth; k += 2, to += 2 * to_row) {
      float *second = to + to_row, *first = second + to_row;
      pack_row(k, first);
      if (k + 1 < depth) pack_row(k + 1, second);
      if (k + 1 == depth) __builtin_memset(second, 0, to_row * sizeof(float));
      for (int64_t i = 0; i < count; i += kLanes) {
        Vec v[2] = {load(first + i), load(second + i)};
        to_operand_rows<T>(v);
        store(to + 2 * i, v[0]);
        store(to + 2 * i + kLanes, v[1]);
      }
    }
  }
}

// NCHW: ``rows`` rows of image n from row ``top`` on, through the input gate: (lane, pixel), ``to_row`` lanes from one
// to the next, as pack_lanes writes them.
template <typename T>
void pack_planes(const GhostForwardParams& p, const T* gate, int64_t n, int64_t top, int64_t rows, float* to,
                 int64_t to_row) {
  const GhostShape& s = p.shape;
  const int64_t pixels = rows * s.width, depth = div_up(s.in_channels, LaneChannels<T>::kCount);
  const T* x = static_cast<const T*>(p.x.data) + n * p.x.stride_n + top * p.x.stride_h;
  const bool flat = s.height == 1 || p.x.stride_h == s.width * p.x.stride_w;
  const int64_t run = flat ? pixels : s.width;  // pixels at one stride
  pack_lanes<T>(depth, to, to_row, pixels, [&](int64_t k, float* row) {
    const LaneChannels<T> channels(p, gate, k);
    const T* from = x + k * channels.kCount * p.x.stride_c;
    for (int64_t begin = 0; begin < pixels; begin += run, from += p.x.stride_h) {
      const int64_t vecs = p.x.stride_w == 1 ? run / kLanes : 0;
      channels.read_run(from, vecs, row + begin);
      for (int64_t i = vecs * kLanes; i < run; i += kLanes) {
        const int count = min_of<int64_t>(run - i, kLanes);
        store(row + begin + i, channels.read(from + i * p.x.stride_w, p.x.stride_w, count));
      }
    }
  });
}

// The input gate of image n, or null.
template <typename T>
const T* gate_of(const GhostForwardParams& p, int64_t n) {
  return p.input_gate ? static_cast<const T*>(p.input_gate) + n * p.input_gate_stride_n : nullptr;
}

// NCHW: ``rows`` rows of image n from row ``top`` on, through the input gate, in panels of whole vectors: (panel, lane,
// pixel of the panel).
template <typename T>
void pack_panels(const GhostForwardParams& p, const T* gate, int64_t n, int64_t top, int64_t rows, float* to) {
  const GhostShape& s = p.shape;
  const int64_t pixels = rows * s.width, panels = div_up(div_up(pixels, kLanes), kMaxVecs<T>);
  const int64_t depth = div_up(s.in_channels, LaneChannels<T>::kCount);
  const T* x = static_cast<const T*>(p.x.data) + n * p.x.stride_n + top * p.x.stride_h;
  for (int64_t i = 0; i < panels; ++i) {
    const PanelPixels panel(i, pixels, kMaxVecs<T>);
    const int64_t row = panel.vecs * kLanes;
    pack_lanes<T>(depth, to, row, row, [&](int64_t k, float* lanes) {
      const LaneChannels<T> channels(p, gate, k);
      channels.read_run(x + panel.begin + k * channels.kCount * p.x.stride_c, panel.vecs, lanes);
    });
    to += lanes_of(s.in_channels, LaneChannels<T>::kCount, kLanesAtOnce<T>) * row;
  }
}

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
