// What the host hands to the channels_last kernel (nhwc.cuh), and which of its compiled forms it takes.
#pragma once

#include "cuda/launch.h"

namespace ghostfused {

struct NhwcParams {
  GhostForwardParams args;
  NhwcPlan plan;
  DeviceTensor out, residual, output_gate;
  uint32_t x_row, x_image, x_pixel;  // strides of x in bytes
  Reciprocal channel_blocks, tiles_h, width, height, channel_vectors, last_channel_vectors, column_groups, strips;
};

constexpr int kMaxWarpTiles = 3;
// What follows the convolutions: nothing, ReLU (for both), or what the arguments say, gate and residual included.
enum class Epilogue : int { kNone, kReLU, kAny };

// Channels that a thread of the cheap conv has: as many as leave its weights in registers.
constexpr int nhwc_thread_channels(int dw_size) { return dw_size == 3 ? 4 : 2; }

constexpr int kNhwcVariants = 4;  // 3×3 with each epilogue; 5×5 with any
constexpr int nhwc_variant(int dw_size, Epilogue e) { return dw_size == 3 ? static_cast<int>(e) : 3; }
constexpr int kNhwcKernelsPerPath = kMaxWarpTiles * kNhwcVariants;  // index: (warp_tiles - 1) * kNhwcVariants + variant
extern const Kernel kFloat16NhwcKernels[kNhwcKernelsPerPath];
extern const Kernel kBFloat16NhwcKernels[kNhwcKernelsPerPath];

// Of both paths, float16 first.
const Kernel& nhwc_kernel(int index);
const char* launch_nhwc(const GhostForwardParams& params, const NhwcPlan& plan, void* stream);

}  // namespace ghostfused
