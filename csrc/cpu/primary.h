// The inner kernel of the 1×1 convolution. It serves NCHW and channels_last: what a vector lies along is the caller's
// choice.
#pragma once

#include "cpu/activation.h"
#include "cpu/lane_products.h"
#include "cpu/matrix_products.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

// The rows and the vectors of a block of sums. They fill three quarters of the vector registers, and half of NEON's,
// where vectors of factors take a quarter. Where bfmmla sums, a square of them takes the fewest loads.
#ifdef GHOSTFUSED_MANY_REGISTERS  // 32 of them
constexpr int kUsualRows = 8;
#else
constexpr int kUsualRows = 4;
#endif
#ifdef GHOSTFUSED_NEON
constexpr int kUsualVecs = 2;
#else
constexpr int kUsualVecs = 3;
#endif
constexpr int max_vecs(int lanes_at_once) { return lanes_at_once > 1 ? 4 : kUsualVecs; }
template <typename T>
constexpr int kMaxVecs = max_vecs(kLanesAtOnce<T>);
template <typename T>
constexpr int kMaxRows = kLanesAtOnce<T> > 1 ? 4 : kUsualRows;
constexpr int kMaxSums = kUsualRows * kUsualVecs;
static_assert(kMaxRows<BFloat16> * kMaxVecs<BFloat16> <= kMaxSums);

// Whether the distances of the rows stay in registers, of which aarch64 has enough: GCC adds them up in the loop.
#if defined(GHOSTFUSED_NEON) || defined(GHOSTFUSED_SVE)
constexpr bool kKeepDistances = true;
#else
constexpr bool kKeepDistances = false;
#endif

// How much of the depth is summed for all rows of a block, or all pixels of a tile, before the next: of b it stays in
// L1 meanwhile. A multiple of part_of's.
constexpr int64_t kDeep = 128;

// Distances in floats, measured on a Zen 4: where the tensors exceed the caches they halve the time of wide maps, and
// where they don't they cost 1 to 2 %.
constexpr int kLine = 16, kPrefetchX = 120, kPrefetchOut = 72;

// y = act(scale * (a b) + shift): a (rows, depth) read by broadcasts, b (depth, vecs * kLanes), row-major all. a and b
// are made of the lanes of operand.h, which ``float`` stands for.
// NCHW: rows are channels, vectors lie along pixels. channels_last: rows are pixels, vectors lie along channels, and b
// is (vecs, depth, kLanes), of BFloat16 numbers if kHalfB. Where an instruction sums several lanes those of b lie
// together: (depth / kLanesAtOnce, vecs * kLanes, kLanesAtOnce).
template <typename T>
struct Panel {
  const float* a;
  int64_t a_row;
  const float* b;
  int64_t b_row;       // NCHW's
  const float* ahead;  // what will be read next: lines from here on are fetched with every row of b
  int64_t ahead_row;
  int64_t depth;
  const int64_t* taps;  // NCHW: where b begins for each tap of a larger kernel
  int64_t of_tap;       // the depth of one; all of it else
  int64_t begin, end;   // the part of it that a call sums; but after the last one the sums wait in y
  float* y;
  int64_t y_row;
  T* copy;  // where y goes too, rounded, with the residual added if there is one; or null
  int64_t copy_row;
  const T* residual;
  int64_t residual_row;
  int last;  // lanes of the copy's last vector, where parts may be stored: the channels end there
  const float *scale, *shift, *slope;  // one per row, or one per column of b
  Act act;
  Clamp clamp;  // that of act
};

// A vector of the copy, of which ``lanes`` are there: all, unless the vectors lie along channels.
template <bool kRowsAreChannels, typename T>
GHOSTFUSED_INLINE Vec load_copy(const T* p, int lanes) {
  return kMasks && !kRowsAreChannels ? load_part(p, lanes) : load_float(p);
}
template <bool kRowsAreChannels, typename T>
GHOSTFUSED_INLINE void store_copy(T* p, Vec v, int lanes) {
  if constexpr (kMasks && !kRowsAreChannels) {
    store_part(p, v, lanes);
  } else {
    store_float(p, v);
  }
}

// The activations that are no clamp, in place. Out of line, since a call would make the kernels save every accumulator.
template <typename T, bool kRowsAreChannels>
__attribute__((noinline)) void activate_panel(const Panel<T>& p, int rows, int vecs) {
  Vec all[kMaxSums];
  const auto each = [&](auto do_it) {
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < vecs; ++j) do_it(all[i * vecs + j], i, j);
    }
  };
  each([&](Vec& y, int i, int j) { y = load(p.y + i * p.y_row + j * kLanes); });
  if (has_slope(p.act)) {
    each([&](Vec& y, int i, int j) {
      y = sloped(y, kRowsAreChannels ? splat(p.slope[i]) : load(p.slope + j * kLanes));
    });
  } else {
    activate(all, rows * vecs, p.act);
  }
  each([&](Vec& y, int i, int j) { store(p.y + i * p.y_row + j * kLanes, y); });
  if (!p.copy) return;
  each([&](Vec& y, int i, int j) {
    const int at = j * kLanes, lanes = j == vecs - 1 ? p.last : kLanes;
    if (p.residual) y += load_copy<kRowsAreChannels>(p.residual + i * p.residual_row + at, lanes);
    store_copy<kRowsAreChannels>(p.copy + i * p.copy_row + at, y, lanes);
  });
}

template <typename T, int kRows, int kVecs, bool kRowsAreChannels, bool kHalfB>
void primary(const Panel<T>& p) {
  constexpr int kChannels = Operand<T, !kRowsAreChannels>::kChannels;
  int64_t a_row[kRows];
#pragma GCC unroll 8
  for (int i = 0; kKeepDistances && i < kRows; ++i) {
    a_row[i] = i * p.a_row;
    asm("" : "+r"(a_row[i]));
  }
  Vec sum[kRows][kVecs];
  const int64_t part = kLanesAtOnce<T> > 1 ? p.of_tap : part_of<kChannels>(p.depth);
  using B = std::conditional_t<kHalfB, BFloat16, float>;
  const int64_t b_row = kRowsAreChannels ? p.b_row : kLanes, b_vec = kRowsAreChannels ? kLanes : p.depth * kLanes;
  const float *a = p.a + p.begin, *ahead = p.ahead + p.begin * p.ahead_row;
  const B *const first = reinterpret_cast<const B*>(p.b), *b = first + p.begin * b_row;
  const int64_t* taps = p.taps;
  int64_t of_tap = p.of_tap - p.begin;
  for (int64_t left = p.depth - p.begin;; left -= part) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) sum[i][j] = Vec{};
    }
    for (int64_t steps, last = min_of(left, part); last > 0; last -= steps) {
      if (of_tap == 0) b = first + *++taps, of_tap = p.of_tap;
      steps = min_of(last, of_tap);
      of_tap -= steps;
      if constexpr (kLanesAtOnce<T> > 1) {
        multiply_quads<!kRowsAreChannels>(a, a_row, b, 2 * b_row, b_vec, steps, ahead, p.ahead_row, sum);
        a += steps;
      } else {
        int64_t k = steps;
#ifdef GHOSTFUSED_NEON
        multiply_fours<T, !kRowsAreChannels>(a, a_row, b, b_row, b_vec, k / kFactors, ahead, p.ahead_row, sum);
        k %= kFactors;
#endif
        for (; k > 0; --k, ++a, b += b_row) {
          Vec row[kVecs];
#pragma GCC unroll 8
          for (int j = 0; j < kVecs; ++j) row[j] = load_float(b + j * b_vec);
          if (kRowsAreChannels) {
            __builtin_prefetch(ahead);
            __builtin_prefetch(ahead + kLine);
            ahead += p.ahead_row;
          }
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i) {
            const Vec factor = load_factor<T, !kRowsAreChannels>(a + (kKeepDistances ? a_row[i] : i * p.a_row));
#pragma GCC unroll 8
            for (int j = 0; j < kVecs; ++j) sum[i][j] = multiply_add<T, !kRowsAreChannels>(factor, row[j], sum[i][j]);
          }
        }
      }
    }
    if (left <= part) break;
    // what the parts add up to waits where y will be: there is no register for it
    float* total = p.y;
    if (left == p.depth) {
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i, total = next_row(total, p.y_row)) {
#pragma GCC unroll 8
        for (int j = 0; j < kVecs; ++j) store(total + j * kLanes, sum[i][j]);
      }
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i, total = next_row(total, p.y_row)) {
#pragma GCC unroll 8
        for (int j = 0; j < kVecs; ++j) store(total + j * kLanes, load(total + j * kLanes) + sum[i][j]);
      }
    }
    if (p.depth - left + part == p.end) return;
  }
  if (p.depth > part) {
    const float* total = p.y;
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i, total = next_row(total, p.y_row)) {
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) sum[i][j] += load(total + j * kLanes);
    }
  }
  const Clamp bounds = p.clamp;
  float* y = p.y;
  T* copy = p.copy;
  const float *scales = p.scale, *shifts = p.shift;
  const T* residual = p.residual;
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i, y = next_row(y, p.y_row)) {
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) {
      const Vec scale = kRowsAreChannels ? splat(scales[i]) : load(scales + j * kLanes);
      const Vec shift = kRowsAreChannels ? splat(shifts[i]) : load(shifts + j * kLanes);
      sum[i][j] = clamp(sum[i][j] * scale + shift, bounds);
      store(y + j * kLanes, sum[i][j]);
    }
  }
  if (copy) {
    if (residual) {
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i, residual = next_row(residual, p.residual_row)) {
#pragma GCC unroll 8
        for (int j = 0; j < kVecs; ++j) {
          sum[i][j] += load_copy<kRowsAreChannels>(residual + j * kLanes, j == kVecs - 1 ? p.last : kLanes);
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i, copy = next_row(copy, p.copy_row)) {
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) {
        store_copy<kRowsAreChannels>(copy + j * kLanes, sum[i][j], j == kVecs - 1 ? p.last : kLanes);
        if (kRowsAreChannels && j != 1) __builtin_prefetch(copy + j * kLanes + kPrefetchOut, 1);
      }
    }
  }
  if (!is_clamp(p.act)) activate_panel<T, kRowsAreChannels>(p, kRows, kVecs);
}

template <typename T>
using Primary = void (*)(const Panel<T>&);

template <typename T, bool kRowsAreChannels, bool kHalfB, int... kIndex>
Primary<T> primary_kernel(int rows, int vecs, std::integer_sequence<int, kIndex...>) {
  static constexpr Primary<T> kernels[] = {
      primary<T, kIndex / kMaxVecs<T> + 1, kIndex % kMaxVecs<T> + 1, kRowsAreChannels, kHalfB>...};
  return kernels[(rows - 1) * kMaxVecs<T> + vecs - 1];
}
template <typename T, bool kRowsAreChannels, bool kHalfB>
Primary<T> primary_kernel(int rows, int vecs) {
  return primary_kernel<T, kRowsAreChannels, kHalfB>(rows, vecs,
                                                     std::make_integer_sequence<int, kMaxRows<T> * kMaxVecs<T>>{});
}

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
