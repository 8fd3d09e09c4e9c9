// Elements, vectors of them, divisions, addresses and shares of work: what every kernel uses.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/parameters.h"
#include "cuda/launch.h"

namespace ghostfused {

// From sm_100 on, ptxas needs more registers, and of steps through memory it keeps every multiple in one: it spills.
// There a step must not look like the others.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kStepsApart = true;
#else
constexpr bool kStepsApart = false;
#endif
__device__ __forceinline__ void set_apart(uint32_t& step) {
  if constexpr (kStepsApart) asm("" : "+r"(step));
}

template <Path kPath>
struct PathType {
  using T = float;
};
template <>
struct PathType<Path::kFloat16> {
  using T = __half;
};
template <>
struct PathType<Path::kBFloat16> {
  using T = __nv_bfloat16;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (__is_same(T, __half)) {
    return __float2half_rn(x);
  } else if constexpr (__is_same(T, __nv_bfloat16)) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// A number of fp32 rounded to TF32.
__device__ __forceinline__ uint32_t to_tf32(uint32_t bits) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(__uint_as_float(bits)));
  return r;
}
__device__ __forceinline__ uint4 to_tf32(const uint4& v) {
  return {to_tf32(v.x), to_tf32(v.y), to_tf32(v.z), to_tf32(v.w)};
}

// kCount numbers that are loaded and stored as one aligned vector of 2, 4, 8 or 16 bytes.
template <typename T, int kCount>
struct Vector {
  static constexpr int kBytes = sizeof(T) * kCount;
  template <int kB, int = 0>
  struct Raw;
  template <int kDummy>
  struct Raw<2, kDummy> {
    using Type = uint16_t;
  };
  template <int kDummy>
  struct Raw<4, kDummy> {
    using Type = uint32_t;
  };
  template <int kDummy>
  struct Raw<8, kDummy> {
    using Type = uint2;
  };
  template <int kDummy>
  struct Raw<16, kDummy> {
    using Type = uint4;
  };
  using RawType = typename Raw<kBytes>::Type;

  union {
    RawType raw;
    T at[kCount];
  };

  __device__ __forceinline__ Vector() : raw{} {}
  __device__ __forceinline__ void load(const void* p) { raw = *static_cast<const RawType*>(p); }
  __device__ __forceinline__ void store(void* p) const { *static_cast<RawType*>(p) = raw; }
};

// Calls f<kV> with a launch's vector width.
template <typename T, typename F>
__device__ __forceinline__ void with_vector(int width, F f) {
  if constexpr (sizeof(T) == 2) {
    if (width == 8) return f(Vector<T, 8>());
  }
  if (width == 4) return f(Vector<T, 4>());
  if (width == 2) return f(Vector<T, 2>());
  f(Vector<T, 1>());
}

// Division by a number that many threads divide by: exact while dividend * divisor < 2^32.
struct FastDivisor : Reciprocal {
  __device__ __forceinline__ explicit FastDivisor(uint32_t d) : Reciprocal{d, 0xffffffffu / d + 1} {}
  __device__ __forceinline__ explicit FastDivisor(const Reciprocal& r) : Reciprocal(r) {}
  __device__ __forceinline__ int divide(int x) const { return divisor == 1 ? x : __umulhi(x, reciprocal); }
};

// F.interpolate(mode="nearest"): the row (or column) of the gate for row ``dst`` of the output. ``scale``: the gate's
// rows over the output's.
__device__ __forceinline__ int nearest(int dst, float scale, int gate_size) {
  return min(static_cast<int>(floorf(dst * scale)), gate_size - 1);
}
__device__ __forceinline__ int nearest(int dst, int gate_size, int size) {
  return nearest(dst, static_cast<float>(gate_size) / static_cast<float>(size), gate_size);
}

// Where (c, h, w) of an image lies. All are of 32 bits and not negative: three wide multiply-adds.
__device__ __forceinline__ uint64_t offset_in_image(const DeviceTensor& t, uint32_t c, uint32_t h, uint32_t w) {
  return uint64_t{c} * t.stride_c + uint64_t{h} * t.stride_h + uint64_t{w} * t.stride_w;
}

// A thread's share of a [channel vectors × positions] grid: one vector for good, so that what belongs to its channels
// stays in registers, and every ``step``-th position. Neighbours in a warp take the next vector in channels_last and
// the next position in NCHW, as the stage is written.
struct ThreadShare {
  int vector, first, step;
  template <bool kChannelsLast>
  __device__ __forceinline__ static ThreadShare of(int vectors, int positions) {
    const int step = blockDim.x / vectors, id = threadIdx.x;
    ThreadShare s{kChannelsLast ? id % vectors : id / step, kChannelsLast ? id / vectors : id % step, step};
    if (s.vector >= vectors || s.first >= step) s.first = positions;  // left over
    return s;
  }
};

}  // namespace ghostfused
