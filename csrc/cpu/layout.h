// Copies maps from one memory format to the other, numbers from one type to another or through a gate's function, and
// maps to one.
#pragma once

#include "cpu/activation.h"
#include "cpu/parallel.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

// A square of vectors at (row, column) of a matrix of ``rows`` × ``columns``, to the transposed one.
template <typename T>
void transpose_square(const T* from, int64_t rows, int64_t columns, int64_t row, int64_t column, T* to) {
  const int height = min_of<int64_t>(rows - row, kLanes), width = min_of<int64_t>(columns - column, kLanes);
  from += row * columns + column;
  to += column * rows + row;
  Vec v[kLanes];
  for (int i = 0; i < kLanes; ++i) v[i] = i < height ? load_part(from + i * columns, width) : Vec{};
  transpose(v);
  for (int i = 0; i < width; ++i) store_part(to + i * rows, v[i], height);
}

template <typename T>
void convert(Items& items, void* context) {
  const ConvertParams& p = *static_cast<const ConvertParams*>(context);
  const int64_t pixels = int64_t{p.height} * p.width, blocks = div_up(pixels, kLanes);
  for_each_unit(items, [&](int64_t unit) {  // a vector of pixels, as threads share maps by rows
    const int64_t image = unit / blocks * p.channels * pixels, pixel = unit % blocks * kLanes;
    const T* from = static_cast<const T*>(p.from) + image;
    T* to = static_cast<T*>(p.to) + image;
    for (int64_t c = 0; c < p.channels; c += kLanes) {
      if (p.to_channels_last) {
        transpose_square(from, p.channels, pixels, c, pixel, to);
      } else {
        transpose_square(from, pixels, p.channels, pixel, c, to);
      }
    }
  });
}

inline void convert(const ConvertParams& p, int threads) {
  const int64_t pixels = int64_t{p.height} * p.width;
  const double numbers = static_cast<double>(p.batch) * p.channels * static_cast<double>(pixels);
  ConvertParams params = p;
  run(threads, p.batch * div_up(pixels, kLanes), 4 * numbers, GHOSTFUSED_BY_PATH(p.path, convert), &params);
}

constexpr int64_t kRun = 4096;  // numbers of a unit

// run(from, stride, to, count) of all numbers, ``bytes`` of them each where they go.
template <typename From, typename Run>
GHOSTFUSED_INLINE void for_each_run(Items& items, const CastParams& p, int64_t bytes, const Run& run) {
  const int64_t runs = div_up(p.sizes[3], kRun);
  for_each_unit(items, [&](int64_t unit) {
    const int64_t row = unit / runs, first = unit % runs * kRun;
    const int64_t from = row / (p.sizes[1] * p.sizes[2]) * p.strides[0] + row / p.sizes[2] % p.sizes[1] * p.strides[1] +
                         row % p.sizes[2] * p.strides[2] + first * p.strides[3];
    run(static_cast<const From*>(p.from) + from, p.strides[3],
        static_cast<char*>(p.to) + (row * p.sizes[3] + first) * bytes, min_of(p.sizes[3] - first, kRun));
  });
}

inline void run_numbers(int threads, const CastParams& p, double work, Body body, void* context) {
  const int64_t rows = p.sizes[0] * p.sizes[1] * p.sizes[2];
  run(threads, rows * div_up(p.sizes[3], kRun), work * static_cast<double>(rows * p.sizes[3]), body, context);
}

template <typename From, typename To>
void cast_run(const From* from, int64_t stride, void* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int lanes = min_of<int64_t>(count - i, kLanes);
    store_part(static_cast<To*>(to) + i, load_strided(from + i * stride, stride, lanes), lanes);
  }
}

template <typename From>
void cast(Items& items, void* context) {
  const CastParams& p = *static_cast<const CastParams*>(context);
  const auto run = p.to_path == Path::kFloat16    ? cast_run<From, Float16>
                   : p.to_path == Path::kBFloat16 ? cast_run<From, BFloat16>
                                                  : cast_run<From, float>;
  for_each_run<From>(items, p, p.to_path == Path::kFloat32 ? 4 : 2, run);
}

inline void cast(const CastParams& p, int threads) {
  CastParams params = p;
  run_numbers(threads, p, 4, GHOSTFUSED_BY_PATH(p.from_path, cast), &params);
}

template <typename T>
void gate(Items& items, void* context) {
  const GateParams& p = *static_cast<const GateParams*>(context);
  for_each_run<T>(items, p, sizeof(T), [&](const T* from, int64_t stride, void* to, int64_t count) {
    T* const out = static_cast<T*>(to);
    constexpr int kCount = kInTurn;
    int64_t i = 0;
    for (; stride == 1 && i + kCount * kLanes <= count; i += kCount * kLanes) {
      Vec v[kCount];
      for (int j = 0; j < kCount; ++j) v[j] = load_float(from + i + j * kLanes);
      through_gate(v, p.gate);
      for (int j = 0; j < kCount; ++j) store_float(out + i + j * kLanes, v[j]);
    }
    for (; i < count; i += kLanes) {
      const int lanes = min_of<int64_t>(count - i, kLanes);
      Vec v[1] = {load_strided(from + i * stride, stride, lanes)};
      through_gate(v, p.gate);
      store_part(out + i, v[0], lanes);
    }
  });
}

inline void gate(const GateParams& p, int threads) {
  GateParams params = p;
  run_numbers(threads, p, p.gate == Gate::kSigmoid ? 16 : 4, GHOSTFUSED_BY_PATH(p.from_path, gate), &params);
}

struct ConcatTask {
  const ConcatParams& p;
  int64_t block;  // pixels of a unit
};

// Pixels of all channels of a part.
template <typename T>
void copy_part(const Tensor4& from, const Tensor4& to, int64_t channels, int64_t width, int64_t first, int64_t pixels) {
  const T* const in = static_cast<const T*>(from.data);
  T* const out = static_cast<T*>(to.data);
  const bool flat = from.stride_h == width * from.stride_w && to.stride_h == width * to.stride_w;
  const int64_t run = flat ? pixels : 1;  // pixels at one stride
  for (int64_t done = 0; done < pixels; done += run) {
    const int64_t h = (first + done) / width, w = (first + done) % width;
    const T* const row = in + h * from.stride_h + w * from.stride_w;
    T* const to_row = out + h * to.stride_h + w * to.stride_w;
    if (from.stride_c == 1 && to.stride_c == 1) {
      for (int64_t i = 0; i < run; ++i) {
        copy_run(to_row + i * to.stride_w, row + i * from.stride_w, channels * static_cast<int64_t>(sizeof(T)));
      }
    } else if (from.stride_w == 1 && to.stride_w == 1 && from.stride_c == run && to.stride_c == run) {
      copy_run(to_row, row, channels * run * static_cast<int64_t>(sizeof(T)));
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        const T* const in_run = row + c * from.stride_c;
        T* const out_run = to_row + c * to.stride_c;
        if (from.stride_w == 1 && to.stride_w == 1) {
          copy_run(out_run, in_run, run * static_cast<int64_t>(sizeof(T)));
        } else {
          for (int64_t i = 0; i < run; ++i) out_run[i * to.stride_w] = in_run[i * from.stride_w];
        }
      }
    }
  }
}

template <typename T>
void concat(Items& items, void* context) {
  const ConcatTask& task = *static_cast<const ConcatTask*>(context);
  const ConcatParams& p = task.p;
  const int64_t pixels = int64_t{p.height} * p.width, blocks = div_up(pixels, task.block);
  const auto image_of = [](Tensor4 t, int64_t n) {
    t.data = static_cast<T*>(t.data) + n * t.stride_n;
    return t;
  };
  for_each_unit(items, [&](int64_t unit) {
    const int64_t n = unit / blocks, first = unit % blocks * task.block;
    Tensor4 to = image_of(p.out, n);
    for (int i = 0; i < ConcatParams::kParts && p.parts[i].data; ++i) {
      const Tensor4 part = image_of(p.parts[i], n);
      if (part.data != to.data) {  // else it was made in place
        copy_part<T>(part, to, p.channels[i], p.width, first, min_of(pixels - first, task.block));
      }
      to.data = static_cast<T*>(to.data) + p.channels[i] * to.stride_c;
    }
  });
}

inline void concat(const ConcatParams& p, int threads) {
  const int64_t pixels = int64_t{p.height} * p.width;
  int64_t channels = 0;
  for (const int part : p.channels) channels += part;
  const double numbers = static_cast<double>(p.batch) * static_cast<double>(channels) * static_cast<double>(pixels);
  ConcatTask task{p, threads == 1 ? pixels : 128};  // a whole map of a part lies together
  // bytes, whatever they stand for
  const auto body = p.path == Path::kFloat32 ? concat<float> : concat<BFloat16>;
  run(threads, p.batch * div_up(pixels, task.block), 4 * numbers, body, &task);
}

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
