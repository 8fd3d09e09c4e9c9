// The 1×1 conv in IEEE fp32, by multiply-adds: x from global memory, weights from shared memory, register tiles of four
// pixels × all of a lane's channels. Lanes hold the sums that mma leaves them in primary.cuh, so that what follows is
// one.
#pragma once

#include "cuda/ghost/nhwc/primary.cuh"

namespace ghostfused {

// The sums of 16 products for one half of a warp's pixels, those from 16 half + 4 q on: a chain of all products would
// lose twice what PyTorch's own order loses.
template <int kTiles>
struct FmaTile {
  static constexpr int kPixels = 4, kChannels = 2 * kTiles;
  float part[kPixels][kChannels];

  // Four input channels; part = x * weights with kFirst, else +=.
  template <bool kFirst>
  __device__ __forceinline__ void multiply(const uint4 (&x)[kPixels], const unsigned char* weights) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const float4 w = *reinterpret_cast<const float4*>(weights + c * 128);
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        float& sum = part[i][c];
        sum = kFirst ? __uint_as_float(x[i].x) * w.x : fmaf(__uint_as_float(x[i].x), w.x, sum);
        sum = fmaf(__uint_as_float(x[i].y), w.y, sum);
        sum = fmaf(__uint_as_float(x[i].z), w.z, sum);
        sum = fmaf(__uint_as_float(x[i].w), w.w, sum);
      }
    }
  }

  __device__ __forceinline__ void join(float (&sums)[kPixels][kChannels]) const {
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) sums[i][c] += part[i][c];
    }
  }
};

// As primary() does, for Path::kFloat32.
template <int kTiles, int kD, Epilogue kEpilogue, typename F>
__device__ __forceinline__ void primary_fma(const NhwcParams& p, const NhwcTile& t, unsigned char* smem, F load_rest) {
  const NhwcPlan& plan = p.plan;
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, warp = threadIdx.x / 32;
  const int warp_n = warp % plan.warps_n, warp_m = warp / plan.warps_n;
  const int step = blockDim.x / 32 / plan.warps_n * kNhwcPixels, pixels = plan.images * t.rows * p.args.shape.width;
  const int fours = p.args.shape.in_channels / 4, last = pixels - kNhwcPixels;
  const unsigned char* x = static_cast<const unsigned char*>(p.args.x.data) + t.n * p.args.x.stride_n * 4 +
                           static_cast<int64_t>(t.top) * p.x_row + 4 * q * p.x_pixel;
  const unsigned char* weights = smem + warp_n * plan.k_blocks * (kTiles * 1024) + g * 16;
  const float* gates = static_cast<const float*>(p.args.input_gate) + t.n * p.args.input_gate_stride_n;
  const bool gated = kEpilogue == Epilogue::kAny && p.args.input_gate != nullptr;

  load_rest();
  __syncthreads();  // weights, scales and padding are there
  X1Results<Path::kFloat32, kTiles, kEpilogue> results;
  results.load(p, t, reinterpret_cast<const float*>(smem + plan.affine_offset), shared_address(smem) + plan.x1_offset,
               kD / 2, warp_n, lane);
  FmaTile<kTiles> tile;
#pragma unroll 1
  for (int pixel = warp_m * kNhwcPixels; pixel < pixels; pixel += step) {
    const int here = min(pixel, last);
#pragma unroll 1
    for (int half = pixel - here >= 16; half < 2; ++half) {  // not that which another warp has
      float sums[4][2 * kTiles] = {};
      const unsigned char* from = x + static_cast<uint64_t>(static_cast<uint32_t>(here + 16 * half)) * p.x_pixel;
      const unsigned char* w = weights;
      const float* gate = gates;
      const auto fetch = [&](uint4(&to)[4], int k) {
        const unsigned char* at = from + k * 16;
        to[0] = load_global16(at);
        to[1] = load_global16(advance<1>(at, p.x_pixel));
        to[2] = load_global16(advance<2>(at, p.x_pixel));
        to[3] = load_global16(advance<3>(at, p.x_pixel));
      };
      const auto multiply = [&](auto first, uint4(&x)[4], int k) {
        if (gated) {
          const uint4 four = load_global16(gate + k * 4);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            x[i].x = multiply_pairs<float>(x[i].x, four.x);
            x[i].y = multiply_pairs<float>(x[i].y, four.y);
            x[i].z = multiply_pairs<float>(x[i].z, four.z);
            x[i].w = multiply_pairs<float>(x[i].w, four.w);
          }
        }
        tile.template multiply<decltype(first)::value>(x, w + k * (kTiles * 256));
      };
      uint4 even[4], odd[4];
      fetch(even, 0);
      int left = fours;
#pragma unroll 1
      for (; left >= 4; left -= 4) {
        fetch(odd, 1);
        multiply(std::true_type(), even, 0);
        __syncwarp();
        fetch(even, 2);
        multiply(std::false_type(), odd, 1);
        __syncwarp();  // the compiler would load everything at once, and spill
        fetch(odd, 3);
        multiply(std::false_type(), even, 2);
        from += left > 4 ? 64 : 0;  // there is no next one after the last
        fetch(even, 0);
        multiply(std::false_type(), odd, 3);
        tile.join(sums);
        w += kTiles * 1024;
        gate += 16;
      }
#pragma unroll 1
      for (int k = 0; k < left; ++k) {  // what is left of Cin
        multiply(std::true_type(), even, k);
        tile.join(sums);
        fetch(even, min(k + 1, left - 1));
      }
      results.store_half(p, half, here, pixel - here, lane,
                         [&](int t, int odd, int e) { return sums[e % 2 * 2 + odd][2 * t + e / 2]; });
    }
  }
}

}  // namespace ghostfused
