// Copies maps from one memory format to the other.
#pragma once

#include "cpu/parallel.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

// Rows first … first + count - 1 of a matrix, to columns of another.
template <typename T>
void transpose_rows(const T* from, int64_t rows, int64_t columns, int64_t first, int count, T* to) {
  from += first * columns;
  to += first;
  for (int64_t j = 0; j < columns; j += kLanes) {
    const int lanes = min_of<int64_t>(columns - j, kLanes);
    Vec v[kLanes];
    for (int i = 0; i < kLanes; ++i) v[i] = i < count ? load_part(from + i * columns + j, lanes) : Vec{};
    transpose(v);
    for (int i = 0; i < lanes; ++i) store_part(to + (j + i) * rows, v[i], count);
  }
}

template <typename T>
void convert(Items& items, void* context) {
  const ConvertParams& p = *static_cast<const ConvertParams*>(context);
  const int64_t pixels = int64_t{p.height} * p.width;
  const int64_t rows = p.to_channels_last ? p.channels : pixels, columns = p.to_channels_last ? pixels : p.channels;
  const int64_t blocks = div_up(rows, kLanes);
  for_each_unit(items, [&](int64_t unit) {
    const int64_t image = unit / blocks * rows * columns, first = unit % blocks * kLanes;
    transpose_rows(static_cast<const T*>(p.from) + image, rows, columns, first, min_of<int64_t>(rows - first, kLanes),
                   static_cast<T*>(p.to) + image);
  });
}

inline void convert(const ConvertParams& p, int threads) {
  const int64_t pixels = int64_t{p.height} * p.width, rows = p.to_channels_last ? p.channels : pixels;
  const double numbers = static_cast<double>(p.batch) * p.channels * static_cast<double>(pixels);
  ConvertParams params = p;
  run(threads, p.batch * div_up(rows, kLanes), 4 * numbers, GHOSTFUSED_BY_PATH(p.path, convert), &params);
}

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
