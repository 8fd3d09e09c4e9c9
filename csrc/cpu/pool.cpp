// The threads that help, and the jobs that they find.
#include "cpu/pool.h"

#include <pthread.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace ghostfused::cpu {

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;
using std::chrono::milliseconds;
using std::chrono::nanoseconds;

constexpr int kJobs = 64;  // at once; whoever comes when there are as many does all of its work itself
constexpr int64_t kMaxItems = 0xffff;

// How long a thread looks for work, or for the end of an item, before it sleeps: longer than from one step of a program
// to the next, shorter than another program would miss the core.
constexpr auto kPatience = microseconds(50);

// A helper that stood still for kStandstill since it looked last shares its core with another program. It rests, for
// twice as long where it had to rest not long ago: the others do its part, and aren't kept waiting for items.
constexpr auto kLook = microseconds(200), kStandstill = microseconds(500);
constexpr auto kShortestRest = milliseconds(5), kLongestRest = milliseconds(640);

void relax() {
#ifdef __x86_64__
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// How this thread rounds, and whether it flushes denormal numbers: the caller's choice, which makes up a result's bits.
uint64_t float_mode() {
#ifdef __x86_64__
  return _mm_getcsr() & ~0x3fu;  // without the exceptions that have happened
#elif defined(__aarch64__)
  uint64_t mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
#else
  return 0;
#endif
}
void set_float_mode([[maybe_unused]] uint64_t mode) {
  if (mode == float_mode()) return;
#ifdef __x86_64__
  _mm_setcsr(static_cast<unsigned>(mode));
#elif defined(__aarch64__)
  asm volatile("msr fpcr, %0" : : "r"(mode));
#endif
}

}  // namespace

// A caller's place, which other callers have before and after it.
//
// Whoever takes an item changes ``free``, whose high half changes with every job: so a thread that looked at a job that
// is over by now takes nothing. Only who holds an item may read the rest, since the job waits for it.
struct alignas(64) Job {
  std::atomic<uint64_t> free{0};  // the job's number << 32 | first << 16 | count: the items that nobody has taken
  std::atomic<int> helpers{0};    // the threads that may help
  std::atomic<int> done{0};       // items that helpers have done; they count when a helper leaves the job

  int64_t units, items;
  Body body;
  void* context;
  uint64_t mode;
  std::mutex error_mutex;
  std::exception_ptr error;

  // An item of the job of this number, or -1. The caller takes the first and helpers the last one: each stays among its
  // own, with what is in its core's cache.
  int64_t take_of(uint64_t number, bool caller, uint64_t state) {
    while (state >> 32 == number && state & kMaxItems) {
      const int64_t first = state >> 16 & kMaxItems, count = state & kMaxItems;
      const uint64_t left = caller ? state + (1 << 16) - 1 : state - 1;
      if (free.compare_exchange_weak(state, left, std::memory_order_acq_rel, std::memory_order_acquire)) {
        return caller ? first : first + count - 1;
      }
    }
    return -1;
  }
  int64_t take(bool caller) {
    const uint64_t state = free.load(std::memory_order_acquire);
    return take_of(state >> 32, caller, state);
  }

  // For one that isn't at work on the job.
  int64_t take_as_helper(int index) {
    const uint64_t state = free.load(std::memory_order_acquire);
    return helpers.load(std::memory_order_acquire) > index ? take_of(state >> 32, false, state) : -1;
  }

  // Does items until there are none; returns how many.
  int64_t run(bool caller, int64_t first) {
    Items items_of(*this, caller, first);
    try {
      body(items_of, context);
    } catch (...) {
      {
        const std::lock_guard lock(error_mutex);
        error = std::current_exception();
      }
      for (int64_t begin, end; items_of.next(&begin, &end);) {
      }
    }
    return items_of.count();
  }
};

bool Items::next(int64_t* begin, int64_t* end) {
  if (!job_) {
    *begin = 0, *end = units_;
    return count_++ == 0 && units_ > 0;
  }
  // A helper has the next item before it gives back the last one: what it takes is of the same job.
  const int64_t item = taken_ >= 0 ? std::exchange(taken_, -1) : job_->take(caller_);
  if (item < 0) {
    if (!caller_) {
      job_->done.fetch_add(static_cast<int>(count_), std::memory_order_release);
      job_->done.notify_one();
    }
    job_ = nullptr;
    return units_ = 0, false;
  }
  ++count_;
  *begin = item * job_->units / job_->items;
  *end = (item + 1) * job_->units / job_->items;
  return true;
}

namespace {

// Tells a helper that its core is another's as well.
class Watch {
 public:
  void look() { wall_ = Clock::now(), cpu_ = cpu(); }

  // How long to rest, after a job.
  nanoseconds rest() {
    const Clock::time_point now = Clock::now();
    if (now - wall_ < kLook) return {};
    const nanoseconds stood = (now - wall_) - (cpu() - cpu_);
    look();
    if (stood < kStandstill) return {};
    const bool again = now - last_rest_ < 4 * rest_;
    rest_ = again ? std::min<nanoseconds>(2 * rest_, kLongestRest) : nanoseconds(kShortestRest);
    last_rest_ = now + rest_;
    return rest_;
  }

 private:
  static nanoseconds cpu() {
    timespec t{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return std::chrono::seconds(t.tv_sec) + nanoseconds(t.tv_nsec);
  }

  Clock::time_point wall_, last_rest_;
  nanoseconds cpu_{}, rest_{};
};

class Pool {
 public:
  // Never freed, since its threads run until the process ends. A child process makes one of its own: no thread but the
  // one that forked is there.
  static Pool& of_process() {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { current_.store(nullptr); });
    static_cast<void>(registered);
    Pool* pool = current_.load(std::memory_order_acquire);
    if (!pool) {
      Pool* made = new Pool;
      if (current_.compare_exchange_strong(pool, made)) return *made;
      delete made;
    }
    return *pool;
  }

  void run(int helpers, int64_t units, int64_t items, Body body, void* context) {
    const int place = reserve();
    if (place < 0) {
      Items all(units);
      return body(all, context);
    }
    start(helpers);
    Job& job = jobs_[place];
    const uint64_t bit = uint64_t{1} << place, number = (job.free.load(std::memory_order_relaxed) >> 32) + 1;
    job.units = units, job.items = items, job.body = body, job.context = context, job.mode = float_mode();
    job.done.store(0, std::memory_order_relaxed);
    job.helpers.store(helpers, std::memory_order_relaxed);
    job.free.store(number << 32 | items, std::memory_order_release);
    open_.fetch_or(bit);
    if (sleepers_.load() > 0) wake();

    const int64_t own = job.run(true, -1);
    open_.fetch_and(~bit);
    wait(job.done, static_cast<int>(items - own));
    const std::exception_ptr error = std::exchange(job.error, nullptr);
    reserved_.fetch_and(~bit, std::memory_order_release);
    if (error) std::rethrow_exception(error);
  }

 private:
  // A place among the jobs, or -1.
  int reserve() {
    uint64_t reserved = reserved_.load(std::memory_order_relaxed);
    while (~reserved) {
      const int place = std::countr_one(reserved);
      if (reserved_.compare_exchange_weak(reserved, reserved | uint64_t{1} << place, std::memory_order_acquire)) {
        return place;
      }
    }
    return -1;
  }

  void start(int helpers) {
    if (started_.load(std::memory_order_relaxed) >= helpers) return;
    const std::lock_guard lock(start_mutex_);
    try {
      for (int index = started_; index < helpers; ++index) {
        std::thread([this, index] { help_forever(index); }).detach();
        started_ = index + 1;
      }
    } catch (const std::system_error&) {  // the system has no more of them: the others do the work
      started_ = helpers;
    }
  }

  static void wait(std::atomic<int>& done, int all) {
    const Clock::time_point until = Clock::now() + kPatience;
    for (int count; (count = done.load(std::memory_order_acquire)) != all;) {
      if (Clock::now() < until) {
        relax();
      } else {  // perhaps its core is another's now, and this one would do
        done.wait(count, std::memory_order_acquire);
      }
    }
  }

  void wake() {  // each that wakes wakes two more
    epoch_.fetch_add(1);
    epoch_.notify_one();
    epoch_.notify_one();
  }

  [[noreturn]] void help_forever(int index) {
    Watch watch;
    while (true) {
      watch.look();
      for (auto until = Clock::now() + kPatience; Clock::now() < until;) {
        if (!help(index)) {
          relax();
          continue;
        }
        if (const nanoseconds rest = watch.rest(); rest.count()) {
          std::this_thread::sleep_for(rest);
          watch.look();
        }
        until = Clock::now() + kPatience;
      }
      sleep(index);
    }
  }

  void sleep(int index) {
    const unsigned epoch = epoch_.load();
    sleepers_.fetch_add(1);
    const bool missed = help(index);  // a job that nobody woke this thread for
    if (!missed) epoch_.wait(epoch);
    const bool others = sleepers_.fetch_sub(1) > 1;
    if (others && !missed && open_.load()) wake();
  }

  // Whether there was anything to do.
  bool help(int index) {
    const uint64_t open = open_.load();
    // other jobs than last time come first
    const uint64_t later = open & ~(last_helped() | (last_helped() - 1));
    for (uint64_t left : {later, open & ~later}) {
      for (; left; left &= left - 1) {
        Job& job = jobs_[std::countr_zero(left)];
        const int64_t item = job.take_as_helper(index);
        if (item < 0) continue;
        last_helped() = left & -left;
        set_float_mode(job.mode);
        job.run(false, item);
        return true;
      }
    }
    return false;
  }

  static uint64_t& last_helped() {
    thread_local uint64_t bit = 1;
    return bit;
  }

  static std::atomic<Pool*> current_;

  Job jobs_[kJobs];
  alignas(64) std::atomic<uint64_t> open_{0};      // a bit per job that may have items left
  alignas(64) std::atomic<uint64_t> reserved_{0};  // a bit per job that a caller has
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<unsigned> epoch_{0};
  std::atomic<int> started_{0};
  std::mutex start_mutex_;
};

std::atomic<Pool*> Pool::current_{nullptr};

}  // namespace

void parallel_for(int threads, int64_t units, int64_t items, Body body, void* context) {
  items = std::min({items, units, kMaxItems});
  const int helpers = static_cast<int>(std::min<int64_t>(threads, items)) - 1;
  if (helpers < 1) {
    Items all(units);
    return body(all, context);
  }
  Pool::of_process().run(helpers, units, items, body, context);
}

}  // namespace ghostfused::cpu
