// The depthwise op: a depthwise convolution of any odd kernel at stride 1 or 2, its norm and activation.
#pragma once

#include "cpu/depthwise_halving.h"
#include "cpu/parallel.h"
#include "cpu/parameters.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

// The taps of one vector of outputs, and of its neighbours ``next_output`` away.
template <typename T, bool kSplat>
struct Window {
  int rows, columns;
  int64_t x_row;
  const int64_t* x_column;  // where each tap of a row is
  const float* weight;      // vectors, or numbers for all lanes
  int64_t weight_row, weight_column;
  int64_t next_output;

  // kColumns 0: as many as ``columns`` says.
  template <int kOutputs, int kColumns>
  GHOSTFUSED_INLINE void sum(const T* x, Vec* sum) const {
    const int count = kColumns ? kColumns : columns;
    for (int o = 0; o < kOutputs; ++o) sum[o] = Vec{};
    for (int i = 0; i < rows; ++i) {
      Vec part[kOutputs] = {};  // of a row, so that the chains of large kernels stay short
#pragma GCC unroll 8
      for (int j = 0; j < count; ++j) {
        const float* at = weight + i * weight_row + j * weight_column;
        const Vec factor = kSplat ? splat(*at) : load(at);
        const T* tap = x + i * x_row + x_column[j];
        for (int o = 0; o < kOutputs; ++o) part[o] += factor * load_float(tap + o * next_output);
      }
      for (int o = 0; o < kOutputs; ++o) sum[o] += part[o];
    }
  }
};

constexpr int kMaxKernel = 7;
constexpr int kStrip = 4;  // outputs that share a load of a weight

// NCHW: a unit is one plane. Its rows are copied to scratch memory with their borders of zeros just before they are
// needed, at stride 2 the even columns first and then the odd ones, so that every tap is a vector of neighbours.
template <typename T>
class PlaneWorker {
 public:
  explicit PlaneWorker(const DepthwiseParams& p)
      : p(p),
        phase(div_up(int64_t{p.width} + p.kernel_w - 1, p.stride) + 2 * kLanes),
        row(p.stride * phase),
        whole(div_up(p.width, 2 * kLanes) * 2 * kLanes),
        x_end(static_cast<const T*>(p.x.data) + (p.batch - 1) * p.x.stride_n + (p.channels - 1) * p.x.stride_c +
              (p.height - 1) * p.x.stride_h + (p.width - 1) * p.x.stride_w + 1),
        strips{strip_kernel<1>(), strip_kernel<2>(), strip_kernel<3>(), strip_kernel<4>()} {
    const int64_t rows = int64_t{p.height} + p.kernel_h - 1;
    const int64_t all_norms = 3 * int64_t{p.channels}, line_size = int64_t{p.width} + 2 * kLanes;
    plane = thread_scratch(rows * row + all_norms + line_size + kMaxKernel * kMaxKernel);
    norm = plane + rows * row;
    line = norm + all_norms;
    weight = line + line_size;
    __builtin_memset(plane, 0, rows * row * sizeof(float));
    __builtin_memset(line, 0, line_size * sizeof(float));
    for (int j = 0; j < p.kernel_w; ++j) column[j] = j % p.stride * phase + j / p.stride;
    // where the first of two vectors of a row goes, and the second; at stride 2 column w of x is w + pad of the padded
    // row
    const int pad = p.kernel_w / 2;
    first_column = p.stride == 1 ? pad : pad % 2 * phase + pad / 2;
    second_column = p.stride == 1 ? pad + kLanes : (pad + 1) % 2 * phase + (pad + 1) / 2;
    for (int i = 0; i < kLanes; ++i) {
      const int64_t last = whole - 2 * kLanes;
      first_mask[i] = -(last + i * p.stride < p.width);
      second_mask[i] = -(last + (p.stride == 1 ? kLanes + i : 2 * i + 1) < p.width);
    }
  }

  // The norms of units begin … end - 1.
  void prepare(int64_t begin, int64_t end) {
    const int64_t all = min_of<int64_t>(end - begin, p.channels);
    for (int64_t done = 0; done < all;) {
      const int64_t c = (begin + done) % p.channels, count = min_of(p.channels - c, all - done);
      prepare_norm<T>(p.norm, c, 1, count, norm + c, p.channels);
      done += count;
    }
  }

  void run(int64_t unit) {
    const int64_t n = unit / p.channels, c = unit % p.channels;
    const T* x = static_cast<const T*>(p.x.data) + n * p.x.stride_n + c * p.x.stride_c;
    T* out = static_cast<T*>(p.out.data) + n * p.out.stride_n + c * p.out.stride_c;
    const Taps taps{p.weight, p.weight_stride_c, p.weight_stride_h, p.weight_stride_w, p.kernel_h, p.kernel_w};
    prepare_taps<T>(taps, false, c, 1, 1, weight, 0, 1);
    const Finish finish(norm + c, p.channels, p.norm.act, Finish::kNumbers);
    int64_t copied = 0;
    for (int64_t h = 0; h < p.out_height; h += kStrip) {
      const int strip = static_cast<int>(min_of<int64_t>(kStrip, p.out_height - h));
      const int64_t needed = min_of<int64_t>((h + strip - 1) * p.stride + p.kernel_h / 2 + 1, p.height);
      for (; copied < needed; ++copied) {
        const T* from = x + copied * p.x.stride_h;
        float* to = plane + (copied + p.kernel_h / 2) * row;
        if (p.x.stride_w == 1 && from + whole <= x_end) {
          copy_row(from, to);
        } else {
          for (int64_t w = 0; w < p.width; ++w) line[w] = to_float(from[w * p.x.stride_w]);
          copy_row(line, to);
        }
      }
      (this->*strips[strip - 1])(h, out, finish);
    }
  }

 private:
  using Strip = void (PlaneWorker::*)(int64_t h, T* out, const Finish& finish) const;
  template <int kRows>
  Strip strip_kernel() const {
    switch (p.kernel_w) {
      case 1:
        return &PlaneWorker::strip_of_rows<kRows, 1>;
      case 3:
        return &PlaneWorker::strip_of_rows<kRows, 3>;
      case 5:
        return &PlaneWorker::strip_of_rows<kRows, 5>;
      default:
        return &PlaneWorker::strip_of_rows<kRows, 7>;
    }
  }

  // Two vectors at a time; what the last ones have too much becomes zeros.
  template <typename From>
  void copy_row(const From* x, float* to) const {
    float *first = to + first_column, *second = to + second_column;
    const int64_t step = 2 * kLanes / p.stride, last = whole - 2 * kLanes;
    const bool split = p.stride == 2;
    for (int64_t w = 0; w < last; w += 2 * kLanes, first += step, second += step) {
      Vec a = load_float(x + w), b = load_float(x + w + kLanes);
      if (split) deinterleave(a, b, a, b);
      store(first, a);
      store(second, b);
    }
    Vec a = load_float(x + last), b = load_float(x + last + kLanes);
    if (split) deinterleave(a, b, a, b);
    store(first, reinterpret_cast<Vec>(reinterpret_cast<Ints>(a) & first_mask));
    store(second, reinterpret_cast<Vec>(reinterpret_cast<Ints>(b) & second_mask));
  }

  // Rows h … h + kRows - 1. A vector that reaches past a row's end is overwritten by the next row, but for the last
  // ones.
  template <int kRows, int kColumns>
  void strip_of_rows(int64_t h, T* out, const Finish& finish) const {
    const Window<float, true> window{p.kernel_h, kColumns, row, column, weight, kColumns, 1, p.stride * row};
    const T* end = out + int64_t{p.out_height} * p.out_width;
    for (int64_t w = 0; w < p.out_width; w += kLanes) {
      const int64_t first = max_of<int64_t>(min_of<int64_t>(w, p.out_width - kLanes), 0);
      Vec sum[kRows];
      window.template sum<kRows, kColumns>(plane + h * p.stride * row + first, sum);
      T* to = out + h * p.out_width + first;
      for (int i = 0; i < kRows; ++i, to += p.out_width) {
        const Vec y = finish(sum[i]);
        if (to + kLanes <= end) {
          store_float(to, y);
        } else {
          store_part(to, y, static_cast<int>(min_of<int64_t>(kLanes, p.out_width - first)));
        }
      }
    }
  }

  const DepthwiseParams& p;
  const int64_t phase, row, whole;  // ``whole``: a row in whole pairs of vectors
  const T* const x_end;             // nothing is read from here on
  const Strip strips[kStrip];
  float *plane, *norm, *line, *weight;
  int64_t column[kMaxKernel], first_column, second_column;
  Ints first_mask, second_mask;
};

template <typename Worker>
void run_planes(Items& items, const DepthwiseParams& p) {
  Worker worker(p);
  for (int64_t begin, end; items.next(&begin, &end);) {
    worker.prepare(begin, end);
    for (int64_t unit = begin; unit < end; ++unit) worker.run(unit);
  }
}

template <typename T>
void depthwise_planes(Items& items, void* context) {
  const DepthwiseParams& p = *static_cast<const DepthwiseParams*>(context);
#ifdef GHOSTFUSED_X86_MASKS
  if (HalvingWorker<T, 3>::takes(p)) return run_planes<HalvingWorker<T, 3>>(items, p);
  if (HalvingWorker<T, 5>::takes(p)) return run_planes<HalvingWorker<T, 5>>(items, p);
#endif
  run_planes<PlaneWorker<T>>(items, p);
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
    prepare_taps<T>(from, false, first, 1, count, weight, 1, kChannelBlock);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t c = 0; c < count; c += kLanes) {
        const int64_t at = count - c < kLanes && count >= kLanes ? count - kLanes : c;
        const Finish finish(norm + at, kChannelBlock, p.norm.act, Finish::kVectors);
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
    Window<T, false> window{static_cast<int>(i1 - i0),
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
        window.template sum<kStrip, 0>(x + left * p.x.stride_w, sum);
        for (int o = 0; o < kStrip; ++o) put(w + o, finish(sum[o]));
        w += kStrip;
        continue;
      }
      const int64_t j0 = max_of<int64_t>(-left, 0), j1 = min_of<int64_t>(p.width - left, p.kernel_w);
      Window<T, false> inside = window;
      inside.columns = static_cast<int>(j1 - j0);
      inside.weight += j0 * kChannelBlock;
      if (lanes == kLanes) {
        inside.template sum<1, 0>(x + (left + j0) * p.x.stride_w, sum);
      } else {
        sum_part(inside, x + (left + j0) * p.x.stride_w, static_cast<int>(lanes), sum);
      }
      put(w++, finish(sum[0]));
    }
  }

  // The same with fewer channels than a vector has, which mustn't be read past.
  static void sum_part(const Window<T, false>& window, const T* x, int lanes, Vec* sum) {
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
void depthwise_rows(Items& items, void* context) {
  const DepthwiseParams& p = *static_cast<const DepthwiseParams*>(context);
  RowWorker<T> worker(p);
  const int64_t rows = int64_t{p.batch} * p.out_height;
  for (int64_t begin, end; items.next(&begin, &end);) {
    while (begin < end) {
      const int64_t block = begin / rows, until = min_of((block + 1) * rows, end);
      worker.run(block * kChannelBlock, begin - block * rows, until - block * rows);
      begin = until;
    }
  }
}

inline void depthwise(const DepthwiseParams& p, int threads) {
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
