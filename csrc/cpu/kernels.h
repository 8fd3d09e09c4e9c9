// All kernels. Each file of isa/ that includes this compiles them for one instruction set.
#pragma once

#include "cpu/avg_pool.h"
#include "cpu/depthwise_conv.h"
#include "cpu/forward.h"
#include "cpu/layout.h"
#include "cpu/max_pool.h"
#include "cpu/squeeze_excite.h"
#include "cpu/upsample.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

// For the benchmarks: what share of the multiply-adds that a core can do the kernels do.
template <typename T>
double multiply_adds(int64_t count) {
  constexpr bool kBlocks = kLanesAtOnce<T> == 2;
  constexpr int kChannels = Operand<T, false>::kChannels * (kBlocks ? 2 : 1);
#ifdef GHOSTFUSED_MANY_REGISTERS  // more than latency × units
  constexpr int kChains = 24;
#else
  constexpr int kChains = 12;
#endif
  Vec sum[kChains], a = splat(0.5f), b = splat(1.f);
  for (int j = 0; j < kChains; ++j) sum[j] = splat(static_cast<float>(j));
  for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 24
    for (int j = 0; j < kChains; ++j) {
      if constexpr (kBlocks) {
        sum[j] = multiply_add_block(a, b, sum[j]);
      } else {
        sum[j] = kChannels == 1 ? sum[j] * a + b : multiply_add<T, false>(a, b, sum[j]);
      }
    }
  }
  for (int j = 1; j < kChains; ++j) sum[0] += sum[j];
  asm volatile("" : "+m"(sum[0]));
  return 2.0 * kChannels * kChains * kLanes * static_cast<double>(count);
}
inline double multiply_adds(int64_t count, Path path) {
  return path == Path::kBFloat16 ? multiply_adds<BFloat16>(count) : multiply_adds<float>(count);
}

inline constexpr Kernels kernels{forward,        depthwise,   squeeze_excite, pack_weight, pack_parameters,
                                 pack_depthwise, global_pool, convert,        cast,        concat,
                                 max_pool,       avg_pool,    upsample,       gate,        multiply_adds};

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
