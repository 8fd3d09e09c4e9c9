// What the host hands to a kernel: the arguments, the plan, and the vector widths that these pointers and strides allow.
#pragma once

#include "ghost_module.h"

namespace ghostfused {

struct VectorWidths {
  int x, primary_weight;  // bytes of one copy to shared memory: 16, 8, 4, or one 2-byte element
  int out;                // elements of one store
  bool residual, output_gate;  // whether they can be read in vectors of ``out`` elements
};

VectorWidths vector_widths(const GhostForwardParams& params, const LaunchPlan& plan);

struct KernelParams {
  GhostForwardParams args;
  LaunchPlan plan;
  VectorWidths width;
};

struct Kernel {
  const void* function;  // __global__ void (KernelParams)
  const char* name;
};

constexpr int kKernelsPerPath = 6;  // index: (dw 3: 0, 5: 1, other: 2) * 2 + channels_last
extern const Kernel kFloat16Kernels[kKernelsPerPath];
extern const Kernel kBFloat16Kernels[kKernelsPerPath];
extern const Kernel kTF32Kernels[kKernelsPerPath];
extern const Kernel kFloat32Kernels[kKernelsPerPath];

}  // namespace ghostfused
