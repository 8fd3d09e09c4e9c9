// Primary and norm_affine, of the NCHW kernel: x1 = act(norm(w1 * x)) of the block's channels and halo rows.
//
// x goes from global memory straight to registers. Lane (g, q) reads a chunk, V neighbouring pixels, of channels 4q …
// 4q + 3, so pixel i of the chunks of all lanes is an n8 tile, whose B operand is a byte permutation of two channels'
// words; in TF32 it is the words of channels 2q and 2q + 1 as they come. The result D[channel][pixel] leaves a lane
// with V neighbouring pixels of its channel over the V tiles: they are one vector of x1's plane in shared memory, and
// one of the output.
#pragma once

#include "cuda/ghost/nchw/store.cuh"
#include "cuda/ghost/nchw/window.cuh"

namespace ghostfused {

// Which chunk a lane reads in each group of 8, and which two it gets of each channel.
template <class C>
struct NchwChunks {
  // The two of a lane are: no bank conflicts in x1's flat planes of half precision
  static constexpr bool kNeighbours = C::kFourteen && C::kHalf;
  int last, groups;
  int shift;         // chunks by which groups start before x1, so that a lane's stores begin with a 32-byte sector
  int read, result;  // this lane's chunk of group 0: as B's column g, and D's columns 2q and 2q + 1

  __device__ __forceinline__ NchwChunks(const NchwParams& p, const NchwBlock& b, int g, int q) {
    if constexpr (C::kWide) {
      const int chunks = b.halo_rows * p.plan.row_chunks;
      last = pinned(chunks - 1);
      shift = b.top * p.args.shape.width * C::kBytes % 32 / C::kChunkBytes;
      groups = (chunks + shift + 7) / 8;
    } else {
      last = C::kPixels / C::kV - 1;
      shift = 0;
      groups = last / 8 + 1;
    }
    read = pinned(kNeighbours ? g / 2 * 4 + g % 2 : g % 2 * 4 + g / 2 - shift);
    result = pinned(kNeighbours ? 4 * q : q - shift);
  }
  __device__ __forceinline__ int clamped(int chunk) const {
    return C::kWide ? min(max(chunk, 0), last) : min(chunk, last);
  }
  __device__ __forceinline__ int first(int group) const {
    return kNeighbours ? group / 2 * 16 + group % 2 * 2 : 8 * group;
  }
  __device__ __forceinline__ int to_read(int group) const { return clamped(first(group) + read); }
  __device__ __forceinline__ int of_result(int group, int e) const {
    return clamped(first(group) + result + (kNeighbours ? 1 : 4) * e);
  }
};

// A chunk of x, which are B operands, steps ahead.
template <class C>
struct NchwInput {
  static constexpr int kWords = C::kWords, kLaneSteps = C::kLaneSteps;
  const unsigned char* image;   // the lane's first channel, the halo's first row
  const unsigned char* next;    // the next step to load
  const uint32_t (&planes)[4];  // bytes of 1, 2, 3 channels and of a step's
  uint32_t words[C::kSlots][kLaneSteps][kWords];

  __device__ __forceinline__ NchwInput(const NchwParams& p, const NchwBlock& b, int q) : planes(p.x_planes) {
    const uint64_t at = b.n * p.x.stride_n + uint64_t{p.x.stride_c} * (kLaneSteps * q) + b.top * p.x.stride_h;
    image = pinned(static_cast<const unsigned char*>(p.x.data) + C::kBytes * at);
  }
  __device__ __forceinline__ void load_step(int slot) {
    load_words<kWords>(words[slot][0], next);
#pragma unroll
    for (int i = 0; i < kLaneSteps - 1; ++i) load_words<kWords>(words[slot][i + 1], next + planes[i]);
    next += planes[3];
  }
  // The first steps of another chunk, and its last 8 channels, if they are half a step, in the slot that is left.
  __device__ __forceinline__ void begin(int chunk, int steps, bool has_tail, int q) {
    next = advanced(image, chunk, C::kChunkBytes);
    if constexpr (C::kHalf)
      if (has_tail) {
        const unsigned char* from = next + static_cast<int64_t>(static_cast<int>(planes[0])) * (16 * steps - 2 * q);
        load_words<kWords>(words[C::kSlots - 1][0], from);
        load_words<kWords>(words[C::kSlots - 1][1], from + planes[0]);
      }
#pragma unroll
    for (int s = 0; s < C::kSlots - 1; ++s) {
      if (s < steps) load_step(s);
    }
  }
  // Pixel i of the step's half ``k``: two channels of half precision, one of TF32, times the gate.
  __device__ __forceinline__ uint32_t operand(int slot, int k, int i, bool gated, uint32_t gate) const {
    using T = typename C::T;
    if constexpr (C::kHalf) {
      const uint32_t v = pair(words[slot][2 * k], words[slot][2 * k + 1], i);
      return gated ? multiply_pairs<T>(v, gate) : v;
    } else {
      return to_tf32(gated ? multiply_pairs<T>(words[slot][k][i], gate) : words[slot][k][i]);
    }
  }
  // Pixel i of two channels.
  __device__ __forceinline__ static uint32_t pair(const uint32_t (&a)[kWords], const uint32_t (&b)[kWords], int i) {
    return __byte_perm(a[i / 2], b[i / 2], i % 2 ? 0x7632 : 0x5410);
  }
};

// Norm, bias and activation of a chunk's sums: to shared memory and, where x1 leaves from registers, to the output.
template <class C>
__device__ __forceinline__ void norm_affine_chunk(const NchwParams& p, const float4& affine, float (&sum)[C::kV],
                                                  uint32_t to, unsigned char* to_out, bool stored) {
#pragma unroll
  for (int i = 0; i < C::kV; ++i) sum[i] = fmaf(sum[i], affine.x, affine.y);
  uint32_t v[C::kWords];
  activate_and_pack<C, C::kV>(v, sum, p.args.primary.act, affine.z, p.primary_floor);
  store_shared_words<C::kWords>(to, v);
  if constexpr (C::kDirect || C::kWindows) store_words<C::kWords>(to_out, v, stored);
}

// Where a lane's part of x1 goes: channel g of each 8, by chunks.
template <class C>
struct NchwX1 {
  static constexpr int kV = C::kV, kTiles = C::kTiles;
  const float4* affines;  // of channel g: scale, shift, slope
  uint32_t planes;        // in shared memory, the halo's first row
  unsigned char* out;
  int g, halves;  // halves of m16 tiles that have channels

  __device__ __forceinline__ NchwX1(const NchwParams& p, const NchwBlock& b, unsigned char* smem, int g_)
      : affines(reinterpret_cast<const float4*>(smem) + g_), g(g_), halves((b.channels + 7) / 8) {
    const int first_row = b.top - (b.h0 - C::kPad);
    planes = pinned(shared_address(smem) + p.plan.x1_offset + g * p.plan.plane_pitch +
                    (C::kWide ? C::kChunkBytes + first_row * p.plan.row_pitch : 0));
    const uint64_t at = b.n * p.out.stride_n + uint64_t{p.out.stride_c} * (b.c0 + g) + b.top * p.out.stride_h;
    out = pinned(static_cast<unsigned char*>(p.out.data) + C::kBytes * at);
  }

  __device__ __forceinline__ void norm_affine(const NchwParams& p, const NchwBlock& b, const NchwChunks<C>& chunks,
                                              int group, const float (&acc)[kTiles][kV][4]) const {
    uint32_t to[2];
    unsigned char* to_out[2];
    bool stored[2];  // the other rows are halo
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int chunk = chunks.of_result(group, e), row = C::kWide ? p.by_columns.divide(chunk) : 0;
      to[e] = planes + (chunk + row) * C::kChunkBytes;  // a row is one chunk longer there
      to_out[e] = advanced(out, chunk, C::kChunkBytes);
      stored[e] = static_cast<unsigned>(b.top + row - b.h0) < static_cast<unsigned>(b.rows);
      if constexpr (!C::kDirect) stored[e] = stored[e] && has_window<C>(p);
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int c = 16 * t + 8 * half;
        if (c > 0 && c >= 8 * halves) break;
        const float4 a = affines[c];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float y[kV];
#pragma unroll
          for (int i = 0; i < kV; ++i) y[i] = acc[t][i][2 * half + e];
          norm_affine_chunk<C>(p, a, y, to[e] + c * p.plan.plane_pitch, to_out[e] + p.out_halves[2 * t + half],
                               stored[e] && c + g < b.channels);
        }
      }
    }
  }
};

// acc += w1 * x of a chunk, whose first steps are in registers.
template <class C>
__device__ __forceinline__ void add_products(float (&acc)[C::kTiles][C::kV][4], const NchwParams& p, NchwInput<C>& x,
                                             const unsigned char* weights, const typename C::T* gate) {
  using T = typename C::T;
  constexpr int kV = C::kV, kTiles = C::kTiles, kSlots = C::kSlots;
  const int lane = threadIdx.x % 32, q = lane % 4, cin = p.args.shape.in_channels, steps = cin / C::kStep;
  const bool has_tail = C::kHalf && cin % C::kStep != 0, gated = C::kFull && p.args.input_gate != nullptr;
  const unsigned char* weight = weights + lane * 16;
  const unsigned char* tail_weight = weights + steps * kTiles * 512 + lane * 8;
  if constexpr (C::kHalf)
    if (has_tail) {
      uint2 w[kTiles];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) w[t] = *reinterpret_cast<const uint2*>(tail_weight + t * 256);
#pragma unroll
      for (int i = 0; i < kV; ++i) {
        uint32_t b0 = x.pair(x.words[kSlots - 1][0], x.words[kSlots - 1][1], i);
        if (gated) b0 = multiply_pairs<T>(b0, *reinterpret_cast<const uint32_t*>(gate + 16 * steps + 2 * q));
#pragma unroll
        for (int t = 0; t < kTiles; ++t) multiply_tiles8<T>(acc[t][i], w[t], b0);
      }
    }
  const unsigned char* step_weight = weight;
  const T* step_gate = gate + C::kLaneSteps * q;
#pragma unroll 1
  for (int s0 = 0; s0 < steps; s0 += kSlots) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if (slot > 0 && s0 + slot >= steps) break;
      if (s0 + slot + kSlots - 1 < steps) x.load_step((slot + kSlots - 1) % kSlots);
      uint4 w[kTiles];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        w[t] = *reinterpret_cast<const uint4*>(step_weight + (slot * kTiles + t) * 512);
      }
#pragma unroll
      for (int i = 0; i < kV; ++i) {
        uint2 two{};
        if (gated) two = *reinterpret_cast<const uint2*>(step_gate + C::kStep * slot);
        const uint32_t b0 = x.operand(slot, 0, i, gated, two.x), b1 = x.operand(slot, 1, i, gated, two.y);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) multiply_tiles<T, false>(acc[t][i], w[t], b0, b1);
      }
    }
    step_weight += kSlots * kTiles * 512;
    step_gate += kSlots * C::kStep;
  }
}

template <class C, typename F>
__device__ __forceinline__ void primary(const NchwParams& p, const NchwBlock& b, unsigned char* smem, F load_rest) {
  using T = typename C::T;
  constexpr int kV = C::kV, kTiles = C::kTiles;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int cin = p.args.shape.in_channels, steps = cin / C::kStep;
  const bool has_tail = C::kHalf && cin % C::kStep != 0;
  const NchwChunks<C> chunks(p, b, g, q);
  NchwInput<C> x(p, b, q);
  const bool windows = has_window<C>(p);
  if (!windows) x.begin(chunks.to_read(warp), steps, has_tail, q);
  load_rest();
  __syncthreads();

  unsigned char* stage = smem + p.plan.stage_offset;
  const T* gate = reinterpret_cast<const T*>(smem + p.plan.gate_offset);
  const NchwX1<C> x1(p, b, smem, g);

#pragma unroll 1
  for (int first = 0; first < chunks.groups; first += p.plan.warps) {
    const int group = first + warp;
    const bool busy = group < chunks.groups;
    if (!busy && !windows) break;
    float acc[kTiles][kV][4] = {};
    if (windows) {
      if constexpr (C::kWindows) add_windows<C>(acc, p, b, stage, chunks.to_read(group), busy, x.words);
    } else {
      add_products<C>(acc, p, x, stage, gate);
      x.begin(chunks.to_read(group + p.plan.warps), steps, has_tail, q);  // clamped: at the end the last chunk again
    }
    if (busy) x1.norm_affine(p, b, chunks, group, acc);
  }
}

}  // namespace ghostfused
