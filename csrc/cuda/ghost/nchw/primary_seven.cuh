// Primary and norm_affine of 7 × 7 maps, of the NCHW kernel. An n8 tile of mma is a column of the map, of which 7 of 8
// rows exist, so that the result leaves a lane with whole rows. x goes to shared memory as it lies; warps share the
// init channels, and also the input channels where there are many: then their sums are added in shared memory.
//
// A map has 49 numbers, so channels begin on a word and half a word beside one in turn, and so do the rows of a map. Of
// the rows of two neighbour channels one begins on a word; which of the two depends on the row's parity.
#pragma once

#include "cuda/ghost/nchw/store.cuh"

namespace ghostfused {

constexpr int kSevenMapBytes = 98, kSevenStepBytes = 16 * kSevenMapBytes;

// The image as it is, by all threads. The caller waits.
__device__ __forceinline__ void copy_maps(const NchwParams& p, const unsigned char* from, unsigned char* to) {
  const int threads = 32 * p.plan.warps, pieces = p.args.shape.in_channels * kSevenMapBytes / 16;
  const uint32_t address = shared_address(to);
#pragma unroll 4
  for (int i = threadIdx.x; i < pieces; i += threads) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address + i * 16), "l"(from + i * 16) : "memory");
  }
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// B operands: row ``g`` of the map, channels 4q … 4q + 3 of a k16 step.
struct SevenInput {
  const unsigned char *word_rows, *half_rows;  // of the channel whose row begins on a word, and of the other, less 2
  uint32_t even, odd;                          // byte permutations for even and odd columns: lower channel first

  __device__ __forceinline__ SevenInput(const unsigned char* x, int g, int q) {
    const int row = min(g, 6), parity = row & 1;
    const unsigned char* at = x + 4 * q * kSevenMapBytes + 14 * row;
    word_rows = at + (parity ? kSevenMapBytes : 0);
    half_rows = at + (parity ? 0 : kSevenMapBytes) - 2;
    even = pinned(parity ? 0x1076u : 0x7610u);
    odd = pinned(parity ? 0x3254u : 0x5432u);
  }
  __device__ __forceinline__ void read(uint32_t (&b)[7][2], int step) const {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      uint32_t word[4], half[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = step * kSevenStepBytes + k * (2 * kSevenMapBytes) + 4 * j;
        word[j] = *reinterpret_cast<const uint32_t*>(word_rows + at);
        half[j] = *reinterpret_cast<const uint32_t*>(half_rows + at);
      }
#pragma unroll
      for (int i = 0; i < 7; ++i) b[i][k] = __byte_perm(word[i / 2], half[(i + 1) / 2], i % 2 ? odd : even);
    }
  }
};

// A operands, straight from global memory: a warp uses each once.
template <class C>
struct SevenWeights {
  using T = typename C::T;
  const T* row[C::kTiles][2];
  uint4 words[C::kSlots][C::kTiles];

  __device__ __forceinline__ SevenWeights(const NchwParams& p, const NchwBlock& b, int first_channel, int k, int g) {
#pragma unroll
    for (int t = 0; t < C::kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // beyond the block: its last channel, and nobody reads what it gives
        const int c = b.c0 + min(first_channel + 16 * t + 8 * half + g, b.channels - 1);
        row[t][half] = static_cast<const T*>(p.args.primary_weight) + c * p.args.primary_weight_stride_n + k;
      }
    }
  }
  __device__ __forceinline__ void load_step(int step, int slot) {
#pragma unroll
    for (int t = 0; t < C::kTiles; ++t) {  // four loads: one of 8 bytes would need its words moved apart
      load_words<1>(&words[slot][t].x, row[t][0] + 16 * step);
      load_words<1>(&words[slot][t].z, row[t][0] + 16 * step + 2);
      load_words<1>(&words[slot][t].y, row[t][1] + 16 * step);
      load_words<1>(&words[slot][t].w, row[t][1] + 16 * step + 2);
    }
  }
};

// x1 of 8 channels: this lane's channel c, row h.
template <class C>
__device__ __forceinline__ void norm_affine_seven(const NchwParams& p, unsigned char* smem, const float (&sum)[7],
                                                  int c, int h) {
  const float4 a = reinterpret_cast<const float4*>(smem)[c];
  float y[7];
#pragma unroll
  for (int i = 0; i < 7; ++i) y[i] = fmaf(sum[i], a.x, a.y);
  uint32_t v[4];
  activate_and_pack<C, 7>(v, y, p.args.primary.act, a.z, p.primary_floor);
  if (h < 7) {
    *reinterpret_cast<uint4*>(smem + p.plan.x1_offset + c * p.plan.plane_pitch + h * 16) =
        uint4{v[0], v[1], v[2], v[3]};
  }
}

template <class C, typename F>
__device__ __forceinline__ void primary_seven(const NchwParams& p, const NchwBlock& b, unsigned char* smem,
                                              F load_rest) {
  using T = typename C::T;
  constexpr int kTiles = C::kTiles, kSlots = C::kSlots;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int warps_k = p.plan.warps_k, warp_k = warp % warps_k, warp_c = warp / warps_k;
  const int all_steps = p.args.shape.in_channels / 16, share = (all_steps + warps_k - 1) / warps_k;
  const int first_step = warp_k * share, steps = min(share, all_steps - first_step);
  const int first_channel = warp_c * p.plan.warp_c, halves = min(p.plan.warp_c, b.channels - first_channel) / 8;
  unsigned char* stage = smem + p.plan.stage_offset;

  const T* image = static_cast<const T*>(p.x.data) + b.n * p.x.stride_n;
  copy_maps(p, reinterpret_cast<const unsigned char*>(image), stage);
  SevenWeights<C> weights(p, b, first_channel, first_step * 16 + 4 * q, g);
#pragma unroll
  for (int s = 0; s < kSlots - 1; ++s) {
    if (s < steps) weights.load_step(s, s);
  }
  load_rest();
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();

  SevenInput x(stage + first_step * kSevenStepBytes, g, q);
  const T* gate = reinterpret_cast<const T*>(smem + p.plan.gate_offset) + first_step * 16 + 4 * q;
  const bool gated = C::kFull && p.args.input_gate != nullptr;
  float acc[kTiles][7][4] = {};
#pragma unroll 1
  for (int s0 = 0; s0 < steps; s0 += kSlots) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if (slot > 0 && s0 + slot >= steps) break;
      if (s0 + slot + kSlots - 1 < steps) weights.load_step(slot + kSlots - 1, (slot + kSlots - 1) % kSlots);
      uint32_t columns[7][2];
      x.read(columns, slot);
#pragma unroll
      for (int i = 0; i < 7; ++i) {
        if (gated) {
          const uint2 two = *reinterpret_cast<const uint2*>(gate + 16 * slot);
          columns[i][0] = multiply_pairs<T>(columns[i][0], two.x),
          columns[i][1] = multiply_pairs<T>(columns[i][1], two.y);
        }
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
          multiply_tiles<T, false>(acc[t][i], weights.words[slot][t], columns[i][0], columns[i][1]);
      }
    }
    x.word_rows += kSlots * kSevenStepBytes, x.half_rows += kSlots * kSevenStepBytes;
    gate += kSlots * 16;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) weights.row[t][0] += kSlots * 16, weights.row[t][1] += kSlots * 16;
  }

  // D's element u % 4 of tile u / 4: 8 channels, rows 2q + u % 2.
  if (warps_k == 1) {
#pragma unroll
    for (int u = 0; u < 4 * kTiles; ++u) {
      if (u / 2 >= halves) break;
      float sum[7];
#pragma unroll
      for (int i = 0; i < 7; ++i) sum[i] = acc[u / 4][i][u % 4];
      norm_affine_seven<C>(p, smem, sum, first_channel + u / 2 * 8 + g, 2 * q + u % 2);
    }
    return;
  }
  __syncthreads();  // all have read x: the sums take its place
  float4* sums = reinterpret_cast<float4*>(stage) + warp_c * (warps_k * 4 * kTiles * 64) + lane;
#pragma unroll
  for (int u = 0; u < 4 * kTiles; ++u) {
    if (u / 2 >= halves) break;
    const float (&a)[7][4] = acc[u / 4];
    const int k = u % 4;
    // The last warp, which may be done early, writes first: a missing barrier shows.
    float4* to = sums + ((warps_k - 1 - warp_k) * 4 * kTiles + u) * 64;
    to[0] = float4{a[0][k], a[1][k], a[2][k], a[3][k]};
    to[32] = float4{a[4][k], a[5][k], a[6][k], 0.f};
  }
  __syncthreads();  // all sums are there
#pragma unroll 1
  for (int u = warp_k; u < 2 * halves; u += warps_k) {
    float sum[7] = {};
#pragma unroll 2
    for (int k = 0; k < warps_k; ++k) {
      const float4 first = sums[(k * 4 * kTiles + u) * 64], second = sums[(k * 4 * kTiles + u) * 64 + 32];
      sum[0] += first.x, sum[1] += first.y, sum[2] += first.z, sum[3] += first.w;
      sum[4] += second.x, sum[5] += second.y, sum[6] += second.z;
    }
    norm_affine_seven<C>(p, smem, sum, first_channel + u / 2 * 8 + g, 2 * q + u % 2);
  }
}

}  // namespace ghostfused
