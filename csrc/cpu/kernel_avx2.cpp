// AVX2 and FMA.
#include <cstdint>
#include <utility>
#ifdef __x86_64__
#include <immintrin.h>

#include "kernel.h"

#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#define GHOSTFUSED_ISA avx2
#define GHOSTFUSED_LANES 8
#define GHOSTFUSED_X86_HALVES
#include "forward.h"

namespace ghostfused::cpu {
void forward_avx2(const GhostForwardParams& params, const Threads& threads) { avx2::forward(params, threads); }
}  // namespace ghostfused::cpu
#endif  // __x86_64__
