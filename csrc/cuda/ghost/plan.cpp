// How a Ghost module is cut into blocks: a search over tiles with a small cost model. Pure functions, no CUDA.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cuda/launch.h"

namespace ghostfused {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
int ghosts_per_init(const GhostShape& s) { return s.out_channels > s.init_channels ? s.ratio - 1 : 0; }
int element_size(const GhostShape& s) { return ghostfused::element_size(s.path); }

constexpr int kVectorBytes = 16, kSectorBytes = 32, kKStepBytes = 32, kWarpTile = 32, kMaxBlockC = 128;

// The model's machine, per SM and clock, between an A100 and an H100: only ratios matter, and only roughly.
constexpr int64_t kL2Capacity = 20 << 20;  // half of an A100's
constexpr double kDramBytes = 12, kL2Bytes = 32, kLanes = 128, kLoadLatency = 1000, kBlockStart = 1500;

// A row of shared memory that eight threads read 16 bytes apart without bank conflicts: an odd number of vectors.
int odd_pitch(int64_t bytes) { return static_cast<int>((ceil_div(bytes, kVectorBytes) | 1) * kVectorBytes); }

// Pixels that the blocks compute x1 for along one dimension, in total and in the largest tile.
struct Span {
  int64_t total;
  int largest;
};

Span halo_span(int64_t size, int64_t tile, int pad, int align) {
  Span span{0, 0};
  for (int64_t start = 0; start < size; start += tile) {
    const int64_t first = std::max<int64_t>(start - pad, 0) / align * align;
    const int64_t end = std::min(round_up(std::min(start + tile, size) + pad, align), size);
    span.total += end - first;
    span.largest = std::max(span.largest, static_cast<int>(end - first));
  }
  return span;
}

// Everything in the plan that follows from tile_h, tile_w, block_c, block_k, stages and threads.
// Returns false if it doesn't fit into shared memory.
bool complete(const GhostShape& s, const Span& rows, const Span& cols, LaunchPlan& p) {
  const int es = element_size(s);
  p.tiles_h = static_cast<int>(ceil_div(s.height, p.tile_h));
  p.tiles_w = static_cast<int>(ceil_div(s.width, p.tile_w));
  p.channel_blocks = static_cast<int>(ceil_div(s.init_channels, p.block_c));
  p.grid = int64_t{s.batch} * p.tiles_h * p.tiles_w * p.channel_blocks;
  p.pixels = rows.largest * cols.largest;
  p.k_chunks = static_cast<int>(ceil_div(s.in_channels, p.block_k));

  // As few warps along the channels as cover them, then as many as leave no warp without pixels.
  const int warps = p.threads / 32;
  p.warps_n = 1;
  while (p.warps_n * kWarpTile < p.block_c) p.warps_n *= 2;
  while (p.warps_n < warps && warps / p.warps_n / 2 * kWarpTile >= p.pixels && p.warps_n * 8 < p.block_c) {
    p.warps_n *= 2;
  }
  if (p.warps_n > warps) return false;
  const int block_m = warps / p.warps_n * kWarpTile;
  const int pixel_chunks = static_cast<int>(ceil_div(p.pixels, block_m));
  const int64_t chunks = int64_t{pixel_chunks} * p.k_chunks;
  if (chunks > INT32_MAX / 2) return false;  // the kernel counts them
  if (p.stages > std::max<int64_t>(2, chunks)) return false;

  // ldmatrix reads 8 rows of 16 bytes; the transposed reads of 4-byte elements want rows 8 banks apart.
  const int stage_pixels = static_cast<int>(std::min<int64_t>(block_m, round_up(p.pixels, kWarpTile)));
  p.a_pitch = s.channels_last ? odd_pitch(p.block_k * es) : stage_pixels * es + (es == 2 ? 16 : 32);
  p.a_stage = p.a_pitch * (s.channels_last ? stage_pixels : p.block_k);
  p.w_pitch = odd_pitch(p.block_k * es);
  p.w_stage = p.w_pitch * p.block_c;
  p.x1_pitch = odd_pitch(p.block_c * es);
  p.weights_resident = pixel_chunks > 1 && int64_t{p.k_chunks} * p.w_stage <= 32 * 1024;
  const bool whole_map = p.tiles_h == 1 && p.tiles_w == 1;
  const int tile_pixels = p.tile_h * p.tile_w;
  // NCHW: the planes of a whole map lie side by side, as in the output, so that vectors may run across them.
  p.staging_pitch = s.channels_last ? p.x1_pitch
                    : whole_map     ? tile_pixels * es
                                    : static_cast<int>(round_up(tile_pixels * es, kVectorBytes));
  const bool ghosts = ghosts_per_init(s) > 0;  // without them only NCHW stages anything: x1, to transpose it
  const int64_t staging =
      s.channels_last ? (ghosts ? int64_t{p.staging_pitch} * tile_pixels : 0) : int64_t{p.staging_pitch} * p.block_c;

  int64_t end = 0;
  const auto reserve = [&end](int64_t bytes) {
    const int64_t offset = end;
    end += round_up(bytes, kVectorBytes);
    return static_cast<int>(offset);
  };
  reserve(3 * sizeof(float) * p.block_c);  // scale, shift, slope of the 1×1 conv, at offset 0
  p.cheap_offset = reserve(ghosts ? 2 * sizeof(float) * p.block_c : 0);
  p.dw_offset = reserve(ghosts ? int64_t{s.dw_size} * s.dw_size * p.block_c * sizeof(float) : 0);
  p.gate_offset = reserve(s.input_gate ? int64_t{p.k_chunks} * p.block_k * es : 0);
  const int64_t x1_bytes = int64_t{p.pixels} * p.x1_pitch;
  if (x1_bytes > s.smem_per_block) return false;
  p.x1_offset = reserve(x1_bytes);
  p.pipeline_offset = static_cast<int>(end);
  p.resident_offset = p.pipeline_offset + p.stages * p.a_stage;
  const int64_t pipeline =
      int64_t{p.stages} * p.a_stage + int64_t{p.weights_resident ? p.k_chunks : p.stages} * p.w_stage;
  reserve(std::max(pipeline, round_up(staging, kVectorBytes)));
  if (end > s.smem_per_block) return false;
  p.smem_bytes = static_cast<int>(end);
  const int by_registers = kMinBlocks * kMaxThreads / p.threads;
  p.blocks_per_sm = std::max(1, std::min<int>(by_registers, s.smem_per_sm / (end + 1024)));  // 1 KB is the system's

  // A thread of the depthwise conv slides down as many rows as leave work for all threads.
  const int channels_per_thread = is_unrolled(s) ? 4 : 2;
  const int64_t threads_per_row = ceil_div(std::min(p.block_c, s.init_channels), channels_per_thread) * p.tile_w;
  const int strips = static_cast<int>(std::clamp<int64_t>(p.threads / threads_per_row, 1, p.tile_h));
  p.strip_h = static_cast<int>(ceil_div(p.tile_h, strips));

  const int64_t image = int64_t{s.height} * s.width, halo = rows.total * cols.total;
  const int64_t x_bytes = int64_t{s.batch} * s.in_channels * image * es;
  const int64_t parameters = (int64_t{s.init_channels} * s.in_channels +
                              int64_t{s.init_channels} * ghosts_per_init(s) * s.dw_size * s.dw_size) *
                             es;
  const int64_t x_loads = int64_t{s.batch} * p.channel_blocks * halo * s.in_channels * es;
  const int64_t weight_loads = p.grid * (p.weights_resident ? 1 : pixel_chunks) * p.block_c * s.in_channels * es;
  p.l2_read = x_loads + weight_loads;
  p.dram_write = int64_t{s.batch} * s.out_channels * image * es;
  // Blocks that share x run side by side (channels) or a row of tiles apart (halos). What all blocks between them move,
  // and those that run at the same time, must fit L2 for the second read to find it there.
  const int64_t between = int64_t{p.channel_blocks} * p.tiles_w + int64_t{p.blocks_per_sm} * s.sm_count;
  const bool in_l2 = between < p.grid && (x_bytes + p.dram_write) / p.grid * between <= kL2Capacity;
  p.dram_read = (between >= p.grid || in_l2 ? x_bytes : x_loads) + parameters;
  p.recompute = static_cast<double>(halo) / image;
  return true;
}

// Clocks of the whole launch by the model. A block loads, computes and stores; blocks that start together do so in
// step, and only those of later waves fill each other's gaps. DRAM is a floor.
double cost(const GhostShape& s, const LaunchPlan& p) {
  const int es = element_size(s), taps = s.dw_size * s.dw_size, new_per_init = ghosts_per_init(s);
  const double out_pixels = double(s.height) * s.width / (p.tiles_h * p.tiles_w);  // of a block, on average
  const double pixels = p.recompute * out_pixels;
  const int block_m = p.threads / 32 / p.warps_n * kWarpTile;
  const double chunk_pixels = ceil_div(p.pixels, block_m) * block_m, k = p.k_chunks * p.block_k;
  const double blocks_of_sm = ceil_div(p.grid, s.sm_count);
  const double resident = std::min<double>(p.blocks_per_sm, blocks_of_sm);

  const double bytes_in = double(p.l2_read) / p.grid;
  double bytes_out = out_pixels * p.block_c * (1 + new_per_init) * es;
  if (s.channels_last && p.channel_blocks > 1) {  // pieces of pixels' rows end inside of 32-byte sectors
    const double piece = p.block_c * es;
    bytes_out *= (std::ceil(piece / kSectorBytes) + 0.5) * kSectorBytes / piece;
  }
  const double in_flight = resident * (p.stages - 1) * (p.a_stage + (p.weights_resident ? 0 : p.w_stage));
  const double dram = double(p.dram_read + p.dram_write) / (kDramBytes * s.sm_count) / blocks_of_sm;
  const double l2 = bytes_in / std::min(kL2Bytes, in_flight / kLoadLatency) + bytes_out / kL2Bytes;
  const double memory = std::max(dram, l2) + kLoadLatency / resident;

  double lane_instructions = bytes_in / 16 * 20;  // address and cp.async of a vector
  lane_instructions += s.path == Path::kFloat32 ? 1.5 * chunk_pixels * p.block_c * k
                                                : 2.0 * 32 * chunk_pixels / 16 * p.block_c / 8 * k * es / kKStepBytes;
  lane_instructions += pixels * p.block_c * 12;                       // epilogue
  const double rows_per_row = 1 + 2.0 * (s.dw_size / 2) / p.strip_h;  // that a strip reads
  lane_instructions += out_pixels * p.block_c * new_per_init * (taps + 1.5 * s.dw_size * rows_per_row + 10);
  lane_instructions += out_pixels * p.block_c * (1 + new_per_init) * (s.channels_last ? 3 : 5);  // store
  const double compute =
      lane_instructions / std::min<double>(kLanes, resident * p.threads / 4.0) + kBlockStart / resident;

  const double waves = std::ceil(blocks_of_sm / resident);
  const double apart = std::max(1 / resident, 1 / waves);  // the share of the shorter part that nothing hides
  return blocks_of_sm * (std::max(memory, compute) + std::min(memory, compute) * apart);
}

// size / 1, size / 2, … rounded up to a multiple of ``align``, at most ``largest``, without repeats: all divisions into
// few parts, then ever sparser ones, down to ``align``.
std::vector<int> divisions(int size, int align, int largest) {
  std::vector<int> sizes;
  for (int64_t parts = 1;; parts = std::max(parts + 1, parts * 5 / 4)) {
    const int part = static_cast<int>(round_up(ceil_div(size, parts), align));
    if (part <= largest && (sizes.empty() || part < sizes.back())) sizes.push_back(part);
    if (part <= align) return sizes;
  }
}

}  // namespace

LaunchPlan plan_general(const GhostShape& s) {
  LaunchPlan best{};
  double best_cost = 0;
  const int es = element_size(s), pad = s.dw_size / 2;
  const auto tile_hs = divisions(s.height, 1, INT32_MAX), tile_ws = divisions(s.width, 8, INT32_MAX);
  const auto block_cs = divisions(s.init_channels, 8, kMaxBlockC);
  std::vector<int> block_ks;
  for (const int row_bytes : {192, 128, 64}) {
    const int64_t chunks = ceil_div(int64_t{s.in_channels} * es, row_bytes);
    const int block_k = static_cast<int>(round_up(ceil_div(s.in_channels, chunks), kKStepBytes / es));
    if (block_ks.empty() || block_k < block_ks.back()) block_ks.push_back(block_k);
  }

  for (int tile_w : tile_ws) {
    tile_w = std::min(tile_w, s.width);
    LaunchPlan p{};
    p.tile_w = tile_w;
    // Loads along the pixels stay aligned when the halo starts and ends where vectors do.
    p.col_align = 1;
    if (!s.channels_last && tile_w < s.width) {
      while (p.col_align * es < kVectorBytes && s.width % (2 * p.col_align) == 0) p.col_align *= 2;
    }
    const Span cols = halo_span(s.width, tile_w, pad, p.col_align);
    for (const int tile_h : tile_hs) {
      p.tile_h = tile_h;
      const Span rows = halo_span(s.height, tile_h, pad, 1);
      if (int64_t{rows.largest} * cols.largest > 16384) continue;
      for (const int block_c : block_cs) {
        p.block_c = block_c;
        for (const int block_k : block_ks) {
          p.block_k = block_k;
          for (const int threads : {256, 128}) {
            p.threads = threads;
            for (const int stages : {4, 3, 2}) {
              p.stages = stages;
              if (!complete(s, rows, cols, p) || p.grid > INT32_MAX) continue;
              const double c = cost(s, p);
              if (best.block_c == 0 || c < best_cost) {
                best = p;
                best_cost = c;
              }
            }
          }
        }
      }
    }
  }
  return best;
}

// The general family has no 3×3 primary conv.
ForwardPlan plan_forward(const GhostShape& s) {
  return {s.window_stride > 0 ? LaunchPlan{} : plan_general(s), plan_nhwc(s), plan_nchw(s)};
}

bool needs_full_kernel(const GhostForwardParams& a) {
  const Act primary = a.primary.act, cheap = a.cheap.act;
  for (const Act act : {primary, cheap}) {
    if (act != Act::kNone && act != Act::kReLU) return true;
  }
  return a.shape.window_stride > 0 || a.residual.data != nullptr || a.output_gate.data != nullptr ||
         (a.shape.channels_last ? primary != cheap : a.input_gate != nullptr) ||
         (element_size(a.shape) == 4 && a.input_gate != nullptr);
}

// The one place where a call gets its kernel: the fastest family that takes it.
Family choose(const GhostForwardParams& a, const ForwardPlan& plan) {
  if (nhwc_takes(a, plan.nhwc)) return Family::kNhwc;
  if (nchw_takes(a, plan.nchw)) return Family::kNchw;
  return Family::kGeneral;
}

int common_vector(int limit, int element, const void* data, std::initializer_list<int64_t> values) {
  int vector = limit;
  while (vector > 1) {
    bool fits = reinterpret_cast<uintptr_t>(data) % (vector * element) == 0;
    for (const int64_t v : values) fits = fits && v % vector == 0;
    if (fits) break;
    vector /= 2;
  }
  return vector;
}

VectorWidths vector_widths(const GhostForwardParams& a, const LaunchPlan& p) {
  const GhostShape& s = a.shape;
  const int es = element_size(s), widest = kVectorBytes / es;
  const bool whole_map = p.tiles_h == 1 && p.tiles_w == 1, full_width = p.tiles_w == 1;
  VectorWidths v{};

  if (s.channels_last) {
    const bool dense = a.x.stride_c == 1 || s.in_channels == 1;
    v.x = dense ? common_vector(widest, es, a.x.data, {a.x.stride_n, a.x.stride_h, a.x.stride_w, p.block_k}) : 1;
  } else {
    // Vectors of pixels may run across rows where rows follow each other; else rows must be made of whole vectors.
    const bool rows_follow = full_width && a.x.stride_h == s.width;
    const int64_t row = rows_follow ? widest : full_width ? s.width : p.col_align;
    const int64_t first_row = rows_follow && p.tiles_h > 1 ? s.width : 0;  // a tile's halo may start at any row
    const bool dense = a.x.stride_w == 1 || s.width == 1;
    v.x = !dense ? 1
                 : common_vector(widest, es, a.x.data,
                                 {a.x.stride_n, a.x.stride_c, rows_follow ? 0 : a.x.stride_h, row, first_row});
  }
  v.x *= es;
  v.primary_weight = es * (a.primary_weight_stride_k == 1
                               ? common_vector(widest, es, a.primary_weight, {a.primary_weight_stride_n, p.block_k})
                               : 1);

  const int64_t image = int64_t{s.height} * s.width, new_channels = s.out_channels - s.init_channels;
  if (s.channels_last) {
    // The two parts of a pixel's row are one if the block has all channels and makes the new ones in one group.
    const bool whole_rows = p.channel_blocks == 1 && s.ratio == 2;
    v.out = common_vector(widest, es, a.out.data, {a.out.stride_n, a.out.stride_h, a.out.stride_w});
    v.out = whole_rows ? common_vector(v.out, es, nullptr, {s.out_channels})
                       : common_vector(v.out, es, nullptr, {s.init_channels, new_channels});
    while (v.out > 1 && s.init_channels % (v.out * es > 8 ? v.out / 2 : v.out) != 0) v.out /= 2;
  } else {
    v.out = common_vector(widest, es, a.out.data, {a.out.stride_n, a.out.stride_c == image ? 0 : 1});
    if (whole_map) {
      v.out = common_vector(v.out, es, nullptr, {s.init_channels * image, new_channels * image});
    } else if (full_width) {
      v.out = common_vector(v.out, es, nullptr, {image, int64_t{p.tile_h} * s.width});
    } else {
      v.out = common_vector(v.out, es, nullptr, {image, s.width, p.tile_w});
    }
  }
  if (s.channels_last) {
    for (const Tensor4* t : {&a.residual, &a.output_gate}) {
      if (t->data == nullptr) continue;
      v.out = t->stride_c == 1 ? common_vector(v.out, es, t->data, {t->stride_n, t->stride_h, t->stride_w}) : 1;
    }
  } else {
    const Tensor4& r = a.residual;
    if (r.data != nullptr) {
      const bool alike = r.stride_c == a.out.stride_c && r.stride_h == a.out.stride_h && r.stride_w == a.out.stride_w;
      v.out = alike ? common_vector(v.out, es, r.data, {r.stride_n}) : 1;
    }
    if (a.output_gate.data != nullptr) v.out = 1;  // upsampled, so not a vector along the pixels
  }
  return v;
}

}  // namespace ghostfused
