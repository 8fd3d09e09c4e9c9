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

// Sums of the lanes of vectors, in the same order: as many vectors at a time as each has lanes, by transposing them.
class LaneSums {
 public:
  ~LaneSums() { flush(); }

  GHOSTFUSED_INLINE void add(Vec v, float* sum) {
    vector_[count_] = v;
    sum_[count_] = sum;
    if (++count_ == kLanes) flush();
  }

 private:
  void flush() {
    const int count = std::exchange(count_, 0);
    if (count == 0) return;
    for (int i = count; i < kLanes; ++i) vector_[i] = Vec{};
    transpose(vector_);
#pragma GCC unroll 4
    for (int half = kLanes / 2; half; half /= 2) {
      for (int i = 0; i < half; ++i) vector_[i] += vector_[i + half];
    }
    for (int i = 0; i < count; ++i) *sum_[i] = vector_[0][i];
  }

  Vec vector_[kLanes];
  float* sum_[kLanes];
  int count_ = 0;
};

// y[j * y_step] = sum over k of a[k] * b[j * b_column + k]. Each sum is made of as many chains, whatever kColumns is.
template <typename T, int kColumns>
void dot_row(const T* a, const float* b, int64_t b_column, int64_t depth, float* y, int64_t y_step, LaneSums& sums) {
  constexpr int kChains = 4;
  Vec sum[kColumns][kChains];
#pragma GCC unroll 4
  for (int j = 0; j < kColumns; ++j) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) sum[j][i] = Vec{};
  }
  int64_t k = 0;
  for (; k + kChains * kLanes <= depth; k += kChains * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) {
      const Vec row = load_float(a + k + i * kLanes);
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j) {
        sum[j][i] = fused(row, load(b + j * b_column + k + i * kLanes), sum[j][i]);
      }
    }
  }
  for (; k + kLanes <= depth; k += kLanes) {
    const Vec row = load_float(a + k);
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) sum[j][0] = fused(row, load(b + j * b_column + k), sum[j][0]);
  }
  if (const int rest = static_cast<int>(depth - k)) {
    const Vec row = load_part(a + k, rest);
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) sum[j][1] = fused(row, load_part(b + j * b_column + k, rest), sum[j][1]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < kColumns; ++j) {
    sums.add((sum[j][0] + sum[j][1]) + (sum[j][2] + sum[j][3]), y + j * y_step);
  }
}

// y[j * y_column + i] = sum over k of a[i * a_row + k] * b[j * b_column + k]. Row after row: a matrix that is read once
// comes from memory fastest as it lies there.
template <typename T>
void dot(const T* a, int64_t a_row, int rows, const float* b, int64_t b_column, int columns, int64_t depth, float* y,
         int64_t y_column) {
  LaneSums sums;
  for (int i = 0; i < rows; ++i, a += a_row, ++y) {
    int j = 0;
    for (; j + kDotColumns <= columns; j += kDotColumns) {
      dot_row<T, kDotColumns>(a, b + j * b_column, b_column, depth, y + j * y_column, y_column, sums);
    }
    for (; j < columns; ++j) dot_row<T, 1>(a, b + j * b_column, b_column, depth, y + j * y_column, y_column, sums);
  }
}

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
