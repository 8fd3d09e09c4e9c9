// AVX2 and FMA.
#include <cstdint>
#include <type_traits>
#include <utility>

#ifdef __x86_64__
#include <immintrin.h>

#include "cpu/dispatch.h"
#include "cpu/target.h"

GHOSTFUSED_TARGET("avx2,fma,f16c,bmi,bmi2")
#define GHOSTFUSED_ISA avx2
#define GHOSTFUSED_LANES 8
#define GHOSTFUSED_X86_HALVES
#include "cpu/kernels.h"
GHOSTFUSED_TARGET_END

namespace ghostfused::cpu {
const Kernels kAvx2 = avx2::kernels;
}  // namespace ghostfused::cpu
#endif  // __x86_64__
