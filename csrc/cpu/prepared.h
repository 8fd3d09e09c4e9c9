// A Ghost module's norms and depthwise weights as its kernel reads them.
#pragma once

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/parameters.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

// Where they are, fp32, of all channels: offsets in floats.
struct Parameters {
  int64_t step;   // channels, in whole vectors
  int64_t cheap;  // per ghost of a channel: (channel, tap) in NCHW, (tap, channel) in channels_last
  int64_t norms;  // (scale, shift, slope) of the primary conv and of each ghost: (3, channel)
  int64_t size;

  explicit Parameters(const GhostShape& s) {
    const int64_t ghosts = s.out_channels > s.init_channels ? s.ratio - 1 : 0;
    step = div_up(s.init_channels, kLanes) * kLanes;
    cheap = 0;
    norms = ghosts * s.dw_size * s.dw_size * step;
    size = norms + (1 + ghosts) * 3 * step;
  }
};

// Whether the depthwise weights are read from there, and not where they lie.
inline bool packs_taps(const GhostForwardParams& p) {
  const GhostShape& s = p.shape;
  const bool is_float = s.path == Path::kFloat32 || s.path == Path::kTF32;
  return s.channels_last || !is_float || p.cheap_weight_stride_w != 1 || p.cheap_weight_stride_h != s.dw_size;
}

// Writes those of ``channels`` init channels from c0 on. In channels_last c0 begins a vector, and zeros fill the last.
template <typename T, bool kChannelsLast>
void prepare_parameters(const GhostForwardParams& p, const Parameters& at, int64_t c0, int64_t channels, float* to) {
  const GhostShape& s = p.shape;
  const int64_t ghosts = s.out_channels > s.init_channels ? s.ratio - 1 : 0, area = int64_t{s.dw_size} * s.dw_size;
  float *norm = to + at.norms + c0, *taps = to + at.cheap + (kChannelsLast ? c0 : c0 * area);
  if (kChannelsLast && channels % kLanes) {
    const int64_t last = channels / kLanes * kLanes;
    for (int64_t i = 0; i < 3 * (1 + ghosts); ++i) store(norm + i * at.step + last, Vec{});
    for (int64_t i = 0; i < ghosts * area; ++i) store(taps + i * at.step + last, Vec{});
  }
  prepare_norm<T>(p.primary, c0, 1, channels, norm, at.step);
  const Taps from{p.cheap_weight, p.cheap_weight_stride_c, p.cheap_weight_stride_h, p.cheap_weight_stride_w, s.dw_size,
                  s.dw_size};
  for (int64_t j = 0; j < ghosts; ++j, taps += area * at.step) {
    norm += 3 * at.step;
    const int64_t first = c0 * ghosts + j;
    prepare_norm<T>(p.cheap, first, ghosts, channels, norm, at.step);
    if (packs_taps(p)) {  // in channels_last as the walk meets them
      prepare_taps<T>(from, kChannelsLast, first, ghosts, channels, taps, kChannelsLast ? 1 : area,
                      kChannelsLast ? at.step : 1);
    }
  }
}

template <typename T>
int64_t pack_parameters(const GhostForwardParams& p, void* to) {
  const Parameters parameters(p.shape);
  if (to && p.shape.channels_last) {
    prepare_parameters<T, true>(p, parameters, 0, p.shape.init_channels, static_cast<float*>(to));
  } else if (to) {
    prepare_parameters<T, false>(p, parameters, 0, p.shape.init_channels, static_cast<float*>(to));
  }
  return parameters.size * sizeof(float);
}

inline int64_t pack_parameters(const GhostForwardParams& p, void* to) {
  return GHOSTFUSED_BY_PATH(p.shape.path, pack_parameters)(p, to);
}

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
