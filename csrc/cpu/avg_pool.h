// Means under a square window that moves by its own size.
#pragma once

#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

struct AvgPoolTask {
  const PoolParams& p;
  int64_t bands;
};

// The sum of what ``load_at`` finds under a window, row by row as PyTorch sums it.
template <typename LoadAt>
GHOSTFUSED_INLINE Vec mean_under(int64_t kernel, const LoadAt& load_at) {
  Vec sum = load_at(0, 0);
  for (int64_t i = 0; i < kernel; ++i) {
    for (int64_t j = i == 0; j < kernel; ++j) sum += load_at(i, j);
  }
  return sum / static_cast<float>(kernel * kernel);
}

template <typename T>
void avg_pool(Items& items, void* context) {
  const auto& [p, bands] = *static_cast<const AvgPoolTask*>(context);
  const int64_t vector = p.channels_last ? kLanes : 1, parts = div_up(p.channels, vector);
  for_each_unit(items, [&](int64_t unit) {
    const int64_t part = unit % parts, band = unit / parts % bands, n = unit / parts / bands;
    const int64_t c = part * vector;
    const T* const x = static_cast<const T*>(p.x.data) + n * p.x.stride_n + c * p.x.stride_c;
    T* const out = static_cast<T*>(p.out.data) + n * p.out.stride_n + c * p.out.stride_c;
    const int channels = min_of<int64_t>(p.channels - c, kLanes);
    for (int64_t h = band * p.out_height / bands; h < (band + 1) * p.out_height / bands; ++h) {
      const T* const row = x + h * p.kernel * p.x.stride_h;
      T* const to = out + h * p.out.stride_h;
      if (p.channels_last) {
        for (int64_t w = 0; w < p.out_width; ++w) {
          const T* const pixel = row + w * p.kernel * p.x.stride_w;
          const Vec mean = mean_under(p.kernel, [&](int64_t i, int64_t j) {
            return load_strided(pixel + i * p.x.stride_h + j * p.x.stride_w, p.x.stride_c, channels);
          });
          store_part(to + w * p.out.stride_w, mean, channels);
        }
      } else {
        for (int64_t w = 0; w < p.out_width; w += kLanes) {
          // the last vector ends where the row does
          const int64_t first = max_of<int64_t>(min_of<int64_t>(w, p.out_width - kLanes), 0);
          const int lanes = min_of<int64_t>(p.out_width, kLanes);
          const T* const pixel = row + first * p.kernel * p.x.stride_w;
          const Vec mean = mean_under(p.kernel, [&](int64_t i, int64_t j) {
            return load_strided(pixel + i * p.x.stride_h + j * p.x.stride_w, p.kernel * p.x.stride_w, lanes);
          });
          store_part(to + first, mean, lanes);
        }
      }
    }
  });
}

inline void avg_pool(const PoolParams& p, int threads) {
  AvgPoolTask task{p, bands_of(p, threads)};
  const int64_t parts = div_up(p.channels, p.channels_last ? kLanes : 1);
  const double numbers = static_cast<double>(p.batch) * p.channels * p.height * p.width;
  run(threads, p.batch * task.bands * parts, 2 * numbers, GHOSTFUSED_BY_PATH(p.path, avg_pool), &task);
}

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
