// The 1×1 convolution of a map of one pixel, with no ghosts: the head of a network.
#pragma once

#include "cpu/dispatch.h"
#include "cpu/dot.h"
#include "cpu/output.h"
#include "cpu/pack_x.h"
#include "cpu/parallel.h"
#include "cpu/prepared.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

inline bool is_fully_connected(const GhostForwardParams& p) {
  const GhostShape& s = p.shape;
  return s.height == 1 && s.width == 1 && s.out_channels == s.init_channels && s.channels_last && p.kernel == 1 &&
         p.stride == 1 && p.primary_weight_stride_k == 1;
}

struct FullyConnected {
  const GhostForwardParams& p;
  const Packed& weight;
};

// A unit is one vector of output channels, for all images.
template <typename T>
void fully_connected(Items& items, void* context) {
  const auto& [p, packed] = *static_cast<const FullyConnected*>(context);
  const GhostShape& s = p.shape;
  const int64_t depth = s.in_channels, images = s.batch, channels = s.init_channels;
  float* x = thread_scratch(images * (depth + kLanes) + 3 * kLanes);
  float *y = x + images * depth, *own_norm = y + images * kLanes;
  const Parameters parameters(s);
  const int64_t next = packed.parameters ? parameters.step : kLanes;
  for (int64_t n = 0; n < images; ++n) pack_pixels(p, gate_of<T>(p, n), n, 0, 1, x + n * depth, depth);
  const Clamp bounds = clamp_of(p.primary.act);
  Output<T, true> output(p, nullptr);
  for_each_unit(items, [&](int64_t unit) {
    const int64_t c = unit * kLanes;
    const int lanes = min_of<int64_t>(kLanes, channels - c);
    const float* norm = packed.parameters ? packed.parameters + parameters.norms + c : own_norm;
    if (!packed.parameters) prepare_norm<T>(p.primary, c, 1, lanes, own_norm, kLanes);
    if (packed.data) {
      dot(static_cast<const BFloat16*>(packed.data) + c * depth, depth, lanes, x, depth, s.batch, depth, y, kLanes);
    } else {
      const T* weight = static_cast<const T*>(p.primary_weight) + c * p.primary_weight_stride_n;
      dot(weight, p.primary_weight_stride_n, lanes, x, depth, s.batch, depth, y, kLanes);
    }
    for (output.n = 0; output.n < images; ++output.n) {
      Vec v = load(y + output.n * kLanes) * load(norm) + load(norm + next);
      v = is_clamp(p.primary.act) ? clamp(v, bounds) : activated(v, load(norm + 2 * next), p.primary.act);
      output.store(v, c, 0, 0, lanes);
    }
  });
}

inline void fully_connected(const GhostForwardParams& p, const Packed& weight, int threads) {
  FullyConnected task{p, weight};
  const double work = static_cast<double>(p.shape.batch) * p.shape.init_channels * p.shape.in_channels;
  run(threads, div_up(p.shape.init_channels, kLanes), work, GHOSTFUSED_BY_PATH(p.shape.path, fully_connected), &task);
}

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
