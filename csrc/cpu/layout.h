// Copies maps from one memory format to the other, and numbers from one type to another.
#pragma once

#include "cpu/parallel.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

// A square of vectors at (row, column) of a matrix of ``rows`` × ``columns``, to the transposed one.
template <typename T>
void transpose_square(const T* from, int64_t rows, int64_t columns, int64_t row, int64_t column, T* to) {
  const int height = min_of<int64_t>(rows - row, kLanes), width = min_of<int64_t>(columns - column, kLanes);
  from += row * columns + column;
  to += column * rows + row;
  Vec v[kLanes];
  for (int i = 0; i < kLanes; ++i) v[i] = i < height ? load_part(from + i * columns, width) : Vec{};
  transpose(v);
  for (int i = 0; i < width; ++i) store_part(to + i * rows, v[i], height);
}

template <typename T>
void convert(Items& items, void* context) {
  const ConvertParams& p = *static_cast<const ConvertParams*>(context);
  const int64_t pixels = int64_t{p.height} * p.width, blocks = div_up(pixels, kLanes);
  for_each_unit(items, [&](int64_t unit) {  // a vector of pixels, as threads share maps by rows
    const int64_t image = unit / blocks * p.channels * pixels, pixel = unit % blocks * kLanes;
    const T* from = static_cast<const T*>(p.from) + image;
    T* to = static_cast<T*>(p.to) + image;
    for (int64_t c = 0; c < p.channels; c += kLanes) {
      if (p.to_channels_last) {
        transpose_square(from, p.channels, pixels, c, pixel, to);
      } else {
        transpose_square(from, pixels, p.channels, pixel, c, to);
      }
    }
  });
}

inline void convert(const ConvertParams& p, int threads) {
  const int64_t pixels = int64_t{p.height} * p.width;
  const double numbers = static_cast<double>(p.batch) * p.channels * static_cast<double>(pixels);
  ConvertParams params = p;
  run(threads, p.batch * div_up(pixels, kLanes), 4 * numbers, GHOSTFUSED_BY_PATH(p.path, convert), &params);
}

constexpr int64_t kCastUnit = 4096;  // numbers

template <typename From, typename To>
void cast_run(const void* from, int64_t stride, void* to, int64_t count) {
  const From* const source = static_cast<const From*>(from);
  for (int64_t i = 0; i < count; i += kLanes) {
    const int lanes = min_of<int64_t>(count - i, kLanes);
    Vec v{};
    if (stride == 1) {
      v = load_part(source + i, lanes);
    } else {
      for (int j = 0; j < lanes; ++j) v[j] = to_float(source[(i + j) * stride]);
    }
    store_part(static_cast<To*>(to) + i, v, lanes);
  }
}

template <typename From>
void cast(Items& items, void* context) {
  const CastParams& p = *static_cast<const CastParams*>(context);
  const auto run = p.to_path == Path::kFloat16    ? cast_run<From, Float16>
                   : p.to_path == Path::kBFloat16 ? cast_run<From, BFloat16>
                                                  : cast_run<From, float>;
  const int64_t to_bytes = p.to_path == Path::kFloat32 ? 4 : 2, runs = div_up(p.sizes[3], kCastUnit);
  for_each_unit(items, [&](int64_t unit) {
    const int64_t row = unit / runs, first = unit % runs * kCastUnit;
    const int64_t from = row / (p.sizes[1] * p.sizes[2]) * p.strides[0] + row / p.sizes[2] % p.sizes[1] * p.strides[1] +
                         row % p.sizes[2] * p.strides[2] + first * p.strides[3];
    run(static_cast<const From*>(p.from) + from, p.strides[3],
        static_cast<char*>(p.to) + (row * p.sizes[3] + first) * to_bytes, min_of(p.sizes[3] - first, kCastUnit));
  });
}

inline void cast(const CastParams& p, int threads) {
  CastParams params = p;
  const int64_t rows = p.sizes[0] * p.sizes[1] * p.sizes[2];
  run(threads, rows * div_up(p.sizes[3], kCastUnit), 4 * static_cast<double>(rows * p.sizes[3]),
      GHOSTFUSED_BY_PATH(p.from_path, cast), &params);
}

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
