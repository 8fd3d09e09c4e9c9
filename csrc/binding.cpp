// The Torch side: the output, the stream, the op's registration (stable ABI, so that one build serves
// torch 2.11 and later), and the pybind11 module for plain-data queries.
#include "binding.h"

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstring>
#include <string>
#include <unordered_map>

#include "bottleneck.h"
#include "guard.h"
#include "program.h"

namespace py = pybind11;

namespace ghostfused {
namespace {

// What plans are made for instead of the real device, for tests; sm_count 0: nothing.
Device pretended_device{};

struct ShapeHash {
  size_t operator()(const GhostShape& s) const {
    size_t h = 0;
    for (const int v :
         {static_cast<int>(s.path), int{s.channels_last}, int{s.input_gate}, s.batch, s.in_channels, s.height, s.width,
          s.init_channels, s.out_channels, s.ratio, s.dw_size, s.sm_count, s.smem_per_block}) {
      h = h * 1000003 + static_cast<size_t>(v);
    }
    return h;
  }
};

}  // namespace

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
const LaunchPlan& cached_plan(const GhostShape& shape) {
  thread_local std::unordered_map<GhostShape, LaunchPlan, ShapeHash> plans;
  const auto found = plans.find(shape);
  if (found != plans.end()) return found->second;
  if (plans.size() >= 4096) plans.clear();  // a program whose shapes never repeat shouldn't grow without bound
  return plans.emplace(shape, plan_forward(shape)).first->second;
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

namespace {

// A module whose ghosts are all cut off is a 1×1 conv: no halo, whatever the size of the depthwise conv.
void drop_unused_ghosts(GhostShape& s) {
  if (s.out_channels > s.init_channels) return;
  s.ratio = 2;
  s.dw_size = 1;
}

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

py::dict build_info() {
  py::dict info;
  info["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  info["architectures"] = GHOSTFUSED_ARCHITECTURES;
  return info;
}

Path path_named(const std::string& name) {
  const char* names[] = {"float16", "bfloat16", "tf32", "float32"};
  for (int i = 0; i < 4; ++i) {
    if (name == names[i]) return static_cast<Path>(i);
  }
  throw py::value_error("path: expected float16, bfloat16, tf32 or float32, got " + name);
}

Tensor4 dense(bool channels_last, int64_t c, int64_t h, int64_t w) {
  void* aligned = reinterpret_cast<void*>(256);  // never read
  return channels_last ? Tensor4{aligned, c * h * w, 1, w * c, c} : Tensor4{aligned, c * h * w, h * w, w, 1};
}

// The plan for dense, aligned tensors, as a dict.
py::dict plan(int batch, int in_channels, int height, int width, int init_channels, int out_channels, int ratio,
              int dw_size, const std::string& path, bool channels_last, bool input_gate, int sm_count,
              int smem_per_block, int smem_per_sm) {
  for (const int v : {batch, in_channels, height, width, init_channels, out_channels, ratio - 1, dw_size, sm_count}) {
    if (v < 1) throw py::value_error("plan: expected positive sizes and a ratio of at least 2");
  }
  GhostForwardParams a{};
  a.shape = {path_named(path), channels_last, input_gate, batch,   in_channels, height,         width,
             init_channels,    out_channels,  ratio,      dw_size, sm_count,    smem_per_block, smem_per_sm};
  drop_unused_ghosts(a.shape);
  const LaunchPlan p = plan_forward(a.shape);
  py::dict r;
  if (p.block_c == 0) return r;
  a.x = dense(channels_last, in_channels, height, width);
  a.out = dense(channels_last, out_channels, height, width);
  a.primary_weight = a.x.data;
  a.primary_weight_stride_n = in_channels;
  a.primary_weight_stride_k = 1;
  const VectorWidths v = vector_widths(a, p);
  const int element = a.shape.path == Path::kFloat16 || a.shape.path == Path::kBFloat16 ? 2 : 4;
  r["tile_h"] = p.tile_h;
  r["tile_w"] = p.tile_w;
  r["block_c"] = p.block_c;
  r["block_k"] = p.block_k;
  r["stages"] = p.stages;
  r["threads"] = p.threads;
  r["warps_n"] = p.warps_n;
  r["strip_h"] = p.strip_h;
  r["col_align"] = p.col_align;
  r["weights_resident"] = p.weights_resident;
  r["tiles_h"] = p.tiles_h;
  r["tiles_w"] = p.tiles_w;
  r["channel_blocks"] = p.channel_blocks;
  r["k_chunks"] = p.k_chunks;
  r["grid"] = p.grid;
  r["smem_bytes"] = p.smem_bytes;
  r["blocks_per_sm"] = p.blocks_per_sm;
  r["x_vector_bytes"] = v.x;
  r["weight_vector_bytes"] = v.primary_weight;
  r["out_vector_bytes"] = v.out * element;
  r["dram_read"] = p.dram_read;
  r["dram_write"] = p.dram_write;
  r["l2_read"] = p.l2_read;
  r["recompute"] = p.recompute;
  return r;
}

// The same for a depthwise conv and for squeeze-and-excite's two kernels.
py::dict plan_of_depthwise(int batch, int channels, int height, int width, int kernel_h, int kernel_w, int stride,
                           const std::string& path, bool channels_last, int sm_count) {
  for (const int v : {batch, channels, height, width, kernel_h, kernel_w, stride, sm_count}) {
    if (v < 1) throw py::value_error("plan_depthwise: expected positive sizes");
  }
  DepthwiseParams a{};
  a.path = path_named(path);
  a.channels_last = channels_last;
  a.batch = batch;
  a.channels = channels;
  a.height = height;
  a.width = width;
  a.out_height = (height - 1) / stride + 1;
  a.out_width = (width - 1) / stride + 1;
  a.kernel_h = kernel_h;
  a.kernel_w = kernel_w;
  a.stride = stride;
  a.x = dense(channels_last, channels, height, width);
  a.out = dense(channels_last, channels, a.out_height, a.out_width);
  const DepthwisePlan p = plan_depthwise(a, sm_count);
  py::dict r;
  r["block_c"] = p.block_c;
  r["block_p"] = p.block_p;
  r["channel_blocks"] = p.channel_blocks;
  r["position_blocks"] = p.position_blocks;
  r["columns"] = p.columns;
  r["row_groups"] = p.row_groups;
  r["x_vector"] = p.x_vector;
  r["out_vector"] = p.out_vector;
  r["threads"] = kBottleneckThreads;
  r["smem_bytes"] = p.smem_bytes;
  r["grid"] = p.grid;
  return r;
}

py::dict plan_of_squeeze_excite(int batch, int channels, int height, int width, int reduced, const std::string& path,
                                bool channels_last, int sm_count) {
  for (const int v : {batch, channels, height, width, reduced, sm_count}) {
    if (v < 1) throw py::value_error("plan_squeeze_excite: expected positive sizes");
  }
  SqueezeExciteParams a{};
  a.path = path_named(path);
  a.batch = batch;
  a.channels = channels;
  a.height = height;
  a.width = width;
  a.reduced = reduced;
  a.x = dense(channels_last, channels, height, width);
  a.reduce = {a.x.data, channels, 1};
  a.expand = {a.x.data, reduced, 1};
  const SqueezeExcitePlan p = plan_squeeze_excite(a, sm_count);
  py::dict r;
  r["images"] = p.images;
  r["chunk"] = p.chunk;
  r["parts"] = p.parts;
  r["excite_c"] = p.excite_c;
  r["channels_adjacent"] = p.channels_adjacent;
  r["x_vector"] = p.x_vector;
  r["reduce_vector"] = p.reduce_vector;
  r["expand_vector"] = p.expand_vector;
  r["threads"] = kBottleneckThreads;
  r["squeeze_grid"] = p.squeeze_grid;
  r["excite_grid"] = p.excite_grid;
  return r;
}

void pretend_device(int sm_count, int smem_per_block, int smem_per_sm) {
  pretended_device = {sm_count, smem_per_block, smem_per_sm};
}

py::list all_kernel_attributes() {
  py::list all;
  for (int i = 0; i < kKernelCount; ++i) {
    KernelAttributes k;
    if (const char* error = kernel_attributes(i, &k)) fail("kernel_attributes: ", error);
    py::dict d;
    d["name"] = k.name;
    d["registers"] = k.registers;
    d["local_bytes"] = k.local_bytes;
    d["static_smem_bytes"] = k.static_smem_bytes;
    d["max_threads"] = k.max_threads;
    d["binary_version"] = k.binary_version;
    all.append(d);
  }
  return all;
}

}  // namespace
}  // namespace ghostfused

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "ghostfused's CUDA kernels: loading this registers ghostfused::{forward,depthwise,squeeze_excite}_cuda; its "
      "functions answer questions.";
  m.def("build_info", &ghostfused::build_info, "CUDA version and architectures of this build.");
  ghostfused::bind_guard(m);
  m.def("drop_program", &ghostfused::CudaPrograms::drop, "Forgets a program that keep_program_cuda has kept.");
  m.def("plan", &ghostfused::plan, py::kw_only(), py::arg("batch"), py::arg("in_channels"), py::arg("height"),
        py::arg("width"), py::arg("init_channels"), py::arg("out_channels"), py::arg("ratio") = 2,
        py::arg("dw_size") = 3, py::arg("path") = "float16", py::arg("channels_last") = true,
        py::arg("input_gate") = false, py::arg("sm_count") = 132, py::arg("smem_per_block") = 232448,
        py::arg("smem_per_sm") = 233472,
        "The launch plan for dense tensors on a device (the default is an H100); empty if nothing fits.");
  m.def("plan_depthwise", &ghostfused::plan_of_depthwise, py::kw_only(), py::arg("batch"), py::arg("channels"),
        py::arg("height"), py::arg("width"), py::arg("kernel_h"), py::arg("kernel_w"), py::arg("stride") = 1,
        py::arg("path") = "float16", py::arg("channels_last") = true, py::arg("sm_count") = 132,
        "The launch plan of a depthwise conv of dense tensors.");
  m.def("plan_squeeze_excite", &ghostfused::plan_of_squeeze_excite, py::kw_only(), py::arg("batch"),
        py::arg("channels"), py::arg("height"), py::arg("width"), py::arg("reduced"), py::arg("path") = "float16",
        py::arg("channels_last") = true, py::arg("sm_count") = 132,
        "The launch plan of a squeeze-and-excite gate, two kernels, for dense tensors.");
  m.def("pretend_device", &ghostfused::pretend_device, py::arg("sm_count") = 0, py::arg("smem_per_block") = 232448,
        py::arg("smem_per_sm") = 233472,
        "For tests: plan launches as for this device, of which the real one must have the shared memory; 0: stop it.");
  m.def("kernel_attributes", &ghostfused::all_kernel_attributes, "Registers and memory of every compiled kernel.");
}
