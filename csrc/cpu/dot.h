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

// The same for one row and one column: a matrix that is read once comes from memory fastest as it lies there.
template <typename T>
float dot_row(const T* a, const float* b, int64_t depth) {
  constexpr int kChains = 8;
  Vec sum[kChains] = {};
  int64_t k = 0;
  for (; k + kChains * kLanes <= depth; k += kChains * kLanes) {
#pragma GCC unroll 8
    for (int i = 0; i < kChains; ++i) sum[i] += load_float(a + k + i * kLanes) * load(b + k + i * kLanes);
  }
  for (; k + kLanes <= depth; k += kLanes) sum[0] += load_float(a + k) * load(b + k);
  if (const int rest = static_cast<int>(depth - k)) sum[1] += load_part(a + k, rest) * load_part(b + k, rest);
#pragma GCC unroll 4
  for (int half = kChains / 2; half; half /= 2) {
    for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
  }
  return sum_of_lanes(sum[0]);
}

template <typename T>
void dot(const T* a, int64_t a_row, int rows, const float* b, int64_t b_column, int columns, int64_t depth, float* y,
         int64_t y_column) {
  if (columns == 1) {
    for (int i = 0; i < rows; ++i) y[i] = dot_row(a + i * a_row, b, depth);
    return;
  }
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
