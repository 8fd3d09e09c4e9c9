// Takes the place of Torch's header of this name, so that csrc/cpu/ops.h runs with no Torch: tensors on the CPU, of
// which each storage ends where a page ends that nobody may touch.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

class Storage {
 public:
  explicit Storage(int64_t bytes) : bytes(bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE), room = (bytes + page - 1) / page * page;
    size_ = room + page;
    memory_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory_ == MAP_FAILED || mprotect(memory_ + room, page, PROT_NONE)) throw std::bad_alloc();
    data = memory_ + room - (bytes + 3) / 4 * 4;  // bf16 is read in aligned pairs where memory allows
    std::memset(memory_, 0xff, room);             // NaN, whatever the dtype
  }
  Storage(const Storage&) = delete;
  ~Storage() { munmap(memory_, size_); }

  const int64_t bytes;
  char* data;

 private:
  char* memory_;
  int64_t size_;
};

struct AtenTensorOpaque {
  std::vector<int64_t> sizes, strides;
  int64_t offset;
  int32_t dtype;
  std::shared_ptr<Storage> storage;

  int64_t element() const { return dtype == 6 ? 4 : 2; }
};
using AtenTensorHandle = AtenTensorOpaque*;
using AOTITorchError = int32_t;
constexpr AOTITorchError AOTI_TORCH_SUCCESS = 0;

#define TORCH_ERROR_CODE_CHECK(call) \
  if (call) throw std::runtime_error(#call)

// torch's numbers
inline int32_t aoti_torch_dtype_float16() { return 5; }
inline int32_t aoti_torch_dtype_float32() { return 6; }
inline int32_t aoti_torch_dtype_bfloat16() { return 15; }
inline int32_t aoti_torch_device_type_cpu() { return 0; }

inline AOTITorchError aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides,
                                               int32_t dtype, int32_t, int32_t, AtenTensorHandle* made) {
  auto t = std::make_unique<AtenTensorOpaque>();
  t->sizes.assign(sizes, sizes + dims);
  t->strides.assign(strides, strides + dims);
  t->offset = 0;
  t->dtype = dtype;
  int64_t count = 1;
  for (int64_t d = 0; d < dims; ++d) count += (sizes[d] - 1) * strides[d];
  for (int64_t d = 0; d < dims; ++d) count = sizes[d] ? count : 0;
  t->storage = std::make_shared<Storage>(count * t->element());
  *made = t.release();
  return AOTI_TORCH_SUCCESS;
}
inline AOTITorchError aoti_torch_get_device_type(AtenTensorHandle t, int32_t* type) { return *type = 0, !t; }
inline AOTITorchError aoti_torch_get_device_index(AtenTensorHandle t, int32_t* index) { return *index = 0, !t; }
inline AOTITorchError aoti_torch_get_storage_size(AtenTensorHandle t, int64_t* bytes) {
  return *bytes = t->storage->bytes, AOTI_TORCH_SUCCESS;
}
inline AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle t, void** data) {
  return *data = t->storage->data + t->offset * t->element(), AOTI_TORCH_SUCCESS;
}
