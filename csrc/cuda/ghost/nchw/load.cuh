// Load, of the NCHW kernel: what a block needs beside x, once, to shared memory.
#pragma once

#include "cuda/ghost/nchw/window.cuh"

namespace ghostfused {

// The 1×1 weights as mma's A operand, [step][m16 tile][lane] and, of half precision, behind them the last 8 input
// channels. K is permuted as in x: lane (g, q) has neighbours, 4q … 4q + 3 of k16 and 2q, 2q + 1 of TF32's k8. Channels
// beyond the block's are those of its last one, and nobody reads what they give.
template <class C>
__device__ __forceinline__ void load_primary_weight(const NchwParams& p, const NchwBlock& b, unsigned char* to) {
  using T = typename C::T;
  constexpr int kTiles = C::kTiles;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int cin = p.args.shape.in_channels, steps = cin / C::kStep;
  const T* weight = static_cast<const T*>(p.args.primary_weight) + b.c0 * p.args.primary_weight_stride_n;
  const uint32_t stride = p.args.primary_weight_stride_n;
  const auto row = [&](int channel) { return weight + uint64_t{stride} * min(channel, b.channels - 1); };
  const auto load = [&](int i) {
    const int k = i / kTiles * C::kStep + C::kLaneSteps * q, channel = i % kTiles * 16 + g;
    uint2 upper, lower;
    load_words<2>(&upper.x, row(channel) + k);
    load_words<2>(&lower.x, row(channel + 8) + k);
    return uint4{upper.x, lower.x, upper.y, lower.y};
  };
  const auto store = [&](int i, const uint4& fragment) {
    *reinterpret_cast<uint4*>(to + i * 512 + lane * 16) = C::kHalf ? fragment : to_tf32(fragment);
  };
  constexpr int kAhead = 4;  // under way together
  const int warps = p.plan.warps, count = steps * kTiles;
  int i = warp;
#pragma unroll 1
  for (; i + (kAhead - 1) * warps < count; i += kAhead * warps) {
    uint4 fragments[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) fragments[k] = load(i + k * warps);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) store(i + k * warps, fragments[k]);
  }
#pragma unroll 1
  for (; i < count; i += warps) store(i, load(i));
  if (C::kHalf && cin % 16 != 0 && warp < kTiles) {
    for (int tile = warp; tile < kTiles; tile += p.plan.warps) {
      uint2 v;
      load_words<1>(&v.x, row(tile * 16 + g) + steps * 16 + 2 * q);
      load_words<1>(&v.y, row(tile * 16 + g + 8) + steps * 16 + 2 * q);
      *reinterpret_cast<uint2*>(to + steps * kTiles * 512 + tile * 256 + lane * 8) = v;
    }
  }
}

// The 1×1 weights of IEEE fp32 for input channels [k0, k0 + count): [group of channels][k][channel].
__device__ __forceinline__ void load_weight_groups(const NchwParams& p, const NchwBlock& b, unsigned char* to, int k0,
                                                   int count) {
  const float* weight = static_cast<const float*>(p.args.primary_weight) + k0;
  const int fours = count / 4, groups = (b.channels + kFmaChannels - 1) / kFmaChannels;
  const int c = threadIdx.x % 32 % kFmaChannels, first = threadIdx.x / kFmaChannels, step = blockDim.x / kFmaChannels;
  for (int group = 0; group < groups; ++group) {
    const int channel = b.c0 + min(group * kFmaChannels + c, b.channels - 1);
    const float* row = weight + int64_t{channel} * p.args.primary_weight_stride_n;
    unsigned char* at = to + group * p.plan.group_pitch + c * 4;
#pragma unroll 2
    for (int i = first; i < fours; i += step) {
      const uint4 v = load_global16(row + 4 * i);
      uint32_t* four = reinterpret_cast<uint32_t*>(at + i * (16 * kFmaChannels));
      four[0] = v.x, four[kFmaChannels] = v.y, four[2 * kFmaChannels] = v.z, four[3 * kFmaChannels] = v.w;
    }
  }
}

// Of x1's channels [scale | shift | slope], a float4 each; and of the ghosts the depthwise weights, already multiplied
// by the norm's scale, with shift and slope behind them. One loop, which has the code of affine() once.
template <class C>
__device__ __forceinline__ void load_channels(const NchwParams& p, const NchwBlock& b, unsigned char* smem) {
  using T = typename C::T;
  constexpr int kD = C::kD;
  const GhostForwardParams& a = p.args;
  const int primaries = p.plan.cheap_offset / 16;
#pragma unroll 1
  for (int i = threadIdx.x; i < primaries + b.ghosts; i += blockDim.x) {
    const bool cheap = i >= primaries;
    const int c = cheap ? i - primaries : min(i, b.channels - 1);
    const NormAct& act = cheap ? a.cheap : a.primary;
    const RawAffine raw = load_affine<T>(act, b.c0 + c);
    constexpr int kTaps = kD == 5 ? kD : kD * kD;  // under way together: 5×5 would have too many instructions
    T taps[kTaps];
    const T* weight = static_cast<const T*>(a.cheap_weight) + (b.c0 + c) * a.cheap_weight_stride_c;
    const auto load_taps = [&](int first) {
#pragma unroll
      for (int i = 0; i < kTaps; ++i) {
        taps[i] = weight[(first + i / kD) * a.cheap_weight_stride_h + i % kD * a.cheap_weight_stride_w];
      }
    };
    if (cheap && kTaps == kD * kD) load_taps(0);
    const Affine norm = affine<T>(act, raw);
    if (!cheap) {
      reinterpret_cast<float4*>(smem)[i] = float4{norm.scale, norm.shift, norm.slope, 0.f};
      continue;
    }
    float* w = reinterpret_cast<float*>(smem + p.plan.cheap_offset) + c * C::kCheapFloats;
#pragma unroll 1
    for (int first = 0; first < kD * kD; first += kTaps) {
      if (kTaps < kD * kD) load_taps(first / kD);
#pragma unroll
      for (int i = 0; i < kTaps; ++i) w[first + i] = to_float(taps[i]) * norm.scale;
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
  using Zeros = Vector<typename C::T, C::kV>;  // of a chunk
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rows = p.plan.tile_h + 2 * C::kPad, above = b.top - (b.h0 - C::kPad), below = above + b.halo_rows;
  for (int c = lane; c < b.ghosts; c += 32) {
    unsigned char* plane = x1 + c * p.plan.plane_pitch;
    for (int r = warp; r <= rows; r += p.plan.warps) Zeros().store(plane + r * p.plan.row_pitch);
    for (int k = 0; k < 2 * C::kPad; ++k) {
      const int r = k < C::kPad ? k : below + k - C::kPad;
      if (k < C::kPad ? r >= above : r >= rows) continue;
      unsigned char* row = plane + r * p.plan.row_pitch + C::kChunkBytes;
      for (int i = warp; i < p.plan.row_chunks; i += p.plan.warps) Zeros().store(row + i * C::kChunkBytes);
    }
  }
}

// All of the above, while x is on its way.
template <class C>
__device__ __forceinline__ void load(const NchwParams& p, const NchwBlock& b, unsigned char* smem) {
  if constexpr (C::kMap != NchwMap::kSeven) {
    if constexpr (C::kPath == Path::kFloat32) {
      load_weight_groups(p, b, smem + p.plan.stage_offset, 0, p.args.shape.in_channels);
    } else if (has_window<C>(p)) {
      if constexpr (C::kWindows) {  // else chunk by chunk
        if (window_steps(p) <= window_chunk(p)) {
          load_window_weight<C>(p, b, smem + p.plan.stage_offset, 0, window_steps(p));
        }
      }
    } else {
      load_primary_weight<C>(p, b, smem + p.plan.stage_offset);
    }
  }
  load_channels<C>(p, b, smem);
  if constexpr (C::kFull) load_input_gate<C>(p, b, reinterpret_cast<typename C::T*>(smem + p.plan.gate_offset));
  if constexpr (C::kWide) zero_border<C>(p, b, smem + p.plan.x1_offset);
  if constexpr (!C::kWide) {
    if (threadIdx.x < kNchwZeroBytes / 4) reinterpret_cast<uint32_t*>(smem + p.plan.zero_offset)[threadIdx.x] = 0;
  }
}

}  // namespace ghostfused
