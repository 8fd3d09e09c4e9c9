// The activations, on fp32. The kind is the same for a whole launch, so a run-time branch costs next to nothing.
// NaN passes through all of them as in PyTorch: comparisons are written so that NaN takes the branch that keeps it.
#pragma once

#include "common/parameters.h"

namespace ghostfused {

// One activation of a launch. The slope for x < 0 is per channel: 1 without an activation, 0 for ReLU and ReLU6.
__device__ __forceinline__ float slope_of(const NormAct& p, float prelu_weight) {
  switch (p.act) {
    case Act::kReLU:
    case Act::kReLU6:
      return 0.f;
    case Act::kLeakyReLU:
      return p.negative_slope;
    case Act::kPReLU:
      return prelu_weight;
    default:
      return 1.f;
  }
}

template <int kCount, bool kExact>
__device__ __forceinline__ void activate(float (&x)[kCount], Act act, const float (&slope)[kCount]) {
  if (act == Act::kSiLU) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      x[i] = kExact ? x[i] / (1.f + expf(-x[i])) : __fdividef(x[i], 1.f + __expf(-x[i]));
    }
  } else if (act == Act::kHardswish) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] *= fminf(fmaxf(x[i] + 3.f, 0.f), 6.f) * (1.f / 6.f);
  } else {
    const bool zero = act == Act::kReLU || act == Act::kReLU6;  // 0 * -inf would be NaN
    const float cap = act == Act::kReLU6 ? 6.f : __int_as_float(0x7f800000);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float negative = zero ? 0.f : slope[i] * x[i];
      x[i] = x[i] < 0.f ? negative : x[i];
      x[i] = x[i] > cap ? cap : x[i];
    }
  }
}

// grad * act'(z), by PyTorch's conventions at the kinks.
template <int kCount, bool kExact>
__device__ __forceinline__ void activate_backward(float (&grad)[kCount], const float (&z)[kCount], Act act,
                                                  const float (&slope)[kCount]) {
  if (act == Act::kSiLU) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float s = kExact ? 1.f / (1.f + expf(-z[i])) : __fdividef(1.f, 1.f + __expf(-z[i]));
      grad[i] *= s * (1.f + z[i] * (1.f - s));
    }
  } else if (act == Act::kHardswish) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float inner = z[i] < 3.f ? grad[i] * (z[i] * (1.f / 3.f) + 0.5f) : grad[i];
      grad[i] = z[i] <= -3.f ? 0.f : inner;
    }
  } else {
    const bool zero = act == Act::kReLU || act == Act::kReLU6;  // 0 * inf would be NaN
    const float cap = act == Act::kReLU6 ? 6.f : __int_as_float(0x7f800000);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float below = zero ? 0.f : grad[i] * slope[i];
      grad[i] = z[i] <= 0.f ? below : grad[i];
      grad[i] = zero && z[i] >= cap ? 0.f : grad[i];
    }
  }
}

}  // namespace ghostfused
