// Plans and launches of the training kernels.
#include "cuda/training/training.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

namespace ghostfused {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int kBlocksPerSm = 8;  // of a grid at most, as far as channels allow: each adds a row to combine
constexpr int kLeastRounds = 4;  // cells of a thread, before there are more rows
constexpr const char* kManyPixels = "an image of about 2^31 pixels or more";

int paths_index(Path path) { return path == Path::kFloat16 ? 0 : path == Path::kBFloat16 ? 1 : 2; }

// Of the stencils.
bool takes_any_size(const GhostShape& s) { return s.dw_size != 3 || !s.channels_last; }

int kernel_index(TrainingStep step, const GhostShape& s) {
  const int index = static_cast<int>(step);
  if (index < 2) return index * 2 + s.channels_last;
  return 4 + (index - 2) * 2 + takes_any_size(s);
}

const char* queue(const void* function, int64_t grid, int threads, int smem_bytes, unsigned* counters,
                  int counter_count, void** arguments, void* stream) {
  if (grid > INT32_MAX) return "more than 2^31 - 1 blocks";
  cudaError_t error = cudaSuccess;
  if (counters != nullptr) {
    error = cudaMemsetAsync(counters, 0, counter_count * sizeof(unsigned), static_cast<cudaStream_t>(stream));
  }
  if (error == cudaSuccess) {
    error = cudaLaunchKernel(function, dim3(static_cast<unsigned>(grid)), dim3(threads), arguments, smem_bytes,
                             static_cast<cudaStream_t>(stream));
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Whether cells can be loaded and stored as vectors: of channels in channels_last, else of columns.
bool vectors_fit(const GhostShape& s, const TrainingMaps& maps, int channels, bool elementwise) {
  const int element = element_size(s.path), vector = s.channels_last ? channels : kCellColumns;
  for (const void* map :
       {static_cast<const void*>(maps.out), static_cast<const void*>(maps.product), static_cast<const void*>(maps.y2),
        static_cast<const void*>(maps.dz1), static_cast<const void*>(maps.dz2), maps.grad, maps.y1}) {
    if (common_vector(vector, element, map, {}) < vector) return false;
  }
  if (!s.channels_last) return s.width % vector == 0;
  const bool neighbours = elementwise || s.ratio == 2 || channels == 1;  // neighbours stem from neighbours
  return neighbours && s.init_channels % vector == 0 && s.out_channels % vector == 0;
}

// Of the kernels that take everything.
TrainingPlan plan_cells(TrainingStep step, const TrainingParams& params, int sm_count) {
  const GhostShape& s = params.args.shape;
  const bool elementwise = is_elementwise(step);
  const bool cheap = step == TrainingStep::kCheapStatistics || step == TrainingStep::kCheapBackward;
  const int64_t channels = cheap ? int64_t{s.init_channels} * (s.ratio - 1) : s.init_channels;
  const bool any_size = !elementwise && takes_any_size(s);
  const int vector = cell_channels(elementwise ? kElementwiseBytes : kStencilBytes, s.channels_last && !any_size,
                                   element_size(s.path));
  TrainingPlan p{};
  p.kernel = &training_kernel(paths_index(s.path) * kTrainingKernels + kernel_index(step, s));
  p.threads = kTrainingThreads;
  p.row_groups = static_cast<int>(ceil_div(s.width, kCellColumns));
  p.image_cells = static_cast<int>(int64_t{s.height} * p.row_groups);  // launch_training refuses what overflows
  p.cells = int64_t{s.batch} * s.height * p.row_groups;
  if (s.channels_last) {
    p.block_c = static_cast<int>(ceil_div(ceil_div(channels, ceil_div(channels, kMaxBlockChannels)), vector) * vector);
  } else {  // planes side by side, if one has too few cells for a block
    for (p.block_c = 1; p.block_c < kMaxBlockChannels && p.block_c < channels; p.block_c *= 2) {
      if (kTrainingThreads / p.block_c <= p.cells) break;
    }
  }
  p.channel_blocks = static_cast<int>(ceil_div(channels, p.block_c));
  if (step == TrainingStep::kNormalize) {
    p.channel_blocks += static_cast<int>(ceil_div(s.out_channels - s.init_channels, p.block_c));
  }
  p.passes = 1;
  if (step == TrainingStep::kPrimaryBackward && params.weight_gradient != nullptr) {
    p.passes = (s.ratio - 1) * (any_size ? s.dw_size : 1);
  }
  const int64_t together = kTrainingThreads / (p.block_c / vector);
  const int64_t wanted = ceil_div(int64_t{kBlocksPerSm} * sm_count, int64_t{p.channel_blocks} * p.passes);
  const int64_t rows = std::clamp<int64_t>(ceil_div(p.cells, together * kLeastRounds), 1, wanted);
  p.row_cells = ceil_div(ceil_div(p.cells, rows), together) * together;
  p.rows = RowGroups::of(static_cast<int>(ceil_div(p.cells, p.row_cells)));
  p.vector = !any_size && vectors_fit(s, params.maps, vector, elementwise);
  const int values = step == TrainingStep::kPrimaryBackward ? 3 + (any_size ? kPassSums<0> : kPassSums<3>)
                     : elementwise                          ? 0
                                                            : 3;
  p.partial = p.passes * p.rows.partial(values * channels);
  p.counters = p.rows.counters(p.passes * p.channel_blocks);
  return p;
}

}  // namespace

const Kernel& training_kernel(int index) {
  const Kernel* tables[] = {kFloat16Training, kBFloat16Training, kFloat32Training};
  return tables[index / kTrainingKernels][index % kTrainingKernels];
}

const Kernel& statistics_kernel(int index) {
  const Kernel* tables[] = {kFloat16Statistics, kBFloat16Statistics, kTF32Statistics, kFloat32Statistics};
  return tables[index / 2][index % 2];
}

TrainingPlan plan_training(TrainingStep step, const TrainingParams& params, int sm_count) {
  if (nhwc_fits(step, params)) return plan_nhwc(step, params, sm_count);
  return plan_cells(step, params, sm_count);
}

const char* launch_training(TrainingStep step, TrainingParams& p, void* stream) {
  const GhostShape& s = p.args.shape;
  if (int64_t{s.height} * p.plan.row_groups > INT32_MAX / 2) return kManyPixels;
  if (!narrow(p.args.residual, &p.residual) || !narrow(p.args.output_gate, &p.output_gate)) {
    return "a stride within an image is beyond 2^31 elements";
  }
  const int64_t grid = int64_t{p.plan.channel_blocks} * p.plan.passes * p.plan.rows.rows;
  void* arguments[] = {&p};
  if (step == TrainingStep::kPrimaryStatistics) {
    const int index = kFirstTrainingNhwc + p.plan.primary.index;
    if (const char* error = allow_shared_memory(index, p.plan.kernel->function)) return error;
  }
  return queue(p.plan.kernel->function, grid, p.plan.threads, p.plan.smem_bytes, p.counters, p.plan.counters, arguments,
               stream);
}

StatisticsPlan plan_statistics(const GhostForwardParams& params, const LaunchPlan& plan) {
  StatisticsPlan s{};
  s.tiles = int64_t{params.shape.batch} * plan.tiles_h * plan.tiles_w;
  const int64_t rows = ceil_div(int64_t{plan.blocks_per_sm} * params.shape.sm_count, plan.channel_blocks);
  s.row_tiles = ceil_div(s.tiles, std::min(s.tiles, rows));
  s.rows = RowGroups::of(static_cast<int>(ceil_div(s.tiles, s.row_tiles)));
  s.partial = s.rows.partial(3 * int64_t{params.shape.init_channels});
  s.counters = s.rows.counters(plan.channel_blocks);
  return s;
}

const char* launch_statistics(const GhostForwardParams& params, const LaunchPlan& plan, StatisticsParams& s,
                              void* stream) {
  KernelParams p;
  const int index = static_cast<int>(params.shape.path) * 2 + params.shape.channels_last;
  const void* function = statistics_kernel(index).function;
  if (const char* error = kernel_params(params, plan, &p)) return error;
  if (const char* error = allow_shared_memory(kGhostKernelCount + index, function)) return error;
  void* arguments[] = {&p, &s};
  return queue(function, int64_t{s.plan.rows.rows} * plan.channel_blocks, plan.threads, plan.smem_bytes + kScratchBytes,
               s.counters, s.plan.counters, arguments, stream);
}

}  // namespace ghostfused
