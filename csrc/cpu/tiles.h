// The 1×1 convolution's products by AMX: matrix registers of 16 rows of 16 lanes.
#pragma once

#include "cpu/vec.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

constexpr int kTile = 16;  // rows of a register, each of as many 32-bit lanes
#ifdef GHOSTFUSED_AMX
constexpr bool kHasTiles = true;

// The registers of this thread, while it is there: 0 to 3 are sums, 4 and 5 a's rows and b's, 6 and 7 the same for what
// is left of ``depth``.
class TileRegisters {
 public:
  explicit TileRegisters(int64_t depth) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    const int rest = depth % kTile;
    for (int i = 0; i < 8; ++i) {
      config.rows[i] = i == 7 && rest ? rest : kTile;
      config.row_bytes[i] = 4 * (i == 6 && rest ? rest : kTile);
    }
    asm volatile("" : : "r"(&config) : "memory");  // the next line tells the compiler of its first bytes only
    _tile_loadconfig(&config);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// For the benchmarks: products of registers; returns the operations done.
inline double multiply_adds(int64_t count) {
  const TileRegisters registers(kTile);
  _tile_zero(4);
  _tile_zero(5);
  for (int64_t i = 0; i < count; ++i) {
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 4, 5);
    _tile_dpbf16ps(2, 4, 5);
    _tile_dpbf16ps(3, 4, 5);
  }
  return 4. * 2 * kTile * kTile * 2 * kTile * static_cast<double>(count);
}

// Of one or two tiles of pixels with one or two vectors of channels, ``depth`` lanes of pairs each:
// sums[i][j] (pixel, channel), i of the pixels. ``second``: where in ``a`` the second tile of pixels begins.
template <bool kTwoPixels, bool kTwoVectors>
void multiply_tiles(const float* a, int64_t a_row, int64_t second, const float* b, int64_t depth, float* sums) {
  asm volatile("" ::: "memory");  // the registers are loaded behind the compiler's back
  const int64_t stride = a_row * sizeof(float), vector = depth * kTile;
  _tile_zero(0);
  if constexpr (kTwoVectors) _tile_zero(1);
  if constexpr (kTwoPixels) _tile_zero(2);
  if constexpr (kTwoPixels && kTwoVectors) _tile_zero(3);
#define GHOSTFUSED_TILE_STEP(A, B)              \
  _tile_loadd(A, a + k, stride);                \
  _tile_loadd(B, b + k * kTile, 64);            \
  _tile_dpbf16ps(0, A, B);                      \
  if constexpr (kTwoVectors) {                  \
    _tile_loadd(B, b + vector + k * kTile, 64); \
    _tile_dpbf16ps(1, A, B);                    \
  }                                             \
  if constexpr (kTwoPixels) {                   \
    _tile_loadd(A, a + second + k, stride);     \
    if constexpr (kTwoVectors) {                \
      _tile_dpbf16ps(3, A, B);                  \
      _tile_loadd(B, b + k * kTile, 64);        \
    }                                           \
    _tile_dpbf16ps(2, A, B);                    \
  }
  int64_t k = 0;
  for (; k + kTile <= depth; k += kTile) {
    GHOSTFUSED_TILE_STEP(4, 5)
  }
  if (k < depth) {
    GHOSTFUSED_TILE_STEP(6, 7)
  }
#undef GHOSTFUSED_TILE_STEP
  constexpr int kSum = kTile * kTile;
  _tile_stored(0, sums, 64);
  if constexpr (kTwoVectors) _tile_stored(1, sums + kSum, 64);
  if constexpr (kTwoPixels) _tile_stored(2, sums + 2 * kSum, 64);
  if constexpr (kTwoPixels && kTwoVectors) _tile_stored(3, sums + 3 * kSum, 64);
}

// All ``pixels``, at least kTile, of ``vecs`` vectors: sink(pixel, vector, sums) gets them a tile at a time. The last
// tile ends where the pixels do, so that some are made twice.
template <typename Sink>
void multiply_tiles(const float* a, int64_t a_row, int64_t pixels, const float* b, int64_t vecs, int64_t depth,
                    const Sink& sink) {
  alignas(64) float sums[4 * kTile * kTile];
  for (int64_t j = 0; j < vecs; j += 2) {
    const float* weight = b + j * depth * kTile;
    const bool two_vectors = j + 1 < vecs;
    for (int64_t pixel = 0; pixel < pixels; pixel += 2 * kTile) {
      const bool two_pixels = pixels - pixel > kTile;
      const int64_t first = min_of(pixel, pixels - kTile), second = min_of(pixel + kTile, pixels - kTile);
      const auto multiply = two_pixels ? (two_vectors ? multiply_tiles<true, true> : multiply_tiles<true, false>)
                                       : (two_vectors ? multiply_tiles<false, true> : multiply_tiles<false, false>);
      multiply(a + first * a_row, a_row, (second - first) * a_row, weight, depth, sums);
      for (int i = 0; i < 1 + two_pixels; ++i) {
        for (int l = 0; l < 1 + two_vectors; ++l) sink(i ? second : first, j + l, sums + (2 * i + l) * kTile * kTile);
      }
    }
  }
}
#else
constexpr bool kHasTiles = false;
#endif

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
