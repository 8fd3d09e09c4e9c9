// Takes the place of Torch's header of this name.
#pragma once

#include "torch/csrc/stable/tensor.h"

namespace torch::stable {

inline uint32_t thread_count = 1;
inline uint32_t get_num_threads() { return thread_count; }

// Of a matrix, or of a 1×1 convolution's weight.
inline Tensor contiguous(const Tensor& t) {
  std::vector<int64_t> strides(t.dim(), 1);
  for (int64_t d = t.dim() - 1; d > 0; --d) strides[d - 1] = strides[d] * t.size(d);
  AtenTensorHandle made = nullptr;
  aoti_torch_empty_strided(t.dim(), t.sizes().data(), strides.data(), static_cast<int32_t>(t.scalar_type()), 0, 0,
                           &made);
  const int64_t element = made->element();
  for (int64_t i = 0; i < t.size(0); ++i) {
    for (int64_t j = 0; j < t.size(1); ++j) {
      std::memcpy(made->storage->data + (i * t.size(1) + j) * element,
                  static_cast<char*>(t.data_ptr()) + (i * t.stride(0) + j * t.stride(1)) * element, element);
    }
  }
  return Tensor(made);
}

}  // namespace torch::stable
