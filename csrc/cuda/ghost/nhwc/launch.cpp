// Queues the channels_last kernel (forward.cuh).
#include <cuda_runtime_api.h>

#include "cuda/ghost/nhwc/nhwc.h"

namespace ghostfused {
namespace {

Epilogue epilogue_of(const GhostForwardParams& a) {
  if (a.shape.full) return Epilogue::kAny;
  return a.primary.act == Act::kNone ? Epilogue::kNone : Epilogue::kReLU;
}

int kernel_index(const GhostForwardParams& a, const NhwcPlan& plan) {
  return (a.shape.path == Path::kFloat16 ? 0 : kNhwcKernelsPerPath) + (plan.warp_tiles - 1) * kNhwcVariants +
         nhwc_variant(a.shape.dw_size, epilogue_of(a));
}

}  // namespace

const Kernel& nhwc_kernel(int index) {
  return (index < kNhwcKernelsPerPath ? kFloat16NhwcKernels : kBFloat16NhwcKernels)[index % kNhwcKernelsPerPath];
}

const char* launch_nhwc(const GhostForwardParams& a, const NhwcPlan& plan, void* stream) {
  NhwcParams p;
  if (const char* error = nhwc_params(a, plan, &p)) return error;
  const int index = kernel_index(a, plan);
  const void* function = nhwc_kernel(index).function;
  if (const char* error = allow_shared_memory(kGhostKernelCount + kStatisticsKernelCount + index, function))
    return error;
  void* arguments[] = {&p};
  const dim3 grid(static_cast<unsigned>(plan.channel_blocks * plan.tiles_h),
                  static_cast<unsigned>(plan.grid / plan.channel_blocks / plan.tiles_h));
  const cudaError_t error = cudaLaunchKernel(function, grid, dim3(plan.threads), arguments, plan.smem_bytes,
                                             static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace ghostfused
