// A Ghost module's forward: how a thread does its units of work. Each .cpp file that includes this compiles it for
// one instruction set.
#pragma once

#include "cpu/cheap.h"
#include "cpu/fully_connected.h"
#include "cpu/primary_conv.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

template <typename T, bool kChannelsLast>
class Worker {
 public:
  Worker(const GhostForwardParams& params, const Packed& packed_weight, const Plan& plan)
      : p(params),
        s(params.shape),
        packed_weight(packed_weight),
        plan(plan),
        at(scratch_layout(p, plan, packed_weight)),
        scratch(thread_scratch(at.total)),
        prepared(packed_weight.parameters ? packed_weight.parameters : scratch + at.parameters),
        block_image(reinterpret_cast<int32_t*>(scratch + at.blocks)),
        block_tile(block_image + plan.blocks),
        output(params, scratch + at.gate),
        primary(params, packed_weight, plan, at, scratch, prepared, output, unit),
        cheap(params, plan, at, scratch, prepared, output) {
    for (int64_t b = 0; b < plan.blocks; ++b) block_image[b] = block_tile[b] = -1;
  }

  // Units follow each other block by block, then tile by tile, so that x stays in cache and is packed once.
  void run(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tile = i / plan.blocks, block = i % plan.blocks;
      output.n = tile / plan.tiles;
      unit.h0 = tile % plan.tiles * s.height / plan.tiles;
      unit.h1 = (tile % plan.tiles + 1) * s.height / plan.tiles;
      unit.c0 = block * plan.block;
      unit.channels = min_of<int64_t>(plan.block, s.init_channels - unit.c0);
      if (tile != packed) continues = plan.keeps_border && tile % plan.tiles && all_made_before(tile);
      unit.x_h0 = continues ? unit.h0 + pad : max_of<int64_t>(unit.h0 - pad, 0);
      unit.x_h1 = min_of<int64_t>(unit.h1 + pad, s.height);
      load(tile, block);
      run_unit(block);
      block_tile[block] = static_cast<int32_t>(tile);
    }
  }

 private:
  // x of the tile, and the parameters and weights of the block, where they are to be packed and aren't yet.
  void load(int64_t tile, int64_t block) {
    if (plan.pack_x && tile != packed) primary.load_x();
    packed = tile;
    int32_t& image = block_image[block];
    if (image < 0 && !packed_weight.parameters) {
      prepare_parameters<T, kChannelsLast>(p, parameters, unit.c0, unit.channels, scratch + at.parameters);
    }
    if (plan.pack_weight && !packed_weight.data && (image < 0 || (plan.gate_weight && image != output.n)))
      primary.load_weight();
    image = static_cast<int32_t>(output.n);
  }

  bool all_made_before(int64_t tile) const {
    bool all = true;
    for (int64_t b = 0; b < plan.blocks; ++b) all = all && block_tile[b] == tile - 1;
    return all;
  }

  // To their place in scratch memory or from there: the rows of x1 that a block's next tile shares with this one.
  template <bool kSave>
  void move_border(int64_t block, float* x1) const {
    float* border = scratch + at.borders + block * at.border;
    const int64_t count = 2 * pad * at.x1_row, size = kChannelsLast ? 1 : unit.channels;
    for (int64_t c = 0; c < size; ++c, x1 += at.x1_channel, border += count) {
      __builtin_memcpy(kSave ? border : x1, kSave ? x1 : border, count * sizeof(float));
    }
  }

  void run_unit(int64_t block) {
    float* x1 = scratch + at.x1;
    if (kChannelsLast && pad) zero_columns(x1);
    const int64_t size = kChannelsLast ? 1 : unit.channels;
    if (continues) {
      move_border<false>(block, x1);
      store_x1(unit.h0, unit.h0 + pad, unit.h0 - pad);
    }
    int64_t done = unit.x_h0;  // the rows of x1 before this one are made
    for (int64_t h = unit.h0; h < unit.h1; h += plan.chunk) {
      const int64_t last = min_of(h + plan.chunk, unit.h1);
      const int64_t top = h - pad;  // the image row at the top of the chunk
      if (h != unit.h0 && pad) {
        for (int64_t c = 0; c < size; ++c) {
          float* channel = x1 + c * at.x1_channel;
          __builtin_memmove(channel, channel + plan.chunk * at.x1_row, 2 * pad * at.x1_row * sizeof(float));
        }
      }
      const int64_t until = min_of<int64_t>(last + pad, s.height);
      // the tile's own rows go to the output as well
      const int64_t first = max_of(done, unit.h0), own = max_of(min_of(until, unit.h1), first);
      const bool direct = primary.can_store_directly();
      if (kChannelsLast || plan.one_run) {
        primary.run(done, until, top, direct);
      } else {
        primary.run(done, first, top, false);
        primary.run(first, own, top, direct);
        primary.run(own, until, top, false);
      }
      // zeros, not act(shift), outside the image
      for (int64_t c = 0; c < size; ++c) {
        float* channel = x1 + c * at.x1_channel;
        zero(channel, max_of<int64_t>(-top, 0) * at.x1_row * (h == unit.h0));
        zero(channel + (until - top) * at.x1_row, (last + pad - until) * at.x1_row);
      }
      if (!direct) store_x1(first, own, top);
      done = until;
      if (plan.ghosts) cheap.run(h, last, unit.c0, unit.channels);
      if (plan.keeps_border && last == unit.h1 && unit.h1 < s.height)
        move_border<true>(block, x1 + (unit.h1 - h) * at.x1_row);
    }
  }

  static void zero(float* p, int64_t count) { __builtin_memset(p, 0, count * sizeof(float)); }

  void zero_columns(float* x1) {
    for (int64_t row = 0; row < plan.chunk + 2 * pad; ++row, x1 += at.x1_row) {
      zero(x1, pad * plan.padded_block);
      zero(x1 + (pad + s.width) * plan.padded_block, pad * plan.padded_block);
    }
  }

  void store_x1(int64_t begin, int64_t end, int64_t top) {
    const float* x1 = scratch + at.x1 + (begin - top) * at.x1_row;
    if constexpr (kChannelsLast) {
      for (int64_t h = begin; h < end; ++h, x1 += at.x1_row) {
        for (int64_t w = 0; w < s.width; ++w)
          output.store_run(x1 + (pad + w) * plan.padded_block, unit.channels, unit.c0, h, w);
      }
    } else if (output.plain && plan.x1_row == s.width) {
      for (int64_t c = 0; c < unit.channels; ++c) {
        output.store_run(x1 + c * at.x1_channel, (end - begin) * s.width, unit.c0 + c, begin, 0);
      }
    } else {
      for (int64_t c = 0; c < unit.channels; ++c) {
        for (int64_t h = begin; h < end; ++h) {
          output.store_run(x1 + c * at.x1_channel + (h - begin) * at.x1_row, s.width, unit.c0 + c, h, 0);
        }
      }
    }
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
  Unit unit{};  // the current one
  Output<T, kChannelsLast> output;
  PrimaryConv<T, kChannelsLast> primary;
  Cheap<T, kChannelsLast> cheap;

  int64_t packed = -1;     // the tile that x was packed for last
  bool continues = false;  // that tile follows one whose last rows of x1 are kept, of every block
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
