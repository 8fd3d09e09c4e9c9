// The 1×1 conv: x from global memory to registers, which are mma's B operand as they come; sums, scale, shift and
// activation → x1 in shared memory. Channels are mma's rows and pixels its columns.
#pragma once

#include <type_traits>

#include "cuda/ghost/nhwc/channels.cuh"
#include "cuda/ghost/nhwc/load.cuh"

namespace ghostfused {

// A lane loads 16 bytes of a pixel: a quarter of kNhwcK input channels. K is permuted alike in x and in the weights, so
// the four lanes of a pixel need not exchange anything.
//
// A warp's 32 pixels are four mma tiles of 8. Column n of tile j is pixel 16 (j / 2) + 2 n + j % 2, so that of the sums
// a lane holds four pixels in a row: one division finds them all where rows are made of fours.
template <typename T, int kTiles>
struct Products {
  static constexpr int kSlots = kNhwcPixels / 8;
  uint4 x[2][kSlots];
  float sums[kTiles][kSlots][4];

  // load(j, address) for each slot of a lane.
  template <typename F>
  __device__ __forceinline__ static void each_pixel(const unsigned char* first, uint32_t x_pixel, F load) {
    load(0, first);
    load(1, advance<1>(first, x_pixel));
    load(2, advance<16>(first, x_pixel));
    load(3, advance<17>(first, x_pixel));
  }

  // The input gate, rounded to T as x * gate is.
  __device__ __forceinline__ void gate(uint4 (&x)[kSlots], const uint4& gate) {
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      x[j].x = multiply_pairs<T>(x[j].x, gate.x);
      x[j].y = multiply_pairs<T>(x[j].y, gate.y);
      x[j].z = multiply_pairs<T>(x[j].z, gate.z);
      x[j].w = multiply_pairs<T>(x[j].w, gate.w);
    }
  }

  __device__ __forceinline__ void round(uint4 (&x)[kSlots]) {
#pragma unroll
    for (int j = 0; j < kSlots; ++j) x[j] = to_tf32(x[j]);
  }

  // sums += weights * x, or = with kFirst, over kNhwcK input channels; weight(i) is fragment i of two k steps × kTiles.
  template <bool kFirst, typename F>
  __device__ __forceinline__ void multiply(const uint4 (&x)[kSlots], F weight) {
    multiply_step<kFirst, 0>(x, weight);
    multiply_step<false, 1>(x, weight);
  }

 private:
  template <bool kFirst, int kStep, typename F>
  __device__ __forceinline__ void multiply_step(const uint4 (&x)[kSlots], F weight) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const uint4 a = weight(kStep * kTiles + t);
#pragma unroll
      for (int j = 0; j < kSlots; ++j) {
        multiply_tiles<T, kFirst>(sums[t][j], a, kStep ? x[j].z : x[j].x, kStep ? x[j].w : x[j].y);
      }
    }
  }
};

// What a lane needs to turn sums into x1.
template <Path kPath, int kTiles, Epilogue kEpilogue>
struct PrimaryEpilogue {
  using T = typename PathType<kPath>::T;
  static constexpr int kBytes = sizeof(T);
  float scale[kTiles][2], shift[kTiles][2], slope[kTiles][2];
  uint32_t x1, pitch,
      row_padding;         // where the lane's channels of the first pixel go; bytes of a pixel, of 2 kPad pixels
  uint32_t image_padding;  // and of kPad rows
  int channels;            // of the block, from the warp's first
  bool fours;              // rows are made of four pixels

  __device__ __forceinline__ void load(const NhwcParams& p, const NhwcTile& t, const float* affine, uint32_t x1_address,
                                       int pad, int warp_n, int lane) {
    const int g = lane / 4, all = p.plan.warps_n * kTiles * 16, first = warp_n * kTiles * 16;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int c = first + channel_of<kTiles>(t, g, half);
        scale[t][half] = affine[c];
        shift[t][half] = affine[all + c];
        if (kEpilogue == Epilogue::kAny) slope[t][half] = affine[2 * all + c];
      }
    }
    pitch = p.plan.pitch;
    row_padding = 2 * pad * pitch;
    image_padding = pad * p.plan.row_pixels * pitch;
    x1 = x1_address + (t.first_row * p.plan.row_pixels + pad) * pitch + (first + (kTiles == 1 ? 2 : 4) * g) * kBytes;
    channels = p.plan.block_c - first;
    fours = p.width.divisor % 4 == 0;
  }

  __device__ __forceinline__ uint32_t address(const NhwcParams& p, int pixel) const {
    const int row = __umulhi(pixel, p.width.reciprocal);
    uint32_t to = x1 + pixel * pitch + row * row_padding;
    if (p.plan.images > 1) to += __umulhi(row, p.height.reciprocal) * image_padding;
    return to;
  }

  // Stores pixels [pixel, pixel + 32) but for the first ``done`` of them, which another warp has.
  __device__ __forceinline__ void store(const NhwcParams& p, const float (&sums)[kTiles][kNhwcPixels / 8][4], int pixel,
                                        int done, int lane) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      store_half(p, h, pixel, done, lane, [&](int t, int odd, int e) { return sums[t][2 * h + odd][e]; });
    }
  }

  // Half ``h`` of them: 16. sum(t, odd, e): what mma leaves in element e of tile t, for the even or odd pixels.
  template <typename F>
  __device__ __forceinline__ void store_half(const NhwcParams& p, int h, int pixel, int done, int lane, F sum) const {
    const int g = lane / 4, q = lane % 4;
    const int first = 16 * h + 4 * q;
    uint32_t to[4];
    to[0] = address(p, pixel + first);
    if (fours) {
#pragma unroll
      for (int i = 1; i < 4; ++i) to[i] = to[i - 1] + pitch;
    } else {
#pragma unroll
      for (int i = 1; i < 4; ++i) to[i] = address(p, pixel + first + i);
    }
#pragma unroll
    for (int t = 0; t < kTiles; t += 2) {
      const bool pair = t + 1 < kTiles;
      const int own = (pair ? 4 : 2) * g + 16 * t < channels ? done - first : kNhwcPixels;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int odd = i % 2, e = i / 2;
        float y[4];
#pragma unroll
        for (int k = 0; k < (pair ? 4 : 2); ++k) {
          y[k] = fmaf(sum(t + k / 2, odd, k % 2 * 2 + e), scale[t + k / 2][k % 2], shift[t + k / 2][k % 2]);
        }
        if constexpr (kEpilogue == Epilogue::kAny) {
          const float slopes[4] = {slope[t][0], slope[t][1], slope[t + pair][0], slope[t + pair][1]};
          activate<4, kPath == Path::kFloat32>(y, p.args.primary.act, slopes);
        }
        if constexpr (kEpilogue == Epilogue::kLowest) raise_to(y, p.lowest);
        constexpr bool kReLU = kEpilogue == Epilogue::kReLU;
        if (pair) {
          store_shared_if(i >= own, to[i] + 16 * kBytes * t, ChannelVectorOf<T, 4>::template of<kReLU>(y).raw);
        } else {
          const float two[2] = {y[0], y[1]};
          store_shared_if(i >= own, to[i] + (16 * t - (kTiles == 1 ? 0 : 2 * g)) * kBytes,
                          ChannelVectorOf<T, 2>::template of<kReLU>(two).raw);
        }
      }
    }
  }
};

// x1 = act(norm(w * x)) of the tile and its halo. ``prepare`` fills shared memory while the first x is on its way.
template <Path kPath, int kTiles, int kD, Epilogue kEpilogue, typename F>
__device__ __forceinline__ void primary(const NhwcParams& p, const NhwcTile& t, unsigned char* smem, F prepare) {
  using T = typename PathType<kPath>::T;
  const NhwcPlan& plan = p.plan;
  const int lane = threadIdx.x % 32, q = lane % 4, warp = threadIdx.x / 32;
  const int warp_n = warp % plan.warps_n, warp_m = warp / plan.warps_n;
  const int step = blockDim.x / 32 / plan.warps_n * kNhwcPixels, pixels = plan.images * t.rows * p.args.shape.width;
  const int blocks = plan.k_blocks, in_channels = p.args.shape.in_channels;

  const unsigned char* x = static_cast<const unsigned char*>(p.args.x.data) + t.n * p.args.x.stride_n * sizeof(T) +
                           static_cast<int64_t>(t.top) * p.x_row + lane / 4 * 2 * p.x_pixel + 16 * q;
  const int last = pixels - kNhwcPixels;  // the last 32 pixels overlap those before
  const auto at = [&](int pixel) {
    return x + static_cast<uint64_t>(static_cast<uint32_t>(min(pixel, last))) * p.x_pixel;
  };
  constexpr int kK = kNhwcK<T>;
  const bool whole = in_channels % kK == 0, inside = (blocks - 1) * kK + kK / 4 * q < in_channels;
  const unsigned char* weights = smem + warp_n * blocks * 2 * kTiles * 512 + lane * 16;
  const T* gates = static_cast<const T*>(p.args.input_gate) + t.n * p.args.input_gate_stride_n + kK / 4 * q;
  const bool gated = kEpilogue != Epilogue::kLowest && p.args.input_gate != nullptr;

  Products<T, kTiles> products;
  PrimaryEpilogue<kPath, kTiles, kEpilogue> epilogue;
  auto& b = products.x;
  // Block ``k`` of kK input channels of the pixels at ``from``. Lanes beyond the last channel have zeros: with one
  // block they keep those that they begin with.
  const auto fetch = [&](uint4(&to)[4], const unsigned char* from, int k) {
    if (k + 1 < blocks || whole) {
      products.each_pixel(from + k * 64, p.x_pixel, [&](int j, const void* x) { to[j] = load_global16(x); });
    } else {
      products.each_pixel(from + k * 64, p.x_pixel,
                          [&](int j, const void* x) { to[j] = load_global16_or_zero(inside, x); });
    }
  };
  const auto multiply = [&](auto first, uint4(&x)[4], int k, auto weight) {
    if (gated) products.gate(x, load_global16_or_zero(k + 1 < blocks || inside, gates + k * kK));
    if constexpr (sizeof(T) == 4) products.round(x);
    products.template multiply<decltype(first)::value>(x, weight);
  };
  const auto store = [&](int pixel) {
    const int here = min(pixel, last);
    epilogue.store(p, products.sums, here, pixel - here, lane);
  };

  int pixel = warp_m * kNhwcPixels;
  const unsigned char* from = at(pixel);
  fetch(b[0], from, 0);
  prepare();
  __syncthreads();  // weights, scales and padding are there
  epilogue.load(p, t, reinterpret_cast<const float*>(smem + plan.affine_offset), shared_address(smem) + plan.x1_offset,
                kD / 2, warp_n, lane);
  if (blocks == 1) {
    constexpr int kFragments = 2 * kTiles;
    constexpr bool kKept = kTiles < 3;  // in registers
    uint4 kept[kKept ? kFragments : 1];
#pragma unroll
    for (int i = 0; i < (kKept ? kFragments : 0); ++i) kept[i] = *reinterpret_cast<const uint4*>(weights + i * 512);
#pragma unroll 1
    for (; pixel < pixels; pixel += step) {
      multiply(std::true_type(), b[0], 0,
               [&](int i) { return kKept ? kept[i] : *reinterpret_cast<const uint4*>(weights + i * 512); });
      products.each_pixel(at(pixel + step), p.x_pixel,
                          [&](int j, const void* x) { load_global16_if(inside, b[0][j], x); });
      store(pixel);
    }
  } else {
    const auto weight = [&](int k) {
      const unsigned char* fragments = weights + k * 2 * kTiles * 512;
      return [=](int i) { return *reinterpret_cast<const uint4*>(fragments + i * 512); };
    };
#pragma unroll 1
    for (; pixel < pixels; pixel += step) {
      fetch(b[1], from, 1);
      multiply(std::true_type(), b[0], 0, weight(0));
      int k = 1;
#pragma unroll 1
      for (; k + 2 <= blocks; k += 2) {
        fetch(b[0], from, k + 1);
        multiply(std::false_type(), b[1], k, weight(k));
        if (k + 2 < blocks) fetch(b[1], from, k + 2);
        multiply(std::false_type(), b[0], k + 1, weight(k + 1));
      }
      from = at(pixel + step);
      if (k < blocks) {
        multiply(std::false_type(), b[1], k, weight(k));
      }
      fetch(b[0], from, 0);
      store(pixel);
    }
  }
}

}  // namespace ghostfused
