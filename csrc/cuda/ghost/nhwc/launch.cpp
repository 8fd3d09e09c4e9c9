// Queues the channels_last kernel (forward.cuh).
#include <cuda_runtime_api.h>

#include "cuda/ghost/nhwc/nhwc.h"

namespace ghostfused {
namespace {

Epilogue epilogue_of(const GhostForwardParams& a) {
  if (a.shape.full) return Epilogue::kAny;
  if (element_size(a.shape.path) == 4) return Epilogue::kLowest;
  return a.primary.act == Act::kNone ? Epilogue::kNone : Epilogue::kReLU;
}

int kernel_index(const GhostForwardParams& a, const NhwcPlan& plan) {
  constexpr int first[] = {0, kNhwcKernelsPerPath, 2 * kNhwcKernelsPerPath,
                           2 * kNhwcKernelsPerPath + kNhwcFloatKernelsPerPath};
  return first[static_cast<int>(a.shape.path)] + nhwc_kernel_of_path(a.shape, plan.warp_tiles, epilogue_of(a));
}

}  // namespace

const Kernel& nhwc_kernel(int index) {
  const int of_float = index - 2 * kNhwcKernelsPerPath;
  if (of_float >= 0) {
    return (of_float < kNhwcFloatKernelsPerPath ? kTF32NhwcKernels
                                                : kFloat32NhwcKernels)[of_float % kNhwcFloatKernelsPerPath];
  }
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
