// Takes the place of Torch's header of this name.
#pragma once

#include "torch/csrc/inductor/aoti_torch/c/shim.h"

namespace torch::headeronly {
enum class ScalarType : int32_t { Half = 5, Float = 6, BFloat16 = 15 };
}

namespace torch::stable {

class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : it_(handle) {}

  AtenTensorHandle get() const { return it_.get(); }
  bool defined() const { return it_ != nullptr; }
  const std::vector<int64_t>& sizes() const { return it_->sizes; }
  const std::vector<int64_t>& strides() const { return it_->strides; }
  int64_t size(int64_t d) const { return it_->sizes.at(d); }
  int64_t stride(int64_t d) const { return it_->strides.at(d); }
  int64_t dim() const { return static_cast<int64_t>(it_->sizes.size()); }
  int64_t storage_offset() const { return it_->offset; }
  int64_t element_size() const { return it_->element(); }
  headeronly::ScalarType scalar_type() const { return static_cast<headeronly::ScalarType>(it_->dtype); }
  bool is_cpu() const { return true; }
  bool is_cuda() const { return false; }
  void* data_ptr() const { return it_->storage->data + it_->offset * it_->element(); }

  bool is_contiguous() const {
    int64_t expected = 1;
    for (int64_t d = dim() - 1; d >= 0; --d) {
      if (size(d) == 0) return true;
    }
    for (int64_t d = dim() - 1; d >= 0; expected *= size(d--)) {
      if (size(d) != 1 && stride(d) != expected) return false;
    }
    return true;
  }

 private:
  std::shared_ptr<AtenTensorOpaque> it_;
};

}  // namespace torch::stable
