// What every CPU of the architecture has: SSE2 on x86-64, NEON on aarch64.
#include <cstdint>
#include <type_traits>
#include <utility>

#ifdef __aarch64__
#include <arm_neon.h>
#endif

#include "cpu/dispatch.h"

#define GHOSTFUSED_ISA baseline
#define GHOSTFUSED_LANES 4
#ifdef __aarch64__
#define GHOSTFUSED_MANY_REGISTERS
#define GHOSTFUSED_NEON
#endif
#include "cpu/kernels.h"

namespace ghostfused::cpu {
const Kernels kBaseline = baseline::kernels;
}  // namespace ghostfused::cpu
