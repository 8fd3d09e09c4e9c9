// Primary and norm_affine of the NCHW kernel in IEEE fp32, which has no tensor cores: multiply-adds. A thread has a
// chunk of four pixels × a group of eight init channels at a time. x comes straight to registers, a vector of an input
// channel; the weights of a group lie in shared memory, [input channel][channel], and all lanes that have the same read
// them at once.
#pragma once

#include "cuda/ghost/nchw/primary.cuh"

namespace ghostfused {

// The sums of kPixels pixels × kFmaChannels channels. Products of 16 input channels are added apart: a chain of all
// would lose twice what PyTorch's own order loses.
template <int kPixels>
struct FmaSums {
  float part[kPixels][kFmaChannels], sum[kPixels][kFmaChannels] = {};

  // part = x * weights with kFirst, else +=.
  template <bool kFirst>
  __device__ __forceinline__ void multiply(const float (&x)[kPixels], const unsigned char* weights) {
#pragma unroll
    for (int c = 0; c < kFmaChannels; c += 4) {
      const float4 w = *reinterpret_cast<const float4*>(weights + 4 * c);
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        float* to = &part[i][c];
        to[0] = kFirst ? x[i] * w.x : fmaf(x[i], w.x, to[0]);
        to[1] = kFirst ? x[i] * w.y : fmaf(x[i], w.y, to[1]);
        to[2] = kFirst ? x[i] * w.z : fmaf(x[i], w.z, to[2]);
        to[3] = kFirst ? x[i] * w.w : fmaf(x[i], w.w, to[3]);
      }
    }
  }
  __device__ __forceinline__ void join() {
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
#pragma unroll
      for (int c = 0; c < kFmaChannels; ++c) sum[i][c] += part[i][c];
    }
  }
  template <class C>
  __device__ __forceinline__ void norm_affine(const NchwParams& p, const float4* affines) {
    float slopes[kFmaChannels];
#pragma unroll
    for (int c = 0; c < kFmaChannels; ++c) {
      const float4 a = affines[c];
      slopes[c] = a.z;
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        float& y = sum[i][c];
        y = fmaf(y, a.x, a.y);
        if constexpr (!C::kFull) y = __uint_as_float(at_least<float>(__float_as_uint(y), p.primary_floor));
      }
    }
    if constexpr (C::kFull) activate_rows<true>(sum, p.args.primary.act, slopes);
  }
};

template <class C, typename F>
__device__ __forceinline__ void primary_fma(const NchwParams& p, const NchwBlock& b, unsigned char* smem, F load_rest) {
  constexpr int kV = C::kV, kJoined = 4;  // steps
  const int cin = p.args.shape.in_channels, steps = cin / C::kStep;
  const int chunks = C::kWide ? b.halo_rows * p.plan.row_chunks : C::kPixels / kV;
  const FastDivisor by_chunks(chunks);
  const int items = chunks * ((b.channels + kFmaChannels - 1) / kFmaChannels);
  NchwInput<C> x(p, b, 0);
  const auto begin = [&](int item) {  // at the end the last chunk again
    item = min(item, items - 1);
    x.begin(item - by_chunks.divide(item) * chunks, steps, false, 0);
  };
  begin(threadIdx.x);
  load_rest();
  __syncthreads();

  const unsigned char* weights = smem + p.plan.stage_offset;
  const float* gates = reinterpret_cast<const float*>(smem + p.plan.gate_offset);
  const bool gated = C::kFull && p.args.input_gate != nullptr;
  const float4* affines = reinterpret_cast<const float4*>(smem);

#pragma unroll 1
  for (int item = threadIdx.x; item < items; item += blockDim.x) {
    const unsigned char* w = weights + by_chunks.divide(item) * p.plan.group_pitch;
    const float* gate = gates;
    FmaSums<kV> sums;
#pragma unroll 1
    for (int s0 = 0; s0 < steps; s0 += kJoined) {
#pragma unroll
      for (int s = 0; s < kJoined; ++s) {
        if (s > 0 && s0 + s >= steps) break;
        if (s0 + s + 1 < steps) x.load_step((s + 1) % 2);
#pragma unroll
        for (int k = 0; k < C::kStep; ++k) {
          float pixels[kV];
#pragma unroll
          for (int i = 0; i < kV; ++i) {
            pixels[i] = __uint_as_float(x.words[s % 2][k][i]);
            if (gated) pixels[i] *= gate[s * C::kStep + k];
          }
          const unsigned char* at = w + (s * C::kStep + k) * (4 * kFmaChannels);
          s + k == 0 ? sums.template multiply<true>(pixels, at) : sums.template multiply<false>(pixels, at);
        }
      }
      sums.join();
      w += kJoined * C::kStep * (4 * kFmaChannels);
      gate += kJoined * C::kStep;
    }
    // From the item and the parameters anew: the products leave no register for what follows from them.
    int same = item;
    asm volatile("" : "+r"(same));
    const int group = by_chunks.divide(same), chunk = same - group * chunks, first = group * kFmaChannels;
    begin(same + blockDim.x);

    const int row = C::kWide ? p.by_columns.divide(chunk) : 0;
    const bool stored = static_cast<unsigned>(b.top + row - b.h0) < static_cast<unsigned>(b.rows);
    uint32_t to = shared_address(smem) + p.plan.x1_offset + (chunk + row) * C::kChunkBytes + first * p.plan.plane_pitch;
    if constexpr (C::kWide) to += C::kChunkBytes + (b.top - (b.h0 - C::kPad)) * p.plan.row_pitch;
    unsigned char* to_out = static_cast<unsigned char*>(p.out.data) + C::kBytes * (b.n * p.out.stride_n) +
                            C::kBytes * offset_in_image(p.out, b.c0 + first, b.top, 0) + chunk * C::kChunkBytes;
    sums.template norm_affine<C>(p, affines + first);
#pragma unroll
    for (int c = 0; c < kFmaChannels; ++c) {
      uint32_t v[kV];
#pragma unroll
      for (int i = 0; i < kV; ++i) v[i] = __float_as_uint(sums.sum[i][c]);
      store_shared_words<kV>(to, v);
      if constexpr (C::kDirect) store_words<kV>(to_out, v, stored && first + c < b.channels);
      to += p.plan.plane_pitch;
      to_out += p.out_plane;
    }
  }
}

}  // namespace ghostfused
