// The CUDA kernels for what lies between a bottleneck's Ghost modules: a depthwise conv, and squeeze-and-excite's gate.
// Plans, launches, and what the kernels get. No Torch.
#pragma once

#include "cuda/launch.h"

namespace ghostfused {

constexpr int kBottleneckThreads = 256;

// How a depthwise conv is cut into blocks: one image, block_c channels and block_p positions, each of which is some
// output columns of one row. See depthwise_conv.cuh.
struct DepthwisePlan {
  int kernel;  // of a path: index in the table below
  int block_c, block_p, channel_blocks, position_blocks;
  int columns;               // of output, in a position
  int row_groups;            // positions in a row
  int x_vector, out_vector;  // elements: along the channels for channels_last, else along the columns
  bool split_weights;        // of eight channels, see weight_column
  int smem_bytes;
  int64_t grid;
};

struct DepthwiseKernelParams {
  DepthwiseParams args;
  DepthwisePlan plan;
  DeviceTensor x, out;
};

constexpr int kMaxImages = 4;    // that a block of squeeze-and-excite takes, to read the weights once for all
constexpr int kSqueezeC = 64;    // channels of a block of the first kernel
constexpr int kExciteRowC = 32;  // channels of a block of the second kernel, or two or four times as many
constexpr int kMaxExciteRows = 4;

// How squeeze-and-excite is cut into blocks. See squeeze_excite.cuh.
struct SqueezeExcitePlan {
  int images, image_threads;  // of a block, and the threads that each has
  int chunk, chunks;          // pixels of a block of the first kernel
  int channel_blocks, parts;  // parts = channel_blocks * chunks: blocks whose sums make up the hidden layer
  int excite_c;               // channels of a block of the second kernel
  bool flat;                  // x's rows follow each other without a gap
  bool channels_adjacent;     // x is read along its channels
  int x_vector, reduce_vector, expand_vector;  // elements
  int64_t squeeze_grid, excite_grid;
};

struct SqueezeExciteKernelParams {
  SqueezeExciteParams args;
  SqueezeExcitePlan plan;
  DeviceTensor x;
  float* parts;  // [image][part][reduced]
};

// Pure functions. A grid beyond 2^31 - 1 blocks is for the launch to refuse.
DepthwisePlan plan_depthwise(const DepthwiseParams& params, int sm_count);
SqueezeExcitePlan plan_squeeze_excite(const SqueezeExciteParams& params, int sm_count);

// Queue one kernel and two on ``stream``. They return null, or what went wrong.
const char* launch_depthwise(const DepthwiseParams& params, const DepthwisePlan& plan, void* stream);
const char* launch_squeeze_excite(const SqueezeExciteParams& params, const SqueezeExcitePlan& plan, float* parts,
                                  void* stream);

// Index: the depthwise conv of 1, 3 and 5 columns at stride 1 and of 3 and 5 at stride 2, each by layout; of any number
// of columns; then squeeze in both layouts, then excite.
constexpr int kAnyDepthwise = 10, kDepthwiseKernels = kAnyDepthwise + 1, kBottleneckKernels = kDepthwiseKernels + 3;
extern const Kernel kFloat16Bottleneck[kBottleneckKernels];
extern const Kernel kBFloat16Bottleneck[kBottleneckKernels];
extern const Kernel kFloat32Bottleneck[kBottleneckKernels];
const Kernel& bottleneck_kernel(int index);  // of all, path by path

}  // namespace ghostfused
