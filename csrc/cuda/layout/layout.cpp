#include "cuda/layout/layout.h"

#include <cuda_runtime_api.h>

#include <cstdint>

namespace ghostfused {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whole vectors, halves of them, or single elements.
int width_of(int element, const void* data, int64_t row, int64_t image, int64_t length) {
  const int full = kVectorOfLayout / element, fits = common_vector(full, element, data, {row, image, length});
  return fits * 2 >= full ? fits : 1;
}

}  // namespace

const char* launch_layout(LayoutParams& p, int element, void* stream) {
  const int64_t row_tiles = ceil_div(p.rows, kWordsOfColumn * 4 / element);
  const int64_t column_tiles = ceil_div(p.columns, kVectorsOfRow * kVectorOfLayout / element);
  if (row_tiles * column_tiles * column_tiles > UINT32_MAX) return "an image of too many pixels and channels";
  p.image_tiles = static_cast<int>(row_tiles * column_tiles);
  p.tiles = p.images * int64_t{p.image_tiles};
  if (p.tiles > INT32_MAX) return "more than 2^31 - 1 blocks";
  p.by_column_tiles = reciprocal_of(static_cast<uint32_t>(column_tiles));
  p.from_vector = width_of(element, p.from, p.from_row, p.from_image, p.columns);
  p.to_vector = width_of(element, p.to, p.to_row, p.to_image, p.rows);
  void* arguments[] = {&p};
  const cudaError_t error = cudaLaunchKernel(kLayout[element == 4].function, dim3(static_cast<unsigned>(p.tiles)),
                                             dim3(kLayoutThreads), arguments, 0, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace ghostfused
