// The training stencils by strips (strip.cuh): what forward.cuh's and backward.cuh's kernels of these names compute.
#pragma once

#include "cuda/training/strip.cuh"

namespace ghostfused {

template <Path kPath, bool kMasked>
__global__ void __launch_bounds__(kStripThreads, kStripBlocksPerSm[0])
    cheap_statistics_strips(const __grid_constant__ TrainingParams p) {
  using T = typename PathType<kPath>::T;
  __shared__ StripShared shared;
  const StripWork t(p);
  fill_numbers<T, false, false>(shared, p, t);
  const StripNumbers number(shared, t.share);
  const UniformAct<T> act(p.args.primary);
  Moments<2> moments;
  int n = 0;
  for_each_strip<kMasked>(p, t, [&](const Strip<kMasked>& s) {
    const StripMap<T> y1(p, p.maps.out, p.plan.strip.out_pixel, t.channel, s, -1);
    StripMap<T> y2(p, p.maps.out, p.plan.strip.out_pixel, p.args.shape.init_channels + t.channel, s, 0);
    slide_depthwise<T>(
        p, s, y1, number, act, [] {},
        [&](const Pair<T>(&packed)[kStripColumns]) {
          if (n == 0) {
            const float2 y = unpack_pair<T>(packed[0]);
            moments.shift[0] = y.x;
            moments.shift[1] = y.y;
          }
#pragma unroll
          for (int i = 0; i < kStripColumns; ++i) {
            if (!s.inside(i)) continue;
            y2.store(i, packed[i]);
            const float2 y = unpack_pair<T>(packed[i]);
            const float d[2] = {y.x - moments.shift[0], y.y - moments.shift[1]};
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              moments.s[e] += d[e];
              moments.q[e] = fmaf(d[e], d[e], moments.q[e]);
            }
          }
          n += kMasked ? min(s.rest, kStripColumns) : kStripColumns;
          y2.down();
        });
  });
  moments.n = static_cast<float>(n);
  finish_statistics<kStripThreads>(moments, t.channels(), t.share,
                                   row_combination<3>(p, 0, t.block, t.row, p.args.shape.init_channels), p.mean, p.var,
                                   shared.scratch);
}

// What the last block writes of a half's sums of dz and of dz * x̂. PReLU's, the third, isn't taken.
__device__ __forceinline__ void store_sum(const TrainingParams& p, int value, int c, float sum) {
  const int channels = p.args.shape.init_channels;
  p.sums[value * channels + c] = sum;
  if (value == 0) p.sums[2 * channels + c] = 0.f;
}

// Adds a strip's row of dz and dz * (y - center) to a thread's sums.
template <typename T, bool kMasked>
__device__ __forceinline__ void add_pair_sums(float* sums, const Strip<kMasked>& s,
                                              const float (&dz)[2 * kStripColumns], const Pair<T> (&y)[kStripColumns],
                                              float2 center) {
#pragma unroll
  for (int i = 0; i < kStripColumns; ++i) {
    if (!s.inside(i)) continue;
    const float2 v = unpack_pair<T>(y[i]);
    sums[0] += dz[2 * i];
    sums[1] += dz[2 * i + 1];
    sums[2] = fmaf(dz[2 * i], v.x - center.x, sums[2]);
    sums[3] = fmaf(dz[2 * i + 1], v.y - center.y, sums[3]);
  }
}

// dz2 and y2, and their sums.
template <Path kPath, bool kMasked>
__global__ void __launch_bounds__(kStripThreads, kStripBlocksPerSm[1])
    cheap_backward_strips(const __grid_constant__ TrainingParams p) {
  using T = typename PathType<kPath>::T;
  __shared__ StripShared shared;
  const StripWork t(p);
  fill_numbers<T, true, false>(shared, p, t);
  const StripNumbers number(shared, t.share);
  const UniformAct<T> primary(p.args.primary), cheap(p.args.cheap);
  const int channels = p.args.shape.init_channels;
  float sums[4] = {};  // of dz2, of dz2 * (y2 - center)
  for_each_strip<kMasked>(p, t, [&](const Strip<kMasked>& s) {
    const StripMap<T> y1(p, p.maps.y1, p.plan.strip.pixel, t.channel, s, -1);
    StripMap<T> grad(p, p.maps.grad, p.plan.strip.out_pixel, channels + t.channel, s, 0);
    StripMap<T> y2(p, p.maps.y2, p.plan.strip.pixel, t.channel, s, 0);
    StripMap<T> dz2(p, p.maps.dz2, p.plan.strip.pixel, t.channel, s, 0);
    Pair<T> g[kStripColumns];
    const auto load_grad = [&] {
      grad.load_strip(g, s);
      grad.down();
    };
    slide_depthwise<T>(p, s, y1, number, primary, load_grad, [&](const Pair<T>(&y)[kStripColumns]) {
      const float2 center = number[kCenter2];
      float z[2 * kStripColumns], dz[2 * kStripColumns];
      normalize<T>(z, y, center, number[kScale2], number[kShift2]);
#pragma unroll
      for (int i = 0; i < kStripColumns; ++i) {
        const float2 of_x2 = unpack_pair<T>(g[i]);
        dz[2 * i] = of_x2.x;
        dz[2 * i + 1] = of_x2.y;
      }
      cheap.backward(dz, z);
      add_pair_sums<T>(sums, s, dz, y, center);
#pragma unroll
      for (int i = 0; i < kStripColumns; ++i) {
        if (!s.inside(i)) continue;
        y2.store(i, y[i]);
        dz2.store(i, pack_pair<T>(dz[2 * i], dz[2 * i + 1]));
      }
      y2.down();
      dz2.down();
    });
  });
  const Channels<2> c = t.channels();
  const auto half = Half<2>::template of<T>(p.args.cheap, c);
  sums[2] *= half.rstd[0];
  sums[3] *= half.rstd[1];
  const auto emit = [&](int value, int j, float sum) { store_sum(p, value, j, sum); };
  finish_sums<kStripThreads, 2, 2>(sums, c, t.share, row_combination<2>(p, 0, t.block, t.row, channels), shared.scratch,
                                   emit);
}

// dz1 and its sums, and the gradient of cheap_weight.
template <Path kPath, bool kMasked>
__global__ void __launch_bounds__(kStripThreads, kStripBlocksPerSm[2])
    primary_backward_strips(const __grid_constant__ TrainingParams p) {
  using T = typename PathType<kPath>::T;
  using Row = float[2 * kStripWindow];
  constexpr int kValues = 2 + 9;
  __shared__ StripShared shared;
  const StripWork t(p);
  fill_numbers<T, false, true>(shared, p, t);
  const StripNumbers number(shared, t.share);
  const UniformAct<T> act(p.args.primary);
  const int channels = p.args.shape.init_channels;
  float sums[2 * kValues] = {};  // of dz1, of dz1 * (y1 - center), of each tap
  for_each_strip<kMasked>(p, t, [&](const Strip<kMasked>& s) {
    StripMap<T> y2(p, p.maps.y2, p.plan.strip.pixel, t.channel, s, -1);
    StripMap<T> dz2(p, p.maps.dz2, p.plan.strip.pixel, t.channel, s, -1);
    StripMap<T> y1(p, p.maps.y1, p.plan.strip.pixel, t.channel, s, 0);
    StripMap<T> grad(p, p.maps.grad, p.plan.strip.out_pixel, t.channel, s, 0);
    StripMap<T> dz1(p, p.maps.dz1, p.plan.strip.pixel, t.channel, s, 0);
    const auto load = [&](Row& dy, bool inside) {
      if (inside) {
        Pair<T> y[kStripWindow], dz[kStripWindow];
        y2.load_window(y, s);
        dz2.load_window(dz, s);
        const float2 scale = number[kScale2];
        normalize<T>(dy, y, number[kCenter2], number[kSlope2], number[kOffset2]);
#pragma unroll
        for (int i = 0; i < kStripWindow; ++i) {
          const float2 of_z2 = unpack_pair<T>(dz[i]);
          dy[2 * i] = fmaf(of_z2.x, scale.x, dy[2 * i]);
          dy[2 * i + 1] = fmaf(of_z2.y, scale.y, dy[2 * i + 1]);
        }
        pad(dy, s);
      } else {
        clear(dy);
      }
      y2.down();
      dz2.down();
    };
    const auto row = [&](const Row& above, const Row& at, Row& below, bool inside) {
      Pair<T> y[kStripColumns], g[kStripColumns];
      y1.load_strip(y, s);
      grad.load_strip(g, s);
      load(below, inside);
      const float2 center = number[kCenter1], scale = number[kScale1], shift = number[kShift1];
      float x[2 * kStripColumns], dx[2 * kStripColumns];
      normalize<T>(x, y, center, scale, shift);
      act.activate(x);
#pragma unroll
      for (int i = 0; i < kStripColumns; ++i) {
        const float2 of_x1 = unpack_pair<T>(g[i]);
        dx[2 * i] = of_x1.x;
        dx[2 * i + 1] = of_x1.y;
        if (!s.inside(i)) x[2 * i] = x[2 * i + 1] = 0.f;
      }
      const auto add = [&](const Row& dy, int kh) {
#pragma unroll
        for (int kw = 0; kw < 3; ++kw) {  // x1[p] went to y2[p - (kh - 1, kw - 1)] by tap (kh, kw)
          const float2 w = number[kTaps + kh * 3 + kw];
          float* of_tap = sums + 2 * (2 + kh * 3 + kw);
#pragma unroll
          for (int i = 0; i < kStripColumns; ++i) {
            const int from = 2 * (i + 2 - kw);
            dx[2 * i] = fmaf(dy[from], w.x, dx[2 * i]);
            dx[2 * i + 1] = fmaf(dy[from + 1], w.y, dx[2 * i + 1]);
            of_tap[0] = fmaf(dy[from], x[2 * i], of_tap[0]);
            of_tap[1] = fmaf(dy[from + 1], x[2 * i + 1], of_tap[1]);
          }
        }
      };
      add(below, 0);
      add(at, 1);
      add(above, 2);
      if (!act.simple) normalize<T>(x, y, center, scale, shift);  // z, which x1 doesn't tell
      act.backward(dx, x);
      add_pair_sums<T>(sums, s, dx, y, center);
#pragma unroll
      for (int i = 0; i < kStripColumns; ++i) {
        if (s.inside(i)) dz1.store(i, pack_pair<T>(dx[2 * i], dx[2 * i + 1]));
      }
      y1.down();
      grad.down();
      dz1.down();
    };
    slide<2 * kStripWindow>(s, p.args.shape.height, load, row);
  });
  const Channels<2> c = t.channels();
  const auto half = Half<2>::template of<T>(p.args.primary, c);
  sums[2] *= half.rstd[0];
  sums[3] *= half.rstd[1];
  const auto emit = [&](int value, int j, float sum) {
    if (value < 2) {
      store_sum(p, value, j, sum);
    } else if (p.weight_gradient != nullptr) {
      static_cast<T*>(p.weight_gradient)[int64_t{j} * 9 + value - 2] = from_float<T>(sum);
    }
  };
  finish_sums<kStripThreads, kValues, 2>(sums, c, t.share, row_combination<kValues>(p, 0, t.block, t.row, channels),
                                         shared.scratch, emit);
}

}  // namespace ghostfused
