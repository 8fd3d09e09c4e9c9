// The gate of a squeeze-and-excite block: the means of x, and two fully connected layers. And global pooling.
#pragma once

#include "cpu/activation.h"
#include "cpu/dispatch.h"
#include "cpu/dot.h"
#include "cpu/parallel.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

constexpr int kUnitRows = kLanes < 8 ? kLanes : 8;  // of a matrix, in one unit

// A map's rows are summed in so many bands, whatever the number of threads, so that each thread sums what it made in
// the step before.
constexpr int64_t kBands = 4;
inline int64_t bands_of(const SqueezeExciteParams& p) { return p.height >= 3 * kBands ? kBands : 1; }

struct SqueezeExciteTask {
  const SqueezeExciteParams& p;
  const Packed &packed_reduce, &packed_expand;
  float *mean, *hidden;  // (bands, N, C): sums of a band, and then the first has the means; (N, reduced)
};

// A long sum of vectors: what an addition rounds off goes into the next, so that its error doesn't grow with its
// length.
class Total {
 public:
  GHOSTFUSED_INLINE void add(Vec v) {
    v += rest;
    const Vec next = sum + v, added = next - sum, rounded_off = (sum - (next - added)) + (v - added);
    rest = next - next == Vec{} ? rounded_off : Vec{};  // of infinity it would be NaN
    sum = next;
  }
  GHOSTFUSED_INLINE Vec value() const { return sum + rest; }

 private:
  Vec sum{}, rest{};
};

// Adds load_at(0) … load_at(count - 1), in parts that are short enough to be summed as they are.
template <typename Load>
GHOSTFUSED_INLINE void add_vectors(Total& total, int64_t count, const Load& load_at) {
  constexpr int64_t kPart = 64;
  for (int64_t begin = 0; begin < count; begin += kPart) {
    const int64_t end = min_of(begin + kPart, count);
    Vec sum[4] = {};
    int64_t i = begin;
    for (; i + 4 <= end; i += 4) {
      for (int j = 0; j < 4; ++j) sum[j] += load_at(i + j);
    }
    for (; i < end; ++i) sum[0] += load_at(i);
    total.add((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
}

// Numbers at a stride, a vector of them at a time.
template <typename T>
GHOSTFUSED_INLINE void add_run(Total& total, const T* p, int64_t stride, int64_t count) {
  const int64_t whole = count / kLanes, rest = count % kLanes;
  const auto strided = [&](int64_t i, int64_t lanes) {
    return load_strided(p + i * kLanes * stride, stride, static_cast<int>(lanes));
  };
  if (stride == 1) {
    add_vectors(total, whole, [&](int64_t i) { return load_float(p + i * kLanes); });
    if (rest) total.add(load_part(p + whole * kLanes, static_cast<int>(rest)));
  } else {
    add_vectors(total, whole, [&](int64_t i) { return strided(i, kLanes); });
    if (rest) total.add(strided(whole, rest));
  }
}

// Sums of x; a unit is a band of up to kLanes channels of an image.
template <typename T>
void squeeze(Items& items, void* context) {
  const SqueezeExciteTask& task = *static_cast<const SqueezeExciteTask*>(context);
  const SqueezeExciteParams& p = task.p;
  const bool flat = p.height == 1 || p.x.stride_h == p.width * p.x.stride_w;
  const int64_t groups = div_up(p.channels, kLanes), step = p.x.stride_w, bands = bands_of(p);
  const bool along_channels = p.x.stride_c == 1 && step != 1;  // channels_last
  for_each_unit(items, [&](int64_t unit) {
    const int64_t first = unit % groups * kLanes, last = min_of<int64_t>(first + kLanes, p.channels);
    const int64_t band = unit / groups % bands, n = unit / groups / bands;
    const int64_t begin = band * p.height / bands, height = (band + 1) * p.height / bands - begin;
    const int64_t rows = flat ? 1 : height, run = flat ? height * p.width : p.width;
    const T* x = static_cast<const T*>(p.x.data) + n * p.x.stride_n + begin * p.x.stride_h;
    float* sum = task.mean + (band * p.batch + n) * p.channels + first;
    if (along_channels) {
      // the last vector ends where the channels do: some of its lanes are another unit's
      const int64_t start = max_of<int64_t>(min_of<int64_t>(first, p.channels - kLanes), 0);
      const int lanes = min_of<int64_t>(p.channels - start, kLanes);
      Total total;
      for (int64_t h = 0; h < rows; ++h) {
        const T* row = x + start + h * p.x.stride_h;
        if (lanes == kLanes) {
          add_vectors(total, run, [&](int64_t i) { return load_float(row + i * step); });
        } else {
          add_vectors(total, run, [&](int64_t i) { return load_part(row + i * step, lanes); });
        }
      }
      const Vec sums = total.value();
      for (int64_t c = first; c < last; ++c) *sum++ = sums[c - start];
      return;
    }
    for (int64_t c = first; c < last; ++c) {
      Total total;
      for (int64_t h = 0; h < rows; ++h) add_run(total, x + c * p.x.stride_c + h * p.x.stride_h, step, run);
      *sum++ = sum_of_lanes(total.value());
    }
  });
}

// Means of x, to task.mean.
template <typename T>
void make_means(SqueezeExciteTask& task, int threads) {
  const SqueezeExciteParams& p = task.p;
  const int64_t bands = bands_of(p), planes = int64_t{p.batch} * p.channels;
  run(threads, p.batch * bands * div_up(p.channels, kLanes), static_cast<double>(planes) * p.height * p.width,
      squeeze<T>, &task);
  const float scale = static_cast<float>(1 / (static_cast<double>(p.height) * p.width));
  for (int64_t i = 0; i < planes; i += kLanes) {
    const int count = min_of<int64_t>(planes - i, kLanes);
    Vec sum = load_part(task.mean + i, count);
    for (int64_t band = 1; band < bands; ++band) sum += load_part(task.mean + band * planes + i, count);
    store_part(task.mean + i, sum * scale, count);
  }
}

// Units of kUnitRows outputs for all images, of weight b + bias.
template <typename T, typename Finish>
void layer(Items& items, const SqueezeExciteParams& p, const void* weight, const Packed& packed,
           const ChannelVector& bias, const float* b, int64_t depth, int64_t channels, const Finish& finish) {
  for_each_unit(items, [&](int64_t unit) {
    const int64_t first = unit * kUnitRows;
    const int rows = min_of<int64_t>(kUnitRows, channels - first);
    const int64_t at = first * depth;
    for (int64_t n = 0; n < p.batch; n += kDotColumns) {
      const int columns = min_of<int64_t>(kDotColumns, p.batch - n);
      float y[kDotColumns * kUnitRows];
      const auto products = [&](auto* a) {
        dot(a + at, depth, rows, b + n * depth, depth, columns, depth, y, kUnitRows);
      };
      if (packed.data) {
        products(static_cast<const BFloat16*>(packed.data));
      } else {
        products(static_cast<const T*>(weight));
      }
      for (int j = 0; j < columns; ++j) {
        for (int i = 0; i < rows; ++i) {
          float sum = y[j * kUnitRows + i];
          if (bias.data) sum += to_float(static_cast<const T*>(bias.data)[(first + i) * bias.stride]);
          y[j * kUnitRows + i] = sum;
        }
        finish(n + j, first, y + j * kUnitRows, rows);
      }
    }
  });
}

template <typename T>
void reduce(Items& items, void* context) {
  const SqueezeExciteTask& task = *static_cast<const SqueezeExciteTask*>(context);
  const SqueezeExciteParams& p = task.p;
  const auto finish = [&](int64_t n, int64_t r, const float* y, int count) {
    store_part(task.hidden + n * p.reduced + r, activated(load_part(y, count), Vec{}, p.act), count);
  };
  layer<T>(items, p, p.reduce.data, task.packed_reduce, p.reduce_bias, task.mean, p.channels, p.reduced, finish);
}

template <typename T>
void excite(Items& items, void* context) {
  const SqueezeExciteTask& task = *static_cast<const SqueezeExciteTask*>(context);
  const SqueezeExciteParams& p = task.p;
  const auto finish = [&](int64_t n, int64_t c, const float* y, int count) {
    Vec v[1] = {load_part(y, count)};
    through_gate(v, p.gate);
    store_part(static_cast<T*>(p.out) + n * p.channels + c, v[0], count);
  };
  layer<T>(items, p, p.expand.data, task.packed_expand, p.expand_bias, task.hidden, p.reduced, p.channels, finish);
}

template <typename T>
void squeeze_excite(const SqueezeExciteParams& p, const Packed& reduced, const Packed& expanded, int threads) {
  const int64_t images = p.batch, planes = images * p.channels;
  float* scratch = thread_scratch(bands_of(p) * planes + images * p.reduced);
  SqueezeExciteTask task{p, reduced, expanded, scratch, scratch + bands_of(p) * planes};
  // each weight comes from memory for a few products: such work takes longer, and is worth more threads
  const double products = 4. * static_cast<double>(planes) * p.reduced;
  make_means<T>(task, threads);
  run(threads, div_up(p.reduced, kUnitRows), products, reduce<T>, &task);
  run(threads, div_up(p.channels, kUnitRows), products, excite<T>, &task);
}

// The means alone, of x's type.
template <typename T>
void global_pool(const SqueezeExciteParams& p, int threads) {
  const int64_t planes = int64_t{p.batch} * p.channels;
  const Packed none;
  SqueezeExciteTask task{p, none, none, thread_scratch(bands_of(p) * planes), nullptr};
  make_means<T>(task, threads);
  for (int64_t i = 0; i < planes; i += kLanes) {
    const int count = min_of<int64_t>(planes - i, kLanes);
    store_part(static_cast<T*>(p.out) + i, load_part(task.mean + i, count), count);
  }
}

inline void global_pool(const SqueezeExciteParams& p, int threads) {
  GHOSTFUSED_BY_PATH(p.path, global_pool)(p, threads);
}

inline void squeeze_excite(const SqueezeExciteParams& p, const Packed& reduced, const Packed& expanded, int threads) {
  GHOSTFUSED_BY_PATH(p.path, squeeze_excite)(p, reduced, expanded, threads);
}

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
