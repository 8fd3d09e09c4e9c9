// Store, of the NCHW kernel: gate and residual, and whole vectors of neighbouring pixels to the output.
#pragma once

#include "cuda/ghost/nchw/tile.cuh"

namespace ghostfused {

// The output gate and the residual of kWords words of numbers. ``place(i)`` is the channel, row and column of the i-th.
template <class C, int kWords, typename F>
__device__ __forceinline__ void gate_and_add(const NchwParams& p, int n, uint32_t (&v)[kWords], F place) {
  using T = typename C::T;
  const GhostForwardParams& a = p.args;
  if (p.residual.data == nullptr && p.output_gate.data == nullptr) return;
  const auto at = [n](const DeviceTensor& t, int c, int h, int w) {
    return static_cast<const T*>(t.data) + n * t.stride_n + offset_in_image(t, c, h, w);
  };
  constexpr int kPerWord = 4 / C::kBytes;
#pragma unroll 1
  for (int i = 0; i < kWords; ++i) {  // words move on, as in activation.cuh's one_by_one
    float y[2];
    if constexpr (C::kHalf) {
      const float2 both = unpack<T>(v[0]);
      y[0] = both.x, y[1] = both.y;
    } else {
      y[0] = __uint_as_float(v[0]);
    }
#pragma unroll
    for (int e = 0; e < kPerWord; ++e) {
      const int3 to = place(kPerWord * i + e);  // channel, row, column
      if (p.output_gate.data != nullptr) {
        y[e] *= to_float(*at(p.output_gate, to.x, nearest(to.y, a.gate_height, a.shape.height),
                             nearest(to.z, a.gate_width, a.shape.width)));
      }
      if (p.residual.data != nullptr) y[e] += to_float(*at(p.residual, to.x, to.y, to.z));
    }
#pragma unroll
    for (int k = 1; k < kWords; ++k) v[k - 1] = v[k];
    if constexpr (C::kHalf) {
      v[kWords - 1] = pack<T>(y[0], y[1]);
    } else {
      v[kWords - 1] = __float_as_uint(y[0]);
    }
  }
}

// x1 of a wide tile, chunk by chunk, where a gate or a residual comes between shared memory and the output.
template <class C>
__device__ __forceinline__ void store_x1(const NchwParams& p, const NchwBlock& b, const unsigned char* smem) {
  constexpr int kV = C::kV;
  const int columns = p.plan.row_chunks;
#pragma unroll 1
  for (int c = threadIdx.x / 32; c < b.channels; c += p.plan.warps) {
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < b.rows * columns; i += 32) {
      const int row = p.by_columns.divide(i), column = i - row * columns;
      Vector<typename C::T, kV> chunk;
      chunk.load(smem + p.plan.x1_offset + c * p.plan.plane_pitch + (row + C::kPad) * p.plan.row_pitch +
                 (column + 1) * C::kChunkBytes);
      uint32_t v[C::kWords];
#pragma unroll
      for (int k = 0; k < C::kWords; ++k) v[k] = reinterpret_cast<const uint32_t*>(&chunk.raw)[k];
      gate_and_add<C>(p, b.n, v, [=](int e) { return int3{b.c0 + c, b.h0 + row, column * kV + e}; });
      store_words<C::kWords>(
          static_cast<unsigned char*>(p.out.data) +
              C::kBytes * (b.n * p.out.stride_n + offset_in_image(p.out, b.c0 + c, b.h0 + row, column * kV)),
          v, true);
    }
  }
}

// ``channels`` whole maps, one behind the other in shared memory as in the output, which has them from channel c on.
template <class C>
__device__ __forceinline__ void store_maps(const NchwParams& p, int n, int c, int channels, const unsigned char* from) {
  using T = typename C::T;
  const int bytes = channels * C::kPixels * C::kBytes;
  T* image = static_cast<T*>(p.out.data) + n * p.out.stride_n;
  unsigned char* to = reinterpret_cast<unsigned char*>(image + c * C::kPixels);
#pragma unroll(C::kFull ? 1 : 4)
  for (int i = threadIdx.x * 16; i < bytes; i += p.plan.warps * 512) {
    const uint4 v = *reinterpret_cast<const uint4*>(from + i);
    uint32_t words[4] = {v.x, v.y, v.z, v.w};
    if constexpr (C::kFull) {
      gate_and_add<C>(p, n, words, [=](int e) {
        const int at = i / C::kBytes + e, map = at / C::kPixels, pixel = at % C::kPixels;
        return int3{c + map, pixel / C::kSide, pixel % C::kSide};
      });
    }
    store_words<4>(to + i, words, true);
  }
}

}  // namespace ghostfused
