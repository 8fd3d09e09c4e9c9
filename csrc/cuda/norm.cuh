// Bias, norm and activation of one channel, from the raw tensors: nothing folded, so nothing stale.
#pragma once

#include "cuda/activation.cuh"
#include "cuda/vector.cuh"

namespace ghostfused {

template <typename T>
__device__ __forceinline__ float channel_value(const ChannelVector& v, int64_t c, float absent, bool is_float32) {
  if (v.data == nullptr) return absent;
  return is_float32 ? static_cast<const float*>(v.data)[c * v.stride]
                    : to_float(static_cast<const T*>(v.data)[c * v.stride]);
}

// Bias and norm as y = x * scale + shift, and the slope of the activation below zero.
struct Affine {
  float scale, shift, slope;
};

template <typename T>
__device__ __forceinline__ Affine affine(const NormAct& p, int64_t c) {
  Affine a;
  a.scale = 1.f;
  a.shift = 0.f;
  if (p.mean.data != nullptr) {
    const float var = channel_value<T>(p.var, c, 1.f, p.norm_is_float32);
    a.scale = channel_value<T>(p.gamma, c, 1.f, p.norm_is_float32) / sqrtf(var + p.eps);
    a.shift = channel_value<T>(p.beta, c, 0.f, p.norm_is_float32) -
              channel_value<T>(p.mean, c, 0.f, p.norm_is_float32) * a.scale;
  }
  a.shift += channel_value<T>(p.bias, c, 0.f, false) * a.scale;
  a.slope = slope_of(p, channel_value<T>(p.slope, c, 0.f, false));
  return a;
}

}  // namespace ghostfused
