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

template <bool kExact>
__device__ __forceinline__ float exponential(float x) {
  if constexpr (kExact) return expf(x);
  float y;  // without the code for results below fp32's normal numbers
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
  return y;
}

// 1 / x of a number that is no less than 1, infinity among them.
template <bool kExact>
__device__ __forceinline__ float reciprocal(float x) {
  if constexpr (kExact) x = fminf(x, 3.40282347e38f);  // 0 * infinity would be NaN
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return kExact ? fmaf(fmaf(-x, y, 1.f), y, y) : y;
}

template <bool kExact>
__device__ __forceinline__ float sigmoid(float x) {
  if constexpr (!kExact) {  // as below, in one statement: the PTX, a good part of the extension, is shorter
    float y;
    asm("{.reg .f32 t; mul.f32 t, %1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000; "
        "rcp.approx.ftz.f32 %0, t;}"
        : "=f"(y)
        : "f"(x));
    return y;
  }
  return reciprocal<kExact>(1.f + exponential<kExact>(-x));
}

// GELU is x sigmoid(x times this).
__device__ __forceinline__ float gelu_argument(float x, Act act) {
  using G = GeluArgument;
  const float square = x * x;
  if (act == Act::kGELUTanh) return fmaf(G::kTanh1, square, G::kTanh0);
  const float t = square > G::kEnd ? G::kEnd : square;
  float p = fmaf(G::c7, t, G::c6);
  p = fmaf(p, t, G::c5);
  p = fmaf(p, t, G::c4);
  p = fmaf(p, t, G::c3);
  p = fmaf(p, t, G::c2);
  p = fmaf(p, t, G::c1);
  return fmaf(p, t, G::c0);
}

// Mish is x n / (n + 2) with n = e^x (e^x + 2), and x from 30 on.
template <bool kExact>
struct MishGate {
  float e, n, over;  // e^x, n, 1 / (n + 2)

  __device__ __forceinline__ explicit MishGate(float x) : e(exponential<kExact>(x > 30.f ? 30.f : x)) {
    n = e * (e + 2.f);
    over = reciprocal<kExact>(n + 2.f);
  }
};

// GELU and Mish, and their derivatives: a kernel has their code once, and calls it for one number after the other.
template <bool kExact>
__device__ __noinline__ float curved(float x, Act act) {
  if (act == Act::kMish) {
    const MishGate<kExact> gate(x);
    return x * (gate.n * gate.over);
  }
  return x * sigmoid<kExact>(x * gelu_argument(x, act));
}

template <bool kExact>
__device__ __noinline__ float curved_derivative(float x, Act act) {
  if (act == Act::kMish) {
    const MishGate<kExact> gate(x);
    return gate.n * gate.over + x * (4.f * gate.e * gate.over) * ((gate.e + 1.f) * gate.over);
  }
  // of s = 1 / (1 + e^-a) both s and s (1 - s), which loses no digits where s is near 1
  const float a = x * gelu_argument(x, act), e = exponential<kExact>(-fabsf(a)), over = reciprocal<kExact>(1.f + e);
  const float s = a < 0.f ? e * over : over;
  const float slope = act == Act::kGELU
                          ? exponential<kExact>(-0.5f * x * x) * 0.398942280f
                          : e * over * over * fmaf(3.f * GeluArgument::kTanh1, x * x, GeluArgument::kTanh0);
  return fmaf(x, slope, s);
}

__device__ __forceinline__ bool is_curved(Act act) { return act >= Act::kGELU; }

// to(x[0]), … x[kCount - 1] one by one: a loop that isn't unrolled can't index registers, so the numbers move on.
template <int kCount, typename To>
__device__ __forceinline__ void one_by_one(float (&x)[kCount], To to) {
#pragma unroll 1
  for (int i = 0; i < kCount; ++i) {
    const float y = to(x[0]);
#pragma unroll
    for (int j = 1; j < kCount; ++j) x[j - 1] = x[j];
    x[kCount - 1] = y;
  }
}

template <int kCount, bool kExact>
__device__ __forceinline__ void activate(float (&x)[kCount], Act act, const float (&slope)[kCount]) {
  if (act == Act::kSiLU) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] *= sigmoid<kExact>(x[i]);
  } else if (act == Act::kHardswish) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      x[i] *= __saturatef(kExact ? (x[i] + 3.f) * (1.f / 6.f) : fmaf(x[i], 1.f / 6.f, 0.5f));
    }
  } else if (is_curved(act)) {
    one_by_one(x, [&](float v) { return curved<kExact>(v, act); });
  } else {
    const bool zero = act == Act::kReLU || act == Act::kReLU6;  // 0 * -inf would be NaN
    const float cap = act == Act::kReLU6 ? 6.f : __int_as_float(0x7f800000);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float negative = zero ? 0.f : slope[i] * x[i];
      x[i] = x[i] < 0.f ? negative : x[i];
      asm("min.NaN.f32 %0, %0, %1;" : "+f"(x[i]) : "f"(cap));
    }
  }
}

// The same of rows whose columns have a slope each: nothing and ReLU at once, what is longer with the code of one row.
template <bool kExact, int kRows, int kCount>
__device__ __forceinline__ void activate_rows(float (&x)[kRows][kCount], Act act, const float (&slope)[kCount]) {
  if (act == Act::kNone) return;
  if (act == Act::kReLU) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) asm("max.NaN.f32 %0, %0, 0f00000000;" : "+f"(x[row][i]));
    }
    return;
  }
#pragma unroll 1
  for (int n = 0; n < kRows; ++n) {  // as one_by_one does
    float first[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) first[i] = x[0][i];
    activate<kCount, kExact>(first, act, slope);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int row = 1; row < kRows; ++row) x[row - 1][i] = x[row][i];
      x[kRows - 1][i] = first[i];
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
      const float s = sigmoid<kExact>(z[i]);
      grad[i] *= s * (1.f + z[i] * (1.f - s));
    }
  } else if (act == Act::kHardswish) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float inner = z[i] < 3.f ? grad[i] * (z[i] * (1.f / 3.f) + 0.5f) : grad[i];
      grad[i] = z[i] <= -3.f ? 0.f : inner;
    }
  } else if (is_curved(act)) {
    float derivative[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) derivative[i] = z[i];
    one_by_one(derivative, [&](float v) { return curved_derivative<kExact>(v, act); });
#pragma unroll
    for (int i = 0; i < kCount; ++i) grad[i] *= derivative[i];
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
