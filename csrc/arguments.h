// What the two bindings share: the checks of an op's arguments, and the plain structs that the kernels get.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "ghost_module.h"

namespace ghostfused {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// The kernels count sizes of one dimension in 32 bits.
inline int size32(const char* name, int64_t size) {
  if (size < 0 || size > INT32_MAX) fail(name, ": expected at most 2^31 - 1 along a dimension, got ", size);
  return static_cast<int>(size);
}

inline Path path_of(ScalarType dtype, bool allow_tf32 = false) {
  switch (dtype) {
    case ScalarType::Half:
      return Path::kFloat16;
    case ScalarType::BFloat16:
      return Path::kBFloat16;
    case ScalarType::Float:
      return allow_tf32 ? Path::kTF32 : Path::kFloat32;
    default:
      fail("x: expected float32, float16 or bfloat16");
  }
}

// channels_last if x's strides say so and it is not contiguous as well: spec.py's memory_format.
inline bool is_channels_last(const Tensor& x) { return !x.is_contiguous() && x.stride(1) == 1 && x.size(1) > 1; }

// An argument's name, put together only if it is to blame.
struct Name {
  const char *half, *field;
};
inline std::ostream& operator<<(std::ostream& stream, Name name) { return stream << name.half << name.field; }

// Checks one tensor argument after another against x.
class Checker {
 public:
  explicit Checker(const Tensor& x) : dtype(x.scalar_type()), cuda(x.is_cuda()), device(x.get_device_index()) {}

  void check(Name name, const Tensor& t, std::initializer_list<int64_t> sizes, bool or_float32 = false) const {
    if (t.is_cuda() != cuda || t.get_device_index() != device) fail(name, ": expected a tensor on x's device");
    const ScalarType type = t.scalar_type();
    if (type != dtype && !(or_float32 && type == ScalarType::Float)) {
      fail(name, ": expected x's dtype", or_float32 ? " or float32" : "");
    }
    const auto got = t.sizes();
    bool same = got.size() == sizes.size();
    for (size_t d = 0; same && d < sizes.size(); ++d) same = got[d] == sizes.begin()[d];
    if (same) return;
    std::ostringstream text;  // only now: making one costs more than all the checks
    for (const int64_t size : sizes) text << (text.tellp() > 0 ? ", " : "") << size;
    text << "), got (";
    for (size_t d = 0; d < got.size(); ++d) text << (d ? ", " : "") << got[d];
    fail(name, ": expected shape (", text.str(), ")");
  }

  // Or the weight of a 1×1 convolution.
  void matrix(const char* name, const Tensor& t, int64_t rows, int64_t columns) const {
    if (t.dim() == 4) return check({"", name}, t, {rows, columns, 1, 1});
    check({"", name}, t, {rows, columns});
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
    if (mean.has_value() != var.has_value()) fail(half, "var: expected both mean and var, or neither");
    if (!mean && (gamma || beta)) fail(half, "gamma, ", half, "beta: expected None without mean and var");
    NormAct p{};
    p.bias = vector({half, "bias"}, bias, channels);
    p.mean = vector({half, "mean"}, mean, channels, true);
    p.var = vector({half, "var"}, var, channels, true);
    p.gamma = vector({half, "gamma"}, gamma, channels, true);
    p.beta = vector({half, "beta"}, beta, channels, true);
    p.norm_is_float32 = mean && mean->scalar_type() == ScalarType::Float;
    for (const OptionalTensor* t : {&var, &gamma, &beta}) {
      if (*t && (*t)->scalar_type() != mean->scalar_type()) fail(half, "mean: expected all norm tensors of one dtype");
    }
    p.act = this->act({half, "act"}, act);
    if (p.act == Act::kPReLU && !slope) fail(half, "slope: PReLU expects its weight, got None");
    if (slope) {
      const bool one = slope->dim() == 1 && slope->size(0) == 1;
      p.slope = vector({half, "slope"}, slope, one ? 1 : channels);
      if (one) p.slope.stride = 0;
    }
    p.eps = static_cast<float>(eps);
    p.negative_slope = static_cast<float>(negative_slope);
    return p;
  }

  static Act act(Name name, int64_t act) {
    if (act < 0 || act > static_cast<int64_t>(Act::kPReLU)) fail(name, ": the kernels have no activation ", act);
    return static_cast<Act>(act);
  }

  const ScalarType dtype;

 private:
  const bool cuda;
  const int32_t device;
};

// An op of Ghost modules: its arguments are ghostfused/spec.py's GhostArgs, in order, and then some of its own.
// ``launch`` gets them once they are checked, and makes the output.
template <typename Result, typename... Extra>
struct GhostOp {
  template <Result (*launch)(GhostForwardParams& params, const Tensor& x, Extra... extra)>
  static Result run(Tensor x, Tensor primary_weight, OptionalTensor primary_bias, OptionalTensor primary_mean,
                    OptionalTensor primary_var, OptionalTensor primary_gamma, OptionalTensor primary_beta,
                    OptionalTensor primary_slope, Tensor cheap_weight, OptionalTensor cheap_bias,
                    OptionalTensor cheap_mean, OptionalTensor cheap_var, OptionalTensor cheap_gamma,
                    OptionalTensor cheap_beta, OptionalTensor cheap_slope, OptionalTensor input_gate,
                    OptionalTensor residual, OptionalTensor output_gate, double primary_eps, int64_t primary_act,
                    double primary_negative_slope, double cheap_eps, int64_t cheap_act, double cheap_negative_slope,
                    int64_t out_channels, int64_t stride, int64_t dilation, int64_t groups, bool allow_tf32,
                    Extra... extra) {
    for (const auto& [name, t] :
         {std::pair{"x", &x}, {"primary_weight", &primary_weight}, {"cheap_weight", &cheap_weight}}) {
      if (t->dim() != 4) fail(name, ": expected 4 dimensions, got ", t->dim());
    }
    const Checker checker(x);
    GhostForwardParams a{};
    GhostShape& s = a.shape;
    s.path = path_of(checker.dtype, allow_tf32);
    const auto x_sizes = x.sizes();
    const int64_t batch = x_sizes[0], cin = x_sizes[1], kernel = primary_weight.size(2);
    const int64_t cp = primary_weight.size(0), new_channels = cheap_weight.size(0), d = cheap_weight.size(2);
    if (stride < 1 || groups != 1 || (stride > 1 && x.is_cuda())) {
      fail("stride, groups: the kernel takes 1 and 1, got ", stride, " and ", groups);
    }
    if (cin < 1 || x_sizes[2] < 1 || x_sizes[3] < 1) fail("x: expected at least one channel, row and column");
    if (cp < 1) fail("primary_weight: expected at least one output channel");
    if (kernel % 2 == 0 || dilation < 1) fail("primary_weight, dilation: expected an odd kernel, and at least 1");
    if (kernel > 1 && cin > kMaxPatchChannels) {
      fail("primary_weight: beyond 1×1 the kernel takes up to ", kMaxPatchChannels, " input channels, got ", cin);
    }
    const int64_t side = x.is_cuda() ? 1 : kernel;
    checker.check({"", "primary_weight"}, primary_weight, {cp, cin, side, side});
    const int64_t height = (x_sizes[2] - 1) / stride + 1, width = (x_sizes[3] - 1) / stride + 1;
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

    a.kernel = size32("primary_weight", kernel);
    a.stride = size32("stride", stride);
    a.dilation = size32("dilation", dilation);
    a.x_height = size32("x", x_sizes[2]);
    a.x_width = size32("x", x_sizes[3]);
    a.x = checker.tensor4("x", x, {batch, cin, x_sizes[2], x_sizes[3]});
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
    a.primary_weight_stride_k = cin == 1 ? 1 : primary_weight.stride(1);
    a.primary_weight_stride_h = primary_weight.stride(2);
    a.primary_weight_stride_w = primary_weight.stride(3);
    a.cheap_weight = cheap_weight.data_ptr();
    const auto cheap_strides = cheap_weight.strides();
    a.cheap_weight_stride_c = cheap_strides[0];
    a.cheap_weight_stride_h = cheap_strides[2];
    a.cheap_weight_stride_w = cheap_strides[3];
    a.primary = checker.norm_act("primary_", cp, primary_bias, primary_mean, primary_var, primary_gamma, primary_beta,
                                 primary_slope, primary_eps, primary_act, primary_negative_slope);
    a.cheap = checker.norm_act("cheap_", new_channels, cheap_bias, cheap_mean, cheap_var, cheap_gamma, cheap_beta,
                               cheap_slope, cheap_eps, cheap_act, cheap_negative_slope);
    return launch(a, x, extra...);
  }
};

// The depthwise op: its arguments are DepthwiseArgs, in order.
template <Tensor (*launch)(DepthwiseParams& params, const Tensor& x)>
Tensor depthwise(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor mean, OptionalTensor var,
                 OptionalTensor gamma, OptionalTensor beta, OptionalTensor slope, double eps, int64_t act,
                 double negative_slope, int64_t stride) {
  for (const auto& [name, t] : {std::pair{"x", &x}, {"weight", &weight}}) {
    if (t->dim() != 4) fail(name, ": expected 4 dimensions, got ", t->dim());
  }
  const Checker checker(x);
  DepthwiseParams p{};
  p.path = path_of(checker.dtype);
  const auto sizes = x.sizes();
  const int64_t channels = sizes[1], kernel_h = weight.size(2), kernel_w = weight.size(3);
  if (channels < 1 || sizes[2] < 1 || sizes[3] < 1) fail("x: expected at least one channel, row and column");
  if (stride != 1 && stride != 2) fail("stride: the kernel takes 1 and 2, got ", stride);
  for (const int64_t k : {kernel_h, kernel_w}) {
    if (k < 1 || k > 7 || k % 2 == 0) fail("weight: the kernel takes sides of 1, 3, 5 and 7, got ", k);
  }
  checker.check({"", "weight"}, weight, {channels, 1, kernel_h, kernel_w});
  p.batch = size32("x", sizes[0]);
  p.channels = size32("x", channels);
  p.height = size32("x", sizes[2]);
  p.width = size32("x", sizes[3]);
  p.out_height = (p.height - 1) / static_cast<int>(stride) + 1;
  p.out_width = (p.width - 1) / static_cast<int>(stride) + 1;
  p.kernel_h = static_cast<int>(kernel_h);
  p.kernel_w = static_cast<int>(kernel_w);
  p.stride = static_cast<int>(stride);
  p.channels_last = is_channels_last(x);
  p.x = checker.tensor4("x", x, {sizes[0], channels, sizes[2], sizes[3]});
  p.weight = weight.data_ptr();
  const auto strides = weight.strides();
  p.weight_stride_c = strides[0];
  p.weight_stride_h = strides[2];
  p.weight_stride_w = strides[3];
  p.norm = checker.norm_act("", channels, bias, mean, var, gamma, beta, slope, eps, act, negative_slope);
  return launch(p, x);
}

// The squeeze_excite op: its arguments are SqueezeExciteArgs, in order.
template <Tensor (*launch)(SqueezeExciteParams& params, const Tensor& x)>
Tensor squeeze_excite(Tensor x, Tensor reduce_weight, OptionalTensor reduce_bias, Tensor expand_weight,
                      OptionalTensor expand_bias, int64_t act, int64_t gate) {
  if (x.dim() != 4) fail("x: expected 4 dimensions, got ", x.dim());
  if (reduce_weight.dim() != 2 && reduce_weight.dim() != 4) {
    fail("reduce_weight: expected 2 or 4 dimensions, got ", reduce_weight.dim());
  }
  const Checker checker(x);
  SqueezeExciteParams p{};
  p.path = path_of(checker.dtype);
  const auto sizes = x.sizes();
  const int64_t channels = sizes[1], reduced = reduce_weight.size(0);
  if (channels < 1 || sizes[2] < 1 || sizes[3] < 1) fail("x: expected at least one channel, row and column");
  if (reduced < 1) fail("reduce_weight: expected at least one row");
  checker.matrix("reduce_weight", reduce_weight, reduced, channels);
  checker.matrix("expand_weight", expand_weight, channels, reduced);
  p.batch = size32("x", sizes[0]);
  p.channels = size32("x", channels);
  p.height = size32("x", sizes[2]);
  p.width = size32("x", sizes[3]);
  p.reduced = size32("reduce_weight", reduced);
  p.x = checker.tensor4("x", x, {sizes[0], channels, sizes[2], sizes[3]});
  if (x.is_cpu()) {  // whose kernel reads the matrices row by row
    reduce_weight = torch::stable::contiguous(reduce_weight);
    expand_weight = torch::stable::contiguous(expand_weight);
  }
  p.reduce = {reduce_weight.data_ptr(), reduce_weight.stride(0), reduce_weight.stride(1)};
  p.expand = {expand_weight.data_ptr(), expand_weight.stride(0), expand_weight.stride(1)};
  p.reduce_bias = checker.vector({"", "reduce_bias"}, reduce_bias, reduced);
  p.expand_bias = checker.vector({"", "expand_bias"}, expand_bias, channels);
  p.act = Checker::act({"", "act"}, act);
  if (p.act == Act::kLeakyReLU || p.act == Act::kPReLU) fail("act: expected an activation without a slope");
  if (gate < 0 || gate > static_cast<int64_t>(Gate::kReLU6)) fail("gate: the kernels have no gate ", gate);
  p.gate = static_cast<Gate>(gate);
  return launch(p, x);
}

}  // namespace ghostfused
