// Cheap, of the NCHW kernel: x2 = act(norm(depthwise(x1))), sums in fp32. A thread slides down a strip of rows.
#pragma once

#include "cuda/ghost/nchw/store.cuh"

namespace ghostfused {

template <class C>
struct CheapChannel {
  float w[C::kD * C::kD], shift, slope;

  __device__ __forceinline__ explicit CheapChannel(const unsigned char* from) {
    float all[C::kCheapFloats];
#pragma unroll
    for (int i = 0; i < C::kCheapFloats; i += 4) {
      const float4 v = *reinterpret_cast<const float4*>(from + 4 * i);
      all[i] = v.x, all[i + 1] = v.y, all[i + 2] = v.z, all[i + 3] = v.w;
    }
#pragma unroll
    for (int i = 0; i < C::kD * C::kD; ++i) w[i] = all[i];
    shift = all[C::kD * C::kD], slope = all[C::kD * C::kD + 1];
  }
};

// The sums of the kD output rows that an input row reaches: sum[kh] meets row kh of the weights.
template <class C>
struct CheapSums {
  static constexpr int kD = C::kD, kCols = C::kCols;
  float sum[kD][kCols];

  // x starts kPad columns before the strip's first; columns outside a map of known width add nothing. Completes
  // sum[kD - 1].
  __device__ __forceinline__ void add_row(const float (&x)[kCols + kD - 1], const CheapChannel<C>& c) {
#pragma unroll
    for (int kh = 0; kh < kD; ++kh) {
#pragma unroll
      for (int i = 0; i < kCols; ++i) {
        float& s = sum[kh][i];
        if (kh == 0) s = c.shift;
#pragma unroll
        for (int kw = 0; kw < kD; ++kw) {
          const bool outside = !C::kWide && (i + kw < C::kPad || i + kw >= kCols + C::kPad);
          if (!outside) s = fmaf(x[i + kw], c.w[kh * kD + kw], s);
        }
      }
    }
  }
  // On to the next input row. Costs nothing where the rows are unrolled.
  __device__ __forceinline__ void next_row() {
#pragma unroll
    for (int kh = kD - 1; kh > 0; --kh) {
#pragma unroll
      for (int i = 0; i < kCols; ++i) sum[kh][i] = sum[kh - 1][i];
    }
  }
};

// Wide maps: a thread has kV columns of a channel.
template <class C>
__device__ __forceinline__ void cheap_wide(const NchwParams& p, const NchwBlock& b, const unsigned char* smem) {
  using T = typename C::T;
  constexpr int kV = C::kV, kD = C::kD, kPad = C::kPad, kRows = C::kRows, kUnroll = C::kFull ? 1 : kRows + kD - 1;
  const int strip_h = C::kFull ? p.plan.strip_h : kRows;
  const int columns = p.plan.row_chunks, strips = p.plan.tile_h / strip_h, row_pitch = p.plan.row_pitch;
#pragma unroll 1
  for (int i = threadIdx.x; i < columns * strips * b.ghosts; i += blockDim.x) {
    const int rest = p.by_columns.divide(i), column = i - rest * columns;
    const int c = p.by_strips.divide(rest), strip = rest - c * strips;
    const CheapChannel<C> channel(smem + p.plan.cheap_offset + c * (4 * C::kCheapFloats));
    const int h0 = b.h0 + strip * strip_h, rows = b.h0 + b.rows - h0, ghost = p.args.shape.init_channels + b.c0 + c;
    const unsigned char* from =
        smem + p.plan.x1_offset + c * p.plan.plane_pitch + strip * strip_h * row_pitch + (column + 1) * C::kChunkBytes;
    unsigned char* to = static_cast<unsigned char*>(p.out.data) +
                        C::kBytes * (b.n * p.out.stride_n + offset_in_image(p.out, ghost, h0, column * kV));
    CheapSums<C> sums;
#pragma unroll kUnroll
    for (int r = 0; r < strip_h + kD - 1; ++r) {
      Vector<T, kPad> left, right;
      Vector<T, kV> middle;
      left.load(from - C::kBytes * kPad);
      middle.load(from);
      right.load(from + C::kChunkBytes);
      from += row_pitch;
      float x[kV + kD - 1];
#pragma unroll
      for (int k = 0; k < kPad; ++k) x[k] = to_float(left.at[k]), x[kPad + kV + k] = to_float(right.at[k]);
#pragma unroll
      for (int k = 0; k < kV; ++k) x[kPad + k] = to_float(middle.at[k]);
      sums.add_row(x, channel);
      if (r >= kD - 1) {
        const int h = r - (kD - 1);
        uint32_t v[C::kWords];
        activate_and_pack<C, kV>(v, sums.sum[kD - 1], p.args.cheap.act, channel.slope, p.cheap_floor);
        if constexpr (C::kFull) {
          if (h < rows) gate_and_add<C>(p, b.n, v, [=](int e) { return int3{ghost, h0 + h, column * kV + e}; });
        }
        store_words<C::kWords>(to, v, h < rows);
        to += p.out_row;
      }
      sums.next_row();
    }
  }
}

// 14 × 14 and 7 × 7: a thread has whole rows of a channel. x2 goes to ``staged``, map after map as in the output. Where
// x1's planes are padded, ``staged_x1`` gets x1 as well.
template <class C>
__device__ __forceinline__ void cheap_small(const NchwParams& p, const NchwBlock& b, const unsigned char* smem,
                                            unsigned char* staged, unsigned char* staged_x1) {
  using T = typename C::T;
  constexpr int kD = C::kD, kPad = C::kPad, kRows = C::kRows, kSide = C::kSide;
  constexpr int kPitch = C::kRowPitch, kUnroll = C::kFull ? 1 : kRows + kD - 1;
  const int strips = kSide / kRows;
  const unsigned char* zeros = smem + p.plan.zero_offset;
#pragma unroll 1
  for (int i = threadIdx.x; i < p.plan.block_c * strips; i += blockDim.x) {
    const int strip = strips == 1 ? 0 : i / p.plan.block_c, c = i - strip * p.plan.block_c, h0 = strip * kRows;
    if (c >= b.channels) continue;
    const unsigned char* from = smem + p.plan.x1_offset + c * p.plan.plane_pitch + h0 * kPitch;
    if constexpr (MapRow<C>::kPadded) {
      T* to = reinterpret_cast<T*>(staged_x1) + c * C::kPixels;
#pragma unroll
      for (int r = 0; r < 7; ++r) {
        MapRow<C> row;
        row.load(from + r * kPitch);
        row.store(to + r * 7);
      }
    }
    if (c >= b.ghosts) continue;
    const CheapChannel<C> channel(smem + p.plan.cheap_offset + c * (4 * C::kCheapFloats));
    T* to = reinterpret_cast<T*>(staged) + c * C::kPixels + h0 * kSide;
    CheapSums<C> sums;
#pragma unroll kUnroll
    for (int r = 0; r < kRows + kD - 1; ++r) {
      const bool outside = (r < kPad && strip == 0) || (r >= kRows + kPad && strip == strips - 1);
      const unsigned char* row = outside ? zeros : from + (r - kPad) * kPitch;
      MapRow<C> numbers;
      numbers.load(row);
      float x[kSide + kD - 1];
      numbers.to_floats(x + kPad);
      sums.add_row(x, channel);
      if (r >= kD - 1) {
        activate_and_pack<C, kSide>(numbers.words, sums.sum[kD - 1], p.args.cheap.act, channel.slope, p.cheap_floor);
        numbers.store(to + (r - (kD - 1)) * kSide);
      }
      sums.next_row();
    }
  }
}

}  // namespace ghostfused
