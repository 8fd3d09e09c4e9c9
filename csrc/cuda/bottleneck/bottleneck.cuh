// All kernels of bottleneck.h for one path, in the order that it gives.
#pragma once

#include "cuda/bottleneck/depthwise_conv.cuh"
#include "cuda/bottleneck/squeeze_excite.cuh"

namespace ghostfused {

template <Path kPath, int kW, int kStride, bool kChannelsLast>
const void* depthwise_kernel() {
  return reinterpret_cast<const void*>(&depthwise_conv<kPath, kW, kStride, kChannelsLast>);
}

template <Path kPath, bool kChannelsAdjacent>
const void* squeeze_kernel() {
  return reinterpret_cast<const void*>(&squeeze<kPath, kChannelsAdjacent>);
}

template <Path kPath>
const void* excite_kernel() {
  return reinterpret_cast<const void*>(&excite<kPath>);
}

}  // namespace ghostfused

#define GHOSTFUSED_DEPTHWISE(PATH, NAME, W, S)                                              \
  {depthwise_kernel<Path::k##PATH, W, S, false>(), NAME "_depthwise_w" #W "_s" #S "_nchw"}, \
      {depthwise_kernel<Path::k##PATH, W, S, true>(), NAME "_depthwise_w" #W "_s" #S "_nhwc"}

#define GHOSTFUSED_BOTTLENECK_KERNELS(PATH, NAME)                              \
  namespace ghostfused {                                                       \
  const Kernel k##PATH##Bottleneck[kBottleneckKernels] = {                     \
      GHOSTFUSED_DEPTHWISE(PATH, NAME, 1, 1),                                  \
      GHOSTFUSED_DEPTHWISE(PATH, NAME, 3, 1),                                  \
      GHOSTFUSED_DEPTHWISE(PATH, NAME, 5, 1),                                  \
      GHOSTFUSED_DEPTHWISE(PATH, NAME, 3, 2),                                  \
      GHOSTFUSED_DEPTHWISE(PATH, NAME, 5, 2),                                  \
      {depthwise_kernel<Path::k##PATH, 0, 0, false>(), NAME "_depthwise_any"}, \
      {squeeze_kernel<Path::k##PATH, false>(), NAME "_squeeze_nchw"},          \
      {squeeze_kernel<Path::k##PATH, true>(), NAME "_squeeze_nhwc"},           \
      {excite_kernel<Path::k##PATH>(), NAME "_excite"},                        \
  };                                                                           \
  }
