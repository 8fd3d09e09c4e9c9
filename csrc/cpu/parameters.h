// Norms and depthwise weights as the kernels read them: fp32, a channel per lane.
#pragma once

#include "cpu/activation.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

// Numbers c, c + step, … of a vector of channels.
template <typename T>
void read_channels(const ChannelVector& v, bool is_float32, int64_t c, int64_t step, int count, float* to) {
  const int64_t stride = v.stride * step;
  if (is_float32 || sizeof(T) == sizeof(float)) {
    const float* from = static_cast<const float*>(v.data) + c * v.stride;
    if (stride == 1 && count == kLanes) return store(to, load(from));
    for (int i = 0; i < count; ++i) to[i] = from[i * stride];
  } else {
    const T* from = static_cast<const T*>(v.data) + c * v.stride;
    if (stride == 1 && count == kLanes) return store(to, load_float(from));
    for (int i = 0; i < count; ++i) to[i] = to_float(from[i * stride]);
  }
}

// (scale, shift, slope), ``next`` floats apart, of the channels first, first + step, …, with
// norm(y + bias) = y * scale + shift. In double, since what is rounded here counts most where y * scale and shift
// nearly cancel.
template <typename T>
void prepare_norm(const NormAct& half, int64_t first, int64_t step, int64_t count, float* to, int64_t next) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int lanes = min_of<int64_t>(kLanes, count - i);
    const int64_t c = first + i * step;
    float in[kLanes] = {};
    double scale[kLanes], shift[kLanes];
    for (int l = 0; l < kLanes; ++l) scale[l] = 1, shift[l] = 0;
    if (half.mean.data) {
      read_channels<T>(half.var, half.norm_is_float32, c, step, lanes, in);
      for (int l = 0; l < kLanes; ++l) scale[l] = 1 / __builtin_sqrt(in[l] + double{half.eps});
      if (half.gamma.data) {
        read_channels<T>(half.gamma, half.norm_is_float32, c, step, lanes, in);
        for (int l = 0; l < kLanes; ++l) scale[l] *= in[l];
      }
      read_channels<T>(half.mean, half.norm_is_float32, c, step, lanes, in);
      for (int l = 0; l < kLanes; ++l) shift[l] = -in[l] * scale[l];
      if (half.beta.data) {
        read_channels<T>(half.beta, half.norm_is_float32, c, step, lanes, in);
        for (int l = 0; l < kLanes; ++l) shift[l] += in[l];
      }
    }
    if (half.bias.data) {
      read_channels<T>(half.bias, false, c, step, lanes, in);
      for (int l = 0; l < kLanes; ++l) shift[l] += in[l] * scale[l];
    }
    for (int l = 0; l < lanes; ++l) to[i + l] = static_cast<float>(scale[l]);
    for (int l = 0; l < lanes; ++l) to[i + l + next] = static_cast<float>(shift[l]);
    if (half.act == Act::kPReLU) {
      read_channels<T>(half.slope, false, c, step, lanes, to + i + 2 * next);
    } else {
      for (int l = 0; l < lanes; ++l) to[i + l + 2 * next] = half.negative_slope;
    }
  }
}

// A depthwise convolution's weights at any strides to fp32, ``to_channel`` floats from channel to channel and
// ``to_tap`` from tap to tap, which follow each other row by row or column by column.
struct Taps {
  const void* data;
  int64_t stride_c, stride_h, stride_w;
  int rows, columns;
};
template <typename T>
void prepare_taps(const Taps& taps, bool by_column, int64_t first, int64_t step, int64_t count, float* to,
                  int64_t to_channel, int64_t to_tap) {
  const int64_t size = int64_t{taps.rows} * taps.columns, numbers = count * size;
  const bool as_it_lies = !by_column && to_tap == 1 && taps.stride_w == 1 && taps.stride_h == taps.columns;
  if (as_it_lies && (count == 1 || (to_channel == size && step * taps.stride_c == size))) {
    const T* from = static_cast<const T*>(taps.data) + first * taps.stride_c;
    int64_t i = 0;
    for (; i + kLanes <= numbers; i += kLanes) store(to + i, load_float(from + i));
    for (; i < numbers; ++i) to[i] = to_float(from[i]);
    return;
  }
  for (int64_t i = 0; i < count; ++i, to += to_channel) {
    const T* from = static_cast<const T*>(taps.data) + (first + i * step) * taps.stride_c;
    for (int h = 0; h < taps.rows; ++h) {
      for (int w = 0; w < taps.columns; ++w) {
        const int tap = by_column ? w * taps.rows + h : h * taps.columns + w;
        to[tap * to_tap] = to_float(from[h * taps.stride_h + w * taps.stride_w]);
      }
    }
  }
}

// What follows a sum, with the parameters that prepare_norm made of a channel, in all lanes, or of a vector of
// channels.
class NormAffine {
 public:
  enum Kind { kNumbers, kVectors };

  GHOSTFUSED_INLINE NormAffine(const float* norm, int64_t next, Act act, Kind kind)
      : scale(read(norm, kind)),
        shift(read(norm + next, kind)),
        slope(read(norm + 2 * next, kind)),
        act(act),
        bounds(clamp_of(act)) {}

  GHOSTFUSED_INLINE bool only_clamps() const { return is_clamp(act); }
  GHOSTFUSED_INLINE Vec clamped(Vec sum) const { return clamp(sum * scale + shift, bounds); }
  template <int kCount>
  GHOSTFUSED_INLINE void activate(Vec (&y)[kCount]) const {
    if (!has_slope(act)) return GHOSTFUSED_ISA::activate(y, kCount, act);
    GHOSTFUSED_EACH y[i] = sloped(y[i], slope);
  }
  GHOSTFUSED_INLINE Vec operator()(Vec sum) const {
    Vec y[1] = {clamped(sum)};
    if (!only_clamps()) activate(y);
    return y[0];
  }

 private:
  static GHOSTFUSED_INLINE Vec read(const float* p, Kind kind) { return kind == kNumbers ? splat(*p) : load(p); }

  Vec scale, shift, slope;
  Act act;
  Clamp bounds;
};

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
