// SVE with vectors of 512 bits, which is what setup.py compiles this file for. Vectors of 128 bits, and two units for
// 256, do what NEON does: see docs/cpu.md.
#include <cstdint>
#include <type_traits>
#include <utility>

#ifdef GHOSTFUSED_SVE512
#if __ARM_FEATURE_SVE_BITS != 512
#error expected the flags -march=armv8.2-a+sve -msve-vector-bits=512
#endif
#include <arm_sve.h>

#include "cpu/dispatch.h"

#define GHOSTFUSED_ISA sve512
#define GHOSTFUSED_LANES 16
#define GHOSTFUSED_MANY_REGISTERS
#define GHOSTFUSED_SVE
#include "cpu/kernels.h"

namespace ghostfused::cpu {
const Kernels kSve512 = sve512::kernels;
}  // namespace ghostfused::cpu
#endif  // GHOSTFUSED_SVE512
