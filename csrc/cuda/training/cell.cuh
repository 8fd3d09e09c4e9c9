// What the training kernels share: a thread's cells and channels, loads and stores, norm and activation both ways.
#pragma once

#include "cuda/ghost/store.cuh"
#include "cuda/norm.cuh"
#include "cuda/training/training.h"

namespace ghostfused {

// Channels of a thread, ``kBytes`` of them where they are neighbours.
template <typename T, int kBytes, Layout kLayout>
constexpr int kCellChannels = cell_channels(kBytes, kLayout == Layout::kNhwc, sizeof(T));

template <Layout kLayout>
__device__ __forceinline__ bool channels_last(const GhostShape& s) {
  return kLayout == Layout::kEither ? s.channels_last : kLayout == Layout::kNhwc;
}

// Columns [w, w + columns) of row h of image n.
struct Cell {
  int n, h, w, columns;
};

// A thread's place in its block: a lane of channels, and a position among the threads that share them.
struct BlockShare {
  int lane, lanes, position, positions;

  template <bool kChannelsLast>
  __device__ __forceinline__ static BlockShare of(int lanes) {
    const ThreadShare s = ThreadShare::of<kChannelsLast>(lanes, INT32_MAX);
    return {s.vector, lanes, s.first, s.step};
  }
  __device__ __forceinline__ bool idle() const { return position >= positions; }  // left over
};

// Calls f(cell) for this thread's cells of a row of the grid.
template <typename F>
__device__ __forceinline__ void for_each_cell(const TrainingParams& p, const BlockShare& t, int row, F f) {
  if (t.idle()) return;
  const uint32_t groups = p.plan.row_groups, per_image = p.plan.image_cells;
  const int64_t first = row * p.plan.row_cells + t.position, end = min((row + 1) * p.plan.row_cells, p.plan.cells);
  int n = static_cast<int>(first / per_image);
  uint32_t i = static_cast<uint32_t>(first % per_image);
#pragma unroll 1
  for (int left = static_cast<int>(end - first); left > 0; left -= t.positions) {
    const int h = i / groups, w = (i - h * groups) * kCellColumns;
    f(Cell{n, h, w, min(kCellColumns, p.args.shape.width - w)});
    i += t.positions;
    if (i >= per_image) {
      n += i / per_image;
      i %= per_image;
    }
  }
}

// A thread's channels. Those beyond the last repeat it: they are loaded, and not ``kept``.
template <int kV>
struct Channels {
  int at[kV];
  bool kept[kV];

  __device__ __forceinline__ static Channels of(int first, int end) {
    Channels c;
#pragma unroll
    for (int e = 0; e < kV; ++e) {
      c.at[e] = min(first + e, end - 1);
      c.kept[e] = first + e < end;
    }
    return c;
  }
  __device__ __forceinline__ Channels plus(int offset, int end) const {
    Channels c = *this;
#pragma unroll
    for (int e = 0; e < kV; ++e) {
      c.at[e] = min(at[e] + offset, end - 1);
      c.kept[e] = kept[e] && at[e] + offset < end;
    }
    return c;
  }
};

// Where row h of image n begins in a dense map.
template <Layout kLayout>
__device__ __forceinline__ int64_t row_offset(const GhostShape& s, int channels, int n, int h) {
  return channels_last<kLayout>(s) ? (int64_t{n} * s.height + h) * s.width * channels
                                   : (int64_t{n} * channels * s.height + h) * s.width;
}

template <Layout kLayout>
__device__ __forceinline__ int64_t channel_offset(const GhostShape& s, int c) {
  return channels_last<kLayout>(s) ? c : int64_t{c} * s.height * s.width;
}

// Columns [w, w + kCount) of a row as v[column][channel], zero outside the image.
template <typename T, int kCount, int kV, Layout kLayout>
__device__ __forceinline__ void load_columns(float (&v)[kCount * kV], const TrainingParams& p, const void* map,
                                             int channels, int n, int h, int w, const Channels<kV>& c) {
  static_assert(kLayout == Layout::kNhwc || kV == 1);
  const GhostShape& s = p.args.shape;
  const T* row = static_cast<const T*>(map) + row_offset<kLayout>(s, channels, n, h);
  if constexpr (kLayout == Layout::kEither) {
    const int step = s.channels_last ? channels : 1;
    row += channel_offset<kLayout>(s, c.at[0]) + int64_t{w} * step;
#pragma unroll
    for (int i = 0; i < kCount; ++i, row += step) v[i] = w + i >= 0 && w + i < s.width ? to_float(*row) : 0.f;
  } else if constexpr (kLayout == Layout::kNhwc) {
    row += int64_t{w} * channels;
#pragma unroll
    for (int i = 0; i < kCount; ++i, row += channels) {
      const bool inside = w + i >= 0 && w + i < s.width;
      if (kV > 1 && p.plan.vector) {
        Vector<T, kV> x;
        if (inside) x.load(row + c.at[0]);
#pragma unroll
        for (int e = 0; e < kV; ++e) v[i * kV + e] = to_float(x.at[e]);
      } else {
#pragma unroll
        for (int e = 0; e < kV; ++e) v[i * kV + e] = inside ? to_float(row[c.at[e]]) : 0.f;
      }
    }
  } else {
    static_assert(kCount == kCellColumns, "a stencil's window in NCHW is kEither's");
    row += channel_offset<kLayout>(s, c.at[0]) + w;
    if (p.plan.vector) {
      Vector<T, kCellColumns> x;
      x.load(row);
#pragma unroll
      for (int i = 0; i < kCount; ++i) v[i] = to_float(x.at[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) v[i] = w + i < s.width ? to_float(row[i]) : 0.f;
    }
  }
}

template <typename T, int kV, Layout kLayout>
__device__ __forceinline__ void load_cell(float (&v)[kCellColumns * kV], const TrainingParams& p, const void* map,
                                          int channels, const Cell& cell, const Channels<kV>& c) {
  load_columns<T, kCellColumns, kV, kLayout>(v, p, map, channels, cell.n, cell.h, cell.w, c);
}

template <typename T, int kV, Layout kLayout>
__device__ __forceinline__ void store_cell(const float (&v)[kCellColumns * kV], const TrainingParams& p, void* map,
                                           int channels, const Cell& cell, const Channels<kV>& c) {
  const GhostShape& s = p.args.shape;
  T* row = static_cast<T*>(map) + row_offset<kLayout>(s, channels, cell.n, cell.h);
  if constexpr (kLayout == Layout::kEither) {
    const int step = s.channels_last ? channels : 1;
    row += channel_offset<kLayout>(s, c.at[0]) + int64_t{cell.w} * step;
#pragma unroll
    for (int i = 0; i < kCellColumns; ++i, row += step) {
      if (c.kept[0] && i < cell.columns) *row = from_float<T>(v[i]);
    }
  } else if constexpr (kLayout == Layout::kNhwc) {
    row += int64_t{cell.w} * channels;
#pragma unroll
    for (int i = 0; i < kCellColumns; ++i, row += channels) {
      if (i >= cell.columns) continue;
      if (kV > 1 && p.plan.vector) {
        Vector<T, kV> x;
#pragma unroll
        for (int e = 0; e < kV; ++e) x.at[e] = from_float<T>(v[i * kV + e]);
        if (c.kept[0]) x.store(row + c.at[0]);
      } else {
#pragma unroll
        for (int e = 0; e < kV; ++e) {
          if (c.kept[e]) row[c.at[e]] = from_float<T>(v[i * kV + e]);
        }
      }
    }
  } else if (c.kept[0]) {
    row += channel_offset<kLayout>(s, c.at[0]) + cell.w;
    if (p.plan.vector) {
      Vector<T, kCellColumns> x;
#pragma unroll
      for (int i = 0; i < kCellColumns; ++i) x.at[i] = from_float<T>(v[i]);
      x.store(row);
    } else {
#pragma unroll
      for (int i = 0; i < kCellColumns; ++i) {
        if (i < cell.columns) row[i] = from_float<T>(v[i]);
      }
    }
  }
}

// Rounds to T, as a map is stored.
template <typename T, int kCount>
__device__ __forceinline__ void round_to(float (&v)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = to_float(from_float<T>(v[i]));
}

// One half's norm and activation of a thread's channels: x̂ = (y - center) * rstd, z = (y - center) * scale + shift.
// Subtract first, then scale: with mean/std = 1e3, y * scale + shift would lose three digits.
template <int kV>
struct Half {
  float center[kV], rstd[kV], scale[kV], shift[kV], slope[kV];

  template <typename T>
  __device__ __forceinline__ static Half of(const NormAct& p, const Channels<kV>& c) {
    Half h;
#pragma unroll
    for (int e = 0; e < kV; ++e) {
      const auto value = [&](const ChannelVector& v, float absent) {
        return channel_value<T>(v, c.at[e], absent, p.norm_is_float32);
      };
      h.rstd[e] = p.mean.data == nullptr ? 1.f : 1.f / sqrtf(value(p.var, 1.f) + p.eps);
      h.center[e] = value(p.mean, 0.f) - channel_value<T>(p.bias, c.at[e], 0.f, false);
      h.scale[e] = h.rstd[e] * value(p.gamma, 1.f);
      h.shift[e] = value(p.beta, 0.f);
      h.slope[e] = slope_of(p, channel_value<T>(p.slope, c.at[e], 0.f, false));
    }
    return h;
  }

  static constexpr int kNumbers = 5;
  __device__ __forceinline__ float* number(int i) {
    return i == 0 ? center : i == 1 ? rstd : i == 2 ? scale : i == 3 ? shift : slope;
  }

  template <int kCount>
  __device__ __forceinline__ void normalize(float (&z)[kCount], const float (&y)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) z[i] = fmaf(y[i] - center[i % kV], scale[i % kV], shift[i % kV]);
  }

  template <typename T, int kCount>
  __device__ __forceinline__ void activate(float (&z)[kCount], Act act) const {
    float slopes[kCount];
    spread(slopes);
    ghostfused::activate<kCount, sizeof(T) == 4>(z, act, slopes);
  }

  // grad * act'(z)
  template <typename T, int kCount>
  __device__ __forceinline__ void activate_backward(float (&grad)[kCount], const float (&z)[kCount], Act act) const {
    float slopes[kCount];
    spread(slopes);
    ghostfused::activate_backward<kCount, sizeof(T) == 4>(grad, z, act, slopes);
  }

  template <int kCount>
  __device__ __forceinline__ void spread(float (&slopes)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) slopes[i] = slope[i % kV];
  }
};

// Parameters per channel (a Half or the like) of a block in shared memory, for kernels that have no registers to keep
// them in all the time.
template <typename Parameters, int kV>
struct Table {
  float at[Parameters::kNumbers][kMaxBlockChannels];

  __device__ __forceinline__ void put(Parameters p, const BlockShare& t) {
    if (t.position != 0) return;
#pragma unroll
    for (int i = 0; i < Parameters::kNumbers; ++i) {
#pragma unroll
      for (int e = 0; e < kV; ++e) at[i][t.lane * kV + e] = p.number(i)[e];
    }
  }
  __device__ __forceinline__ Parameters get(const BlockShare& t) const {
    asm volatile("" ::: "memory");  // else the compiler would read it once, and hold on to it
    Parameters p{};
#pragma unroll
    for (int i = 0; i < Parameters::kNumbers; ++i) {
#pragma unroll
      for (int e = 0; e < kV; ++e) p.number(i)[e] = at[i][t.lane * kV + e];
    }
    return p;
  }
};

// v *= output_gate at a cell and the output's channels c.
template <typename T, int kV>
__device__ __forceinline__ void times_output_gate(float (&v)[kCellColumns * kV], const TrainingParams& p,
                                                  const Cell& cell, const Channels<kV>& c) {
  if (p.output_gate.data == nullptr) return;
  const GhostForwardParams& a = p.args;
  const int h = nearest(cell.h, a.gate_height, a.shape.height);
#pragma unroll
  for (int i = 0; i < kCellColumns; ++i) {
    const int w = nearest(cell.w + i, a.gate_width, a.shape.width);
#pragma unroll
    for (int e = 0; e < kV; ++e) v[i * kV + e] *= to_float(*at<T>(p.output_gate, cell.n, c.at[e], h, w));
  }
}

template <typename T>
__device__ __forceinline__ float weight_at(const GhostForwardParams& a, int64_t c, int kh, int kw) {
  return to_float(static_cast<const T*>(
      a.cheap_weight)[c * a.cheap_weight_stride_c + kh * a.cheap_weight_stride_h + kw * a.cheap_weight_stride_w]);
}

// The cheap conv's weights for ``count`` channels, from ``first`` on and ``every`` so many, as [tap][channel] in shared
// memory. A barrier must follow.
template <typename T, int kD>
__device__ __forceinline__ void load_weights(const TrainingParams& p, float* out, int first, int every, int count) {
  const int d = kD > 0 ? kD : p.args.shape.dw_size;
  for (int i = threadIdx.x; i < count * d * d; i += blockDim.x) {
    const int c = i / (d * d), tap = i - c * (d * d);
    out[tap * kMaxBlockChannels + c] = weight_at<T>(p.args, first + int64_t{c} * every, tap / d, tap % d);
  }
}

}  // namespace ghostfused
