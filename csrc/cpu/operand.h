// What the 1×1 convolution multiplies: numbers as fp32, or bf16 in pairs where the CPU multiplies those.
#pragma once

#include "cpu/vec.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

// One 32-bit lane of x or of the weights, of type T, as the multiplication reads it: kChannels channels that follow
// each other, each a Number.
template <typename T>
struct Operand {
  using Number = float;
  static constexpr int kChannels = 1;
};

#ifdef GHOSTFUSED_X86_BF16
template <>
struct Operand<BFloat16> {
  using Number = BFloat16;
  static constexpr int kChannels = 2;
};
#endif

inline int channels_per_lane(Path path) {
  return path == Path::kBFloat16 ? Operand<BFloat16>::kChannels : Operand<float>::kChannels;
}

template <int kChannels>
GHOSTFUSED_INLINE Vec splat_operand(const float* p) {
  if constexpr (kChannels == 1) {
    return splat(*p);
  } else {
    return reinterpret_cast<Vec>(Ints{} + load<int32_t>(p));
  }
}

template <int kChannels>
GHOSTFUSED_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) {
  if constexpr (kChannels == 1) {
    return sum + a * b;
  } else {
#if defined(GHOSTFUSED_X86_BF16) && GHOSTFUSED_LANES == 8
    return (Vec)_mm256_dpbf16_ps((__m256)sum, (__m256bh)a, (__m256bh)b);
#elif defined(GHOSTFUSED_X86_BF16)
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
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

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
