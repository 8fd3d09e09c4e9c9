// The Ghost module of dense NCHW maps: what the host hands to the kernel. See forward.cuh.
#pragma once

#include "cuda/launch.h"

namespace ghostfused {

// Two blocks on a multiprocessor leave 128 registers a thread.
constexpr int kNchwMaxThreads = 256;

// Pixels of a chunk: a vector of x of 16 bytes, or of 8; a row of 7 × 7.
constexpr int nchw_chunk(NchwMap map) { return map == NchwMap::kWide8 ? 8 : map == NchwMap::kSeven ? 7 : 4; }

// Input channels of a step: of an mma, and in IEEE fp32 those that a thread loads at a time.
constexpr int nchw_step(Path path) { return path == Path::kFloat32 ? 4 : path == Path::kTF32 ? 8 : 16; }

// IEEE fp32 has no tensor cores: a thread has so many channels, whose weights lie together in shared memory, in groups.
constexpr int kFmaChannels = 8;

// Rows that a thread of the cheap conv slides down. A tile is made of such strips.
constexpr int nchw_strip_rows(NchwMap map, int tiles, int dw_size) {
  return map == NchwMap::kFourteen && tiles < 4 && dw_size == 3 ? 2 : 7;
}
// fp32 numbers a channel of the cheap conv has in shared memory: weights, shift and slope, in whole float4s.
constexpr int nchw_cheap_floats(int dw_size) { return dw_size == 3 ? 12 : 28; }

// Bytes between the rows of a small map's x1: in half precision 7 numbers are padded to a vector.
constexpr int nchw_small_row_pitch(NchwMap map, int bytes) {
  return map == NchwMap::kFourteen ? 14 * bytes : bytes == 2 ? 16 : 28;
}
constexpr int nchw_small_plane_pitch(NchwMap map, int bytes) {
  return (map == NchwMap::kSeven ? 7 : 14) * nchw_small_row_pitch(map, bytes);
}
// Of zeros, in place of a row outside a small map.
constexpr int kNchwZeroBytes = 64;

// Division by a small number, exact while dividend * divisor < 2^20 and the quotient is below 2^12.
struct SmallDivisor {
  uint32_t reciprocal;
  SmallDivisor(uint32_t d = 1) : reciprocal(((1u << 20) + d - 1) / d) {}
#ifdef __CUDACC__
  __device__ __forceinline__ int divide(int x) const { return static_cast<uint32_t>(x) * reciprocal >> 20; }
#endif
};

// How the window of a 3×3 primary conv is read: see window.cuh.
enum class WindowReads : int { kNone, kVectors1, kVectors2, kNumbers };

struct NchwParams {
  GhostForwardParams args;
  NchwPlan plan;
  DeviceTensor x, out, residual, output_gate;
  SmallDivisor by_columns, by_strips;  // the chunks of a row, and the strips of a tile
  // Bytes of 1, 2, 3 channels and of a step of x; of 8 * i channels, of one and of a row of the output.
  uint32_t x_planes[4], out_halves[8], out_plane, out_row;
  uint32_t primary_floor, cheap_floor;  // a word of x's type: 0 for ReLU, -inf for no activation
  WindowReads window_reads;             // kNone: a 1×1 conv
};

// The kernel's compiled forms. Of fp16 and bf16: plain 3×3, by map and m16 tiles of a warp, few or many; full 3×3 and
// full 5×5, by map, with one number of tiles, which loses about 2 % by the cost model. Of TF32 plain 3×3 by map; fp32's
// kernels take the rest. Of fp32 plain and full 3×3 by map.
constexpr int kNchwPlain = 7, kNchwFull3 = 4, kNchwFull5 = 4;
constexpr int kNchwKernelsPerPath = kNchwPlain + kNchwFull3 + kNchwFull5;
constexpr int kNchwTF32Kernels = 3, kNchwFloat32Kernels = 2 * kNchwTF32Kernels;
extern const Kernel kFloat16NchwKernels[kNchwKernelsPerPath];
extern const Kernel kBFloat16NchwKernels[kNchwKernelsPerPath];
extern const Kernel kTF32NchwKernels[kNchwTF32Kernels];
extern const Kernel kFloat32NchwKernels[kNchwFloat32Kernels];

// Of all paths, in their order.
const Kernel& nchw_kernel(int index);
const char* launch_nchw(const GhostForwardParams& params, const NchwPlan& plan, void* stream);

}  // namespace ghostfused
