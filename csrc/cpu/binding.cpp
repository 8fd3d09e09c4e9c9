// The Torch side of the CPU kernels: checks, the output, the op's registration (stable ABI, so that one build serves
// torch 2.11 and later), and the pybind11 module for plain-data queries.
#include <pybind11/pybind11.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "kernel.h"

namespace py = pybind11;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace ghostfused::cpu {
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

// An argument's name, put together only if it is to blame.
struct Name {
  const char *half, *field;
};
std::ostream& operator<<(std::ostream& stream, Name name) { return stream << name.half << name.field; }

// Checks one tensor argument after another against x.
struct Checker {
  ScalarType dtype;

  void check(Name name, const Tensor& t, std::initializer_list<int64_t> sizes, bool or_float32 = false) const {
    if (!t.is_cpu()) fail(name, ": expected a CPU tensor, as x is");
    const ScalarType type = t.scalar_type();
    if (type != dtype && !(or_float32 && type == ScalarType::Float)) {
      fail(name, ": expected x's dtype", or_float32 ? " or float32" : "");
    }
    const auto got = t.sizes();
    bool same = got.size() == sizes.size();
    for (size_t d = 0; same && d < sizes.size(); ++d) same = got[d] == sizes.begin()[d];
    if (same) return;
    std::ostringstream text;
    for (const int64_t size : sizes) text << (text.tellp() ? ", " : "") << size;
    text << "), got (";
    for (size_t d = 0; d < got.size(); ++d) text << (d ? ", " : "") << got[d];
    fail(name, ": expected shape (", text.str(), ")");
  }

  Tensor4 tensor4(const char* name, const OptionalTensor& t, std::initializer_list<int64_t> sizes) const {
    if (!t) return {};
    check({"", name}, *t, sizes);
    const auto strides = t->strides();
    return {t->data_ptr(), strides[0], strides[1], strides[2], strides[3]};
  }

  ChannelVector vector(Name name, const OptionalTensor& t, int64_t channels, bool or_float32 = false) const {
    if (!t) return {};
    check(name, *t, {channels}, or_float32);
    return {t->data_ptr(), t->stride(0)};
  }

  NormAct norm_act(const char* half, int64_t channels, const OptionalTensor& bias, const OptionalTensor& mean,
                   const OptionalTensor& var, const OptionalTensor& gamma, const OptionalTensor& beta,
                   const OptionalTensor& slope, double eps, int64_t act, double negative_slope) const {
    if (mean.has_value() != var.has_value()) fail(half, "_var: expected both mean and var, or neither");
    if (!mean && (gamma || beta)) fail(half, "_gamma, ", half, "_beta: expected None without mean and var");
    NormAct p{};
    p.bias = vector({half, "_bias"}, bias, channels);
    p.mean = vector({half, "_mean"}, mean, channels, true);
    p.var = vector({half, "_var"}, var, channels, true);
    p.gamma = vector({half, "_gamma"}, gamma, channels, true);
    p.beta = vector({half, "_beta"}, beta, channels, true);
    p.norm_is_float32 = mean && mean->scalar_type() == ScalarType::Float;
    for (const OptionalTensor* t : {&var, &gamma, &beta}) {
      if (*t && (*t)->scalar_type() != mean->scalar_type()) fail(half, "_mean: expected all norm tensors of one dtype");
    }
    if (act < 0 || act > static_cast<int64_t>(Act::kPReLU)) fail(half, "_act: the kernels have no activation ", act);
    p.act = static_cast<Act>(act);
    if (p.act == Act::kPReLU && !slope) fail(half, "_slope: PReLU expects its weight, got None");
    if (slope) {
      const bool one = slope->dim() == 1 && slope->size(0) == 1;
      p.slope = vector({half, "_slope"}, slope, one ? 1 : channels);
      if (one) p.slope.stride = 0;
    }
    p.eps = static_cast<float>(eps);
    p.negative_slope = static_cast<float>(negative_slope);
    return p;
  }
};

Path path_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
      return Path::kFloat16;
    case ScalarType::BFloat16:
      return Path::kBFloat16;
    case ScalarType::Float:
      return Path::kFloat32;
    default:
      fail("x: expected float32, float16 or bfloat16");
  }
}

// channels_last if x's strides say so and it is not contiguous as well: spec.py's memory_format.
bool is_channels_last(const Tensor& x) { return !x.is_contiguous() && x.stride(1) == 1 && x.size(1) > 1; }

Tensor new_output(const int64_t (&sizes)[4], ScalarType dtype, bool channels_last) {
  const auto [n, c, h, w] = sizes;
  const int64_t contiguous[] = {c * h * w, h * w, w, 1}, last[] = {h * w * c, 1, w * c, c};
  const int32_t type = dtype == ScalarType::Half       ? aoti_torch_dtype_float16()
                       : dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                                       : aoti_torch_dtype_float32();
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes, channels_last ? last : contiguous, type,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

void parallel_for(int64_t count, Body body, void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, 1, body, context));
}

const Isa& isa() {
  const char* error = nullptr;
  const Isa* isa = chosen_isa(&error);
  if (!isa) fail(error);
  return *isa;
}

// The arguments are ghostfused/spec.py's GhostArgs, in order.
Tensor forward_cpu(Tensor x, Tensor primary_weight, OptionalTensor primary_bias, OptionalTensor primary_mean,
                   OptionalTensor primary_var, OptionalTensor primary_gamma, OptionalTensor primary_beta,
                   OptionalTensor primary_slope, Tensor cheap_weight, OptionalTensor cheap_bias,
                   OptionalTensor cheap_mean, OptionalTensor cheap_var, OptionalTensor cheap_gamma,
                   OptionalTensor cheap_beta, OptionalTensor cheap_slope, OptionalTensor input_gate,
                   OptionalTensor residual, OptionalTensor output_gate, double primary_eps, int64_t primary_act,
                   double primary_negative_slope, double cheap_eps, int64_t cheap_act, double cheap_negative_slope,
                   int64_t out_channels, int64_t stride, int64_t dilation, int64_t groups, bool allow_tf32) {
  for (const auto& [name, t] :
       {std::pair{"x", &x}, {"primary_weight", &primary_weight}, {"cheap_weight", &cheap_weight}}) {
    if (t->dim() != 4) fail(name, ": expected 4 dimensions, got ", t->dim());
  }
  const Checker checker{x.scalar_type()};
  GhostForwardParams a{};
  GhostShape& s = a.shape;
  s.path = path_of(checker.dtype);
  const auto x_sizes = x.sizes();
  const int64_t batch = x_sizes[0], cin = x_sizes[1], height = x_sizes[2], width = x_sizes[3];
  const int64_t cp = primary_weight.size(0), new_channels = cheap_weight.size(0), d = cheap_weight.size(2);
  if (stride != 1 || groups != 1) fail("stride, groups: the kernel takes 1 and 1, got ", stride, " and ", groups);
  if (cin < 1 || height < 1 || width < 1) fail("x: expected at least one channel, row and column");
  if (cp < 1) fail("primary_weight: expected at least one output channel");
  checker.check({"", "primary_weight"}, primary_weight, {cp, cin, 1, 1});
  if (new_channels < cp || new_channels % cp != 0) {
    fail("cheap_weight: expected a multiple of init_channels = ", cp, " channels, got ", new_channels);
  }
  if (d != 1 && d != 3 && d != 5 && d != 7) fail("cheap_weight: the kernel takes 1×1, 3×3, 5×5 and 7×7, got ", d);
  checker.check({"", "cheap_weight"}, cheap_weight, {new_channels, 1, d, d});
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
  s.input_gate = input_gate.has_value();
  s.channels_last = is_channels_last(x);

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
    checker.check({"", "input_gate"}, *input_gate, {batch, cin});
    a.input_gate = input_gate->data_ptr();
    a.input_gate_stride_n = input_gate->stride(0);
    a.input_gate_stride_c = input_gate->stride(1);
  }
  a.primary_weight = primary_weight.data_ptr();
  a.primary_weight_stride_n = primary_weight.stride(0);
  a.primary_weight_stride_k = primary_weight.stride(1);
  a.cheap_weight = cheap_weight.data_ptr();
  const auto cheap_strides = cheap_weight.strides();
  a.cheap_weight_stride_c = cheap_strides[0];
  a.cheap_weight_stride_h = cheap_strides[2];
  a.cheap_weight_stride_w = cheap_strides[3];
  a.primary = checker.norm_act("primary", cp, primary_bias, primary_mean, primary_var, primary_gamma, primary_beta,
                               primary_slope, primary_eps, primary_act, primary_negative_slope);
  a.cheap = checker.norm_act("cheap", new_channels, cheap_bias, cheap_mean, cheap_var, cheap_gamma, cheap_beta,
                             cheap_slope, cheap_eps, cheap_act, cheap_negative_slope);

  Tensor out = new_output({batch, out_channels, height, width}, checker.dtype, s.channels_last);
  if (batch == 0) return out;
  const auto strides = out.strides();
  a.out = {out.data_ptr(), strides[0], strides[1], strides[2], strides[3]};
  isa().forward(a, {static_cast<int>(torch::stable::get_num_threads()), &parallel_for});
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(ghostfused, CPU, m) { m.impl("forward_cpu", TORCH_BOX(&forward_cpu)); }

py::dict build_info() {
  py::dict info;
  py::list compiled, usable;
  for (const Isa* isa = kIsas; isa->name; ++isa) {
    compiled.append(isa->name);
    if (isa->supported()) usable.append(isa->name);
  }
  info["compiled"] = compiled;
  info["supported"] = usable;
  const char* error = nullptr;
  const Isa* chosen = chosen_isa(&error);
  info["chosen"] = chosen ? py::object(py::str(chosen->name)) : py::none();
  info["error"] = chosen ? py::none() : py::object(py::str(error));
  return info;
}

}  // namespace
}  // namespace ghostfused::cpu

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "ghostfused's CPU kernels: loading this registers ghostfused::forward_cpu.";
  m.def("build_info", &ghostfused::cpu::build_info,
        "Instruction sets compiled, those that this CPU has, the chosen one, and why there is none.");
}
