// What the 1×1 convolution multiplies: numbers as fp32, or bf16 and fp16 in pairs where the CPU adds up their products
// in fp32.
#pragma once

#include "cpu/vec.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

// One 32-bit lane of x or of the weights, of type T, as the multiplication reads it: kChannels channels that follow
// each other, each a Number.
template <typename T, bool kChannelsLast>
struct Operand {
  using Number = float;
  static constexpr int kChannels = 1;
};

#ifdef GHOSTFUSED_AMX  // its matrices are channels_last's; by vectors, products of fp32 are made faster
template <>
struct Operand<BFloat16, true> {
  using Number = BFloat16;
  static constexpr int kChannels = 2;
};
#elif defined(GHOSTFUSED_X86_BF16) || defined(GHOSTFUSED_NEON_BF16)
template <bool kChannelsLast>
struct Operand<BFloat16, kChannelsLast> {
  using Number = BFloat16;
  static constexpr int kChannels = 2;
};
#endif
#ifdef GHOSTFUSED_NEON_FP16  // only where rows are weights: those of x in NCHW don't begin where row_of_pairs has them
                             // begin
template <>
struct Operand<Float16, true> {
  using Number = Float16;
  static constexpr int kChannels = 2;
};
#endif

inline int channels_per_lane(Path path, bool channels_last) {
  if (path == Path::kBFloat16) {
    return channels_last ? Operand<BFloat16, true>::kChannels : Operand<BFloat16, false>::kChannels;
  }
  return path == Path::kFloat16 && channels_last ? Operand<Float16, true>::kChannels : 1;
}

// A factor, as multiply_add takes it. bfdot takes a pair from any register's first lane, where the load leaves it;
// fmlal from that of the first sixteen registers, which are too few.
template <typename T, bool kChannelsLast>
GHOSTFUSED_INLINE Vec load_factor(const float* p) {
  if constexpr (Operand<T, kChannelsLast>::kChannels == 1) {
#ifdef GHOSTFUSED_SVE
    asm("" : "+r"(p));  // what loads into all lanes takes no sum of two registers
#endif
    return splat(*p);
  } else {
#ifdef GHOSTFUSED_NEON_BF16
    if constexpr (std::is_same_v<T, BFloat16>) {
#ifdef __clang__
      return Vec{*p};
#else  // GCC would zero the other lanes by an instruction
      Vec pair;
      asm("" : "=w"(pair) : "0"(*p));
      return pair;
#endif
    }
#endif
    return reinterpret_cast<Vec>(Ints{} + load<int32_t>(p));
  }
}

// ``a`` is a load_factor, ``b`` a vector of a row.
template <typename T, bool kChannelsLast>
GHOSTFUSED_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) {
  if constexpr (Operand<T, kChannelsLast>::kChannels == 1) {
    return sum + a * b;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
#if defined(GHOSTFUSED_X86_BF16) && GHOSTFUSED_LANES == 8
    return (Vec)_mm256_dpbf16_ps((__m256)sum, (__m256bh)a, (__m256bh)b);
#elif defined(GHOSTFUSED_X86_BF16)
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#elif defined(GHOSTFUSED_NEON_BF16)
    return (Vec)vbfdotq_laneq_f32((float32x4_t)sum, (bfloat16x8_t)b, (bfloat16x8_t)a, 0);
#endif
  } else {
#ifdef GHOSTFUSED_NEON_FP16
    const float16x4_t pair = vget_low_f16((float16x8_t)a);
    const float32x4_t even = vfmlalq_lane_low_f16((float32x4_t)sum, (float16x8_t)b, pair, 0);
    return (Vec)vfmlalq_lane_high_f16(even, (float16x8_t)b, pair, 1);
#endif
  }
}

// How many products of lanes are summed in one go. Longer sums of fp32 products are made of such parts, which halves
// their rounding error and more; it takes parts this short to stay within twice PyTorch's error on small random modules
// (1 in 1000 misses it). Where bf16 is multiplied, the rounding of the result exceeds all that by far.
template <int kChannels>
GHOSTFUSED_INLINE int64_t part_of(int64_t depth) {
  if (kChannels > 1) return depth;
  return depth <= 64 ? 16 : depth <= 256 ? 32 : 64;
}

// The lanes of two channels, each as fp32 that bf16 holds exactly.
GHOSTFUSED_INLINE Vec pair_of(Vec even, Vec odd) {
  const Ints low = (reinterpret_cast<Ints>(even) >> 16) & 0xffff;
  return reinterpret_cast<Vec>(low | (reinterpret_cast<Ints>(odd) & ~0xffff));
}

// A row of channels_last, a vector of weights, as multiply_add takes it: pairs lie next to each other, but where NEON
// multiplies fp16, which takes a half of a vector at a time, those of the even channels come first.
template <typename T>
GHOSTFUSED_INLINE Vec row_of_pairs(Vec pairs) {
#ifdef GHOSTFUSED_NEON_FP16
  if constexpr (std::is_same_v<T, Float16>) {
    const uint16x4x2_t parts = vuzp_u16(vget_low_u16((uint16x8_t)pairs), vget_high_u16((uint16x8_t)pairs));
    return (Vec)vcombine_u16(parts.val[0], parts.val[1]);
  }
#endif
  return pairs;
}

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
