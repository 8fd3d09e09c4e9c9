// What may reach a kernel: the one check that every tensor of an op goes through, and the bounds of sizes.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "common/parameters.h"

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

// An argument's name, put together only if it is to blame.
struct Name {
  const char *half, *field;
  Name(const char* half, const char* field) : half(half), field(field) {}
  Name(const char* field) : Name("", field) {}
};
inline std::ostream& operator<<(std::ostream& stream, Name name) { return stream << name.half << name.field; }

// The kernels count in 32 bits along a dimension, with room for a border; and their products of sizes, by the bytes of
// an element, by a kernel's area and by what a vector has too much, stay far below 2^63.
constexpr int64_t kMaxSize = int64_t{1} << 30, kMaxChannels = int64_t{1} << 26, kMaxElements = int64_t{1} << 40;
constexpr int64_t kMaxKernel = 1023, kMaxBorder = int64_t{1} << 24;

inline int bounded(Name name, const char* what, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most) fail(name, ": expected ", least, " … ", most, " ", what, ", got ", value);
  return static_cast<int>(value);
}
inline int size32(Name name, int64_t size) { return bounded(name, "along a dimension", size, 0, kMaxSize); }
inline int channels32(Name name, int64_t size) { return bounded(name, "channels", size, 1, kMaxChannels); }

// False if there are more elements than kernels count.
template <typename Sizes>
bool countable(const Sizes& sizes) {
  int64_t count = 1;
  for (const int64_t size : sizes) {
    if (size == 0) return true;
    if (size < 0 || __builtin_mul_overflow(count, size, &count)) return false;
  }
  return count <= kMaxElements;
}

// What is too large for a float becomes infinity, as rounding would make it; the cast itself says nothing of such
// numbers.
inline float as_float(double value) {
  if (std::abs(value) <= std::numeric_limits<float>::max()) return static_cast<float>(value);
  if (std::isnan(value)) return NAN;
  return value > 0 ? INFINITY : -INFINITY;
}

// Checks one tensor argument after another against x.
class Checker {
 public:
  explicit Checker(const Tensor& x) : dtype(dtype_of("x", x)), element_(dtype == ScalarType::Float ? 4 : 2) {
    path();  // refuses other dtypes
    device_of("x", x, &device_type_, &device_);
  }

  Path path(bool allow_tf32 = false) const {
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

  // t's data, once its device, dtype, sizes and storage are known to be what a kernel will read.
  void* check(Name name, const Tensor& t, std::initializer_list<int64_t> sizes, bool or_float32 = false) const {
    int32_t device_type, device;
    device_of(name, t, &device_type, &device);
    if (device_type != device_type_ || device != device_) fail(name, ": expected a tensor on x's device");
    const ScalarType type = t.scalar_type();
    if (type != dtype && !(or_float32 && type == ScalarType::Float)) {
      fail(name, ": expected x's dtype", or_float32 ? " or float32" : "");
    }
    const auto got = t.sizes();
    bool same = got.size() == sizes.size();
    for (size_t d = 0; same && d < sizes.size(); ++d) same = got[d] == sizes.begin()[d];
    if (!same) fail(name, ": expected shape ", shape(sizes), ", got ", shape(got));
    if (!countable(got)) fail(name, ": expected at most 2^40 elements, got shape ", shape(got));
    return memory(name, t, type == ScalarType::Float ? 4 : element_);
  }

  // Or the weight of a 1×1 convolution.
  void* matrix(Name name, const Tensor& t, int64_t rows, int64_t columns) const {
    if (t.dim() == 4) return check(name, t, {rows, columns, 1, 1});
    return check(name, t, {rows, columns});
  }

  Tensor4 tensor4(Name name, const OptionalTensor& t, std::initializer_list<int64_t> sizes) const {
    if (!t) return {};
    void* data = check(name, *t, sizes);
    return {data, stride(*t, 0), stride(*t, 1), stride(*t, 2), stride(*t, 3)};
  }

  ChannelVector vector(Name name, const OptionalTensor& t, int64_t channels, bool or_float32 = false) const {
    if (!t) return {};
    const void* data = check(name, *t, {channels}, or_float32);
    return {data, stride(*t, 0)};
  }

  NormAct norm_act(const char* half, int64_t channels, const OptionalTensor& bias, const OptionalTensor& mean,
                   const OptionalTensor& var, const OptionalTensor& gamma, const OptionalTensor& beta,
                   const OptionalTensor& slope, double eps, int64_t act, double negative_slope) const {
    if (mean.has_value() != var.has_value()) fail(half, "var: expected both mean and var, or neither");
    if (!mean && (gamma || beta)) fail(half, "gamma, ", half, "beta: expected None without mean and var");
    if (!(eps >= 0)) fail(half, "eps: expected a number that is not negative, got ", eps);
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
    p.eps = as_float(eps);
    p.negative_slope = as_float(negative_slope);
    return p;
  }

  static Act act(Name name, int64_t act) {
    if (act < 0 || act > static_cast<int64_t>(kLastAct)) fail(name, ": the kernels have no activation ", act);
    return static_cast<Act>(act);
  }

  // That of a dimension of one may be anything, and would overflow where a kernel multiplies it all the same.
  static int64_t stride(const Tensor& t, int64_t d) {
    const int64_t stride = t.stride(d);
    return stride > INT32_MAX && t.size(d) <= 1 ? 0 : stride;
  }

  const ScalarType dtype;

 private:
  // Python's None for a tensor that must be there arrives as a tensor that is nothing.
  static void device_of(Name name, const Tensor& t, int32_t* type, int32_t* index) {
    if (aoti_torch_get_device_type(t.get(), type) || aoti_torch_get_device_index(t.get(), index)) {
      fail(name, ": expected a tensor, got none");
    }
  }
  static ScalarType dtype_of(Name name, const Tensor& t) {
    if (!t.defined()) fail(name, ": expected a tensor, got none");
    return t.scalar_type();
  }

  template <typename Sizes>
  static std::string shape(const Sizes& sizes) {
    std::ostringstream text;
    for (const int64_t size : sizes) text << (text.tellp() > 0 ? ", " : "(") << size;
    return text.str() + (sizes.size() == 0 ? "()" : ")");
  }

  // A storage may be freed or cut after a tensor was made of it: all that t's strides reach must be in there.
  static void* memory(Name name, const Tensor& t, int64_t element) {
    const auto sizes = t.sizes(), strides = t.strides();
    int64_t last = t.storage_offset(), bytes;
    bool fits = last >= 0;
    for (size_t d = 0; d < sizes.size(); ++d) {
      if (sizes[d] == 0) return nullptr;  // nobody reads it
      int64_t reach;
      fits = fits && strides[d] >= 0 && !__builtin_mul_overflow(sizes[d] - 1, strides[d], &reach) &&
             !__builtin_add_overflow(last, reach, &last);
    }
    void* data = nullptr;
    if (aoti_torch_get_storage_size(t.get(), &bytes) != AOTI_TORCH_SUCCESS) {
      fail(name, ": expected a tensor with a storage");
    }
    if (!fits || last >= bytes / element) {
      fail(name, ": expected a storage that holds all of it, got one of ", bytes, " bytes: it has been freed or cut");
    }
    if (aoti_torch_get_data_ptr(t.get(), &data) != AOTI_TORCH_SUCCESS || !data) {
      fail(name, ": expected a tensor with memory of its own");
    }
    return data;
  }

  const int64_t element_;
  int32_t device_type_, device_;
};

}  // namespace ghostfused
