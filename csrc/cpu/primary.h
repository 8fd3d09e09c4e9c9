// The two inner kernels. Both serve NCHW and channels_last: what a vector lies along is the caller's choice.
#pragma once

#include "cpu/operand.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

// Accumulators fill three quarters of the vector registers.
#ifdef GHOSTFUSED_MANY_REGISTERS  // 32 of them
constexpr int kMaxRows = 8;
#else
constexpr int kMaxRows = 4;
#endif
constexpr int kMaxVecs = 3;

// Distances in floats, measured on a Zen 4: where the tensors exceed the caches they halve the time of wide maps, and
// where they don't they cost 1 to 2 %.
constexpr int kLine = 16, kPrefetchX = 120, kPrefetchOut = 72;

// p + step, opaquely: the compiler would compute the addresses of all rows ahead, and run out of registers.
template <typename P>
GHOSTFUSED_INLINE P next_row(P p, int64_t step) {
  p += step;
  asm("" : "+r"(p));
  return p;
}

// y = act(scale * (a b) + shift): a (rows, depth) read by broadcasts, b (depth, vecs * kLanes), row-major all. a and b
// are made of the lanes of operand.h, which ``float`` stands for.
// NCHW: rows are channels, vectors lie along pixels. channels_last: rows are pixels, vectors lie along channels.
struct Panel {
  const float* a;
  int64_t a_row;
  const float* b;
  int64_t b_row;
  const float* ahead;  // what will be read next: two lines from here on are fetched with every row of b
  int64_t ahead_row;
  int64_t depth;
  float* y;
  int64_t y_row;
  float* copy;  // where y goes too, with the residual added if there is one; or null
  int64_t copy_row;
  const float* residual;
  int64_t residual_row;
  const float *scale, *shift, *slope;  // one per row, or one per column of b
  Act act;
  Clamp clamp;  // that of act
};

// The other activations, in place. Out of line, since a call would make the kernels save every accumulator.
template <bool kRowsAreChannels>
__attribute__((noinline)) void activate_panel(const Panel& p, int rows, int vecs) {
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < vecs; ++j) {
      const int at = j * kLanes;
      const Vec slope = kRowsAreChannels ? splat(p.slope[i]) : load(p.slope + at);
      const Vec y = activate(load(p.y + i * p.y_row + at), slope, p.act);
      store(p.y + i * p.y_row + at, y);
      if (p.copy) {
        store(p.copy + i * p.copy_row + at, p.residual ? y + load(p.residual + i * p.residual_row + at) : y);
      }
    }
  }
}

template <int kRows, int kVecs, bool kRowsAreChannels, int kChannels>
void multiply(const Panel& p) {
  Vec sum[kRows][kVecs];
  const int64_t part = part_of<kChannels>(p.depth);
  const float *a = p.a, *b = p.b, *ahead = p.ahead;
  for (int64_t left = p.depth;; left -= part) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) sum[i][j] = Vec{};
    }
    for (int64_t k = min_of(left, part); k > 0; --k, ++a, b += p.b_row) {
      Vec row[kVecs];
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) row[j] = load(b + j * kLanes);
      if (kRowsAreChannels) {
        __builtin_prefetch(ahead);
        __builtin_prefetch(ahead + kLine);
        ahead += p.ahead_row;
      }
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const Vec factor = splat_operand<kChannels>(a + i * p.a_row);
#pragma GCC unroll 8
        for (int j = 0; j < kVecs; ++j) sum[i][j] = multiply_add<kChannels>(factor, row[j], sum[i][j]);
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
  float *y = p.y, *copy = p.copy;
  const float *scales = p.scale, *shifts = p.shift, *residual = p.residual;
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
        for (int j = 0; j < kVecs; ++j) sum[i][j] += load(residual + j * kLanes);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i, copy = next_row(copy, p.copy_row)) {
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) {
        store(copy + j * kLanes, sum[i][j]);
        if (kRowsAreChannels && j != 1) __builtin_prefetch(copy + j * kLanes + kPrefetchOut, 1);
      }
    }
  }
  if (!is_clamp(p.act)) activate_panel<kRowsAreChannels>(p, kRows, kVecs);
}

using Multiply = void (*)(const Panel&);

template <bool kRowsAreChannels, int kChannels, int... kIndex>
Multiply multiply_kernel(int rows, int vecs, std::integer_sequence<int, kIndex...>) {
  static constexpr Multiply kernels[] = {
      multiply<kIndex / kMaxVecs + 1, kIndex % kMaxVecs + 1, kRowsAreChannels, kChannels>...};
  return kernels[(rows - 1) * kMaxVecs + vecs - 1];
}
template <bool kRowsAreChannels, int kChannels>
Multiply multiply_kernel(int rows, int vecs) {
  return multiply_kernel<kRowsAreChannels, kChannels>(rows, vecs,
                                                      std::make_integer_sequence<int, kMaxRows * kMaxVecs>{});
}

// A depthwise convolution of one vector's channels or pixels, walking along one side of the image: down the rows in
// NCHW (where a vector lies along a row), along a row in channels_last. ``cross`` leads to the taps at right angles.
struct Walk {
  const float* x1;  // at the first tap of the first output
  int64_t walk, cross;
  const float* weight;  // (size along the walk, size across): vectors ``weight_step`` apart, or numbers for all lanes
  int64_t weight_step;
  const float* mask;  // per tap across: lanes inside the image. All are at the middle tap
  float* out;
  int64_t out_walk;
  const float* residual;  // added to what goes out, or null
  int64_t residual_walk;
  int steps;
  Vec scale, shift, slope;
  Act act;
  Clamp clamp;  // that of act
};

// kOutputs steps at once, so that each loaded vector serves all the taps that it lies under.
template <int kSize, int kOutputs, bool kMasked, bool kSplat>
GHOSTFUSED_INLINE void depthwise_step(const Walk& p, const float* x1, float* out, const float* residual) {
  constexpr bool kInParts = kSize > 3;  // for the same reason
  Vec sum[kOutputs] = {};
#pragma GCC unroll 16
  for (int i = 0; i < kOutputs + kSize - 1; ++i) {
    Vec part[kOutputs] = {};
#pragma GCC unroll 16
    for (int j = 0; j < kSize; ++j) {
      Vec x = load(x1 + i * p.walk + j * p.cross);
      if (kMasked && j != kSize / 2)
        x = reinterpret_cast<Vec>(reinterpret_cast<Ints>(x) & load<Ints>(p.mask + j * kLanes));
#pragma GCC unroll 16
      for (int o = 0; o < kOutputs; ++o) {
        const int tap = i - o;
        if (tap < 0 || tap >= kSize) continue;
        Vec& to = kInParts ? part[o] : sum[o];
        to += x * (kSplat ? splat(p.weight[tap * kSize + j]) : load(p.weight + (tap * kSize + j) * p.weight_step));
      }
    }
#pragma GCC unroll 16
    for (int o = 0; kInParts && o < kOutputs; ++o) sum[o] += part[o];
  }
  for (int o = 0; o < kOutputs; ++o) __builtin_prefetch(out + o * p.out_walk + kLine, 1);
  for (int o = 0; o < kOutputs; ++o) {
    sum[o] = clamp(sum[o] * p.scale + p.shift, p.clamp);
    if (__builtin_expect(!is_clamp(p.act), 0)) sum[o] = activate(sum[o], p.slope, p.act);
    if (residual) sum[o] += load(residual + o * p.residual_walk);
    store(out + o * p.out_walk, sum[o]);
  }
}

template <int kSize, bool kMasked, bool kSplat>
void depthwise(const Walk& p) {
  const float *x1 = p.x1, *residual = p.residual;
  float* out = p.out;
  int left = p.steps;
  for (; left >= 4; left -= 4, x1 += 4 * p.walk, out += 4 * p.out_walk) {
    depthwise_step<kSize, 4, kMasked, kSplat>(p, x1, out, residual);
    if (residual) residual += 4 * p.residual_walk;
  }
  if (left == 3) return depthwise_step<kSize, 3, kMasked, kSplat>(p, x1, out, residual);
  if (left == 2) return depthwise_step<kSize, 2, kMasked, kSplat>(p, x1, out, residual);
  if (left == 1) return depthwise_step<kSize, 1, kMasked, kSplat>(p, x1, out, residual);
}

using Depthwise = void (*)(const Walk&);

template <bool kMasked, bool kSplat>
Depthwise depthwise_kernel(int size) {
  switch (size) {
    case 1:
      return depthwise<1, kMasked, kSplat>;
    case 3:
      return depthwise<3, kMasked, kSplat>;
    case 5:
      return depthwise<5, kMasked, kSplat>;
    default:
      return depthwise<7, kMasked, kSplat>;
  }
}

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
