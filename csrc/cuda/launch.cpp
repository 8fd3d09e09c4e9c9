// Picks the compiled kernel of a Ghost module for a plan and queues it.
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <cstdio>

#include "cuda/bottleneck/bottleneck.h"
#include "cuda/ghost/nchw/nchw.h"
#include "cuda/ghost/nhwc/nhwc.h"
#include "cuda/layout/layout.h"
#include "cuda/training/training.h"

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

// Of all paths in their order.
int kernel_index(const GhostShape& s) {
  const int path = static_cast<int>(s.path);
  if (element_size(s.path) == 4) return 2 * kKernelsPerPath + (path - 2) * kFloatKernelsPerPath + s.channels_last;
  return path * kKernelsPerPath + (is_unrolled(s) ? 0 : 1 + s.channels_last);
}

const Kernel& kernel_at(int index) {
  const int first_float = 2 * kKernelsPerPath, of_float = index - first_float;
  if (of_float >= 0)
    return kernels_of(static_cast<Path>(2 + of_float / kFloatKernelsPerPath))[of_float % kFloatKernelsPerPath];
  return kernels_of(static_cast<Path>(index / kKernelsPerPath))[index % kKernelsPerPath];
}

constexpr int kAllTrainingNhwc = 2 * kTrainingNhwcKernels + kTrainingNhwcFloatKernels;
static_assert(kGhostKernelCount == 2 * (kKernelsPerPath + kFloatKernelsPerPath));
static_assert(kKernelCount == kGhostKernelCount + 3 * (kBottleneckKernels + kTrainingKernels) + kStatisticsKernelCount +
                                  kAllTrainingNhwc + kNhwcKernelCount + kNchwKernelCount + kLayoutKernels);
static_assert(kNhwcKernelCount == 2 * (kNhwcKernelsPerPath + kNhwcFloatKernelsPerPath));

// In the order of kernel_attributes.
const Kernel& kernel_of_all(int index) {
  if (index < kGhostKernelCount) return kernel_at(index);
  index -= kGhostKernelCount;
  if (index < 3 * kBottleneckKernels) return bottleneck_kernel(index);
  index -= 3 * kBottleneckKernels;
  if (index < kStatisticsKernelCount) return statistics_kernel(index);
  index -= kStatisticsKernelCount;
  if (index < 3 * kTrainingKernels) return training_kernel(index);
  index -= 3 * kTrainingKernels;
  if (index < kAllTrainingNhwc) return training_nhwc_kernel(index);
  index -= kAllTrainingNhwc;
  if (index < kNhwcKernelCount) return nhwc_kernel(index);
  index -= kNhwcKernelCount;
  return index < kNchwKernelCount ? nchw_kernel(index) : kLayout[index - kNchwKernelCount];
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

const char* allow_shared_memory(int index, const void* function) {
  constexpr int kMaxDevices = 64;
  static std::atomic<bool> done[kSharedMemoryKernels][kMaxDevices];
  int device = 0, bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess && device < kMaxDevices && done[index][device].load(std::memory_order_relaxed)) {
    return nullptr;  // asking again isn't free
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  }
  if (error == cudaSuccess) {
    error =
        cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  }
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (device < kMaxDevices) done[index][device].store(true, std::memory_order_relaxed);
  return nullptr;
}

const char* kernel_params(const GhostForwardParams& params, const LaunchPlan& plan, KernelParams* out) {
  if (plan.block_c == 0) return "no tile fits the device's shared memory";
  KernelParams p{params, plan, vector_widths(params, plan)};
  if (!narrow(params.x, &p.x) || !narrow(params.out, &p.out) || !narrow(params.residual, &p.residual) ||
      !narrow(params.output_gate, &p.output_gate)) {
    return "a stride within an image is beyond 2^31 elements";
  }
  const int element = element_size(params.shape.path);
  p.x_row = reciprocal_of(plan.block_k * element / p.width.x);
  p.weight_row = reciprocal_of(plan.block_k * element / p.width.primary_weight);
  *out = p;
  return nullptr;
}

static const char* launch_general(const GhostForwardParams& params, const LaunchPlan& plan, void* stream) {
  if (params.shape.window_stride > 0) {
    return "primary_weight: expected 1×1, or 3×3 for float16 or bfloat16 in NCHW, of ratio 2, to a width of 8 or "
           "another multiple of 4 up to 512, without gates and residual; got another 3×3";
  }
  KernelParams p;
  if (const char* error = kernel_params(params, plan, &p)) return error;
  const int index = kernel_index(params.shape);
  const void* function = kernel_at(index).function;
  if (const char* error = allow_shared_memory(index, function)) return error;
  void* arguments[] = {&p};
  const cudaError_t error = cudaLaunchKernel(function, dim3(static_cast<unsigned>(plan.grid)), dim3(plan.threads),
                                             arguments, plan.smem_bytes, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* launch_forward(const GhostForwardParams& params, const ForwardPlan& plan, void* stream) {
  switch (choose(params, plan)) {
    case Family::kNhwc:
      return launch_nhwc(params, plan.nhwc, stream);
    case Family::kNchw:
      return launch_nchw(params, plan.nchw, stream);
    default:
      return launch_general(params, plan.general, stream);
  }
}

const char* kernel_attributes(int index, KernelAttributes* out) {
  const Kernel& kernel = kernel_of_all(index);
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
