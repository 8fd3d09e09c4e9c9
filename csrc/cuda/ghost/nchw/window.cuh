// The 3×3 primary conv of the NCHW kernel: an implicit matrix product, of any stride and dilation.
//
// K of an mma is four input channels × four numbers of one row of the window: nothing, and the three taps. Lane (g, q)
// reads a row of channel 4 * step + q for the 4 pixels of chunk g. Where the stride is 2, taps 1 and 2 of pixel i are
// word i of an aligned vector, and tap 0 is the upper half of the word before: B operands as they come. At stride 1
// every second pixel takes a byte permutation. Other strides, dilation, and x that is not made of such vectors are read
// number by number. What a row has outside of the image is zero. If Cin is no multiple of 4, it is the first step that
// has channels before the first: their registers are zero from the start.
#pragma once

#include <type_traits>

#include "cuda/ghost/nchw/tile.cuh"

namespace ghostfused {

template <class C>
__device__ __forceinline__ bool has_window(const NchwParams& p) {
  return C::kWindows && p.window_reads != WindowReads::kNone;
}

// Steps of four input channels, and those that shared memory has the weights of at a time.
__device__ __forceinline__ int window_steps(const NchwParams& p) { return (p.args.shape.in_channels + 3) / 4; }
__device__ __forceinline__ int window_before(const NchwParams& p) {
  return 4 * window_steps(p) - p.args.shape.in_channels;
}
__device__ __forceinline__ int window_chunk(const NchwParams& p) { return p.plan.k_chunk / 4; }

// The weights of some steps as mma's A operand, [step][row of the window][m16 tile][lane].
template <class C>
__device__ __forceinline__ void load_window_weight(const NchwParams& p, const NchwBlock& b, unsigned char* to,
                                                   int first, int steps) {
  using T = typename C::T;
  constexpr int kTiles = C::kTiles;
  const GhostForwardParams& a = p.args;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const T* weight = static_cast<const T*>(a.primary_weight);
#pragma unroll 1
  for (int i = warp; i < steps * kTiles; i += p.plan.warps) {
    const int step = i / kTiles, tile = i % kTiles, c = 4 * (first + step) + q - window_before(p);
    const auto at = [&](int channel) {
      return weight + (b.c0 + min(channel, b.channels - 1)) * a.primary_weight_stride_n + c * a.primary_weight_stride_k;
    };
    const T* from[2] = {at(16 * tile + g), at(16 * tile + g + 8)};
    unsigned char* row = to + (3 * step * kTiles + tile) * 512 + lane * 16;
#pragma unroll 1
    for (int kh = 0; kh < 3; ++kh) {
      Vector<T, 2> tap0[2], taps[2];  // of both channels: nothing and tap 0, taps 1 and 2
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (c >= 0) {
          tap0[half].at[1] = from[half][0];
          taps[half].at[0] = from[half][a.primary_weight_stride_w];
          taps[half].at[1] = from[half][2 * a.primary_weight_stride_w];
        }
        from[half] += a.primary_weight_stride_h;
      }
      *reinterpret_cast<uint4*>(row) = uint4{tap0[0].raw, tap0[1].raw, taps[0].raw, taps[1].raw};
      row += kTiles * 512;
    }
  }
}

// What a lane reads of x for the pixels of a chunk. ``words``, the registers of a 1×1 conv's x, have of each row of the
// window the word on the left, the vector and, at stride 1, the word on the right.
template <class C>
struct Window {
  using T = typename C::T;
  static constexpr int kV = C::kV;
  const NchwParams& p;
  const unsigned char* next;  // tap 1 of the first pixel in the window's first row, of the step that is loaded next
  int left;                   // its column
  bool row_inside[3], has_left, has_right;
  bool has_first;  // the first step has a channel for the lane
  uint32_t (&words)[C::kSlots][C::kLaneSteps][C::kWords];

  __device__ __forceinline__ uint32_t& word(int kh, int i) {
    constexpr int kPerSlot = C::kLaneSteps * C::kWords;
    const int at = kh * 5 + i;
    return words[at / kPerSlot][at / C::kWords % C::kLaneSteps][at % C::kWords];
  }

  __device__ __forceinline__ Window(const NchwParams& params, const NchwBlock& b, int q, int chunk,
                                    uint32_t (&registers)[C::kSlots][C::kLaneSteps][C::kWords])
      : p(params), words(registers) {
    const GhostForwardParams& a = p.args;
    const int first = q - window_before(p);
    const int row = p.by_columns.divide(chunk), column = chunk - row * p.plan.row_chunks;
    const int top = (b.top + row) * a.stride - a.dilation;
    const auto steps = [](uint32_t stride, int times) { return int64_t{static_cast<int>(stride)} * times; };
    has_first = first >= 0;
    left = column * kV * a.stride;
    next = static_cast<const unsigned char*>(p.x.data) +
           C::kBytes *
               (b.n * p.x.stride_n + steps(p.x.stride_c, first) + steps(p.x.stride_h, top) + steps(p.x.stride_w, left));
    has_left = column > 0;
    has_right = column + 1 < p.plan.row_chunks;
#pragma unroll
    for (int kh = 0; kh < 3; ++kh) {
      row_inside[kh] = static_cast<unsigned>(top + kh * a.dilation) < static_cast<unsigned>(a.x_height);
#pragma unroll
      for (int i = 0; i < 5; ++i) word(kh, i) = 0;  // and outside of the image they stay so from step to step
    }
  }

  __device__ __forceinline__ void next_step() { next = advanced(next, p.x.stride_c, 4 * C::kBytes); }

  // Row kh of the next step, if it is ``there``. In assembly the loads would cost registers, and some kernels spill.
  template <WindowReads kReads>
  __device__ __forceinline__ void load(int kh, bool there) {
    there = there && row_inside[kh];
    const unsigned char* from = kh == 0 ? next : advanced(next, p.x.stride_h, kh * C::kBytes);
    if (there && has_left) word(kh, 0) = __ldg(reinterpret_cast<const uint32_t*>(from - 4));
    if constexpr (kReads == WindowReads::kVectors2) {
      if (there) {
        const uint4 v = __ldg(reinterpret_cast<const uint4*>(from));
        word(kh, 1) = v.x, word(kh, 2) = v.y, word(kh, 3) = v.z, word(kh, 4) = v.w;
      }
    } else {
      if (there) {
        const uint2 v = __ldg(reinterpret_cast<const uint2*>(from));
        word(kh, 1) = v.x, word(kh, 2) = v.y;
        if (has_right) word(kh, 3) = __ldg(reinterpret_cast<const uint32_t*>(from + 8));
      }
    }
  }

  // B operands from the registers: nothing and tap 0, taps 1 and 2. The nothing is a zero, since zero times infinity
  // isn't.
  template <WindowReads kReads>
  __device__ __forceinline__ void operands(uint32_t (&b0)[kV], uint32_t (&b1)[kV], int kh) {
    if constexpr (kReads == WindowReads::kVectors2) {
#pragma unroll
      for (int i = 0; i < kV; ++i) b0[i] = word(kh, i) & 0xffff0000u, b1[i] = word(kh, i + 1);
    } else {
#pragma unroll
      for (int i = 0; i < kV; ++i) {
        const uint32_t here = word(kh, i / 2 + 1);
        b0[i] = i % 2 ? here << 16 : word(kh, i / 2) & 0xffff0000u;
        b1[i] = i % 2 ? __byte_perm(here, word(kh, i / 2 + 2), 0x5432) : here;
      }
    }
  }

  // The same, number by number from global memory.
  __device__ __forceinline__ void numbers(uint32_t (&b0)[kV], uint32_t (&b1)[kV], int kh, bool there) const {
    const GhostForwardParams& a = p.args;
    const unsigned char* from = next + int64_t{p.x.stride_h} * (kh * a.dilation * C::kBytes);
    there = there && (kh == 0 ? row_inside[0] : kh == 1 ? row_inside[1] : row_inside[2]);
#pragma unroll
    for (int i = 0; i < kV; ++i) {
      uint32_t v[3];
#pragma unroll
      for (int kw = 0; kw < 3; ++kw) {
        const int shift = i * a.stride + (kw - 1) * a.dilation;
        v[kw] = 0;
        if (there && static_cast<unsigned>(left + shift) < static_cast<unsigned>(a.x_width)) {
          v[kw] = *reinterpret_cast<const uint16_t*>(from + C::kBytes * (int64_t{shift} * p.x.stride_w));
        }
      }
      b0[i] = v[0] << 16, b1[i] = v[1] | v[2] << 16;
    }
  }
};

// acc += w * x of a chunk's windows. All warps of a block come here alike, as they share the weights.
template <class C>
__device__ __forceinline__ void add_windows(float (&acc)[C::kTiles][C::kV][4], const NchwParams& p, const NchwBlock& b,
                                            unsigned char* weights, int chunk, bool busy,
                                            uint32_t (&registers)[C::kSlots][C::kLaneSteps][C::kWords]) {
  using T = typename C::T;
  constexpr int kV = C::kV, kTiles = C::kTiles;
  const int lane = threadIdx.x % 32, steps = window_steps(p), chunk_steps = window_chunk(p);
  Window<C> x(p, b, lane % 4, chunk, registers);
  const unsigned char* weight;
  const auto multiply = [&](const uint32_t (&b0)[kV], const uint32_t (&b1)[kV], int kh) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      if (t > 0 && 16 * t >= b.channels) break;
      const uint4 w = *reinterpret_cast<const uint4*>(weight + (kh * kTiles + t) * 512);
#pragma unroll
      for (int i = 0; i < kV; ++i) multiply_tiles<T, false>(acc[t][i], w, b0[i], b1[i]);
    }
  };
  // Steps [k0, end) from registers, which have a step's rows ahead.
  const auto from_vectors = [&](auto reads, int k0, int end) {
    constexpr WindowReads kReads = decltype(reads)::value;
    const auto load = [&](int kh, bool there) { x.template load<kReads>(kh, there); };
    if (k0 == 0) {
      load(0, x.has_first), load(1, x.has_first), load(2, x.has_first);
      x.next_step();
    }
#pragma unroll 1
    for (int step = k0; step < end; ++step) {
#pragma unroll
      for (int kh = 0; kh < 3; ++kh) {
        uint32_t b0[kV], b1[kV];
        x.template operands<kReads>(b0, b1, kh);
        multiply(b0, b1, kh);
        load(kh, step + 1 < steps);
      }
      x.next_step();
      weight += 3 * kTiles * 512;
    }
  };
#pragma unroll 1
  for (int k0 = 0; k0 < steps; k0 += chunk_steps) {
    const int end = min(k0 + chunk_steps, steps);
    if (chunk_steps < steps) {
      __syncthreads();  // all are done with the weights before
      load_window_weight<C>(p, b, weights, k0, end - k0);
      __syncthreads();
    }
    if (!busy) continue;
    weight = weights + lane * 16;
    if (p.window_reads == WindowReads::kVectors2) {
      from_vectors(std::integral_constant<WindowReads, WindowReads::kVectors2>(), k0, end);
    } else if (p.window_reads == WindowReads::kVectors1) {
      from_vectors(std::integral_constant<WindowReads, WindowReads::kVectors1>(), k0, end);
    } else {
#pragma unroll 1
      for (int step = k0; step < end; ++step) {
#pragma unroll 1
        for (int kh = 0; kh < 3; ++kh) {
          uint32_t b0[kV], b1[kV];
          x.numbers(b0, b1, kh, step > 0 || x.has_first);
          multiply(b0, b1, kh);
        }
        x.next_step();
        weight += 3 * kTiles * 512;
      }
    }
  }
}

}  // namespace ghostfused
