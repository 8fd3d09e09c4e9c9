// Runs units of work on as many threads as they are worth.
#pragma once

#include "cpu/vec.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

constexpr double kSerialWork = 200 << 10;  // multiply-adds that are done before other threads would wake up

// An item takes long beside taking it, and not long beside the whole: the others may have to wait for the last one.
constexpr double kItemWork = 100 << 10;
constexpr int64_t kItemsPerThread = 8;

inline void run(int threads, int64_t units, double work, Body body, void* context) {
  int64_t items = min_of<int64_t>(static_cast<int64_t>(work / kItemWork), kItemsPerThread * threads);
  items = work < kSerialWork ? 1 : max_of<int64_t>(items, threads);
  parallel_for(threads, units, items, body, context);
}

// What a body does of its job: each(unit).
template <typename Each>
GHOSTFUSED_INLINE void for_each_unit(Items& items, const Each& each) {
  for (int64_t begin, end; items.next(&begin, &end);) {
    for (int64_t unit = begin; unit < end; ++unit) each(unit);
  }
}

// Rows of one image for each thread from which on threads share rows: what a core reads, it made itself in the step
// before, and the border of its tile, made twice, is at most a seventh.
constexpr int64_t kRowsEach = 7;

// Parts of the rows of a batch's images, of which threads make one each, as in the steps before and after.
inline int64_t row_bands(int64_t batch, int64_t rows, int threads) {
  return batch >= threads ? 1 : max_of<int64_t>(min_of<int64_t>(rows / kRowsEach, threads), 1);
}

// ``Kernels::run<T>`` for the T of a path. Sums are fp32 on all of them.
#ifndef GHOSTFUSED_BY_PATH
#define GHOSTFUSED_BY_PATH(path, function) \
  ((path) == Path::kFloat16 ? function<Float16> : (path) == Path::kBFloat16 ? function<BFloat16> : function<float>)
#endif

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
