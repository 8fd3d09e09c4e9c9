// Maxima under a square window, whose border never wins: along each row, and then of the last rows' results.
#pragma once

#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

// Numbers as integers that are ordered alike, NaN above infinity: their maximum takes one instruction, keeps NaN,
// and leaves subnormals as they are.
template <typename T>
struct KeysOf {  // of two bytes
  using Key = int16_t;
  typedef int16_t Keys __attribute__((vector_size(4 * kLanes)));
  static constexpr int16_t kInfinity = std::is_same_v<T, Float16> ? 0x7c00 : 0x7f80, kLargest = 0x7fff;
};
template <>
struct KeysOf<float> {
  using Key = int32_t;
  using Keys = Ints;
  static constexpr int32_t kInfinity = 0x7f800000, kLargest = 0x7fffffff;
};

template <typename T, bool kChannelsLast>
class MaxPool {
  using Key = typename KeysOf<T>::Key;
  using Keys = typename KeysOf<T>::Keys;
  static constexpr int kCount = sizeof(Keys) / sizeof(Key);
  static constexpr int64_t kColumn = kChannelsLast ? kCount : 1;  // keys from a column to the next

 public:
  explicit MaxPool(const PoolParams& p)
      : p(p),
        half(p.kernel / 2),
        columns(min_of<int64_t>(p.out_width, kTile)),
        ring_row(div_up(columns * kColumn, kCount) * kCount),
        // whole vectors are read of it
        row_size(div_up((ring_row - kColumn) * p.stride + p.kernel * kColumn + 2 * kCount, kCount) * kCount),
        row(reinterpret_cast<Key*>(
            thread_scratch(div_up((row_size + p.kernel * ring_row) * int64_t{sizeof(Key)}, sizeof(float))))),
        ring(row + row_size) {}

  static constexpr int64_t kUnitChannels = kChannelsLast ? 4 * kCount : 4;

  // Rows of the result, of channels of which there are at least a vector or all.
  void run(int64_t n, int64_t channel, int64_t end_channel, int64_t begin, int64_t end) {
    const T* const x = static_cast<const T*>(p.x.data) + n * p.x.stride_n;
    T* const out = static_cast<T*>(p.out.data) + n * p.out.stride_n;
    const int64_t step = kChannelsLast ? kCount : 1;
    const int lanes = kChannelsLast ? min_of<int64_t>(end_channel - channel, kCount) : 0;
    for (int64_t c = channel; c < end_channel; c += step) {
      // the last vector ends where the channels do, over some of those before
      const int64_t at = kChannelsLast ? min_of(c, end_channel - lanes) : c;
      for (int64_t first = 0; first < p.out_width; first += columns) {
        rows(x + at * p.x.stride_c, out + at * p.out.stride_c, begin, end, first, lanes);
      }
    }
  }

 private:
  static constexpr int64_t kTile = kChannelsLast ? 64 : 256;  // columns of the result at a time
  static constexpr Key kLowest = static_cast<Key>(-KeysOf<T>::kInfinity - 1);

  // Its own inverse.
  static GHOSTFUSED_INLINE Keys turned(Keys v) {
    return v ^ ((v >> (8 * static_cast<int>(sizeof(T)) - 1)) & KeysOf<T>::kLargest);
  }
  static GHOSTFUSED_INLINE Keys keys_of(Keys v) {
    const Keys largest = Keys{} + KeysOf<T>::kLargest;
    return (v & largest) > KeysOf<T>::kInfinity ? largest : turned(v);
  }
  static GHOSTFUSED_INLINE Keys larger(Keys a, Keys b) { return a > b ? a : b; }

#ifdef GHOSTFUSED_X86_MASKS
#if GHOSTFUSED_LANES == 8
#define GHOSTFUSED_KEYS(name, bits) _mm256_##name##_epi##bits
  using Register = __m256i;
#else
#define GHOSTFUSED_KEYS(name, bits) _mm512_##name##_epi##bits
  using Register = __m512i;
#endif
  static GHOSTFUSED_INLINE Keys load_some(const T* p, int count) {
    const uint64_t mask = (uint64_t{1} << count) - 1;
    if constexpr (sizeof(T) == 4) return (Keys)GHOSTFUSED_KEYS(maskz_loadu, 32)(mask, p);
    return (Keys)GHOSTFUSED_KEYS(maskz_loadu, 16)(mask, p);
  }
  static GHOSTFUSED_INLINE void store_some(T* p, Keys v, int count) {
    const uint64_t mask = (uint64_t{1} << count) - 1;
    if constexpr (sizeof(T) == 4) return GHOSTFUSED_KEYS(mask_storeu, 32)(p, mask, (Register)v);
    GHOSTFUSED_KEYS(mask_storeu, 16)(p, mask, (Register)v);
  }
#undef GHOSTFUSED_KEYS
#else
  static GHOSTFUSED_INLINE Keys load_some(const T* p, int count) {
    T lanes[kCount] = {};
    copy_run(lanes, p, count * static_cast<int64_t>(sizeof(T)));
    return load<Keys>(lanes);
  }
  static GHOSTFUSED_INLINE void store_some(T* p, Keys v, int count) {
    copy_run(p, &v, count * static_cast<int64_t>(sizeof(T)));
  }
#endif

  static GHOSTFUSED_INLINE Keys load_keys(const T* p, int count) {
    return keys_of(count == kCount ? load<Keys>(p) : load_some(p, count));
  }
  static GHOSTFUSED_INLINE void store_keys(T* p, Keys keys, int count) {
    const Keys v = turned(keys);
    count == kCount ? store(p, v) : store_some(p, v, count);
  }

  void rows(const T* x, T* out, int64_t begin, int64_t end, int64_t first, int lanes) {
    const int64_t width = min_of(p.out_width - first, columns), left = first * p.stride - half;
    const int64_t from = max_of<int64_t>(left, 0);
    const int64_t count = min_of<int64_t>(left + (width - 1) * p.stride + p.kernel, p.width) - from;
    if (bordered != first) {
      for (int64_t i = 0; i < row_size; ++i) row[i] = kLowest;
      bordered = first;
    }
    int64_t made = 0;
    int slot = 0;  // of that row in the ring
    for (int64_t h = begin; h < end; ++h) {
      const int64_t top = max_of<int64_t>(h * p.stride - half, 0);
      const int64_t bottom = min_of<int64_t>(h * p.stride - half + p.kernel, p.height);
      for (made = max_of(made, top); made < bottom; ++made) {
        fill(x + made * p.x.stride_h + from * p.x.stride_w, count, row + (from - left) * kColumn, lanes);
        along(ring + slot * ring_row, width);
        if (++slot == p.kernel) slot = 0;
      }
      across(bottom - top, slot, out + h * p.out.stride_h + first * p.out.stride_w, width, lanes);
    }
  }

  // The keys of a row of x.
  void fill(const T* x, int64_t count, Key* to, int lanes) const {
    if constexpr (kChannelsLast) {
      for (int64_t w = 0; w < count; ++w) store(to + w * kCount, load_keys(x + w * p.x.stride_w, lanes));
      return;
    }
    if (p.x.stride_w == 1 && count >= kCount) {
      for (int64_t w = 0; w < count; w += kCount) {
        const int64_t at = min_of(w, count - kCount);
        store(to + at, keys_of(load<Keys>(x + at)));
      }
      return;
    }
    for (int64_t w = 0; w < count; w += kCount) {
      const int some = min_of<int64_t>(count - w, kCount);
      Keys keys;
      if (p.x.stride_w == 1) {
        keys = keys_of(load_some(x + w, some));
      } else {
        T each[kCount] = {};
        for (int i = 0; i < some; ++i) each[i] = x[(w + i) * p.x.stride_w];
        keys = keys_of(load<Keys>(each));
      }
      copy_run(to + w, &keys, some * static_cast<int64_t>(sizeof(Key)));
    }
  }

  // The largest of ``count`` vectors of keys, for vectors a gap apart.
  template <int kMany>
  static GHOSTFUSED_INLINE void maxima(const Key* from, int64_t gap, int64_t step, int64_t count, Keys (&best)[kMany]) {
#pragma GCC unroll 4
    for (int i = 0; i < kMany; ++i) best[i] = load<Keys>(from + i * gap);
    for (int64_t j = 1; j < count; ++j) {
      from += step;
#pragma GCC unroll 4
      for (int i = 0; i < kMany; ++i) best[i] = larger(best[i], load<Keys>(from + i * gap));
    }
  }

  // of two vectors
  static GHOSTFUSED_INLINE Keys even(Keys a, Keys b) {
#ifdef __clang__
    Keys v;
    for (int i = 0; i < kCount; ++i) v[i] = 2 * i < kCount ? a[2 * i] : b[2 * i - kCount];
    return v;
#else
    Keys at;
    for (int i = 0; i < kCount; ++i) at[i] = 2 * i;
    return __builtin_shuffle(a, b, at);
#endif
  }

  // The maxima of a row, those of the border included.
  void along(Key* to, int64_t width) const {
    const int64_t vectors = div_up(width * kColumn, kCount);
    const int64_t gap = kChannelsLast ? kCount * p.stride : kCount;
    int64_t i = 0;
    if (!kChannelsLast && p.stride == 2) {
      for (; i < vectors; ++i) {
        Keys best[2];
        maxima(row + i * 2 * kCount, kCount, 1, p.kernel, best);
        store(to + i * kCount, even(best[0], best[1]));
      }
      return;
    }
    for (; i + 4 <= vectors; i += 4) {
      Keys best[4];
      maxima(row + i * gap, gap, kColumn, p.kernel, best);
      for (int j = 0; j < 4; ++j) store(to + (i + j) * kCount, best[j]);
    }
    for (; i < vectors; ++i) {
      Keys best[1];
      maxima(row + i * gap, gap, kColumn, p.kernel, best);
      store(to + i * kCount, best[0]);
    }
  }

  // The maxima of the last rows in the ring, before ``slot``.
  template <int kMany>
  GHOSTFUSED_INLINE void ring_maxima(int64_t at, int64_t count, int64_t slot, Keys (&best)[kMany]) const {
    if (count == p.kernel) return maxima(ring + at, kCount, ring_row, count, best);
    if (slot >= count) return maxima(ring + (slot - count) * ring_row + at, kCount, ring_row, count, best);
    const int64_t before = count - slot;
    maxima(ring + (p.kernel - before) * ring_row + at, kCount, ring_row, before, best);
    if (slot == 0) return;
    Keys others[kMany];
    maxima(ring + at, kCount, ring_row, slot, others);
    for (int i = 0; i < kMany; ++i) best[i] = larger(best[i], others[i]);
  }

  void across(int64_t count, int64_t slot, T* out, int64_t width, int lanes) const {
    const int64_t keys = width * kColumn;
    int64_t i = 0;
    for (; i + 4 * kCount <= keys; i += 4 * kCount) {
      Keys best[4];
      ring_maxima(i, count, slot, best);
      for (int j = 0; j < 4; ++j) {
        if constexpr (kChannelsLast) {
          store_keys(out + (i / kCount + j) * p.out.stride_w, best[j], lanes);
        } else {
          store(out + i + j * kCount, turned(best[j]));
        }
      }
    }
    for (; i < keys; i += kCount) {
      Keys best[1];
      if constexpr (kChannelsLast) {
        ring_maxima(i, count, slot, best);
        store_keys(out + i / kCount * p.out.stride_w, best[0], lanes);
      } else {
        const int64_t at = keys < kCount ? 0 : min_of(i, keys - kCount);
        ring_maxima(at, count, slot, best);
        store_keys(out + at, best[0], min_of<int64_t>(keys, kCount));
      }
    }
  }

  const PoolParams& p;
  const int64_t half, columns, ring_row, row_size;
  Key* const row;   // of x, with its border
  Key* const ring;  // maxima along the last rows, one over the oldest
  int64_t bordered = -1;
};

template <typename T, bool kChannelsLast>
void max_pool_units(Items& items, const PoolTask& task) {
  using Pool = MaxPool<T, kChannelsLast>;
  const PoolParams& p = task.p;
  const int64_t parts = max_of<int64_t>(p.channels / Pool::kUnitChannels, 1);
  int64_t begin, end;
  if (!items.next(&begin, &end)) return;
  Pool pool(p);
  do {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t part = unit % parts, band = unit / parts % task.bands, n = unit / parts / task.bands;
      const int64_t channel = part * Pool::kUnitChannels;
      pool.run(n, channel, part + 1 == parts ? p.channels : channel + Pool::kUnitChannels,
               band * p.out_height / task.bands, (band + 1) * p.out_height / task.bands);
    }
  } while (items.next(&begin, &end));
}

template <typename T>
void max_pool(Items& items, void* context) {
  const PoolTask& task = *static_cast<const PoolTask*>(context);
  task.p.channels_last ? max_pool_units<T, true>(items, task) : max_pool_units<T, false>(items, task);
}

inline void max_pool(const PoolParams& p, int threads) {
  PoolTask task{p, row_bands(p.batch, p.out_height, threads)};
  const int64_t width = p.path == Path::kFloat32 ? kLanes : 2 * kLanes;
  const int64_t parts = max_of<int64_t>(p.channels / (p.channels_last ? 4 * width : 4), 1);
  const double numbers = static_cast<double>(p.batch) * p.channels * p.height * p.width;
  run(threads, p.batch * task.bands * parts, (2 * p.kernel + 8) * numbers, GHOSTFUSED_BY_PATH(p.path, max_pool), &task);
}

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
