// Many threads at once call csrc/cpu/pool.h, for the sanitizers: every unit must be done once, also where bodies throw.
#include <atomic>
#include <cstdio>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../../csrc/cpu/pool.h"

using ghostfused::cpu::Items;

namespace {

struct Job {
  std::vector<int> done;  // per unit: how often
  bool fails;
};

void body(Items& items, void* context) {
  Job& job = *static_cast<Job*>(context);
  for (int64_t begin, end; items.next(&begin, &end);) {
    for (int64_t unit = begin; unit < end; ++unit) {
      ++job.done[unit];
      for (int i = 0; i < unit * 37 % 500; ++i) asm volatile("");
    }
    if (job.fails) throw std::runtime_error("asked for");
  }
}

// Whether a job of so many units ended as it should.
bool run(int threads, int units, int items, bool fails) {
  Job job{std::vector<int>(units), fails};
  try {
    ghostfused::cpu::parallel_for(threads, units, items, body, &job);
  } catch (const std::runtime_error&) {
    return fails;
  }
  for (const int times : job.done) {
    if (times != 1) return false;
  }
  return !fails;
}

}  // namespace

int main() {
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 8; ++caller) {
    callers.emplace_back([&, caller] {
      for (int i = 0; i < 1000; ++i) {
        wrong += !run(1 + (i + caller) % 5, 1 + (i * 7 + caller * 13) % 300, 1 + i * 3 % 70, i % 50 == 49);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  std::printf("%d wrong\n", wrong.load());
  return wrong != 0;
}
