// What the binding and the tests see of the CPU kernels. Neither Torch nor an instruction set is needed to include it.
#pragma once

#include <cstdint>

#include "common/parameters.h"
#include "cpu/pool.h"

namespace ghostfused::cpu {

// Maps (N, C, H, W), dense, from one memory format to the other.
struct ConvertParams {
  Path path;
  int batch, channels, height, width;
  const void* from;
  void* to;
  bool to_channels_last;
};

// Numbers to another type, in which they lie one after the other.
struct CastParams {
  Path from_path, to_path;
  int64_t sizes[4], strides[4];  // of ``from``, in the order of ``to``
  const void* from;
  void* to;
};

// Numbers through a gate's function, in their own type.
struct GateParams : CastParams {
  Gate gate;
};

// Maps of one height and width, one after the other along the channels; null: there are no more.
struct ConcatParams {
  static constexpr int kParts = 4;
  Path path;
  int batch, height, width;
  int channels[kParts];
  Tensor4 parts[kParts], out;
};

// Whether the primary conv is any other kind than 1×1 at stride 1.
inline bool has_patches(const GhostForwardParams& p) { return p.kernel > 1 || p.stride > 1; }

// What a square window makes of maps: the maxima, padded by half of it, or the means, not padded; or what it makes of a
// number, ``stride`` rows and columns of it.
struct PoolParams {
  Path path;
  bool channels_last;  // x's channels lie one after the other, and the result's; else the columns of the result
  int batch, channels, height, width, out_height, out_width, kernel, stride;
  Tensor4 x, out;
};
struct PoolTask {
  const PoolParams& p;
  int64_t bands;  // see row_bands
};

// A weight as a kernel reads it, made once by ``pack_weight``, and the norms and depthwise weights, made by
// ``pack_parameters``; null: the kernel makes them from the tensors at each call.
struct Packed {
  const void* data = nullptr;
  bool bfloat16 = false;  // in half the bytes, of float32 numbers that bfloat16 holds exactly
  const float* parameters = nullptr;
};

// One compilation of the kernels. ``threads``: at most so many work on a call, the calling one among them.
struct Kernels {
  void (*forward)(const GhostForwardParams& params, const Packed& weight, int threads);
  void (*depthwise)(const DepthwiseParams& params, const Packed& packed, int threads);
  void (*squeeze_excite)(const SqueezeExciteParams& params, const Packed& reduce, const Packed& expand, int threads);
  // The 1×1 weights as forward reads them, whatever the batch, the height and width are; null ``to``: nothing is
  // written. Returns the bytes; 0: forward reads them where they lie.
  int64_t (*pack_weight)(const GhostForwardParams& params, bool bfloat16, void* to);
  // The same of what depends on neither: the bytes, and to ``to`` what forward and depthwise read.
  int64_t (*pack_parameters)(const GhostForwardParams& params, void* to);
  int64_t (*pack_depthwise)(const DepthwiseParams& params, void* to);
  // the means of x over height and width, to out
  void (*global_pool)(const SqueezeExciteParams& params, int threads);
  void (*convert)(const ConvertParams& params, int threads);
  void (*cast)(const CastParams& params, int threads);
  void (*concat)(const ConcatParams& params, int threads);
  void (*max_pool)(const PoolParams& params, int threads);
  void (*avg_pool)(const PoolParams& params, int threads);
  void (*upsample)(const PoolParams& params, int threads);
  void (*gate)(const GateParams& params, int threads);
  // nothing but that, in registers, as the path's 1×1 convolution does; returns the operations done
  double (*multiply_adds)(int64_t count, Path path);
};
// each in the file of isa/ that has its name
extern const Kernels kBaseline, kAvx2, kAvx512vl, kAvx512vlBf16, kAvx512, kAvx512Bf16, kAvx512Amx, kNeonFp16, kNeonBf16,
    kSve512;

struct Isa {
  const char* name;
  int lanes;  // floats in a vector
  bool (*supported)();
  const Kernels* kernels;
  bool tiles = false;  // bf16 in channels_last is multiplied by matrices
};

// Every compiled instruction set, slowest first; ends with a null name.
extern const Isa kIsas[];

// The one named by the environment variable GHOSTFUSED_CPU_ISA, else the fastest that this CPU has. Null, and an
// explanation in *error, if the named one isn't compiled or this CPU lacks it.
const Isa* chosen_isa(const char** error);

// This thread's scratch memory, aligned to 64 bytes; valid until its next call. Throws for more than so many floats: on
// all threads of a machine that might be more than it has.
constexpr int64_t kMaxScratch = int64_t{1} << 28;
float* thread_scratch(int64_t floats);

}  // namespace ghostfused::cpu
