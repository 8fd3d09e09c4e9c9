// Sums over a block's threads and over the rows of a grid, always in the same order: no floating-point atomics.
//
// A block reduces its own cells and writes one row of partial results. About √rows rows are a group: the block that
// arrives last at the group's counter combines the group's rows, in order, whichever block it is; and the last of all
// combines the groups.
#pragma once

#include "cuda/training/cell.cuh"

namespace ghostfused {

// Each v summed over the positions of a lane; position 0 has the result. ``scratch``: kScratchFloats.
template <int kCount>
__device__ __forceinline__ void block_sum(float (&v)[kCount], const BlockShare& t, float* scratch) {
  constexpr int kTogether = 4;
  float* slot = scratch + (t.idle() ? 0 : t.position * t.lanes + t.lane);
  int half = 1;
  while (half < t.positions) half *= 2;
#pragma unroll
  for (int first = 0; first < kCount; first += kTogether) {
    __syncthreads();  // the scratch is free
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (first + i < kCount && !t.idle()) slot[i * kMaxThreads] = v[first + i];
    }
#pragma unroll 1
    for (int apart = half / 2; apart > 0; apart /= 2) {
      __syncthreads();
      if (t.position < apart && t.position + apart < t.positions) {
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          if (first + i < kCount) slot[i * kMaxThreads] += slot[i * kMaxThreads + apart * t.lanes];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (first + i < kCount && t.position == 0) v[first + i] = slot[i * kMaxThreads];
    }
  }
}

// Position 0's numbers for all positions of its lane.
template <int kCount>
__device__ __forceinline__ void broadcast(float (&v)[kCount], const BlockShare& t, float* scratch) {
  static_assert(kCount <= 4);
  __syncthreads();  // the scratch is free
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (t.position == 0) scratch[i * kMaxThreads + t.lane] = v[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = scratch[i * kMaxThreads + t.lane];
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

  // To (n, mean, M2) of the whole block, at position 0.
  __device__ __forceinline__ void combine(float (&all_mean)[kV], float (&all_m2)[kV], const BlockShare& t,
                                          float* scratch) {
    const float own_n = n;
    float own[kV], near[kV];
#pragma unroll
    for (int e = 0; e < kV; ++e) {
      near[e] = own[e] = mean(e);
      all_m2[e] = m2(e);
    }
    broadcast(near, t, scratch);
    float sums[1 + kV];
    sums[0] = n;
#pragma unroll
    for (int e = 0; e < kV; ++e) sums[1 + e] = own_n * (own[e] - near[e]);
    block_sum(sums, t, scratch);
    n = sums[0];
#pragma unroll
    for (int e = 0; e < kV; ++e) all_mean[e] = near[e] + sums[1 + e] / n;
    broadcast(all_mean, t, scratch);
#pragma unroll
    for (int e = 0; e < kV; ++e) all_m2[e] += own_n * (own[e] - all_mean[e]) * (own[e] - all_mean[e]);
    block_sum(all_m2, t, scratch);
  }
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
template <int kV>
__device__ __forceinline__ void finish_statistics(Moments<kV> own, const Channels<kV>& c, const BlockShare& t,
                                                  const RowCombination& rows, float* mean_out, float* var_out,
                                                  float* scratch) {
  float mean[kV], m2[kV];
  own.combine(mean, m2, t, scratch);
#pragma unroll
  for (int e = 0; e < kV; ++e) {
    if (t.position != 0 || !c.kept[e]) continue;
    *rows.at<3>(rows.row, 0, c.at[e]) = own.n;
    *rows.at<3>(rows.row, 1, c.at[e]) = mean[e];
    *rows.at<3>(rows.row, 2, c.at[e]) = m2[e];
  }
  write_statistics(rows, mean_out, var_out, flag_behind(scratch));
}

// Adds up v[value][channel] of all threads and rows; emit(value, c, sum) gets each of the results once.
template <int kValues, int kV, typename Emit>
__device__ __forceinline__ void finish_sums(float (&v)[kValues * kV], const Channels<kV>& c, const BlockShare& t,
                                            const RowCombination& rows, float* scratch, Emit emit) {
  block_sum(v, t, scratch);
#pragma unroll
  for (int i = 0; i < kValues * kV; ++i) {
    if (t.position == 0 && c.kept[i % kV]) *rows.at<kValues>(rows.row, i / kV, c.at[i % kV]) = v[i];
  }
  combine_sums<kValues>(rows, flag_behind(scratch), emit);
}

}  // namespace ghostfused
