// Sums over a block's threads and over the rows of a grid, always in the same order: no floating-point atomics.
//
// A block reduces its own cells and writes one row of partial results; the block that arrives last at its channel
// block's counter combines the rows, in order, whichever block it is.
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
__device__ __forceinline__ bool arrives_last(unsigned* counter, int rows, float* scratch) {
  int* last = reinterpret_cast<int*>(scratch + 4 * kMaxThreads);
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

  // To (n, mean, M2) of the whole block, at position 0.
  __device__ __forceinline__ void combine(float (&mean)[kV], float (&m2)[kV], const BlockShare& t, float* scratch) {
    const float own_n = n;
    float own[kV], near[kV];
#pragma unroll
    for (int e = 0; e < kV; ++e) {
      own[e] = n > 0.f ? shift[e] + s[e] / n : 0.f;
      m2[e] = n > 0.f ? fmaxf(q[e] - s[e] * s[e] / n, 0.f) : 0.f;
      near[e] = own[e];
    }
    broadcast(near, t, scratch);
    float sums[1 + kV];
    sums[0] = n;
#pragma unroll
    for (int e = 0; e < kV; ++e) sums[1 + e] = own_n * (own[e] - near[e]);
    block_sum(sums, t, scratch);
    n = sums[0];
#pragma unroll
    for (int e = 0; e < kV; ++e) mean[e] = near[e] + sums[1 + e] / n;
    broadcast(mean, t, scratch);
#pragma unroll
    for (int e = 0; e < kV; ++e) m2[e] += own_n * (own[e] - mean[e]) * (own[e] - mean[e]);
    block_sum(m2, t, scratch);
  }
};

// What is left to do once a block has the moments of its row.
struct StatisticsTarget {
  float* partial;  // [row][3][channels]
  unsigned* counter;
  float *mean, *var;
  int row, rows, channels;
};

template <int kV>
__device__ __forceinline__ void finish_statistics(Moments<kV> own, const Channels<kV>& c, const BlockShare& t,
                                                  const StatisticsTarget& target, float* scratch) {
  float mean[kV], m2[kV];
  own.combine(mean, m2, t, scratch);
  const int64_t channels = target.channels;
#pragma unroll
  for (int e = 0; e < kV; ++e) {
    if (t.position == 0 && c.kept[e]) {
      float* row = target.partial + target.row * 3 * channels + c.at[e];
      row[0] = own.n;
      row[channels] = mean[e];
      row[2 * channels] = m2[e];
    }
  }
  if (!arrives_last(target.counter, target.rows, scratch)) return;
  Moments<kV> all;
  for (int r = t.position; r < target.rows; r += t.positions) {
    const float* row = target.partial + r * 3 * channels;
#pragma unroll
    for (int e = 0; e < kV; ++e) {  // past L1: other blocks wrote them
      mean[e] = __ldcg(row + channels + c.at[e]);
      m2[e] = __ldcg(row + 2 * channels + c.at[e]);
    }
    all.add(__ldcg(row + c.at[0]), mean, m2);
  }
  all.combine(mean, m2, t, scratch);
#pragma unroll
  for (int e = 0; e < kV; ++e) {
    if (t.position == 0 && c.kept[e]) {
      target.mean[c.at[e]] = mean[e];
      target.var[c.at[e]] = m2[e] / all.n;
    }
  }
}

// Adds v[value][channel] over all blocks of a pass and channel block; emit(value, e, sum) gets each of the results
// once.
template <int kValues, int kV, typename F>
__device__ __forceinline__ void finish_sums(float (&v)[kValues * kV], const TrainingParams& p, const Channels<kV>& c,
                                            int channels, const BlockShare& t, int pass, int row, unsigned* counter,
                                            float* scratch, F emit) {
  block_sum(v, t, scratch);
  float* partial = p.partial + int64_t{pass} * p.plan.rows * kValues * channels;
#pragma unroll
  for (int i = 0; i < kValues * kV; ++i) {
    if (t.position == 0 && c.kept[i % kV]) {
      partial[(int64_t{row} * kValues + i / kV) * channels + c.at[i % kV]] = v[i];
    }
  }
  if (!arrives_last(counter, p.plan.rows, scratch)) return;
#pragma unroll
  for (int i = 0; i < kValues * kV; ++i) v[i] = 0.f;
  if (!t.idle()) {
    for (int r = t.position; r < p.plan.rows; r += t.positions) {
#pragma unroll
      for (int i = 0; i < kValues * kV; ++i) {  // past L1: other blocks wrote them
        v[i] += __ldcg(partial + (int64_t{r} * kValues + i / kV) * channels + c.at[i % kV]);
      }
    }
  }
  block_sum(v, t, scratch);
#pragma unroll
  for (int i = 0; i < kValues * kV; ++i) {
    if (t.position == 0 && c.kept[i % kV]) emit(i / kV, i % kV, v[i]);
  }
}

}  // namespace ghostfused
