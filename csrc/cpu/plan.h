// How a module is cut into units of work, and the memory that a thread needs for one.
#pragma once

#include "cpu/output_gate.h"
#include "cpu/parallel.h"
#include "cpu/prepared.h"
#include "cpu/primary.h"
#include "cpu/tiles.h"

namespace ghostfused::cpu::GHOSTFUSED_ISA {

constexpr int64_t kTileBytes = 768 << 10;   // of x in one tile: stays in a core's L2 while every block reads it
constexpr int64_t kPatchBytes = 64 << 10;   // of patches in one tile: they are read right after they are packed
constexpr int64_t kChunkBytes = 192 << 10;  // of x1 in one chunk: stays in L2, and a channel of it in L1

constexpr int64_t kPanelBlocks = 4;  // blocks of channels for which packing x into panels pays

// NCHW: the pixels that one multiplication takes, of a run of them. The last vector ends where the run does, so that
// some pixels are made twice where it is not a whole number of vectors.
struct PanelPixels {
  int64_t begin, vecs, vecs_before;

  PanelPixels(int64_t i, int64_t pixels, int max_vecs) {
    const int64_t all = div_up(pixels, kLanes), panels = div_up(all, max_vecs);
    vecs_before = i * all / panels;
    vecs = (i + 1) * all / panels - vecs_before;
    begin = vecs_before * kLanes - max_of<int64_t>((vecs_before + vecs) * kLanes - pixels, 0);
  }
};

// NCHW: the padded planes of x under the patches of a tile's rows. The rows that a tap finds under one output after the
// other lie together, as a phase, and so do the columns: tap i of a row or column is in phase i % phases, i * dilation
// / stride behind the first.
struct PatchPlanes {
  int64_t phases = 0;                      // of rows, and as many of columns
  int64_t pitch = 0, rows = 0, reach = 0;  // a row's length; a phase's rows, and how many they are more than outputs
  int64_t size = 0;                        // of all phases, in pixels
  int64_t step = 0;                        // from one plane to the next, in floats

  PatchPlanes() = default;
  PatchPlanes(const GhostForwardParams& p, int64_t output_rows, int at_once) : phases(1) {
    while (phases < p.kernel && phases * p.dilation % p.stride != 0) ++phases;  // until the first's comes again
    reach = int64_t{p.dilation} * (p.kernel - 1) / p.stride;
    pitch = p.shape.width + reach;
    rows = output_rows + reach;
    size = phases * phases * rows * pitch;
    step = (div_up(size * at_once, kLine) | 1) * kLine;  // odd, for planes not to share the same few sets of L1
  }
};

// A unit is one block of init channels × one tile of rows of one image; it goes down the tile in chunks of rows.
struct Plan {
  int64_t block, blocks, padded_block;  // channels of a block; padded to whole vectors
  int64_t rows, tiles, chunk;           // rows of the largest tile and of a chunk
  int64_t lanes, depth;                 // of the operand: those of a pixel of x, and all that one output sums
  bool pack_x, pack_weight;  // copied as operands with unit stride: the multiplication can't read it as it is
  bool patches;              // x is packed as the patches under a primary conv of any other kind than 1×1 at stride 1
  PatchPlanes planes;        // NCHW: of x under these patches
  bool one_run;              // NCHW: rows of x1 lie as far apart as those of these planes, to be made as one
  int64_t x1_row;            // NCHW: from one row of x1 to the next
  bool panels;               // x is packed panel by panel, for many blocks of channels to read it one after the other
  bool keeps_border;         // a thread keeps the rows of x1 that two tiles share, for the patches are costly
  bool gate_weight;          // the input gate goes to the weights, else to x, as they are packed
  bool ghosts;               // false: a 1×1 convolution and no more
  int64_t pad;
  int64_t units;
};

// Whether the channels of every row are aligned pairs, as many as are summed at once: ``sizes`` are all strides, and
// the length of a row, or-ed.
inline bool made_of_pairs(const void* data, int64_t sizes, int at_once) {
  return sizes % (2 * at_once) == 0 && reinterpret_cast<uintptr_t>(data) % 4 == 0;
}

// The operand's lanes that one output sums. In NCHW each tap of a larger kernel has lanes of its own.
inline int64_t depth_of(const GhostForwardParams& p) {
  const GhostShape& s = p.shape;
  const int64_t area = int64_t{p.kernel} * p.kernel, per_lane = channels_per_lane(s.path, s.channels_last);
  const int at_once = lanes_at_once(s.path);
  return s.channels_last ? lanes_of(s.in_channels * area, per_lane, at_once)
                         : lanes_of(s.in_channels, per_lane, at_once) * area;
}

inline Plan make_plan(const GhostForwardParams& p, int threads) {
  const GhostShape& s = p.shape;
  const int64_t height = s.height, width = s.width, per_lane = channels_per_lane(s.path, s.channels_last);
  const bool patches = has_patches(p);
  const int at_once = lanes_at_once(s.path);
  const int64_t lanes = lanes_of(s.in_channels, per_lane, at_once), depth = depth_of(p);
  const bool is_float = s.path == Path::kFloat32 || s.path == Path::kTF32;
  Plan plan{};
  plan.patches = patches;
  plan.lanes = lanes;
  plan.depth = depth;
  plan.ghosts = s.out_channels > s.init_channels;
  const int64_t pad = plan.pad = plan.ghosts ? s.dw_size / 2 : 0;

  const int64_t row =
      patches && !s.channels_last ? lanes * (PatchPlanes(p, 2, 1).size - PatchPlanes(p, 1, 1).size) : depth * width;
  plan.rows = max_of<int64_t>((patches && s.channels_last && !pad ? kPatchBytes : kTileBytes) / (row * 4), 4);
  plan.tiles = div_up(height, plan.rows);
  const int64_t largest_block = s.channels_last ? max_vecs(at_once) * kLanes : kUsualRows;
  plan.blocks = div_up(s.init_channels, largest_block);
  const bool whole_vectors = s.channels_last || width >= kLanes;
  const bool by_rows = s.batch % threads != 0 && height >= kRowsEach * threads && whole_vectors;
  if (by_rows) plan.tiles = div_up(plan.tiles, threads) * threads;
  if (s.batch * plan.tiles % threads != 0) {  // few units: give each thread as many
    const int64_t least = s.channels_last ? kLanes : 4;
    const int64_t blocks = div_up(plan.blocks, threads) * threads;
    // in channels_last a block is whole vectors: of few of them some threads would have more than others
    const int64_t vectors = div_up(s.init_channels, kLanes);
    const bool uneven = s.channels_last && vectors < 4 * blocks && vectors % blocks != 0 && s.height >= 8 * threads;
    if (blocks * least <= s.init_channels && !uneven) {
      plan.blocks = blocks;
    } else if (s.batch * plan.tiles * plan.blocks % threads != 0) {
      plan.tiles = min_of<int64_t>(div_up(plan.tiles, threads) * threads, div_up(height, 4));
    }
  }
  if (kHasTiles && s.channels_last && height / plan.tiles * width < kTile) plan.tiles = 1;
  plan.rows = div_up(height, plan.tiles);
  plan.block = div_up(s.init_channels, plan.blocks);
  plan.padded_block = div_up(plan.block, kLanes) * kLanes;
  if (s.channels_last) plan.block = min_of<int64_t>(plan.padded_block, s.init_channels);
  plan.blocks = div_up(s.init_channels, plan.block);
  plan.units = s.batch * plan.tiles * plan.blocks;

  const int64_t row_bytes = s.channels_last ? plan.padded_block * (width + 2 * pad) * 4 : plan.block * width * 4;
  const int64_t chunk = max_of<int64_t>(kChunkBytes / row_bytes - 2 * pad, 2);
  plan.chunk = div_up(plan.rows, div_up(plan.rows, chunk));
  plan.x1_row = width;
  if (patches && !s.channels_last) {
    const int64_t above = div_up(kLanes - 1, width);  // a short run's vector begins there
    plan.planes = PatchPlanes(p, min_of<int64_t>(plan.rows + 2 * pad, height) + above, at_once);
    plan.one_run = width % kLanes != 0;
    if (plan.one_run) plan.x1_row = plan.planes.pitch;
  }
  // x1 is the output
  if (!plan.ghosts && is_float && !p.residual.data && !p.output_gate.data && !plan.one_run) plan.chunk = plan.rows;
  const bool operand =
      per_lane == 1 ? is_float : made_of_pairs(p.primary_weight, s.in_channels | p.primary_weight_stride_n, at_once);
  plan.pack_weight = s.channels_last || patches || !operand || (s.in_channels > 1 && p.primary_weight_stride_k != 1);
  plan.pack_x = !is_float;
  if (s.channels_last) {
    const int64_t sizes = s.in_channels | p.x.stride_n | p.x.stride_h | p.x.stride_w;
    if (per_lane > 1) plan.pack_x = !made_of_pairs(p.x.data, sizes, at_once);
    plan.pack_x |= s.input_gate || (s.in_channels > 1 && p.x.stride_c != 1);
  } else {
    // vectors lie along the pixels of a channel, across rows; they mustn't reach past x's end
    plan.pack_x |= (width > 1 && p.x.stride_w != 1) || (height > 1 && p.x.stride_h != width);
    plan.pack_x |= width < kLanes && (plan.chunk != height || height * width < kLanes);
  }
  const int64_t vecs = div_up(height / plan.tiles * width, kLanes);  // of the smallest tile
  const int64_t sharing = plan.blocks * min_of<int64_t>(s.batch * plan.tiles, threads) / threads;
  const bool flat = (width == 1 || p.x.stride_w == 1) && (height == 1 || p.x.stride_h == width);
  const bool pays = sharing >= kPanelBlocks && plan.tiles <= (by_rows ? threads : 1);
  plan.panels = !s.channels_last && !patches && plan.chunk == plan.rows && vecs > max_vecs(at_once) && flat && pays;
  plan.pack_x |= plan.panels || patches;
  const int64_t least =
      height / plan.tiles;  // rows of a tile; what is left of them is to be multiplied in the same way
  const bool as_matrix = kHasTiles && s.channels_last;
  plan.keeps_border =
      patches && pad > 0 && plan.tiles > 1 && least >= 2 * pad && (!as_matrix || (least - pad) * width >= kTile);
  // whatever the number of threads, so that the result doesn't depend on it
  plan.gate_weight = s.input_gate && is_float && !s.channels_last && !patches;
  plan.pack_weight |= plan.gate_weight;
  return plan;
}

// Offsets in a thread's scratch memory, in floats.
struct Scratch {
  // of all channels: the 1×1 weights as the multiplication reads them, and what Parameters lists
  int64_t weight, parameters;
  int64_t x1, x1_channel, x1_row;  // NCHW: (channel, row, w); channels_last: (row, w, channel)
  int64_t packed_x, packed_x_row, stage, planes, masks, tile, gate;
  int64_t borders, border;  // of x1, and a block's size
  int64_t blocks;  // per block: the image that its parameters were made for last, and the tile made last, or -1
  int64_t total;
};

inline Scratch scratch_layout(const GhostForwardParams& p, const Plan& plan, const Packed& packed) {
  const GhostShape& s = p.shape;
  const int64_t pad = plan.pad, rows = plan.chunk + 2 * pad, margin = 64;
  Scratch at{};
  at.x1 = margin;
  at.x1_row = s.channels_last ? (s.width + 2 * pad) * plan.padded_block : plan.x1_row;
  at.x1_channel = s.channels_last ? 1 : rows * at.x1_row + kLanes;
  const int64_t x1_size = s.channels_last ? rows * at.x1_row : plan.block * at.x1_channel;
  at.stage = at.x1 + x1_size + margin;
  const int64_t pixels = min_of<int64_t>(plan.rows + 2 * pad, s.height) * s.width;
  at.planes = at.stage + max_of<int64_t>(s.width, kLanes) * kLanes;
  at.masks = at.planes + (plan.planes.size ? plan.lanes / lanes_at_once(s.path) * plan.planes.step + margin : 0);
  at.tile = at.masks + (s.channels_last ? 0 : div_up(s.width, kLanes) * s.dw_size * kLanes);
  at.gate = at.tile + kMaxSums * kLanes;
  at.packed_x = at.gate + (p.output_gate.data && !s.channels_last ? output_gate_size(s) : 0);
  // pixels an odd number of lines apart, so that those read together don't share the same few sets of L1
  const int64_t pixel = plan.patches ? (div_up(plan.depth, kLine) | 1) * kLine : plan.depth;
  at.packed_x_row = s.channels_last ? pixel : pixels + (plan.panels ? 3 : 1) * kLanes;
  const int64_t packed_x_rows = s.channels_last ? pixels : plan.depth + lanes_at_once(s.path) - 1;  // see pack_lanes
  const bool packs = plan.pack_x && !plan.planes.size;
  at.weight = at.packed_x + (packs ? packed_x_rows * at.packed_x_row : 0) + margin;
  const Parameters parameters(s);
  at.parameters = at.weight + (plan.pack_weight && !packed.data ? parameters.step * plan.depth : 0);
  at.borders = at.parameters + (packed.parameters ? 0 : parameters.size);
  at.border = plan.keeps_border ? 2 * pad * at.x1_row * (s.channels_last ? 1 : plan.block) : 0;
  at.blocks = at.borders + plan.blocks * at.border;
  at.total = at.blocks + 2 * plan.blocks + margin;
  return at;
}

}  // namespace ghostfused::cpu::GHOSTFUSED_ISA
