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
  static constexpr int kDepth = kTiles == 1 ? 4 : 2;  // blocks of input channels at hand or under way
  uint4 x[kDepth][kSlots];
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

// Scale, shift and activation of a lane's channels.
template <Path kPath, int kTiles, Epilogue kEpilogue>
struct LaneAffine {
  float scale[kTiles][2], shift[kTiles][2], slope[kTiles][2];

  // ``first``: of the warp's channels in [scale | shift | slope], rows of ``all``.
  __device__ __forceinline__ void load(const float* affine, int all, int first, int g) {
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
  }

  // Those of tile t: two, or four with the tile that follows: what mma leaves for pixel ``i`` of four by sum(t, odd,
  // e), scaled and shifted.
  template <int kCount, typename F>
  __device__ __forceinline__ void norm_affine(float (&y)[kCount], int t, int i, F sum) const {
    const int odd = i % 2, e = i / 2;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      y[k] = fmaf(sum(t + k / 2, odd, k % 2 * 2 + e), scale[t + k / 2][k % 2], shift[t + k / 2][k % 2]);
    }
  }

  template <int kCount>
  __device__ __forceinline__ void slopes(float (&y)[kCount], int t) const {
#pragma unroll
    for (int k = 0; k < kCount; ++k) y[k] = slope[t + k / 2][k % 2];
  }
};

// What a lane needs to turn sums into x1.
template <Path kPath, int kTiles, Epilogue kEpilogue>
struct X1Results {
  using T = typename PathType<kPath>::T;
  static constexpr int kBytes = sizeof(T);
  LaneAffine<kPath, kTiles, kEpilogue> affine;
  uint32_t x1, pitch,
      row_padding;         // where the lane's channels of the first pixel go; bytes of a pixel, of 2 kPad pixels
  uint32_t image_padding;  // and of kPad rows
  int channels;            // of the block, from the warp's first
  bool fours;              // rows are made of four pixels

  __device__ __forceinline__ void load(const NhwcParams& p, const NhwcTile& t, const float* affines,
                                       uint32_t x1_address, int pad, int warp_n, int lane) {
    const int g = lane / 4, first = warp_n * kTiles * 16;
    affine.load(affines, p.plan.warps_n * kTiles * 16, first, g);
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
        const auto put = [&](auto count, uint32_t at) {
          constexpr int kCount = decltype(count)::value;
          float y[kCount];
          affine.norm_affine(y, t, i, sum);
          if constexpr (kEpilogue == Epilogue::kAny) {
            float slopes[kCount];
            affine.slopes(slopes, t);
            activate<kCount, kPath == Path::kFloat32>(y, p.args.primary.act, slopes);
          }
          if constexpr (kEpilogue == Epilogue::kLowest) raise_to(y, p.lowest);
          const auto v = ChannelVectorOf<T, kCount>::template of<kEpilogue == Epilogue::kReLU>(y);
          store_shared_if(i >= own, at + 16 * kBytes * t, v.raw);
        };
        if (t + 1 < kTiles) {
          put(std::integral_constant<int, 4>(), to[i]);
        } else {
          put(std::integral_constant<int, 2>(), to[i] - (kTiles == 1 ? 0 : 2 * g) * kBytes);
        }
      }
    }
  }
};

// Without ghosts: from sums to the output, with the residual.
template <Path kPath>
struct OutputResults {
  using T = typename PathType<kPath>::T;
  using Vec = ChannelVectorOf<T, 4>;
  static constexpr int kTiles = 2, kBytes = sizeof(T);
  LaneAffine<kPath, kTiles, Epilogue::kAny> affine;
  unsigned char* out;             // the lane's channels of the block's first pixel
  const unsigned char* residual;  // likewise
  bool inside;                    // the block has the lane's channels

  __device__ __forceinline__ void load(const NhwcParams& p, const NhwcTile& t, const float* affines, uint32_t, int,
                                       int warp_n, int lane) {
    const int first = warp_n * kTiles * 16, c = first + 4 * (lane / 4);
    affine.load(affines, p.plan.warps_n * kTiles * 16, first, lane / 4);
    inside = c < p.plan.block_c;
    const auto at = [&](const DeviceTensor& to) {
      return static_cast<unsigned char*>(to.data) +
             (t.n * to.stride_n + int64_t{t.h0} * to.stride_h + t.c0 + c) * kBytes;
    };
    out = at(p.out);
    residual = at(p.residual);
  }

  // Pixels [pixel, pixel + 32): those that another warp has as well get the same bits.
  __device__ __forceinline__ void store(const NhwcParams& p, const float (&sums)[kTiles][kNhwcPixels / 8][4],
                                        uint32_t pixel, int, int lane) const {
    constexpr int kPixels = 8;  // of a lane
    const uint32_t residual_pixel = p.residual.stride_w * kBytes;
    float y[kPixels][4];
#pragma unroll
    for (int n = 0; n < kPixels; ++n) {
      affine.norm_affine(y[n], 0, n % 4, [&](int t, int odd, int e) { return sums[t][n / 4 * 2 + odd][e]; });
    }
    float slopes[4];
    affine.slopes(slopes, 0);
    activate_rows<false>(y, p.args.primary.act, slopes);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t first = pixel + 16 * h + lane % 4 * 4;
      unsigned char* to = out + uint64_t{first} * p.out_pixel;
      const unsigned char* from = residual + uint64_t{first} * residual_pixel;
      const auto put = [&](auto i) {
        constexpr int kPixel = decltype(i)::value;
        Vec v = Vec::template of<false>(y[4 * h + kPixel]);
        if (p.residual.data != nullptr && inside) v = add(v, advance<kPixel>(from, residual_pixel));
        store_global_if(inside, advance<kPixel>(to, p.out_pixel), v.raw);
      };
      put(std::integral_constant<int, 0>());
      put(std::integral_constant<int, 1>());
      put(std::integral_constant<int, 2>());
      put(std::integral_constant<int, 3>());
    }
  }

  __device__ __forceinline__ static Vec add(Vec v, const unsigned char* from) {
    Vec more;
    more.raw = *reinterpret_cast<const uint2*>(from);
    float y[4], z[4];
    v.to_float(y);
    more.to_float(z);
#pragma unroll
    for (int k = 0; k < 4; ++k) y[k] += z[k];
    return Vec::template of<false>(y);
  }
};

// x1 = act(norm(w * x)) of the tile and its halo. ``load_rest`` fills shared memory while the first x is on its way.
template <Path kPath, int kTiles, int kD, Epilogue kEpilogue, typename F>
__device__ __forceinline__ void primary(const NhwcParams& p, const NhwcTile& t, unsigned char* smem, F load_rest) {
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
  std::conditional_t<kD == 1, OutputResults<kPath>, X1Results<kPath, kTiles, kEpilogue>> results;
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
    results.store(p, products.sums, here, pixel - here, lane);
  };

  int pixel = warp_m * kNhwcPixels;
  const unsigned char* from = at(pixel);
  fetch(b[0], from, 0);
  load_rest();
  __syncthreads();  // weights, scales and padding are there
  results.load(p, t, reinterpret_cast<const float*>(smem + plan.affine_offset), shared_address(smem) + plan.x1_offset,
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
    constexpr int kDepth = Products<T, kTiles>::kDepth;
#pragma unroll 1
    for (; pixel < pixels; pixel += step) {
#pragma unroll
      for (int k = 1; k < kDepth; ++k) {
        if (k < blocks) fetch(b[k], from, k);
      }
      multiply(std::true_type(), b[0], 0, weight(0));
      // Buffer 0 is free. Round by round, each buffer gets what comes kDepth blocks after what it had.
      int k = 1;
#pragma unroll 1
      for (; k + kDepth <= blocks; k += kDepth) {
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
          const int next = k + i + kDepth - 1;
          if (i == 0 || next < blocks) fetch(b[i], from, next);
          multiply(std::false_type(), b[(i + 1) % kDepth], k + i, weight(k + i));
        }
      }
      from = at(pixel + step);
#pragma unroll
      for (int i = 1; i < kDepth; ++i) {
        if (k + i - 1 < blocks) multiply(std::false_type(), b[i], k + i - 1, weight(k + i - 1));
      }
      fetch(b[0], from, 0);
      store(pixel);
    }
  }
}

}  // namespace ghostfused
