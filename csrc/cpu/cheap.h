// The second half of a Ghost module: the depthwise convolution of x1, and where its results go.
#pragma once

#include "cpu/output.h"
#include "cpu/parameters.h"
#include "cpu/plan.h"
#include "cpu/strip.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

template <typename T, bool kChannelsLast>
class Cheap {
 public:
  // ``prepared``: the parameters' place, wherever they are made.
  Cheap(const GhostForwardParams& p, const Plan& plan, const Scratch& at, float* scratch, const float* prepared,
        Output<T, kChannelsLast>& output)
      : p(p), s(p.shape), plan(plan), at(at), scratch(scratch), prepared(prepared), output(output) {
    if (kChannelsLast || !plan.ghosts) return;
    // per vector of a row and column of taps: the lanes inside the image
    float* to = scratch + at.masks;
    for (int64_t w = 0; w < s.width; w += kLanes) {
      for (int64_t j = 0; j < s.dw_size; ++j, to += kLanes) {
        Ints column{};
        for (int i = 0; i < kLanes; ++i) column[i] = static_cast<int>(first_of(w) - plan.pad + i + j);
        store(to, (column >= 0) & (column < s.width));
      }
    }
  }

  // x2 of the image rows begin … end - 1 and the channels from c0 on. x1 begins pad rows above them.
  void run(int64_t begin, int64_t end, int64_t c0, int64_t channels) const {
    const int64_t d = s.dw_size, per_channel = s.ratio - 1;
    Strip<T> strip{};
    strip.act = p.cheap.act;
    strip.norm_step = parameters.step;
    for (int64_t j = 0; j < per_channel; ++j) {
      const float* norm = prepared + parameters.norms + (1 + j) * 3 * parameters.step + c0;
      // channels whose ghost is not cut off
      const int64_t room = s.out_channels - s.init_channels - j;
      const int64_t valid = min_of(channels, div_up(max_of<int64_t>(room, 0), per_channel) - c0);
      const float* weight =
          prepared + parameters.cheap + j * d * d * parameters.step + (kChannelsLast ? c0 : c0 * d * d);
      if constexpr (kChannelsLast) {
        for (int64_t v = 0; v < valid; v += kLanes) {
          int64_t lanes = min_of<int64_t>(valid - v, kLanes);
          int64_t first = v;
          if (lanes < kLanes && valid >= kLanes) first = valid - kLanes, lanes = kLanes;
          strip.norm = norm + first;
          strip.weight = weight + first;
          strip.x1 = scratch + at.x1 + first;
          run_rows(strip, lanes, s.init_channels + (c0 + first) * per_channel + j, begin, end);
        }
      } else {
        for (int64_t c = 0; c < valid; ++c) {
          const int64_t index = (c0 + c) * per_channel + j;
          strip.norm = norm + c;
          strip.weight = packs_taps(p) ? weight + c * d * d
                                       : static_cast<const float*>(p.cheap_weight) + index * p.cheap_weight_stride_c;
          strip.x1 = scratch + at.x1 + c * at.x1_channel - plan.pad;
          // what a vector writes past the end of the plane, the next channel overwrites
          const bool next_follows = begin == 0 && end == s.height && per_channel == 1 && c + 1 < valid &&
                                    int64_t{s.height} * s.width >= kLanes;
          run_plane(strip, s.init_channels + index, begin, end, next_follows);
        }
      }
    }
  }

 private:
  // Where the vector for the columns from w on begins: at a row's end it goes back, unless the row is shorter than it.
  int64_t first_of(int64_t w) const { return max_of<int64_t>(min_of<int64_t>(w, s.width - kLanes), 0); }

  // NCHW: rows begin … end - 1 of channel c. ``overwritten``: what is written past the last row's end, is so later.
  void run_plane(Strip<T>& strip, int64_t c, int64_t begin, int64_t end, bool overwritten) const {
    strip.walk = at.x1_row;
    strip.cross = 1;
    strip.width = s.width;
    strip.masks = scratch + at.masks;
    int64_t direct = 0;  // the rows that are stored as whole vectors: what these have too much, the next row overwrites
    if (output.plain) {
      const int64_t last_ones = overwritten ? 0 : div_up(kLanes, min_of<int64_t>(s.width, kLanes)) - 1;
      direct = max_of<int64_t>(end - begin - last_ones, 0);
      strip.out = output.at(c, begin, 0);
      strip.out_walk = p.out.stride_h;
      strip.residual = output.residual_at(c, begin, 0);
      strip.residual_walk = p.residual.stride_h;
      strip.steps = direct;
      cheap_kernel<T, true>(s.dw_size)(strip);
    }
    for (int64_t h = begin + direct; h < end; h += kStripRows) {
      const int64_t rows = min_of<int64_t>(kStripRows, end - h), row = max_of<int64_t>(s.width, kLanes);
      const float* y = stage(strip, strip.x1 + (h - begin) * at.x1_row, row, rows);
      for (int64_t i = 0; i < rows; ++i, y += row) output.store_run(y, s.width, c, h + i, 0);
    }
  }

  // channels_last: rows begin … end - 1 of the vector of ``lanes`` channels from c on.
  void run_rows(Strip<T>& strip, int64_t lanes, int64_t c, int64_t begin, int64_t end) const {
    strip.walk = plan.padded_block;
    strip.weight_step = parameters.step;
    strip.cross = at.x1_row;
    if (output.plain && s.ratio == 2 && (kMasks || lanes == kLanes)) {
      strip.lanes = static_cast<int>(lanes);
      strip.out = output.at(c, begin, 0);
      strip.out_walk = p.out.stride_w;
      strip.out_cross = p.out.stride_h;
      strip.residual = output.residual_at(c, begin, 0);
      strip.residual_walk = p.residual.stride_w;
      strip.residual_cross = p.residual.stride_h;
      strip.steps = s.width;
      strip.rows = end - begin;
      return cheap_kernel<T, false>(s.dw_size)(strip);
    }
    for (int64_t h = begin; h < end; ++h) {
      const float* y = stage(strip, strip.x1 + (h - begin) * at.x1_row, kLanes, s.width);
      for (int64_t w = 0; w < s.width; ++w, y += kLanes) output.store(load(y), c, h, w, lanes, s.ratio - 1);
    }
  }

  // Outputs of the strip that can't be stored as they are, to scratch memory.
  const float* stage(const Strip<T>& strip, const float* x1, int64_t out_walk, int64_t steps) const {
    Strip<float> staged{x1,
                        strip.walk,
                        strip.cross,
                        strip.weight,
                        strip.weight_step,
                        strip.norm,
                        strip.norm_step,
                        strip.act,
                        scratch + at.stage,
                        out_walk,
                        nullptr,
                        0,
                        steps,
                        1,
                        0,
                        0,
                        strip.width,
                        strip.masks,
                        kLanes};
    cheap_kernel<float, !kChannelsLast>(s.dw_size)(staged);
    return staged.out;
  }

  const GhostForwardParams& p;
  const GhostShape& s;
  const Plan& plan;
  const Scratch& at;
  const Parameters parameters{s};
  float* const scratch;
  const float* const prepared;
  Output<T, kChannelsLast>& output;
};

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
