// Primary and norm_affine of 7 × 7 maps, of the NCHW kernel. An n8 tile of mma is a column of the map, of which 7 of 8
// rows exist, so that the result leaves a lane with whole rows. x goes to shared memory as it lies, as many input
// channels at a time as there is room for; warps share the init channels, and also the input channels where there are
// many: then their sums are added in shared memory.
//
// A map has 49 numbers, so in half precision channels begin on a word and half a word beside one in turn, and so do the
// rows of a map. Of the rows of two neighbour channels one begins on a word; which of the two depends on the row's
// parity. In fp32 a row is seven words.
#pragma once

#include "cuda/ghost/nchw/load.cuh"
#include "cuda/ghost/nchw/primary_fma.cuh"

namespace ghostfused {

template <class C>
constexpr int kSevenMapBytes = 49 * C::kBytes;
template <class C>
constexpr int kSevenStepBytes = C::kStep * kSevenMapBytes<C>;

// ``channels`` of an image as they are, by all threads. The caller waits.
template <class C>
__device__ __forceinline__ void copy_maps(const NchwParams& p, const unsigned char* from, int channels,
                                          unsigned char* to) {
  const int threads = 32 * p.plan.warps, pieces = channels * kSevenMapBytes<C> / 16;
  const uint32_t address = shared_address(to);
#pragma unroll 4
  for (int i = threadIdx.x; i < pieces; i += threads) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address + i * 16), "l"(from + i * 16) : "memory");
  }
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// B operands: row ``g`` of the map; in half precision of channels 4q … 4q + 3 of a k16 step.
template <class C, bool = C::kHalf>
struct SevenInput {
  static constexpr int kMapBytes = kSevenMapBytes<C>, kStepBytes = kSevenStepBytes<C>;
  const unsigned char *word_rows, *half_rows;  // of the channel whose row begins on a word, and of the other, less 2
  uint32_t even, odd;                          // byte permutations for even and odd columns: lower channel first

  __device__ __forceinline__ SevenInput(const unsigned char* x, int g, int q) {
    const int row = min(g, 6), parity = row & 1;
    const unsigned char* at = x + 4 * q * kMapBytes + 14 * row;
    word_rows = at + (parity ? kMapBytes : 0);
    half_rows = at + (parity ? 0 : kMapBytes) - 2;
    even = pinned(parity ? 0x1076u : 0x7610u);
    odd = pinned(parity ? 0x3254u : 0x5432u);
  }
  __device__ __forceinline__ void read(uint32_t (&b)[7][2], int step) const {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      uint32_t word[4], half[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = step * kStepBytes + k * (2 * kMapBytes) + 4 * j;
        word[j] = *reinterpret_cast<const uint32_t*>(word_rows + at);
        half[j] = *reinterpret_cast<const uint32_t*>(half_rows + at);
      }
#pragma unroll
      for (int i = 0; i < 7; ++i) b[i][k] = __byte_perm(word[i / 2], half[(i + 1) / 2], i % 2 ? odd : even);
    }
  }
  __device__ __forceinline__ void advance(int steps) {
    word_rows += steps * kStepBytes, half_rows += steps * kStepBytes;
  }
};

// TF32: of channels q and q + 4 of a k8 step, which no two lanes read from one bank.
template <class C>
struct SevenInput<C, false> {
  const unsigned char* rows;

  __device__ __forceinline__ SevenInput(const unsigned char* x, int g, int q)
      : rows(x + q * kSevenMapBytes<C> + 28 * min(g, 6)) {}
  __device__ __forceinline__ void read(uint32_t (&b)[7][2], int step) const {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int i = 0; i < 7; ++i) {
        b[i][k] =
            *reinterpret_cast<const uint32_t*>(rows + step * kSevenStepBytes<C> + k * (4 * kSevenMapBytes<C>)+4 * i);
      }
    }
  }
  __device__ __forceinline__ void advance(int steps) { rows += steps * kSevenStepBytes<C>; }
};

// A operands, straight from global memory: a warp uses each once.
template <class C>
struct SevenWeights {
  using T = typename C::T;
  static constexpr int kSecond = C::kHalf ? 2 : 4;  // where the other half of a step's K is
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
      load_words<1>(&words[slot][t].x, row[t][0] + C::kStep * step);
      load_words<1>(&words[slot][t].z, row[t][0] + C::kStep * step + kSecond);
      load_words<1>(&words[slot][t].y, row[t][1] + C::kStep * step);
      load_words<1>(&words[slot][t].w, row[t][1] + C::kStep * step + kSecond);
    }
  }
};

// x1 of this lane's channel c, row h.
template <class C>
__device__ __forceinline__ void norm_affine_seven(const NchwParams& p, unsigned char* smem, const float (&sum)[7],
                                                  int c, int h, bool inside) {
  const float4 a = reinterpret_cast<const float4*>(smem)[c];
  float y[7];
#pragma unroll
  for (int i = 0; i < 7; ++i) y[i] = fmaf(sum[i], a.x, a.y);
  MapRow<C> row;
  activate_and_pack<C, 7>(row.words, y, p.args.primary.act, a.z, p.primary_floor);
  if (h < 7 && inside) row.store_x1(smem + p.plan.x1_offset + c * p.plan.plane_pitch + h * C::kRowPitch);
}

// The products of a warp by tensor cores: rows of 16 * kTiles channels.
template <class C, bool = C::kPath == Path::kFloat32>
struct SevenProducts {
  static constexpr int kTiles = C::kTiles, kSlots = C::kSlots, kRows = 4 * kTiles;  // of a lane
  float acc[kTiles][7][4] = {};

  // Element u % 4 of tile u / 4: of 8 channels, rows 2q + u % 2.
  __device__ __forceinline__ static int channel(int u, int g, int) { return u / 2 * 8 + g; }
  __device__ __forceinline__ static int row(int u, int, int q) { return 2 * q + u % 2; }
  __device__ __forceinline__ static bool exists(int u, int channels) { return u / 2 * 8 < channels; }  // for all lanes
  __device__ __forceinline__ static bool inside(int, int, int) { return true; }
  __device__ __forceinline__ void get(float (&sum)[7], int u) const {
#pragma unroll
    for (int i = 0; i < 7; ++i) sum[i] = acc[u / 4][i][u % 4];
  }

  // Adds ``steps`` of the input channels that begin at k, which shared memory has at ``stage`` from ``first`` on, when
  // ``arrived()`` says so.
  template <typename F>
  __device__ __forceinline__ void add(const NchwParams& p, const NchwBlock& b, unsigned char* smem, int first_channel,
                                      int k, int first, int steps, F arrived) {
    using T = typename C::T;
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4, own = (C::kHalf ? 4 : 1) * q;
    SevenWeights<C> weights(p, b, first_channel, k + own, g);
#pragma unroll
    for (int s = 0; s < kSlots - 1; ++s) {
      if (s < steps) weights.load_step(s, s);
    }
    arrived();
    SevenInput<C> x(smem + p.plan.stage_offset + first * kSevenMapBytes<C>, g, q);
    const T* gate = reinterpret_cast<const T*>(smem + p.plan.gate_offset) + k + own;
    const bool gated = C::kFull && p.args.input_gate != nullptr;
#pragma unroll 1
    for (int s0 = 0; s0 < steps; s0 += kSlots) {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        if (slot > 0 && s0 + slot >= steps) break;
        if (s0 + slot + kSlots - 1 < steps) weights.load_step(slot + kSlots - 1, (slot + kSlots - 1) % kSlots);
        uint32_t columns[7][2];
        x.read(columns, slot);
        uint4 w[kTiles];
#pragma unroll
        for (int t = 0; t < kTiles; ++t) w[t] = C::kHalf ? weights.words[slot][t] : to_tf32(weights.words[slot][t]);
#pragma unroll
        for (int i = 0; i < 7; ++i) {
          if (gated) {
            const uint2 two = *reinterpret_cast<const uint2*>(gate + C::kStep * slot);
            columns[i][0] = multiply_pairs<T>(columns[i][0], two.x),
            columns[i][1] = multiply_pairs<T>(columns[i][1], two.y);
          }
          if constexpr (!C::kHalf) columns[i][0] = to_tf32(columns[i][0]), columns[i][1] = to_tf32(columns[i][1]);
#pragma unroll
          for (int t = 0; t < kTiles; ++t) multiply_tiles<T, false>(acc[t][i], w[t], columns[i][0], columns[i][1]);
        }
      }
      x.advance(kSlots);
      gate += kSlots * C::kStep;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) weights.row[t][0] += kSlots * C::kStep, weights.row[t][1] += kSlots * C::kStep;
    }
  }
};

// The same in IEEE fp32 by multiply-adds: lane (g, q) has row g of a group of channels, the q-th of four.
template <class C>
struct SevenProducts<C, true> {
  static constexpr int kRows = kFmaChannels, kJoined = 4;
  FmaSums<7> sums;

  __device__ __forceinline__ static int channel(int u, int, int q) { return q * kFmaChannels + u; }
  __device__ __forceinline__ static int row(int, int g, int) { return g; }
  __device__ __forceinline__ static bool exists(int, int) { return true; }
  __device__ __forceinline__ static bool inside(int u, int channels, int q) { return channel(u, 0, q) < channels; }
  __device__ __forceinline__ void get(float (&sum)[7], int u) const {
#pragma unroll
    for (int i = 0; i < 7; ++i) sum[i] = sums.sum[i][u];
  }

  template <typename F>
  __device__ __forceinline__ void add(const NchwParams& p, const NchwBlock& b, unsigned char* smem, int first_channel,
                                      int k, int first, int steps, F arrived) {
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4, groups = (b.channels + kFmaChannels - 1) / kFmaChannels;
    arrived();
    const unsigned char* x = smem + p.plan.stage_offset;
    // Behind the maps. Lanes without channels take the last ones, and nobody reads what they give.
    const unsigned char* w = x + p.plan.k_chunk * kSevenMapBytes<C> +
                             min(first_channel / kFmaChannels + q, groups - 1) * p.plan.group_pitch +
                             first * (4 * kFmaChannels);
    x += first * kSevenMapBytes<C> + 28 * min(g, 6);
    const float* gate = reinterpret_cast<const float*>(smem + p.plan.gate_offset) + k;
    const bool gated = C::kFull && p.args.input_gate != nullptr;
#pragma unroll 1
    for (int s0 = 0; s0 < steps; s0 += kJoined) {
#pragma unroll
      for (int s = 0; s < kJoined; ++s) {
        if (s > 0 && s0 + s >= steps) break;
#pragma unroll
        for (int j = s * C::kStep; j < (s + 1) * C::kStep; ++j) {
          float row[7];
#pragma unroll
          for (int i = 0; i < 7; ++i) {
            row[i] = *reinterpret_cast<const float*>(x + j * kSevenMapBytes<C> + 4 * i);
            if (gated) row[i] *= gate[j];
          }
          const unsigned char* at = w + j * (4 * kFmaChannels);
          j == 0 ? sums.template multiply<true>(row, at) : sums.template multiply<false>(row, at);
        }
      }
      sums.join();
      x += kJoined * kSevenStepBytes<C>, w += kJoined * C::kStep * (4 * kFmaChannels), gate += kJoined * C::kStep;
    }
  }
};

template <class C, typename F>
__device__ __forceinline__ void primary_seven(const NchwParams& p, const NchwBlock& b, unsigned char* smem,
                                              F load_rest) {
  using T = typename C::T;
  using Products = SevenProducts<C>;
  constexpr int kRows = Products::kRows;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int warps_k = p.plan.warps_k, warp_k = warp % warps_k, warp_c = warp / warps_k;
  const int first_channel = warp_c * p.plan.warp_c, channels = min(p.plan.warp_c, b.channels - first_channel);
  const int cin = p.args.shape.in_channels, chunk_steps = p.plan.k_chunk / C::kStep;
  const int share = (chunk_steps + warps_k - 1) / warps_k, first_step = warp_k * share;
  unsigned char* stage = smem + p.plan.stage_offset;

  const T* image = static_cast<const T*>(p.x.data) + b.n * p.x.stride_n;
  Products products;
#pragma unroll 1
  for (int k = 0; k < cin; k += p.plan.k_chunk) {
    const int count = min(p.plan.k_chunk, cin - k);
    if (k > 0) __syncthreads();  // all have read the input channels before
    copy_maps<C>(p, reinterpret_cast<const unsigned char*>(image + 49 * k), count, stage);
    if constexpr (C::kPath == Path::kFloat32) {
      load_weight_groups(p, b, stage + p.plan.k_chunk * kSevenMapBytes<C>, k, count);
    }
    const int first = first_step * C::kStep, steps = min(share, count / C::kStep - first_step);
    products.add(p, b, smem, first_channel, k + first, first, steps, [&] {
      if (k == 0) load_rest();
      asm volatile("cp.async.wait_all;" ::: "memory");
      __syncthreads();
    });
  }

  if constexpr (C::kHalf && !C::kFull) {  // a shorter way, where it is not a longer kernel
    if (warps_k == 1) {
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        if (!Products::exists(u, channels)) break;
        float sum[7];
        products.get(sum, u);
        norm_affine_seven<C>(p, smem, sum, first_channel + Products::channel(u, g, q), Products::row(u, g, q), true);
      }
      return;
    }
  }
  __syncthreads();  // all have read x: the sums take its place
  float4* all_sums = reinterpret_cast<float4*>(stage) + warp_c * (warps_k * kRows * 64) + lane;
#pragma unroll
  for (int u = 0; u < kRows; ++u) {
    if (!Products::exists(u, channels)) break;
    float sum[7];
    products.get(sum, u);
    // The last warp, which may be done early, writes first: a missing barrier shows.
    float4* to = all_sums + ((warps_k - 1 - warp_k) * kRows + u) * 64;
    to[0] = float4{sum[0], sum[1], sum[2], sum[3]};
    to[32] = float4{sum[4], sum[5], sum[6], 0.f};
  }
  __syncthreads();  // all sums are there
#pragma unroll 1
  for (int u = warp_k; u < kRows && Products::exists(u, channels); u += warps_k) {
    float sum[7] = {};
#pragma unroll 2
    for (int k = 0; k < warps_k; ++k) {
      const float4 first = all_sums[(k * kRows + u) * 64], second = all_sums[(k * kRows + u) * 64 + 32];
      sum[0] += first.x, sum[1] += first.y, sum[2] += first.z, sum[3] += first.w;
      sum[4] += second.x, sum[5] += second.y, sum[6] += second.z;
    }
    norm_affine_seven<C>(p, smem, sum, first_channel + Products::channel(u, g, q), Products::row(u, g, q),
                         Products::inside(u, channels, q));
  }
}

}  // namespace ghostfused
