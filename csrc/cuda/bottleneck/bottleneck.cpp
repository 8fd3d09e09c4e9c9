// Plans and launches of the kernels in bottleneck.h.
#include "cuda/bottleneck/bottleneck.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

namespace ghostfused {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int kVectorBytes = 16, kChannelBytes = 256;  // 256: of a pixel, at most, in a block of channels_last
constexpr int kMaxPlanes = 128;
constexpr int kBlocksPerSm = 4;  // that a grid should have, before blocks get more than the least work

// The kernel for that many columns, or kAnyDepthwise.
int depthwise_kernel(const DepthwiseParams& a) {
  if (a.kernel_w > 5 || (a.stride == 2 && a.kernel_w == 1)) return kAnyDepthwise;
  return (a.kernel_w / 2 + (a.stride == 2 ? 2 : 0)) * 2 + a.channels_last;
}

const Kernel& kernel_of(Path path, int index) {
  const int paths = path == Path::kFloat16 ? 0 : path == Path::kBFloat16 ? 1 : 2;
  return bottleneck_kernel(paths * kBottleneckKernels + index);
}

const char* queue(const Kernel& kernel, int64_t grid, int smem_bytes, void* params, void* stream) {
  if (grid > INT32_MAX) return "more than 2^31 - 1 blocks";
  void* arguments[] = {params};
  const cudaError_t error =
      cudaLaunchKernel(kernel.function, dim3(static_cast<unsigned>(grid)), dim3(kBottleneckThreads), arguments,
                       smem_bytes, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

constexpr int kMaxPixels = INT32_MAX - 65536;  // so that the end of a block's share can be counted in 32 bits
constexpr const char* kManyPixels = "an image of about 2^31 pixels or more";
constexpr const char* kLongStride = "a stride within an image is beyond 2^31 elements";

}  // namespace

const Kernel& bottleneck_kernel(int index) {
  const Kernel* tables[] = {kFloat16Bottleneck, kBFloat16Bottleneck, kFloat32Bottleneck};
  return tables[index / kBottleneckKernels][index % kBottleneckKernels];
}

DepthwisePlan plan_depthwise(const DepthwiseParams& a, int sm_count) {
  DepthwisePlan p{};
  const int es = element_size(a.path), full = kVectorBytes / es;
  p.kernel = depthwise_kernel(a);
  if (a.channels_last) {
    p.x_vector = common_vector(full, es, a.x.data, {a.channels, a.x.stride_n, a.x.stride_h, a.x.stride_w});
    p.x_vector = common_vector(p.x_vector, es, a.out.data, {});
    if (p.x_vector < full / 2) p.kernel = kAnyDepthwise;
  }
  if (p.kernel == kAnyDepthwise) {
    p.x_vector = p.out_vector = 1;
    p.columns = 4;
  } else if (a.channels_last) {
    p.out_vector = p.x_vector;
    p.columns = 4;
    p.split_weights = p.x_vector == 8;
  } else {
    const bool dense = a.x.stride_w == 1 || a.width == 1;
    p.x_vector = dense ? common_vector(full, es, a.x.data, {a.width, a.x.stride_n, a.x.stride_c, a.x.stride_h}) : 1;
    p.columns = 8 / a.stride;
    p.out_vector = common_vector(std::min(full, p.columns), es, a.out.data, {a.out_width});
  }
  p.row_groups = static_cast<int>(ceil_div(a.out_width, p.columns));
  const int64_t positions = int64_t{a.out_height} * p.row_groups;
  int together;  // positions that a block's threads take at once
  if (a.channels_last) {
    const int64_t blocks = ceil_div(a.channels, kChannelBytes / es);
    p.block_c = static_cast<int>(ceil_div(ceil_div(a.channels, blocks), full) * full);
    together = kBottleneckThreads / static_cast<int>(ceil_div(std::min(p.block_c, a.channels), p.x_vector));
  } else {
    p.block_c =
        static_cast<int>(std::clamp<int64_t>(kBottleneckThreads / positions, 1, std::min(kMaxPlanes, a.channels)));
    together = kBottleneckThreads / p.block_c;
  }
  p.channel_blocks = static_cast<int>(ceil_div(a.channels, p.block_c));
  // More positions for a block load its parameters less often; fewer leave no SM without work, and have loads under way
  // while others compute.
  const int64_t images = int64_t{a.batch} * p.channel_blocks;
  const int64_t of_position = a.kernel_h * (int64_t{a.kernel_w} * 32 + 100) + 100, taps = a.kernel_h * a.kernel_w;
  const int64_t of_block = 8 * (100 + ceil_div(taps * p.block_c, kBottleneckThreads) * 20);
  double best = 0;
  for (int halves = 16; halves > 0; halves /= 2) {  // of what the threads take at once
    const int64_t blocks = ceil_div(positions, std::max<int64_t>(1, int64_t{together} * halves / 2));
    const int64_t block_p = ceil_div(positions, blocks), grid = images * ceil_div(positions, block_p);
    const double waves = static_cast<double>(ceil_div(grid, sm_count));
    const int64_t warps = ceil_div(block_p * kBottleneckThreads / 32, together);
    const double cost = waves * (of_block + warps * of_position) * (1 + 0.1 / std::min<double>(waves, kBlocksPerSm));
    if (best == 0 || cost < best) best = cost, p.block_p = static_cast<int>(block_p), p.grid = grid;
  }
  p.position_blocks = static_cast<int>(ceil_div(positions, p.block_p));
  p.smem_bytes = (a.kernel_h * a.kernel_w + 3) * p.block_c * static_cast<int>(sizeof(float));
  return p;
}

const char* launch_depthwise(const DepthwiseParams& a, const DepthwisePlan& plan, void* stream) {
  if (int64_t{a.out_height} * plan.row_groups > kMaxPixels) return kManyPixels;
  DepthwiseKernelParams p{a, plan, {}, {}};
  if (!narrow(a.x, &p.x) || !narrow(a.out, &p.out)) return kLongStride;
  return queue(kernel_of(a.path, plan.kernel), plan.grid, plan.smem_bytes, &p, stream);
}

SqueezeExcitePlan plan_squeeze_excite(const SqueezeExciteParams& a, int sm_count) {
  SqueezeExcitePlan p{};
  const int es = element_size(a.path), full = kVectorBytes / es;
  const int64_t pixels = int64_t{a.height} * a.width;
  p.flat = a.height == 1 || a.x.stride_h == a.width * a.x.stride_w;
  p.channels_adjacent = a.x.stride_c == 1 && a.channels > 1;
  if (p.channels_adjacent) {
    p.x_vector = common_vector(full, es, a.x.data, {a.channels, a.x.stride_n, a.x.stride_h, a.x.stride_w});
  } else {
    const bool dense = p.flat && (a.x.stride_w == 1 || pixels == 1);
    p.x_vector = dense ? common_vector(full, es, a.x.data, {pixels, a.x.stride_n, a.x.stride_c}) : 1;
  }
  const auto matrix_vector = [&](const Matrix& m, int columns) {
    return m.stride_col == 1 ? common_vector(full, es, m.data, {columns, m.stride_row}) : 1;
  };
  p.reduce_vector = matrix_vector(a.reduce, a.channels);
  p.expand_vector = matrix_vector(a.expand, a.reduced);

  p.channel_blocks = static_cast<int>(ceil_div(a.channels, kSqueezeC));
  // Few channels make few blocks, unless images are apart.
  for (p.images = kMaxImages; p.images > 1 && ceil_div(a.batch, p.images) * p.channel_blocks < sm_count;) p.images /= 2;
  p.image_threads = kBottleneckThreads / p.images;
  const int64_t groups = ceil_div(a.batch, p.images);
  // A block has 256 pixels at least, so that its product with the weights doesn't cost more than its sums.
  const int64_t wanted = ceil_div(int64_t{kBlocksPerSm} * sm_count, groups * p.channel_blocks);
  p.chunk = static_cast<int>(ceil_div(std::clamp<int64_t>(ceil_div(pixels, wanted), 256, 2048), 8) * 8);
  p.chunks = static_cast<int>(ceil_div(pixels, p.chunk));
  p.chunk = static_cast<int>(ceil_div(ceil_div(pixels, p.chunks), 8) * 8);  // all alike
  p.squeeze_grid = groups * p.channel_blocks * p.chunks;
  p.parts = static_cast<int>(p.squeeze_grid / groups);
  // What a thread issues: blocks of many rows add up the parts of the hidden layer less often.
  const int64_t hidden = ceil_div(int64_t{p.images} * a.reduced, kBottleneckThreads) * (4 * p.parts + 50);
  const int64_t row = ceil_div(a.reduced, 8 * p.expand_vector) * (5 * p.expand_vector + 10) + 20;
  int64_t best = INT64_MAX;
  for (int rows = kMaxExciteRows; rows > 0; rows /= 2) {
    const int64_t grid = groups * ceil_div(a.channels, int64_t{rows} * kExciteRowC);
    const int64_t cost = ceil_div(grid, sm_count) * (hidden + rows * row);
    if (cost < best) best = cost, p.excite_c = rows * kExciteRowC, p.excite_grid = grid;
  }
  return p;
}

const char* launch_squeeze_excite(const SqueezeExciteParams& a, const SqueezeExcitePlan& plan, float* parts,
                                  void* stream) {
  if (int64_t{a.height} * a.width > kMaxPixels) return kManyPixels;
  SqueezeExciteKernelParams p{a, plan, {}, parts};
  if (!narrow(a.x, &p.x)) return kLongStride;
  const char* error =
      queue(kernel_of(a.path, kDepthwiseKernels + plan.channels_adjacent), plan.squeeze_grid, 0, &p, stream);
  return error != nullptr ? error : queue(kernel_of(a.path, kDepthwiseKernels + 2), plan.excite_grid, 0, &p, stream);
}

}  // namespace ghostfused
