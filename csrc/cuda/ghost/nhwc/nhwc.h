// What the host hands to the channels_last kernel (forward.cuh), and the kernels that are compiled of it.
#pragma once

#include "cuda/launch.h"

namespace ghostfused {

struct NhwcParams {
  GhostForwardParams args;
  NhwcPlan plan;
  DeviceTensor out, residual, output_gate;
  uint32_t x_pixel, x_row, out_pixel, out_row;  // strides in bytes
  int weight_rows;                              // of warps that load weights, weight_warps in each
  Reciprocal channel_blocks, weight_warps, width, height, period, vectors, column_groups, strips;
};

// A warp multiplies 32 pixels × up to three m16 tiles of channels at a time; a thread of the cheap conv makes 4 columns
// of 4 (5×5: 2) channels, as many as leave its weights in registers.
constexpr int kNhwcPixels = 32, kThreadColumns = 4;
constexpr int nhwc_thread_channels(int dw_size) { return dw_size == 3 ? 4 : 2; }
constexpr int nhwc_max_threads(int warp_tiles) { return warp_tiles == 3 ? 128 : 256; }

// What follows the convolutions: nothing, ReLU after both, or what the arguments say, gate and residual included.
enum class Epilogue : int { kNone, kReLU, kAny };

// Three tiles save a little (by the cost model 1 %, for the modules of GhostNet), and are compiled for 3×3 with the
// common epilogues only.
constexpr int nhwc_max_warp_tiles(const GhostShape& s) { return s.full || s.dw_size != 3 ? 2 : 3; }

// Blocks of nhwc_max_threads that an SM's registers must hold: fewer where they would spill.
constexpr int nhwc_min_blocks(int warp_tiles, Epilogue e) { return (warp_tiles == 3) + (e == Epilogue::kAny ? 1 : 2); }

constexpr int kNhwcVariants = 4;  // 3×3 with each epilogue; 5×5 with any
constexpr int nhwc_variant(int dw_size, Epilogue e) { return dw_size == 3 ? static_cast<int>(e) : 3; }
constexpr int kNhwcKernelsPerPath = 2 * kNhwcVariants + 2;  // index: (warp_tiles - 1) * kNhwcVariants + variant
extern const Kernel kFloat16NhwcKernels[kNhwcKernelsPerPath];
extern const Kernel kBFloat16NhwcKernels[kNhwcKernelsPerPath];

const Kernel& nhwc_kernel(int index);  // of both paths, float16 first
// What the kernel gets. Returns null, or what went wrong.
const char* nhwc_params(const GhostForwardParams& params, const NhwcPlan& plan, NhwcParams* out);
const char* launch_nhwc(const GhostForwardParams& params, const NhwcPlan& plan, void* stream);

}  // namespace ghostfused
