// The calls of kernels that steps make: what a recording keeps of a run.
#pragma once

#include <cstring>
#include <variant>

#include "cpu/dispatch.h"

namespace ghostfused::cpu {

// Each of them has
// - run(kernels, threads);
// - maps(f): f of every pointer to what a step reads or makes, null where there is none;
// - weights(f): f of every pointer to a tensor of the program that the kernel reads where it lies, if there may be one.

struct ForwardLaunch {
  GhostForwardParams p;
  Packed packed;

  void run(const Kernels& kernels, int threads) const { kernels.forward(p, packed, threads); }
  template <typename F>
  void maps(const F& f) {
    f(p.x.data), f(p.out.data), f(p.residual.data), f(p.output_gate.data), f(p.input_gate);
  }
  template <typename F>
  void weights(const F& f) const {
    if (!packed.data) f(p.primary_weight);
    const GhostShape& s = p.shape;  // NCHW reads float32's depthwise weights there
    if (!s.channels_last && s.out_channels > s.init_channels) f(p.cheap_weight);
  }
};

struct DepthwiseLaunch {
  DepthwiseParams p;
  Packed packed;

  void run(const Kernels& kernels, int threads) const { kernels.depthwise(p, packed, threads); }
  template <typename F>
  void maps(const F& f) {
    f(p.x.data), f(p.out.data);
  }
};

struct SqueezeExciteLaunch {
  SqueezeExciteParams p;
  Packed reduce, expand;

  void run(const Kernels& kernels, int threads) const { kernels.squeeze_excite(p, reduce, expand, threads); }
  template <typename F>
  void maps(const F& f) {
    f(p.x.data), f(p.out);
  }
  template <typename F>
  void weights(const F& f) const {
    if (!reduce.data) f(p.reduce.data);
    if (!expand.data) f(p.expand.data);
    f(p.reduce_bias.data), f(p.expand_bias.data);
  }
};

struct GlobalPoolLaunch {
  SqueezeExciteParams p;

  void run(const Kernels& kernels, int threads) const { kernels.global_pool(p, threads); }
  template <typename F>
  void maps(const F& f) {
    f(p.x.data), f(p.out);
  }
};

// What copies to the other memory format, to another type, or through a function.
template <typename Params, auto kernel>
struct CopyLaunch {
  Params p;

  void run(const Kernels& kernels, int threads) const { (kernels.*kernel)(p, threads); }
  template <typename F>
  void maps(const F& f) {
    f(p.from), f(p.to);
  }
};
using ConvertLaunch = CopyLaunch<ConvertParams, &Kernels::convert>;
using CastLaunch = CopyLaunch<CastParams, &Kernels::cast>;
using GateLaunch = CopyLaunch<GateParams, &Kernels::gate>;

struct ConcatLaunch {
  ConcatParams p;

  void run(const Kernels& kernels, int threads) const {
    if (!is_made_in_place()) kernels.concat(p, threads);
  }
  int64_t numbers(int part) const { return int64_t{p.channels[part]} * p.height * p.width; }
  int64_t number_bytes() const { return p.path == Path::kFloat32 ? 4 : 2; }
  // Whether all of it is there already: a recording may place the parts of one image so.
  bool is_made_in_place() const {
    if (p.batch > 1) return false;
    const char* at = static_cast<const char*>(p.out.data);
    for (int i = 0; i < ConcatParams::kParts && p.parts[i].data; at += numbers(i++) * number_bytes()) {
      if (p.parts[i].data != at) return false;
    }
    return true;
  }
  template <typename F>
  void maps(const F& f) {
    for (Tensor4& part : p.parts) f(part.data);
    f(p.out.data);
  }
};

template <auto kernel>
struct PoolLaunch {
  PoolParams p;

  void run(const Kernels& kernels, int threads) const { (kernels.*kernel)(p, threads); }
  template <typename F>
  void maps(const F& f) {
    f(p.x.data), f(p.out.data);
  }
};

using MaxPoolLaunch = PoolLaunch<&Kernels::max_pool>;
using AvgPoolLaunch = PoolLaunch<&Kernels::avg_pool>;
using UpsampleLaunch = PoolLaunch<&Kernels::upsample>;

struct BytesLaunch {
  const void* from;
  void* to;
  int64_t bytes;

  void run(const Kernels&, int) const { std::memcpy(to, from, bytes); }
  template <typename F>
  void maps(const F& f) {
    f(from), f(to);
  }
};

using Launch =
    std::variant<ForwardLaunch, DepthwiseLaunch, SqueezeExciteLaunch, GlobalPoolLaunch, ConvertLaunch, CastLaunch,
                 GateLaunch, ConcatLaunch, MaxPoolLaunch, AvgPoolLaunch, UpsampleLaunch, BytesLaunch>;

}  // namespace ghostfused::cpu
