// The kernels that copy maps from one layout to the other: plans, launches, and what the kernels get. No Torch.
#pragma once

#include "cuda/launch.h"

namespace ghostfused {

constexpr int kLayoutThreads = 256;
constexpr int kWordsOfColumn = 32;  // of a tile in shared memory, and of what a thread loads: 8 × 16 bytes of a row
constexpr int kVectorsOfRow = 8, kVectorOfLayout = 16;

// Of each image, the matrix [row][column] as [column][row]. Rows and columns are channels and pixels, or the reverse.
struct LayoutParams {
  const void* from;
  void* to;
  int64_t from_image, from_row, to_image, to_row;  // elements from one to the next
  int images, rows, columns;
  int from_vector, to_vector;  // elements of a load and of a store
  int64_t tiles;               // of all images
  Reciprocal by_column_tiles;
  int image_tiles;
};

// Fills in what follows from pointers, sizes and strides, and queues the kernel. Returns null, or what went wrong.
const char* launch_layout(LayoutParams& params, int element, void* stream);

constexpr int kLayoutKernels = 2;  // elements of 2 bytes, of 4
extern const Kernel kLayout[kLayoutKernels];

}  // namespace ghostfused
