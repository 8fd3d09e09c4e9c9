// NEON, and products of fp16 and of bf16 that are added up in fp32.
#include <cstdint>
#include <type_traits>
#include <utility>

#ifdef __aarch64__
#include <arm_neon.h>

#include "cpu/dispatch.h"
#include "cpu/target.h"

GHOSTFUSED_TARGET("arch=armv8.2-a+fp16fml+bf16")
#define GHOSTFUSED_ISA neon_bf16
#define GHOSTFUSED_LANES 4
#define GHOSTFUSED_MANY_REGISTERS
#define GHOSTFUSED_NEON
#define GHOSTFUSED_NEON_FP16
#define GHOSTFUSED_NEON_BF16
#include "cpu/kernels.h"
GHOSTFUSED_TARGET_END

namespace ghostfused::cpu {
const Kernels kNeonBf16 = neon_bf16::kernels;
}  // namespace ghostfused::cpu
#endif  // __aarch64__
