// A Ghost module's first half: the primary convolution of a tile's rows, block by block of its channels, to x1.
#pragma once

#include "cpu/output.h"
#include "cpu/pack_weight.h"
#include "cpu/parameters.h"
#include "cpu/plan.h"
#include "cpu/tile_x.h"
#include "cpu/tiles.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

// What a thread works on.
struct Unit {
  int64_t h0, h1;        // rows of the tile
  int64_t x_h0, x_h1;    // those that x1 is still to be made of
  int64_t c0, channels;  // the block
};

template <typename T, bool kChannelsLast>
class PrimaryConv {
  static constexpr int kPerLane = Operand<T, kChannelsLast>::kChannels;
  static constexpr bool kTiles = kHasTiles && kChannelsLast;
  static constexpr bool kIsFloat = std::is_same_v<T, float>, kMayHalve = kChannelsLast && kIsFloat;

 public:
  // ``prepared``: the parameters' place, wherever they are made.
  PrimaryConv(const GhostForwardParams& p, const Packed& packed_weight, const Plan& plan, const Scratch& at,
              float* scratch, const float* prepared, const Output<T, kChannelsLast>& output, const Unit& unit)
      : p(p),
        s(p.shape),
        packed_weight(packed_weight),
        plan(plan),
        at(at),
        scratch(scratch),
        prepared(prepared),
        output(output),
        unit(unit),
        primary_kernels(),
        tile_x(p, plan, at, scratch) {
    for (int vecs = 1; vecs <= kMaxVecs<T>; ++vecs) {
      for (int rows = 1; rows <= kMaxRows<T>; ++rows) {
        primary_kernels[rows][vecs] = primary_kernel<T, !kChannelsLast, false>(rows, vecs);
        if constexpr (kMayHalve) {
          if (packed_weight.bfloat16) {
            primary_kernels[rows][vecs] = primary_kernel<T, !kChannelsLast, true>(rows, vecs);
          }
        }
      }
    }
  }

  // x of the unit's rows, and the weights of its channels, as the multiplication reads them.
  void load_x() { tile_x.make(output.n, unit.x_h0, unit.h0, unit.h1, unit.x_h1); }
  void load_weight() const {
    const T* gate = plan.gate_weight ? gate_of<T>(p, output.n) : nullptr;
    pack_channels<T, kChannelsLast>(p, gate, unit.c0, unit.channels, plan.depth,
                                    scratch + at.weight + unit.c0 * plan.depth);
  }

  // Whether the multiplication writes whole vectors of nothing but x1's place in the output.
  bool can_store_directly() const {
    if (!output.plain) return false;
    if (kChannelsLast) return kMasks || unit.channels % kLanes == 0;
    if (plan.one_run) return false;
    // the last vector of a run of pixels goes back
    return s.width >= kLanes || (plan.chunk == s.height && int64_t{s.height} * s.width >= kLanes);
  }

  // x1 of the image rows begin … end - 1, where ``top`` is the first in x1. ``direct``: those of the tile go to the
  // output as well, which in NCHW are all or none of them.
  void run(int64_t begin, int64_t end, int64_t top, bool direct) const {
    if (begin >= end) return;
    const float* norm = prepared + parameters.norms + unit.c0;
    Panel<T> panel{};
    panel.depth = panel.of_tap = panel.end = plan.depth;
    panel.scale = norm;
    panel.shift = norm + parameters.step;
    panel.slope = norm + 2 * parameters.step;
    panel.act = p.primary.act;
    panel.clamp = clamp_of(p.primary.act);
    float* x1 = scratch + at.x1 + (begin - top) * at.x1_row;
    if constexpr (kChannelsLast) {
      make_pixels(panel, begin, end, top, direct, x1);
    } else {
      make_planes(panel, begin, end, direct, x1);
    }
  }

 private:
  bool only_to_output(bool direct) const { return direct && !plan.ghosts; }

  // From channel c of the pixel at row h, column w on, to x1 at ``to``.
  void primary(Panel<T>& panel, int64_t rows, int64_t vecs, float* to, int64_t c, int64_t h, int64_t w,
               bool direct) const {
    const bool store_too = direct && h >= unit.h0 && h < unit.h1;
    panel.y = to;
    panel.copy = store_too ? output.at(c, h, w) : nullptr;
    panel.residual = store_too ? output.residual_at(c, h, w) : nullptr;
    // where there are no ghosts nobody needs x1 anywhere else: the sums wait for their end in the output, or in a tile
    if (only_to_output(direct)) {
      panel.y = scratch + at.tile;
      panel.y_row = kMaxVecs<T> * kLanes;
      if constexpr (kIsFloat) {
        const bool whole = !kChannelsLast || unit.channels % kLanes == 0;
        if (whole && !panel.residual) panel.y = panel.copy, panel.y_row = panel.copy_row, panel.copy = nullptr;
      }
    }
    primary_kernels[rows][vecs](panel);
  }

  void make_pixels(Panel<T>& panel, int64_t begin, int64_t end, int64_t top, bool direct, float* x1) const {
    int64_t x_h = p.x.stride_h / kPerLane, x_w = p.x.stride_w / kPerLane;
    const float* x = static_cast<const float*>(p.x.data) + output.n * (p.x.stride_n / kPerLane) + begin * x_h;
    if (plan.pack_x) {
      x_w = at.packed_x_row;
      x_h = s.width * x_w;
      x = scratch + at.packed_x + (begin - unit.x_h0) * x_h;
    }
    panel.b = scratch + at.weight + unit.c0 * plan.depth;
    if (packed_weight.data) {
      const int64_t numbers = unit.c0 * plan.depth;
      panel.b = packed_weight.bfloat16
                    ? reinterpret_cast<const float*>(static_cast<const BFloat16*>(packed_weight.data) + numbers)
                    : static_cast<const float*>(packed_weight.data) + numbers;
    }
    panel.a_row = x_w;
    panel.y_row = plan.padded_block;
    panel.copy_row = p.out.stride_w;
    panel.residual_row = p.residual.stride_w;
    const int64_t panels = div_up(s.width, kMaxRows<T>), vecs = div_up(unit.channels, kLanes);
    panel.last = static_cast<int>(unit.channels - (vecs - 1) * kLanes);
    if constexpr (kTiles) {
      // a run: pixels at one stride, as many as matrices have rows, though some be others'
      const bool flat = x_h == s.width * x_w;
      const int64_t rows = flat ? end - begin : 1;
      if ((flat ? unit.x_h1 - unit.x_h0 : 1) * s.width >= kTile) {
        for (int64_t h = begin; h < end; h += rows, x += x_h) {
          const int64_t pixels = max_of<int64_t>(rows * s.width, kTile);
          const int64_t run = flat ? min_of(h * s.width, unit.x_h1 * s.width - pixels) : h * s.width;
          const float* a = x + (run - h * s.width) * x_w;
          multiply_tiles(a, x_w, pixels, panel.b, vecs, plan.depth, [&](int64_t pixel, int64_t j, const float* sums) {
            const int lanes = j == vecs - 1 ? panel.last : kLanes;
            norm_affine_tile(sums, run + pixel, begin, end, top, j * kLanes, lanes, direct);
          });
        }
        return;
      }
    }
    // between parts of the depth the sums need places of their own
    const bool own_places = !only_to_output(direct) || (kIsFloat && unit.channels % kLanes == 0 && !p.residual.data);
    const int64_t part = own_places && kPerLane == 1 ? kDeep : plan.depth;
    for (panel.begin = 0; panel.begin < plan.depth; panel.begin = panel.end) {
      panel.end = min_of(panel.begin + part, plan.depth);
      for (int64_t h = begin; h < end; ++h) {
        for (int64_t i = 0; i < panels; ++i) {
          const int64_t w = i * s.width / panels, rows = (i + 1) * s.width / panels - w;
          panel.a = x + (h - begin) * x_h + w * x_w;
          float* to = x1 + (h - begin) * at.x1_row + (plan.pad + w) * plan.padded_block;
          primary(panel, rows, vecs, to, unit.c0, h, w, direct);
        }
      }
    }
  }

  void make_planes(Panel<T>& panel, int64_t begin, int64_t end, bool direct, float* x1) const {
    panel.a = static_cast<const float*>(p.primary_weight);
    panel.a_row = p.primary_weight_stride_n / kPerLane;
    if (plan.pack_weight) {
      const auto* packed = static_cast<const float*>(packed_weight.data);
      panel.a = packed ? packed : scratch + at.weight;
      panel.a_row = plan.depth;
    }
    panel.a += unit.c0 * panel.a_row;
    panel.y_row = at.x1_channel;
    panel.copy_row = p.out.stride_c;
    panel.residual_row = p.residual.stride_c;
    const auto run = [&](int64_t pixel, int64_t vecs) {  // counted from row begin's first
      primary_block(panel, vecs, x1, begin, pixel, direct);
    };
    // the weights of the next block, which nobody has read yet, a part of them with every panel
    const auto fetch_ahead = [&](int64_t i, int64_t panels) {
      panel.ahead_row = div_up(unit.channels, panels);
      panel.ahead = panel.a + unit.channels * panel.a_row + i * panel.ahead_row * plan.depth;
    };
    if (plan.patches) {
      panel.taps = tile_x.planes.offsets();
      panel.of_tap = plan.lanes;
      panel.b_row = plan.planes.step / kLanesAtOnce<T>;
      const int64_t runs = plan.one_run ? 1 : end - begin, rows = (end - begin) / runs;
      const int64_t pixels = (rows - 1) * plan.x1_row + s.width, panels = div_up(div_up(pixels, kLanes), kMaxVecs<T>);
      for (int64_t i = 0; i < runs * panels; ++i) {
        const PanelPixels part(i % panels, pixels, kMaxVecs<T>);
        panel.b = tile_x.planes.at(begin + i / panels, part.begin);
        fetch_ahead(i, runs * panels);
        run(i / panels * plan.x1_row + part.begin, part.vecs);
      }
      return;
    }
    const float* x = static_cast<const float*>(p.x.data) + output.n * (p.x.stride_n / kPerLane);
    x += begin * (p.x.stride_h / kPerLane);
    panel.b_row = p.x.stride_c;
    if (plan.pack_x) {
      x = scratch + at.packed_x + (begin - unit.x_h0) * s.width * kLanesAtOnce<T>;
      panel.b_row = at.packed_x_row;
    }
    const auto run_in_place = [&](int64_t pixel, int64_t vecs) {
      panel.b = x + pixel * kLanesAtOnce<T>;
      panel.ahead = panel.b + kPrefetchX;  // every row is in another page, where the hardware doesn't look ahead
      panel.ahead_row = panel.b_row;
      run(pixel, vecs);
    };
    const int64_t pixels = (end - begin) * s.width, panels = div_up(div_up(pixels, kLanes), kMaxVecs<T>);
    for (int64_t i = 0; i < panels; ++i) {
      const PanelPixels part(i, pixels, kMaxVecs<T>);
      if (plan.panels) {
        panel.b = scratch + at.packed_x + tile_x.panels_before(begin) + part.vecs_before * kLanes * plan.depth;
        panel.b_row = part.vecs * kLanes;
        fetch_ahead(i, panels);
        run(part.begin, part.vecs);
      } else if (plan.pack_x && !can_store_directly()) {
        run_in_place(part.vecs_before * kLanes, part.vecs);
      } else if (part.begin >= 0) {
        run_in_place(part.begin, part.vecs);
      } else {
        run_in_place(0, part.vecs - 1);
        run_in_place(pixels - kLanes, 1);
      }
    }
  }

  // All channels of the unit, of pixels counted from the first of row h, where x1 is.
  void primary_block(Panel<T>& panel, int64_t vecs, float* x1, int64_t h, int64_t pixel, bool direct) const {
    if constexpr (kMaxRows<T> == kUsualRows) {
      primary(panel, unit.channels, vecs, x1 + pixel, unit.c0, h, pixel, direct);
    } else {  // a kernel takes a part of them, and x stays in the first cache for the other
      const int64_t parts = div_up(unit.channels, kMaxRows<T>);
      for (int64_t i = 0; i < parts; ++i) {
        const int64_t c = i * unit.channels / parts, rows = (i + 1) * unit.channels / parts - c;
        Panel<T> part = panel;
        part.a += c * panel.a_row;
        part.scale += c, part.shift += c, part.slope += c;
        part.ahead += i * kLine;
        primary(part, rows, vecs, x1 + c * at.x1_channel + pixel, unit.c0 + c, h, pixel, direct);
      }
    }
  }

  // ``lanes`` channels from c on of a matrix of pixels from ``first`` on, as far as they are in rows begin … end - 1.
  void norm_affine_tile(const float* sums, int64_t first, int64_t begin, int64_t end, int64_t top, int64_t c, int lanes,
                        bool direct) const {
    const float* norm = prepared + parameters.norms + unit.c0 + c;
    const NormAffine norm_affine(norm, parameters.step, p.primary.act, NormAffine::kVectors);
    const int64_t from = max_of(first, begin * s.width);
    int64_t left = min_of(first + kTile, end * s.width) - from, h = from / s.width, w = from % s.width;
    for (sums += (from - first) * kTile; left > 0; ++h, w = 0) {
      const int64_t pixels = min_of(s.width - w, left);
      float* y = scratch + at.x1 + (h - top) * at.x1_row + (plan.pad + w) * plan.padded_block + c;
      const bool store_too = direct && h >= unit.h0 && h < unit.h1;
      T* to = store_too ? output.at(unit.c0 + c, h, w) : nullptr;
      const T* residual = output.residual_at(unit.c0 + c, h, w);
      left -= pixels;
      for (int64_t i = 0; i < pixels; ++i, sums += kTile, y += plan.padded_block) {
        Vec v = norm_affine(load(sums));
        if (plan.ghosts || !store_too) store(y, v);
        if (!store_too) continue;
        if (residual) v += load_part(residual, lanes), residual += p.residual.stride_w;
        store_part(to, v, lanes);
        to += p.out.stride_w;
      }
    }
  }

  const GhostForwardParams& p;
  const GhostShape& s;
  const Packed& packed_weight;
  const Plan& plan;
  const Scratch& at;
  const Parameters parameters{s};
  float* const scratch;
  const float* const prepared;
  const Output<T, kChannelsLast>& output;
  const Unit& unit;
  Primary<T> primary_kernels[kMaxRows<T> + 1][kMaxVecs<T> + 1];
  TileX<T, kChannelsLast> tile_x;
};

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
