// The 1×1 convolution by NEON's products of a vector and one lane of another. A row's next four factors come by one
// load, where one load for each would take as many slots as half of the products: cores that run instructions in order
// would stand still.
#pragma once

#include "cpu/operand.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

#ifdef GHOSTFUSED_NEON
constexpr int kFactors = 4;  // in a vector

// What GCC's scheduler and its register allocation leave where it stands: they would read in another order, in pairs
// that a Cortex-A55 reads slowly, and copy sums from register to register. Factors of fp16 lie in the first sixteen.
template <bool kFirstRegisters = false>
GHOSTFUSED_INLINE Vec load_here(const float* p) {
  typedef Vec Memory __attribute__((may_alias, aligned(4)));
  Vec v;
  if constexpr (kFirstRegisters) {
    asm volatile("ldr %q0, %1" : "=x"(v) : "m"(*reinterpret_cast<const Memory*>(p)));
  } else {
    asm volatile("ldr %q0, %1" : "=w"(v) : "m"(*reinterpret_cast<const Memory*>(p)));
  }
  return v;
}
GHOSTFUSED_INLINE Vec load_numbers(const float* p) { return load_here(p); }
GHOSTFUSED_INLINE Vec load_numbers(const BFloat16* p) { return load_float(p); }

// sum += the product of lane kLane of a vector of factors and a vector of a row: multiply_add's kPart-th operation.
template <typename T, bool kChannelsLast, int kLane, int kPart>
GHOSTFUSED_INLINE void add_product(Vec a, Vec b, Vec& sum) {
  if constexpr (Operand<T, kChannelsLast>::kChannels == 1) {
    asm volatile("fmla %0.4s, %1.4s, %2.s[%3]" : "+w"(sum) : "w"(b), "w"(a), "i"(kLane));
  } else if constexpr (kPart == 0) {
    asm volatile("fmlal %0.4s, %1.4h, %2.h[%3]" : "+w"(sum) : "w"(b), "x"(a), "i"(2 * kLane));
  } else {
    asm volatile("fmlal2 %0.4s, %1.4h, %2.h[%3]" : "+w"(sum) : "w"(b), "x"(a), "i"(2 * kLane + 1));
  }
}

template <typename T, bool kChannelsLast>
constexpr int kParts = Operand<T, kChannelsLast>::kChannels;

// One step of depth, whose factors are in lane kLane. No sum's second product follows its first at once.
template <typename T, bool kChannelsLast, int kLane, int kPart = 0, int kRows, int kVecs>
GHOSTFUSED_INLINE void add_lane(const Vec (&factors)[kRows], const Vec (&row)[kVecs], Vec (&sum)[kRows][kVecs]) {
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) {
      add_product<T, kChannelsLast, kLane, kPart>(factors[i], row[j], sum[i][j]);
    }
  }
  if constexpr (kPart + 1 < kParts<T, kChannelsLast>) {
    add_lane<T, kChannelsLast, kLane, kPart + 1>(factors, row, sum);
  }
}

// 0, step, 2 step and 3 step, in registers: GCC would add them up in the loop.
GHOSTFUSED_INLINE void keep_multiples(int64_t step, int64_t (&multiples)[kFactors]) {
#pragma GCC unroll 4
  for (int k = 0; k < kFactors; ++k) {
    multiples[k] = k * step;
    if (k > 0) asm("" : "+r"(multiples[k]));
  }
}

// sum += the first ``steps`` fours of lanes; a, b and ahead, which is fetched row by row in NCHW, go to what follows
// them. Loads stand in two groups: cores that run instructions in order finish them in order, so that each load behind
// a product waits for that product's end.
template <typename T, bool kChannelsLast, typename B, int kRows, int kVecs>
GHOSTFUSED_INLINE void multiply_fours(const float*& a, const int64_t* a_row, const B*& b, int64_t b_row, int64_t b_vec,
                                      int64_t steps, const float*& ahead, int64_t ahead_row, Vec (&sum)[kRows][kVecs]) {
  int64_t at[kFactors], ahead_at[kFactors];
  if constexpr (kChannelsLast) {
    for (int k = 0; k < kFactors; ++k) at[k] = k * kLanes;
  } else {
    keep_multiples(b_row, at);
    keep_multiples(ahead_row, ahead_at);
  }
  const B* column[kVecs];
#pragma GCC unroll 8
  for (int j = 0; j < kVecs; ++j) column[j] = next_row(b, j * b_vec);
  const auto load_row = [&](int k, Vec(&row)[kVecs]) {
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) row[j] = load_numbers(column[j] + at[k]);
  };
  b += steps * kFactors * b_row;
  while (steps != 0) {
    Vec factors[kRows], even[kVecs], odd[kVecs];
    load_row(0, even);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) factors[i] = load_here<kParts<T, kChannelsLast> == 2>(a + a_row[i]);
    load_row(1, odd);
    add_lane<T, kChannelsLast, 0>(factors, even, sum);
    add_lane<T, kChannelsLast, 1>(factors, odd, sum);
    load_row(2, even);
    load_row(3, odd);
    if (!kChannelsLast) {
#pragma GCC unroll 4
      for (int k = 0; k < kFactors; ++k) __builtin_prefetch(ahead + ahead_at[k]);
      ahead = next_row(ahead, kFactors * ahead_row);
    }
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) column[j] = next_row(column[j], kFactors * b_row);
    a = next_row(a, kFactors);
    --steps;  // here, or the jump would wait for it
    asm volatile("" : "+r"(steps));
    add_lane<T, kChannelsLast, 2>(factors, even, sum);
    add_lane<T, kChannelsLast, 3>(factors, odd, sum);
  }
}
#endif

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
