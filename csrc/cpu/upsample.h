// Maps of more rows and columns, by their nearest neighbours.
#pragma once

#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

// Bits, of either size.
template <typename T>
void upsample(Items& items, void* context) {
  const auto& [p, bands] = *static_cast<const PoolTask*>(context);
  const int64_t parts = p.channels_last ? 1 : p.channels, scale = p.stride;
  const int64_t run = p.channels_last ? p.channels : 1;  // what is one after the other in the result, of one pixel
  const int64_t step = p.x.stride_w, bytes = run * static_cast<int64_t>(sizeof(T));
  for_each_unit(items, [&](int64_t unit) {
    const int64_t c = unit % parts, band = unit / parts % bands, n = unit / parts / bands;
    const T* const x = static_cast<const T*>(p.x.data) + n * p.x.stride_n + c * p.x.stride_c;
    T* const out = static_cast<T*>(p.out.data) + n * p.out.stride_n + c * p.out.stride_c;
    for (int64_t h = band * p.height / bands; h < (band + 1) * p.height / bands; ++h) {
      const T* const row = x + h * p.x.stride_h;
      T* const to = out + h * scale * p.out.stride_h;
      if (run > 1 && p.x.stride_c == 1) {
        for (int64_t w = 0; w < p.out_width; ++w) copy_run(to + w * run, row + w / scale * step, bytes);
      } else if (scale == 2 && run == 1 && step == 1) {  // which the compiler makes of vectors
        for (int64_t w = 0; w < p.width; ++w) to[2 * w] = to[2 * w + 1] = row[w];
      } else {
        for (int64_t i = 0; i < p.out_width * run; ++i) to[i] = row[i / run / scale * step + i % run * p.x.stride_c];
      }
      for (int64_t i = 1; i < scale; ++i) copy_run(to + i * p.out.stride_h, to, p.out_width * bytes);
    }
  });
}

inline void upsample(const PoolParams& p, int threads) {
  PoolTask task{p, row_bands(p.batch, p.height, threads)};
  const int64_t parts = p.channels_last ? 1 : p.channels;
  const double numbers = static_cast<double>(p.batch) * p.channels * p.out_height * p.out_width;
  const auto body = p.path == Path::kFloat32 ? upsample<uint32_t> : upsample<uint16_t>;
  run(threads, p.batch * task.bands * parts, 2 * numbers, body, &task);
}

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
