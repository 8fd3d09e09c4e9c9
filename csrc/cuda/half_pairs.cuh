// Pairs of fp16 or bf16 numbers in a register: loads, conversions and products for the kernels of one layout. TF32 has
// single numbers in their place.
#pragma once

#include "cuda/vector.cuh"

namespace ghostfused {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// What no thread of the launch writes: read through the texture path.
__device__ __forceinline__ uint4 load_global16(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// Zeros where the condition is false.
__device__ __forceinline__ uint4 load_global16_or_zero(bool condition, const void* p) {
  uint4 v;
  asm volatile(
      "{.reg .pred if; setp.ne.b32 if, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;"
      "@if ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];}"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(p), "r"(static_cast<int>(condition)));
  return v;
}

// Leaves ``v`` as it is where the condition is false.
__device__ __forceinline__ void load_global16_if(bool condition, uint4& v, const void* p) {
  asm volatile("{.reg .pred if; setp.ne.b32 if, %5, 0; @if ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];}"
               : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
               : "l"(p), "r"(static_cast<int>(condition)));
}

__device__ __forceinline__ void store_global(void* p, uint32_t v) {
  asm volatile("st.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ void store_global(void* p, uint2 v) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(v.x), "r"(v.y) : "memory");
}

__device__ __forceinline__ void store_global(void* p, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// base + kTimes * bytes, in one instruction.
template <int kTimes, typename P>
__device__ __forceinline__ P* advance(P* base, uint32_t bytes) {
  if constexpr (kTimes == 0) return base;
  P* p;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(p) : "r"(bytes), "n"(kTimes), "l"(base));
  return p;
}

__device__ __forceinline__ void store_global_if(bool condition, void* p, uint2 v) {
  asm volatile("{.reg .pred if; setp.ne.b32 if, %3, 0; @if st.global.v2.u32 [%0], {%1, %2};}" ::"l"(p), "r"(v.x),
               "r"(v.y), "r"(static_cast<int>(condition))
               : "memory");
}

// Two numbers of fp32 as a pair, ``first`` in the low half; with kReLU not below zero. NaN stays NaN.
template <typename T, bool kReLU = false>
__device__ __forceinline__ uint32_t pack(float first, float second) {
  uint32_t v;
  if constexpr (__is_same(T, __half)) {
    if constexpr (kReLU) {
      asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(second), "f"(first));
    } else {
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(second), "f"(first));
    }
  } else {
    if constexpr (kReLU) {
      asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(second), "f"(first));
    } else {
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(second), "f"(first));
    }
  }
  return v;
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t v) {
  if constexpr (__is_same(T, __half)) {
    float2 two;
    asm("{.reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
        : "=f"(two.x), "=f"(two.y)
        : "r"(v));
    return two;
  } else {
    return {__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)};
  }
}

// a * b of pairs, rounded as T's own product.
template <typename T>
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  if constexpr (__is_same(T, float)) return __float_as_uint(__uint_as_float(a) * __uint_as_float(b));
  using Pair = std::conditional_t<__is_same(T, __half), __half2, __nv_bfloat162>;
  const Pair product = __hmul2(*reinterpret_cast<const Pair*>(&a), *reinterpret_cast<const Pair*>(&b));
  return *reinterpret_cast<const uint32_t*>(&product);
}

// sums += a * b on tensor cores, or = with kFirst: 16 × 8 sums of fp32 over K = 16, of TF32 over K = 8. Lane 4 g + q
// has a's rows g and g + 8, b's column g and the sums of rows g and g + 8, columns 2 q and 2 q + 1.
template <typename T, bool kFirst>
__device__ __forceinline__ void multiply_tiles(float (&sums)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  const float c[4] = {kFirst ? 0.f : sums[0], kFirst ? 0.f : sums[1], kFirst ? 0.f : sums[2], kFirst ? 0.f : sums[3]};
#define GHOSTFUSED_MULTIPLY(TYPES)                                          \
  asm volatile("mma.sync.aligned." TYPES                                    \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "            \
               "{%10, %11, %12, %13};"                                      \
               : "=f"(sums[0]), "=f"(sums[1]), "=f"(sums[2]), "=f"(sums[3]) \
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]))
  if constexpr (__is_same(T, __half)) {
    GHOSTFUSED_MULTIPLY("m16n8k16.row.col.f32.f16.f16.f32");
  } else if constexpr (__is_same(T, float)) {
    GHOSTFUSED_MULTIPLY("m16n8k8.row.col.f32.tf32.tf32.f32");
  } else {
    GHOSTFUSED_MULTIPLY("m16n8k16.row.col.f32.bf16.bf16.f32");
  }
#undef GHOSTFUSED_MULTIPLY
}

// Vectors of 4, 8 and 16 bytes in shared memory, by 32-bit addresses.
__device__ __forceinline__ void load_shared(uint32_t& v, uint32_t address) {
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_shared(uint2& v, uint32_t address) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_shared(uint4& v, uint32_t address) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, uint2 v) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(v.x), "r"(v.y) : "memory");
}

// By a predicate, where a branch would cost more than the store.
__device__ __forceinline__ void store_shared_if(bool condition, uint32_t address, uint32_t v) {
  asm volatile("{.reg .pred if; setp.ne.b32 if, %2, 0; @if st.shared.u32 [%0], %1;}" ::"r"(address), "r"(v),
               "r"(static_cast<int>(condition))
               : "memory");
}
__device__ __forceinline__ void store_shared_if(bool condition, uint32_t address, uint2 v) {
  asm volatile("{.reg .pred if; setp.ne.b32 if, %3, 0; @if st.shared.v2.u32 [%0], {%1, %2};}" ::"r"(address), "r"(v.x),
               "r"(v.y), "r"(static_cast<int>(condition))
               : "memory");
}
__device__ __forceinline__ void store_shared_if(bool condition, uint32_t address, uint4 v) {
  asm volatile("{.reg .pred if; setp.ne.b32 if, %5, 0; @if st.shared.v4.u32 [%0], {%1, %2, %3, %4};}" ::"r"(address),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(static_cast<int>(condition))
               : "memory");
}

}  // namespace ghostfused
