// Activations of many values at once.
#pragma once

#include "cuda/activation.cuh"
#include "cuda/half_pairs.cuh"

namespace ghostfused {

// An activation, the same for a whole launch but for PReLU's slopes: one branch for all of a thread's values.
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
      ghostfused::activate<kCount, false>(z, act, slopes);
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
      ghostfused::activate_backward<kCount, false>(grad, z, act, slopes);
    }
  }
};

}  // namespace ghostfused
