// Runs units of work on as many threads as they are worth.
#pragma once

#include "cpu/vec.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

constexpr double kSerialWork = 200 << 10;  // multiply-adds that are done before other threads would wake up

inline void run(const Threads& threads, int64_t units, double work, Body body, void* context) {
  if (threads.count == 1 || units == 1 || work < kSerialWork) {
    body(0, units, context);
  } else {
    threads.parallel_for(units, body, context);
  }
}

// ``Kernels::run<T>`` for the T of a path. Sums are fp32 on all of them.
#define GHOSTFUSED_BY_PATH(path, function) \
  ((path) == Path::kFloat16 ? function<Float16> : (path) == Path::kBFloat16 ? function<BFloat16> : function<float>)

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
