// The elementwise training steps where nhwc_plan.cpp's pixels_fit says so (channels_last, no gate, no residual): what
// forward.cuh's normalize and backward.cuh's normalize_backward compute.
//
// A thread has kV neighbouring channels of one half, whose numbers stay in registers, and every ``positions``-th pixel
// of the block's, of which kPixelsTogether are loaded at once. A pixel is one number: no rows, no images.
#pragma once

#include "cuda/training/backward.cuh"
#include "cuda/training/uniform_act.cuh"

namespace ghostfused {

constexpr int kPixelNumbers = 4;

// A thread's channels [channel, channel + kV) of ``all``, and its pixels.
template <typename T, int kV>
struct PixelWork {
  int begin, end, own, channel, positions;  // the block's channels; the thread's first of them
  int pixel, last;
  bool works;

  __device__ __forceinline__ PixelWork(const TrainingParams& p, int all) {
    const PixelPlan& plan = p.plan.pixel;
    const int row = FastDivisor(plan.by_channel_blocks).divide(blockIdx.x);
    const int lanes = plan.by_lanes.divisor, position = FastDivisor(plan.by_lanes).divide(threadIdx.x);
    begin = (blockIdx.x - row * plan.by_channel_blocks.divisor) * p.plan.block_c;
    end = min(begin + p.plan.block_c, all);
    own = (threadIdx.x - position * lanes) * kV;
    channel = begin + own;
    positions = plan.positions;
    pixel = row * plan.row_pixels + position;
    last = min((row + 1) * plan.row_pixels, plan.pixels);
    works = position < positions && channel < end;
  }

  // Calls f(offset of the next pixel, bytes from that to the one after, left): kPixelsTogether pixels, as far as i *
  // positions < left.
  template <typename F>
  __device__ __forceinline__ void for_each(uint32_t pixel_bytes, F f) const {
    const uint32_t step = positions * pixel_bytes;
    int64_t at = int64_t{pixel} * pixel_bytes + channel * int{sizeof(T)};
#pragma unroll 1
    for (int left = last - pixel; left > 0; left -= kPixelsTogether * positions) {
      f(at, step, left);
      at += int64_t{kPixelsTogether} * step;
    }
  }
};

// A thread's numbers, from the block's in shared memory.
template <int kV>
__device__ __forceinline__ void read_numbers(float (&v)[kV], const float* numbers) {
#pragma unroll
  for (int e = 0; e < kV; ++e) v[e] = numbers[e];
}

// y1 and y2 become the output, in place.
template <Path kPath, int kV>
__global__ void __launch_bounds__(kTrainingThreads, kPixelBlocksPerSm[0])
    normalize_pixels(const __grid_constant__ TrainingParams p) {
  using T = typename PathType<kPath>::T;
  __shared__ float numbers[kPixelNumbers][kPixelChannels];
  const int channels = p.args.shape.init_channels, all = p.args.shape.out_channels;
  const PixelWork<T, kV> t(p, all);
  const auto half_of = [&](int c) -> const NormAct& { return c < channels ? p.args.primary : p.args.cheap; };
  for (int c = t.begin + threadIdx.x; c < t.end; c += blockDim.x) {
    const auto half = Half<1>::template of<T>(half_of(c), Channels<1>::of(c < channels ? c : c - channels, channels));
    numbers[0][c - t.begin] = half.center[0];
    numbers[1][c - t.begin] = half.scale[0];
    numbers[2][c - t.begin] = half.shift[0];
    numbers[3][c - t.begin] = half.slope[0];
  }
  __syncthreads();
  if (!t.works) return;
  float center[kV], scale[kV], shift[kV];
  read_numbers(center, numbers[0] + t.own);
  read_numbers(scale, numbers[1] + t.own);
  read_numbers(shift, numbers[2] + t.own);
  const UniformAct<T> act(half_of(t.channel));
  char* out = static_cast<char*>(p.maps.out);
  t.for_each(sizeof(T) * all, [&](int64_t at, uint32_t step, int left) {
    Vector<Pair<T>, kV / 2> y[kPixelsTogether];
#pragma unroll
    for (int i = 0; i < kPixelsTogether; ++i) {
      if (i * t.positions < left) y[i].load(out + at + i * step);
    }
#pragma unroll
    for (int i = 0; i < kPixelsTogether; ++i) {
      float z[kV];
#pragma unroll
      for (int e = 0; e < kV; e += 2) {
        const float2 v = unpack_pair<T>(y[i].at[e / 2]);
        z[e] = fmaf(v.x - center[e], scale[e], shift[e]);
        z[e + 1] = fmaf(v.y - center[e + 1], scale[e + 1], shift[e + 1]);
      }
      act.activate(z, [&](int e) { return numbers[3][t.own + e]; });
#pragma unroll
      for (int e = 0; e < kV; e += 2) y[i].at[e / 2] = pack_pair<T>(z[e], z[e + 1]);
      set_apart(step);
      if (i * t.positions < left) y[i].store(out + at + i * step);
    }
  });
}

// dz1 becomes dy1, in place.
template <Path kPath, int kV>
__global__ void __launch_bounds__(kTrainingThreads, kPixelBlocksPerSm[1])
    normalize_backward_pixels(const __grid_constant__ TrainingParams p) {
  using T = typename PathType<kPath>::T;
  __shared__ float numbers[kPixelNumbers][kPixelChannels];
  const int channels = p.args.shape.init_channels;
  const PixelWork<T, kV> t(p, channels);
  for (int c = t.begin + threadIdx.x; c < t.end; c += blockDim.x) {
    auto norm = NormBackward<1>::template of<T>(p.args.primary, p.means, channels, Channels<1>::of(c, channels));
#pragma unroll
    for (int i = 0; i < kPixelNumbers; ++i) numbers[i][c - t.begin] = norm.number(i)[0];
  }
  __syncthreads();
  if (!t.works) return;
  NormBackward<kV> norm;
#pragma unroll
  for (int i = 0; i < kPixelNumbers; ++i) {
#pragma unroll
    for (int e = 0; e < kV; ++e) norm.number(i)[e] = numbers[i][t.own + e];
  }
  char* dz1 = static_cast<char*>(p.maps.dz1);
  const char* y1 = static_cast<const char*>(p.maps.y1);
  t.for_each(sizeof(T) * channels, [&](int64_t at, uint32_t step, int left) {
    Vector<Pair<T>, kV / 2> dz[kPixelsTogether], y[kPixelsTogether];
#pragma unroll
    for (int i = 0; i < kPixelsTogether; ++i) {
      if (i * t.positions >= left) continue;
      dz[i].load(dz1 + at + i * step);
      y[i].load(y1 + at + i * step);
    }
#pragma unroll
    for (int i = 0; i < kPixelsTogether; ++i) {
      float of_z[kV], of_y[kV];
#pragma unroll
      for (int e = 0; e < kV; e += 2) {
        const float2 a = unpack_pair<T>(dz[i].at[e / 2]), b = unpack_pair<T>(y[i].at[e / 2]);
        of_z[e] = a.x;
        of_z[e + 1] = a.y;
        of_y[e] = b.x;
        of_y[e + 1] = b.y;
      }
      norm.apply(of_z, of_y);
#pragma unroll
      for (int e = 0; e < kV; e += 2) dz[i].at[e / 2] = pack_pair<T>(of_z[e], of_z[e + 1]);
      if (i * t.positions < left) dz[i].store(dz1 + at + i * step);
    }
  });
}

}  // namespace ghostfused
