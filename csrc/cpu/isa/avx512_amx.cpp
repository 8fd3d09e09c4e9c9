// AVX-512, and products of bf16 in channels_last by AMX. What multiplies no bf16 is another's.
#include <cstdint>
#include <type_traits>
#include <utility>

#ifdef __x86_64__
#include <immintrin.h>

#include "cpu/dispatch.h"
#include "cpu/target.h"

GHOSTFUSED_TARGET("avx2,fma,f16c,bmi,bmi2,avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,amx-tile,amx-bf16")
#define GHOSTFUSED_ISA avx512_amx
#define GHOSTFUSED_LANES 16
#define GHOSTFUSED_MANY_REGISTERS
#define GHOSTFUSED_X86_HALVES
#define GHOSTFUSED_X86_MASKS
#define GHOSTFUSED_X86_BF16
#define GHOSTFUSED_AMX
#define GHOSTFUSED_BY_PATH(path, function) function<BFloat16>
#include "cpu/forward.h"
GHOSTFUSED_TARGET_END

namespace ghostfused::cpu {
namespace {

const Kernels& other(Path path) { return path == Path::kBFloat16 ? kAvx512Bf16 : kAvx512; }

void forward(const GhostForwardParams& p, const Packed& weight, int threads) {
  return p.shape.path == Path::kBFloat16 ? avx512_amx::forward(p, weight, threads)
                                         : kAvx512.forward(p, weight, threads);
}
int64_t pack_weight(const GhostForwardParams& p, bool bfloat16, void* to) {
  return p.shape.path == Path::kBFloat16 ? avx512_amx::pack_weight(p, bfloat16, to)
                                         : kAvx512.pack_weight(p, bfloat16, to);
}

}  // namespace

const Kernels kAvx512Amx{
    forward,
    [](const DepthwiseParams& p, const Packed& packed, int threads) { other(p.path).depthwise(p, packed, threads); },
    [](const SqueezeExciteParams& p, const Packed& reduce, const Packed& expand, int threads) {
      other(p.path).squeeze_excite(p, reduce, expand, threads);
    },
    pack_weight,
    [](const GhostForwardParams& p, void* to) { return other(p.shape.path).pack_parameters(p, to); },
    [](const DepthwiseParams& p, void* to) { return other(p.path).pack_depthwise(p, to); },
    [](const SqueezeExciteParams& p, int threads) { other(p.path).global_pool(p, threads); },
    kAvx512.convert,
    [](const CastParams& p, int threads) { other(p.to_path).cast(p, threads); },
    kAvx512.concat,
    kAvx512.max_pool,
    [](const PoolParams& p, int threads) { other(p.path).avg_pool(p, threads); },
    kAvx512.upsample,
    [](const GateParams& p, int threads) { other(p.to_path).gate(p, threads); },
    [](int64_t count, Path path) {
      return path == Path::kBFloat16 ? avx512_amx::multiply_adds(count) : kAvx512.multiply_adds(count, path);
    }};
}  // namespace ghostfused::cpu
#endif  // __x86_64__
