// The CUDA kernels of training, all but the first: plans, launches, and what the kernels get. No Torch.
// docs/training.md says what each computes.
#pragma once

#include "cuda/launch.h"

namespace ghostfused {

enum class TrainingStep : int {
  kNormalize,
  kNormalizeBackward,
  kCheapStatistics,
  kCheapBackward,
  kPrimaryBackward,
  kPrimaryStatistics,  // if nhwc_fits; else launch_statistics is for it
};
constexpr bool is_elementwise(TrainingStep s) {
  return s == TrainingStep::kNormalize || s == TrainingStep::kNormalizeBackward;
}

constexpr int kTrainingThreads = 256, kMaxBlockChannels = 64;

// A thread's cell: so many neighbouring columns of one row, times so many channels, neighbours in channels_last: of 8
// bytes, or 4 for a step with a depthwise conv. More channels with a large window would spill.
constexpr int kCellColumns = 4, kElementwiseBytes = 8, kStencilBytes = 4;
constexpr int cell_channels(int bytes, bool channels_last, int element_size) {
  return channels_last ? bytes / element_size : 1;
}

// What a kernel is compiled for; kEither reads it from the shape, and has no vectors.
enum class Layout : int { kNchw, kNhwc, kEither };

// The depthwise conv is 3×3 in channels_last, or else any size up to this, by kernels that read size and layout from
// the shape.
constexpr int kMaxTrainingSize = 7;
// Sums that one pass of primary_backward makes for the weights' gradient: all taps, or (kD = 0: any size) a row of
// them.
template <int kD>
constexpr int kPassSums = kD > 0 ? kD * kD : kMaxTrainingSize;

// Rows of partial results are combined by groups of about √rows, then the groups: a chain of 2 √rows additions, no
// more.
struct RowGroups {
  int rows, group_rows, groups;

  static constexpr RowGroups of(int rows) {
    int group_rows = 1;
    while (int64_t{group_rows} * group_rows < rows) ++group_rows;
    return {rows, group_rows, (rows + group_rows - 1) / group_rows};
  }
  // For ``parts`` (passes and channel blocks) apart: a counter a group, and one for the groups.
  constexpr int counters(int parts) const { return parts * (groups + 1); }
  // Floats of partial results, of ``values`` numbers a row.
  constexpr int64_t partial(int64_t values) const { return (int64_t{rows} + groups) * values; }
};

// The elementwise kernels by pixels (pixels.cuh): a row of the grid has row_pixels of all images.
constexpr int kPixelsTogether = 4;
constexpr int kPixelBlocksPerSm[] = {4, 3};  // normalize, normalize_backward: by registers
constexpr int kPixelChannels = 512;          // of a block, at most

struct PixelPlan {
  int positions;  // threads of the same channels
  int pixels, row_pixels;
  Reciprocal by_lanes, by_channel_blocks;
};

// The strip kernels (strip.cuh): a thread has two channels and kStripColumns columns of a strip of strip_h rows; a row
// of the grid has row_strips consecutive strips of all images.
constexpr int kStripThreads = 128, kStripColumns = 7;
constexpr int kStripChannels = 128;             // of a block, at most
constexpr int kStripBlocksPerSm[] = {4, 3, 2};  // cheap_statistics, cheap_backward, primary_backward: by registers

struct StripPlan {
  int positions;  // threads of the same channels
  int strip_h, strips, row_strips;
  uint32_t pixel, out_pixel;  // bytes from a pixel to the next: in a map of Cp channels, in out and grad
  Reciprocal by_lanes, by_columns, by_strips,
      by_channel_blocks;  // strips side by side, and in an image one above another
};

// primary_statistics_nhwc (primary_nhwc.cuh): a row of the grid has row_pixels of all images.
constexpr int kPrimaryWarps = 4, kPrimaryThreads = 32 * kPrimaryWarps;
constexpr int kMmaPixels = 8, kPixelTiles = 4;                          // pixels of a tile, tiles of a warp at once
constexpr int kFragmentBytes = 512;                                     // of 16 channels and 16 input channels
constexpr int kZeroWords = 4;                                           // that are zero, before the counters
constexpr int kPrimaryTiles = 4, kPrimaryBlocksPerSm[] = {4, 4, 3, 3};  // channel tiles of a warp; by their number

struct PrimaryPlan {
  int index;     // of the kernel, among both types'
  int warps_n;   // side by side along the channels
  int k_blocks;  // of 32 input channels
  int pixels, row_pixels;
  uint32_t x_pixel, out_pixel;  // bytes from a pixel to the next
};

// A block has block_c channels and a row: consecutive cells, of one image or several.
struct TrainingPlan {
  const Kernel* kernel;
  int threads;
  int block_c, channel_blocks;
  int passes;  // of primary_backward: for each of the cheap channels of a primary one (any size: and for each row)
  int row_groups, image_cells;  // cells in a row of pixels, in an image
  RowGroups rows;
  int64_t cells, row_cells;  // of all images, of a row of the grid
  bool vector;               // cells are loaded and stored as vectors
  int64_t partial;           // floats of partial results
  int counters;
  PixelPlan pixel;  // if the kernel is one of those
  StripPlan strip;  // likewise
  PrimaryPlan primary;
  int smem_bytes;
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
  float* partial;         // [pass][row, then group][value][channel]
  unsigned* counters;     // [pass][channel block][group, then all]: blocks that have written their row, or group
  float *mean, *var;      // (C,)
  float* sums;            // (3, C)
  void* weight_gradient;  // of cheap_weight, contiguous
};

// Whether the kernels for channels_last compute a step (pixels or strips), and their plan.
bool nhwc_fits(TrainingStep step, const TrainingParams& params);
TrainingPlan plan_nhwc(TrainingStep step, const TrainingParams& params, int sm_count);

// Which kernel runs, and how: a pure function. Of the params it reads args, the maps, batch_statistics, sums
// and weight_gradient.
TrainingPlan plan_training(TrainingStep step, const TrainingParams& params, int sm_count);

// Queues the kernel on ``stream``. Returns null, or what went wrong.
const char* launch_training(TrainingStep step, TrainingParams& params, void* stream);

// The first kernel, primary_statistics, is ghost/forward.cuh's 1×1 conv and the statistics of its output. A block has
// a plan's tiles, for block_c channels, and a row: consecutive tiles, of one image or several.
struct StatisticsPlan {
  RowGroups rows;
  int64_t tiles, row_tiles;  // of all images, of a row of the grid
  int64_t partial;           // floats of partial results
  int counters;
};

struct StatisticsParams {
  StatisticsPlan plan;
  float* partial;  // as TrainingParams has them
  unsigned* counters;
  float *mean, *var;
};

// Shared memory for sums over a block: four of each thread, and a flag.
constexpr int kScratchFloats = 4 * kMaxThreads + 4, kScratchBytes = kScratchFloats * 4;

StatisticsPlan plan_statistics(const GhostForwardParams& params, const LaunchPlan& plan);
const char* launch_statistics(const GhostForwardParams& params, const LaunchPlan& plan, StatisticsParams& statistics,
                              void* stream);

// Index: the two elementwise steps by layout, then the other three, each 3×3 in channels_last and any size in both.
constexpr int kTrainingKernels = 2 * 2 + 3 * 2;
extern const Kernel kFloat16Training[kTrainingKernels];
extern const Kernel kBFloat16Training[kTrainingKernels];
extern const Kernel kFloat32Training[kTrainingKernels];
const Kernel& training_kernel(int index);  // of all, path by path

// Index: the steps in their order, elementwise by channels of a vector (of 8 bytes, 16), the stencils by whether
// strips' columns end beyond the image, the last by its channel tiles. fp32 has one of each stencil, and none of the
// last.
constexpr int kTrainingNhwcKernels = 5 * 2 + kPrimaryTiles, kTrainingNhwcFloatKernels = 2 * 2 + 3;
extern const Kernel kFloat16NhwcTraining[kTrainingNhwcKernels];
extern const Kernel kBFloat16NhwcTraining[kTrainingNhwcKernels];
extern const Kernel kFloat32NhwcTraining[kTrainingNhwcFloatKernels];
const Kernel& training_nhwc_kernel(int index);  // of all, path by path

extern const Kernel kFloat16Statistics[2];
extern const Kernel kBFloat16Statistics[2];
extern const Kernel kTF32Statistics[2];
extern const Kernel kFloat32Statistics[2];
const Kernel& statistics_kernel(int index);  // of all, path by path

}  // namespace ghostfused
