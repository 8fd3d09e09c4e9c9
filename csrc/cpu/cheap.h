// The second half of a Ghost module: the depthwise convolution of x1, and where its results go.
#pragma once

#include "cpu/output.h"
#include "cpu/parameters.h"
#include "cpu/plan.h"
#include "cpu/primary.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

template <typename T, bool kChannelsLast>
class Cheap {
 public:
  Cheap(const GhostForwardParams& p, const Plan& plan, const Scratch& at, float* scratch, const Output<T>& output)
      : p(p), s(p.shape), plan(plan), at(at), scratch(scratch), output(output) {
    if (kChannelsLast || !plan.ghosts) return;
    // per vector of a row and column of taps: the lanes inside the image
    float* to = scratch + at.masks;
    for (int64_t w = 0; w < s.width; w += kLanes) {
      for (int64_t j = 0; j < s.dw_size; ++j, to += kLanes) {
        Ints column;
        for (int i = 0; i < kLanes; ++i) column[i] = static_cast<int>(first_of(w) - plan.pad + i + j);
        store(to, (column >= 0) & (column < s.width));
      }
    }
  }

  // The norms and weights of a block's channels; channels_last: (tap, channel), else (channel, tap).
  void prepare(int64_t c0, int64_t channels, float* parameters) const {
    const int64_t padded = plan.padded_block, d = s.dw_size, per_channel = s.ratio - 1;
    const Taps taps{
        p.cheap_weight, p.cheap_weight_stride_c, p.cheap_weight_stride_h, p.cheap_weight_stride_w, s.dw_size,
        s.dw_size};
    float* norm = parameters + at.block_norms + 3 * padded;
    zero(norm, per_channel * 3 * padded);
    if (kChannelsLast) zero(parameters + at.block_cheap, per_channel * d * d * padded);
    for (int64_t j = 0; j < per_channel; ++j, norm += 3 * padded) {
      prepare_norm<T>(p.cheap, c0 * per_channel + j, per_channel, channels, norm, padded);
      if (plan.pack_taps) {  // as the walk meets them
        prepare_taps<T>(taps, kChannelsLast, c0 * per_channel + j, per_channel, channels,
                        parameters + at.block_cheap + j * d * d * padded, kChannelsLast ? 1 : d * d,
                        kChannelsLast ? padded : 1);
      }
    }
  }

  // x2 of the image rows begin … end - 1 and the channels from c0 on. x1 begins pad rows above them.
  void run(int64_t begin, int64_t end, int64_t c0, int64_t channels, const float* parameters) const {
    const int64_t d = s.dw_size, per_channel = s.ratio - 1;
    Walk walk{};
    walk.act = p.cheap.act;
    walk.clamp = clamp_of(p.cheap.act);
    const float* norm = parameters + at.block_norms;
    for (int64_t j = 0; j < per_channel; ++j) {
      norm += 3 * plan.padded_block;
      // channels whose ghost is not cut off
      const int64_t room = s.out_channels - s.init_channels - j;
      const int64_t valid = min_of(channels, div_up(max_of<int64_t>(room, 0), per_channel) - c0);
      const float* weight = parameters + at.block_cheap + j * d * d * plan.padded_block;
      if constexpr (kChannelsLast) {
        walk.walk = plan.padded_block;
        walk.cross = at.x1_row;
        walk.weight_step = plan.padded_block;
        for (int64_t v = 0; v < valid; v += kLanes) {
          int64_t lanes = min_of<int64_t>(valid - v, kLanes);
          int64_t first = v;
          if (lanes < kLanes && valid >= kLanes) first = valid - kLanes, lanes = kLanes;
          set_norm(walk, norm + first);
          walk.weight = weight + first;
          for (int64_t h = begin; h < end; ++h) {
            walk.x1 = scratch + at.x1 + (h - begin) * at.x1_row + first;
            walk.steps = s.width;
            run_walk<false>(walk, lanes, s.init_channels + (c0 + first) * per_channel + j, h, 0, lanes == kLanes);
          }
        }
      } else {
        walk.walk = at.x1_row;
        walk.cross = 1;
        walk.steps = end - begin;
        for (int64_t c = 0; c < valid; ++c) {
          const int64_t index = (c0 + c) * per_channel + j;
          walk.weight = plan.pack_taps ? weight + c * d * d
                                       : static_cast<const float*>(p.cheap_weight) + index * p.cheap_weight_stride_c;
          set_norm(walk, norm + c);
          // what a vector writes past the end of the plane, the next channel overwrites
          const bool next_follows = begin == 0 && end == s.height && per_channel == 1 && c + 1 < valid &&
                                    int64_t{s.height} * s.width >= kLanes;
          const float* mask = scratch + at.masks;
          for (int64_t w = 0; w < s.width; w += kLanes, mask += d * kLanes) {
            const int64_t first = first_of(w), lanes = min_of<int64_t>(s.width - first, kLanes);
            walk.x1 = scratch + at.x1 + c * at.x1_channel + first - plan.pad;
            walk.mask = mask;
            const int64_t out_c = s.init_channels + index;
            if (first >= plan.pad && first + kLanes + plan.pad <= s.width) {
              run_walk<false>(walk, lanes, out_c, begin, first, true);
            } else {
              run_walk<true>(walk, lanes, out_c, begin, first, next_follows || lanes == kLanes);
            }
          }
        }
      }
    }
  }

 private:
  static void zero(float* p, int64_t count) { __builtin_memset(p, 0, count * sizeof(float)); }

  // Where the vector for the columns from w on begins: at a row's end it goes back, unless the row is shorter than it.
  int64_t first_of(int64_t w) const { return max_of<int64_t>(min_of<int64_t>(w, s.width - kLanes), 0); }

  void set_norm(Walk& walk, const float* norm) const {
    const int64_t next = plan.padded_block;
    walk.scale = kChannelsLast ? load(norm) : splat(norm[0]);
    walk.shift = kChannelsLast ? load(norm + next) : splat(norm[next]);
    walk.slope = kChannelsLast ? load(norm + 2 * next) : splat(norm[2 * next]);
  }

  // The walk's outputs begin at (c, h, w) and have ``lanes`` numbers each. ``whole``: all of them may be stored as
  // whole vectors.
  template <bool kMasked>
  void run_walk(Walk& walk, int64_t lanes, int64_t c, int64_t h, int64_t w, bool whole) const {
    const Depthwise kernel = depthwise_kernel<kMasked, !kChannelsLast>(s.dw_size);
    const int step = kChannelsLast ? s.ratio - 1 : 1;
    T* out = output.at(c, h, w);
    const T* residual = output.residual_at(c, h, w);
    const int64_t out_walk = kChannelsLast ? p.out.stride_w : p.out.stride_h;
    const int64_t residual_walk = kChannelsLast ? p.residual.stride_w : p.residual.stride_h;
    int64_t vectors = 0;  // the steps whose results are stored as whole vectors
    if (output.plain && step == 1) {
      vectors = walk.steps;
      // short rows: what is written past a row's end, the next row overwrites, but for the last ones
      if (!whole) vectors = kChannelsLast ? 0 : max_of<int64_t>(walk.steps - div_up(kLanes, s.width) + 1, 0);
    }
    const int64_t direct = sizeof(T) == sizeof(float) ? vectors : 0, staged = walk.steps - direct;
    if (direct) {
      walk.out = reinterpret_cast<float*>(out);
      walk.out_walk = out_walk;
      walk.residual = reinterpret_cast<const float*>(residual);
      walk.residual_walk = residual_walk;
      walk.steps = direct;
      kernel(walk);
    }
    if (staged) {
      Walk rest = walk;
      rest.steps = staged;
      rest.x1 += direct * walk.walk;
      rest.out = scratch + at.stage;
      rest.out_walk = kLanes;
      rest.residual = nullptr;
      kernel(rest);
      if (!direct) output.put_whole(rest.out, vectors, out, out_walk, residual, residual_walk);
      for (int64_t at_step = vectors; at_step < direct + staged; ++at_step) {
        output.put(load(rest.out + (at_step - direct) * kLanes), c, kChannelsLast ? h : h + at_step,
                   kChannelsLast ? w + at_step : w, lanes, step);
      }
    }
    walk.steps = direct + staged;
  }

  const GhostForwardParams& p;
  const GhostShape& s;
  const Plan& plan;
  const Scratch& at;
  float* const scratch;
  const Output<T>& output;
};

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
