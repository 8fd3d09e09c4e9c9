// Stores results: to x's type, through the output gate and the residual where there are any.
#pragma once

#include "cpu/vec.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

template <typename T>
struct Output {
  const GhostForwardParams& p;
  int64_t n = 0;  // the image
  bool plain;     // no gate, and no residual but one whose vectors can be loaded where the output's are stored

  Output(const GhostForwardParams& p) : p(p), plain(!p.output_gate.data && (!p.residual.data || residual_matches())) {}

  T* at(int64_t c, int64_t h, int64_t w) const { return static_cast<T*>(p.out.data) + offset(p.out, c, h, w); }

  const T* residual_at(int64_t c, int64_t h, int64_t w) const {
    return p.residual.data ? static_cast<const T*>(p.residual.data) + offset(p.residual, c, h, w) : nullptr;
  }

  // ``lanes`` numbers of y: pixels w, w + 1, … of channel c, or, in channels_last, channels c, c + step, … of a pixel.
  void put(Vec y, int64_t c, int64_t h, int64_t w, int lanes, int step = 1) const {
    if (p.output_gate.data || p.residual.data) y = gate_and_residual(y, c, h, w, lanes, step);
    store_part(at(c, h, w), y, lanes, step);
  }

  // Whole vectors of y that follow each other, to ``to`` and further places ``to_step`` apart. Only where plain.
  static void put_whole(const float* y, int64_t vecs, T* to, int64_t to_step, const T* residual,
                        int64_t residual_step) {
    if (!residual) {
      for (int64_t i = 0; i < vecs; ++i) store_float(to + i * to_step, load(y + i * kLanes));
    } else {
      for (int64_t i = 0; i < vecs; ++i) {
        store_float(to + i * to_step, load(y + i * kLanes) + load_float(residual + i * residual_step));
      }
    }
  }

  // ``count`` numbers of y that lie next to each other both there and in the output.
  void put_run(const float* y, int64_t count, int64_t c, int64_t h, int64_t w) const {
    const bool along_channels = p.shape.channels_last;
    const auto part = [&](int64_t i, int lanes) {
      put(load(y + i), along_channels ? c + i : c, h, along_channels ? w : w + i, lanes);
    };
    int64_t i = 0;
    if (plain) {
      i = count / kLanes * kLanes;
      put_whole(y, count / kLanes, at(c, h, w), kLanes, residual_at(c, h, w), kLanes);
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
    return p.shape.channels_last ? a.stride_c == 1 : a.stride_w == 1 && a.stride_h == b.stride_h;
  }

  int64_t offset(const Tensor4& t, int64_t c, int64_t h, int64_t w) const {
    return n * t.stride_n + c * t.stride_c + h * t.stride_h + w * t.stride_w;
  }

  Vec gate_and_residual(Vec y, int64_t c, int64_t h, int64_t w, int lanes, int step) const {
    const int64_t step_c = p.shape.channels_last ? step : 0, step_w = p.shape.channels_last ? 0 : 1;
    if (p.output_gate.data) {  // the index rule of F.interpolate(mode="nearest"), in float as there
      const float scale_h = static_cast<float>(p.gate_height) / p.shape.height;
      const float scale_w = static_cast<float>(p.gate_width) / p.shape.width;
      const T* gate = static_cast<const T*>(p.output_gate.data);
      const int64_t gate_h = min_of<int64_t>(static_cast<int64_t>(h * scale_h), p.gate_height - 1);
      for (int i = 0; i < lanes; ++i) {
        const int64_t gate_w = min_of<int64_t>(static_cast<int64_t>((w + i * step_w) * scale_w), p.gate_width - 1);
        y[i] *= to_float(gate[offset(p.output_gate, c + i * step_c, gate_h, gate_w)]);
      }
    }
    if (p.residual.data) {
      const T* residual = static_cast<const T*>(p.residual.data) + offset(p.residual, c, h, w);
      const int64_t stride = step_c * p.residual.stride_c + step_w * p.residual.stride_w;
      if (lanes == kLanes && stride == 1) {
        y += load_float(residual);
      } else {
        for (int i = 0; i < lanes; ++i) y[i] += to_float(residual[i * stride]);
      }
    }
    return y;
  }
};

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
