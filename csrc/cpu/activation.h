// The activations that are more than a clamp. They are made of several vectors in turn, step by step: one vector after
// the other, each step would wait for the one before, and more of them than a CPU looks at for what it could do.
#pragma once

#include "cpu/vec.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

#ifdef GHOSTFUSED_MANY_REGISTERS
constexpr int kInTurn = 4;
#else
constexpr int kInTurn = 2;
#endif

#define GHOSTFUSED_EACH _Pragma("GCC unroll 4") for (int i = 0; i < kCount; ++i)

#ifdef GHOSTFUSED_X86_MASKS  // with all bits set, for the forms without one make GCC 12 warn of what its headers don't
                             // set
#if GHOSTFUSED_LANES == 8
GHOSTFUSED_INLINE Vec estimate_reciprocal(Vec x) { return (Vec)_mm256_maskz_rcp14_ps(-1, (__m256)x); }
GHOSTFUSED_INLINE Vec times_power(Vec x, Vec n) { return (Vec)_mm256_maskz_scalef_ps(-1, (__m256)x, (__m256)n); }
#else
GHOSTFUSED_INLINE Vec estimate_reciprocal(Vec x) { return (Vec)_mm512_maskz_rcp14_ps(-1, (__m512)x); }
GHOSTFUSED_INLINE Vec times_power(Vec x, Vec n) { return (Vec)_mm512_maskz_scalef_ps(-1, (__m512)x, (__m512)n); }
#endif
#else
GHOSTFUSED_INLINE Vec times_power(Vec x, Vec n) {  // as a product of two powers, since n runs from -150 to 128
  const Ints whole = reinterpret_cast<Ints>(n + 0x1.8p23f) - 0x4b400000, half = whole >> 1;
  return x * reinterpret_cast<Vec>((half + 127) << 23) * reinterpret_cast<Vec>((whole - half + 127) << 23);
}
#endif

// x = e^x to two units in the last place: x = n ln 2 + r, a polynomial in r, and n in the exponent.
template <int kCount>
GHOSTFUSED_INLINE void exp(Vec (&x)[kCount]) {
  Vec n[kCount], p[kCount];
  GHOSTFUSED_EACH x[i] = clamp(x[i], {splat(-104.f), splat(89.f)});  // to 0 and infinity
  GHOSTFUSED_EACH n[i] = x[i] * 1.44269504f + 0x1.8p23f;             // rounds it
  GHOSTFUSED_EACH n[i] -= 0x1.8p23f;
  GHOSTFUSED_EACH x[i] = x[i] - n[i] * 0x1.62e4p-1f;
  GHOSTFUSED_EACH x[i] = x[i] - n[i] * 0x1.7f7d1cp-20f;
  GHOSTFUSED_EACH p[i] = splat(1.9875691500e-4f);
  GHOSTFUSED_EACH p[i] = p[i] * x[i] + 1.3981999507e-3f;
  GHOSTFUSED_EACH p[i] = p[i] * x[i] + 8.3334519073e-3f;
  GHOSTFUSED_EACH p[i] = p[i] * x[i] + 4.1665795894e-2f;
  GHOSTFUSED_EACH p[i] = p[i] * x[i] + 1.6666665459e-1f;
  GHOSTFUSED_EACH p[i] = p[i] * x[i] + 5.0000001201e-1f;
  GHOSTFUSED_EACH p[i] = p[i] * x[i];
  GHOSTFUSED_EACH p[i] = p[i] * x[i] + x[i];
  GHOSTFUSED_EACH x[i] = times_power(p[i] + 1.f, n[i]);
}

// a /= b to two units in the last place, for b of 1 and more.
template <int kCount>
GHOSTFUSED_INLINE void divide(Vec (&a)[kCount], const Vec (&b)[kCount]) {
#ifdef GHOSTFUSED_X86_MASKS  // whose division takes as long as e^x: an estimate and a step of Newton's
  Vec r[kCount], error[kCount];
  GHOSTFUSED_EACH r[i] = estimate_reciprocal(b[i]);
  GHOSTFUSED_EACH error[i] = 1.f - b[i] * r[i];
  GHOSTFUSED_EACH r[i] = b[i] == __builtin_inff() ? Vec{} : r[i] + r[i] * error[i];
  GHOSTFUSED_EACH a[i] *= r[i];
#else
  GHOSTFUSED_EACH a[i] /= b[i];
#endif
}

// x = x / (1 + e^t)
template <int kCount>
GHOSTFUSED_INLINE void divide_by_exp(Vec (&x)[kCount], Vec (&t)[kCount]) {
  exp(t);
  GHOSTFUSED_EACH t[i] += 1.f;
  divide(x, t);
}

template <int kCount>
GHOSTFUSED_INLINE void activate(Vec (&x)[kCount], Act act) {
  Vec t[kCount];
  switch (act) {
    case Act::kSiLU:
      GHOSTFUSED_EACH t[i] = -x[i];
      return divide_by_exp(x, t);
    case Act::kGELU: {
      using G = GeluArgument;
      Vec low[kCount], high[kCount];
      GHOSTFUSED_EACH t[i] = x[i] * x[i];
      GHOSTFUSED_EACH t[i] = t[i] > G::kEnd ? splat(G::kEnd) : t[i];
      GHOSTFUSED_EACH low[i] = ((G::c3 * t[i] + G::c2) * t[i] + G::c1) * t[i] + G::c0;
      GHOSTFUSED_EACH high[i] = ((G::c7 * t[i] + G::c6) * t[i] + G::c5) * t[i] + G::c4;
      GHOSTFUSED_EACH t[i] = -x[i] * (high[i] * (t[i] * t[i]) * (t[i] * t[i]) + low[i]);
      return divide_by_exp(x, t);
    }
    case Act::kGELUTanh:
      GHOSTFUSED_EACH t[i] = -x[i] * (GeluArgument::kTanh1 * x[i] * x[i] + GeluArgument::kTanh0);
      return divide_by_exp(x, t);
    case Act::kMish: {  // tanh(ln(1 + e^x)) = n / (n + 2), and 1 from 30 on
      Vec n[kCount];
      GHOSTFUSED_EACH t[i] = x[i] > 30.f ? splat(30.f) : x[i];
      exp(t);
      GHOSTFUSED_EACH n[i] = t[i] * (t[i] + 2.f);
      GHOSTFUSED_EACH t[i] = n[i] + 2.f;
      divide(n, t);
      GHOSTFUSED_EACH x[i] *= n[i];
      return;
    }
    case Act::kHardswish:  // as PyTorch rounds: 1 / 6 is no float
      GHOSTFUSED_EACH x[i] = x[i] * clamp(x[i] + 3.f, {Vec{}, splat(6.f)}) / 6.f;
      return;
    default:  // made elsewhere: a clamp, or sloped
      return;
  }
}

GHOSTFUSED_INLINE bool has_slope(Act act) { return act == Act::kLeakyReLU || act == Act::kPReLU; }
GHOSTFUSED_INLINE Vec sloped(Vec x, Vec slope) { return x > 0.f ? x : x * slope; }

template <int kCount>
GHOSTFUSED_INLINE void through_gate(Vec (&x)[kCount], Gate gate) {
  if (gate == Gate::kSigmoid) {
    Vec t[kCount];
    GHOSTFUSED_EACH t[i] = -x[i];
    GHOSTFUSED_EACH x[i] = splat(1.f);
    return divide_by_exp(x, t);
  }
  if (gate == Gate::kHardsigmoid) GHOSTFUSED_EACH x[i] += 3.f;
  GHOSTFUSED_EACH x[i] = clamp(x[i], clamp_of(Act::kReLU6));
  if (gate == Gate::kHardsigmoid) GHOSTFUSED_EACH x[i] /= 6.f;
}

// x = act(x), of those that neither are clamps nor have slopes. Out of line, since a call would make the kernels save
// every accumulator.
__attribute__((noinline)) static void activate(Vec* x, int count, Act act) {
  for (; count >= kInTurn; count -= kInTurn, x += kInTurn) {
    constexpr int kCount = kInTurn;
    Vec v[kCount];
    GHOSTFUSED_EACH v[i] = x[i];
    activate(v, act);
    GHOSTFUSED_EACH x[i] = v[i];
  }
  for (; count > 0; --count, ++x) {
    Vec v[1] = {*x};
    activate(v, act);
    *x = v[0];
  }
}

// Any of them, of one vector.
GHOSTFUSED_INLINE Vec activated(Vec x, Vec slope, Act act) {
  if (is_clamp(act)) return clamp(x, clamp_of(act));
  if (has_slope(act)) return sloped(x, slope);
  activate(&x, 1, act);
  return x;
}

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
