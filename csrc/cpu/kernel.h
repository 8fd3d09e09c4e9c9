// What the binding and the tests see of the CPU kernels. Neither Torch nor an instruction set is needed to include it.
#pragma once

#include <cstdint>

#include "../ghost_module.h"

namespace ghostfused::cpu {

// Calls body(begin, end, context) for ranges that make up [0, count), on any threads, and returns when all are done.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t count, Body body, void* context);

struct Threads {
  int count;
  ParallelFor parallel_for;
};

// act(norm(depthwise_conv(x))), padded by half the kernel.
struct DepthwiseParams {
  Path path;
  bool channels_last;  // of the output
  int batch, channels, height, width, out_height, out_width, kernel_h, kernel_w, stride;
  Tensor4 x, out;
  const void* weight;  // (C, kernel_h, kernel_w)
  int64_t weight_stride_c, weight_stride_h, weight_stride_w;
  NormAct norm;
};

// The values of ghostfused/spec.py's Gate.
enum class Gate : int { kSigmoid, kHardsigmoid, kReLU6 };

// gate(expand act(reduce mean(x))), a number per image and channel.
struct SqueezeExciteParams {
  Path path;
  int batch, channels, height, width, reduced;
  Tensor4 x;
  const void *reduce_weight, *expand_weight;  // (reduced, C) and (C, reduced), contiguous
  ChannelVector reduce_bias, expand_bias;
  Act act;
  Gate gate;
  void* out;  // (N, C), contiguous
};

// One compilation of the kernels.
struct Kernels {
  void (*forward)(const GhostForwardParams& params, const Threads& threads);
  void (*depthwise)(const DepthwiseParams& params, const Threads& threads);
  void (*squeeze_excite)(const SqueezeExciteParams& params, const Threads& threads);
  double (*multiply_add)(int64_t count);  // nothing but that, in registers; returns the operations done
};
extern const Kernels kBaseline, kAvx2, kAvx512vl, kAvx512;  // each in the kernel_*.cpp file of its name

struct Isa {
  const char* name;
  int lanes;  // floats in a vector
  bool (*supported)();
  const Kernels* kernels;
};

// Every compiled instruction set, slowest first; ends with a null name.
extern const Isa kIsas[];

// The one named by the environment variable GHOSTFUSED_CPU_ISA, else the fastest that this CPU has. Null, and an
// explanation in *error, if the named one isn't compiled or this CPU lacks it.
const Isa* chosen_isa(const char** error);

// This thread's scratch memory, aligned to 64 bytes; valid until its next call.
float* thread_scratch(int64_t floats);

}  // namespace ghostfused::cpu
