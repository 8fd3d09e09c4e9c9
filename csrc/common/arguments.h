// The ops' Torch side, which the two bindings share: an op's arguments, checked, as the plain structs that kernels get.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/checker.h"

namespace ghostfused {

// channels_last if x's strides say so and it is not contiguous as well: ghostfused/spec's memory_format.
inline bool is_channels_last(const Tensor& x) { return !x.is_contiguous() && x.stride(1) == 1 && x.size(1) > 1; }

// An op of Ghost modules: its arguments are ghostfused/spec/arguments.py's GhostArgs, in order, and then some of its
// own.
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
    s.path = checker.path(allow_tf32);
    const auto x_sizes = x.sizes();
    const int64_t batch = x_sizes[0], cin = x_sizes[1], kernel = primary_weight.size(2);
    const int64_t cp = primary_weight.size(0), new_channels = cheap_weight.size(0), d = cheap_weight.size(2);
    if (stride < 1 || groups != 1 || (stride > 1 && x.is_cuda() && kernel == 1)) {
      fail("stride, groups: the kernel takes 1 and 1, got ", stride, " and ", groups);
    }
    if (x.is_cuda() && kernel != 1 && kernel != 3) fail("primary_weight: the kernel takes 1×1 and 3×3, got ", kernel);
    if (cin < 1 || x_sizes[2] < 1 || x_sizes[3] < 1) fail("x: expected at least one channel, row and column");
    s.init_channels = channels32("primary_weight", cp);
    if (kernel % 2 == 0 || dilation < 1) fail("primary_weight, dilation: expected an odd kernel, and at least 1");
    a.kernel = bounded("primary_weight", "rows", kernel, 1, kMaxKernel);
    a.stride = size32("stride", stride);
    a.dilation = bounded("dilation", "beside this kernel", dilation, 1, kernel > 1 ? kMaxBorder / kernel : kMaxSize);
    a.primary_weight = checker.check("primary_weight", primary_weight, {cp, cin, kernel, kernel});
    const int64_t height = (x_sizes[2] - 1) / stride + 1, width = (x_sizes[3] - 1) / stride + 1;
    channels32("cheap_weight", new_channels);
    if (new_channels < cp || new_channels % cp != 0) {
      fail("cheap_weight: expected a multiple of init_channels = ", cp, " channels, got ", new_channels);
    }
    if (d != 1 && d != 3 && d != 5 && d != 7) fail("cheap_weight: the kernel takes 1×1, 3×3, 5×5 and 7×7, got ", d);
    a.cheap_weight = checker.check("cheap_weight", cheap_weight, {new_channels, 1, d, d});
    if (out_channels < cp || out_channels > cp + new_channels) {
      fail("out_channels: expected ", cp, " … ", cp + new_channels, ", got ", out_channels);
    }

    s.batch = size32("x", batch);
    s.in_channels = channels32("x", cin);
    a.x_height = size32("x", x_sizes[2]);
    a.x_width = size32("x", x_sizes[3]);
    s.height = static_cast<int>(height);
    s.width = static_cast<int>(width);
    s.out_channels = static_cast<int>(out_channels);
    s.ratio = static_cast<int>(new_channels / cp + 1);
    s.dw_size = static_cast<int>(d);
    s.input_gate = input_gate.has_value();
    s.window_stride = kernel > 1 ? a.stride : 0;
    if (!countable(std::initializer_list<int64_t>{batch, out_channels, height, width})) {
      fail("x, out_channels: expected at most 2^40 elements of output");
    }
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
      a.input_gate = checker.check("input_gate", *input_gate, {batch, cin});
      a.input_gate_stride_n = Checker::stride(*input_gate, 0);
      a.input_gate_stride_c = Checker::stride(*input_gate, 1);
    }
    a.primary_weight_stride_n = Checker::stride(primary_weight, 0);
    a.primary_weight_stride_k = cin == 1 ? 1 : primary_weight.stride(1);
    a.primary_weight_stride_h = Checker::stride(primary_weight, 2);
    a.primary_weight_stride_w = Checker::stride(primary_weight, 3);
    a.cheap_weight_stride_c = Checker::stride(cheap_weight, 0);
    a.cheap_weight_stride_h = Checker::stride(cheap_weight, 2);
    a.cheap_weight_stride_w = Checker::stride(cheap_weight, 3);
    a.primary = checker.norm_act("primary_", cp, primary_bias, primary_mean, primary_var, primary_gamma, primary_beta,
                                 primary_slope, primary_eps, primary_act, primary_negative_slope);
    a.cheap = checker.norm_act("cheap_", new_channels, cheap_bias, cheap_mean, cheap_var, cheap_gamma, cheap_beta,
                               cheap_slope, cheap_eps, cheap_act, cheap_negative_slope);
    return launch(a, x, extra...);
  }
};

// What a program calls its steps and their arguments: the op, and then the fields of its tuple in ghostfused/spec.
inline constexpr const char* kForwardNames[] = {"forward",
                                                "x",
                                                "primary_weight",
                                                "primary_bias",
                                                "primary_mean",
                                                "primary_var",
                                                "primary_gamma",
                                                "primary_beta",
                                                "primary_slope",
                                                "cheap_weight",
                                                "cheap_bias",
                                                "cheap_mean",
                                                "cheap_var",
                                                "cheap_gamma",
                                                "cheap_beta",
                                                "cheap_slope",
                                                "input_gate",
                                                "residual",
                                                "output_gate",
                                                "primary_eps",
                                                "primary_act",
                                                "primary_negative_slope",
                                                "cheap_eps",
                                                "cheap_act",
                                                "cheap_negative_slope",
                                                "out_channels",
                                                "stride",
                                                "dilation",
                                                "groups",
                                                "allow_tf32"};
inline constexpr const char* kDepthwiseNames[] = {"depthwise", "x",    "weight", "bias", "mean", "var",
                                                  "gamma",     "beta", "slope",  "eps",  "act",  "negative_slope",
                                                  "stride"};
inline constexpr const char* kSqueezeExciteNames[] = {"squeeze_excite", "x",           "reduce_weight", "reduce_bias",
                                                      "expand_weight",  "expand_bias", "act",           "gate"};

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
  p.path = checker.path();
  const auto sizes = x.sizes();
  const int64_t channels = sizes[1], kernel_h = weight.size(2), kernel_w = weight.size(3);
  if (channels < 1 || sizes[2] < 1 || sizes[3] < 1) fail("x: expected at least one channel, row and column");
  if (stride != 1 && stride != 2) fail("stride: the kernel takes 1 and 2, got ", stride);
  for (const int64_t k : {kernel_h, kernel_w}) {
    if (k < 1 || k > 7 || k % 2 == 0) fail("weight: the kernel takes sides of 1, 3, 5 and 7, got ", k);
  }
  p.weight = checker.check("weight", weight, {channels, 1, kernel_h, kernel_w});
  p.batch = size32("x", sizes[0]);
  p.channels = channels32("x", channels);
  p.height = size32("x", sizes[2]);
  p.width = size32("x", sizes[3]);
  p.out_height = (p.height - 1) / static_cast<int>(stride) + 1;
  p.out_width = (p.width - 1) / static_cast<int>(stride) + 1;
  p.kernel_h = static_cast<int>(kernel_h);
  p.kernel_w = static_cast<int>(kernel_w);
  p.stride = static_cast<int>(stride);
  p.channels_last = is_channels_last(x);
  p.x = checker.tensor4("x", x, {sizes[0], channels, sizes[2], sizes[3]});
  p.weight_stride_c = Checker::stride(weight, 0);
  p.weight_stride_h = Checker::stride(weight, 2);
  p.weight_stride_w = Checker::stride(weight, 3);
  p.norm = checker.norm_act("", channels, bias, mean, var, gamma, beta, slope, eps, act, negative_slope);
  return launch(p, x);
}

// ``t`` itself is made contiguous on a CPU, whose kernels read matrices row by row.
inline Matrix matrix_of(const Checker& checker, Name name, Tensor& t, int64_t rows, int64_t columns) {
  const void* data = checker.matrix(name, t, rows, columns);
  if (t.is_cpu() && !t.is_contiguous()) {
    t = torch::stable::contiguous(t);
    data = t.data_ptr();
  }
  return {data, Checker::stride(t, 0), Checker::stride(t, 1)};
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
  p.path = checker.path();
  const auto sizes = x.sizes();
  const int64_t channels = sizes[1], reduced = reduce_weight.size(0);
  if (channels < 1 || sizes[2] < 1 || sizes[3] < 1) fail("x: expected at least one channel, row and column");
  p.batch = size32("x", sizes[0]);
  p.channels = channels32("x", channels);
  p.height = size32("x", sizes[2]);
  p.width = size32("x", sizes[3]);
  p.reduced = channels32("reduce_weight", reduced);
  p.reduce = matrix_of(checker, "reduce_weight", reduce_weight, reduced, channels);
  p.expand = matrix_of(checker, "expand_weight", expand_weight, channels, reduced);
  p.x = checker.tensor4("x", x, {sizes[0], channels, sizes[2], sizes[3]});
  p.reduce_bias = checker.vector("reduce_bias", reduce_bias, reduced);
  p.expand_bias = checker.vector("expand_bias", expand_bias, channels);
  p.act = Checker::act("act", act);
  if (p.act == Act::kLeakyReLU || p.act == Act::kPReLU) fail("act: expected an activation without a slope");
  if (gate < 0 || gate > static_cast<int64_t>(Gate::kReLU6)) fail("gate: the kernels have no gate ", gate);
  p.gate = static_cast<Gate>(gate);
  return launch(p, x);
}

}  // namespace ghostfused
