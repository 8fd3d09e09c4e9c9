// The Ghost module in channels_last as one kernel: 3×3 or (fp16, bf16) 5×5, ratio 2. A block
// takes whole rows of an image with their halo, or whole images, × block_c init channels:
//
//   load          the first x → registers; 1×1 weights, norms as scale and shift, the cheap weights times theirs and
//                 x1's padding → shared memory                                                      load.cuh
//   --- barrier ---
//   primary       w * x on tensor cores, or by multiply-adds, IEEE fp32            primary.cuh, primary_fma.cuh
//   norm_affine   scale, shift, activation → x1 in shared memory                                    primary.cuh
//   --- barrier ---
//   cheap         x1 → x2 in registers, sliding down rows                                           cheap.cuh
//   store         x1 and x2 → output, gate and residual applied                                     cheap.cuh
//
// Without ghosts (kD = 1) x1 is the output, and goes there from the primary conv's registers.
//
// Every sum is made by one thread in a fixed order, so results are bitwise the same from run to run. plan.cpp chooses
// the tile; only instructions of sm_80 are used.
#pragma once

#include "cuda/ghost/nhwc/cheap.cuh"
#include "cuda/ghost/nhwc/primary.cuh"
#include "cuda/ghost/nhwc/primary_fma.cuh"

namespace ghostfused {

// Without ghosts, two blocks of an SM would spill from sm_100 on.
template <Path kPath, int kTiles, int kD, Epilogue kEpilogue>
__global__ void __launch_bounds__(nhwc_max_threads(kTiles),
                                  kD == 1 && kStepsApart ? 1 : nhwc_min_blocks(kTiles, kD, kEpilogue))
    nhwc_forward(const __grid_constant__ NhwcParams p) {
  extern __shared__ __align__(128) unsigned char smem[];
  const NhwcTile t = nhwc_tile<kD>(p);
  const auto load_rest = [&] { load<kPath, kTiles, kD>(p, t, smem); };
  if constexpr (kPath == Path::kFloat32) {
    primary_fma<kTiles, kD, kEpilogue>(p, t, smem, load_rest);
  } else {
    primary<kPath, kTiles, kD, kEpilogue>(p, t, smem, load_rest);
  }
  if constexpr (kD > 1) {
    __syncthreads();  // x1 is complete
    cheap_and_store<kPath, kTiles, kD, kEpilogue>(p, t, smem);
  }
}

template <Path kPath, int kTiles, int kD, Epilogue kEpilogue>
const void* nhwc_kernel() {
  return reinterpret_cast<const void*>(&nhwc_forward<kPath, kTiles, kD, kEpilogue>);
}

}  // namespace ghostfused

// The kernels of one path, in the order that nhwc.h gives.
#define GHOSTFUSED_NHWC(PATH, NAME, TILES, DW, EPILOGUE, SUFFIX) \
  {nhwc_kernel<Path::k##PATH, TILES, DW, Epilogue::EPILOGUE>(), NAME "_nhwc_t" #TILES "_dw" #DW SUFFIX}
#define GHOSTFUSED_NHWC_KERNELS(PATH, NAME)                                                                 \
  namespace ghostfused {                                                                                    \
  const Kernel k##PATH##NhwcKernels[kNhwcKernelsPerPath] = {                                                \
      GHOSTFUSED_NHWC(PATH, NAME, 1, 3, kNone, "_none"), GHOSTFUSED_NHWC(PATH, NAME, 1, 3, kReLU, "_relu"), \
      GHOSTFUSED_NHWC(PATH, NAME, 1, 3, kAny, "_any"),   GHOSTFUSED_NHWC(PATH, NAME, 2, 3, kNone, "_none"), \
      GHOSTFUSED_NHWC(PATH, NAME, 2, 3, kReLU, "_relu"), GHOSTFUSED_NHWC(PATH, NAME, 2, 3, kAny, "_any"),   \
      GHOSTFUSED_NHWC(PATH, NAME, 3, 3, kNone, "_none"), GHOSTFUSED_NHWC(PATH, NAME, 3, 3, kReLU, "_relu"), \
      GHOSTFUSED_NHWC(PATH, NAME, 2, 5, kAny, "_any"),   GHOSTFUSED_NHWC(PATH, NAME, 2, 1, kAny, "_any")};  \
  }
#define GHOSTFUSED_NHWC_FLOAT_KERNELS(PATH, NAME)                                                                  \
  namespace ghostfused {                                                                                           \
  const Kernel k##PATH##NhwcKernels[kNhwcFloatKernelsPerPath] = {GHOSTFUSED_NHWC(PATH, NAME, 1, 3, kLowest, ""),   \
                                                                 GHOSTFUSED_NHWC(PATH, NAME, 2, 3, kLowest, ""),   \
                                                                 GHOSTFUSED_NHWC(PATH, NAME, 2, 3, kAny, "_any")}; \
  }
