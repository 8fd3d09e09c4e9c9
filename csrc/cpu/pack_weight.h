// The 1×1 weights as the multiplication reads them.
#pragma once

#include "cpu/dispatch.h"
#include "cpu/fully_connected.h"
#include "cpu/patches.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

// Those of ``channels`` outputs from c0 on, through the input gate (null: none): (vector of channels, depth, channel)
// in channels_last, zeros after the last channel; (channel, depth) in NCHW.
template <typename T, bool kChannelsLast>
void pack_channels(const GhostForwardParams& p, const T* gate, int64_t c0, int64_t channels, int64_t depth, float* to) {
  constexpr int kPerLane = Operand<T, kChannelsLast>::kChannels;
  if (has_patches(p)) return pack_patch_channels<T, kChannelsLast>(p, c0, channels, depth, to);
  const T* from = static_cast<const T*>(p.primary_weight) + c0 * p.primary_weight_stride_n;
  const int64_t next = p.primary_weight_stride_n, stride = p.primary_weight_stride_k;
  const auto read = [&](int64_t c, int64_t k) {
    const int64_t first = k * kPerLane;
    return load_operand<kPerLane>(from + c * next + first * stride, stride, p.shape.in_channels - first);
  };
  if constexpr (kChannelsLast) {
    for (int64_t c = 0; c < channels; c += kLanes) {
      for (int64_t k = 0; k < depth; k += kLanes, to += kLanes * kLanes) {
        Vec v[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) v[i] = c + i < channels ? read(c + i, k) : Vec{};
        transpose(v);
        const int64_t count = min_of<int64_t>(depth - k, kLanes);
        to_operand_rows<T>(v);
        for (int64_t i = 0; i < count; ++i) store(to + i * kLanes, v[i]);
        to -= (kLanes - count) * kLanes;
      }
    }
  } else {
    for (int64_t c = 0; c < channels; ++c, to += depth) {
      for (int64_t k = 0; k < depth; k += kLanes) {
        const int count = min_of<int64_t>(depth - k, kLanes);
        Vec v = read(c, k);
        if (gate) v *= load_strided(gate + k * p.input_gate_stride_c, p.input_gate_stride_c, count);
        store_part(to + k, v, count);
      }
    }
  }
}

// ``count`` numbers that bfloat16 holds.
inline void to_bfloat16(const float* from, int64_t count, BFloat16* to) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int lanes = min_of<int64_t>(count - i, kLanes);
    store_part(to + i, load_part(from + i, lanes), lanes);
  }
}

template <typename T>
int64_t pack_weight(const GhostForwardParams& p, bool bfloat16, void* to) {
  const GhostShape& s = p.shape;
  bfloat16 &= std::is_same_v<T, float>;
  if (is_fully_connected(p)) {
    if (!bfloat16) return 0;
    if (to) {
      for (int64_t c = 0; c < s.init_channels; ++c) {
        to_bfloat16(static_cast<const float*>(p.primary_weight) + c * p.primary_weight_stride_n, s.in_channels,
                    static_cast<BFloat16*>(to) + c * s.in_channels);
      }
    }
    return int64_t{s.init_channels} * s.in_channels * sizeof(BFloat16);
  }
  const int64_t depth = depth_of(p);
  if (!s.channels_last) {
    if (!has_patches(p)) return 0;  // they are read as they lie, or change with a gate
    if (to) pack_channels<T, false>(p, nullptr, 0, s.init_channels, depth, static_cast<float*>(to));
    return s.init_channels * depth * sizeof(float);
  }
  const int64_t vectors = div_up(s.init_channels, kLanes);
  if (!to) {
  } else if (!bfloat16) {
    pack_channels<T, true>(p, nullptr, 0, s.init_channels, depth, static_cast<float*>(to));
  } else {
    float* vector = thread_scratch(depth * kLanes);
    for (int64_t i = 0; i < vectors; ++i) {
      const int64_t c = i * kLanes, channels = min_of<int64_t>(kLanes, s.init_channels - c);
      pack_channels<T, true>(p, nullptr, c, channels, depth, vector);
      to_bfloat16(vector, depth * kLanes, static_cast<BFloat16*>(to) + i * depth * kLanes);
    }
  }
  return vectors * depth * kLanes * (bfloat16 ? sizeof(BFloat16) : sizeof(float));
}

inline int64_t pack_weight(const GhostForwardParams& p, bool bfloat16, void* to) {
  return GHOSTFUSED_BY_PATH(p.shape.path, pack_weight)(p, bfloat16, to);
}

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
