// The inner kernel of the depthwise convolution of x1. It serves NCHW and channels_last: what a vector lies along is
// the caller's choice.
#pragma once

#include "cpu/parameters.h"
#include "cpu/primary.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

constexpr int kStripRows =
    4;  // outputs made at once, so that each loaded vector serves all the taps that it lies under

// Outputs that follow each other: the rows of a channel in NCHW, the pixels of several rows in channels_last.
template <typename T>
struct Strip {
  const float* x1;      // at the first tap of the first output
  int64_t walk, cross;  // from an output to the next, and to the taps at right angles to that: 1 in NCHW
  const float* weight;  // (size along the walk, size across): numbers for all lanes in NCHW, else vectors
  int64_t weight_step;  // from a vector to the next
  const float* norm;    // scale, shift and slope: numbers in NCHW, else vectors
  int64_t norm_step;
  Act act;
  T* out;
  int64_t out_walk;
  const T* residual;  // added to what goes out, or null
  int64_t residual_walk;
  int64_t steps;  // outputs; in channels_last of each of the rows, which are ``cross`` apart in x1
  int64_t rows, out_cross, residual_cross;
  int64_t width;  // NCHW: of a row; its last vector ends where the row does, unless the row is shorter
  const float*
      masks;  // NCHW: per vector of a row and column of taps: lanes inside the image. All are at the middle tap
  int lanes;  // channels_last: of a vector that goes out; fewer than all where parts may be stored
};

// The taps of a channel in all lanes (kSplat), or of a vector of channels, and what follows their sum.
template <int kSize, bool kSplat>
class Filter {
  static constexpr bool kHeld = kSize <= 3;  // the taps fit the registers

 public:
  template <typename T>
  GHOSTFUSED_INLINE explicit Filter(const Strip<T>& p)
      : norm_affine(p.norm, p.norm_step, p.act, kSplat ? NormAffine::kNumbers : NormAffine::kVectors),
        weight(p.weight),
        weight_step(p.weight_step) {
#pragma GCC unroll 16
    for (int i = 0; kHeld && i < kSize * kSize; ++i) held[i] = from_memory(i);
  }

  GHOSTFUSED_INLINE Vec tap(int i) const { return kHeld ? held[kHeld ? i : 0] : from_memory(i); }

  const NormAffine norm_affine;

 private:
  GHOSTFUSED_INLINE Vec from_memory(int i) const { return kSplat ? splat(weight[i]) : load(weight + i * weight_step); }

  Vec held[kHeld ? kSize * kSize : 1];
  const float* weight;
  int64_t weight_step;
};

template <int kOutputs, bool kMasked, typename T, int kSize, bool kSplat>
GHOSTFUSED_INLINE void cheap_step(const Filter<kSize, kSplat>& filter, const Strip<T>& p, const float* x1,
                                  const float* mask, T* out, const T* residual) {
  constexpr bool kInParts = kSize > 3;  // as in the 1×1 convolution: chains of large kernels stay short
  const int64_t cross = kSplat ? 1 : p.cross;
  Ints inside[kSize];
#pragma GCC unroll 8
  for (int j = 0; kMasked && j < kSize; ++j) inside[j] = load<Ints>(mask + j * kLanes);
  Vec sum[kOutputs];
#pragma GCC unroll 16
  for (int i = 0; i < kOutputs + kSize - 1; ++i, x1 = next_row(x1, p.walk)) {
    Vec part[kOutputs];
#pragma GCC unroll 16
    for (int j = 0; j < kSize; ++j) {
      Vec x = load(x1 + j * cross);
      if (kMasked && j != kSize / 2) x = reinterpret_cast<Vec>(reinterpret_cast<Ints>(x) & inside[j]);
#pragma GCC unroll 16
      for (int o = 0; o < kOutputs; ++o) {
        const int tap = i - o;
        if (tap < 0 || tap >= kSize) continue;
        const Vec product = x * filter.tap(tap * kSize + j);
        Vec& to = kInParts ? part[o] : sum[o];
        to = j == 0 && (kInParts || tap == 0) ? rounded(product) : to + product;
      }
    }
#pragma GCC unroll 16
    for (int o = 0; kInParts && o < kOutputs; ++o) {
      const int tap = i - o;
      if (tap >= 0 && tap < kSize) sum[o] = tap == 0 ? part[o] : sum[o] + part[o];
    }
  }
  const bool plain = !residual && filter.norm_affine.only_clamps();
#pragma GCC unroll 4
  for (int o = 0; o < kOutputs; ++o) sum[o] = filter.norm_affine.clamped(sum[o]);
  if (__builtin_expect(!plain, 0)) {
    Vec y[kOutputs];  // the sums themselves stay in registers
#pragma GCC unroll 4
    for (int o = 0; o < kOutputs; ++o) y[o] = sum[o];
    if (!filter.norm_affine.only_clamps()) filter.norm_affine.activate(y);
#pragma GCC unroll 4
    for (int o = 0; o < kOutputs; ++o) {
      sum[o] = residual ? y[o] + load_copy<kSplat>(residual + o * p.residual_walk, p.lanes) : y[o];
    }
  }
#pragma GCC unroll 4
  for (int o = 0; o < kOutputs; ++o, out = next_row(out, p.out_walk)) {
    store_copy<kSplat>(out, sum[o], p.lanes);
    __builtin_prefetch(out + (kSplat ? 4 : 1) * kLine, 1);
  }
}

// Outputs first … first + kOutputs - 1. In NCHW these are rows: it goes along them, so that memory is met in order.
template <int kOutputs, typename T, int kSize, bool kSplat>
GHOSTFUSED_INLINE void cheap_outputs(const Filter<kSize, kSplat>& filter, const Strip<T>& p, int64_t first) {
  const float* x1 = p.x1 + first * p.walk;
  T* out = p.out + first * p.out_walk;
  const T* residual = p.residual ? p.residual + first * p.residual_walk : nullptr;
  if constexpr (!kSplat) {
    cheap_step<kOutputs, false>(filter, p, x1, nullptr, out, residual);
  } else {
    const auto residual_at = [&](int64_t w) { return residual ? residual + w : nullptr; };
    // apart from each other: of one loop over all vectors the compiler would hoist what their code shares, and spill it
    const float* mask = p.masks;
    cheap_step<kOutputs, true>(filter, p, x1, mask, out, residual);
    int64_t w = kLanes;
    for (; w + kLanes + kSize / 2 <= p.width; w += kLanes) {
      cheap_step<kOutputs, false>(filter, p, x1 + w, mask, out + w, residual_at(w));
    }
    for (; w < p.width; w += kLanes) {
      const int64_t at = min_of(w, p.width - kLanes);
      mask = p.masks + w / kLanes * kSize * kLanes;
      cheap_step<kOutputs, true>(filter, p, x1 + at, mask, out + at, residual_at(at));
    }
  }
}

template <typename T, int kSize, bool kSplat>
GHOSTFUSED_INLINE void cheap_steps(const Filter<kSize, kSplat>& filter, const Strip<T>& p) {
  int64_t i = 0;
  for (; i + kStripRows <= p.steps; i += kStripRows) cheap_outputs<kStripRows>(filter, p, i);
  if constexpr (kSize <= 3) {
    if (p.steps - i == 3) return cheap_outputs<3>(filter, p, i);
    if (p.steps - i == 2) return cheap_outputs<2>(filter, p, i);
  }
  for (; i < p.steps; ++i) cheap_outputs<1>(filter, p, i);  // the code of large kernels is large
}

template <typename T, int kSize, bool kSplat>
void cheap(const Strip<T>& strip) {
  const Filter<kSize, kSplat> filter(strip);
  if constexpr (kSplat) {
    cheap_steps(filter, strip);
  } else {
    Strip<T> row = strip;
    for (int64_t i = 0; i < strip.rows; ++i) {
      cheap_steps(filter, row);
      row.x1 += row.cross;
      row.out += row.out_cross;
      if (row.residual) row.residual += row.residual_cross;
    }
  }
}

template <typename T>
using CheapKernel = void (*)(const Strip<T>&);

template <typename T, bool kSplat>
CheapKernel<T> cheap_kernel(int size) {
  switch (size) {
    case 1:
      return cheap<T, 1, kSplat>;
    case 3:
      return cheap<T, 3, kSplat>;
    case 5:
      return cheap<T, 5, kSplat>;
    default:
      return cheap<T, 7, kSplat>;
  }
}

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
