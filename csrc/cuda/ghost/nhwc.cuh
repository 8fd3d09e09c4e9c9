// The Ghost module in channels_last, fp16 and bf16, as one kernel.
#pragma once

#include "cuda/ghost/nhwc.h"

namespace ghostfused {

template <Path kPath, int kTiles, int kD, Epilogue kEpilogue>
__global__ void __launch_bounds__(256, 2) nhwc_forward(const __grid_constant__ NhwcParams p) {}

template <Path kPath, int kTiles, int kD, Epilogue kEpilogue>
const void* nhwc_kernel() {
  return reinterpret_cast<const void*>(&nhwc_forward<kPath, kTiles, kD, kEpilogue>);
}

}  // namespace ghostfused

// The kernels of one path for kTiles, in the order that nhwc.h gives.
#define GHOSTFUSED_NHWC_TILES(PATH, NAME, TILES)                                                    \
  {nhwc_kernel<Path::k##PATH, TILES, 3, Epilogue::kNone>(), NAME "_nhwc_t" #TILES "_dw3_none"},     \
      {nhwc_kernel<Path::k##PATH, TILES, 3, Epilogue::kReLU>(), NAME "_nhwc_t" #TILES "_dw3_relu"}, \
      {nhwc_kernel<Path::k##PATH, TILES, 3, Epilogue::kAny>(), NAME "_nhwc_t" #TILES "_dw3_any"},   \
      {nhwc_kernel<Path::k##PATH, TILES, 5, Epilogue::kAny>(), NAME "_nhwc_t" #TILES "_dw5_any"}
#define GHOSTFUSED_NHWC_KERNELS(PATH, NAME)                                                        \
  namespace ghostfused {                                                                           \
  const Kernel k##PATH##NhwcKernels[kNhwcKernelsPerPath] = {GHOSTFUSED_NHWC_TILES(PATH, NAME, 1),  \
                                                            GHOSTFUSED_NHWC_TILES(PATH, NAME, 2),  \
                                                            GHOSTFUSED_NHWC_TILES(PATH, NAME, 3)}; \
  }
