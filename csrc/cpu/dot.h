// Products of matrices that both lie along the summed dimension, as those of a fully connected layer do.
#pragma once

#include "vec.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

constexpr int kDotRows = 4, kDotColumns = 4;

GHOSTFUSED_INLINE float sum_of_lanes(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// y[j * y_column + i] = sum over k of a[i * a_row + k] * b[j * b_column + k].
template <typename T, int kRows, int kColumns>
void dot_block(const T* a, int64_t a_row, const float* b, int64_t b_column, int64_t depth, float* y, int64_t y_column) {
  Vec sum[kRows][kColumns] = {};
  const auto add = [&](int64_t k, auto load_a, auto load_b) {
    Vec column[kColumns];
    for (int j = 0; j < kColumns; ++j) column[j] = load_b(b + j * b_column + k);
    for (int i = 0; i < kRows; ++i) {
      const Vec row = load_a(a + i * a_row + k);
      for (int j = 0; j < kColumns; ++j) sum[i][j] += row * column[j];
    }
  };
  const auto whole = [](auto* p) { return load_float(p); };
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) add(k, whole, whole);
  if (const int rest = static_cast<int>(depth - k)) {
    const auto part = [rest](auto* p) { return load_part(p, rest); };
    add(k, part, part);
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) y[j * y_column + i] = sum_of_lanes(sum[i][j]);
  }
}

template <typename T>
void dot(const T* a, int64_t a_row, int rows, const float* b, int64_t b_column, int columns, int64_t depth, float* y,
         int64_t y_column) {
  for (int j = 0; j < columns;) {
    const bool many = columns - j >= kDotColumns;
    for (int i = 0; i < rows;) {
      const bool four = rows - i >= kDotRows;
      const auto block = many   ? four ? dot_block<T, kDotRows, kDotColumns> : dot_block<T, 1, kDotColumns>
                         : four ? dot_block<T, kDotRows, 1>
                                : dot_block<T, 1, 1>;
      block(a + i * a_row, a_row, b + j * b_column, b_column, depth, y + j * y_column + i, y_column);
      i += four ? kDotRows : 1;
    }
    j += many ? kDotColumns : 1;
  }
}

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
