// Activations of many values at once.
#pragma once

#include "cuda/activation.cuh"
#include "cuda/half_pairs.cuh"

namespace ghostfused {

// An activation, the same for a whole launch but for PReLU's slopes: one branch for all of a thread's values, which
// come from maps of T.
template <typename T>
struct UniformAct {
  Act act;
  float slope;   // below zero, but for PReLU
  bool simple;   // none or ReLU:
  float lowest;  // it is max(z, lowest),
  float kink;    // and its derivative 0 where z <= kink

  __device__ __forceinline__ explicit UniformAct(const NormAct& p)
      : act(p.act), slope(slope_of(p, 1.f)), simple(p.act == Act::kNone || p.act == Act::kReLU) {
    lowest = act == Act::kReLU ? 0.f : __int_as_float(0xff800000);  // -inf
    kink = act == Act::kReLU ? 0.f : __int_as_float(0x7fffffff);    // NaN, which nothing is less than
  }

  template <int kCount>
  __device__ __forceinline__ void activate(float (&z)[kCount]) const {
    activate(z, [&](int) { return slope; });
  }
  // slope_at(i): below zero, of z[i].
  template <int kCount, typename Slope>
  __device__ __forceinline__ void activate(float (&z)[kCount], Slope slope_at) const {
    if (simple) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) asm("max.NaN.f32 %0, %0, %1;" : "+f"(z[i]) : "f"(lowest));  // NaN stays
    } else {
      float slopes[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) slopes[i] = slope_at(i);
      ghostfused::activate<kCount, sizeof(T) == 4>(z, act, slopes);
    }
  }
  // grad * act'(z)
  template <int kCount>
  __device__ __forceinline__ void backward(float (&grad)[kCount], const float (&z)[kCount]) const {
    if (simple) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) grad[i] = z[i] <= kink ? 0.f : grad[i];
    } else {
      float slopes[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) slopes[i] = slope;
      ghostfused::activate_backward<kCount, sizeof(T) == 4>(grad, z, act, slopes);
    }
  }
};

// Two neighbouring channels' numbers, as they lie in memory.
template <typename T>
using Pair = std::conditional_t<sizeof(T) == 2, uint32_t, float2>;

template <typename T>
__device__ __forceinline__ float2 unpack_pair(Pair<T> v) {
  if constexpr (sizeof(T) == 2) {
    return unpack<T>(v);
  } else {
    return v;
  }
}
template <typename T>
__device__ __forceinline__ Pair<T> pack_pair(float first, float second) {
  if constexpr (sizeof(T) == 2) {
    return pack<T>(first, second);
  } else {
    return {first, second};
  }
}
__device__ __forceinline__ void store_global(void* p, float2 v) {
  store_global(p, make_uint2(__float_as_uint(v.x), __float_as_uint(v.y)));
}

}  // namespace ghostfused
