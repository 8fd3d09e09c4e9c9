// What the ops' Torch sides share: the device, plans, outputs and the stream. Defined in binding.cpp.
#pragma once

#include "common/arguments.h"
#include "common/python.h"

namespace ghostfused {

struct Device {
  int sm_count, smem_per_block, smem_per_sm;
};

// What plans are made for instead of the real device, for tests; sm_count 0: nothing.
extern Device pretended_device;

// For tests: no family of kernels but the general one.
extern bool general_only;

const Device& current_device(int32_t index);
void describe(GhostShape& shape, const Device& device, bool channels_last);
const ForwardPlan& cached_plan(const GhostShape& shape);
Tensor new_output(std::initializer_list<int64_t> sizes, ScalarType dtype, int32_t device, bool channels_last = false);
Tensor4 map_of(const Tensor& t);
void check_pixels(int64_t height, int64_t width);
void* current_stream(int32_t device);
int32_t cuda_device(const Tensor& x);  // fails if x is on none
void drop_unused_ghosts(GhostShape& shape);
void bind_introspection(py::module_& m);

}  // namespace ghostfused
