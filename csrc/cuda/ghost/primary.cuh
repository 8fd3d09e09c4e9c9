// The matrix product of a warp: 32 pixels × up to 32 channels, accumulated in fp32 over 32 bytes of K at a time.
//
// All paths hold their sums alike, as mma.sync m16n8 does: acc[i][j][0..1] is pixel 16 i + lane / 4, channels
// 8 j + 2 (lane % 4) and the next; acc[i][j][2..3] is the same 8 pixels further. So one epilogue serves them all.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/parameters.h"

namespace ghostfused {

constexpr int kWarpPixels = 32, kWarpChannels = 32, kKStepBytes = 32;
using Accumulators = float[2][4][4];

__device__ __forceinline__ uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies ``bytes`` (16, 8 or 4) to shared memory, of which the first ``valid`` come from src and the rest are zero.
__device__ __forceinline__ void cp_async(uint32_t dst, const void* src, int bytes, int valid) {
  if (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(valid) : "memory");
  } else if (bytes == 8) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(dst), "l"(src), "r"(valid) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(dst), "l"(src), "r"(valid) : "memory");
  }
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most ``pending`` (0, 1 or 2) of this thread's groups are under way.
__device__ __forceinline__ void cp_async_wait(int pending) {
  if (pending == 0) {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  } else if (pending == 1) {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
  } else {
    asm volatile("cp.async.wait_group 2;" ::: "memory");
  }
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

#define GHOSTFUSED_MMA(SHAPE_AND_TYPES)                          \
  asm volatile("mma.sync.aligned." SHAPE_AND_TYPES               \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, " \
               "{%0, %1, %2, %3};"                               \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

template <Path kPath>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kPath == Path::kFloat16) {
    GHOSTFUSED_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  } else if constexpr (kPath == Path::kBFloat16) {
    GHOSTFUSED_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  } else {
    GHOSTFUSED_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  }
}
#undef GHOSTFUSED_MMA

// Rounds to x's type, as x * gate in eager mode does.
template <typename T>
__device__ __forceinline__ uint32_t times_gate(uint32_t a, const T* gate) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(__uint_as_float(a) * *reinterpret_cast<const float*>(gate));
  } else if constexpr (__is_same(T, __half)) {
    const __half2 r = __hmul2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<const __half2*>(gate));
    return *reinterpret_cast<const uint32_t*>(&r);
  } else {
    const __nv_bfloat162 r =
        __hmul2(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<const __nv_bfloat162*>(gate));
    return *reinterpret_cast<const uint32_t*>(&r);
  }
}

// What a warp multiplies: addresses of its corner of the x tile and of the weights in shared memory.
template <typename T>
struct WarpOperands {
  uint32_t a, w;         // a: the warp's first pixel, K 0; w: channel 0 of the block, K 0
  int a_pitch, w_pitch;  // bytes between rows: of pixels (channels_last) or of K (NCHW); of channels
  int first_channel, last_channel, n_tiles;  // rows of w, and how many groups of 8 of them
  const T* gate;                             // at K 0, or null
};

// acc += x * w over one K step, by tensor cores.
template <Path kPath, typename T, bool kChannelsLast>
__device__ __forceinline__ void mma_step(Accumulators& acc, const WarpOperands<T>& op, int step, int lane) {
  const int group = lane / 4, quad = lane % 4;
  uint32_t a[2][4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if constexpr (kChannelsLast) {
      ldmatrix_x4(a[i], op.a + (16 * i + lane % 16) * op.a_pitch + step * kKStepBytes + lane / 16 * 16);
    } else if constexpr (sizeof(T) == 2) {
      const int k = step * 16 + lane % 8 + lane / 16 * 8;
      ldmatrix_x4_trans(a[i], op.a + k * op.a_pitch + (16 * i + lane / 8 % 2 * 8) * 2);
    } else {  // ldmatrix can't transpose 4-byte elements
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const uint32_t address = op.a + (step * 8 + quad + r / 2 * 4) * op.a_pitch + (16 * i + group + r % 2 * 8) * 4;
        asm volatile("ld.shared.b32 %0, [%1];" : "=r"(a[i][r]) : "r"(address) : "memory");
      }
    }
    if (op.gate != nullptr) {
      constexpr int kHalf = kKStepBytes / 2 / sizeof(T);  // registers 2 and 3 hold the second half of the K step
      const T* gate = op.gate + step * 2 * kHalf + quad * (4 / sizeof(T));
#pragma unroll
      for (int r = 0; r < 4; ++r) a[i][r] = times_gate(a[i][r], gate + r / 2 * kHalf);
    }
    if constexpr (kPath == Path::kTF32) {
#pragma unroll
      for (int r = 0; r < 4; ++r) a[i][r] = to_tf32(a[i][r]);
    }
  }
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    if (2 * pair < op.n_tiles) {
      // the last pair may be half a pair: its second half reads a row that exists and is not used
      const int channel = min(op.first_channel + 16 * pair + lane % 8 + lane / 16 * 8, op.last_channel);
      uint32_t b[4];
      ldmatrix_x4(b, op.w + channel * op.w_pitch + step * kKStepBytes + lane / 8 % 2 * 16);
      if constexpr (kPath == Path::kTF32) {
#pragma unroll
        for (int r = 0; r < 4; ++r) b[r] = to_tf32(b[r]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int j = 2 * pair + half;
        if (j < op.n_tiles) {
#pragma unroll
          for (int i = 0; i < 2; ++i) mma<kPath>(acc[i][j], a[i], b[2 * half], b[2 * half + 1]);
        }
      }
    }
  }
}

__device__ __forceinline__ float4 load_float4(uint32_t address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// The same in IEEE fp32: eight K at a time, as vectors where K is contiguous. They are summed before they join the
// accumulator, since one long chain of Cin products would lose twice what PyTorch's own order loses.
template <bool kChannelsLast>
__device__ __forceinline__ void fma_step(Accumulators& acc, const WarpOperands<float>& op, int step, int lane) {
  constexpr int kK = 8;
  const int group = lane / 4, quad = lane % 4, k0 = step * kK;
  float a[4][kK];  // [pixel][k]
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    if constexpr (kChannelsLast) {
#pragma unroll
      for (int k = 0; k < kK; k += 4) {
        const float4 v = load_float4(op.a + (group + 8 * r) * op.a_pitch + (k0 + k) * 4);
        a[r][k] = v.x, a[r][k + 1] = v.y, a[r][k + 2] = v.z, a[r][k + 3] = v.w;
      }
    } else {
#pragma unroll
      for (int k = 0; k < kK; ++k) {
        const uint32_t address = op.a + (k0 + k) * op.a_pitch + (group + 8 * r) * 4;
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(a[r][k]) : "r"(address) : "memory");
      }
    }
    if (op.gate != nullptr) {
#pragma unroll
      for (int k = 0; k < kK; ++k) a[r][k] *= op.gate[k0 + k];
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j < op.n_tiles) {
#pragma unroll
      for (int col = 0; col < 2; ++col) {
        const int channel = op.first_channel + 8 * j + 2 * quad + col;
        float sums[4] = {};
#pragma unroll
        for (int k = 0; k < kK; k += 4) {
          const float4 w = load_float4(op.w + channel * op.w_pitch + (k0 + k) * 4);
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            sums[r] = fmaf(a[r][k], w.x, sums[r]);
            sums[r] = fmaf(a[r][k + 1], w.y, sums[r]);
            sums[r] = fmaf(a[r][k + 2], w.z, sums[r]);
            sums[r] = fmaf(a[r][k + 3], w.w, sums[r]);
          }
        }
#pragma unroll
        for (int r = 0; r < 4; ++r) acc[r / 2][j][r % 2 * 2 + col] += sums[r];
      }
    }
  }
}

}  // namespace ghostfused
