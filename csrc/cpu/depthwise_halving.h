// The depthwise op at stride 2 in NCHW, where the CPU loads parts of vectors: rows are read where they lie, and even
// and odd columns come apart in registers.
#pragma once

#include "cpu/depthwise_plan.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

#ifdef GHOSTFUSED_X86_MASKS

#if GHOSTFUSED_LANES == 8
GHOSTFUSED_INLINE Ints load_pairs(const void* p, uint32_t mask) { return (Ints)_mm256_maskz_loadu_epi16(mask, p); }
GHOSTFUSED_INLINE Halves low_halves(Ints pairs) { return (Halves)_mm256_cvtepi32_epi16((__m256i)pairs); }
#else
GHOSTFUSED_INLINE Ints load_pairs(const void* p, uint32_t mask) { return (Ints)_mm512_maskz_loadu_epi16(mask, p); }
GHOSTFUSED_INLINE Halves low_halves(Ints pairs) { return (Halves)_mm512_cvtepi32_epi16((__m512i)pairs); }
#endif

// Numbers 0, 2, … and 1, 3, … of those from p on whose bit is in ``mask``; zeros for the others.
GHOSTFUSED_INLINE void load_split(const float* p, uint32_t mask, Vec& even, Vec& odd) {
  const uint32_t low = mask & ((1u << kLanes) - 1);
  deinterleave(load_masked(p, low), load_masked(p + kLanes, mask >> kLanes), even, odd);
}
GHOSTFUSED_INLINE void load_split(const BFloat16* p, uint32_t mask, Vec& even, Vec& odd) {
  const Ints pairs = load_pairs(p, mask);
  even = reinterpret_cast<Vec>(pairs << 16);
  odd = reinterpret_cast<Vec>(pairs & ~0xffff);
}
GHOSTFUSED_INLINE void load_split(const Float16* p, uint32_t mask, Vec& even, Vec& odd) {
  const Ints pairs = load_pairs(p, mask);
  even = widen(low_halves(pairs), Float16{});
  odd = widen(low_halves(pairs >> 16), Float16{});
}

// A unit is one tile of a plane.
template <typename T, int kSize>
class HalvingWorker {
  // the pairs of columns that the taps of an output lie in: the first begins kFirst pairs from the output's own
  static constexpr int kPad = kSize / 2, kFirst = -((kPad + 1) / 2), kPairs = (kSize - 1 - kPad) / 2 - kFirst + 1;
  static constexpr int kTaps = kSize * kSize;
  static constexpr bool kHeld = kSize <= 3;  // the taps fit the registers

 public:
  static bool takes(const DepthwiseParams& p) {
    return p.stride == 2 && p.kernel_h == kSize && p.kernel_w == kSize && p.x.stride_w == 1;
  }

  HalvingWorker(const DepthwiseParams& p, const DepthwisePlan& plan) : p(p), plan(plan) {
    const int64_t vecs = div_up(p.out_width, kLanes), margin = 2 * kLanes;
    const int64_t row = (2 * vecs * kLanes + 2 * margin) * sizeof(T) / sizeof(float);
    float* scratch = thread_scratch((plan.prepared ? 0 : plan.size) + vecs * kPairs + row);
    masks = reinterpret_cast<uint32_t*>(scratch + (plan.prepared ? 0 : plan.size));
    own = plan.prepared ? nullptr : scratch;
    parameters = plan.prepared ? plan.prepared : scratch;
    T* zero_row = reinterpret_cast<T*>(masks + vecs * kPairs);
    __builtin_memset(zero_row, 0, row * sizeof(float));
    zeros = zero_row + margin;
    for (int64_t v = 0; v < vecs; ++v) {
      for (int i = 0; i < kPairs; ++i) {  // the columns inside the image
        const int64_t column = 2 * (first_of(v * kLanes) + kFirst + i), most = 2 * kLanes;
        const uint64_t before = min_of(max_of<int64_t>(-column, 0), most);
        const uint64_t until = min_of(max_of<int64_t>(p.width - column, 0), most);
        masks[v * kPairs + i] = static_cast<uint32_t>((uint64_t{1} << until) - (uint64_t{1} << min_of(before, until)));
      }
    }
  }

  // The parameters of units begin … end - 1.
  void prepare(int64_t begin, int64_t end) {
    if (own) prepare_planes<T>(p, plan, begin, end, own);
  }

  void run(int64_t unit) const {
    const DepthwisePlan::Unit at(plan, unit);
    const int64_t n = at.n, c = at.column;
    const T* x = static_cast<const T*>(p.x.data) + n * p.x.stride_n + c * p.x.stride_c;
    T* out = static_cast<T*>(p.out.data) + n * p.out.stride_n + c * p.out.stride_c;
    const NormAffine norm_affine(parameters + c, plan.step, p.norm.act, NormAffine::kNumbers);
    const float* taps = parameters + plan.taps + c * kTaps;
    const T* end = out + at.h1 * p.out_width;
    int64_t h = at.h0;
    for (; h + 4 <= at.h1; h += 4) strip<4>(x, out, end, taps, h, norm_affine);
    const int64_t left = at.h1 - h;
    if (left == 3) strip<3>(x, out, end, taps, h, norm_affine);
    if (left == 2) strip<2>(x, out, end, taps, h, norm_affine);
    if (left == 1) strip<1>(x, out, end, taps, h, norm_affine);
  }

 private:
  int64_t first_of(int64_t w) const { return max_of<int64_t>(min_of<int64_t>(w, p.out_width - kLanes), 0); }

  // Output rows h … h + kRows - 1, of a tile that ends at ``end``.
  template <int kRows>
  void strip(const T* x, T* out, const T* end, const float* taps, int64_t h, const NormAffine& norm_affine) const {
    constexpr int kIn = 2 * (kRows - 1) + kSize;
    const T* rows[kIn];
    for (int i = 0; i < kIn; ++i) {
      const int64_t row = 2 * h - kPad + i;
      rows[i] = row < 0 || row >= p.height ? zeros : x + row * p.x.stride_h;
    }
    Vec held[kHeld ? kTaps : 1];
#pragma GCC unroll 16
    for (int i = 0; kHeld && i < kTaps; ++i) held[i] = splat(taps[i]);
    const uint32_t* mask = masks;
    for (int64_t w = 0; w < p.out_width; w += kLanes, mask += kPairs) {
      const int64_t first = first_of(w), left = 2 * (first + kFirst);
      Vec sum[kRows];
#pragma GCC unroll 16
      for (int i = 0; i < kIn; ++i) {
        const T* from = rows[i] + left;
        Vec column[2 * kPairs];
#pragma GCC unroll 4
        for (int j = 0; j < kPairs; ++j) {
          load_split(from + 2 * j, mask[j], column[2 * j], column[2 * j + 1]);
        }
#pragma GCC unroll 4
        for (int o = 0; o < kRows; ++o) {
          const int k = i - 2 * o;
          if (k < 0 || k >= kSize) continue;
          Vec part;  // of a row, so that chains of large kernels stay short
#pragma GCC unroll 8
          for (int j = 0; j < kSize; ++j) {
            const int tap = k * kSize + j;
            const Vec product = column[j - kPad - 2 * kFirst] * (kHeld ? held[kHeld ? tap : 0] : splat(taps[tap]));
            part = j == 0 ? rounded(product) : part + product;
          }
          sum[o] = k == 0 ? part : sum[o] + part;
        }
      }
      // what a vector has too much, the next row overwrites, but for the last ones
      T* to = out + h * p.out_width + first;
#pragma GCC unroll 4
      for (int o = 0; o < kRows; ++o, to += p.out_width) {
        const Vec y = norm_affine(sum[o]);
        if (__builtin_expect(to + kLanes <= end, 1)) {
          store_float(to, y);
        } else {
          store_part(to, y, static_cast<int>(min_of<int64_t>(kLanes, p.out_width - first)));
        }
      }
    }
  }

  const DepthwiseParams& p;
  const DepthwisePlan& plan;
  float* own;               // where the parameters are made, or null
  const float* parameters;  // all channels'
  uint32_t* masks;          // per vector of a row and pair of columns
  const T* zeros;           // a row of them, and a margin before it
};

#endif  // GHOSTFUSED_X86_MASKS

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
