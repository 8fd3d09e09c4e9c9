// Products of matrices that both lie along the summed dimension, as those of a fully connected layer do.
#pragma once

#include "cpu/vec.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

constexpr int kDotColumns = 4;

GHOSTFUSED_INLINE float sum_of_lanes(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// y[j * y_step] = sum over k of a[k] * b[j * b_column + k]. Each sum is made of as many chains, whatever kColumns is.
template <typename T, int kColumns>
void dot_row(const T* a, const float* b, int64_t b_column, int64_t depth, float* y, int64_t y_step) {
  constexpr int kChains = 4;
  Vec sum[kColumns][kChains] = {};
  const auto add = [&](int64_t k, int chain, auto load_a, auto load_b) {
    const Vec row = load_a(a + k);
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) {
      sum[j][chain] = fused(row, load_b(b + j * b_column + k), sum[j][chain]);
    }
  };
  const auto whole = [](auto* p) { return load_float(p); };
  int64_t k = 0;
  for (; k + kChains * kLanes <= depth; k += kChains * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) add(k + i * kLanes, i, whole, whole);
  }
  for (; k + kLanes <= depth; k += kLanes) add(k, 0, whole, whole);
  if (const int rest = static_cast<int>(depth - k)) {
    const auto part = [rest](auto* p) { return load_part(p, rest); };
    add(k, 1, part, part);
  }
  for (int j = 0; j < kColumns; ++j) {
    y[j * y_step] = sum_of_lanes((sum[j][0] + sum[j][1]) + (sum[j][2] + sum[j][3]));
  }
}

// y[j * y_column + i] = sum over k of a[i * a_row + k] * b[j * b_column + k]. Row after row: a matrix that is read once
// comes from memory fastest as it lies there.
template <typename T>
void dot(const T* a, int64_t a_row, int rows, const float* b, int64_t b_column, int columns, int64_t depth, float* y,
         int64_t y_column) {
  for (int i = 0; i < rows; ++i, a += a_row, ++y) {
    int j = 0;
    for (; j + kDotColumns <= columns; j += kDotColumns) {
      dot_row<T, kDotColumns>(a, b + j * b_column, b_column, depth, y + j * y_column, y_column);
    }
    for (; j < columns; ++j) dot_row<T, 1>(a, b + j * b_column, b_column, depth, y + j * y_column, y_column);
  }
}

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
