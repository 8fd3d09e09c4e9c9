// The Ghost module of a dense NCHW map as one kernel: ratio 2, 3×3 and, in fp16 and bf16, 5×5. A block takes one
// image's full-width strip of rows (14 × 14 and 7 × 7: the whole map) × block_c init channels:
//
//   load         norms, weights, gate → shared memory, while the first pixels of x are on their way    load.cuh
//   primary      w1 * x by tensor cores                                               primary.cuh, primary_seven.cuh
//                IEEE fp32: by multiply-adds                                                           primary_fma.cuh
//                3×3, wide maps, fp16 and bf16: a window of x                                               window.cuh
//   norm_affine  bias, norm, activation → x1 in shared memory, halo rows included; wide maps: and the output
//   --- barrier ---
//   cheap        depthwise conv of x1, norm, activation → x2                              cheap.cuh
//   store        wide maps: vectors of a row; small ones: whole maps, staged in shared memory          store.cuh
//
// Sizes are run-time values; the width's class (NchwMap), the channels of a warp, the cheap conv's size and whether
// there is more than ReLU are template arguments. plan.cpp chooses. Every sum is made in a fixed order.
#pragma once

#include "cuda/ghost/nchw/cheap.cuh"
#include "cuda/ghost/nchw/load.cuh"
#include "cuda/ghost/nchw/primary.cuh"
#include "cuda/ghost/nchw/primary_fma.cuh"
#include "cuda/ghost/nchw/primary_seven.cuh"
#include "cuda/ghost/nchw/store.cuh"

namespace ghostfused {

template <class C>
__global__ void __launch_bounds__(C::kMaxThreads, C::kMinBlocks) ghost_nchw(const __grid_constant__ NchwParams p) {
  extern __shared__ __align__(128) unsigned char smem[];
  const NchwBlock b = NchwBlock::of<C>(p);
  const int first_ghost = p.args.shape.init_channels + b.c0;
  constexpr bool kFma = C::kPath == Path::kFloat32;
  unsigned char* stage = smem + p.plan.stage_offset;
  const auto load_rest = [&] { load<C>(p, b, smem); };
  if constexpr (C::kWide) {
    if constexpr (kFma) {
      primary_fma<C>(p, b, smem, load_rest);
    } else {
      primary<C>(p, b, smem, load_rest);
    }
    __syncthreads();  // x1 is complete
    if constexpr (C::kFull)
      if (!has_window<C>(p)) store_x1<C>(p, b, smem);
    cheap_wide<C>(p, b, smem);
  } else {
    constexpr bool kSeven = C::kMap == NchwMap::kSeven;
    if constexpr (kSeven) {
      primary_seven<C>(p, b, smem, load_rest);
    } else if constexpr (kFma) {
      primary_fma<C>(p, b, smem, load_rest);
    } else {
      primary<C>(p, b, smem, load_rest);
    }
    __syncthreads();  // x1 is complete, and what lay in the stage is used up
    unsigned char* staged_x1 = kSeven && C::kHalf ? stage + p.plan.block_c * (2 * C::kPixels) : smem + p.plan.x1_offset;
    cheap_small<C>(p, b, smem, stage, staged_x1);
    __syncthreads();  // x2, and x1 of 7 × 7, are staged
    if constexpr (!C::kDirect) store_maps<C>(p, b.n, b.c0, b.channels, staged_x1);
    store_maps<C>(p, b.n, first_ghost, b.ghosts, stage);
  }
}

template <Path kPath, NchwMap kMap, int kTiles, int kD, bool kFull>
const void* nchw_kernel() {
  return reinterpret_cast<const void*>(&ghost_nchw<NchwConfig<kPath, kMap, kTiles, kD, kFull>>);
}

}  // namespace ghostfused

// The kernels of one path, in the order that nchw.h gives.
#define GHOSTFUSED_NCHW(PATH, NAME, MAP, WIDTH, TILES, DW, FULL, ANY) \
  {nchw_kernel<Path::k##PATH, NchwMap::MAP, TILES, DW, FULL>(), NAME "_nchw_w" #WIDTH "_t" #TILES "_dw" #DW ANY}
#define GHOSTFUSED_NCHW_PLAIN(PATH, NAME, MAP, WIDTH, TILES) \
  GHOSTFUSED_NCHW(PATH, NAME, MAP, WIDTH, TILES, 3, false, "")
#define GHOSTFUSED_NCHW_FULL(PATH, NAME, MAP, WIDTH, TILES, DW) \
  GHOSTFUSED_NCHW(PATH, NAME, MAP, WIDTH, TILES, DW, true, "_any")
#define GHOSTFUSED_NCHW_KERNELS(PATH, NAME)                                                                       \
  namespace ghostfused {                                                                                          \
  const Kernel k##PATH##NchwKernels[kNchwKernelsPerPath] = {                                                      \
      GHOSTFUSED_NCHW_PLAIN(PATH, NAME, kWide8, 8, 1),     GHOSTFUSED_NCHW_PLAIN(PATH, NAME, kWide8, 8, 2),       \
      GHOSTFUSED_NCHW_PLAIN(PATH, NAME, kWide4, 4, 2),     GHOSTFUSED_NCHW_PLAIN(PATH, NAME, kWide4, 4, 4),       \
      GHOSTFUSED_NCHW_PLAIN(PATH, NAME, kFourteen, 14, 2), GHOSTFUSED_NCHW_PLAIN(PATH, NAME, kFourteen, 14, 4),   \
      GHOSTFUSED_NCHW_PLAIN(PATH, NAME, kSeven, 7, 3),     GHOSTFUSED_NCHW_FULL(PATH, NAME, kWide8, 8, 2, 3),     \
      GHOSTFUSED_NCHW_FULL(PATH, NAME, kWide4, 4, 2, 3),   GHOSTFUSED_NCHW_FULL(PATH, NAME, kFourteen, 14, 2, 3), \
      GHOSTFUSED_NCHW_FULL(PATH, NAME, kSeven, 7, 3, 3),   GHOSTFUSED_NCHW_FULL(PATH, NAME, kWide8, 8, 2, 5),     \
      GHOSTFUSED_NCHW_FULL(PATH, NAME, kWide4, 4, 2, 5),   GHOSTFUSED_NCHW_FULL(PATH, NAME, kFourteen, 14, 2, 5), \
      GHOSTFUSED_NCHW_FULL(PATH, NAME, kSeven, 7, 3, 5)};                                                         \
  }
#define GHOSTFUSED_NCHW_TF32_KERNELS                                                                        \
  namespace ghostfused {                                                                                    \
  const Kernel kTF32NchwKernels[kNchwTF32Kernels] = {GHOSTFUSED_NCHW_PLAIN(TF32, "tf32", kWide4, 4, 2),     \
                                                     GHOSTFUSED_NCHW_PLAIN(TF32, "tf32", kFourteen, 14, 2), \
                                                     GHOSTFUSED_NCHW_PLAIN(TF32, "tf32", kSeven, 7, 3)};    \
  }
#define GHOSTFUSED_NCHW_FLOAT32_KERNELS                              \
  namespace ghostfused {                                             \
  const Kernel kFloat32NchwKernels[kNchwFloat32Kernels] = {          \
      GHOSTFUSED_NCHW_PLAIN(Float32, "float32", kWide4, 4, 2),       \
      GHOSTFUSED_NCHW_PLAIN(Float32, "float32", kFourteen, 14, 2),   \
      GHOSTFUSED_NCHW_PLAIN(Float32, "float32", kSeven, 7, 2),       \
      GHOSTFUSED_NCHW_FULL(Float32, "float32", kWide4, 4, 2, 3),     \
      GHOSTFUSED_NCHW_FULL(Float32, "float32", kFourteen, 14, 2, 3), \
      GHOSTFUSED_NCHW_FULL(Float32, "float32", kSeven, 7, 2, 3)};    \
  }
