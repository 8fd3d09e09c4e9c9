// What all stages of the kernel share: its parameters and a block's place in the image.
#pragma once

#include "cuda/vector.cuh"

namespace ghostfused {

// One block's work: output pixels [h0, h0 + rows) × [w0, w0 + cols) of image n, init channels [c0, c0 + channels).
// Its halo is cut off at the image's edges: x1 exists only for pixels inside, and the depthwise conv reads zeros for
// those outside. They must be zeros after norm and activation, and act(shift) isn't zero.
struct BlockTile {
  int n;
  int c0, channels;
  int h0, w0, rows, cols;
  int halo_h0, halo_w0, halo_cols, pixels;  // of x1; pixels = halo rows * halo_cols
};

// The b-th block's of the plan's grid.
__device__ __forceinline__ BlockTile block_tile(const KernelParams& p, unsigned b) {
  const GhostShape& s = p.args.shape;
  const LaunchPlan& plan = p.plan;
  BlockTile t;
  t.c0 = b % plan.channel_blocks * plan.block_c;
  b /= plan.channel_blocks;
  t.w0 = b % plan.tiles_w * plan.tile_w;
  b /= plan.tiles_w;
  t.h0 = b % plan.tiles_h * plan.tile_h;
  t.n = b / plan.tiles_h;
  t.channels = min(plan.block_c, s.init_channels - t.c0);
  t.rows = min(plan.tile_h, s.height - t.h0);
  t.cols = min(plan.tile_w, s.width - t.w0);
  const int pad = s.dw_size / 2, align = plan.col_align;
  t.halo_h0 = max(t.h0 - pad, 0);
  t.halo_w0 = max(t.w0 - pad, 0) / align * align;
  t.halo_cols = min((t.w0 + t.cols + pad + align - 1) / align * align, s.width) - t.halo_w0;
  t.pixels = (min(t.h0 + t.rows + pad, s.height) - t.halo_h0) * t.halo_cols;
  return t;
}

// Each stage asks for it anew: its dozen registers would lie idle in the inner loops, which have none to spare. The
// volatile read keeps the compiler from holding on to them all the same.
__device__ __forceinline__ BlockTile block_tile(const KernelParams& p) {
  unsigned b;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(b));
  return block_tile(p, b);
}

// The new channels that a block makes at a time, [first, first + count) of all; ``group`` counts to ratio - 1.
struct NewChannels {
  int first, count;
};

template <int kD>
__device__ __forceinline__ NewChannels new_channels(const KernelParams& p, const BlockTile& t, int group) {
  const GhostShape& s = p.args.shape;
  const int per_init = kD > 0 ? 1 : s.ratio - 1;
  const int first = t.c0 * per_init + group * p.plan.block_c;
  const int end = min((t.c0 + t.channels) * per_init, s.out_channels - s.init_channels);
  return {first, max(0, min(p.plan.block_c, end - first))};
}

}  // namespace ghostfused
