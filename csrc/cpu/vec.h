// One SIMD vector of floats, by the compiler's vector extensions: the same source serves every instruction set. The
// including .cpp file sets GHOSTFUSED_ISA (a namespace), GHOSTFUSED_LANES and what else the target has (GCC's own
// macros don't follow its target pragma), and has included the standard headers before it switched the target: nothing
// of theirs may be compiled for a CPU that isn't there.
#pragma once

namespace ghostfused::cpu::GHOSTFUSED_ISA {

constexpr int kLanes = GHOSTFUSED_LANES;

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

#define GHOSTFUSED_INLINE inline __attribute__((always_inline))

template <typename T>
GHOSTFUSED_INLINE T min_of(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
GHOSTFUSED_INLINE T max_of(T a, T b) {
  return a < b ? b : a;
}
GHOSTFUSED_INLINE int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// p + step, opaquely: the compiler would compute the addresses of all rows ahead, and run out of registers.
template <typename P>
GHOSTFUSED_INLINE P next_row(P p, int64_t step) {
  p += step;
  asm("" : "+r"(p));
  return p;
}

template <typename V = Vec, typename T>
GHOSTFUSED_INLINE V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <typename V, typename T>
GHOSTFUSED_INLINE void store(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}
GHOSTFUSED_INLINE Vec splat(float x) { return x - Vec{}; }

// A product, rounded. Of the sum of two products the compiler rounds either, and not always the same one: a result
// would depend on how many rows were made together.
GHOSTFUSED_INLINE Vec rounded(Vec product) {
#if defined(GHOSTFUSED_SVE) || defined(GHOSTFUSED_NEON)
  asm("" : "+w"(product));
#elif defined(GHOSTFUSED_X86_MASKS)
  asm("" : "+v"(product));
#elif defined(GHOSTFUSED_X86_HALVES)
  asm("" : "+x"(product));
#endif
  return product;
}

// a b + c, rounded once where x86 can. The compiler makes most such sums so by itself, but not those whose product it
// moves out of a branch, and not the same ones for every type.
GHOSTFUSED_INLINE Vec fused(Vec a, Vec b, Vec c) {
#if defined(GHOSTFUSED_X86_HALVES) && GHOSTFUSED_LANES == 8
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(GHOSTFUSED_X86_HALVES)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return a * b + c;
#endif
}

// fp16 and bf16 numbers, which no baseline has arithmetic for.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// As one instruction, where GCC 12 makes five of __builtin_convertvector.
#if defined(GHOSTFUSED_X86_HALVES) && GHOSTFUSED_LANES == 8
GHOSTFUSED_INLINE Ints widen(Halves h) { return (Ints)_mm256_cvtepu16_epi32((__m128i)h); }
#elif defined(GHOSTFUSED_X86_HALVES)
GHOSTFUSED_INLINE Ints widen(Halves h) { return (Ints)_mm512_cvtepu16_epi32((__m256i)h); }
#else
GHOSTFUSED_INLINE Ints widen(Halves h) { return __builtin_convertvector(h, Ints); }
#endif

GHOSTFUSED_INLINE Vec widen(Halves h, BFloat16) { return reinterpret_cast<Vec>(widen(h) << 16); }

#if defined(GHOSTFUSED_X86_BF16) && GHOSTFUSED_LANES == 8
GHOSTFUSED_INLINE Halves narrow(Vec v, BFloat16) { return (Halves)_mm256_cvtneps_pbh((__m256)v); }
#elif defined(GHOSTFUSED_X86_BF16)
GHOSTFUSED_INLINE Halves narrow(Vec v, BFloat16) { return (Halves)_mm512_cvtneps_pbh((__m512)v); }
#elif defined(GHOSTFUSED_NEON_BF16)
GHOSTFUSED_INLINE Halves narrow(Vec v, BFloat16) { return (Halves)vcvt_bf16_f32((float32x4_t)v); }
#else
GHOSTFUSED_INLINE Halves narrow(Vec v, BFloat16) {
  const Ints bits = reinterpret_cast<Ints>(v);
  const Ints nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Ints nan = (bits >> 16) | 0x40;
  return __builtin_convertvector(v == v ? nearest_even : nan, Halves);
}
#endif

#if defined(GHOSTFUSED_X86_HALVES) && GHOSTFUSED_LANES == 8
GHOSTFUSED_INLINE Vec widen(Halves h, Float16) { return (Vec)_mm256_cvtph_ps((__m128i)h); }
GHOSTFUSED_INLINE Halves narrow(Vec v, Float16) {
  return (Halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(GHOSTFUSED_X86_HALVES)
GHOSTFUSED_INLINE Vec widen(Halves h, Float16) { return (Vec)_mm512_cvtph_ps((__m256i)h); }
GHOSTFUSED_INLINE Halves narrow(Vec v, Float16) {
  return (Halves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(GHOSTFUSED_NEON)
GHOSTFUSED_INLINE Vec widen(Halves h, Float16) { return (Vec)vcvt_f32_f16((float16x4_t)h); }
GHOSTFUSED_INLINE Halves narrow(Vec v, Float16) { return (Halves)vcvt_f16_f32((float32x4_t)v); }
#elif defined(GHOSTFUSED_SVE)  // whose conversions take and leave fp16 in the low half of a lane
GHOSTFUSED_INLINE Vec widen(Halves h, Float16) {
  return svcvt_f32_f16_x(svptrue_b32(), svreinterpret_f16_s32(widen(h)));
}
GHOSTFUSED_INLINE Halves narrow(Vec v, Float16) {
  const Ints halves = svreinterpret_s32_f16(svcvt_f16_f32_x(svptrue_b32(), v));
  return __builtin_convertvector(halves, Halves);
}
#else
GHOSTFUSED_INLINE Vec widen(Halves h, Float16) {
  const Ints bits = __builtin_convertvector(h, Ints);
  const Ints magnitude = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
  // 2^112 moves the exponent from fp16's bias to fp32's, subnormals included; infinity and NaN lie above
  const Vec finite = reinterpret_cast<Vec>(magnitude) * 0x1p112f;
  const Ints special = magnitude | 0x7f800000;
  const Ints value = magnitude >= (0x7c00 << 13) ? special : reinterpret_cast<Ints>(finite);
  return reinterpret_cast<Vec>(value | sign);
}
GHOSTFUSED_INLINE Halves narrow(Vec v, Float16) {
  const Ints bits = reinterpret_cast<Ints>(v);
  const Ints magnitude = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
  const Ints normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // adding 0.5 leaves a subnormal's units in the lowest bits of the sum, rounded to nearest even
  const Ints subnormal = reinterpret_cast<Ints>(reinterpret_cast<Vec>(magnitude) + 0.5f) - 0x3f000000;
  const Ints finite = magnitude < (113 << 23) ? subnormal : normal;
  const Ints overflow = magnitude > 0x7f800000 ? Ints{} + 0x7e00 : Ints{} + 0x7c00;
  return __builtin_convertvector((magnitude >= 0x477ff000 ? overflow : finite) | sign, Halves);
}
#endif

GHOSTFUSED_INLINE Vec load_float(const float* p) { return load(p); }
template <typename T>
GHOSTFUSED_INLINE Vec load_float(const T* p) {
  return widen(load<Halves>(p), T{});
}
GHOSTFUSED_INLINE void store_float(float* p, Vec v) { store(p, v); }
template <typename T>
GHOSTFUSED_INLINE void store_float(T* p, Vec v) {
  store(p, narrow(v, T{}));
}
GHOSTFUSED_INLINE float to_float(float x) { return x; }
GHOSTFUSED_INLINE float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  __builtin_memcpy(&y, &bits, sizeof y);
  return y;
}
template <typename T>
GHOSTFUSED_INLINE float to_float(T x) {
  return widen(Halves{} + x.bits, T{})[0];
}

#ifdef GHOSTFUSED_X86_MASKS
constexpr bool kMasks = true;  // a part of a vector is loaded and stored by one instruction
#if GHOSTFUSED_LANES == 8
GHOSTFUSED_INLINE Vec load_masked(const float* p, uint32_t mask) { return (Vec)_mm256_maskz_loadu_ps(mask, p); }
GHOSTFUSED_INLINE Halves load_masked(const void* p, uint32_t mask) { return (Halves)_mm_maskz_loadu_epi16(mask, p); }
GHOSTFUSED_INLINE void store_masked(float* p, Vec v, uint32_t mask) { _mm256_mask_storeu_ps(p, mask, (__m256)v); }
GHOSTFUSED_INLINE void store_masked(void* p, Halves h, uint32_t mask) { _mm_mask_storeu_epi16(p, mask, (__m128i)h); }
#else
GHOSTFUSED_INLINE Vec load_masked(const float* p, uint32_t mask) { return (Vec)_mm512_maskz_loadu_ps(mask, p); }
GHOSTFUSED_INLINE Halves load_masked(const void* p, uint32_t mask) { return (Halves)_mm256_maskz_loadu_epi16(mask, p); }
GHOSTFUSED_INLINE void store_masked(float* p, Vec v, uint32_t mask) { _mm512_mask_storeu_ps(p, mask, (__m512)v); }
GHOSTFUSED_INLINE void store_masked(void* p, Halves h, uint32_t mask) { _mm256_mask_storeu_epi16(p, mask, (__m256i)h); }
#endif
GHOSTFUSED_INLINE uint32_t mask_of(int count) { return (1u << count) - 1; }
#elif defined(GHOSTFUSED_SVE)
constexpr bool kMasks = true;
GHOSTFUSED_INLINE svbool_t mask_of(int count) { return svwhilelt_b32_s32(0, count); }
GHOSTFUSED_INLINE Vec load_masked(const float* p, svbool_t mask) { return svld1_f32(mask, p); }
GHOSTFUSED_INLINE Halves load_masked(const void* p, svbool_t mask) {
  return __builtin_convertvector((Ints)svld1uh_s32(mask, static_cast<const uint16_t*>(p)), Halves);
}
GHOSTFUSED_INLINE void store_masked(float* p, Vec v, svbool_t mask) { svst1_f32(mask, p, v); }
GHOSTFUSED_INLINE void store_masked(void* p, Halves h, svbool_t mask) {
  svst1h_s32(mask, static_cast<int16_t*>(p), widen(h));
}
#else
constexpr bool kMasks = false;
#endif

// The first ``count`` lanes of memory; zeros after them. And the reverse.
template <typename T>
GHOSTFUSED_INLINE Vec load_part(const T* p, int count) {
#if defined(GHOSTFUSED_X86_MASKS) || defined(GHOSTFUSED_SVE)
  if constexpr (sizeof(T) == sizeof(float)) {
    return load_masked(p, mask_of(count));
  } else {
    return widen(load_masked(static_cast<const void*>(p), mask_of(count)), T{});
  }
#else
  if (count == kLanes) return load_float(p);
  T lanes[kLanes] = {};
  for (int i = 0; i < count; ++i) lanes[i] = p[i];
  return load_float(lanes);
#endif
}
template <typename T>
GHOSTFUSED_INLINE void store_part(T* p, Vec v, int count, int64_t stride = 1) {
#if defined(GHOSTFUSED_X86_MASKS) || defined(GHOSTFUSED_SVE)
  if (stride == 1) {
    if constexpr (sizeof(T) == sizeof(float)) {
      return store_masked(p, v, mask_of(count));
    } else {
      return store_masked(static_cast<void*>(p), narrow(v, T{}), mask_of(count));
    }
  }
#endif
  if (count == kLanes && stride == 1) return store_float(p, v);
  T lanes[kLanes];
  store_float(lanes, v);
  for (int i = 0; i < count; ++i) p[i * stride] = lanes[i];
}

// Bytes, two at the least; what isn't a whole vector in two parts that may overlap.
GHOSTFUSED_INLINE void copy_run(void* to, const void* from, int64_t bytes) {
  char* const out = static_cast<char*>(to);
  const char* const in = static_cast<const char*>(from);
  constexpr int64_t kBytes = sizeof(Vec);
  if (bytes >= kBytes) {
    for (int64_t i = 0; i + kBytes <= bytes; i += kBytes) store(out + i, load(in + i));
    return store(out + bytes - kBytes, load(in + bytes - kBytes));
  }
#pragma GCC unroll 5
  for (int64_t size = kBytes / 2; size > 1; size /= 2) {
    if (bytes < size) continue;
    const auto copy = [&](int64_t at) { __builtin_memcpy(out + at, in + at, size); };
    copy(0), copy(bytes - size);
    return;
  }
}

// The even and the odd lanes of two vectors.
GHOSTFUSED_INLINE void deinterleave(Vec a, Vec b, Vec& even, Vec& odd) {
  Ints at;
  for (int i = 0; i < kLanes; ++i) at[i] = 2 * i;
#ifdef __clang__
  for (int i = 0; i < kLanes; ++i) {
    even[i] = 2 * i < kLanes ? a[2 * i] : b[2 * i - kLanes];
    odd[i] = 2 * i < kLanes ? a[2 * i + 1] : b[2 * i + 1 - kLanes];
  }
#else
  even = __builtin_shuffle(a, b, at);
  odd = __builtin_shuffle(a, b, at + 1);
#endif
}

// Of numbers 0 … kLanes - 1 and kLanes - 1 … 2 kLanes - 2 the even ones, so that nothing after the last is read.
GHOSTFUSED_INLINE Vec every_second(Vec a, Vec b) {
#ifdef __clang__
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = 2 * i < kLanes ? a[2 * i] : b[2 * i + 1 - kLanes];
  return v;
#else
  Ints at;
  for (int i = 0; i < kLanes; ++i) at[i] = 2 * i + (2 * i >= kLanes);
  return __builtin_shuffle(a, b, at);
#endif
}

// ``count`` numbers at a stride; zeros after them.
template <typename T>
GHOSTFUSED_INLINE Vec load_strided(const T* p, int64_t stride, int count) {
  if (stride == 1 && count == kLanes) return load_float(p);
  if (stride == 2 && count == kLanes) return every_second(load_float(p), load_float(p + kLanes - 1));
  if constexpr (kMasks) {
    if (stride == 1) return load_part(p, count);
    if (stride == 2) {
      const int last = 2 * count - kLanes;
      return every_second(load_part(p, min_of(2 * count - 1, kLanes)), load_part(p + kLanes - 1, max_of(last, 0)));
    }
  }
  Vec v{};
  for (int i = 0; i < count; ++i) v[i] = to_float(p[i * stride]);
  return v;
}

// Lane at[i] of v in lane i.
GHOSTFUSED_INLINE Vec pick(Vec v, Ints at) {
#ifdef __clang__
  Vec picked;
  for (int i = 0; i < kLanes; ++i) picked[i] = v[at[i] & (kLanes - 1)];
  return picked;
#else
  return __builtin_shuffle(v, at);
#endif
}

// Lane j of vector i to lane i of vector j: each step turns the number that i and j make up by one bit.
GHOSTFUSED_INLINE void transpose(Vec (&v)[kLanes]) {
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
    Vec next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) deinterleave(v[2 * i], v[2 * i + 1], next[i], next[i + kLanes / 2]);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) v[i] = next[i];
  }
}

// The comparisons are written so that NaN takes the branch that keeps it, as in PyTorch.

// None, ReLU and ReLU6 are clamps between these bounds, with no branch in the kernels.
struct Clamp {
  Vec low, high;
};
inline Clamp clamp_of(Act act) {
  const float infinity = __builtin_inff();
  return {splat(act == Act::kReLU || act == Act::kReLU6 ? 0.f : -infinity), splat(act == Act::kReLU6 ? 6.f : infinity)};
}
GHOSTFUSED_INLINE bool is_clamp(Act act) { return act <= Act::kReLU6; }
GHOSTFUSED_INLINE Vec clamp(Vec x, const Clamp& to) {
#if defined(GHOSTFUSED_X86_HALVES) && GHOSTFUSED_LANES == 8
  return (Vec)_mm256_min_ps((__m256)to.high, _mm256_max_ps((__m256)to.low, (__m256)x));
#elif defined(GHOSTFUSED_X86_HALVES)  // where GCC compares with constants, and blends
  constexpr __mmask16 kAll = -1;
  return (Vec)_mm512_maskz_min_ps(kAll, (__m512)to.high, _mm512_maskz_max_ps(kAll, (__m512)to.low, (__m512)x));
#else
  x = to.low > x ? to.low : x;
  return x > to.high ? to.high : x;
#endif
}

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
