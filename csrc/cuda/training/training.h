// The CUDA kernels of training, all but the first: plans, launches, and what the kernels get. No Torch.
// docs/training.md says what each computes.
#pragma once

#include "cuda/launch.h"

namespace ghostfused {

enum class TrainingStep : int { kNormalize, kNormalizeBackward, kCheapStatistics, kCheapBackward, kPrimaryBackward };

constexpr int kTrainingThreads = 256, kMaxBlockChannels = 64;

// A thread's cell: so many neighbouring columns of one row, times so many channels, neighbours in channels_last: of 4
// bytes, or 8 for a step without a depthwise conv (dw_size 0). More channels with a large window would spill.
constexpr int kCellColumns = 4;
constexpr int cell_channels(int dw_size, bool channels_last, int element_size) {
  return !channels_last || dw_size >= 5 ? 1 : (dw_size == 0 ? 8 : 4) / element_size;
}

// A block has block_c channels and a row: consecutive cells, of one image or several.
struct TrainingPlan {
  int block_c, channel_blocks;
  int passes;  // of primary_backward: pass r makes the weights' gradient of each primary channel's r-th cheap one
  int row_groups, image_cells;  // cells in a row of pixels, in an image
  int rows;
  int64_t cells, row_cells;  // of all images, of a row of the grid
  bool vector;               // cells are loaded and stored as vectors
  int64_t partial;           // floats of partial results
};

// Maps are dense, in the output's layout; null: absent or not asked for.
struct TrainingMaps {
  void *out, *product, *y2, *dz1, *dz2;
  const void *grad, *y1;
};

struct TrainingParams {
  GhostForwardParams args;
  TrainingMaps maps;
  bool batch_statistics;
  const float* means;  // (2, C)
  TrainingPlan plan;
  DeviceTensor residual, output_gate;
  float* partial;         // [pass][row][value][channel]
  unsigned* counters;     // [pass][channel block]: blocks that have written their row
  float *mean, *var;      // (C,)
  float* sums;            // (3, C)
  void* weight_gradient;  // of cheap_weight, contiguous
};

// A pure function; of the params it reads the shape, the maps and weight_gradient.
TrainingPlan plan_training(TrainingStep step, const TrainingParams& params, int sm_count);

// Queues the kernel on ``stream``. Returns null, or what went wrong.
const char* launch_training(TrainingStep step, TrainingParams& params, void* stream);

// The first kernel, primary_statistics, is ghost/forward.cuh's 1×1 conv and the statistics of its output. A block has
// a plan's tiles, for block_c channels, and a row: consecutive tiles, of one image or several.
struct StatisticsPlan {
  int rows;
  int64_t tiles, row_tiles;  // of all images, of a row of the grid
  int64_t partial;           // floats of partial results
};

struct StatisticsParams {
  StatisticsPlan plan;
  float* partial;      // [row][value][channel]
  unsigned* counters;  // [channel block]
  float *mean, *var;
};

// Shared memory for sums over a block: four of each thread, and a flag.
constexpr int kScratchFloats = 4 * kMaxThreads + 4, kScratchBytes = kScratchFloats * 4;

StatisticsPlan plan_statistics(const GhostForwardParams& params, const LaunchPlan& plan);
const char* launch_statistics(const GhostForwardParams& params, const LaunchPlan& plan, StatisticsParams& statistics,
                              void* stream);

// Index: the two elementwise steps by layout, then the other three by (size of the depthwise conv, layout).
constexpr int kTrainingKernels = 2 * 2 + 3 * 4 * 2;
extern const Kernel kFloat16Training[kTrainingKernels];
extern const Kernel kBFloat16Training[kTrainingKernels];
extern const Kernel kFloat32Training[kTrainingKernels];
const Kernel& training_kernel(int index);  // of all, path by path

extern const Kernel kFloat16Statistics[2];
extern const Kernel kBFloat16Statistics[2];
extern const Kernel kTF32Statistics[2];
extern const Kernel kFloat32Statistics[2];
const Kernel& statistics_kernel(int index);  // of all, path by path

}  // namespace ghostfused
