// Shares work among threads, none of which has a part of its own: each takes the next item that nobody has taken, and
// the calling thread takes whatever is left. So a thread that the system lets wait delays nobody unless it holds an
// item.
#pragma once

#include <cstdint>

namespace ghostfused::cpu {

struct Job;

// What one thread takes of a job: ranges of its units.
class Items {
 public:
  explicit Items(int64_t units) : units_(units) {}  // all of them, in one
  Items(Job& job, bool caller, int64_t first) : job_(&job), caller_(caller), taken_(first) {}

  // The next range of units for this thread to do. False: there is none left, and what belongs to the job's caller must
  // not be touched any more.
  bool next(int64_t* begin, int64_t* end);

  int64_t count() const { return count_; }  // of items taken so far

 private:
  Job* job_ = nullptr;
  bool caller_ = true;
  int64_t taken_ = -1;  // an item that is this thread's already
  int64_t units_ = 0, count_ = 0;
};

// What each thread at work on a job calls once; it takes items until there are none.
using Body = void (*)(Items& items, void* context);

// Has ``units`` units of work, in ``items`` items, done by this thread and at most ``threads`` - 1 others, and returns
// when all is done. Throws what a body throws. Any number of threads may call it at once.
void parallel_for(int threads, int64_t units, int64_t items, Body body, void* context);

}  // namespace ghostfused::cpu
