// From NCHW to channels_last or back, as a transposition of each image's matrix by tiles in shared memory.
//
// A thread loads 16 bytes of a row, or of two where elements have 2 bytes, and writes words of one column, so that what
// a column's rows hold lies together: [column][word]. Words are permuted by a column's vector, so that neither the
// writes of a warp nor the reads of 16 bytes meet in a bank.
#pragma once

#include "cuda/layout/layout.h"
#include "cuda/vector.cuh"

namespace ghostfused {

template <int kElement>
struct LayoutTile {
  static constexpr int kVector = kVectorOfLayout / kElement;  // elements
  static constexpr int kRowsOfWord = 4 / kElement;
  static constexpr int kRows = kWordsOfColumn * kRowsOfWord, kColumns = kVectorsOfRow * kVector;
  using T = typename Vector<__half, kElement / 2>::RawType;  // of that size
  using Elements = Vector<T, kVector>;

  // Calls f(piece, element) for the vectors of ``width`` elements of which the first ``left`` elements consist.
  template <typename F>
  __device__ __forceinline__ static void for_each_piece(int width, int left, F f) {
    if (width == kVector) {
      if (left > 0) f(Vector<T, kVector>(), 0);
    } else if (width == kVector / 2) {
#pragma unroll
      for (int i = 0; i < kVector; i += kVector / 2) {
        if (i < left) f(Vector<T, kVector / 2>(), i);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (i < left) f(Vector<T, 1>(), i);
      }
    }
  }

  __device__ __forceinline__ static Elements load(const T* from, int width, int left) {
    Elements v;
    for_each_piece(width, left, [&](auto piece, int at) {
      piece.load(from + at);
#pragma unroll
      for (int i = 0; i < piece.kBytes / kElement; ++i) v.at[at + i] = piece.at[i];
    });
    return v;
  }

  __device__ __forceinline__ static void store(const Elements& v, T* to, int width, int left) {
    for_each_piece(width, left, [&](auto piece, int at) {
#pragma unroll
      for (int i = 0; i < piece.kBytes / kElement; ++i) piece.at[i] = v.at[at + i];
      piece.store(to + at);
    });
  }

  // Element i of each row of a word.
  __device__ __forceinline__ static uint32_t word(const Elements (&rows)[kRowsOfWord], int i) {
    if constexpr (kRowsOfWord == 1) {
      return rows[0].at[i];
    } else {
      return rows[0].at[i] | static_cast<uint32_t>(rows[1].at[i]) << 16;
    }
  }

  // Where a column's words begin, and what its index of a word is changed by.
  __device__ __forceinline__ static int place(int column, int word) {
    return column * kWordsOfColumn + (word ^ column / kVector * (kWordsOfColumn / kVectorsOfRow));
  }
};

template <int kElement>
__global__ void __launch_bounds__(kLayoutThreads) change_layout(const __grid_constant__ LayoutParams p) {
  using Tile = LayoutTile<kElement>;
  using T = typename Tile::T;
  __shared__ __align__(16) uint32_t words[Tile::kColumns * kWordsOfColumn];
  const int image = blockIdx.x / p.image_tiles, tile = blockIdx.x - image * p.image_tiles;
  const int row_tile = FastDivisor(p.by_column_tiles).divide(tile);
  const int row = row_tile * Tile::kRows, column = (tile - row_tile * p.by_column_tiles.divisor) * Tile::kColumns;
  {
    const int vector = threadIdx.x % kVectorsOfRow, word = threadIdx.x / kVectorsOfRow;
    const int own_row = row + word * Tile::kRowsOfWord, own_column = column + vector * Tile::kVector;
    const T* from = static_cast<const T*>(p.from) + image * p.from_image + own_row * p.from_row + own_column;
    if (own_row < p.rows) {  // few channels leave whole warps without any
      typename Tile::Elements rows[Tile::kRowsOfWord];
#pragma unroll
      for (int i = 0; i < Tile::kRowsOfWord; ++i) {
        if (own_row + i < p.rows) rows[i] = Tile::load(from + i * p.from_row, p.from_vector, p.columns - own_column);
      }
#pragma unroll
      for (int i = 0; i < Tile::kVector; ++i) {
        words[Tile::place(vector * Tile::kVector + i, word)] = Tile::word(rows, i);
      }
    }
  }
  __syncthreads();
  const int own_row = threadIdx.x % kVectorsOfRow * Tile::kVector, left = p.rows - row - own_row;
#pragma unroll
  for (int i = threadIdx.x / kVectorsOfRow; i < Tile::kColumns; i += kLayoutThreads / kVectorsOfRow) {
    if (column + i >= p.columns) break;
    typename Tile::Elements v;
    v.load(words + Tile::place(i, own_row / Tile::kRowsOfWord));
    Tile::store(v, static_cast<T*>(p.to) + image * p.to_image + (column + i) * p.to_row + row + own_row, p.to_vector,
                left);
  }
}

}  // namespace ghostfused
