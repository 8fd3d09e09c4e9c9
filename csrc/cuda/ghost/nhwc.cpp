// Queues the channels_last kernel (nhwc.cuh).
#include "cuda/ghost/nhwc.h"

#include <cuda_runtime_api.h>

namespace ghostfused {

const Kernel& nhwc_kernel(int index) {
  return (index < kNhwcKernelsPerPath ? kFloat16NhwcKernels : kBFloat16NhwcKernels)[index % kNhwcKernelsPerPath];
}

const char* launch_nhwc(const GhostForwardParams&, const NhwcPlan&, void*) { return "the kernel is not compiled"; }

}  // namespace ghostfused
