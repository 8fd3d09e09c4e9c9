// The depthwise op: a depthwise convolution of any odd kernel at stride 1 or 2, its norm and activation.
#pragma once

#include "parallel.h"
#include "parameters.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

// The taps of one vector of outputs, and of its neighbours ``next_output`` away.
template <typename T>
struct Window {
  int rows, columns;
  int64_t x_row;
  const int64_t* x_column;  // where each tap of a row is
  const float* weight;      // vectors
  int64_t weight_row, weight_column;
  int64_t next_output;

  template <int kOutputs>
  GHOSTFUSED_INLINE void sum(const T* x, Vec* sum) const {
    for (int o = 0; o < kOutputs; ++o) sum[o] = Vec{};
    for (int i = 0; i < rows; ++i) {
      Vec part[kOutputs] = {};  // of a row, so that the chains of large kernels stay short
      for (int j = 0; j < columns; ++j) {
        const Vec factor = load(weight + i * weight_row + j * weight_column);
        const T* tap = x + i * x_row + x_column[j];
        for (int o = 0; o < kOutputs; ++o) part[o] += factor * load_float(tap + o * next_output);
      }
      for (int o = 0; o < kOutputs; ++o) sum[o] += part[o];
    }
  }
};

struct Finish {
  Vec scale, shift, slope;
  Act act;
  Clamp clamp;

  GHOSTFUSED_INLINE Vec operator()(Vec sum) const {
    const Vec y = ghostfused::cpu::GHOSTFUSED_ISA::clamp(sum * scale + shift, clamp);
    return is_clamp(act) ? y : activate(y, slope, act);
  }
};

constexpr int kMaxKernel = 7;
constexpr int kStrip = 4;  // outputs that share a load of a weight

// The even and the odd lanes of two vectors.
GHOSTFUSED_INLINE void deinterleave(Vec a, Vec b, Vec& even, Vec& odd) {
  Ints at;
  for (int i = 0; i < kLanes; ++i) at[i] = 2 * i;
#ifdef __clang__
  for (int i = 0; i < kLanes; ++i) {
    even[i] = 2 * i < kLanes ? a[2 * i] : b[2 * i - kLanes];
    odd[i] = 2 * i < kLanes ? a[2 * i + 1] : b[2 * i + 1 - kLanes];
  }
#else
  even = __builtin_shuffle(a, b, at);
  odd = __builtin_shuffle(a, b, at + 1);
#endif
}

// NCHW: a unit is one plane. Its rows are copied to scratch memory with their borders of zeros just before they are
// needed, at stride 2 the even columns first and then the odd ones, so that every tap is a vector of neighbours.
template <typename T>
class PlaneWorker {
 public:
  PlaneWorker(const DepthwiseParams& p, int64_t begin, int64_t end)
      : p(p),
        phase((p.width + p.kernel_w - 1 + p.stride - 1) / p.stride + kLanes),
        row(p.stride * phase),
        taps(p.kernel_h * p.kernel_w) {
    const int64_t rows = p.height + p.kernel_h - 1, norms = min_of<int64_t>(end - begin, p.channels);
    float* scratch = thread_scratch(rows * row + kLanes + 3 * p.channels + taps * kLanes);
    plane = scratch;
    __builtin_memset(plane, 0, (rows * row + kLanes) * sizeof(float));
    norm = plane + rows * row + kLanes;
    weight = norm + 3 * p.channels;
    for (int64_t done = 0; done < norms;) {
      const int64_t c = (begin + done) % p.channels, count = min_of(p.channels - c, norms - done);
      prepare_norm<T>(p.norm, c, 1, count, norm + c, p.channels);
      done += count;
    }
    for (int j = 0; j < p.kernel_w; ++j) column[j] = j % p.stride * phase + j / p.stride;
  }

  void run(int64_t unit) {
    const int64_t n = unit / p.channels, c = unit % p.channels;
    const T* x = static_cast<const T*>(p.x.data) + n * p.x.stride_n + c * p.x.stride_c;
    T* out = static_cast<T*>(p.out.data) + n * p.out.stride_n + c * p.out.stride_c;
    const T* from = static_cast<const T*>(p.weight) + c * p.weight_stride_c;
    float* to = weight;
    for (int i = 0; i < p.kernel_h; ++i) {
      for (int j = 0; j < p.kernel_w; ++j, to += kLanes) {
        store(to, splat(to_float(from[i * p.weight_stride_h + j * p.weight_stride_w])));
      }
    }
    const Finish finish{splat(norm[c]), splat(norm[p.channels + c]), splat(norm[2 * p.channels + c]), p.norm.act,
                        clamp_of(p.norm.act)};
    int64_t copied = 0;
    for (int64_t h = 0; h < p.out_height; h += kStrip) {
      const int strip = static_cast<int>(min_of<int64_t>(kStrip, p.out_height - h));
      const int64_t needed = min_of<int64_t>((h + strip - 1) * p.stride + p.kernel_h / 2 + 1, p.height);
      for (; copied < needed; ++copied) copy_row(x + copied * p.x.stride_h, copied);
      if (strip == kStrip) {
        strip_of_rows<kStrip>(h, out, finish);
      } else {
        for (int i = 0; i < strip; ++i) strip_of_rows<1>(h + i, out, finish);
      }
    }
  }

 private:
  void copy_row(const T* x, int64_t h) {
    const int pad = p.kernel_w / 2;
    float* to = plane + (h + p.kernel_h / 2) * row;
    const int64_t stride = p.x.stride_w;
    if (p.stride == 1) {
      int64_t w = 0;
      for (; stride == 1 && w + kLanes <= p.width; w += kLanes) store(to + pad + w, load_float(x + w));
      for (; w < p.width; ++w) to[pad + w] = to_float(x[w * stride]);
      return;
    }
    // column w of x is column w + pad of the padded row
    float* even = to + pad % 2 * phase + pad / 2;
    float* odd = to + (pad + 1) % 2 * phase + (pad + 1) / 2;
    int64_t w = 0;
    for (; stride == 1 && w + 2 * kLanes <= p.width; w += 2 * kLanes) {
      Vec evens, odds;
      deinterleave(load_float(x + w), load_float(x + w + kLanes), evens, odds);
      store(even + w / 2, evens);
      store(odd + w / 2, odds);
    }
    for (; w < p.width; ++w) (w % 2 ? odd : even)[w / 2] = to_float(x[w * stride]);
  }

  // Rows h … h + kRows - 1. A vector that reaches past a row's end is overwritten by the next row, but for the last
  // ones.
  template <int kRows>
  void strip_of_rows(int64_t h, T* out, const Finish& finish) const {
    const Window<float> window{p.kernel_h, p.kernel_w,          row,    column,
                               weight,     p.kernel_w * kLanes, kLanes, p.stride * row};
    const T* end = out + int64_t{p.out_height} * p.out_width;
    for (int64_t w = 0; w < p.out_width; w += kLanes) {
      const int64_t first = max_of<int64_t>(min_of<int64_t>(w, p.out_width - kLanes), 0);
      Vec sum[kRows];
      window.template sum<kRows>(plane + h * p.stride * row + first, sum);
      for (int i = 0; i < kRows; ++i) {
        T* to = out + (h + i) * p.out_width + first;
        if (to + kLanes <= end) {
          store_float(to, finish(sum[i]));
        } else {
          store_part(to, finish(sum[i]), static_cast<int>(min_of<int64_t>(kLanes, p.out_width - first)));
        }
      }
    }
  }

  const DepthwiseParams& p;
  const int64_t phase, row;
  const int taps;
  float *plane, *norm, *weight;
  int64_t column[kMaxKernel];
};

template <typename T>
void depthwise_planes(int64_t begin, int64_t end, void* context) {
  PlaneWorker<T> worker(*static_cast<const DepthwiseParams*>(context), begin, end);
  for (int64_t unit = begin; unit < end; ++unit) worker.run(unit);
}

// channels_last: a unit is one block of channels of one row of one image. x is read where it lies, and a window that
// reaches over the border is cut to what is inside.
constexpr int64_t kChannelBlock = 8 * kLanes;

template <typename T>
class RowWorker {
 public:
  explicit RowWorker(const DepthwiseParams& p)
      : p(p), taps(p.kernel_h * p.kernel_w), weight(thread_scratch((taps + 3) * kChannelBlock)) {
    for (int j = 0; j < p.kernel_w; ++j) column[j] = j * p.x.stride_w;
  }

  // Rows begin … end - 1 of all images, of the channels from ``first`` on.
  void run(int64_t first, int64_t begin, int64_t end) {
    const int64_t count = min_of(kChannelBlock, p.channels - first);
    float* norm = weight + taps * kChannelBlock;
    __builtin_memset(weight, 0, (taps + 3) * kChannelBlock * sizeof(float));
    prepare_norm<T>(p.norm, first, 1, count, norm, kChannelBlock);
    const Taps from{p.weight, p.weight_stride_c, p.weight_stride_h, p.weight_stride_w, p.kernel_h, p.kernel_w};
    prepare_taps<T>(from, false, first, 1, count, weight, kChannelBlock);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t c = 0; c < count; c += kLanes) {
        const int64_t at = count - c < kLanes && count >= kLanes ? count - kLanes : c;
        const Finish finish{load(norm + at), load(norm + kChannelBlock + at), load(norm + 2 * kChannelBlock + at),
                            p.norm.act, clamp_of(p.norm.act)};
        output_row(i / p.out_height, i % p.out_height, first + at, min_of<int64_t>(count - at, kLanes), weight + at,
                   finish);
      }
    }
  }

 private:
  void output_row(int64_t n, int64_t h, int64_t c, int64_t lanes, const float* taps_of_c, const Finish& finish) const {
    const int64_t pad_h = p.kernel_h / 2, pad_w = p.kernel_w / 2, top = h * p.stride - pad_h;
    const int64_t i0 = max_of<int64_t>(-top, 0), i1 = min_of<int64_t>(p.height - top, p.kernel_h);
    const T* x = static_cast<const T*>(p.x.data) + n * p.x.stride_n + (top + i0) * p.x.stride_h + c;
    T* out = static_cast<T*>(p.out.data) + n * p.out.stride_n + h * p.out.stride_h + c;
    Window<T> window{static_cast<int>(i1 - i0),
                     p.kernel_w,
                     p.x.stride_h,
                     column,
                     taps_of_c + i0 * p.kernel_w * kChannelBlock,
                     p.kernel_w * kChannelBlock,
                     kChannelBlock,
                     p.stride * p.x.stride_w};
    const auto put = [&](int64_t w, Vec y) {
      if (lanes == kLanes) {
        store_float(out + w * p.out.stride_w, y);
      } else {
        store_part(out + w * p.out.stride_w, y, static_cast<int>(lanes));
      }
    };
    for (int64_t w = 0; w < p.out_width;) {
      const int64_t left = w * p.stride - pad_w;
      Vec sum[kStrip];
      if (lanes == kLanes && left >= 0 && left + (kStrip - 1) * p.stride + p.kernel_w <= p.width &&
          w + kStrip <= p.out_width) {
        window.template sum<kStrip>(x + left * p.x.stride_w, sum);
        for (int o = 0; o < kStrip; ++o) put(w + o, finish(sum[o]));
        w += kStrip;
        continue;
      }
      const int64_t j0 = max_of<int64_t>(-left, 0), j1 = min_of<int64_t>(p.width - left, p.kernel_w);
      Window<T> inside = window;
      inside.columns = static_cast<int>(j1 - j0);
      inside.weight += j0 * kChannelBlock;
      if (lanes == kLanes) {
        inside.template sum<1>(x + (left + j0) * p.x.stride_w, sum);
      } else {
        sum_part(inside, x + (left + j0) * p.x.stride_w, static_cast<int>(lanes), sum);
      }
      put(w++, finish(sum[0]));
    }
  }

  // The same with fewer channels than a vector has, which mustn't be read past.
  static void sum_part(const Window<T>& window, const T* x, int lanes, Vec* sum) {
    sum[0] = Vec{};
    for (int i = 0; i < window.rows; ++i) {
      Vec part{};
      for (int j = 0; j < window.columns; ++j) {
        part += load(window.weight + i * window.weight_row + j * window.weight_column) *
                load_part(x + i * window.x_row + window.x_column[j], lanes);
      }
      sum[0] += part;
    }
  }

  const DepthwiseParams& p;
  const int taps;
  float* const weight;
  int64_t column[kMaxKernel];
};

template <typename T>
void depthwise_rows(int64_t begin, int64_t end, void* context) {
  const DepthwiseParams& p = *static_cast<const DepthwiseParams*>(context);
  RowWorker<T> worker(p);
  const int64_t rows = int64_t{p.batch} * p.out_height;
  while (begin < end) {
    const int64_t block = begin / rows, until = min_of((block + 1) * rows, end);
    worker.run(block * kChannelBlock, begin - block * rows, until - block * rows);
    begin = until;
  }
}

inline void depthwise(const DepthwiseParams& p, const Threads& threads) {
  DepthwiseParams params = p;
  const double work = static_cast<double>(p.batch) * p.channels * p.out_height * p.out_width * p.kernel_h * p.kernel_w;
  if (p.channels_last) {
    const int64_t units = div_up(p.channels, kChannelBlock) * p.batch * p.out_height;
    run(threads, units, work, GHOSTFUSED_BY_PATH(p.path, depthwise_rows), &params);
  } else {
    run(threads, int64_t{p.batch} * p.channels, work, GHOSTFUSED_BY_PATH(p.path, depthwise_planes), &params);
  }
}

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
