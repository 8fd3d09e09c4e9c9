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

// A channel's numbers of a NormAct as they lie in memory, zero where there are none. All are loaded before the first is
// converted: a conversion behind each load would wait for six loads one after the other.
struct RawAffine {
  uint32_t mean, var, gamma, beta, bias, slope;
};

template <typename T>
__device__ __forceinline__ uint32_t load_bits(const ChannelVector& v, int64_t c, bool is_float32) {
  const bool four = sizeof(T) == 4 || is_float32, present = v.data != nullptr;
  const char* at = static_cast<const char*>(v.data) + c * v.stride * (four ? 4 : 2);
  uint32_t bits;
  asm volatile(
      "{.reg .pred four, two; setp.ne.b32 four, %2, 0; setp.ne.b32 two, %3, 0; mov.u32 %0, 0;"
      "@four ld.global.u32 %0, [%1]; @two ld.global.u16 %0, [%1];}"
      : "=&r"(bits)
      : "l"(at), "r"(static_cast<int>(present && four)), "r"(static_cast<int>(present && !four)));
  return bits;
}

template <typename T>
__device__ __forceinline__ RawAffine load_affine(const NormAct& p, int64_t c) {
  const bool wide = p.norm_is_float32;
  return {load_bits<T>(p.mean, c, wide), load_bits<T>(p.var, c, wide),   load_bits<T>(p.gamma, c, wide),
          load_bits<T>(p.beta, c, wide), load_bits<T>(p.bias, c, false), load_bits<T>(p.slope, c, false)};
}

template <typename T>
__device__ __forceinline__ float number_of(uint32_t bits, bool is_float32) {
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(bits);
  } else {
    const uint16_t half = static_cast<uint16_t>(bits);
    return is_float32 ? __uint_as_float(bits) : to_float(reinterpret_cast<const T&>(half));
  }
}

template <typename T>
__device__ __forceinline__ Affine affine(const NormAct& p, const RawAffine& raw) {
  const auto number = [&](uint32_t bits) { return number_of<T>(bits, p.norm_is_float32); };
  Affine a;
  a.scale = 1.f;
  a.shift = 0.f;
  if (p.mean.data != nullptr) {
    a.scale = (p.gamma.data == nullptr ? 1.f : number(raw.gamma)) / sqrtf(number(raw.var) + p.eps);
    a.shift = number(raw.beta) - number(raw.mean) * a.scale;
  }
  a.shift += number_of<T>(raw.bias, false) * a.scale;
  a.slope = slope_of(p, number_of<T>(raw.slope, false));
  return a;
}

template <typename T>
__device__ __forceinline__ Affine affine(const NormAct& p, int64_t c) {
  return affine<T>(p, load_affine<T>(p, c));
}

}  // namespace ghostfused
