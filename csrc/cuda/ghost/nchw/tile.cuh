// What all steps of the NCHW kernel share: a kernel's constants, a block's place, and operations on two packed numbers.
#pragma once

#include "cuda/ghost/nchw/nchw.h"
#include "cuda/half_pairs.cuh"
#include "cuda/norm.cuh"

namespace ghostfused {

template <Path kPath_, NchwMap kMap_, int kTiles_, int kD_, bool kFull_>
struct NchwConfig {
  static constexpr Path kPath = kPath_;
  using T = typename PathType<kPath>::T;
  static constexpr int kBytes = sizeof(T);
  static constexpr bool kHalf = kBytes == 2;  // tensor cores multiply pairs of numbers, and 16 bits are two to a word
  static constexpr NchwMap kMap = kMap_;
  static constexpr int kTiles = kTiles_, kD = kD_, kPad = kD / 2;
  static constexpr bool kFull = kFull_;
  static constexpr bool kWide = kMap == NchwMap::kWide8 || kMap == NchwMap::kWide4,
                        kFourteen = kMap == NchwMap::kFourteen;
  static constexpr int kSide = kWide ? 0 : kFourteen ? 14 : 7, kPixels = kSide * kSide;  // of the whole map
  static constexpr int kV = nchw_chunk(kMap), kChunkBytes = kV * kBytes, kWords = kChunkBytes / 4;
  static constexpr int kCols = kWide ? kV : kSide, kRows = nchw_strip_rows(kMap, kTiles, kD);  // of a cheap thread
  static constexpr int kRowPitch = nchw_small_row_pitch(kMap, kBytes);
  static constexpr int kStep = nchw_step(kPath), kLaneSteps = kPath == Path::kTF32 ? 2 : 4;  // channels, also of a lane
  // Whether x1 leaves from registers: its chunks are whole vectors of the output, and nothing comes between.
  static constexpr bool kDirect = !kFull && (kWide || (kFourteen && !kHalf));
  static constexpr int kCheapFloats = nchw_cheap_floats(kD);
  // steps of x (7 × 7: of the weights) that are under way
  static constexpr int kSlots = kPath == Path::kFloat32   ? 2
                                : kPath == Path::kTF32    ? (kMap == NchwMap::kSeven ? 3 : 4)
                                : kMap == NchwMap::kWide8 ? 2
                                : kTiles < 4              ? (kFourteen ? 6 : 3)
                                : kFull                   ? 2
                                                          : 3;
  // Whether the kernel has the 3×3 primary conv as well, beside the 1×1 one.
  static constexpr bool kWindows = kFull && kHalf && kMap == NchwMap::kWide4;
  static constexpr int kMaxThreads = kNchwMaxThreads, kMinBlocks = kMap == NchwMap::kSeven ? 1 : 2;
};

// One block's work: init channels [c0, c0 + channels) of image n and rows [h0, h0 + rows) of them; x1 is made for
// ``halo_rows`` rows from ``top`` on, which are those inside the image.
struct NchwBlock {
  int n, c0, channels, ghosts;  // ghosts: how many of the new channels are kept
  int h0, rows, top, halo_rows;

  template <class C>
  __device__ __forceinline__ static NchwBlock of(const NchwParams& p) {
    const GhostShape& s = p.args.shape;
    NchwBlock b;
    b.n = blockIdx.z;
    b.c0 = blockIdx.x * p.plan.block_c;
    b.channels = min(p.plan.block_c, s.init_channels - b.c0);
    b.ghosts = min(b.channels, s.out_channels - s.init_channels - b.c0);
    b.h0 = C::kWide ? blockIdx.y * p.plan.tile_h : 0;
    b.rows = C::kWide ? min(p.plan.tile_h, s.height - b.h0) : C::kSide;
    b.top = max(b.h0 - C::kPad, 0);
    b.halo_rows = C::kWide ? min(b.h0 + p.plan.tile_h + C::kPad, s.height) - b.top : C::kSide;
    return b;
  }
};

// Keeps a value in its register: the compiler would rather compute addresses again and again.
template <typename V>
__device__ __forceinline__ V pinned(V v) {
  if constexpr (sizeof(V) == 8) {
    asm volatile("" : "+l"(v));
  } else {
    asm volatile("" : "+r"(v));
  }
  return v;
}

// p + bytes * times as one wide multiply-add.
template <typename P>
__device__ __forceinline__ P* advanced(P* p, uint32_t bytes, uint32_t times) {
  P* r;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(r) : "r"(bytes), "r"(times), "l"(p));
  return r;
}

// kWords neighbouring words of read-only global memory.
template <int kWords>
__device__ __forceinline__ void load_words(uint32_t* to, const void* from) {
  if constexpr (kWords == 4) {
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "l"(from));
  } else if constexpr (kWords == 2) {
    asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(from));
  } else {
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(to[0]) : "l"(from));
  }
}

// In assembly, since the compiler cuts some uint4 stores into four.
template <int kWords>
__device__ __forceinline__ void store_words(void* to, const uint32_t* v, bool condition) {
  if constexpr (kWords == 4) {
    asm volatile("{.reg .pred q; setp.ne.b32 q, %5, 0; @q st.global.v4.u32 [%0], {%1, %2, %3, %4};}" ::"l"(to),
                 "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(static_cast<int>(condition))
                 : "memory");
  } else {
    asm volatile("{.reg .pred q; setp.ne.b32 q, %3, 0; @q st.global.v2.u32 [%0], {%1, %2};}" ::"l"(to), "r"(v[0]),
                 "r"(v[1]), "r"(static_cast<int>(condition))
                 : "memory");
  }
}

template <int kWords>
__device__ __forceinline__ void store_shared_words(uint32_t to, const uint32_t* v) {
  if constexpr (kWords == 4) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
  } else {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to), "r"(v[0]), "r"(v[1]) : "memory");
  }
}

// NaN stays NaN.
template <typename T>
__device__ __forceinline__ uint32_t at_least(uint32_t v, uint32_t floor) {
  uint32_t r;
  if constexpr (__is_same(T, __half)) {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(v), "r"(floor));
  } else if constexpr (__is_same(T, float)) {
    asm("{.reg .f32 a, b; mov.b32 a, %1; mov.b32 b, %2; max.NaN.f32 a, a, b; mov.b32 %0, a;}"
        : "=r"(r)
        : "r"(v), "r"(floor));
  } else {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(v), "r"(floor));
  }
  return r;
}

// Words of so many numbers.
template <class C>
constexpr int words_of(int numbers) {
  return (numbers * C::kBytes + 3) / 4;
}

// The activation, and x's type: kCount numbers of one channel as words.
template <class C, int kCount>
__device__ __forceinline__ void activate_and_pack(uint32_t (&to)[words_of<C>(kCount)], float (&y)[kCount], Act act,
                                                  float slope, uint32_t floor) {
  using T = typename C::T;
  constexpr int kPerWord = 4 / C::kBytes;
  if constexpr (C::kFull) {
    float slopes[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) slopes[i] = slope;
    activate<kCount, C::kPath == Path::kFloat32>(y, act, slopes);
  }
#pragma unroll
  for (int i = 0; i < kCount; i += kPerWord) {
    uint32_t& word = to[i / kPerWord];
    if constexpr (C::kHalf) {
      word = pack<T>(y[i], i + 1 < kCount ? y[i + 1 < kCount ? i + 1 : i] : 0.f);
    } else {
      word = __float_as_uint(y[i]);
    }
    if constexpr (!C::kFull) word = at_least<T>(word, floor);
  }
}

// A row of a small map in shared memory as words, of which the last may be half a row's.
template <class C>
struct MapRow {
  static constexpr int kSide = C::kSide, kWords = words_of<C>(kSide);
  // Half precision: rows of 7 are padded to a vector in x1's planes, and begin beside a word elsewhere.
  static constexpr bool kPadded = kSide == 7 && C::kHalf;
  uint32_t words[kWords];

  __device__ __forceinline__ void load(const unsigned char* row) {
    if constexpr (kPadded) {
      const uint4 v = *reinterpret_cast<const uint4*>(row);
      words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    } else if constexpr (kSide == 14 && !C::kHalf) {
#pragma unroll
      for (int k = 0; k < kWords; k += 2) {
        const uint2 v = *reinterpret_cast<const uint2*>(row + 4 * k);
        words[k] = v.x, words[k + 1] = v.y;
      }
    } else {
#pragma unroll
      for (int k = 0; k < kWords; ++k) words[k] = *reinterpret_cast<const uint32_t*>(row + 4 * k);
    }
  }
  __device__ __forceinline__ void to_floats(float* x) const {
#pragma unroll
    for (int k = 0; k < kSide; ++k) {
      if constexpr (C::kHalf) {
        const float2 two = unpack<typename C::T>(words[k / 2]);
        x[k] = k % 2 ? two.y : two.x;
      } else {
        x[k] = __uint_as_float(words[k]);
      }
    }
  }
  // In x1's plane.
  __device__ __forceinline__ void store_x1(unsigned char* to) const {
    if constexpr (kPadded) {
      *reinterpret_cast<uint4*>(to) = uint4{words[0], words[1], words[2], words[3]};
    } else {
      store(reinterpret_cast<typename C::T*>(to));
    }
  }
  // Where rows follow each other without padding.
  __device__ __forceinline__ void store(typename C::T* to) const {
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
      if constexpr (kPadded) {
        Vector<typename C::T, 2> two;
        two.raw = words[k];
        to[2 * k] = two.at[0];
        if (k < 3) to[2 * k + 1] = two.at[1];
      } else if constexpr (kSide == 14 && !C::kHalf) {
        if (k % 2 == 0) *reinterpret_cast<uint2*>(to + k) = uint2{words[k], words[k + 1]};
      } else {
        reinterpret_cast<uint32_t*>(to)[k] = words[k];
      }
    }
  }
};

// sums += a * b as multiply_tiles(), over K = 8.
template <typename T>
__device__ __forceinline__ void multiply_tiles8(float (&c)[4], const uint2& a, uint32_t b) {
#define GHOSTFUSED_MMA(TYPES)                                             \
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." TYPES              \
               ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])           \
               : "r"(a.x), "r"(a.y), "r"(b))
  if constexpr (__is_same(T, __half)) {
    GHOSTFUSED_MMA("f16.f16");
  } else {
    GHOSTFUSED_MMA("bf16.bf16");
  }
#undef GHOSTFUSED_MMA
}

}  // namespace ghostfused
