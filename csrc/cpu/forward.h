// A Ghost module's forward: how a thread does its units of work. Each .cpp file that includes this compiles it for
// one instruction set.
#pragma once

#include "fully_connected.h"
#include "output.h"
#include "pack.h"
#include "parameters.h"
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
        block_image(reinterpret_cast<int32_t*>(scratch + at.total)),
        multiply_kernels(),
        output(params) {
    for (int64_t b = 0; b < plan.blocks; ++b) block_image[b] = -1;
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
      if (plan.pack_x && tile != packed) {
        const int64_t rows = min_of<int64_t>(h1 + pad, s.height) - x_h0;
        pack_x<T, kChannelsLast>(p, output.n, x_h0, rows, scratch + at.packed_x, at.packed_x_row);
      }
      packed = tile;
      parameters = scratch + at.blocks + block * at.block_size;
      int32_t& image = block_image[block];
      if (image < 0) prepare_block();
      if (plan.pack_weight && (image < 0 || (plan.gate_weight && image != output.n))) prepare_weight();
      image = static_cast<int32_t>(output.n);
      run_unit();
    }
  }

 private:
  void run_unit() {
    float* x1 = scratch + at.x1;
    if (kChannelsLast && pad) zero_columns(x1);
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
      if (plan.ghosts) cheap(h, last);
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
    panel.clamp = clamp_of(p.primary.act);
    // where there are no ghosts, nobody needs x1 anywhere else
    const bool only_out = store_too && !plan.ghosts && !p.residual.data;
    const auto go = [&](Multiply kernel, float* x1_to, int64_t h, int64_t w) {
      panel.y = x1_to;
      if (store_too) {
        float* out = reinterpret_cast<float*>(output.at(c0, h, w));
        (only_out ? panel.y : panel.copy) = out;
        panel.residual = reinterpret_cast<const float*>(output.residual_at(c0, h, w));
      }
      kernel(panel);
    };
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
      panel.y_row = only_out ? p.out.stride_w : plan.padded_block;
      panel.copy_row = p.out.stride_w;
      panel.residual_row = p.residual.stride_w;
      const int64_t panels = div_up(s.width, kMaxRows);
      for (int64_t h = begin; h < end; ++h, x += x_h, x1 += at.x1_row) {
        for (int64_t i = 0; i < panels; ++i) {
          const int64_t w = i * s.width / panels, rows = (i + 1) * s.width / panels - w;
          panel.a = x + w * x_w;
          go(multiply_kernels[rows][plan.padded_block / kLanes], x1 + (pad + w) * plan.padded_block, h, w);
        }
      }
    } else {
      panel.a = static_cast<const float*>(p.primary_weight) + c0 * p.primary_weight_stride_n;
      panel.a_row = p.primary_weight_stride_n;
      if (plan.pack_weight) panel.a = parameters + at.block_weight, panel.a_row = s.in_channels;
      panel.b_row = x_c;
      panel.y_row = only_out ? p.out.stride_c : at.x1_channel;
      panel.copy_row = p.out.stride_c;
      panel.residual_row = p.residual.stride_c;
      const auto run = [&](int64_t pixel, int64_t vecs) {  // counted from row begin's first
        panel.b = x + pixel;
        go(multiply_kernels[channels][vecs], x1 + pixel, begin, pixel);
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
    walk.clamp = clamp_of(p.cheap.act);
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
      walk.residual = reinterpret_cast<const float*>(output.residual_at(c, h, w));
      walk.residual_walk = kChannelsLast ? p.residual.stride_w : p.residual.stride_h;
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
      rest.residual = nullptr;
      kernel(rest);
      for (int64_t i = 0; i < staged; ++i) {
        const int64_t at_step = direct + i;
        output.put(load(rest.out + i * kLanes), c, kChannelsLast ? h : h + at_step, kChannelsLast ? w + at_step : w,
                   lanes, step);
      }
    }
    walk.steps = direct + staged;
  }

  // The 1×1 weights of the block's channels, as the multiplication reads them.
  void prepare_weight() const {
    float* weight = parameters + at.block_weight;
    const T* from = static_cast<const T*>(p.primary_weight) + c0 * p.primary_weight_stride_n;
    const int64_t stride = p.primary_weight_stride_k, depth = s.in_channels;
    if constexpr (kChannelsLast) {
      zero(weight, plan.padded_block * depth);
      for (int64_t c = 0; c < channels; ++c, from += p.primary_weight_stride_n) {
        for (int64_t k = 0; k < depth; ++k) weight[c + k * plan.padded_block] = to_float(from[k * stride]);
      }
    } else {
      const T* gate =
          plan.gate_weight ? static_cast<const T*>(p.input_gate) + output.n * p.input_gate_stride_n : nullptr;
      for (int64_t c = 0; c < channels; ++c, from += p.primary_weight_stride_n, weight += depth) {
        for (int64_t k = 0; k < depth; k += kLanes) {
          const int count = min_of<int64_t>(depth - k, kLanes);
          Vec v = load_strided(from + k * stride, stride, count);
          if (gate) v *= load_strided(gate + k * p.input_gate_stride_c, p.input_gate_stride_c, count);
          store_part(weight + k, v, count);
        }
      }
    }
  }

  // Its norms and depthwise weights.
  void prepare_block() const {
    const int64_t padded = plan.padded_block, d = s.dw_size, cheap_per_channel = plan.ghosts ? s.ratio - 1 : 0;
    float* norm = parameters + at.block_norms;
    zero(norm, (1 + cheap_per_channel) * 3 * padded);
    prepare_norm<T>(p.primary, c0, 1, channels, norm, padded);
    const Taps taps{
        p.cheap_weight, p.cheap_weight_stride_c, p.cheap_weight_stride_h, p.cheap_weight_stride_w, s.dw_size,
        s.dw_size};
    for (int64_t j = 0; j < cheap_per_channel; ++j) {
      const int64_t first = c0 * cheap_per_channel + j;
      prepare_norm<T>(p.cheap, first, cheap_per_channel, channels, norm + (1 + j) * 3 * padded, padded);
      float* to = parameters + at.block_cheap + j * d * d * padded;
      zero(to, d * d * padded);
      prepare_taps<T>(taps, kChannelsLast, first, cheap_per_channel, channels, to, padded);  // as the walk meets them
    }
  }

  const GhostForwardParams& p;
  const GhostShape& s;
  const Plan& plan;
  const Scratch at;
  float* const scratch;
  int32_t* const block_image;  // per block: that for which its parameters were prepared last, or -1
  const int64_t pad = plan.pad;
  Multiply multiply_kernels[kMaxRows + 1][kMaxVecs + 1];
  Output<T> output;

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
  if (is_fully_connected(p)) return fully_connected(p, threads);
  const Plan plan = make_plan(p, threads.count);
  Task task{p, plan};
  const double work = static_cast<double>(s.batch) * s.height * s.width * s.init_channels *
                      (s.in_channels + s.dw_size * s.dw_size * (s.ratio - 1));
  run(threads, plan.units, work, GHOSTFUSED_BY_PATH(s.path, run_units), &task);
}

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
