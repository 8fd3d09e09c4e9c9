// The Torch side: the output, the stream, the op's registration (stable ABI, so that one build serves
// torch 2.11 and later), and the Python module, whose functions for plain-data queries are in introspection.cpp.
#include "cuda/binding.h"

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstring>
#include <string>
#include <unordered_map>

#include "common/guard.h"
#include "common/program.h"
#include "cuda/bottleneck/bottleneck.h"

namespace ghostfused {
namespace {

struct ShapeHash {
  size_t operator()(const GhostShape& s) const {
    size_t h = 0;
    for (const int v : {static_cast<int>(s.path), int{s.channels_last}, int{s.input_gate}, int{s.full}, s.window_stride,
                        s.batch, s.in_channels, s.height, s.width, s.init_channels, s.out_channels, s.ratio, s.dw_size,
                        s.sm_count, s.smem_per_block}) {
      h = h * 1000003 + static_cast<size_t>(v);
    }
    return h;
  }
};

}  // namespace

Device pretended_device{};
bool general_only = false;

// Of the current device; asked once per device.
const Device& current_device(int32_t index) {
  if (pretended_device.sm_count > 0) return pretended_device;
  thread_local std::unordered_map<int32_t, Device> known;
  const auto found = known.find(index);
  if (found != known.end()) return found->second;
  Device d{};
  cudaDeviceGetAttribute(&d.sm_count, cudaDevAttrMultiProcessorCount, index);
  cudaDeviceGetAttribute(&d.smem_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  if (cudaDeviceGetAttribute(&d.smem_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index) != cudaSuccess ||
      d.smem_per_sm < d.smem_per_block) {
    d.smem_per_sm = d.smem_per_block + 1024;
  }
  if (d.sm_count <= 0 || d.smem_per_block <= 0) fail("x: the CUDA runtime doesn't describe device ", index);
  return known.emplace(index, d).first->second;
}

// plan_forward takes about a millisecond, so its answers are kept; per thread, so that nothing needs a lock.
const ForwardPlan& cached_plan(const GhostShape& shape) {
  thread_local std::unordered_map<GhostShape, ForwardPlan, ShapeHash> plans;
  auto found = plans.find(shape);
  if (found == plans.end()) {
    if (plans.size() >= 4096) plans.clear();  // a program whose shapes never repeat shouldn't grow without bound
    found = plans.emplace(shape, plan_forward(shape)).first;
  }
  if (!general_only) return found->second;
  thread_local ForwardPlan general;
  general = {found->second.general};
  return general;
}

Tensor new_output(std::initializer_list<int64_t> sizes, ScalarType dtype, int32_t device, bool channels_last) {
  return torch::stable::empty(
      {sizes.begin(), sizes.size()}, dtype, std::nullopt,
      torch::stable::Device(torch::stable::DeviceType::CUDA, device), std::nullopt,
      channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous);
}

Tensor4 map_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

// The kernels count an image's pixels, and the end of a block's share of them, in 32 bits.
void check_pixels(int64_t height, int64_t width) {
  constexpr int64_t kMaxPixels = INT32_MAX - 65536;
  if (height * width > kMaxPixels)
    fail("x: expected at most ", kMaxPixels, " pixels in an image, got ", height * width);
}

void* current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

int32_t cuda_device(const Tensor& x) {
  if (!x.is_cuda()) fail("x: expected a CUDA tensor");
  return x.get_device_index();
}

void describe(GhostShape& s, const Device& device, bool channels_last) {
  s.channels_last = channels_last || (s.height == 1 && s.width == 1);  // one pixel is both, and K is what is contiguous
  s.sm_count = device.sm_count;
  s.smem_per_block = device.smem_per_block;
  s.smem_per_sm = device.smem_per_sm;
}

// A module whose ghosts are all cut off is a 1×1 conv: no halo, whatever the size of the depthwise conv.
void drop_unused_ghosts(GhostShape& s) {
  if (s.out_channels > s.init_channels) return;
  s.ratio = 2;
  s.dw_size = 1;
}

namespace {

Tensor launch(GhostForwardParams& a, const Tensor& x) {
  const int32_t index = cuda_device(x);
  GhostShape& s = a.shape;
  check_pixels(s.height, s.width);
  drop_unused_ghosts(s);
  const torch::stable::accelerator::DeviceGuard guard(index);
  const bool channels_last = is_channels_last(x);
  Tensor out = new_output({s.batch, s.out_channels, s.height, s.width}, x.scalar_type(), index, channels_last);
  if (s.batch == 0) return out;
  a.out = map_of(out);
  describe(s, current_device(index), channels_last);
  s.full = needs_full_kernel(a);
  if (const char* error = launch_forward(a, cached_plan(s), current_stream(index))) {
    fail("ghostfused forward_cuda: ", error);
  }
  return out;
}

Tensor launch(DepthwiseParams& a, const Tensor& x) {
  const int32_t index = cuda_device(x);
  check_pixels(a.height, a.width);
  const torch::stable::accelerator::DeviceGuard guard(index);
  Tensor out = new_output({a.batch, a.channels, a.out_height, a.out_width}, x.scalar_type(), index, a.channels_last);
  if (a.batch == 0) return out;
  a.out = map_of(out);
  if (a.height == 1 && a.width == 1 && a.x.stride_c == 1) a.channels_last = true;  // one pixel is both
  const DepthwisePlan plan = plan_depthwise(a, current_device(index).sm_count);
  if (const char* error = launch_depthwise(a, plan, current_stream(index))) {
    fail("ghostfused depthwise_cuda: ", error);
  }
  return out;
}

Tensor launch(SqueezeExciteParams& a, const Tensor& x) {
  const int32_t index = cuda_device(x);
  check_pixels(a.height, a.width);
  const torch::stable::accelerator::DeviceGuard guard(index);
  Tensor out = new_output({a.batch, a.channels}, x.scalar_type(), index);
  if (a.batch == 0) return out;
  a.out = out.data_ptr();
  const SqueezeExcitePlan plan = plan_squeeze_excite(a, current_device(index).sm_count);
  if (plan.squeeze_grid > INT32_MAX) fail("x: expected at most 2^31 - 1 blocks, got ", plan.squeeze_grid);
  const Tensor parts = new_output({a.batch, plan.parts, a.reduced}, ScalarType::Float, index);
  if (const char* error =
          launch_squeeze_excite(a, plan, static_cast<float*>(parts.data_ptr()), current_stream(index))) {
    fail("ghostfused squeeze_excite_cuda: ", error);
  }
  return out;
}

using Forward = StepKind<&GhostOp<Tensor>::run<launch>, kForwardNames>;
using Depthwise = StepKind<&depthwise<launch>, kDepthwiseNames>;
using SqueezeExcite = StepKind<&squeeze_excite<launch>, kSqueezeExciteNames>;
using CudaPrograms = Programs<&run_program<Forward, Depthwise, SqueezeExcite>, Forward, Depthwise, SqueezeExcite>;

STABLE_TORCH_LIBRARY_IMPL(ghostfused, CUDA, m) {
  m.impl("forward_cuda", TORCH_BOX(&GhostOp<Tensor>::run<launch>));
  m.impl("depthwise_cuda", TORCH_BOX(&depthwise<launch>));
  m.impl("squeeze_excite_cuda", TORCH_BOX(&squeeze_excite<launch>));
  m.impl("program_cuda", TORCH_BOX(&CudaPrograms::run_once));
  m.impl("keep_program_cuda", TORCH_BOX(&CudaPrograms::keep));
  m.impl("replay_cuda", TORCH_BOX(&CudaPrograms::run_kept));
}

}  // namespace
}  // namespace ghostfused

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition{PyModuleDef_HEAD_INIT, "_C",
                                "ghostfused's CUDA kernels: loading this registers "
                                "ghostfused::{forward,depthwise,squeeze_excite}_cuda; its functions answer questions.",
                                -1};
  return ghostfused::py::make_module(definition, [](ghostfused::py::module_& m) {
    ghostfused::bind_guard(m);
    m.def("drop_program", &ghostfused::CudaPrograms::drop, ghostfused::py::arg("number"),
          "Forgets a program that keep_program_cuda has kept.");
    ghostfused::bind_introspection(m);
  });
}
