// Sums over a block's threads and over the rows of a grid, always in the same order: no floating-point atomics.
//
// A block reduces its own cells and writes one row of partial results. About √rows rows are a group: the block that
// arrives last at the group's counter combines the group's rows, in order, whichever block it is; and the last of all
// combines the groups.
#pragma once

#include "cuda/training/cell.cuh"

namespace ghostfused {

// Each v summed over the positions of a lane; position 0 has the result. ``scratch``: kScratchFloats.
template <int kThreads, int kCount>
__device__ __forceinline__ void block_sum(float (&v)[kCount], const BlockShare& t, float* scratch) {
  constexpr int kTogether = 4 * kMaxThreads / kThreads;
  constexpr int kInOrder = kThreads < kMaxThreads ? 8 : 1;  // what is left of a small block costs less than barriers
  float* slot = scratch + (t.idle() ? 0 : t.position * t.lanes + t.lane);
#pragma unroll
  for (int first = 0; first < kCount; first += kTogether) {
    const int together = min(kTogether, kCount - first);
    __syncthreads();  // the scratch is free
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (first + i < kCount && !t.idle()) slot[i * kThreads] = v[first + i];
    }
    int count = t.positions;
#pragma unroll 1
    for (; count > kInOrder; count = (count + 1) / 2) {  // the upper half is added to the lower
      const int half = (count + 1) / 2;
      __syncthreads();
      if (t.position >= count - half) continue;
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (first + i < kCount) slot[i * kThreads] += slot[i * kThreads + half * t.lanes];
      }
    }
    __syncthreads();
    for (int i = t.position; i < together && !t.idle(); i += t.positions) {  // each in one thread of the lane
      float* own = scratch + i * kThreads + t.lane;
      float sum = 0.f;
      for (int q = 0; q < count; ++q) sum += own[q * t.lanes];
      *own = sum;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (first + i < kCount && t.position == 0) v[first + i] = slot[i * kThreads];
    }
  }
}

// Whether this block is the last of ``rows`` to get here: then it sees what all of them have written.
// ``last``: in shared memory.
__device__ __forceinline__ bool arrives_last(unsigned* counter, int rows, int* last) {
  __threadfence();
  __syncthreads();  // all of this block's threads have written
  if (threadIdx.x == 0) *last = atomicAdd(counter, 1u) == static_cast<unsigned>(rows) - 1;
  __syncthreads();
  __threadfence();
  return *last;
}

// A thread's numbers: how many, and sums of y - shift and of its square, with the first number as the shift.
template <int kV>
struct Moments {
  float n = 0.f, shift[kV] = {}, s[kV] = {}, q[kV] = {};

  __device__ __forceinline__ void add(const float (&y)[kV]) {
#pragma unroll
    for (int e = 0; e < kV; ++e) {
      if (n == 0.f) shift[e] = y[e];
      const float d = y[e] - shift[e];
      s[e] += d;
      q[e] += d * d;
    }
    n += 1.f;
  }

  __device__ __forceinline__ float mean(int e) const { return n > 0.f ? shift[e] + s[e] / n : 0.f; }
  // Σ (y - center)²
  __device__ __forceinline__ float about(float center, int e) const {
    const float d = n > 0.f ? shift[e] - center : 0.f;
    return q[e] + d * (2.f * s[e] + n * d);
  }
};

// What is negative by rounding is 0; NaN stays NaN, which fmaxf would make 0.
__device__ __forceinline__ float not_negative(float m2) { return m2 < 0.f ? 0.f : m2; }

// A block's part in combining the rows of a grid: its row, and the channels [first, end) of all ``channels``.
struct RowCombination {
  RowGroups groups;
  float* partial;      // [row, then group][value][channel]
  unsigned* counters;  // [group], and one for the groups
  int row, channels, first, end;

  template <int kValues>
  __device__ __forceinline__ float* at(int r, int value, int c) const {
    return partial + (int64_t{r} * kValues + value) * channels + c;
  }

  // Calls combine(first row, rows, store) in the last block of a group, for the group's rows, and then in the last
  // block of all for the groups, which lie behind the rows. ``emit`` gets what the latter stores.
  template <int kValues, typename Combine, typename Emit>
  __device__ __forceinline__ void run(int* last, Combine combine, Emit emit) const {
    const int group = row / groups.group_rows, begin = group * groups.group_rows;
    const int count = min(groups.group_rows, groups.rows - begin);
    if (!arrives_last(counters + group, count, last)) return;
    combine(begin, count, [&](int value, int c, float v) { *at<kValues>(groups.rows + group, value, c) = v; });
    if (!arrives_last(counters + groups.groups, groups.groups, last)) return;
    combine(groups.rows, groups.groups, emit);
  }
};

template <int kValues>
__device__ __forceinline__ RowCombination row_combination(const TrainingParams& p, int pass, int block, int row,
                                                          int channels, int skipped_counters = 0) {
  const TrainingPlan& plan = p.plan;
  const int pass_rows = plan.rows.rows + plan.rows.groups, first = block * plan.block_c;
  return {plan.rows,
          p.partial + int64_t{pass} * pass_rows * kValues * channels,
          p.counters + skipped_counters + (pass * plan.channel_blocks + block) * (plan.rows.groups + 1),
          row,
          channels,
          first,
          min(first + plan.block_c, channels)};
}

// The rows have (n, mean, M2) of each channel; emit(value, c, v) gets those of all. In two passes, for M2 is taken
// about the mean of all: about a row's, which may lie far off (a map's first row has most of its border), digits
// cancel.
template <typename Emit>
__device__ __forceinline__ void combine_moments(const RowCombination& t, int* last, Emit emit) {
  const auto combine = [&](int begin, int count, auto store) {
    for (int c = t.first + threadIdx.x; c < t.end; c += blockDim.x) {
      const auto read = [&](int r, int value) { return __ldcg(t.at<3>(r, value, c)); };  // past L1: others wrote them
      const float shift = read(begin, 1);
      float n = 0.f, sum = 0.f, m2 = 0.f;
#pragma unroll 4
      for (int r = begin; r < begin + count; ++r) {
        const float own = read(r, 0);
        n += own;
        sum += own * (read(r, 1) - shift);
      }
      const float mean = shift + sum / n;
#pragma unroll 4
      for (int r = begin; r < begin + count; ++r) {
        const float d = read(r, 1) - mean;
        m2 += read(r, 2) + read(r, 0) * d * d;
      }
      store(0, c, n);
      store(1, c, mean);
      store(2, c, m2);
    }
  };
  t.run<3>(last, combine, emit);
}

__device__ __forceinline__ void write_statistics(const RowCombination& t, float* mean, float* var, int* last) {
  float n = 0.f;  // a thread's three values of a channel come in order
  combine_moments(t, last, [&](int value, int c, float v) {
    if (value == 0) n = v;
    if (value == 1) mean[c] = v;
    if (value == 2) var[c] = v / n;
  });
}

// The rows have sums; emit(value, c, sum) gets each of the results once.
template <int kValues, typename Emit>
__device__ __forceinline__ void combine_sums(const RowCombination& t, int* last, Emit emit) {
  const int live = t.end - t.first;
  const auto combine = [&](int begin, int count, auto store) {
    for (int i = threadIdx.x; i < kValues * live; i += blockDim.x) {
      const int value = i / live, c = t.first + i - value * live;
      float sum = 0.f;
#pragma unroll 8
      for (int r = begin; r < begin + count; ++r) sum += __ldcg(t.at<kValues>(r, value, c));
      store(value, c, sum);
    }
  };
  t.run<kValues>(last, combine, emit);
}

__device__ __forceinline__ int* flag_behind(float* scratch) {
  return reinterpret_cast<int*>(scratch + 4 * kMaxThreads);
}

// Combines the moments of all threads and rows; the last block writes mean and variance. The block's mean comes first,
// and then M2 about it: about one thread's mean, who may have a corner's pixels alone, digits cancel.
template <int kThreads, int kV>
__device__ __forceinline__ void finish_statistics(Moments<kV> own, const Channels<kV>& c, const BlockShare& t,
                                                  const RowCombination& rows, float* mean, float* var, float* scratch) {
  float* const common = scratch + (t.idle() ? 0 : t.lane);  // of position 0, which has a number in every block
  const auto tell = [&](const float (&v)[kV]) {
    __syncthreads();  // the scratch is free
#pragma unroll
    for (int e = 0; e < kV; ++e) {
      if (t.position == 0) common[e * kThreads] = v[e];
    }
    __syncthreads();
  };
  float center[kV], sums[1 + kV], squares[kV];
#pragma unroll
  for (int e = 0; e < kV; ++e) center[e] = own.mean(e);
  tell(center);
  sums[0] = own.n;
#pragma unroll
  for (int e = 0; e < kV; ++e) {
    center[e] = common[e * kThreads];
    sums[1 + e] = own.n > 0.f ? own.s[e] + own.n * (own.shift[e] - center[e]) : 0.f;
  }
  block_sum<kThreads>(sums, t, scratch);
#pragma unroll
  for (int e = 0; e < kV; ++e) center[e] += sums[1 + e] / sums[0];
  tell(center);
#pragma unroll
  for (int e = 0; e < kV; ++e) {
    center[e] = common[e * kThreads];
    squares[e] = own.about(center[e], e);
  }
  block_sum<kThreads>(squares, t, scratch);
#pragma unroll
  for (int e = 0; e < kV; ++e) {
    if (t.position != 0 || !c.kept[e]) continue;
    *rows.at<3>(rows.row, 0, c.at[e]) = sums[0];
    *rows.at<3>(rows.row, 1, c.at[e]) = center[e];
    *rows.at<3>(rows.row, 2, c.at[e]) = not_negative(squares[e]);
  }
  write_statistics(rows, mean, var, flag_behind(scratch));
}

// Adds up v[value][channel] of all threads and rows; emit(value, c, sum) gets each of the results once.
template <int kThreads, int kValues, int kV, typename Emit>
__device__ __forceinline__ void finish_sums(float (&v)[kValues * kV], const Channels<kV>& c, const BlockShare& t,
                                            const RowCombination& rows, float* scratch, Emit emit) {
  block_sum<kThreads>(v, t, scratch);
#pragma unroll
  for (int i = 0; i < kValues * kV; ++i) {
    if (t.position == 0 && c.kept[i % kV]) *rows.at<kValues>(rows.row, i / kV, c.at[i % kV]) = v[i];
  }
  combine_sums<kValues>(rows, flag_behind(scratch), emit);
}

}  // namespace ghostfused
