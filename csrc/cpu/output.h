// Stores results: to x's type, through the output gate and the residual where there are any.
#pragma once

#include "cpu/output_gate.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

template <typename T, bool kChannelsLast>
struct Output {
  const GhostForwardParams& p;
  int64_t n = 0;  // the image
  bool plain;     // no gate, and no residual but one whose vectors can be loaded where the output's are stored
  OutputGate<T, kChannelsLast> gate;

  // ``memory``: the gate's.
  Output(const GhostForwardParams& p, float* memory)
      : p(p), plain(!p.output_gate.data && (!p.residual.data || residual_matches())), gate(p, memory) {}

  T* at(int64_t c, int64_t h, int64_t w) const { return static_cast<T*>(p.out.data) + offset(p.out, c, h, w); }

  const T* residual_at(int64_t c, int64_t h, int64_t w) const {
    return p.residual.data ? static_cast<const T*>(p.residual.data) + offset(p.residual, c, h, w) : nullptr;
  }

  // channels_last: ``lanes`` numbers of y, channels c, c + step, … of a pixel.
  void store(Vec y, int64_t c, int64_t h, int64_t w, int lanes, int step = 1) const {
    static_assert(kChannelsLast);
    if (gate) y *= gate.of_pixel(n, c, h, w, lanes, step);
    if (p.residual.data) y += load_strided(residual_at(c, h, w), step * p.residual.stride_c, lanes);
    store_part(at(c, h, w), y, lanes, step);
  }

  // Whole vectors of y that follow each other, to ``to`` and further places ``to_step`` apart. Only where plain.
  static void store_whole(const float* y, int64_t vecs, T* to, int64_t to_step, const T* residual,
                          int64_t residual_step) {
    if (!residual) {
      for (int64_t i = 0; i < vecs; ++i) store_float(to + i * to_step, load(y + i * kLanes));
    } else {
      for (int64_t i = 0; i < vecs; ++i) {
        store_float(to + i * to_step, load(y + i * kLanes) + load_float(residual + i * residual_step));
      }
    }
  }

  // ``count`` numbers of y that lie next to each other both there and in the output: unless it is plain, channels of a
  // pixel or pixels of a row.
  void store_run(const float* y, int64_t count, int64_t c, int64_t h, int64_t w) {
    const float* gate_row = nullptr;
    if constexpr (!kChannelsLast) {
      if (gate) gate_row = gate.row(n, c, h) + w;
    }
    const auto part = [&](int64_t i, int lanes) {
      Vec v = load(y + i);
      if constexpr (kChannelsLast) {
        store(v, c + i, h, w, lanes);
      } else {
        if (gate_row) v *= load(gate_row + i);
        if (p.residual.data) v += load_strided(residual_at(c, h, w + i), p.residual.stride_w, lanes);
        store_part(at(c, h, w + i), v, lanes);
      }
    };
    int64_t i = 0;
    if (plain) {
      i = count / kLanes * kLanes;
      store_whole(y, count / kLanes, at(c, h, w), kLanes, residual_at(c, h, w), kLanes);
    }
    for (; i + kLanes <= count; i += kLanes) part(i, kLanes);
    if (i == count) return;
    if (count >= kLanes) {
      part(count - kLanes, kLanes);
    } else {
      part(i, count - i);
    }
  }

 private:
  bool residual_matches() const {
    const Tensor4 &a = p.residual, &b = p.out;
    return kChannelsLast ? a.stride_c == 1 : a.stride_w == 1 && a.stride_h == b.stride_h;
  }

  int64_t offset(const Tensor4& t, int64_t c, int64_t h, int64_t w) const {
    return n * t.stride_n + c * t.stride_c + h * t.stride_h + w * t.stride_w;
  }
};

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
