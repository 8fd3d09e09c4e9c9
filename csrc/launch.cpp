// Picks the compiled kernel of a Ghost module for a plan and queues it.
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <cstdio>

#include "bottleneck.h"

namespace ghostfused {
namespace {

const Kernel* kernels_of(Path path) {
  switch (path) {
    case Path::kFloat16:
      return kFloat16Kernels;
    case Path::kBFloat16:
      return kBFloat16Kernels;
    case Path::kTF32:
      return kTF32Kernels;
    default:
      return kFloat32Kernels;
  }
}

int kernel_index(const GhostShape& s) {
  const int dw = unrolled_dw(s) == 3 ? 0 : unrolled_dw(s) == 5 ? 1 : 2;
  return static_cast<int>(s.path) * kKernelsPerPath + dw * 2 + s.channels_last;
}

const Kernel& kernel_at(int index) {
  return kernels_of(static_cast<Path>(index / kKernelsPerPath))[index % kKernelsPerPath];
}

// Lets the kernel use all of the device's shared memory; once per kernel and device, since it isn't free.
cudaError_t allow_shared_memory(int index) {
  constexpr int kMaxDevices = 64;
  static std::atomic<bool> done[kGhostKernelCount][kMaxDevices];
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  if (device < kMaxDevices && done[index][device].load(std::memory_order_relaxed)) return cudaSuccess;
  int bytes = 0;
  error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  const void* function = kernel_at(index).function;
  error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  error =
      cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error == cudaSuccess && device < kMaxDevices) done[index][device].store(true, std::memory_order_relaxed);
  return error;
}

}  // namespace

bool narrow(const Tensor4& t, DeviceTensor* out) {
  for (const int64_t stride : {t.stride_c, t.stride_h, t.stride_w}) {
    if (stride < 0 || stride > INT32_MAX) return false;
  }
  *out = {t.data, t.stride_n, static_cast<uint32_t>(t.stride_c), static_cast<uint32_t>(t.stride_h),
          static_cast<uint32_t>(t.stride_w)};
  return true;
}

const char* launch_forward(const GhostForwardParams& params, const LaunchPlan& plan, void* stream) {
  if (plan.block_c == 0) return "no tile fits the device's shared memory";
  const int index = kernel_index(params.shape);
  cudaError_t error = allow_shared_memory(index);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  KernelParams p{params, plan, vector_widths(params, plan)};
  if (!narrow(params.x, &p.x) || !narrow(params.out, &p.out) || !narrow(params.residual, &p.residual) ||
      !narrow(params.output_gate, &p.output_gate)) {
    return "a stride within an image is beyond 2^31 elements";
  }
  const int element = element_size(params.shape.path);
  p.x_row = reciprocal_of(plan.block_k * element / p.width.x);
  p.weight_row = reciprocal_of(plan.block_k * element / p.width.primary_weight);
  void* arguments[] = {&p};
  error = cudaLaunchKernel(kernel_at(index).function, dim3(static_cast<unsigned>(plan.grid)), dim3(plan.threads),
                           arguments, plan.smem_bytes, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* kernel_attributes(int index, KernelAttributes* out) {
  const Kernel& kernel = index < kGhostKernelCount ? kernel_at(index) : bottleneck_kernel(index - kGhostKernelCount);
  cudaFuncAttributes a;
  const cudaError_t error = cudaFuncGetAttributes(&a, kernel.function);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  std::snprintf(out->name, sizeof out->name, "%s", kernel.name);
  out->registers = a.numRegs;
  out->local_bytes = static_cast<int>(a.localSizeBytes);
  out->static_smem_bytes = static_cast<int>(a.sharedSizeBytes);
  out->max_threads = a.maxThreadsPerBlock;
  out->binary_version = a.binaryVersion;
  return nullptr;
}

}  // namespace ghostfused
