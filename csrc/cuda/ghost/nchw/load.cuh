// Load, of the NCHW kernel: what a block needs beside x, once, to shared memory.
#pragma once

#include "cuda/ghost/nchw/tile.cuh"

namespace ghostfused {

// The 1×1 weights as mma's A operand, [k16 step][m16 tile][lane] and behind them the last 8 input channels. K is
// permuted as in x: lane (g, q) has the neighbours 4q … 4q + 3. Channels beyond the block's are those of its last one,
// and nobody reads what they give.
template <class C>
__device__ __forceinline__ void load_primary_weight(const NchwParams& p, const NchwBlock& b, unsigned char* to) {
  using T = typename C::T;
  constexpr int kTiles = C::kTiles;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int cin = p.args.shape.in_channels, steps = cin / 16;
  const T* weight = static_cast<const T*>(p.args.primary_weight) + b.c0 * p.args.primary_weight_stride_n;
  const uint32_t stride = p.args.primary_weight_stride_n;
  const auto row = [&](int channel) { return weight + uint64_t{stride} * min(channel, b.channels - 1); };
#pragma unroll 4
  for (int i = warp; i < steps * kTiles; i += p.plan.warps) {
    const int k = i / kTiles * 16 + 4 * q, channel = i % kTiles * 16 + g;
    uint2 upper, lower;
    load_words<2>(&upper.x, row(channel) + k);
    load_words<2>(&lower.x, row(channel + 8) + k);
    *reinterpret_cast<uint4*>(to + i * 512 + lane * 16) = uint4{upper.x, lower.x, upper.y, lower.y};
  }
  if (cin % 16 != 0 && warp < kTiles) {
    for (int tile = warp; tile < kTiles; tile += p.plan.warps) {
      uint2 v;
      load_words<1>(&v.x, row(tile * 16 + g) + steps * 16 + 2 * q);
      load_words<1>(&v.y, row(tile * 16 + g + 8) + steps * 16 + 2 * q);
      *reinterpret_cast<uint2*>(to + steps * kTiles * 512 + tile * 256 + lane * 8) = v;
    }
  }
}

// x1's [scale | shift | slope], a float4 a channel.
template <class C>
__device__ __forceinline__ void load_primary_affine(const NchwParams& p, const NchwBlock& b, float4* to) {
  for (int c = threadIdx.x; c < p.plan.cheap_offset / 16; c += blockDim.x) {
    const Affine a = affine<typename C::T>(p.args.primary, b.c0 + min(c, b.channels - 1));
    to[c] = float4{a.scale, a.shift, a.slope, 0.f};
  }
}

// The depthwise weights, already multiplied by the norm's scale, and shift and slope behind them, by channel.
template <class C>
__device__ __forceinline__ void load_cheap(const NchwParams& p, const NchwBlock& b, float* to) {
  using T = typename C::T;
  constexpr int kD = C::kD;
  const GhostForwardParams& a = p.args;
  for (int c = threadIdx.x; c < b.ghosts; c += blockDim.x) {
    const Affine norm = affine<T>(a.cheap, b.c0 + c);
    const T* weight = static_cast<const T*>(a.cheap_weight) + (b.c0 + c) * a.cheap_weight_stride_c;
    float* w = to + c * C::kCheapFloats;
#pragma unroll
    for (int kh = 0; kh < kD; ++kh) {
#pragma unroll
      for (int kw = 0; kw < kD; ++kw) {
        w[kh * kD + kw] = to_float(weight[kh * a.cheap_weight_stride_h + kw * a.cheap_weight_stride_w]) * norm.scale;
      }
    }
    w[kD * kD] = norm.shift;
    w[kD * kD + 1] = norm.slope;
  }
}

template <class C>
__device__ __forceinline__ void load_input_gate(const NchwParams& p, const NchwBlock& b, typename C::T* to) {
  using T = typename C::T;
  if (p.args.input_gate == nullptr) return;
  const T* gate = static_cast<const T*>(p.args.input_gate) + b.n * p.args.input_gate_stride_n;
  for (int k = threadIdx.x; k < p.args.shape.in_channels; k += blockDim.x) to[k] = gate[k * p.args.input_gate_stride_c];
}

// The zeros around a wide tile's x1: the vector between any two rows, and the rows outside the image. A lane has a
// channel. Rows below the first kPad that are outside only give outputs that don't exist.
template <class C>
__device__ __forceinline__ void zero_border(const NchwParams& p, const NchwBlock& b, unsigned char* x1) {
  using Zeros = Vector<typename C::T, C::kV>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rows = p.plan.tile_h + 2 * C::kPad, above = b.top - (b.h0 - C::kPad), below = above + b.halo_rows;
  for (int c = lane; c < b.ghosts; c += 32) {
    unsigned char* plane = x1 + c * p.plan.plane_pitch;
    for (int r = warp; r <= rows; r += p.plan.warps) Zeros().store(plane + r * p.plan.row_pitch);
    for (int k = 0; k < 2 * C::kPad; ++k) {
      const int r = k < C::kPad ? k : below + k - C::kPad;
      if (k < C::kPad ? r >= above : r >= rows) continue;
      unsigned char* row = plane + r * p.plan.row_pitch + 2 * C::kV;
      for (int i = warp; i < p.plan.row_chunks; i += p.plan.warps) Zeros().store(row + i * (2 * C::kV));
    }
  }
}

// All of the above, while x is on its way.
template <class C>
__device__ __forceinline__ void load(const NchwParams& p, const NchwBlock& b, unsigned char* smem) {
  if constexpr (C::kMap != NchwMap::kSeven) load_primary_weight<C>(p, b, smem + p.plan.stage_offset);
  load_primary_affine<C>(p, b, reinterpret_cast<float4*>(smem));
  load_cheap<C>(p, b, reinterpret_cast<float*>(smem + p.plan.cheap_offset));
  if constexpr (C::kFull) load_input_gate<C>(p, b, reinterpret_cast<typename C::T*>(smem + p.plan.gate_offset));
  if constexpr (C::kWide) zero_border<C>(p, b, smem + p.plan.x1_offset);
  if constexpr (!C::kWide) {
    if (threadIdx.x < 8) reinterpret_cast<uint32_t*>(smem + p.plan.zero_offset)[threadIdx.x] = 0;
  }
}

}  // namespace ghostfused
