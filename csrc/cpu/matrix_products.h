// The 1×1 convolution of bf16 by NEON's bfmmla, which multiplies two rows of four channels by two columns: twice the
// products of bfdot, added up in bfdot's order, and so to the same bits.
#pragma once

#include "cpu/lane_products.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

#ifdef GHOSTFUSED_NEON_BF16
template <typename T, int kRows>
constexpr bool kMatrixProducts = std::is_same_v<T, BFloat16> && kRows % 2 == 0;

GHOSTFUSED_INLINE Vec first_halves(Vec a, Vec b) { return (Vec)vzip1q_f64((float64x2_t)a, (float64x2_t)b); }
GHOSTFUSED_INLINE Vec second_halves(Vec a, Vec b) { return (Vec)vzip2q_f64((float64x2_t)a, (float64x2_t)b); }

// Two rows by two columns, row-major.
GHOSTFUSED_INLINE Vec multiply_add_block(Vec rows, Vec columns, Vec block) {
  return (Vec)vbfmmlaq_f32((float32x4_t)block, (bfloat16x8_t)rows, (bfloat16x8_t)columns);
}

// Two quads of channels, whose products are twice a row's vector: block[i] += rows 2i and 2i + 1 times the columns. As
// in multiply_fours the compiler leaves the instructions where they stand, the loads in two groups.
template <int kRows, int kVecs, typename Fetch>
GHOSTFUSED_INLINE void multiply_two_quads(const float* a, const int64_t* a_row, const float* b,
                                          const int64_t (&b_row)[kFactors], int64_t b_vec, const Fetch& fetch,
                                          Vec (&block)[kRows / 2][2 * kVecs]) {
  Vec rows[2][kRows / 2], columns[2][2 * kVecs];
  const auto load_columns = [&](Vec(&to)[2 * kVecs], int k) {
#pragma GCC unroll 4
    for (int j = 0; j < 2 * kVecs; ++j) to[j] = load_here(b + b_row[k + j % 2] + j / 2 * b_vec);
  };
  const auto zip_columns = [](Vec(&v)[2 * kVecs]) {
#pragma GCC unroll 4
    for (int j = 0; j < 2 * kVecs; j += 2) {
      Vec second;
      asm volatile("zip2 %0.4s, %1.4s, %2.4s" : "=w"(second) : "w"(v[j]), "w"(v[j + 1]));
      asm volatile("zip1 %0.4s, %0.4s, %1.4s" : "+w"(v[j]) : "w"(v[j + 1]));
      v[j + 1] = second;
    }
  };
  const auto multiply_rows = [&](int q, int i) {
#pragma GCC unroll 4
    for (int j = 0; j < 2 * kVecs; ++j) {
      asm volatile("bfmmla %0.4s, %1.8h, %2.8h" : "+w"(block[i][j]) : "w"(rows[q][i]), "w"(columns[q][j]));
    }
  };
  load_columns(columns[0], 0);
  fetch();
#pragma GCC unroll 4
  for (int i = 0; i < kRows / 2; ++i) {
    rows[0][i] = load_here(a + a_row[2 * i]);
    rows[1][i] = load_here(a + a_row[2 * i + 1]);
  }
  zip_columns(columns[0]);
#pragma GCC unroll 4
  for (int i = 0; i < kRows / 2; ++i) {
    Vec second;
    asm volatile("zip2 %0.2d, %1.2d, %2.2d" : "=w"(second) : "w"(rows[0][i]), "w"(rows[1][i]));
    asm volatile("zip1 %0.2d, %0.2d, %1.2d" : "+w"(rows[0][i]) : "w"(rows[1][i]));
    rows[1][i] = second;
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows / 2; ++i) {
    if (i == kRows / 2 - 1) load_columns(columns[1], 2);
    multiply_rows(0, i);
  }
  zip_columns(columns[1]);
#pragma GCC unroll 4
  for (int i = 0; i < kRows / 2; ++i) multiply_rows(1, i);
}

// sum = the first ``steps`` quads of channels; a and b go to what follows them. Lanes are pairs, as in Panel: two that
// follow each other are a row's quad in a, and in b, whose vectors are b_vec apart, they are zipped from two rows.
template <bool kChannelsLast, int kRows, int kVecs>
GHOSTFUSED_INLINE void multiply_quads(const float*& a, const int64_t* a_row, const float*& b, int64_t b_row,
                                      int64_t b_vec, int64_t steps, const float*& ahead, int64_t ahead_row,
                                      Vec (&sum)[kRows][kVecs]) {
  Vec block[kRows / 2][2 * kVecs];
#pragma GCC unroll 4
  for (int i = 0; i < kRows / 2; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < 2 * kVecs; ++j) block[i][j] = Vec{};
  }
  int64_t at[kFactors], ahead_at[kFactors];
  if constexpr (kChannelsLast) {
    for (int k = 0; k < kFactors; ++k) at[k] = k * b_row;
  } else {
    keep_multiples(b_row, at);
    keep_multiples(ahead_row, ahead_at);
  }
  const auto fetch = [&](int rows) {
    if constexpr (!kChannelsLast) {
#pragma GCC unroll 4
      for (int k = 0; k < rows; ++k) __builtin_prefetch(ahead + ahead_at[k]);
      ahead = next_row(ahead, rows * ahead_row);
    }
  };
  for (; steps > 1; steps -= 2, a += kFactors, b += kFactors * b_row) {
    multiply_two_quads<kRows, kVecs>(a, a_row, b, at, b_vec, [&] { fetch(kFactors); }, block);
  }
  for (; steps > 0; --steps, a += 2, b += 2 * b_row) {
    Vec columns[2 * kVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      const Vec even = load(b + j * b_vec), odd = load(b + b_row + j * b_vec);
      columns[2 * j] = (Vec)vzip1q_f32((float32x4_t)even, (float32x4_t)odd);
      columns[2 * j + 1] = (Vec)vzip2q_f32((float32x4_t)even, (float32x4_t)odd);
    }
    fetch(2);
#pragma GCC unroll 4
    for (int i = 0; i < kRows / 2; ++i) {
      const float32x2_t first = vld1_f32(a + a_row[2 * i]), second = vld1_f32(a + a_row[2 * i + 1]);
      const Vec rows = (Vec)vcombine_f32(first, second);
#pragma GCC unroll 8
      for (int j = 0; j < 2 * kVecs; ++j) {
        block[i][j] = multiply_add_block(rows, columns[j], block[i][j]);
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows / 2; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      sum[2 * i][j] = first_halves(block[i][2 * j], block[i][2 * j + 1]);
      sum[2 * i + 1][j] = second_halves(block[i][2 * j], block[i][2 * j + 1]);
    }
  }
}
#else
template <typename T, int kRows>
constexpr bool kMatrixProducts = false;
inline Vec multiply_add_block(Vec, Vec, Vec block) { return block; }
#endif

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
