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

// Mean and M2 = Σ (y - mean)² of a thread's numbers, by sums of y - shift with the first number as the shift:
// (shift - mean)² is at most n times the variance, so at most n ulps are lost.
template <int kV>
struct Moments {
  float n = 0.f, shift[kV] = {}, s[kV] = {}, q[kV] = {};

  __device__ __forceinline__ void add(float count, const float (&mean)[kV], const float (&m2)[kV]) {
#pragma unroll
    for (int e = 0; e < kV; ++e) {
      if (n == 0.f) shift[e] = mean[e];
      const float d = mean[e] - shift[e];
      s[e] += count * d;
      q[e] += m2[e] + count * d * d;
    }
    n += count;
  }

  __device__ __forceinline__ float mean(int e) const { return n > 0.f ? shift[e] + s[e] / n : 0.f; }
  __device__ __forceinline__ float m2(int e) const { return n > 0.f ? fmaxf(q[e] - s[e] * s[e] / n, 0.f) : 0.f; }
};

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

// The rows have (n, mean, M2) of each channel; emit(value, c, v) gets those of all.
template <typename Emit>
__device__ __forceinline__ void combine_moments(const RowCombination& t, int* last, Emit emit) {
  const auto combine = [&](int begin, int count, auto store) {
    for (int c = t.first + threadIdx.x; c < t.end; c += blockDim.x) {
      Moments<1> all;
#pragma unroll 8
      for (int r = begin; r < begin + count; ++r) {  // past L1: other blocks wrote them
        const float mean[1] = {__ldcg(t.at<3>(r, 1, c))}, m2[1] = {__ldcg(t.at<3>(r, 2, c))};
        all.add(__ldcg(t.at<3>(r, 0, c)), mean, m2);
      }
      store(0, c, all.n);
      store(1, c, all.mean(0));
      store(2, c, all.m2(0));
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

// Combines the moments of all threads and rows; the last block writes mean and variance.
template <int kThreads, int kV>
__device__ __forceinline__ void finish_statistics(Moments<kV> own, const Channels<kV>& c, const BlockShare& t,
                                                  const RowCombination& rows, float* mean, float* var, float* scratch) {
  __syncthreads();  // the scratch is free
#pragma unroll
  for (int e = 0; e < kV; ++e) {
    if (t.position == 0) scratch[e * kThreads + t.lane] = own.mean(e);
  }
  __syncthreads();
  // to sums about one shift: the mean of position 0, which has a number in every block
  float shift[kV], sums[1 + 2 * kV];
  sums[0] = own.n;
#pragma unroll
  for (int e = 0; e < kV; ++e) {
    shift[e] = scratch[e * kThreads + t.lane];
    const float d = own.n > 0.f ? own.shift[e] - shift[e] : 0.f;
    sums[1 + e] = own.s[e] + own.n * d;
    sums[1 + kV + e] = own.q[e] + d * (2.f * own.s[e] + own.n * d);
  }
  block_sum<kThreads>(sums, t, scratch);
#pragma unroll
  for (int e = 0; e < kV; ++e) {
    if (t.position != 0 || !c.kept[e]) continue;
    const float n = sums[0], s = sums[1 + e], q = sums[1 + kV + e];
    *rows.at<3>(rows.row, 0, c.at[e]) = n;
    *rows.at<3>(rows.row, 1, c.at[e]) = shift[e] + s / n;
    *rows.at<3>(rows.row, 2, c.at[e]) = fmaxf(q - s * s / n, 0.f);
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
