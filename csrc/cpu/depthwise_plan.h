// How the depthwise op is cut into units, and its norms and weights as its kernels read them.
#pragma once

#include "cpu/parallel.h"
#include "cpu/parameters.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

constexpr int64_t kChannelBlock = 8 * kLanes;  // of a unit in channels_last

// A unit is one tile of rows of an image × one plane, or in channels_last one block of channels. The tiles are as many
// as threads, where images aren't enough: each thread goes on with the rows that it made in the step before.
struct DepthwisePlan {
  int64_t tiles, out_height;
  int64_t columns, units;
  // the parameters of all channels, fp32: (scale, shift, slope) as (3, channel), and the taps: (channel, tap) in NCHW,
  // (tap, channel) in channels_last
  int64_t step, taps, size;
  const float* prepared;  // those made once, or null

  DepthwisePlan(const DepthwiseParams& p, const float* prepared, int threads)
      : out_height(p.out_height), prepared(prepared) {
    constexpr int64_t kLeastRows = 4;
    tiles = p.batch % threads == 0 || out_height < kLeastRows * threads ? 1 : threads;
    columns = p.channels_last ? div_up(p.channels, kChannelBlock) : p.channels;
    units = p.batch * tiles * columns;
    step = div_up(p.channels, kLanes) * kLanes;
    taps = 3 * step;
    size = taps + int64_t{p.kernel_h} * p.kernel_w * step;
  }

  struct Unit {
    int64_t n, h0, h1, column;  // rows h0 … h1 - 1
    Unit(const DepthwisePlan& plan, int64_t unit)
        : n(unit / plan.columns / plan.tiles),
          h0(unit / plan.columns % plan.tiles * plan.out_height / plan.tiles),
          h1((unit / plan.columns % plan.tiles + 1) * plan.out_height / plan.tiles),
          column(unit % plan.columns) {}
  };
};

// The parameters of channels c … c + count - 1. In channels_last c begins a vector, and zeros fill the last.
template <typename T>
void prepare_channels(const DepthwiseParams& p, const DepthwisePlan& plan, int64_t c, int64_t count, float* to) {
  const int64_t area = int64_t{p.kernel_h} * p.kernel_w;
  const Taps from{p.weight, p.weight_stride_c, p.weight_stride_h, p.weight_stride_w, p.kernel_h, p.kernel_w};
  if (p.channels_last && count % kLanes) {
    for (int64_t i = 0; i < 3 + area; ++i) store(to + i * plan.step + c + count / kLanes * kLanes, Vec{});
  }
  prepare_norm<T>(p.norm, c, 1, count, to + c, plan.step);
  prepare_taps<T>(from, false, c, 1, count, to + plan.taps + (p.channels_last ? c : c * area),
                  p.channels_last ? 1 : area, p.channels_last ? plan.step : 1);
}

// NCHW: those of units begin … end - 1.
template <typename T>
void prepare_planes(const DepthwiseParams& p, const DepthwisePlan& plan, int64_t begin, int64_t end, float* to) {
  const int64_t all = min_of<int64_t>(end - begin, p.channels);
  for (int64_t done = 0; done < all;) {
    const int64_t c = (begin + done) % p.channels, count = min_of(p.channels - c, all - done);
    prepare_channels<T>(p, plan, c, count, to);
    done += count;
  }
}

template <typename T>
int64_t pack_depthwise(const DepthwiseParams& p, void* to) {
  const DepthwisePlan plan(p, nullptr, 1);
  if (to) prepare_channels<T>(p, plan, 0, p.channels, static_cast<float*>(to));
  return plan.size * sizeof(float);
}

inline int64_t pack_depthwise(const DepthwiseParams& p, void* to) {
  return GHOSTFUSED_BY_PATH(p.path, pack_depthwise)(p, to);
}

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
