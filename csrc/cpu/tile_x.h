// x under a tile's rows, as the multiplication reads it where it can't read it as it lies.
#pragma once

#include "cpu/pack_x.h"
#include "cpu/patches.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

template <typename T, bool kChannelsLast>
class TileX {
  using Number = typename Operand<T, kChannelsLast>::Number;

 public:
  TileX(const GhostForwardParams& p, const Plan& plan, const Scratch& at, float* scratch)
      : planes(p, plan, scratch + at.planes), p(p), plan(plan), at(at), to(scratch + at.packed_x) {}

  // Rows begin … end - 1 of image n. The tile's own are h0 … h1 - 1.
  void make(int64_t n, int64_t begin, int64_t h0, int64_t h1, int64_t end) {
    first = begin, own = max_of(h0, begin), own_end = h1;
    const T* gate = plan.gate_weight ? nullptr : gate_of<T>(p, n);
    if constexpr (kChannelsLast) {
      const int64_t row = at.packed_x_row * Operand<T, kChannelsLast>::kChannels;
      const auto pack = plan.patches ? pack_patch_pixels<T, Number> : pack_pixels<T, Number>;
      pack(p, gate, n, begin, end - begin, reinterpret_cast<Number*>(to), row);
    } else if (plan.patches) {
      planes.make(gate, n, begin, end);
    } else if (!plan.panels) {
      pack_planes(p, gate, n, begin, end - begin, to, at.packed_x_row);
    } else {
      for (const auto& [top, until] : {std::pair{begin, own}, {own, h1}, {h1, end}}) {
        if (top < until) pack_panels(p, gate, n, top, until - top, to + panels_before(top));
      }
    }
  }

  // NCHW: where the panels of the rows from ``top`` on begin. The tile's own rows have their panels, and so have those
  // above and below.
  int64_t panels_before(int64_t top) const {
    const auto lanes = [&](int64_t rows) { return div_up(max_of<int64_t>(rows, 0) * p.shape.width, kLanes) * kLanes; };
    return (lanes(min_of(top, own) - first) + lanes(min_of(top, own_end) - own)) * plan.depth;
  }

  PaddedPlanes<T> planes;

 private:
  const GhostForwardParams& p;
  const Plan& plan;
  const Scratch& at;
  float* const to;
  int64_t first = 0, own = 0, own_end = 0;
};

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
