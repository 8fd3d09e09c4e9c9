// The ops: their outputs, and the arguments as the kernels get them. The binding registers them.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "common/arguments.h"
#include "cpu/frozen_packs.h"

namespace ghostfused::cpu {

inline Tensor new_tensor(const int64_t* sizes, const int64_t* strides, int64_t dims, ScalarType dtype) {
  const int32_t type = dtype == ScalarType::Half       ? aoti_torch_dtype_float16()
                       : dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                                       : aoti_torch_dtype_float32();
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, type, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// For what a step makes.
template <size_t kDims>
Tensor new_output(const int64_t (&sizes)[kDims], const int64_t (&strides)[kDims], ScalarType dtype) {
  Tensor tensor = new_tensor(sizes, strides, kDims, dtype);
  if (Recorder* recorder = Recorder::current()) recorder->made(tensor);
  return tensor;
}

// Of (N, C, H, W), in x's memory format; ``*out`` describes it.
inline Tensor new_map(int64_t n, int64_t c, int64_t h, int64_t w, ScalarType dtype, bool channels_last, Tensor4* out) {
  // as PyTorch's, of empty maps too
  const int64_t row = std::max<int64_t>(w, 1), plane = std::max<int64_t>(h, 1) * row;
  const int64_t contiguous[] = {c * plane, plane, row, 1}, last[] = {plane * c, 1, row * c, c};
  const auto& strides = channels_last ? last : contiguous;
  Tensor tensor = new_output({n, c, h, w}, strides, dtype);
  *out = {tensor.data_ptr(), strides[0], strides[1], strides[2], strides[3]};
  return tensor;
}

inline thread_local bool whole_images = false;  // other threads are at work on other images

inline int torch_threads() { return whole_images ? 1 : static_cast<int>(torch::stable::get_num_threads()); }

inline const Isa& isa() {
  const char* error = nullptr;
  const Isa* isa = chosen_isa(&error);
  if (!isa) fail(error);
  return *isa;
}
inline const Kernels& kernels() { return *isa().kernels; }

template <typename Kind>
void run_launch(const Kind& launch) {
  if (Recorder* recorder = Recorder::current()) recorder->add(launch);
  launch.run(kernels(), torch_threads());
}

inline void forward(const GhostForwardParams& p) {
  run_launch(ForwardLaunch{p, current_packs ? current_packs->weight(kernels(), p) : Packed{}});
}

inline Tensor launch(GhostForwardParams& a, const Tensor& x) {
  if (!x.is_cpu()) fail("x: expected a CPU tensor");
  GhostShape& s = a.shape;
  s.channels_last = is_channels_last(x);
  Tensor out = new_map(s.batch, s.out_channels, s.height, s.width, x.scalar_type(), s.channels_last, &a.out);
  if (s.height == 1 && s.width == 1) {  // one pixel is both, and channels are what is contiguous
    s.channels_last = true;
    a.out.stride_c = 1;
  }
  if (s.batch > 0) forward(a);
  return out;
}

inline Tensor launch(DepthwiseParams& p, const Tensor& x) {
  if (!x.is_cpu()) fail("x: expected a CPU tensor");
  Tensor out = new_map(p.batch, p.channels, p.out_height, p.out_width, x.scalar_type(), p.channels_last, &p.out);
  if (p.batch > 0) {
    run_launch(DepthwiseLaunch{p, current_packs ? current_packs->depthwise(kernels(), p) : Packed{}});
  }
  return out;
}

inline Tensor launch(SqueezeExciteParams& p, const Tensor& x) {
  if (!x.is_cpu()) fail("x: expected a CPU tensor");
  Tensor out = new_output({p.batch, p.channels}, {p.channels, 1}, x.scalar_type());
  p.out = out.data_ptr();
  const auto packed = [&](const Matrix& weight, int64_t rows, int64_t columns) {
    return current_packs ? current_packs->rows(weight, rows, columns, p.path) : Packed{};
  };
  const Packed reduce = packed(p.reduce, p.reduced, p.channels), expand = packed(p.expand, p.channels, p.reduced);
  if (p.batch > 0) run_launch(SqueezeExciteLaunch{p, reduce, expand});
  return out;
}

// The steps of a program that are no ops of their own: spec/program_steps.py's.
inline Tensor global_pool(Tensor x) {
  if (x.dim() != 4) fail("x: expected 4 dimensions, got ", x.dim());
  const Checker checker(x);
  SqueezeExciteParams p{};
  p.path = checker.path();
  p.batch = size32("x", x.size(0));
  p.channels = channels32("x", x.size(1));
  p.height = size32("x", x.size(2));
  p.width = size32("x", x.size(3));
  if (p.height < 1 || p.width < 1) fail("x: expected at least one row and column");
  p.x = checker.tensor4("x", x, {p.batch, p.channels, p.height, p.width});
  Tensor out = new_output({p.batch, p.channels, 1, 1}, {p.channels, 1, 1, 1}, x.scalar_type());
  p.out = out.data_ptr();
  if (p.batch > 0) run_launch(GlobalPoolLaunch{p});
  return out;
}

inline Tensor linear(Tensor x, Tensor weight, OptionalTensor bias) {
  if (x.dim() != 2 && x.dim() != 4) fail("x: expected 2 or 4 dimensions, got ", x.dim());
  if (weight.dim() != 2) fail("weight: expected 2 dimensions, got ", weight.dim());
  const Checker checker(x);
  GhostForwardParams p{};
  GhostShape& s = p.shape;
  s.path = checker.path();
  s.channels_last = true;
  const int64_t batch = s.batch = size32("x", x.size(0));
  const int64_t depth = s.in_channels = channels32("weight", weight.size(1));
  const int64_t rows = s.init_channels = s.out_channels = bounded("weight", "rows", weight.size(0), 0, kMaxChannels);
  s.height = s.width = s.dw_size = p.kernel = p.stride = p.dilation = p.x_height = p.x_width = 1;
  s.ratio = 2;
  p.x = {checker.matrix("x", x, batch, depth), Checker::stride(x, 0), Checker::stride(x, 1), 0, 0};
  p.primary_weight = matrix_of(checker, "weight", weight, rows, depth).data;
  p.primary_weight_stride_n = depth;
  p.primary_weight_stride_k = 1;
  p.primary.bias = checker.vector("bias", bias, rows);
  if (!countable(std::initializer_list<int64_t>{batch, rows})) fail("weight: expected at most 2^40 elements of output");
  Tensor out = new_output({batch, rows}, {std::max<int64_t>(rows, 1), 1}, x.scalar_type());
  p.out = {out.data_ptr(), rows, 1, 0, 0};
  if (batch > 0 && rows > 0) forward(p);
  return out;
}

// x's numbers, and where they go: a new tensor of that type, in x's memory format. None: ``to`` is null.
inline Tensor to_new_output(const Tensor& x, ScalarType type, CastParams& p) {
  if (x.dim() != 2 && x.dim() != 4) fail("x: expected 2 or 4 dimensions, got ", x.dim());
  const Checker checker(x);
  p = {checker.path(), checker.path(), {1, 1, 1, 1}, {}, nullptr, nullptr};
  Tensor out;
  if (x.dim() == 2) {
    const int64_t n = size32("x", x.size(0)), c = size32("x", x.size(1));
    p.from = checker.check("x", x, {n, c});
    out = new_output({n, c}, {std::max<int64_t>(c, 1), 1}, type);
  } else {
    const int64_t n = size32("x", x.size(0)), c = size32("x", x.size(1)), h = size32("x", x.size(2)),
                  w = size32("x", x.size(3));
    p.from = checker.check("x", x, {n, c, h, w});
    Tensor4 ignored;
    out = new_map(n, c, h, w, type, is_channels_last(x), &ignored);
  }
  const bool last = x.dim() == 4 && is_channels_last(x);
  const int order[] = {0, last ? 2 : 1, last ? 3 : 2, last ? 1 : 3};
  int at = 3;  // the innermost dimension that is left; what lies one after the other is one
  for (int64_t i = x.dim() - 1; i >= 0; --i) {
    const int64_t size = x.size(order[i]), stride = x.stride(order[i]);
    if (size == 0) return out;
    if (size == 1) continue;
    if (p.sizes[at] > 1 && stride != p.sizes[at] * p.strides[at]) --at;
    if (p.sizes[at] == 1) p.strides[at] = stride;
    p.sizes[at] *= size;
  }
  p.to = out.data_ptr();
  return out;
}

// Of 2 or 4 dimensions; ``dtype`` is a place in DTYPES.
inline Tensor cast(Tensor x, int64_t dtype) {
  constexpr std::pair<ScalarType, Path> kTypes[] = {
      {ScalarType::Float, Path::kFloat32}, {ScalarType::Half, Path::kFloat16}, {ScalarType::BFloat16, Path::kBFloat16}};
  if (dtype < 0 || dtype >= std::ssize(kTypes)) fail("dtype: expected 0, 1 or 2, got ", dtype);
  const auto [type, path] = kTypes[dtype];
  CastParams p;
  Tensor out = to_new_output(x, type, p);
  p.to_path = path;
  if (p.to) run_launch(CastLaunch{p});
  return out;
}

// Of 2 or 4 dimensions.
inline Tensor through_gate(Tensor x, int64_t gate) {
  if (gate < 0 || gate > static_cast<int64_t>(Gate::kReLU6)) fail("gate: expected 0, 1 or 2, got ", gate);
  GateParams p;
  Tensor out = to_new_output(x, x.scalar_type(), p);
  p.gate = static_cast<Gate>(gate);
  if (p.to) run_launch(GateLaunch{p});
  return out;
}

inline Tensor concat(Tensor x, Tensor second, OptionalTensor third, OptionalTensor fourth) {
  if (fourth && !third) fail("third: expected a tensor before the fourth, got none");
  const Checker checker(x);
  const std::pair<const char*, const Tensor*> given[ConcatParams::kParts] = {
      {"x", &x}, {"second", &second}, {"third", third ? &*third : nullptr}, {"fourth", fourth ? &*fourth : nullptr}};
  for (const auto& [name, t] : given) {
    if (t && !t->defined()) fail(name, ": expected a tensor, got none");
    if (t && t->dim() != 4) fail(name, ": expected 4 dimensions, got ", t->dim());
  }
  ConcatParams p{};
  p.path = checker.path();
  p.batch = size32("x", x.size(0));
  p.height = size32("x", x.size(2));
  p.width = size32("x", x.size(3));
  if (p.height < 1 || p.width < 1) fail("x: expected at least one row and column");
  int64_t channels = 0;
  for (int i = 0; i < ConcatParams::kParts && given[i].second; ++i) {
    const auto& [name, t] = given[i];
    p.channels[i] = channels32(name, t->size(1));
    channels = channels32(name, channels + p.channels[i]);
    p.parts[i] = checker.tensor4(name, *t, {p.batch, p.channels[i], p.height, p.width});
  }
  if (!countable(std::initializer_list<int64_t>{p.batch, channels, p.height, p.width})) {
    fail("x: expected at most 2^40 elements of output");
  }
  Tensor out = new_map(p.batch, channels, p.height, p.width, x.scalar_type(), is_channels_last(x), &p.out);
  if (p.batch > 0) run_launch(ConcatLaunch{p});
  return out;
}

// But the size of what it makes.
inline PoolParams pool_of(const Tensor& x, int64_t kernel) {
  if (x.dim() != 4) fail("x: expected 4 dimensions, got ", x.dim());
  const Checker checker(x);
  PoolParams p{};
  p.path = checker.path();
  p.kernel = bounded("kernel", "rows", kernel, 1, kMaxKernel);
  p.batch = size32("x", x.size(0));
  p.channels = channels32("x", x.size(1));
  p.height = size32("x", x.size(2));
  p.width = size32("x", x.size(3));
  p.channels_last = is_channels_last(x);
  p.x = checker.tensor4("x", x, {p.batch, p.channels, p.height, p.width});
  return p;
}

template <typename PoolLaunch>
Tensor pooled(const Tensor& x, PoolParams& p) {
  Tensor out = new_map(p.batch, p.channels, p.out_height, p.out_width, x.scalar_type(), p.channels_last, &p.out);
  if (p.batch > 0) run_launch(PoolLaunch{p});
  return out;
}

inline Tensor max_pool(Tensor x, int64_t kernel, int64_t stride) {
  PoolParams p = pool_of(x, kernel);
  if (kernel % 2 == 0) fail("kernel: expected an odd one, got ", kernel);
  if (stride != 1 && stride != 2) fail("stride: the kernel takes 1 and 2, got ", stride);
  if (p.height < 1 || p.width < 1) fail("x: expected at least one row and column");
  p.stride = static_cast<int>(stride);
  p.out_height = (p.height - 1) / p.stride + 1;
  p.out_width = (p.width - 1) / p.stride + 1;
  return pooled<MaxPoolLaunch>(x, p);
}

inline Tensor avg_pool(Tensor x, int64_t kernel) {
  PoolParams p = pool_of(x, kernel);
  if (p.height < kernel || p.width < kernel) fail("x: expected at least ", kernel, " rows and columns");
  p.out_height = p.height / p.kernel;
  p.out_width = p.width / p.kernel;
  return pooled<AvgPoolLaunch>(x, p);
}

inline Tensor upsample(Tensor x, int64_t scale) {
  PoolParams p = pool_of(x, 1);
  if (scale < 1 || scale > kMaxKernel) fail("scale: expected 1 … ", kMaxKernel, ", got ", scale);
  const int64_t height = scale * p.height, width = scale * p.width;
  if (p.height < 1 || p.width < 1) fail("x: expected at least one row and column");
  if (height > INT32_MAX || width > INT32_MAX ||
      !countable(std::initializer_list<int64_t>{p.batch, p.channels, height, width})) {
    fail("scale: expected at most 2^40 elements of output, and 2^31 - 1 rows and columns");
  }
  p.stride = static_cast<int>(scale);
  p.out_height = static_cast<int>(height);
  p.out_width = static_cast<int>(width);
  return pooled<UpsampleLaunch>(x, p);
}

}  // namespace ghostfused::cpu
