// A Ghost module's forward: how a thread does its units of work. Each .cpp file that includes this compiles it for
// one instruction set.
#pragma once

#include "output.h"
#include "plan.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

template <typename T, bool kChannelsLast>
class Worker {
 public:
  Worker(const GhostForwardParams& params, const Plan& plan)
      : p(params),
        s(params.shape),
        plan(plan),
        at(scratch_layout(s, plan)),
        scratch(thread_scratch(at.total + plan.blocks)),
        block_ready(scratch + at.total),
        multiply_kernels() {
    for (int64_t b = 0; b < plan.blocks; ++b) block_ready[b] = 0.f;
    for (int vecs = 1; vecs <= kMaxVecs; ++vecs) {
      for (int rows = 1; rows <= kMaxRows; ++rows) {
        multiply_kernels[rows][vecs] = multiply_kernel<!kChannelsLast>(rows, vecs);
      }
    }
  }

  // Units follow each other block by block, then tile by tile, so that x stays in cache and is packed once.
  void run(int64_t begin, int64_t end) {
    int64_t packed = -1;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t tile = unit / plan.blocks, block = unit % plan.blocks;
      output.n = tile / plan.tiles;
      h0 = tile % plan.tiles * plan.rows;
      h1 = min_of<int64_t>(h0 + plan.rows, s.height);
      c0 = block * plan.block;
      channels = min_of<int64_t>(plan.block, s.init_channels - c0);
      x_h0 = max_of<int64_t>(h0 - pad, 0);
      if (plan.pack_x && tile != packed) pack_x();
      packed = tile;
      parameters = scratch + at.blocks + block * at.block_size;
      if (block_ready[block] == 0.f) prepare_block();
      block_ready[block] = 1.f;
      run_unit();
    }
  }

 private:
  void run_unit() {
    float* x1 = scratch + at.x1;
    if (kChannelsLast) zero_columns(x1);
    const int64_t size = kChannelsLast ? 1 : channels;
    int64_t done = x_h0;  // the rows of x1 before this one are made
    for (int64_t h = h0; h < h1; h += plan.chunk) {
      const int64_t last = min_of(h + plan.chunk, h1);
      const int64_t top = h - pad;  // the image row at the top of the chunk
      if (h != h0 && pad) {
        for (int64_t c = 0; c < size; ++c) {
          float* channel = x1 + c * at.x1_channel;
          __builtin_memmove(channel, channel + plan.chunk * at.x1_row, 2 * pad * at.x1_row * sizeof(float));
        }
      }
      const int64_t until = min_of<int64_t>(last + pad, s.height);
      // the tile's own rows go to the output as well
      const int64_t first = max_of(done, h0), own = max_of(min_of(until, h1), first);
      const bool direct = can_store_directly();
      primary(done, first, top, false);
      primary(first, own, top, direct);
      primary(own, until, top, false);
      // zeros, not act(shift), outside the image
      for (int64_t c = 0; c < size; ++c) {
        float* channel = x1 + c * at.x1_channel;
        zero(channel, max_of<int64_t>(-top, 0) * at.x1_row * (h == h0));
        zero(channel + (until - top) * at.x1_row, (last + pad - until) * at.x1_row);
      }
      if (!direct) store_x1(first, own, top);
      done = until;
      cheap(h, last);
    }
  }

  static void zero(float* p, int64_t count) { __builtin_memset(p, 0, count * sizeof(float)); }

  void zero_columns(float* x1) {
    for (int64_t row = 0; row < plan.chunk + 2 * pad; ++row, x1 += at.x1_row) {
      zero(x1, pad * plan.padded_block);
      zero(x1 + (pad + s.width) * plan.padded_block, pad * plan.padded_block);
    }
  }

  // Whether the multiplication writes whole vectors of nothing but x1's place in the output.
  bool can_store_directly() const {
    if (sizeof(T) != sizeof(float) || !output.plain) return false;
    return kChannelsLast ? channels == plan.padded_block : !plan.pack_x;
  }

  // x1 of the image rows begin … end - 1.
  void primary(int64_t begin, int64_t end, int64_t top, bool store_too) {
    if (begin >= end) return;
    float* x1 = scratch + at.x1 + (begin - top) * at.x1_row;
    const float* norm = parameters + at.block_norms;
    Panel panel{};
    panel.depth = s.in_channels;
    panel.scale = norm;
    panel.shift = norm + plan.padded_block;
    panel.slope = norm + 2 * plan.padded_block;
    panel.act = p.primary.act;
    const float* x = static_cast<const float*>(p.x.data) + output.n * p.x.stride_n + begin * p.x.stride_h;
    int64_t x_h = p.x.stride_h, x_w = p.x.stride_w, x_c = p.x.stride_c;
    if (plan.pack_x) {
      x_w = kChannelsLast ? at.packed_x_row : 1;
      x_h = s.width * x_w;
      x_c = kChannelsLast ? 1 : at.packed_x_row;
      x = scratch + at.packed_x + (begin - x_h0) * x_h;
    }
    if constexpr (kChannelsLast) {
      panel.b = parameters + at.block_weight;
      panel.b_row = plan.padded_block;
      panel.a_row = x_w;
      panel.x1_row = plan.padded_block;
      panel.out_row = p.out.stride_w;
      const int64_t panels = div_up(s.width, kMaxRows);
      for (int64_t h = begin; h < end; ++h, x += x_h, x1 += at.x1_row) {
        for (int64_t i = 0; i < panels; ++i) {
          const int64_t w = i * s.width / panels, rows = (i + 1) * s.width / panels - w;
          panel.a = x + w * x_w;
          panel.x1 = x1 + (pad + w) * plan.padded_block;
          if (store_too) panel.out = reinterpret_cast<float*>(output.at(c0, h, w));
          multiply_kernels[rows][plan.padded_block / kLanes](panel);
        }
      }
    } else {
      panel.a = static_cast<const float*>(p.primary_weight) + c0 * p.primary_weight_stride_n;
      panel.a_row = p.primary_weight_stride_n;
      if (plan.pack_weight) panel.a = parameters + at.block_weight, panel.a_row = s.in_channels;
      panel.b_row = x_c;
      panel.x1_row = at.x1_channel;
      panel.out_row = p.out.stride_c;
      float* out = reinterpret_cast<float*>(output.at(c0, begin, 0));
      const auto run = [&](int64_t pixel, int64_t vecs) {
        panel.b = x + pixel;
        panel.x1 = x1 + pixel;
        if (store_too) panel.out = out + pixel;
        multiply_kernels[channels][vecs](panel);
      };
      const int64_t pixels = (end - begin) * s.width, vecs = div_up(pixels, kLanes), panels = div_up(vecs, kMaxVecs);
      for (int64_t i = 0; i < panels; ++i) {
        const int64_t first = i * vecs / panels, count = (i + 1) * vecs / panels - first;
        const int64_t beyond = (first + count) * kLanes - pixels;
        if (beyond <= 0 || plan.pack_x) {
          run(first * kLanes, count);
        } else if (first * kLanes >= beyond) {  // the last vector ends where x does, and makes some pixels anew
          run(first * kLanes - beyond, count);
        } else {
          run(0, count - 1);
          run(pixels - kLanes, 1);
        }
      }
    }
  }

  void store_x1(int64_t begin, int64_t end, int64_t top) const {
    const float* x1 = scratch + at.x1 + (begin - top) * at.x1_row;
    if constexpr (kChannelsLast) {
      for (int64_t h = begin; h < end; ++h, x1 += at.x1_row) {
        for (int64_t w = 0; w < s.width; ++w) store_run(x1 + (pad + w) * plan.padded_block, channels, c0, h, w);
      }
    } else if (output.plain) {  // rows follow each other without a gap
      for (int64_t c = 0; c < channels; ++c) {
        store_run(x1 + c * at.x1_channel, (end - begin) * s.width, c0 + c, begin, 0);
      }
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t h = begin; h < end; ++h) {
          store_run(x1 + c * at.x1_channel + (h - begin) * at.x1_row, s.width, c0 + c, h, 0);
        }
      }
    }
  }

  // ``count`` numbers that lie next to each other both here and in the output.
  void store_run(const float* from, int64_t count, int64_t c, int64_t h, int64_t w) const {
    const auto put = [&](int64_t i, int lanes) {
      output.put(load(from + i), kChannelsLast ? c + i : c, h, kChannelsLast ? w : w + i, lanes);
    };
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) put(i, kLanes);
    if (i == count) return;
    if (count >= kLanes) {
      put(count - kLanes, kLanes);
    } else {
      put(i, count - i);
    }
  }

  // x2 of the image rows begin … end - 1, whose x1 begins at the top of the chunk.
  void cheap(int64_t begin, int64_t end) {
    const int64_t d = s.dw_size, cheap_per_channel = s.ratio - 1;
    Walk walk{};
    walk.act = p.cheap.act;
    for (int64_t j = 0; j < cheap_per_channel; ++j) {
      const float* weight = parameters + at.block_cheap + j * d * d * plan.padded_block;
      const float* norm = parameters + at.block_norms + (1 + j) * 3 * plan.padded_block;
      // channels whose ghost is not cut off
      const int64_t room = s.out_channels - s.init_channels - j;
      const int64_t valid = min_of(channels, div_up(max_of<int64_t>(room, 0), cheap_per_channel) - c0);
      if constexpr (kChannelsLast) {
        walk.walk = plan.padded_block;
        walk.cross = at.x1_row;
        walk.weight_step = plan.padded_block;
        for (int64_t v = 0; v < valid; v += kLanes) {
          int64_t lanes = min_of<int64_t>(valid - v, kLanes);
          int64_t first = v;
          if (lanes < kLanes && valid >= kLanes) first = valid - kLanes, lanes = kLanes;
          set_norm<false>(walk, norm + first);
          walk.weight = weight + first;
          for (int64_t h = begin; h < end; ++h) {
            walk.x1 = scratch + at.x1 + (h - begin) * at.x1_row + first;
            walk.steps = s.width;
            run_walk<false>(walk, lanes, s.init_channels + (c0 + first) * cheap_per_channel + j, h, 0);
          }
        }
      } else {
        Vec splat_weight[49];
        walk.walk = at.x1_row;
        walk.cross = 1;
        walk.weight = reinterpret_cast<const float*>(splat_weight);
        walk.weight_step = kLanes;
        walk.steps = end - begin;
        for (int64_t c = 0; c < valid; ++c) {
          for (int64_t tap = 0; tap < d * d; ++tap) splat_weight[tap] = splat(weight[tap * plan.padded_block + c]);
          set_norm<true>(walk, norm + c);
          for (int64_t w = 0; w < s.width; w += kLanes) {
            const int64_t lanes = min_of<int64_t>(s.width - w, kLanes);
            const int64_t first = lanes < kLanes && s.width >= kLanes ? s.width - kLanes : w;
            walk.x1 = scratch + at.x1 + c * at.x1_channel + first - pad;
            const int64_t out_c = s.init_channels + (c0 + c) * cheap_per_channel + j;
            if (first >= pad && first + kLanes + pad <= s.width) {
              run_walk<false>(walk, kLanes, out_c, begin, first);
            } else {
              Ints mask[7], column;
              for (int i = 0; i < kLanes; ++i) column[i] = static_cast<int>(i + first - pad);
              for (int64_t i = 0; i < d; ++i, column += 1) mask[i] = (column >= 0) & (column < s.width);
              walk.mask = mask;
              run_walk<true>(walk, min_of<int64_t>(s.width - first, kLanes), out_c, begin, first);
            }
          }
        }
      }
    }
  }

  template <bool kSplat>
  void set_norm(Walk& walk, const float* norm) const {
    const int64_t next = plan.padded_block;
    walk.scale = kSplat ? splat(norm[0]) : load(norm);
    walk.shift = kSplat ? splat(norm[next]) : load(norm + next);
    walk.slope = kSplat ? splat(norm[2 * next]) : load(norm + 2 * next);
  }

  // The walk's outputs begin at (c, h, w) and have ``lanes`` numbers each.
  template <bool kMasked>
  void run_walk(Walk& walk, int64_t lanes, int64_t c, int64_t h, int64_t w) const {
    const Depthwise kernel = depthwise_kernel<kMasked>(s.dw_size);
    const int step = kChannelsLast ? s.ratio - 1 : 1;
    int64_t direct = 0;  // the steps that can go straight to the output
    if constexpr (sizeof(T) == sizeof(float)) {
      walk.out = reinterpret_cast<float*>(output.at(c, h, w));
      walk.out_walk = kChannelsLast ? p.out.stride_w : p.out.stride_h;
      if (output.plain && step == 1) {
        direct = walk.steps;
        // short rows: what is written past a row's end, the next row overwrites, but for the last ones
        if (lanes < kLanes) direct = kChannelsLast ? 0 : max_of<int64_t>(walk.steps - div_up(kLanes, s.width) + 1, 0);
      }
    }
    const int64_t staged = walk.steps - direct;
    if (direct) {
      walk.steps = direct;
      kernel(walk);
    }
    if (staged) {
      Walk rest = walk;
      rest.steps = staged;
      rest.x1 += direct * walk.walk;
      rest.out = scratch + at.stage;
      rest.out_walk = kLanes;
      kernel(rest);
      for (int64_t i = 0; i < staged; ++i) {
        const int64_t at_step = direct + i;
        output.put(load(rest.out + i * kLanes), c, kChannelsLast ? h : h + at_step, kChannelsLast ? w + at_step : w,
                   lanes, step);
      }
    }
    walk.steps = direct + staged;
  }

  // The tile's x with its halo, as fp32, through the input gate.
  void pack_x() {
    const int64_t pixels = (min_of<int64_t>(h1 + pad, s.height) - x_h0) * s.width;
    const T* x = static_cast<const T*>(p.x.data) + output.n * p.x.stride_n + x_h0 * p.x.stride_h;
    const T* gate = static_cast<const T*>(p.input_gate) + (p.input_gate ? output.n * p.input_gate_stride_n : 0);
    float* to = scratch + at.packed_x;
    const bool flat = s.height == 1 || p.x.stride_h == s.width * p.x.stride_w;
    const auto gated = [&](Vec v, Vec factor) {
      v *= factor;
      if constexpr (sizeof(T) == sizeof(float)) {
        return v;
      } else {
        return widen(narrow(v, T{}), T{});  // x * gate is rounded, as in PyTorch
      }
    };
    if constexpr (kChannelsLast) {
      for (int64_t i = 0; i < pixels; ++i, to += at.packed_x_row) {
        const T* from = x + i / s.width * p.x.stride_h + i % s.width * p.x.stride_w;
        const auto get = [&](const T* q, int64_t stride, int64_t k, int count) {
          if (stride == 1 && count == kLanes) return load_float(q + k);
          return gather(q + k * stride, stride, count);
        };
        for (int64_t k = 0; k < s.in_channels; k += kLanes) {
          const int count = min_of<int64_t>(s.in_channels - k, kLanes);
          Vec v = get(from, p.x.stride_c, k, count);
          if (gate) v = gated(v, get(gate, p.input_gate_stride_c, k, count));
          if (count == kLanes) {
            store(to + k, v);
          } else {
            store_part(to + k, v, count);
          }
        }
      }
    } else {
      for (int64_t k = 0; k < s.in_channels; ++k, to += at.packed_x_row) {
        const Vec factor = splat(gate ? to_float(gate[k * p.input_gate_stride_c]) : 1.f);
        const T* from = x + k * p.x.stride_c;
        const int64_t run = flat ? pixels : s.width;  // pixels at one stride
        for (int64_t begin = 0; begin < pixels; begin += run, from += p.x.stride_h) {
          for (int64_t i = 0; i < run; i += kLanes) {
            const int count = min_of<int64_t>(run - i, kLanes);
            const T* q = from + i * p.x.stride_w;
            Vec v = p.x.stride_w == 1 && count == kLanes ? load_float(q) : gather(q, p.x.stride_w, count);
            if (gate) v = gated(v, factor);
            store(to + begin + i, v);
          }
        }
      }
    }
  }

  static Vec gather(const T* p, int64_t stride, int count) {
    Vec v{};
    for (int i = 0; i < count; ++i) v[i] = to_float(p[i * stride]);
    return v;
  }

  // The weights and norms of the block's channels, as the kernels read them.
  void prepare_block() {
    const int64_t padded = plan.padded_block, d = s.dw_size, cheap_per_channel = s.ratio - 1;
    float* weight = parameters + at.block_weight;
    if (plan.pack_weight) {
      const T* from = static_cast<const T*>(p.primary_weight) + c0 * p.primary_weight_stride_n;
      const int64_t to_c = kChannelsLast ? 1 : s.in_channels, to_k = kChannelsLast ? padded : 1;
      if (kChannelsLast) zero(weight, padded * s.in_channels);
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t k = 0; k < s.in_channels; ++k) {
          weight[c * to_c + k * to_k] = to_float(from[c * p.primary_weight_stride_n + k * p.primary_weight_stride_k]);
        }
      }
    }
    float* norm = parameters + at.block_norms;
    zero(norm, (1 + cheap_per_channel) * 3 * padded);
    prepare_norm(p.primary, norm, c0, 1);
    for (int64_t j = 0; j < cheap_per_channel; ++j) {
      prepare_norm(p.cheap, norm + (1 + j) * 3 * padded, c0 * cheap_per_channel + j, cheap_per_channel);
      // (tap, channel); the taps in the order that the walk meets them
      float* to = parameters + at.block_cheap + j * d * d * padded;
      zero(to, d * d * padded);
      for (int64_t c = 0; c < channels; ++c) {
        const T* from =
            static_cast<const T*>(p.cheap_weight) + ((c0 + c) * cheap_per_channel + j) * p.cheap_weight_stride_c;
        for (int64_t h = 0; h < d; ++h) {
          for (int64_t w = 0; w < d; ++w) {
            const int64_t tap = kChannelsLast ? w * d + h : h * d + w;
            to[tap * padded + c] = to_float(from[h * p.cheap_weight_stride_h + w * p.cheap_weight_stride_w]);
          }
        }
      }
    }
  }

  // (scale, shift, slope) of the block's channels, with norm(y + bias) = y * scale + shift. In double, since what is
  // rounded here counts most where y * scale and shift nearly cancel.
  void prepare_norm(const NormAct& half, float* to, int64_t first, int64_t step) const {
    const auto get = [](const ChannelVector& v, int64_t c, bool is_float32) {
      return is_float32 ? static_cast<const float*>(v.data)[c * v.stride]
                        : to_float(static_cast<const T*>(v.data)[c * v.stride]);
    };
    for (int64_t i = 0; i < channels; ++i) {
      const int64_t c = first + i * step;
      double scale = 1, shift = 0;
      if (half.mean.data) {
        scale = 1 / __builtin_sqrt(get(half.var, c, half.norm_is_float32) + double{half.eps});
        if (half.gamma.data) scale *= get(half.gamma, c, half.norm_is_float32);
        shift = -get(half.mean, c, half.norm_is_float32) * scale;
        if (half.beta.data) shift += get(half.beta, c, half.norm_is_float32);
      }
      if (half.bias.data) shift += get(half.bias, c, false) * scale;
      to[i] = static_cast<float>(scale);
      to[i + plan.padded_block] = static_cast<float>(shift);
      to[i + 2 * plan.padded_block] = half.act == Act::kPReLU ? get(half.slope, c, false) : half.negative_slope;
    }
  }

  const GhostForwardParams& p;
  const GhostShape& s;
  const Plan& plan;
  const Scratch at;
  float* const scratch;
  float* const block_ready;  // per block: 1 once its parameters are prepared
  const int64_t pad = s.dw_size / 2;
  Multiply multiply_kernels[kMaxRows + 1][kMaxVecs + 1];
  Output<T> output{p, 0, !p.residual.data && !p.output_gate.data};

  // the current unit
  int64_t h0, h1, x_h0, c0, channels;
  float* parameters;
};

struct Task {
  const GhostForwardParams& p;
  const Plan& plan;
};

template <typename T>
void run_units(int64_t begin, int64_t end, void* context) {
  const Task& task = *static_cast<const Task*>(context);
  if (task.p.shape.channels_last) {
    Worker<T, true>(task.p, task.plan).run(begin, end);
  } else {
    Worker<T, false>(task.p, task.plan).run(begin, end);
  }
}

inline void forward(const GhostForwardParams& p, const Threads& threads) {
  const GhostShape& s = p.shape;
  const Plan plan = make_plan(p, threads.count);
  Task task{p, plan};
  const Body body = s.path == Path::kFloat16    ? run_units<Float16>
                    : s.path == Path::kBFloat16 ? run_units<BFloat16>
                                                : run_units<float>;
  const double work = static_cast<double>(s.batch) * s.height * s.width * s.init_channels *
                      (s.in_channels + s.dw_size * s.dw_size * (s.ratio - 1));
  if (threads.count == 1 || plan.units == 1 || work < kSerialWork) {
    body(0, plan.units, &task);
  } else {
    threads.parallel_for(plan.units, body, &task);
  }
}

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
