// The Ghost module of dense NCHW maps, in fp16 or bf16: what the host hands to the kernel. See forward.cuh.
#pragma once

#include "cuda/launch.h"

namespace ghostfused {

// Two blocks on a multiprocessor leave 128 registers a thread.
constexpr int kNchwMaxThreads = 256;

// Rows that a thread of the cheap conv slides down. A tile is made of such strips.
constexpr int nchw_strip_rows(NchwMap map, int tiles, int dw_size) {
  return map == NchwMap::kFourteen && tiles < 4 && dw_size == 3 ? 2 : 7;
}
// fp32 numbers a channel of the cheap conv has in shared memory: weights, shift and slope, in whole float4s.
constexpr int nchw_cheap_floats(int dw_size) { return dw_size == 3 ? 12 : 28; }

// Bytes between the rows of a small map's x1: 7 numbers are padded to a vector.
constexpr int nchw_small_row_pitch(NchwMap map) { return map == NchwMap::kSeven ? 16 : 28; }

// Division by a small number, exact while dividend * divisor < 2^20 and the quotient is below 2^12.
struct SmallDivisor {
  uint32_t reciprocal;
  SmallDivisor(uint32_t d = 1) : reciprocal(((1u << 20) + d - 1) / d) {}
#ifdef __CUDACC__
  __device__ __forceinline__ int divide(int x) const { return static_cast<uint32_t>(x) * reciprocal >> 20; }
#endif
};

struct NchwParams {
  GhostForwardParams args;
  NchwPlan plan;
  DeviceTensor x, out, residual, output_gate;
  SmallDivisor by_columns, by_strips;  // the chunks of a row, and the strips of a tile
  // Bytes of 1, 2, 3 and 16 channels of x; of 8 * i channels and of a row of the output.
  uint32_t x_planes[4], out_halves[8], out_row;
  uint32_t primary_floor, cheap_floor;  // two numbers of x's type: 0 for ReLU, -inf for no activation
};

// The kernel's compiled forms, of each path: plain 3×3, by map and m16 tiles of a warp, few or many; full 3×3 and full
// 5×5, by map, with one number of tiles, which loses about 2 % by the cost model.
constexpr int kNchwPlain = 7, kNchwFull3 = 4, kNchwFull5 = 4;
constexpr int kNchwKernelsPerPath = kNchwPlain + kNchwFull3 + kNchwFull5;
extern const Kernel kFloat16NchwKernels[kNchwKernelsPerPath];
extern const Kernel kBFloat16NchwKernels[kNchwKernelsPerPath];

// Of both paths, float16 first.
const Kernel& nchw_kernel(int index);
const char* launch_nchw(const GhostForwardParams& params, const NchwPlan& plan, void* stream);

}  // namespace ghostfused
