// The 1×1 convolution of bf16 by NEON's bfmmla, which multiplies two rows of four channels by two columns.
#pragma once

#include "cpu/lane_products.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

#ifdef GHOSTFUSED_NEON_BF16
GHOSTFUSED_INLINE Vec first_halves(Vec a, Vec b) { return (Vec)vzip1q_f64((float64x2_t)a, (float64x2_t)b); }
GHOSTFUSED_INLINE Vec second_halves(Vec a, Vec b) { return (Vec)vzip2q_f64((float64x2_t)a, (float64x2_t)b); }

// Two rows by two columns, row-major. It stays where it stands, as add_product does.
GHOSTFUSED_INLINE Vec multiply_add_block(Vec rows, Vec columns, Vec block) {
  asm volatile("bfmmla %0.4s, %1.8h, %2.8h" : "+w"(block) : "w"(rows), "w"(columns));
  return block;
}

// Four vectors by one load, which a Cortex-A510 starts behind a product without a pause. The registers are named, since
// GCC copies what its intrinsic returns: those from 20 on, piece after piece.
template <int kPiece>
GHOSTFUSED_INLINE void load_four(const float* p, Vec (&to)[4]) {
  typedef float Memory __attribute__((vector_size(16 * kLanes), may_alias, aligned(4)));
#define GHOSTFUSED_LOAD_FOUR(A, B, C, D)                    \
  register Vec a asm(#A), b asm(#B), c asm(#C), d asm(#D);  \
  asm volatile("ld1 {" #A ".4s - " #D ".4s}, %4"            \
               : "=w"(a), "=w"(b), "=w"(c), "=w"(d)         \
               : "Q"(*reinterpret_cast<const Memory*>(p))); \
  to[0] = a, to[1] = b, to[2] = c, to[3] = d
  if constexpr (kPiece % 3 == 0) {
    GHOSTFUSED_LOAD_FOUR(v20, v21, v22, v23);
  } else if constexpr (kPiece % 3 == 1) {
    GHOSTFUSED_LOAD_FOUR(v24, v25, v26, v27);
  } else {
    GHOSTFUSED_LOAD_FOUR(v28, v29, v30, v31);
  }
#undef GHOSTFUSED_LOAD_FOUR
}

// The products of two quads of channels at a time. Their columns come in kVecs pieces of four vectors, of two halves.
// In channels_last a piece is a vector of sums, and its halves are the quads. In NCHW, whose quads lie in rows of their
// own, it is two vectors of sums; one that is left over is a piece as in channels_last, in two rows.
template <bool kChannelsLast, int kRows, int kVecs>
class QuadProducts {
  static constexpr int kPairs = (kRows + 1) / 2;
  static constexpr int kWide = kChannelsLast ? 0 : kVecs / 2;  // the pieces of a quad that are two vectors of sums
  static constexpr bool is_wide(int piece) { return piece < 2 * kWide; }
  static constexpr int quad_of(int piece, int half) { return is_wide(piece) ? piece / kWide : half; }
  static constexpr int vec_of(int piece, int half) {
    return kChannelsLast ? piece : is_wide(piece) ? piece % kWide * 2 + half : kVecs - 1;
  }
  static constexpr int second_row(int pair) {  // a row without another is its own
    return 2 * pair + 1 < kRows ? 2 * pair + 1 : kRows - 1;
  }

 public:
  GHOSTFUSED_INLINE QuadProducts(const float* a, const int64_t* a_row, const float* b, int64_t b_quad, int64_t b_vec,
                                 const float* ahead, int64_t ahead_row)
      : a(a), a_row(a_row), b_quad(b_quad), step(kChannelsLast ? 4 * kLanes : 2 * b_quad), ahead_quad(2 * ahead_row) {
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < 2 * kVecs; ++j) block[i][j] = Vec{};
    }
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) {
      const int64_t begin = kChannelsLast ? i * b_vec : quad_of(i, 0) * b_quad + vec_of(i, 0) * 2 * kLanes;
      from[i] = next_row(b, begin - step);
    }
    ahead_step = 2 * ahead_quad;
    asm("" : "+r"(ahead_quad), "+r"(ahead_step));  // or GCC adds one of them up in the loop
    this->ahead = next_row(ahead, -ahead_step);
  }

  // The next two quads. Sums of addresses, which are made at once, stand with the first loads: behind a product each
  // would wait for its end. So pointers go ahead before they are read from.
  GHOSTFUSED_INLINE void load_quads(int64_t& steps) {
    Vec rows[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) rows[i] = load_here(a + a_row[i]);
    a = next_row(a, 4);
    --steps;
    asm volatile("" : "+r"(steps));
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) from[i] = next_row(from[i], step);
    if (!kChannelsLast) ahead = next_row(ahead, ahead_step);
    load_piece<0>();
    zip_pair<0>(rows);
    load_piece<1>();
    zip_pair<1>(rows);
    load_piece<2>();
    if (!kChannelsLast) {
      asm volatile("");  // GCC would fetch earlier, in the place of a load
      __builtin_prefetch(ahead);
      __builtin_prefetch(ahead + ahead_quad);
    }
  }

  // No sum's second product follows its first at once.
  GHOSTFUSED_INLINE void add_quads() {
    add<0, 0>();
    add<1, 0>();
    add<0, 1>();
    load_piece<3>();  // for the others there are registers
    add<1, 1>();
    add<2, 0>();
    add<3, 0>();
    add<2, 1>();
    add<3, 1>();
  }

  // One quad, behind all that were loaded.
  GHOSTFUSED_INLINE void add_last(const float* b, int64_t b_vec) {
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; ++i) {
      quads[0][i] = (Vec)vcombine_f32(vld1_f32(a + a_row[2 * i]), vld1_f32(a + a_row[second_row(i)]));
    }
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      const float* of_vec = b + j * (kChannelsLast ? b_vec : 2 * kLanes);
      add_vec(j, quads[0], load(of_vec), load(of_vec + kLanes));
    }
  }

  GHOSTFUSED_INLINE void get(Vec (&sum)[kRows][kVecs]) const {
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        const Vec first = block[i / 2][2 * j], second = block[i / 2][2 * j + 1];
        sum[i][j] = i % 2 ? second_halves(first, second) : first_halves(first, second);
      }
    }
  }

 private:
  template <int kPiece>
  GHOSTFUSED_INLINE void load_piece() {
    if constexpr (kPiece >= kVecs) {
    } else if constexpr (kChannelsLast || is_wide(kPiece)) {
      load_four<kPiece>(from[kPiece], columns[kPiece]);
    } else {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) columns[kPiece][i] = load_here(from[kPiece] + i / 2 * b_quad + i % 2 * kLanes);
    }
  }
  template <int kPair>
  GHOSTFUSED_INLINE void zip_pair(const Vec (&rows)[kRows]) {
    if constexpr (kPair < kPairs) {
      quads[0][kPair] = first_halves(rows[2 * kPair], rows[second_row(kPair)]);
      quads[1][kPair] = second_halves(rows[2 * kPair], rows[second_row(kPair)]);
    }
  }
  template <int kPiece, int kHalf>
  GHOSTFUSED_INLINE void add() {
    if constexpr (kPiece < kVecs) {
      const Vec(&of_half)[4] = columns[kPiece];
      add_vec(vec_of(kPiece, kHalf), quads[quad_of(kPiece, kHalf)], of_half[2 * kHalf], of_half[2 * kHalf + 1]);
    }
  }
  GHOSTFUSED_INLINE void add_vec(int vec, const Vec (&rows)[kPairs], Vec first, Vec second) {
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; ++i) {
      block[i][2 * vec] = multiply_add_block(rows[i], first, block[i][2 * vec]);
      block[i][2 * vec + 1] = multiply_add_block(rows[i], second, block[i][2 * vec + 1]);
    }
  }

  const float *a, *ahead, *from[kVecs];  // the pieces of the quads that were loaded last
  const int64_t *const a_row, b_quad, step;
  int64_t ahead_quad, ahead_step;
  Vec block[kPairs][2 * kVecs], quads[2][kPairs], columns[kVecs][4];
};

// sum = the product of ``depth`` lanes of a and b. Lanes are pairs of channels, as in Panel, and two that follow each
// other are a quad: depth is even. In channels_last b's vectors, b_vec apart, are (quad, channel), in NCHW quads are
// b_quad apart.
template <bool kChannelsLast, int kRows, int kVecs>
GHOSTFUSED_INLINE void multiply_quads(const float* a, const int64_t* a_row, const float* b, int64_t b_quad,
                                      int64_t b_vec, int64_t depth, const float* ahead, int64_t ahead_row,
                                      Vec (&sum)[kRows][kVecs]) {
  QuadProducts<kChannelsLast, kRows, kVecs> products(a, a_row, b, b_quad, b_vec, ahead, ahead_row);
  int64_t steps = depth / 4;
  if (steps) {
    products.load_quads(steps);
    while (steps) {  // so that the jump waits for loads, with what is behind it, and not for the last products
      products.add_quads();
      products.load_quads(steps);
    }
    products.add_quads();
  }
  if (depth % 4) products.add_last(b + depth / 4 * (kChannelsLast ? 4 * kLanes : 2 * b_quad), b_vec);
  products.get(sum);
}
#else
inline Vec multiply_add_block(Vec, Vec, Vec block) { return block; }
template <bool kChannelsLast, int kRows, int kVecs>
void multiply_quads(const float* a, const int64_t* a_row, const float* b, int64_t b_quad, int64_t b_vec, int64_t depth,
                    const float* ahead, int64_t ahead_row, Vec (&sum)[kRows][kVecs]);
#endif

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
