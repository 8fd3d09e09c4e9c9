// An output gate, which a nearest upsampling takes to the size of the output.
#pragma once

#include "cpu/vec.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

// The columns of an output in whole vectors.
inline int64_t gate_columns(const GhostShape& s) { return div_up(s.width, kLanes) * kLanes; }

// The floats that an OutputGate of NCHW needs.
inline int64_t output_gate_size(const GhostShape& s) { return 2 * gate_columns(s); }

template <typename T, bool kChannelsLast>
class OutputGate {
 public:
  // ``memory``: of output_gate_size; nobody touches it in channels_last or without a gate.
  OutputGate(const GhostForwardParams& p, float* memory)
      : gate(p.output_gate),
        height(p.gate_height),
        width(p.gate_width),
        scale_h(static_cast<float>(height) / p.shape.height),
        scale_w(static_cast<float>(width) / p.shape.width),
        padded(gate_columns(p.shape)) {
    if (!gate.data || kChannelsLast) return;
    columns = reinterpret_cast<int32_t*>(memory);
    spread = memory + padded;
    picks = gate.stride_w == 1;
    for (int64_t w = 0; w < padded; ++w) columns[w] = static_cast<int32_t>(column_of(w));
    for (int64_t w = 0; w < padded; w += kLanes) picks &= columns[w + kLanes - 1] - columns[w] < kLanes;
  }

  explicit operator bool() const { return gate.data; }

  // NCHW: a row of channel c, spread to the columns of the output and whole vectors. It is valid until the next call.
  const float* row(int64_t n, int64_t c, int64_t h) {
    const T* const from = at(n, c, h, 0);
    if (from == last) return spread;  // as for the row of the output before
    last = from;
    for (int64_t w = 0; w < padded; w += kLanes) {
      const Ints column = load<Ints>(columns + w);
      const int32_t first = columns[w];
      Vec v{};
      if (picks) {
        v = pick(load_part(from + first, min_of(static_cast<int>(width - first), kLanes)), column - first);
      } else {
        for (int i = 0; i < kLanes; ++i) v[i] = to_float(from[column[i] * gate.stride_w]);
      }
      store(spread + w, v);
    }
    return spread;
  }

  // channels_last: of the channels c, c + step, … of a pixel.
  Vec of_pixel(int64_t n, int64_t c, int64_t h, int64_t w, int lanes, int step) const {
    return load_strided(at(n, c, h, column_of(w)), step * gate.stride_c, lanes);
  }

 private:
  // The index rule of F.interpolate(mode="nearest"), in float as there.
  int64_t column_of(int64_t w) const { return min_of<int64_t>(static_cast<int64_t>(w * scale_w), width - 1); }

  const T* at(int64_t n, int64_t c, int64_t h, int64_t column) const {
    const int64_t row = min_of<int64_t>(static_cast<int64_t>(h * scale_h), height - 1);
    return static_cast<const T*>(gate.data) + n * gate.stride_n + c * gate.stride_c + row * gate.stride_h +
           column * gate.stride_w;
  }

  const Tensor4& gate;
  const int64_t height, width;
  const float scale_h, scale_w;
  const int64_t padded;
  int32_t* columns = nullptr;  // the gate's column of each of the output's
  float* spread = nullptr;
  const T* last = nullptr;  // the row that is spread
  bool picks = false;       // a vector's columns are of one vector of the gate
};

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
