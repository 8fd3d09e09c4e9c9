// The 1×1 convolution of bf16 by NEON's bfmmla, which multiplies two rows of four channels by two columns: twice the
// products of bfdot, added up in bfdot's order, and so to the same bits.
#pragma once

#include "cpu/vec.h"

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

// sum = the first ``steps`` quads of channels; a and b go to what follows them. Lanes are pairs, as in Panel: two that
// follow each other are a row's quad in a, and in b, whose vectors are b_vec apart, they are zipped from two rows.
// ``fetch`` runs once per row of b.
template <int kRows, int kVecs, typename Fetch>
GHOSTFUSED_INLINE void multiply_quads(const float*& a, const int64_t* a_row, const float*& b, int64_t b_row,
                                      int64_t b_vec, int64_t steps, const Fetch& fetch, Vec (&sum)[kRows][kVecs]) {
  Vec block[kRows / 2][2 * kVecs];
#pragma GCC unroll 4
  for (int i = 0; i < kRows / 2; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < 2 * kVecs; ++j) block[i][j] = Vec{};
  }
  for (; steps > 0; --steps, a += 2, b += 2 * b_row) {
    Vec columns[2 * kVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      const Vec even = load(b + j * b_vec), odd = load(b + b_row + j * b_vec);
      columns[2 * j] = (Vec)vzip1q_f32((float32x4_t)even, (float32x4_t)odd);
      columns[2 * j + 1] = (Vec)vzip2q_f32((float32x4_t)even, (float32x4_t)odd);
    }
    fetch();
    fetch();
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
