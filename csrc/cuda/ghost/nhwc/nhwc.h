// What the host hands to the channels_last kernel (forward.cuh), and the kernels that are compiled of it.
#pragma once

#include "cuda/launch.h"

namespace ghostfused {

struct NhwcParams {
  GhostForwardParams args;
  NhwcPlan plan;
  DeviceTensor out, residual, output_gate;
  uint32_t x_pixel, x_row, out_pixel, out_row;  // strides in bytes
  float lowest;                                 // Epilogue::kLowest: 0 for ReLU, -inf for nothing
  int weight_rows;                              // of warps that load weights, weight_warps in each
  Reciprocal channel_blocks, weight_warps, width, height, period, vectors, column_groups, strips;
};

// A conv without ghosts has no cheap op: neither halo nor x1 in shared memory, and a compiled kernel of "size" 1.
constexpr bool has_ghosts(const GhostShape& s) { return s.out_channels > s.init_channels; }

// A warp multiplies 32 pixels × up to three m16 tiles of channels at a time; a thread of the cheap conv makes 4 columns
// of 4 (5×5: 2) channels, as many as leave its weights in registers.
constexpr int kNhwcPixels = 32, kThreadColumns = 4;
constexpr int nhwc_thread_channels(int dw_size) { return dw_size == 3 ? 4 : 2; }
constexpr int nhwc_max_threads(int warp_tiles) { return warp_tiles == 3 ? 128 : 256; }

// What follows the convolutions: nothing, ReLU after both, or what the arguments say, gate and residual included. fp32
// and TF32, where ReLU takes an instruction anyway, have one for the first two,
// and an input gate only with the last.
enum class Epilogue : int { kNone, kReLU, kAny, kLowest };

// Three tiles save a little (by the cost model 1 %, for the modules of GhostNet), and are compiled for 3×3 with the
// common epilogues only.
constexpr int nhwc_min_warp_tiles(const GhostShape& s) {
  return s.dw_size != 3 || (s.full && element_size(s.path) == 4) ? 2 : 1;
}
constexpr int nhwc_max_warp_tiles(const GhostShape& s) {
  return s.full || s.dw_size != 3 || element_size(s.path) == 4 ? 2 : 3;
}

// Blocks of nhwc_max_threads that an SM's registers must hold: fewer where they would spill.
constexpr int nhwc_min_blocks(int warp_tiles, int dw_size, Epilogue e) {
  return (warp_tiles == 3) + (e == Epilogue::kAny && dw_size > 1 ? 1 : 2);
}

// 3×3 with each epilogue by one and two tiles, the common ones by three; 5×5 and no ghosts with any by two; fp32 and
// TF32: 3×3 by one and two tiles, and any by two. Index of a path's:
constexpr int kNhwcKernelsPerPath = 10, kNhwcFloatKernelsPerPath = 3;
constexpr int nhwc_kernel_of_path(const GhostShape& s, int warp_tiles, Epilogue e) {
  if (element_size(s.path) == 4) return e == Epilogue::kAny ? 2 : warp_tiles - 1;
  return s.dw_size == 3 ? (warp_tiles - 1) * 3 + static_cast<int>(e) : s.dw_size == 5 ? 8 : 9;
}
extern const Kernel kFloat16NhwcKernels[kNhwcKernelsPerPath];
extern const Kernel kBFloat16NhwcKernels[kNhwcKernelsPerPath];

extern const Kernel kTF32NhwcKernels[kNhwcFloatKernelsPerPath];
extern const Kernel kFloat32NhwcKernels[kNhwcFloatKernelsPerPath];

const Kernel& nhwc_kernel(int index);  // of all paths, in their order
// What the kernel gets. Returns null, or what went wrong.
const char* nhwc_params(const GhostForwardParams& params, const NhwcPlan& plan, NhwcParams* out);
const char* launch_nhwc(const GhostForwardParams& params, const NhwcPlan& plan, void* stream);

}  // namespace ghostfused
