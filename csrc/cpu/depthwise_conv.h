// The depthwise op: a depthwise convolution of any odd kernel at stride 1 or 2, its norm and activation.
#pragma once

#include "cpu/depthwise_halving.h"
#include "cpu/depthwise_plan.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

struct DepthwiseTask {
  const DepthwiseParams& p;
  const DepthwisePlan& plan;
};

constexpr int kMaxKernel = 7;
constexpr int kStrip = 4;  // outputs that share a load of a weight

// Sums of kOutputs outputs: of output o tap (i, j) of the kernel is factor_at(i * kColumns + j), and what lies under it
// is at x_of_row(i) + distance(o, j).
template <int kOutputs, int kColumns, typename X, typename Distance, typename Factor>
GHOSTFUSED_INLINE void sum_taps(int rows, const X& x_of_row, const Distance& distance, const Factor& factor_at,
                                Vec (&sum)[kOutputs]) {
#pragma GCC unroll 4
  for (int o = 0; o < kOutputs; ++o) sum[o] = Vec{};
  for (int i = 0; i < rows; ++i) {
    Vec part[kOutputs];  // of a row, so that the chains of large kernels stay short
#pragma GCC unroll 4
    for (int o = 0; o < kOutputs; ++o) part[o] = Vec{};
    const float* x = x_of_row(i);
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) {
      const Vec factor = factor_at(i * kColumns + j);
#pragma GCC unroll 4
      for (int o = 0; o < kOutputs; ++o) part[o] += factor * load(x + distance(o, j));
    }
#pragma GCC unroll 4
    for (int o = 0; o < kOutputs; ++o) sum[o] += part[o];
  }
}

// NCHW, row by row: rows are copied to scratch memory with their borders of zeros just before they are
// needed, at stride 2 the even columns first and then the odd ones, so that every tap is a vector of neighbours.
template <typename T>
class PlaneWorker {
 public:
  PlaneWorker(const DepthwiseParams& p, const DepthwisePlan& plan)
      : p(p),
        plan(plan),
        phase(div_up(int64_t{p.width} + p.kernel_w - 1, p.stride) + 2 * kLanes),
        row(p.stride * phase),
        whole(div_up(p.width, 2 * kLanes) * 2 * kLanes),
        x_end(static_cast<const T*>(p.x.data) + (p.batch - 1) * p.x.stride_n + (p.channels - 1) * p.x.stride_c +
              (p.height - 1) * p.x.stride_h + (p.width - 1) * p.x.stride_w + 1),
        strips{strip_kernel<1>(), strip_kernel<2>(), strip_kernel<3>(), strip_kernel<4>()} {
    const int64_t rows = int64_t{p.height} + p.kernel_h - 1, line_size = int64_t{p.width} + 2 * kLanes;
    plane = thread_scratch(rows * row + line_size + (plan.prepared ? 0 : plan.size));
    line = plane + rows * row;
    own = plan.prepared ? nullptr : line + line_size;
    parameters = plan.prepared ? plan.prepared : own;
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

  // The parameters of units begin … end - 1.
  void prepare(int64_t begin, int64_t end) {
    if (own) prepare_planes<T>(p, plan, begin, end, own);
  }

  void run(int64_t unit) {
    const DepthwisePlan::Unit at(plan, unit);
    const int64_t c = at.column;
    const T* x = static_cast<const T*>(p.x.data) + at.n * p.x.stride_n + c * p.x.stride_c;
    T* out = static_cast<T*>(p.out.data) + at.n * p.out.stride_n + c * p.out.stride_c;
    const float* weight = parameters + plan.taps + c * p.kernel_h * p.kernel_w;
    const NormAffine norm_affine(parameters + c, plan.step, p.norm.act, NormAffine::kNumbers);
    int64_t copied = max_of<int64_t>(at.h0 * p.stride - p.kernel_h / 2, 0);
    for (int64_t h = at.h0; h < at.h1; h += kStrip) {
      const int strip = static_cast<int>(min_of<int64_t>(kStrip, at.h1 - h));
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
      (this->*strips[strip - 1])(weight, h, out, out + at.h1 * p.out_width, norm_affine);
    }
  }

 private:
  using Strip = void (PlaneWorker::*)(const float* weight, int64_t h, T* out, const T* end,
                                      const NormAffine& norm_affine) const;
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

  // Rows h … h + kRows - 1 of a tile that ends at ``end``. A vector that reaches past a row's end is overwritten by the
  // next row, but for the last ones.
  template <int kRows, int kColumns>
  void strip_of_rows(const float* weight, int64_t h, T* out, const T* end, const NormAffine& norm_affine) const {
    for (int64_t w = 0; w < p.out_width; w += kLanes) {
      const int64_t first = max_of<int64_t>(min_of<int64_t>(w, p.out_width - kLanes), 0);
      Vec sum[kRows];
      const float* x = plane + h * p.stride * row + first;
      sum_taps<kRows, kColumns>(
          p.kernel_h, [&](int i) { return x + i * row; }, [&](int o, int j) { return column[j] + o * p.stride * row; },
          [&](int tap) { return splat(weight[tap]); }, sum);
      T* to = out + h * p.out_width + first;
      for (int i = 0; i < kRows; ++i, to += p.out_width) {
        const Vec y = norm_affine(sum[i]);
        if (to + kLanes <= end) {
          store_float(to, y);
        } else {
          store_part(to, y, static_cast<int>(min_of<int64_t>(kLanes, p.out_width - first)));
        }
      }
    }
  }

  const DepthwiseParams& p;
  const DepthwisePlan& plan;
  const int64_t phase, row, whole;  // ``whole``: a row in whole pairs of vectors
  const T* const x_end;             // nothing is read from here on
  const Strip strips[kStrip];
  float *plane, *line, *own;  // own: where the parameters are made, or null
  const float* parameters;    // all channels'
  int64_t column[kMaxKernel], first_column, second_column;
  Ints first_mask, second_mask;
};

template <typename Worker>
void run_planes(Items& items, const DepthwiseTask& task) {
  Worker worker(task.p, task.plan);
  for (int64_t begin, end; items.next(&begin, &end);) {
    worker.prepare(begin, end);
    for (int64_t unit = begin; unit < end; ++unit) worker.run(unit);
  }
}

template <typename T>
void depthwise_planes(Items& items, void* context) {
  const DepthwiseTask& task = *static_cast<const DepthwiseTask*>(context);
#ifdef GHOSTFUSED_X86_MASKS
  if (HalvingWorker<T, 3>::takes(task.p)) return run_planes<HalvingWorker<T, 3>>(items, task);
  if (HalvingWorker<T, 5>::takes(task.p)) return run_planes<HalvingWorker<T, 5>>(items, task);
#endif
  run_planes<PlaneWorker<T>>(items, task);
}

// channels_last: rows are copied to scratch memory as fp32, with their borders of zeros, just before they are needed,
// for as many vectors of channels as a line of memory holds.
template <typename T>
class RowWorker {
  static constexpr int kTogether = kLanes * sizeof(T) < 64 ? 64 / (kLanes * sizeof(T)) : 1;

 public:
  RowWorker(const DepthwiseParams& p, const DepthwisePlan& plan)
      : p(p),
        plan(plan),
        row_size((int64_t{p.width} + p.kernel_w - 1) * kLanes),
        copies_size(p.kernel_h * row_size),
        kernel(row_kernel()) {
    const int64_t rows_size = row_size + kTogether * copies_size,
                  own_size = plan.prepared ? 0 : plan.size + plan.columns;
    zeros = thread_scratch(rows_size + own_size);
    copies = zeros + row_size;
    own = plan.prepared ? nullptr : zeros + rows_size;
    __builtin_memset(zeros, 0, rows_size * sizeof(float));
    for (int64_t i = 0; own && i < plan.columns; ++i) own[plan.size + i] = 0;
  }

  void run(int64_t unit) {
    const DepthwisePlan::Unit at(plan, unit);
    const int64_t first = at.column * kChannelBlock, count = min_of(kChannelBlock, p.channels - first);
    if (own && own[plan.size + at.column] == 0) {
      prepare_channels<T>(p, plan, first, count, own);
      own[plan.size + at.column] = 1;
    }
    for (int64_t i = 0; i < count; i += kTogether * kLanes) {
      run_vectors(at, first + i, min_of<int64_t>(count - i, kTogether * kLanes), count >= kLanes);
    }
  }

 private:
  // Of ``count`` channels from c on. ``may_go_back``: there are more before them than the last vector lacks.
  void run_vectors(const DepthwisePlan::Unit& at, int64_t c, int64_t count, bool may_go_back) const {
    const T* x = static_cast<const T*>(p.x.data) + at.n * p.x.stride_n;
    T* out = static_cast<T*>(p.out.data) + at.n * p.out.stride_n + at.h0 * p.out.stride_h;
    const int64_t pad = p.kernel_h / 2;
    int64_t copied = max_of<int64_t>(at.h0 * p.stride - pad, 0);
    for (int64_t h = at.h0; h < at.h1; ++h, out += p.out.stride_h) {
      const int64_t top = h * p.stride - pad, until = min_of<int64_t>(top + p.kernel_h, p.height);
      float* copies_of_vector = copies;
      for (int64_t i = 0; i < count; i += kLanes, copies_of_vector += copies_size) {
        const int64_t lacks = max_of<int64_t>(i + kLanes - count, 0);
        const int64_t first = c + i - (!kMasks && may_go_back ? lacks : 0);
        const int lanes = !kMasks && may_go_back ? kLanes : kLanes - static_cast<int>(lacks);
        for (int64_t row = copied; row < until; ++row) {
          copy_row(x + row * p.x.stride_h + first, lanes, copies_of_vector + row % p.kernel_h * row_size);
        }
        const float* rows[kMaxKernel];
        for (int64_t j = 0; j < p.kernel_h; ++j) {
          const int64_t row = top + j;
          rows[j] = row < 0 || row >= p.height ? zeros : copies_of_vector + row % p.kernel_h * row_size;
        }
        const float* parameters = (plan.prepared ? plan.prepared : own) + first;
        const NormAffine norm_affine(parameters, plan.step, p.norm.act, NormAffine::kVectors);
        (this->*kernel)(rows, parameters + plan.taps, norm_affine, lanes, out + first);
      }
      copied = max_of(copied, until);
    }
  }

  void copy_row(const T* x, int lanes, float* to) const {
    to += p.kernel_w / 2 * kLanes;
    if (lanes == kLanes) {
      for (int64_t w = 0; w < p.width; ++w) store(to + w * kLanes, load_float(x + w * p.x.stride_w));
    } else {
      for (int64_t w = 0; w < p.width; ++w) store(to + w * kLanes, load_part(x + w * p.x.stride_w, lanes));
    }
  }

  using Row = void (RowWorker::*)(const float* const* rows, const float* weight, const NormAffine& norm_affine,
                                  int lanes, T* out) const;
  Row row_kernel() const { return p.stride == 1 ? row_kernel<1>() : row_kernel<2>(); }
  template <int kStride>
  Row row_kernel() const {
    switch (p.kernel_w) {
      case 1:
        return &RowWorker::output_row<kStride, 1>;
      case 3:
        return &RowWorker::output_row<kStride, 3>;
      case 5:
        return &RowWorker::output_row<kStride, 5>;
      default:
        return &RowWorker::output_row<kStride, 7>;
    }
  }

  // The last outputs end where the row does, so that some are made twice.
  template <int kStride, int kColumns>
  void output_row(const float* const* rows, const float* weight, const NormAffine& norm_affine, int lanes,
                  T* out) const {
    const auto outputs = [&](auto count, int64_t w) __attribute__((always_inline)) {
      Vec sum[count];
      sum_taps<count, kColumns>(
          p.kernel_h, [&](int i) { return rows[i] + w * (kStride * kLanes); },
          [](int o, int j) { return (o * kStride + j) * kLanes; },
          [&](int tap) { return load(weight + tap * plan.step); }, sum);
      T* to = out + w * p.out.stride_w;
      for (int o = 0; o < count; ++o, to += p.out.stride_w) {
        if (lanes == kLanes) {
          store_float(to, norm_affine(sum[o]));
        } else {
          store_part(to, norm_affine(sum[o]), lanes);
        }
      }
    };
    for (int64_t w = 0; w < p.out_width && p.out_width >= kStrip; w += kStrip) {
      outputs(std::integral_constant<int, kStrip>{}, min_of<int64_t>(w, p.out_width - kStrip));
    }
    for (int64_t w = 0; w < p.out_width && p.out_width < kStrip; ++w) outputs(std::integral_constant<int, 1>{}, w);
  }

  const DepthwiseParams& p;
  const DepthwisePlan& plan;
  const int64_t row_size, copies_size;  // of a vector's rows
  const Row kernel;
  float *zeros, *copies, *own;  // a row, rows, and where the parameters are made, and whether a block's are; or null
};

template <typename T>
void depthwise_rows(Items& items, void* context) {
  const DepthwiseTask& task = *static_cast<const DepthwiseTask*>(context);
  RowWorker<T> worker(task.p, task.plan);
  for_each_unit(items, [&](int64_t unit) { worker.run(unit); });
}

inline void depthwise(const DepthwiseParams& p, const Packed& packed, int threads) {
  const DepthwisePlan plan(p, packed.parameters, threads);
  DepthwiseTask task{p, plan};
  const double work = static_cast<double>(p.batch) * p.channels * p.out_height * p.out_width * p.kernel_h * p.kernel_w;
  if (p.channels_last) {
    run(threads, plan.units, work, GHOSTFUSED_BY_PATH(p.path, depthwise_rows), &task);
  } else {
    run(threads, plan.units, work, GHOSTFUSED_BY_PATH(p.path, depthwise_planes), &task);
  }
}

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
