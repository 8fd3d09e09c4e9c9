// The Torch side: checks, the output, the stream, the op's registration (stable ABI, so that one build serves
// torch 2.11 and later), and the pybind11 module for plain-data queries.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <string>
#include <unordered_map>

#include "launch.h"

namespace py = pybind11;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace ghostfused {
namespace {

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// The kernels count sizes of one dimension in 32 bits.
int size32(const char* name, int64_t size) {
  if (size < 0 || size > INT32_MAX) fail(name, ": expected at most 2^31 - 1 along a dimension, got ", size);
  return static_cast<int>(size);
}

// Checks one tensor argument after another against x.
struct Checker {
  int32_t device;
  ScalarType dtype;

  void check(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes, bool or_float32 = false) const {
    if (!t.is_cuda() || t.get_device_index() != device) fail(name, ": expected a tensor on cuda:", device, ", as x is");
    if (t.scalar_type() != dtype && !(or_float32 && t.scalar_type() == ScalarType::Float)) {
      fail(name, ": expected x's dtype", or_float32 ? " or float32" : "");
    }
    bool same = t.dim() == static_cast<int64_t>(sizes.size());
    int64_t d = 0;
    for (const int64_t size : sizes) same = same && t.size(d++) == size;
    if (same) return;
    std::ostringstream expected, got;  // only now: making one costs more than all the checks
    for (const int64_t size : sizes) expected << (expected.tellp() > 0 ? ", " : "") << size;
    for (d = 0; d < t.dim(); ++d) got << (d ? ", " : "") << t.size(d);
    fail(name, ": expected shape (", expected.str(), "), got (", got.str(), ")");
  }

  Tensor4 tensor4(const char* name, const OptionalTensor& t, std::initializer_list<int64_t> sizes) const {
    if (!t) return {};
    check(name, *t, sizes);
    return {t->data_ptr(), t->stride(0), t->stride(1), t->stride(2), t->stride(3)};
  }

  ChannelVector vector(const std::string& name, const OptionalTensor& t, int64_t channels,
                       bool or_float32 = false) const {
    if (!t) return {};
    check(name.c_str(), *t, {channels}, or_float32);
    return {t->data_ptr(), t->stride(0)};
  }

  NormAct norm_act(const std::string& half, int64_t channels, const OptionalTensor& bias, const OptionalTensor& mean,
                   const OptionalTensor& var, const OptionalTensor& gamma, const OptionalTensor& beta,
                   const OptionalTensor& slope, double eps, int64_t act, double negative_slope) const {
    if (mean.has_value() != var.has_value()) fail(half, "_var: expected both mean and var, or neither");
    if (!mean && (gamma || beta)) fail(half, "_gamma, ", half, "_beta: expected None without mean and var");
    NormAct p{};
    p.bias = vector(half + "_bias", bias, channels);
    p.mean = vector(half + "_mean", mean, channels, true);
    p.var = vector(half + "_var", var, channels, true);
    p.gamma = vector(half + "_gamma", gamma, channels, true);
    p.beta = vector(half + "_beta", beta, channels, true);
    p.norm_is_float32 = mean && mean->scalar_type() == ScalarType::Float;
    for (const OptionalTensor* t : {&var, &gamma, &beta}) {
      if (*t && (*t)->scalar_type() != mean->scalar_type()) fail(half, "_mean: expected all norm tensors of one dtype");
    }
    if (act < 0 || act > static_cast<int64_t>(Act::kPReLU)) fail(half, "_act: the kernels have no activation ", act);
    p.act = static_cast<Act>(act);
    if (p.act == Act::kPReLU && !slope) fail(half, "_slope: PReLU expects its weight, got None");
    if (slope) {
      const bool one = slope->dim() == 1 && slope->size(0) == 1;
      p.slope = vector(half + "_slope", slope, one ? 1 : channels);
      if (one) p.slope.stride = 0;
    }
    p.eps = static_cast<float>(eps);
    p.negative_slope = static_cast<float>(negative_slope);
    return p;
  }
};

struct Device {
  int sm_count, smem_per_block, smem_per_sm;
};

// What plans are made for instead of the real device, for tests; sm_count 0: nothing.
Device pretended_device{};

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

// A module whose ghosts are all cut off is a 1×1 conv: no halo, whatever the size of the depthwise conv.
void drop_unused_ghosts(GhostShape& s) {
  if (s.out_channels > s.init_channels) return;
  s.ratio = 2;
  s.dw_size = 1;
}

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

// plan_forward takes about a millisecond, so its answers are kept; per thread, so that nothing needs a lock.
const LaunchPlan& cached_plan(const GhostShape& shape) {
  thread_local std::unordered_map<GhostShape, LaunchPlan, ShapeHash> plans;
  const auto found = plans.find(shape);
  if (found != plans.end()) return found->second;
  if (plans.size() >= 4096) plans.clear();  // a program whose shapes never repeat shouldn't grow without bound
  return plans.emplace(shape, plan_forward(shape)).first->second;
}

// The arguments are ghostfused/spec.py's GhostArgs, in order.
Tensor forward_cuda(Tensor x, Tensor primary_weight, OptionalTensor primary_bias, OptionalTensor primary_mean,
                    OptionalTensor primary_var, OptionalTensor primary_gamma, OptionalTensor primary_beta,
                    OptionalTensor primary_slope, Tensor cheap_weight, OptionalTensor cheap_bias,
                    OptionalTensor cheap_mean, OptionalTensor cheap_var, OptionalTensor cheap_gamma,
                    OptionalTensor cheap_beta, OptionalTensor cheap_slope, OptionalTensor input_gate,
                    OptionalTensor residual, OptionalTensor output_gate, double primary_eps, int64_t primary_act,
                    double primary_negative_slope, double cheap_eps, int64_t cheap_act, double cheap_negative_slope,
                    int64_t out_channels, int64_t stride, int64_t dilation, int64_t groups, bool allow_tf32) {
  if (!x.is_cuda()) fail("x: expected a CUDA tensor");
  for (const auto& [name, t] :
       {std::pair{"x", &x}, {"primary_weight", &primary_weight}, {"cheap_weight", &cheap_weight}}) {
    if (t->dim() != 4) fail(name, ": expected 4 dimensions, got ", t->dim());
  }
  const Checker checker{x.get_device_index(), x.scalar_type()};
  GhostForwardParams a{};
  GhostShape& s = a.shape;
  switch (checker.dtype) {
    case ScalarType::Half:
      s.path = Path::kFloat16;
      break;
    case ScalarType::BFloat16:
      s.path = Path::kBFloat16;
      break;
    case ScalarType::Float:
      s.path = allow_tf32 ? Path::kTF32 : Path::kFloat32;
      break;
    default:
      fail("x: expected float32, float16 or bfloat16");
  }
  const int64_t batch = x.size(0), cin = x.size(1), height = x.size(2), width = x.size(3);
  const int64_t cp = primary_weight.size(0), new_channels = cheap_weight.size(0), d = cheap_weight.size(2);
  if (stride != 1 || groups != 1) fail("stride, groups: the kernel takes 1 and 1, got ", stride, " and ", groups);
  if (cin < 1 || height < 1 || width < 1) fail("x: expected at least one channel, row and column");
  if (cp < 1) fail("primary_weight: expected at least one output channel");
  checker.check("primary_weight", primary_weight, {cp, cin, 1, 1});
  if (new_channels < cp || new_channels % cp != 0) {
    fail("cheap_weight: expected a multiple of init_channels = ", cp, " channels, got ", new_channels);
  }
  if (d != 1 && d != 3 && d != 5 && d != 7) fail("cheap_weight: the kernel takes 1×1, 3×3, 5×5 and 7×7, got ", d);
  checker.check("cheap_weight", cheap_weight, {new_channels, 1, d, d});
  if (out_channels < cp || out_channels > cp + new_channels) {
    fail("out_channels: expected ", cp, " … ", cp + new_channels, ", got ", out_channels);
  }

  s.batch = size32("x", batch);
  s.in_channels = size32("x", cin);
  s.height = size32("x", height);
  s.width = size32("x", width);
  s.init_channels = size32("primary_weight", cp);
  s.out_channels = size32("out_channels", out_channels);
  s.ratio = size32("cheap_weight", new_channels / cp + 1);
  s.dw_size = static_cast<int>(d);
  drop_unused_ghosts(s);
  s.input_gate = input_gate.has_value();

  a.x = checker.tensor4("x", x, {batch, cin, height, width});
  a.residual = checker.tensor4("residual", residual, {batch, out_channels, height, width});
  if (output_gate) {
    if (output_gate->dim() != 4 || output_gate->size(2) < 1 || output_gate->size(3) < 1) {
      fail("output_gate: expected shape (N, out_channels, Hg, Wg)");
    }
    a.gate_height = size32("output_gate", output_gate->size(2));
    a.gate_width = size32("output_gate", output_gate->size(3));
    a.output_gate = checker.tensor4("output_gate", output_gate, {batch, out_channels, a.gate_height, a.gate_width});
  }
  if (input_gate) {
    checker.check("input_gate", *input_gate, {batch, cin});
    a.input_gate = input_gate->data_ptr();
    a.input_gate_stride_n = input_gate->stride(0);
    a.input_gate_stride_c = input_gate->stride(1);
  }
  a.primary_weight = primary_weight.data_ptr();
  a.primary_weight_stride_n = primary_weight.stride(0);
  a.primary_weight_stride_k = cin == 1 ? 1 : primary_weight.stride(1);
  a.cheap_weight = cheap_weight.data_ptr();
  a.cheap_weight_stride_c = cheap_weight.stride(0);
  a.cheap_weight_stride_h = cheap_weight.stride(2);
  a.cheap_weight_stride_w = cheap_weight.stride(3);
  a.primary = checker.norm_act("primary", cp, primary_bias, primary_mean, primary_var, primary_gamma, primary_beta,
                               primary_slope, primary_eps, primary_act, primary_negative_slope);
  a.cheap = checker.norm_act("cheap", new_channels, cheap_bias, cheap_mean, cheap_var, cheap_gamma, cheap_beta,
                             cheap_slope, cheap_eps, cheap_act, cheap_negative_slope);

  const torch::stable::accelerator::DeviceGuard guard(checker.device);
  const bool channels_last = !x.is_contiguous() && x.stride(1) == 1 && cin > 1;  // spec.py's memory_format
  const int64_t sizes[] = {batch, out_channels, height, width};
  Tensor out = torch::stable::empty(
      {sizes, 4}, checker.dtype, std::nullopt, torch::stable::Device(torch::stable::DeviceType::CUDA, checker.device),
      std::nullopt,
      channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous);
  if (batch == 0) return out;
  a.out = checker.tensor4("out", out, {batch, out_channels, height, width});
  s.channels_last = channels_last || height * width == 1;  // one pixel is both, and K is what is contiguous

  const Device& device = current_device(checker.device);
  s.sm_count = device.sm_count;
  s.smem_per_block = device.smem_per_block;
  s.smem_per_sm = device.smem_per_sm;
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(checker.device, &stream));
  if (const char* error = launch_forward(a, cached_plan(s), stream)) fail("ghostfused forward_cuda: ", error);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(ghostfused, CUDA, m) { m.impl("forward_cuda", TORCH_BOX(&forward_cuda)); }

py::dict build_info() {
  py::dict info;
  info["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  info["architectures"] = GHOSTFUSED_ARCHITECTURES;
  return info;
}

Path path_of(const std::string& name) {
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
  a.shape = {path_of(path), channels_last, input_gate, batch,   in_channels, height,         width,
             init_channels, out_channels,  ratio,      dw_size, sm_count,    smem_per_block, smem_per_sm};
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
      "ghostfused's CUDA kernels: loading this registers ghostfused::forward_cuda; its functions answer questions.";
  m.def("build_info", &ghostfused::build_info, "CUDA version and architectures of this build.");
  m.def("plan", &ghostfused::plan, py::kw_only(), py::arg("batch"), py::arg("in_channels"), py::arg("height"),
        py::arg("width"), py::arg("init_channels"), py::arg("out_channels"), py::arg("ratio") = 2,
        py::arg("dw_size") = 3, py::arg("path") = "float16", py::arg("channels_last") = true,
        py::arg("input_gate") = false, py::arg("sm_count") = 132, py::arg("smem_per_block") = 232448,
        py::arg("smem_per_sm") = 233472,
        "The launch plan for dense tensors on a device (the default is an H100); empty if nothing fits.");
  m.def("pretend_device", &ghostfused::pretend_device, py::arg("sm_count") = 0, py::arg("smem_per_block") = 232448,
        py::arg("smem_per_sm") = 233472,
        "For tests: plan launches as for this device, of which the real one must have the shared memory; 0: stop it.");
  m.def("kernel_attributes", &ghostfused::all_kernel_attributes, "Registers and memory of every compiled kernel.");
}
