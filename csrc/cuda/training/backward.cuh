// The training kernels of backward.
#pragma once

#include "cuda/training/forward.cuh"

namespace ghostfused {

// The sums of dz, dz * (y - center) and dx * min(z, 0) of a cell; the second, times rstd, is
// that of dz * x̂.
template <int kV, int kCount>
__device__ __forceinline__ void add_norm_sums(float (&sums)[kCount], const Half<kV>& half,
                                              const float (&dz)[kCellColumns * kV], const float (&y)[kCellColumns * kV],
                                              const float (&dx)[kCellColumns * kV],
                                              const float (&z)[kCellColumns * kV]) {
#pragma unroll
  for (int i = 0; i < kCellColumns * kV; ++i) {
    sums[i % kV] += dz[i];
    sums[kV + i % kV] += dz[i] * (y[i] - half.center[i % kV]);
    sums[2 * kV + i % kV] += dx[i] * fminf(z[i], 0.f);
  }
}

// dz2 and y2, or with stored statistics dy2; their sums; grad_output * the ungated output.
template <Path kPath, int kD, Layout kLayout>
__global__ void __launch_bounds__(kTrainingThreads, 2) cheap_backward(const __grid_constant__ TrainingParams p) {
  using T = typename PathType<kPath>::T;
  constexpr int kV = kCellChannels<T, kStencilBytes, kLayout>, kCount = kCellColumns * kV;
  __shared__ float scratch[kScratchFloats], weights[kMaxSize<kD> * kMaxSize<kD> * kMaxBlockChannels];
  __shared__ Table<Half<kV>, kV> primary_table, cheap_table;
  const GhostShape& s = p.args.shape;
  const Work<kV, kLayout> t(p);
  const int per_primary = s.ratio - 1, all = s.init_channels * per_primary, begin = t.block * p.plan.block_c;
  const Channels<kV> j = Channels<kV>::of(t.first, all), c = sources(j, per_primary);
  const Channels<kV> out = j.plus(s.init_channels, s.out_channels);
  load_weights<T, kD>(p, weights, begin, 1, min(p.plan.block_c, all - begin));
  primary_table.put(Half<kV>::template of<T>(p.args.primary, c), t.share);
  cheap_table.put(Half<kV>::template of<T>(p.args.cheap, j), t.share);
  __syncthreads();
  float sums[3 * kV] = {};
  if (j.kept[0]) {
    for_each_cell(p, t.share, t.row, [&](const Cell& cell) {
      float y[kCount], z[kCount], dx[kCount] = {};
      depthwise_of_x1<T, kD, kV, kLayout>(y, p, p.maps.y1, s.init_channels, cell, c, primary_table.get(t.share),
                                          weights + t.share.lane * kV);
      round_to<T>(y);
      const Half<kV> cheap = cheap_table.get(t.share);
      cheap.normalize(z, y);
      if (out.kept[0]) {
        load_cell<T, kV, kLayout>(dx, p, p.maps.grad, s.out_channels, cell, out);
#pragma unroll
        for (int i = 0; i < kCount; ++i) dx[i] = out.kept[i % kV] ? dx[i] : 0.f;
      }
      if (p.maps.product != nullptr) {
        float x[kCount], g[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i) x[i] = z[i];
        cheap.template activate<T>(x, p.args.cheap.act);
#pragma unroll
        for (int i = 0; i < kCount; ++i) x[i] *= dx[i];
        store_cell<T, kV, kLayout>(x, p, p.maps.product, s.out_channels, cell, out);
        // x1 once for each primary channel: with its first cheap channel
        Channels<kV> firsts = c;
#pragma unroll
        for (int e = 0; e < kV; ++e) firsts.kept[e] = j.kept[e] && c.at[e] * per_primary == j.at[e];
        load_cell<T, kV, kLayout>(x, p, p.maps.y1, s.init_channels, cell, c);
        load_cell<T, kV, kLayout>(g, p, p.maps.grad, s.out_channels, cell, c);
        const Half<kV> primary = primary_table.get(t.share);
        primary.normalize(x, x);
        primary.template activate<T>(x, p.args.primary.act);
#pragma unroll
        for (int i = 0; i < kCount; ++i) x[i] *= g[i];
        store_cell<T, kV, kLayout>(x, p, p.maps.product, s.out_channels, cell, firsts);
      }
      if (out.kept[0]) times_output_gate<T>(dx, p, cell, out);
      float dz[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) dz[i] = dx[i];
      cheap.template activate_backward<T>(dz, z, p.args.cheap.act);
      if (p.sums != nullptr) add_norm_sums<kV>(sums, cheap, dz, y, dx, z);
      if (p.batch_statistics) {
        store_cell<T, kV, kLayout>(y, p, p.maps.y2, all, cell, j);
      } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) dz[i] *= cheap.scale[i % kV];
      }
      store_cell<T, kV, kLayout>(dz, p, p.maps.dz2, all, cell, j);
    });
  }
  if (p.sums == nullptr) return;
  if (!t.share.idle()) {
    const Half<kV> cheap = cheap_table.get(t.share);
#pragma unroll
    for (int e = 0; e < kV; ++e) sums[kV + e] *= cheap.rstd[e];
  }
  finish_sums<kTrainingThreads, 3, kV>(sums, j, t.share, row_combination<3>(p, 0, t.block, t.row, all), scratch,
                                       [&](int value, int c, float sum) { p.sums[value * all + c] = sum; });
}

// dy = scale * (dz - mean of dz - x̂ * mean of dz * x̂), as scale * dz + slope * (y - center) + offset.
template <int kV>
struct NormBackward {
  float scale[kV], slope[kV], offset[kV], center[kV];

  static constexpr int kNumbers = 4;
  __device__ __forceinline__ float* number(int i) { return i == 0 ? scale : i == 1 ? slope : i == 2 ? offset : center; }

  template <typename T>
  __device__ __forceinline__ static NormBackward of(const NormAct& p, const float* means, int channels,
                                                    const Channels<kV>& c) {
    const Half<kV> half = Half<kV>::template of<T>(p, c);
    NormBackward b;
#pragma unroll
    for (int e = 0; e < kV; ++e) {
      b.scale[e] = half.scale[e];
      b.slope[e] = -half.scale[e] * half.rstd[e] * means[channels + c.at[e]];
      b.offset[e] = -half.scale[e] * means[c.at[e]];
      b.center[e] = half.center[e];
    }
    return b;
  }

  template <int kCount>
  __device__ __forceinline__ void apply(float (&dz)[kCount], const float (&y)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int e = i % kV;
      dz[i] = fmaf(dz[i], scale[e], fmaf(y[i] - center[e], slope[e], offset[e]));
    }
  }
};

// dz1, or with stored statistics dy1; its sums; the gradient of cheap_weight: as far as they are asked for.
template <Path kPath, int kD, Layout kLayout>
__global__ void __launch_bounds__(kTrainingThreads, 2) primary_backward(const __grid_constant__ TrainingParams p) {
  using T = typename PathType<kPath>::T;
  constexpr int kV = kCellChannels<T, kStencilBytes, kLayout>, kCount = kCellColumns * kV;
  constexpr int kMax = kMaxSize<kD>, kWindow = kCellColumns + kMax - 1, kSums = kPassSums<kD>;
  __shared__ float scratch[kScratchFloats], weights[kMax * kMax * kMaxBlockChannels];
  __shared__ Table<Half<kV>, kV> halves;
  __shared__ Table<NormBackward<kV>, kV> norms;
  __shared__ float norm_sums[3 * kV][kTrainingThreads];  // the registers are for the weights' sums
  const GhostShape& s = p.args.shape;
  const Work<kV, kLayout> t(p);
  const int per_primary = p.maps.dz2 == nullptr ? 0 : s.ratio - 1, all = s.init_channels * per_primary;
  const int begin = t.block * p.plan.block_c;
  const int d = kD > 0 ? kD : s.dw_size, pad = d / 2;
  // A pass makes the weights' gradient of each primary channel's own_r-th cheap one; any size: of a row of it.
  const int own_r = kD > 0 ? t.pass : t.pass / d, own_row = kD > 0 ? 0 : t.pass % d;
  const bool maps = p.maps.dz1 != nullptr && t.pass == 0, weight = p.weight_gradient != nullptr;
  const Channels<kV> c = Channels<kV>::of(t.first, s.init_channels);
  const auto cheap_channels = [&](int r) {
    Channels<kV> j = c;
#pragma unroll
    for (int e = 0; e < kV; ++e) j.at[e] = c.at[e] * per_primary + r;
    return j;
  };
  const auto norm_backward = [&](int r) {
    return p.batch_statistics ? NormBackward<kV>::template of<T>(p.args.cheap, p.means, all, cheap_channels(r))
                              : NormBackward<kV>{};
  };
  if (per_primary > 0) {
    norms.put(norm_backward(own_r), t.share);
    load_weights<T, kD>(p, weights, begin * per_primary + own_r, per_primary,
                        min(p.plan.block_c, s.init_channels - begin));
  }
  halves.put(Half<kV>::template of<T>(p.args.primary, c), t.share);
  __syncthreads();
  const float* own_weights = weights + t.share.lane * kV;

  float weight_sums[kSums * kV] = {};
#pragma unroll
  for (int i = 0; i < 3 * kV; ++i) norm_sums[i][threadIdx.x] = 0.f;
  if (c.kept[0]) {
    for_each_cell(p, t.share, t.row, [&](const Cell& cell) {
      float y1[kCount], x1[kCount], dx[kCount] = {};
      load_cell<T, kV, kLayout>(y1, p, p.maps.y1, s.init_channels, cell, c);
      {
        const Half<kV> primary = halves.get(t.share);
        primary.normalize(x1, y1);
        primary.template activate<T>(x1, p.args.primary.act);
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) x1[i] = i / kV < cell.columns ? x1[i] : 0.f;

      // With several cheap channels of each primary one, pass 0 adds up dx of all of them.
#pragma unroll 1
      for (int r = own_r; r < (maps ? per_primary : min(own_r + 1, per_primary)); ++r) {
        const bool own = r == own_r;
        const NormBackward<kV> norm = own ? norms.get(t.share) : norm_backward(r);
        const Channels<kV> j = cheap_channels(r);
#pragma unroll
        for (int kh = 0; kh < d; ++kh) {
          const int h = cell.h + pad - kh;  // x1[p] went to y2[p - (kh - pad, kw - pad)] by tap (kh, kw)
          if (h < 0 || h >= s.height) continue;
          const bool own_weight = weight && own && (kD > 0 || kh == own_row);
          if (kD == 0 && !maps && !own_weight) continue;
          const int left = cell.w + pad - (kMax - 1);  // the window's first column
          float dy[kWindow * kV];
          load_columns<T, kWindow, kV, kLayout>(dy, p, p.maps.dz2, all, cell.n, h, left, j);
          if (p.batch_statistics) {
            float y[kWindow * kV];
            load_columns<T, kWindow, kV, kLayout>(y, p, p.maps.y2, all, cell.n, h, left, j);
            norm.apply(dy, y);
#pragma unroll
            for (int i = 0; i < kWindow; ++i) {
              if (left + i >= 0 && left + i < s.width) continue;
#pragma unroll
              for (int e = 0; e < kV; ++e) dy[i * kV + e] = 0.f;
            }
          }
          const auto for_each_pair = [&](auto f) {  // window's column i and cell's column col that tap kw joins
#pragma unroll
            for (int i = 0; i < kWindow; ++i) {
#pragma unroll
              for (int col = 0; col < kCellColumns; ++col) {
                const int kw = col + kMax - 1 - i;
                if (kw < 0 || kw >= kMax || kw >= d) continue;
#pragma unroll
                for (int e = 0; e < kV; ++e) f(i * kV + e, col * kV + e, kw, e);
              }
            }
          };
          if (maps) {
            float w[kMax * kV];
#pragma unroll
            for (int i = 0; i < kMax * kV; ++i) {
              if (i / kV >= d) continue;
              w[i] = own ? own_weights[(kh * d + i / kV) * kMaxBlockChannels + i % kV]
                         : weight_at<T>(p.args, j.at[i % kV], kh, i / kV);
            }
            for_each_pair([&](int from, int to, int kw, int e) { dx[to] = fmaf(dy[from], w[kw * kV + e], dx[to]); });
          }
          if (own_weight) {
            for_each_pair([&](int from, int to, int kw, int e) {
              float& sum = weight_sums[((kD > 0 ? kh * kD : 0) + kw) * kV + e];
              sum = fmaf(dy[from], x1[to], sum);
            });
          }
        }
      }
      if (!maps) return;
      float grad[kCount], z[kCount], dz[kCount];
      const Half<kV> primary = halves.get(t.share);
      primary.normalize(z, y1);
      load_cell<T, kV, kLayout>(grad, p, p.maps.grad, s.out_channels, cell, c);
      times_output_gate<T>(grad, p, cell, c);
#pragma unroll
      for (int i = 0; i < kCount; ++i) dz[i] = dx[i] = i / kV < cell.columns ? dx[i] + grad[i] : 0.f;
      primary.template activate_backward<T>(dz, z, p.args.primary.act);
      if (p.sums != nullptr) {
        float of_cell[3 * kV] = {};
        add_norm_sums<kV>(of_cell, primary, dz, y1, dx, z);
#pragma unroll
        for (int i = 0; i < 3 * kV; ++i) norm_sums[i][threadIdx.x] += of_cell[i];
      }
      if (!p.batch_statistics) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) dz[i] *= primary.scale[i % kV];
      }
      store_cell<T, kV, kLayout>(dz, p, p.maps.dz1, s.init_channels, cell, c);
    });
  }
  if (p.sums == nullptr && !weight) return;
  float sums[(3 + kSums) * kV];
#pragma unroll
  for (int i = 0; i < (3 + kSums) * kV; ++i) sums[i] = i < 3 * kV ? norm_sums[i][threadIdx.x] : weight_sums[i - 3 * kV];
  if (!t.share.idle()) {
    const Half<kV> primary = halves.get(t.share);
#pragma unroll
    for (int e = 0; e < kV; ++e) sums[kV + e] *= primary.rstd[e];
  }
  finish_sums<kTrainingThreads, 3 + kSums, kV>(
      sums, c, t.share, row_combination<3 + kSums>(p, t.pass, t.block, t.row, s.init_channels), scratch,
      [&](int value, int c, float sum) {
        if (value >= 3 && weight) {
          if (kD == 0 && value - 3 >= d) return;  // the kernel has no such column
          const int64_t j = int64_t{c} * per_primary + own_r;
          static_cast<T*>(p.weight_gradient)[j * d * d + own_row * d + value - 3] = from_float<T>(sum);
        } else if (value < 3 && t.pass == 0 && p.sums != nullptr) {
          p.sums[value * s.init_channels + c] = sum;
        }
      });
}

// dz1 becomes dy1, in place.
template <Path kPath, Layout kLayout>
__global__ void __launch_bounds__(kTrainingThreads, 2) normalize_backward(const __grid_constant__ TrainingParams p) {
  using T = typename PathType<kPath>::T;
  constexpr int kV = kCellChannels<T, kElementwiseBytes, kLayout>;
  const GhostShape& s = p.args.shape;
  const Work<kV, kLayout> t(p);
  const Channels<kV> c = Channels<kV>::of(t.first, s.init_channels);
  if (!c.kept[0]) return;
  const NormBackward<kV> norm = NormBackward<kV>::template of<T>(p.args.primary, p.means, s.init_channels, c);
  for_each_cell(p, t.share, t.row, [&](const Cell& cell) {
    float dz[kCellColumns * kV], y[kCellColumns * kV];
    load_cell<T, kV, kLayout>(dz, p, p.maps.dz1, s.init_channels, cell, c);
    load_cell<T, kV, kLayout>(y, p, p.maps.y1, s.init_channels, cell, c);
    norm.apply(dz, y);
    store_cell<T, kV, kLayout>(dz, p, p.maps.dz1, s.init_channels, cell, c);
  });
}

}  // namespace ghostfused
