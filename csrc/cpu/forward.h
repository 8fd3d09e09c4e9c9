// A Ghost module's forward: how a thread does its units of work. Each .cpp file that includes this compiles it for
// one instruction set.
#pragma once

#include "cpu/cheap.h"
#include "cpu/fully_connected.h"
#include "cpu/output.h"
#include "cpu/pack_weight.h"
#include "cpu/packed_x.h"
#include "cpu/parameters.h"
#include "cpu/plan.h"
#include "cpu/tiles.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

template <typename T, bool kChannelsLast>
class Worker {
  static constexpr int kPerLane = Operand<T, kChannelsLast>::kChannels;
  static constexpr bool kTiles = kHasTiles && kChannelsLast;
  static constexpr bool kIsFloat = std::is_same_v<T, float>, kMayHalve = kChannelsLast && kIsFloat;

 public:
  Worker(const GhostForwardParams& params, const Packed& packed_weight, const Plan& plan)
      : p(params),
        s(params.shape),
        packed_weight(packed_weight),
        plan(plan),
        at(scratch_layout(s, plan, packed_weight)),
        scratch(thread_scratch(at.total)),
        prepared(packed_weight.parameters ? packed_weight.parameters : scratch + at.parameters),
        block_image(reinterpret_cast<int32_t*>(scratch + at.blocks)),
        block_tile(block_image + plan.blocks),
        multiply_kernels(),
        packed_x(params, plan, at, scratch),
        output(params),
        cheap(params, plan, at, scratch, prepared, output) {
    for (int64_t b = 0; b < plan.blocks; ++b) block_image[b] = block_tile[b] = -1;
    for (int vecs = 1; vecs <= kMaxVecs<T>; ++vecs) {
      for (int rows = 1; rows <= kMaxRows<T>; ++rows) {
        multiply_kernels[rows][vecs] = multiply_kernel<T, !kChannelsLast, false>(rows, vecs);
        if constexpr (kMayHalve) {
          if (packed_weight.bfloat16) {
            multiply_kernels[rows][vecs] = multiply_kernel<T, !kChannelsLast, true>(rows, vecs);
          }
        }
      }
    }
  }

  // Units follow each other block by block, then tile by tile, so that x stays in cache and is packed once.
  void run(int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t tile = unit / plan.blocks, block = unit % plan.blocks;
      output.n = tile / plan.tiles;
      h0 = tile % plan.tiles * s.height / plan.tiles;
      h1 = (tile % plan.tiles + 1) * s.height / plan.tiles;
      c0 = block * plan.block;
      channels = min_of<int64_t>(plan.block, s.init_channels - c0);
      if (tile != packed) continues = plan.keeps_border && tile % plan.tiles && all_made_before(tile);
      x_h0 = continues ? h0 + pad : max_of<int64_t>(h0 - pad, 0);
      x_h1 = min_of<int64_t>(h1 + pad, s.height);
      if (plan.pack_x && tile != packed) packed_x.make(output.n, x_h0, h0, h1, x_h1);
      packed = tile;
      int32_t& image = block_image[block];
      if (image < 0 && !packed_weight.parameters) {
        prepare_parameters<T, kChannelsLast>(p, parameters, c0, channels, scratch + at.parameters);
      }
      if (plan.pack_weight && !packed_weight.data && (image < 0 || (plan.gate_weight && image != output.n)))
        prepare_weight();
      image = static_cast<int32_t>(output.n);
      run_unit(block);
      block_tile[block] = static_cast<int32_t>(tile);
    }
  }

 private:
  bool all_made_before(int64_t tile) const {
    bool all = true;
    for (int64_t b = 0; b < plan.blocks; ++b) all = all && block_tile[b] == tile - 1;
    return all;
  }

  // To ``border`` or from there: the rows of x1 that a block's next tile shares with this one.
  template <bool kSave>
  void move_border(int64_t block, float* x1) const {
    float* border = scratch + at.borders + block * at.border;
    const int64_t count = 2 * pad * at.x1_row, size = kChannelsLast ? 1 : channels;
    for (int64_t c = 0; c < size; ++c, x1 += at.x1_channel, border += count) {
      __builtin_memcpy(kSave ? border : x1, kSave ? x1 : border, count * sizeof(float));
    }
  }

  void run_unit(int64_t block) {
    float* x1 = scratch + at.x1;
    if (kChannelsLast && pad) zero_columns(x1);
    const int64_t size = kChannelsLast ? 1 : channels;
    if (continues) {
      move_border<false>(block, x1);
      store_x1(h0, min_of(h0 + pad, h1), h0 - pad);
    }
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
      if (kChannelsLast) {
        primary(done, until, top, direct);
      } else {
        primary(done, first, top, false);
        primary(first, own, top, direct);
        primary(own, until, top, false);
      }
      // zeros, not act(shift), outside the image
      for (int64_t c = 0; c < size; ++c) {
        float* channel = x1 + c * at.x1_channel;
        zero(channel, max_of<int64_t>(-top, 0) * at.x1_row * (h == h0));
        zero(channel + (until - top) * at.x1_row, (last + pad - until) * at.x1_row);
      }
      if (!direct) store_x1(first, own, top);
      done = until;
      if (plan.ghosts) cheap.run(h, last, c0, channels);
      if (plan.keeps_border && last == h1 && h1 < s.height) move_border<true>(block, x1 + (h1 - h) * at.x1_row);
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
    if (!output.plain) return false;
    if (kChannelsLast) return kMasks || channels % kLanes == 0;
    // the last vector of a run of pixels goes back
    return s.width >= kLanes || (plan.chunk == s.height && int64_t{s.height} * s.width >= kLanes);
  }

  // x1 of the image rows begin … end - 1. ``direct``: those of the tile go to the output as well, which in NCHW are all
  // or none of them.
  void primary(int64_t begin, int64_t end, int64_t top, bool direct) {
    if (begin >= end) return;
    float* x1 = scratch + at.x1 + (begin - top) * at.x1_row;
    const float* norm = prepared + parameters.norms + c0;
    Panel<T> panel{};
    panel.depth = panel.end = plan.depth;
    panel.scale = norm;
    panel.shift = norm + parameters.step;
    panel.slope = norm + 2 * parameters.step;
    panel.act = p.primary.act;
    panel.clamp = clamp_of(p.primary.act);
    // where there are no ghosts nobody needs x1 anywhere else: the sums wait for their end in the output, or in a tile
    const bool only_out = direct && !plan.ghosts;
    const auto go = [&](Multiply<T> kernel, float* x1_to, int64_t c, int64_t h, int64_t w) {
      const bool store_too = direct && h >= h0 && h < h1;
      panel.y = x1_to;
      panel.copy = store_too ? output.at(c, h, w) : nullptr;
      panel.residual = store_too ? output.residual_at(c, h, w) : nullptr;
      if (only_out) {
        panel.y = scratch + at.tile;
        panel.y_row = kMaxVecs<T> * kLanes;
        if constexpr (kIsFloat) {
          const bool whole = !kChannelsLast || channels % kLanes == 0;
          if (whole && !panel.residual) panel.y = panel.copy, panel.y_row = panel.copy_row, panel.copy = nullptr;
        }
      }
      kernel(panel);
    };
    int64_t x_h = p.x.stride_h / kPerLane, x_w = p.x.stride_w / kPerLane, x_c = p.x.stride_c;
    const float* x = static_cast<const float*>(p.x.data) + output.n * (p.x.stride_n / kPerLane) + begin * x_h;
    if (plan.pack_x) {
      x_w = kChannelsLast ? at.packed_x_row : kLanesAtOnce<T>;
      x_h = s.width * x_w;
      x_c = kChannelsLast ? 1 : at.packed_x_row;
      x = scratch + at.packed_x + (begin - x_h0) * x_h;
    }
    if constexpr (kChannelsLast) {
      panel.b = scratch + at.weight + c0 * plan.depth;
      if (packed_weight.data) {
        const int64_t numbers = c0 * plan.depth;
        panel.b = packed_weight.bfloat16
                      ? reinterpret_cast<const float*>(static_cast<const BFloat16*>(packed_weight.data) + numbers)
                      : static_cast<const float*>(packed_weight.data) + numbers;
      }
      panel.a_row = x_w;
      panel.y_row = plan.padded_block;
      panel.copy_row = p.out.stride_w;
      panel.residual_row = p.residual.stride_w;
      const int64_t panels = div_up(s.width, kMaxRows<T>), vecs = div_up(channels, kLanes);
      panel.last = static_cast<int>(channels - (vecs - 1) * kLanes);
      if constexpr (kTiles) {
        // a run: pixels at one stride, as many as matrices have rows, though some be others'
        const bool flat = x_h == s.width * x_w;
        const int64_t rows = flat ? end - begin : 1;
        if ((flat ? x_h1 - x_h0 : 1) * s.width >= kTile) {
          for (int64_t h = begin; h < end; h += rows, x += x_h) {
            const int64_t pixels = max_of<int64_t>(rows * s.width, kTile);
            const int64_t run = flat ? min_of(h * s.width, x_h1 * s.width - pixels) : h * s.width;
            const float* a = x + (run - h * s.width) * x_w;
            multiply_tiles(a, x_w, pixels, panel.b, vecs, plan.depth, [&](int64_t pixel, int64_t j, const float* sums) {
              const int lanes = j == vecs - 1 ? panel.last : kLanes;
              finish_tile(sums, run + pixel, begin, end, top, j * kLanes, lanes, direct);
            });
          }
          return;
        }
      }
      // between parts of the depth the sums need places of their own
      const bool own_places = !only_out || (kIsFloat && channels % kLanes == 0 && !p.residual.data);
      const int64_t part = own_places && kPerLane == 1 ? kDeep : plan.depth;
      for (panel.begin = 0; panel.begin < plan.depth; panel.begin = panel.end) {
        panel.end = min_of(panel.begin + part, plan.depth);
        for (int64_t h = begin; h < end; ++h) {
          for (int64_t i = 0; i < panels; ++i) {
            const int64_t w = i * s.width / panels, rows = (i + 1) * s.width / panels - w;
            panel.a = x + (h - begin) * x_h + w * x_w;
            float* to = x1 + (h - begin) * at.x1_row + (pad + w) * plan.padded_block;
            go(multiply_kernels[rows][vecs], to, c0, h, w);
          }
        }
      }
    } else {
      const float* weight = static_cast<const float*>(p.primary_weight);
      panel.a_row = p.primary_weight_stride_n / kPerLane;
      panel.a = weight + c0 * panel.a_row;
      if (plan.pack_weight) panel.a = scratch + at.weight + c0 * plan.depth, panel.a_row = plan.depth;
      panel.b_row = x_c;
      panel.y_row = at.x1_channel;
      panel.copy_row = p.out.stride_c;
      panel.residual_row = p.residual.stride_c;
      const auto go_all = [&](int64_t vecs, int64_t pixel) {  // all channels
        if constexpr (kMaxRows<T> == kUsualRows) {
          go(multiply_kernels[channels][vecs], x1 + pixel, c0, begin, pixel);
        } else {  // a kernel takes a part of them, and x stays in the first cache for the other
          const Panel<T> whole = panel;
          const int64_t parts = div_up(channels, kMaxRows<T>);
          for (int64_t i = 0; i < parts; ++i) {
            const int64_t c = i * channels / parts, rows = (i + 1) * channels / parts - c;
            panel.a = whole.a + c * panel.a_row;
            panel.scale = whole.scale + c, panel.shift = whole.shift + c, panel.slope = whole.slope + c;
            panel.ahead = whole.ahead + i * kLine;
            go(multiply_kernels[rows][vecs], x1 + c * at.x1_channel + pixel, c0 + c, begin, pixel);
          }
          panel = whole;
        }
      };
      const auto run = [&](int64_t pixel, int64_t vecs) {  // counted from row begin's first
        panel.b = x + pixel * kLanesAtOnce<T>;
        panel.ahead = panel.b + kPrefetchX;  // every row is in another page, where the hardware doesn't look ahead
        panel.ahead_row = panel.b_row;
        go_all(vecs, pixel);
      };
      const int64_t pixels = (end - begin) * s.width, vecs = div_up(pixels, kLanes), panels = div_up(vecs, kMaxVecs<T>);
      for (int64_t i = 0; i < panels; ++i) {
        const PanelPixels pixels_of(i, pixels, kMaxVecs<T>);
        if (plan.panels) {
          panel.b = scratch + at.packed_x + packed_x.panels_before(begin) + pixels_of.vecs_before * kLanes * plan.depth;
          panel.b_row = pixels_of.vecs * kLanes;
          // the weights of the next block, which nobody has read yet, a part of them with every panel
          panel.ahead_row = div_up(channels, panels);
          panel.ahead =
              weight + (c0 + channels) * (p.primary_weight_stride_n / kPerLane) + i * panel.ahead_row * plan.depth;
          go_all(pixels_of.vecs, pixels_of.begin);
        } else if (plan.pack_x && !can_store_directly()) {
          run(pixels_of.vecs_before * kLanes, pixels_of.vecs);
        } else if (pixels_of.begin >= 0) {
          run(pixels_of.begin, pixels_of.vecs);
        } else {
          run(0, pixels_of.vecs - 1);
          run(pixels - kLanes, 1);
        }
      }
    }
  }

  // ``lanes`` channels from c on of a matrix of pixels from ``first`` on, as far as they are in rows begin … end - 1.
  void finish_tile(const float* sums, int64_t first, int64_t begin, int64_t end, int64_t top, int64_t c, int lanes,
                   bool direct) const {
    const float* norm = prepared + parameters.norms + c0 + c;
    const Finish finish(norm, parameters.step, p.primary.act, Finish::kVectors);
    const int64_t from = max_of(first, begin * s.width);
    int64_t left = min_of(first + kTile, end * s.width) - from, h = from / s.width, w = from % s.width;
    for (sums += (from - first) * kTile; left > 0; ++h, w = 0) {
      const int64_t pixels = min_of(s.width - w, left);
      float* y = scratch + at.x1 + (h - top) * at.x1_row + (pad + w) * plan.padded_block + c;
      const bool store_too = direct && h >= h0 && h < h1;
      T* to = store_too ? output.at(c0 + c, h, w) : nullptr;
      const T* residual = output.residual_at(c0 + c, h, w);
      left -= pixels;
      for (int64_t i = 0; i < pixels; ++i, sums += kTile, y += plan.padded_block) {
        Vec v = finish(load(sums));
        if (plan.ghosts || !store_too) store(y, v);
        if (!store_too) continue;
        if (residual) v += load_part(residual, lanes), residual += p.residual.stride_w;
        store_part(to, v, lanes);
        to += p.out.stride_w;
      }
    }
  }

  void store_x1(int64_t begin, int64_t end, int64_t top) const {
    const float* x1 = scratch + at.x1 + (begin - top) * at.x1_row;
    if constexpr (kChannelsLast) {
      for (int64_t h = begin; h < end; ++h, x1 += at.x1_row) {
        for (int64_t w = 0; w < s.width; ++w) output.put_run(x1 + (pad + w) * plan.padded_block, channels, c0, h, w);
      }
    } else if (output.plain) {  // rows follow each other without a gap
      for (int64_t c = 0; c < channels; ++c) {
        output.put_run(x1 + c * at.x1_channel, (end - begin) * s.width, c0 + c, begin, 0);
      }
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t h = begin; h < end; ++h) {
          output.put_run(x1 + c * at.x1_channel + (h - begin) * at.x1_row, s.width, c0 + c, h, 0);
        }
      }
    }
  }

  // The 1×1 weights of the block's channels, as the multiplication reads them.
  void prepare_weight() const {
    const T* gate = plan.gate_weight ? gate_of<T>(p, output.n) : nullptr;
    pack_channels<T, kChannelsLast>(p, gate, c0, channels, plan.depth, scratch + at.weight + c0 * plan.depth);
  }

  const GhostForwardParams& p;
  const GhostShape& s;
  const Packed& packed_weight;
  const Plan& plan;
  const Scratch at;
  const Parameters parameters{s};
  float* const scratch;
  const float* const prepared;  // the parameters
  int32_t* const block_image;
  int32_t* const block_tile;  // that this worker made last of a block
  const int64_t pad = plan.pad;
  Multiply<T> multiply_kernels[kMaxRows<T> + 1][kMaxVecs<T> + 1];
  PackedX<T, kChannelsLast> packed_x;
  Output<T> output;
  Cheap<T, kChannelsLast> cheap;

  int64_t packed = -1;     // the tile that x was packed for last
  bool continues = false;  // that tile follows one whose last rows of x1 are kept, of every block

  // the current unit
  int64_t h0, h1, x_h0, x_h1, c0, channels;  // rows of the tile, and those of x that it is made of
};

struct Task {
  const GhostForwardParams& p;
  const Packed& weight;
  const Plan& plan;
};

template <typename Worker>
void run_worker(Items& items, const Task& task) {
#ifdef GHOSTFUSED_AMX
  const TileRegisters registers(task.plan.depth);
#endif
  Worker worker(task.p, task.weight, task.plan);
  for (int64_t begin, end; items.next(&begin, &end);) worker.run(begin, end);
}

template <typename T>
void run_units(Items& items, void* context) {
  const Task& task = *static_cast<const Task*>(context);
  if (task.p.shape.channels_last) {
    run_worker<Worker<T, true>>(items, task);
  } else {
    run_worker<Worker<T, false>>(items, task);
  }
}

inline void forward(const GhostForwardParams& p, const Packed& weight, int threads) {
  const GhostShape& s = p.shape;
  if (is_fully_connected(p)) return fully_connected(p, weight, threads);
  const Plan plan = make_plan(p, threads);
  Task task{p, weight, plan};
  const double work = static_cast<double>(s.batch) * s.height * s.width * s.init_channels *
                      (s.in_channels + static_cast<double>(s.dw_size * s.dw_size) * (s.ratio - 1));
  run(threads, plan.units, work, GHOSTFUSED_BY_PATH(s.path, run_units), &task);
}

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
