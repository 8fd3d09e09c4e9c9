// Vectors of neighbouring channels of a pixel, as the primary conv leaves them in shared memory and the cheap one takes
// and stores them.
#pragma once

#include "cuda/ghost/nhwc/nhwc.h"
#include "cuda/half_pairs.cuh"

namespace ghostfused {

// Two or four neighbouring channels of a pixel.
template <typename T, int kChannels>
struct ChannelVectorOf;
template <typename T>
struct ChannelVectorOf<T, 2> {
  uint32_t raw;
  __device__ __forceinline__ void to_float(float (&v)[2]) const {
    const float2 a = unpack<T>(raw);
    v[0] = a.x, v[1] = a.y;
  }
  template <bool kReLU>
  __device__ __forceinline__ static ChannelVectorOf of(const float (&v)[2]) {
    return {pack<T, kReLU>(v[0], v[1])};
  }
};
template <typename T>
struct ChannelVectorOf<T, 4> {
  uint2 raw;
  __device__ __forceinline__ void to_float(float (&v)[4]) const {
    const float2 a = unpack<T>(raw.x), b = unpack<T>(raw.y);
    v[0] = a.x, v[1] = a.y, v[2] = b.x, v[3] = b.y;
  }
  template <bool kReLU>
  __device__ __forceinline__ static ChannelVectorOf of(const float (&v)[4]) {
    return {uint2{pack<T, kReLU>(v[0], v[1]), pack<T, kReLU>(v[2], v[3])}};
  }
};
template <>
struct ChannelVectorOf<float, 2> {
  uint2 raw;
  __device__ __forceinline__ void to_float(float (&v)[2]) const {
    v[0] = __uint_as_float(raw.x), v[1] = __uint_as_float(raw.y);
  }
  template <bool kReLU>
  __device__ __forceinline__ static ChannelVectorOf of(const float (&v)[2]) {
    return {uint2{__float_as_uint(v[0]), __float_as_uint(v[1])}};
  }
};
template <>
struct ChannelVectorOf<float, 4> {
  uint4 raw;
  __device__ __forceinline__ void to_float(float (&v)[4]) const {
    v[0] = __uint_as_float(raw.x), v[1] = __uint_as_float(raw.y);
    v[2] = __uint_as_float(raw.z), v[3] = __uint_as_float(raw.w);
  }
  template <bool kReLU>
  __device__ __forceinline__ static ChannelVectorOf of(const float (&v)[4]) {
    return {uint4{__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])}};
  }
};

// Not below ``lowest``: ReLU or nothing, where a conversion doesn't do it on the way. NaN stays NaN.
template <int kCount>
__device__ __forceinline__ void raise_to(float (&v)[kCount], float lowest) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm("max.NaN.f32 %0, %0, %1;" : "+f"(v[i]) : "f"(lowest));
}

}  // namespace ghostfused
