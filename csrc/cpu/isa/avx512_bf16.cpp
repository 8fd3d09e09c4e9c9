// AVX-512 with 512-bit vectors, and products of bf16.
#include <cstdint>
#include <type_traits>
#include <utility>

#ifdef __x86_64__
#include <immintrin.h>

#include "cpu/dispatch.h"
#include "cpu/target.h"

GHOSTFUSED_TARGET("avx2,fma,f16c,bmi,bmi2,avx512f,avx512vl,avx512dq,avx512bw,avx512bf16")
#define GHOSTFUSED_ISA avx512_bf16
#define GHOSTFUSED_LANES 16
#define GHOSTFUSED_MANY_REGISTERS
#define GHOSTFUSED_X86_HALVES
#define GHOSTFUSED_X86_MASKS
#define GHOSTFUSED_X86_BF16
#include "cpu/kernels.h"
GHOSTFUSED_TARGET_END

namespace ghostfused::cpu {
const Kernels kAvx512Bf16 = avx512_bf16::kernels;
}  // namespace ghostfused::cpu
#endif  // __x86_64__
