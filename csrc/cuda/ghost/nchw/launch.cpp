// Queues the NCHW kernel (forward.cuh).
#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/ghost/nchw/nchw.h"

namespace ghostfused {
namespace {

// Of all paths in their order, and of each in nchw.h's.
constexpr int kFirstTF32 = 2 * kNchwKernelsPerPath, kFirstFloat32 = kFirstTF32 + kNchwTF32Kernels;
static_assert(kNchwKernelCount == kFirstFloat32 + kNchwFloat32Kernels);

int kernel_index(const GhostShape& s, const NchwPlan& p) {
  const int map = static_cast<int>(p.map), narrower = map - static_cast<int>(NchwMap::kWide4);
  if (p.path == Path::kTF32) return kFirstTF32 + narrower;
  if (p.path == Path::kFloat32) return kFirstFloat32 + (s.full ? kNchwTF32Kernels : 0) + narrower;
  const int path = s.path == Path::kFloat16 ? 0 : kNchwKernelsPerPath;
  if (s.dw_size == 5) return path + kNchwPlain + kNchwFull3 + map;
  if (s.full) return path + kNchwPlain + map;
  const bool many = p.map == NchwMap::kWide8 ? p.tiles > 1 : p.map != NchwMap::kSeven && p.tiles > 2;
  return path + 2 * map + many;
}

// Vectors of 8 or 4 numbers per row of a chunk, if all rows of x are made of them.
WindowReads window_reads(const GhostForwardParams& a) {
  if (a.shape.window_stride == 0) return WindowReads::kNone;
  const int vector = a.stride == 2 ? 8 : 4;
  bool vectors = a.stride <= 2 && a.dilation == 1 && a.x.stride_w == 1 && a.x_width % vector == 0 &&
                 reinterpret_cast<uintptr_t>(a.x.data) % (2 * vector) == 0;
  for (const int64_t stride : {a.x.stride_n, a.x.stride_c, a.x.stride_h}) vectors = vectors && stride % vector == 0;
  return !vectors ? WindowReads::kNumbers : a.stride == 2 ? WindowReads::kVectors2 : WindowReads::kVectors1;
}

}  // namespace

const Kernel& nchw_kernel(int index) {
  if (index >= kFirstFloat32) return kFloat32NchwKernels[index - kFirstFloat32];
  if (index >= kFirstTF32) return kTF32NchwKernels[index - kFirstTF32];
  return (index < kNchwKernelsPerPath ? kFloat16NchwKernels : kBFloat16NchwKernels)[index % kNchwKernelsPerPath];
}

const char* launch_nchw(const GhostForwardParams& args, const NchwPlan& plan, void* stream) {
  NchwParams p{args, plan};
  if (!narrow(args.x, &p.x) || !narrow(args.out, &p.out) || !narrow(args.residual, &p.residual) ||
      !narrow(args.output_gate, &p.output_gate)) {
    return "a stride within an image is beyond 2^31 elements";
  }
  const GhostShape& s = args.shape;
  p.by_columns = SmallDivisor(plan.row_chunks);
  p.by_strips = SmallDivisor(plan.tile_h / plan.strip_h);
  const uint32_t bytes = element_size(plan.path);
  for (int i = 0; i < 4; ++i) p.x_planes[i] = bytes * p.x.stride_c * (i < 3 ? i + 1 : nchw_step(plan.path));
  for (int i = 0; i < 8; ++i) p.out_halves[i] = bytes * p.out.stride_c * 8 * i;
  p.out_plane = bytes * p.out.stride_c;
  p.out_row = bytes * p.out.stride_h;
  const uint32_t minus_infinity = bytes == 4 ? 0xff800000 : s.path == Path::kFloat16 ? 0xfc00fc00 : 0xff80ff80;
  p.primary_floor = args.primary.act == Act::kReLU ? 0 : minus_infinity;
  p.cheap_floor = args.cheap.act == Act::kReLU ? 0 : minus_infinity;
  p.window_reads = window_reads(args);
  const int index = kernel_index(s, plan);
  const void* function = nchw_kernel(index).function;
  const int first = kGhostKernelCount + kStatisticsKernelCount + kNhwcKernelCount;
  if (const char* error = allow_shared_memory(first + index, function)) return error;
  void* arguments[] = {&p};
  const dim3 grid(plan.channel_blocks, plan.tiles_h, s.batch);
  const cudaError_t error = cudaLaunchKernel(function, grid, dim3(32 * plan.warps), arguments, plan.smem_bytes,
                                             static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace ghostfused
