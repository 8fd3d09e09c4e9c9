// The training kernels of forward but for the first, which is in primary.cuh; and what those of backward
// share. docs/training.md says what each reads and writes.
//
// A block has a row of cells and up to kMaxBlockChannels channels; a thread keeps its channels, so that what belongs to
// them stays in registers, and takes every ``positions``-th cell.
#pragma once

#include "cuda/reduce.cuh"

namespace ghostfused {

// The stencils come for 3×3 in either layout, and as kernels that take any size and layout (kD = 0, Layout::kEither):
// those have the window and the weights of kMaxSize columns, of which they use as many as there are.
template <int kD>
constexpr int kMaxSize = kD > 0 ? kD : kMaxTrainingSize;

// What a block and a thread of one of these kernels work on: ``first`` is the thread's first channel.
template <int kV, Layout kLayout>
struct Work {
  BlockShare share;
  int block, pass, row, first;

  __device__ __forceinline__ explicit Work(const TrainingParams& p)
      : share(channels_last<kLayout>(p.args.shape) ? BlockShare::of<true>(p.plan.block_c / kV)
                                                   : BlockShare::of<false>(p.plan.block_c / kV)) {
    const TrainingPlan& plan = p.plan;
    block = blockIdx.x % plan.channel_blocks;  // fastest: blocks that read the same pixels run together
    pass = blockIdx.x / plan.channel_blocks % plan.passes;
    row = blockIdx.x / plan.channel_blocks / plan.passes;
    first = block * plan.block_c + share.lane * kV;
  }
};

// y2 of a cell, from x1 = act(norm(y1)) of its window; x1 is zero outside the image, after norm and activation.
template <typename T, int kD, int kV, Layout kLayout>
__device__ __forceinline__ void depthwise_of_x1(float (&sums)[kCellColumns * kV], const TrainingParams& p,
                                                const void* y1, int channels, const Cell& cell, const Channels<kV>& c,
                                                const Half<kV>& half, const float* weights) {
  constexpr int kMax = kMaxSize<kD>, kWindow = kCellColumns + kMax - 1;
  const int d = kD > 0 ? kD : p.args.shape.dw_size, pad = d / 2;
#pragma unroll
  for (int i = 0; i < kCellColumns * kV; ++i) sums[i] = 0.f;
#pragma unroll 1
  for (int kh = 0; kh < d; ++kh) {
    const int h = cell.h + kh - pad;
    if (h < 0 || h >= p.args.shape.height) continue;
    float x[kWindow * kV];
    load_columns<T, kWindow, kV, kLayout>(x, p, y1, channels, cell.n, h, cell.w - pad, c);
    half.normalize(x, x);
    half.template activate<T>(x, p.args.primary.act);
    float w[kMax * kV];
#pragma unroll
    for (int i = 0; i < kMax * kV; ++i) {
      if (i / kV < d) w[i] = weights[(kh * d + i / kV) * kMaxBlockChannels + i % kV];
    }
#pragma unroll
    for (int i = 0; i < kWindow; ++i) {
      const int column = cell.w - pad + i;
      const bool inside = column >= 0 && column < p.args.shape.width;
#pragma unroll
      for (int col = 0; col < kCellColumns; ++col) {
        const int kw = i - col;
        if (kw < 0 || kw >= kMax || kw >= d) continue;
#pragma unroll
        for (int e = 0; e < kV; ++e) {
          sums[col * kV + e] = fmaf(inside ? x[i * kV + e] : 0.f, w[kw * kV + e], sums[col * kV + e]);
        }
      }
    }
  }
}

// The primary channels that cheap channels j are made from.
template <int kV>
__device__ __forceinline__ Channels<kV> sources(const Channels<kV>& j, int per_primary) {
  Channels<kV> c = j;
#pragma unroll
  for (int e = 0; e < kV; ++e) c.at[e] = j.at[e] / per_primary;
  return c;
}

template <Path kPath, int kD, Layout kLayout>
__global__ void __launch_bounds__(kTrainingThreads, 2) cheap_statistics(const __grid_constant__ TrainingParams p) {
  using T = typename PathType<kPath>::T;
  constexpr int kV = kCellChannels<T, kStencilBytes, kLayout>;
  __shared__ float scratch[kScratchFloats], weights[kMaxSize<kD> * kMaxSize<kD> * kMaxBlockChannels];
  const GhostShape& s = p.args.shape;
  const Work<kV, kLayout> t(p);
  const int per_primary = s.ratio - 1, all = s.init_channels * per_primary, begin = t.block * p.plan.block_c;
  const Channels<kV> j = Channels<kV>::of(t.first, all), c = sources(j, per_primary);
  const Channels<kV> out = j.plus(s.init_channels, s.out_channels);
  load_weights<T, kD>(p, weights, begin, 1, min(p.plan.block_c, all - begin));
  __syncthreads();
  const Half<kV> primary = Half<kV>::template of<T>(p.args.primary, c);
  Moments<kV> moments;
  if (j.kept[0]) {
    for_each_cell(p, t.share, t.row, [&](const Cell& cell) {
      float y[kCellColumns * kV];
      depthwise_of_x1<T, kD, kV, kLayout>(y, p, p.maps.out, s.out_channels, cell, c, primary,
                                          weights + t.share.lane * kV);
      round_to<T>(y);
      store_cell<T, kV, kLayout>(y, p, p.maps.out, s.out_channels, cell, out);
#pragma unroll
      for (int i = 0; i < kCellColumns; ++i) {
        if (i >= cell.columns) continue;
        float one[kV];
#pragma unroll
        for (int e = 0; e < kV; ++e) one[e] = y[i * kV + e];
        moments.add(one);
      }
    });
  }
  finish_statistics<kTrainingThreads>(moments, j, t.share, row_combination<3>(p, 0, t.block, t.row, all), p.mean, p.var,
                                      scratch);
}

// y1 and y2 become the output, in place. The channel blocks of the primary half come first.
template <Path kPath, Layout kLayout>
__global__ void __launch_bounds__(kTrainingThreads, 2) normalize(const __grid_constant__ TrainingParams p) {
  using T = typename PathType<kPath>::T;
  constexpr int kV = kCellChannels<T, kElementwiseBytes, kLayout>;
  const GhostShape& s = p.args.shape;
  const Work<kV, kLayout> t(p);
  const int primary_blocks = (s.init_channels + p.plan.block_c - 1) / p.plan.block_c;
  const bool cheap = t.block >= primary_blocks;
  const int first = t.first - (cheap ? primary_blocks * p.plan.block_c : 0);
  const Channels<kV> c = Channels<kV>::of(first, cheap ? s.out_channels - s.init_channels : s.init_channels);
  if (!c.kept[0]) return;
  const Channels<kV> out = c.plus(cheap ? s.init_channels : 0, s.out_channels);
  const Half<kV> half = Half<kV>::template of<T>(cheap ? p.args.cheap : p.args.primary, c);
  for_each_cell(p, t.share, t.row, [&](const Cell& cell) {
    float y[kCellColumns * kV];
    load_cell<T, kV, kLayout>(y, p, p.maps.out, s.out_channels, cell, out);
    half.normalize(y, y);
    half.template activate<T>(y, (cheap ? p.args.cheap : p.args.primary).act);
    times_output_gate<T>(y, p, cell, out);
    if (p.residual.data != nullptr) {
#pragma unroll
      for (int i = 0; i < kCellColumns; ++i) {
        if (i >= cell.columns) continue;
#pragma unroll
        for (int e = 0; e < kV; ++e) {
          y[i * kV + e] += to_float(*at<T>(p.residual, cell.n, out.at[e], cell.h, cell.w + i));
        }
      }
    }
    store_cell<T, kV, kLayout>(y, p, p.maps.out, s.out_channels, cell, out);
  });
}

}  // namespace ghostfused
