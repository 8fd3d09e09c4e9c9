// What the strip kernels share: the training stencils for what nhwc_plan.cpp's strips_fit names (channels_last, 3×3,
// ratio 2, no gate).
//
// A thread has two neighbouring channels and kStripColumns columns, and slides down a strip of rows with three rows of
// the depthwise conv's window in registers. So every value is loaded, converted, normalized and padded once, and no
// bound is tested inside. What belongs to a channel is computed once a block, and read from shared memory where it is
// used.
#pragma once

#include "cuda/training/backward.cuh"
#include "cuda/training/uniform_act.cuh"

namespace ghostfused {

constexpr int kStripWindow = kStripColumns + 2;

// Of each channel of a block, in shared memory as [number][channel].
enum StripNumber { kCenter1, kScale1, kShift1, kCenter2, kScale2, kShift2, kSlope2, kOffset2, kTaps };
constexpr int kStripNumbers = kTaps + 9;

struct StripShared {
  float numbers[kStripNumbers][kStripChannels];
  float scratch[kScratchFloats];
};

// A block's channels and its row of strips, and a thread's place in it; ``channel`` is the first of the thread's two.
struct StripWork {
  BlockShare share;
  int block, row, begin, end, channel;

  __device__ __forceinline__ explicit StripWork(const TrainingParams& p) {
    const StripPlan& plan = p.plan.strip;
    row = FastDivisor(plan.by_channel_blocks).divide(blockIdx.x);
    block = blockIdx.x - row * plan.by_channel_blocks.divisor;  // fastest: they read the same pixels
    begin = block * p.plan.block_c;
    end = min(begin + p.plan.block_c, p.args.shape.init_channels);
    const int lanes = plan.by_lanes.divisor, position = FastDivisor(plan.by_lanes).divide(threadIdx.x);
    share = {static_cast<int>(threadIdx.x) - position * lanes, lanes, position, plan.positions};
    channel = begin + 2 * share.lane;
  }
  __device__ __forceinline__ bool works() const { return !share.idle() && channel < end; }
  __device__ __forceinline__ Channels<2> channels() const { return Channels<2>::of(channel, end); }
};

// Numbers of the block's channels; those of the cheap half as far as they are asked for. A barrier follows.
template <typename T, bool kCheapNorm, bool kCheapNormBackward>
__device__ __forceinline__ void fill_numbers(StripShared& shared, const TrainingParams& p, const StripWork& t) {
  for (int i = threadIdx.x; i < t.end - t.begin; i += blockDim.x) {
    const Channels<1> c = Channels<1>::of(t.begin + i, t.end);
    const auto put = [&](int number, float v) { shared.numbers[number][i] = v; };
    const auto primary = Half<1>::template of<T>(p.args.primary, c);
    put(kCenter1, primary.center[0]);
    put(kScale1, primary.scale[0]);
    put(kShift1, primary.shift[0]);
    if constexpr (kCheapNorm) {
      const auto cheap = Half<1>::template of<T>(p.args.cheap, c);
      put(kCenter2, cheap.center[0]);
      put(kScale2, cheap.scale[0]);
      put(kShift2, cheap.shift[0]);
    }
    if constexpr (kCheapNormBackward) {
      const auto cheap = NormBackward<1>::template of<T>(p.args.cheap, p.means, p.args.shape.init_channels, c);
      put(kCenter2, cheap.center[0]);
      put(kScale2, cheap.scale[0]);
      put(kSlope2, cheap.slope[0]);
      put(kOffset2, cheap.offset[0]);
    }
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) put(kTaps + tap, weight_at<T>(p.args, c.at[0], tap / 3, tap % 3));
  }
  __syncthreads();
}

// A thread's two of them.
struct StripNumbers {
  uint32_t own;

  __device__ __forceinline__ StripNumbers(const StripShared& shared, const BlockShare& t)
      : own(static_cast<uint32_t>(__cvta_generic_to_shared(&shared.numbers[0][2 * t.lane]))) {}
  __device__ __forceinline__ float2 operator[](int number) const {
    float2 v;  // volatile: else the compiler would read it once, and hold on to it
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(own + number * kStripChannels * 4));
    return v;
  }
};

// Columns [w, w + kStripColumns) of rows [h, h + rows) of image n. Unless masked, all of them lie in the image.
template <bool kMasked>
struct Strip {
  int n, h, w, rows, rest;  // rest: columns from w to the image's end

  // Whether column i of the strip lies in the image, for -1 <= i <= kStripColumns.
  __device__ __forceinline__ bool inside(int i) const {
    if (i < 0) return w > 0;
    return (!kMasked && i < kStripColumns) || i < rest;
  }
};

// Calls f(strip) for this thread's strips.
template <bool kMasked, typename F>
__device__ __forceinline__ void for_each_strip(const TrainingParams& p, const StripWork& t, F f) {
  if (!t.works()) return;
  const StripPlan& plan = p.plan.strip;
  const int first = t.row * plan.row_strips, end = min(first + plan.row_strips, plan.strips);
#pragma unroll 1
  for (int i = first + t.share.position; i < end; i += t.share.positions) {
    const int line = FastDivisor(plan.by_columns).divide(i), n = FastDivisor(plan.by_strips).divide(line);
    Strip<kMasked> s;
    s.n = n;
    s.h = (line - n * plan.by_strips.divisor) * plan.strip_h;
    s.w = (i - line * plan.by_columns.divisor) * kStripColumns;
    s.rows = min(plan.strip_h, p.args.shape.height - s.h);
    s.rest = p.args.shape.width - s.w;
    f(s);
  }
}

// A thread's channels of a map, in a row that moves down.
template <typename T>
struct StripMap {
  char* at;
  uint32_t pixel, row;  // bytes to the next one

  // From column ``first`` (0, or -1 for the window) of row s.h + first on.
  template <bool kMasked>
  __device__ __forceinline__ StripMap(const TrainingParams& p, const void* map, uint32_t pixel_bytes, int channel,
                                      const Strip<kMasked>& s, int first)
      : pixel(pixel_bytes), row(p.args.shape.width * pixel_bytes) {
    const int64_t line = int64_t{s.n} * p.args.shape.height + s.h + first;
    at = static_cast<char*>(const_cast<void*>(map)) + (line * p.args.shape.width + s.w + first) * pixel_bytes +
         channel * sizeof(T);
  }
  __device__ __forceinline__ char* column(uint32_t i) const {  // one wide multiply-add
    char* there;
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(there) : "r"(pixel), "r"(i), "l"(at));
    return there;
  }
  __device__ __forceinline__ Pair<T> load(int i) const { return __ldg(reinterpret_cast<const Pair<T>*>(column(i))); }
  __device__ __forceinline__ void store(int i, Pair<T> v) const { store_global(column(i), v); }
  __device__ __forceinline__ void down() { at += row; }

  // The window's columns of a row. What lies outside the image is any number.
  template <bool kMasked>
  __device__ __forceinline__ void load_window(Pair<T> (&v)[kStripWindow], const Strip<kMasked>& s) const {
#pragma unroll
    for (int i = 0; i < kStripWindow; ++i) {
      if (kMasked) {
        v[i] = s.inside(i - 1) ? load(i) : Pair<T>{};
      } else {  // its neighbour, without a branch
        v[i] = load(i == 0 ? (s.inside(-1) ? 0 : 1) : i + 1 < kStripWindow || s.inside(kStripColumns) ? i : i - 1);
      }
    }
  }
  // The strip's own columns; those outside are any number.
  template <bool kMasked>
  __device__ __forceinline__ void load_strip(Pair<T> (&v)[kStripColumns], const Strip<kMasked>& s) const {
#pragma unroll
    for (int i = 0; i < kStripColumns; ++i) v[i] = s.inside(i) ? load(i) : Pair<T>{};
  }
};

// Goes down a strip with a window of three rows: load(window row, whether it lies in the image) fills in the next, and
// row(above, at, below, whether ``below`` lies in the image) loads ``below`` and makes what belongs to the row ``at``.
template <int kCount, bool kMasked, typename Load, typename Row>
__device__ __forceinline__ void slide(const Strip<kMasked>& s, int height, Load load, Row row) {
  float window[3][kCount];
  load(window[0], s.h > 0);
  load(window[1], true);
  if constexpr (kMasked) {  // not the common case: the code of one row, and moves
#pragma unroll 1
    for (int r = 0; r < s.rows; ++r) {
      row(window[0], window[1], window[2], s.h + r + 1 < height);
#pragma unroll
      for (int i = 0; i < kCount; ++i) window[0][i] = window[1][i], window[1][i] = window[2][i];
    }
  } else {
#pragma unroll 1
    for (int r = 0; r < s.rows; r += 3) {
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        if (r + i < s.rows) {
          row(window[i], window[(i + 1) % 3], window[(i + 2) % 3], s.h + r + i + 1 < height);
        }
      }
    }
  }
}

// z = (y - center) * scale + shift of pairs.
template <typename T, int kPairs>
__device__ __forceinline__ void normalize(float (&z)[2 * kPairs], const Pair<T> (&y)[kPairs], float2 center,
                                          float2 scale, float2 shift) {
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const float2 v = unpack_pair<T>(y[i]);
    z[2 * i] = fmaf(v.x - center.x, scale.x, shift.x);
    z[2 * i + 1] = fmaf(v.y - center.y, scale.y, shift.y);
  }
}

// Zeros where a row of the window lies outside the image.
template <bool kMasked>
__device__ __forceinline__ void pad(float (&x)[2 * kStripWindow], const Strip<kMasked>& s) {
#pragma unroll
  for (int i = 0; i < 2 * kStripWindow; ++i) x[i] = s.inside(i / 2 - 1) ? x[i] : 0.f;
}
__device__ __forceinline__ void clear(float (&x)[2 * kStripWindow]) {
#pragma unroll
  for (int i = 0; i < 2 * kStripWindow; ++i) x[i] = 0.f;
}

// y1 → y2 down a strip: ``before`` is called where a row's own loads belong, store(y2) with what is to be stored.
template <typename T, bool kMasked, typename Before, typename Store>
__device__ __forceinline__ void slide_depthwise(const TrainingParams& p, const Strip<kMasked>& s, StripMap<T> y1,
                                                const StripNumbers& number, const UniformAct<T>& act, Before before,
                                                Store store) {
  using Row = float[2 * kStripWindow];
  const auto load = [&](Row& x, bool inside) {
    if (inside) {
      Pair<T> y[kStripWindow];
      y1.load_window(y, s);
      normalize<T>(x, y, number[kCenter1], number[kScale1], number[kShift1]);
      act.activate(x);
      pad(x, s);
    } else {
      clear(x);
    }
    y1.down();
  };
  const auto row = [&](const Row& above, const Row& at, Row& below, bool inside) {
    before();
    load(below, inside);
    float y[2 * kStripColumns];
    const auto add = [&](const Row& x, int kh) {
#pragma unroll
      for (int kw = 0; kw < 3; ++kw) {
        const float2 w = number[kTaps + kh * 3 + kw];
#pragma unroll
        for (int i = 0; i < kStripColumns; ++i) {
          const float a = x[2 * (i + kw)], b = x[2 * (i + kw) + 1];
          y[2 * i] = kh + kw == 0 ? a * w.x : fmaf(a, w.x, y[2 * i]);
          y[2 * i + 1] = kh + kw == 0 ? b * w.y : fmaf(b, w.y, y[2 * i + 1]);
        }
      }
    };
    add(above, 0);
    add(at, 1);
    add(below, 2);
    Pair<T> packed[kStripColumns];
#pragma unroll
    for (int i = 0; i < kStripColumns; ++i) packed[i] = pack_pair<T>(y[2 * i], y[2 * i + 1]);
    store(packed);
  };
  slide<2 * kStripWindow>(s, p.args.shape.height, load, row);
}

}  // namespace ghostfused
