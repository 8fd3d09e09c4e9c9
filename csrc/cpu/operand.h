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
#ifdef GHOSTFUSED_NEON_FP16  // only where rows are weights: those of x in NCHW don't begin where to_operand_rows has
                             // them begin
template <>
struct Operand<Float16, true> {
  using Number = Float16;
  static constexpr int kChannels = 2;
};
#endif

// How many lanes an instruction sums. An operand has a multiple of them, with zeros behind the last channel.
#ifdef GHOSTFUSED_NEON_BF16
template <typename T>
constexpr int kLanesAtOnce = std::is_same_v<T, BFloat16> ? 2 : 1;  // bfmmla sums four channels
inline int lanes_at_once(Path path) { return path == Path::kBFloat16 ? 2 : 1; }
#else
template <typename T>
constexpr int kLanesAtOnce = 1;
inline int lanes_at_once(Path) { return 1; }
#endif
inline int64_t lanes_of(int64_t channels, int64_t per_lane, int64_t at_once) {
  return div_up(channels, per_lane * at_once) * at_once;
}

inline int channels_per_lane(Path path, bool channels_last) {
  if (path == Path::kBFloat16) {
    return channels_last ? Operand<BFloat16, true>::kChannels : Operand<BFloat16, false>::kChannels;
  }
  return path == Path::kFloat16 && channels_last ? Operand<Float16, true>::kChannels : 1;
}

// A factor, as multiply_add takes it.
template <typename T, bool kChannelsLast>
GHOSTFUSED_INLINE Vec load_factor(const float* p) {
  if constexpr (Operand<T, kChannelsLast>::kChannels == 1) {
#ifdef GHOSTFUSED_SVE
    asm("" : "+r"(p));  // what loads into all lanes takes no sum of two registers
#endif
    return splat(*p);
  } else {
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

// Rows of b, each a vector of pairs of channels, as they are multiplied. Where NEON multiplies fp16, which takes a half
// of a vector at a time, the even channels of a row come first. Where bfmmla sums two pairs, two rows are zipped.
template <typename T, int kRows>
GHOSTFUSED_INLINE void to_operand_rows(Vec (&rows)[kRows]) {
#ifdef GHOSTFUSED_NEON_FP16
  if constexpr (std::is_same_v<T, Float16>) {
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const uint16x4x2_t parts = vuzp_u16(vget_low_u16((uint16x8_t)rows[i]), vget_high_u16((uint16x8_t)rows[i]));
      rows[i] = (Vec)vcombine_u16(parts.val[0], parts.val[1]);
    }
  }
#endif
#ifdef GHOSTFUSED_NEON_BF16
  if constexpr (kLanesAtOnce<T> > 1) {
#pragma GCC unroll 4
    for (int i = 0; i < kRows; i += 2) {
      const auto first = (float32x4_t)rows[i], second = (float32x4_t)rows[i + 1];
      rows[i] = (Vec)vzip1q_f32(first, second), rows[i + 1] = (Vec)vzip2q_f32(first, second);
    }
  }
#endif
}

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
