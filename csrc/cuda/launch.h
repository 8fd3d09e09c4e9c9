// What the host hands to a kernel: the arguments, the plan, and the vector widths that these pointers and strides
// allow.
#pragma once

#include <initializer_list>

#include "common/parameters.h"

namespace ghostfused {

struct VectorWidths {
  int x, primary_weight;  // bytes of one copy to shared memory: 16, 8, 4, or one 2-byte element
  int out;                // elements of one store, and of one load of the residual and the output gate
};

constexpr int element_size(Path path) { return path == Path::kFloat16 || path == Path::kBFloat16 ? 2 : 4; }

// The largest power of two ≤ limit that divides all of the values and, times ``element``, the address.
int common_vector(int limit, int element, const void* data, std::initializer_list<int64_t> values);

VectorWidths vector_widths(const GhostForwardParams& params, const LaunchPlan& plan);

// Whether the channels_last kernel computes this call: pointers and strides must be those of whole vectors.
bool nhwc_takes(const GhostForwardParams& params, const NhwcPlan& plan);
// The same of the NCHW kernel.
bool nchw_takes(const GhostForwardParams& params, const NchwPlan& plan);

// A Tensor4 as the kernel addresses it. Strides within an image are of 32 bits and, as all of Torch's, not
// negative, so that a product is one instruction; that of the batch may be longer.
struct DeviceTensor {
  void* data;
  int64_t stride_n;
  uint32_t stride_c, stride_h, stride_w;
};

// False if a stride within an image needs more than 31 bits.
bool narrow(const Tensor4& t, DeviceTensor* out);

// For a division that many threads make (vector.cuh's FastDivisor).
struct Reciprocal {
  uint32_t divisor, reciprocal;
};
constexpr Reciprocal reciprocal_of(uint32_t d) { return {d, 0xffffffffu / d + 1}; }

struct KernelParams {
  GhostForwardParams args;
  LaunchPlan plan;
  VectorWidths width;
  DeviceTensor x, out, residual, output_gate;
  Reciprocal x_row, weight_row;  // vectors in a row of a stage: of x in channels_last, and of the 1×1 weights
};

// Fills in what follows from the two. Returns null, or what went wrong.
const char* kernel_params(const GhostForwardParams& params, const LaunchPlan& plan, KernelParams* out);

// Whether the kernel is the one for 3×3 and ratio 2 (kD = 3), or takes any size and ratio (kD = 0). In channels_last,
// where the nhwc family takes nearly all of the former, and in fp32 and TF32 there is only the latter.
constexpr bool is_unrolled(const GhostShape& s) {
  return s.ratio == 2 && s.dw_size == 3 && !s.channels_last && element_size(s.path) == 2;
}

// Two blocks of kMaxThreads per SM leave 128 registers a thread. With 80, for three, fp16 kernels spill or compute
// their addresses again and again: 8 to 11 % more instructions for GhostNet.
constexpr int kMaxThreads = 256, kMinBlocks = 2;

struct Kernel {
  const void* function;  // __global__ void (KernelParams), or those of bottleneck.h
  const char* name;
};

// Lets a kernel use all of the device's shared memory; once per device and kernel, of which ``index`` counts the
// general family's, then training.h's statistics kernels, those of the other families, and training.h's for
// channels_last. Returns null, or what went wrong.
constexpr int kStatisticsKernelCount = 8;  // 4 paths × 2 layouts
constexpr int kFirstTrainingNhwc = kGhostKernelCount + kStatisticsKernelCount + kNhwcKernelCount + kNchwKernelCount;
constexpr int kSharedMemoryKernels = kFirstTrainingNhwc + 2 * 4;
const char* allow_shared_memory(int index, const void* function);

constexpr int kKernelsPerPath = 3;                         // 3×3 in NCHW, any size and ratio in NCHW, in channels_last
constexpr int kFloatKernelsPerPath = kKernelsPerPath - 1;  // without the first
extern const Kernel kFloat16Kernels[kKernelsPerPath];
extern const Kernel kBFloat16Kernels[kKernelsPerPath];
extern const Kernel kTF32Kernels[kFloatKernelsPerPath];
extern const Kernel kFloat32Kernels[kFloatKernelsPerPath];

}  // namespace ghostfused
