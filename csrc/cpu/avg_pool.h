// Means under a square window that moves by its own size.
#pragma once

#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

// A vector of means, of windows or of channels ``stride`` apart: the sums of rows one after the other, as PyTorch's.
template <typename T>
GHOSTFUSED_INLINE Vec means(const PoolParams& p, const T* x, int64_t stride, int lanes) {
  Vec sum{};
  for (int64_t i = 0; i < p.kernel; ++i) {
    for (int64_t j = 0; j < p.kernel; ++j) {
      sum += load_strided(x + i * p.x.stride_h + j * p.x.stride_w, stride, lanes);
    }
  }
  return sum / static_cast<float>(p.kernel * p.kernel);
}

template <typename T>
void avg_pool(Items& items, void* context) {
  const auto& [p, bands] = *static_cast<const PoolTask*>(context);
  const int64_t vector = p.channels_last ? kLanes : 1, parts = div_up(p.channels, vector);
  for_each_unit(items, [&](int64_t unit) {
    const int64_t part = unit % parts, band = unit / parts % bands, n = unit / parts / bands;
    const int64_t c = part * vector;
    const T* const x = static_cast<const T*>(p.x.data) + n * p.x.stride_n + c * p.x.stride_c;
    T* const out = static_cast<T*>(p.out.data) + n * p.out.stride_n + c * p.out.stride_c;
    const int64_t window = p.kernel * p.x.stride_w;  // from a column of the result to the next, in x
    const int64_t stride = p.channels_last ? p.x.stride_c : window, step = p.channels_last ? 1 : kLanes;
    const int lanes = min_of<int64_t>(p.channels_last ? p.channels - c : p.out_width, kLanes);
    for (int64_t h = band * p.out_height / bands; h < (band + 1) * p.out_height / bands; ++h) {
      const T* const row = x + h * p.kernel * p.x.stride_h;
      T* const to = out + h * p.out.stride_h;
      for (int64_t w = 0; w < p.out_width; w += step) {
        // in NCHW the last vector ends where the row does
        const int64_t first = p.channels_last ? w : min_of<int64_t>(w, p.out_width - lanes);
        store_part(to + first * p.out.stride_w, means(p, row + first * window, stride, lanes), lanes);
      }
    }
  });
}

inline void avg_pool(const PoolParams& p, int threads) {
  PoolTask task{p, row_bands(p.batch, p.out_height, threads)};
  const int64_t parts = div_up(p.channels, p.channels_last ? kLanes : 1);
  const double numbers = static_cast<double>(p.batch) * p.channels * p.height * p.width;
  run(threads, p.batch * task.bands * parts, 2 * numbers, GHOSTFUSED_BY_PATH(p.path, avg_pool), &task);
}

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
