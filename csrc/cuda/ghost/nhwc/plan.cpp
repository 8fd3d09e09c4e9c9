// Which modules the channels_last kernel takes, and how it cuts them into blocks: a search with a cost model that
// counts instructions. Pure functions, no CUDA.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cuda/ghost/nhwc/nhwc.h"

namespace ghostfused {
namespace {

constexpr int kLoadBytes = 16, kFragmentBytes = 512, kSectorBytes = 32;

int64_t element(const GhostShape& s) { return element_size(s.path); }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// A pixel's bytes in x1: an odd number of vectors of four channels, so that pixels four apart lie in other banks.
int odd_pitch(const GhostShape& s, int channels) {
  return static_cast<int>((ceil_div(channels, 4) | 1) * 4 * element(s));
}

// Two lanes of a block of few channels share a pixel.
bool paired(const GhostShape& s, const NhwcPlan& p) { return p.warp_tiles == 1 && element(s) == 2; }

// Whether the kernel is made for such sizes: whole vectors of channels, and tiles that can overlap.
bool takes(const GhostShape& s) {
  const bool form = has_ghosts(s) ? s.ratio == 2 && (s.dw_size == 3 || (s.dw_size == 5 && element(s) == 2)) &&
                                        s.width >= kThreadColumns && s.height >= s.dw_size - 1
                                  : element(s) == 2;
  return form && s.channels_last && s.window_stride == 0 && s.in_channels * element(s) % kLoadBytes == 0 &&
         s.init_channels % 4 == 0 && s.out_channels % 4 == 0 && int64_t{s.height} * s.width >= kNhwcPixels;
}

// What follows from warp_tiles, threads, images, tile_h, block_c and strip_h. False if it doesn't fit.
bool complete(const GhostShape& s, NhwcPlan& p) {
  const int pad = s.dw_size / 2;
  p.warps_n = static_cast<int>(ceil_div(p.block_c, 16 * p.warp_tiles));
  if (p.threads / 32 % p.warps_n != 0) return false;
  p.k_blocks = static_cast<int>(ceil_div(s.in_channels, 4 * kLoadBytes / element(s)));
  p.strips = static_cast<int>(ceil_div(p.tile_h, p.strip_h));
  p.column_groups = static_cast<int>(ceil_div(s.width, kThreadColumns));
  p.tiles_h = static_cast<int>(ceil_div(s.height, p.tile_h));
  p.channel_blocks = static_cast<int>(ceil_div(s.init_channels, p.block_c));
  const int64_t groups = ceil_div(s.batch, p.images);  // the grid's y; its x may be larger
  p.grid = groups * p.tiles_h * p.channel_blocks;
  if (groups > 65535 || p.grid > INT32_MAX) return false;

  const int vectors = p.block_c / nhwc_thread_channels(s.dw_size);
  const int lanes = paired(s, p) ? 2 : 1;  // of which each pair of positions has two
  if (has_ghosts(s) && p.threads / lanes < vectors) return false;

  const int64_t rows = pad + int64_t{p.images} * (p.tile_h + pad), channels = p.warps_n * p.warp_tiles * 16;
  p.pitch = has_ghosts(s) ? odd_pitch(s, p.block_c) : 0;  // without ghosts there is no x1
  p.row_pixels = s.width + 2 * pad;
  int64_t end = 0;
  const auto reserve = [&end](int64_t bytes) {
    const int64_t offset = end;
    end += round_up(bytes, 16);
    return static_cast<int>(offset);
  };
  reserve(channels / 16 * p.k_blocks * 2 * kFragmentBytes);  // the 1×1 weights, at offset 0
  p.affine_offset = reserve(3 * channels * 4);
  p.cheap_offset = reserve(has_ghosts(s) ? (s.dw_size * s.dw_size + 2) * channels * 4 : 0);
  if (end > s.smem_per_block || rows * p.row_pixels * p.pitch > s.smem_per_block) return false;
  p.x1_offset = reserve(rows * p.row_pixels * p.pitch);
  if (end > s.smem_per_block) return false;
  p.smem_bytes = static_cast<int>(end);
  const int by_registers = p.warp_tiles == 3 ? 3 * 128 / p.threads : 2 * 256 / p.threads;
  p.blocks_per_sm = std::max(1, std::min<int>(by_registers, s.smem_per_sm / (p.smem_bytes + 1024)));

  // Rows of x1 that all tiles compute, and the bytes that this moves.
  int64_t halo_rows = 0;
  for (int tile = 0; tile < p.tiles_h; ++tile) {
    const int h0 = std::min(tile * p.tile_h, s.height - p.tile_h);
    halo_rows += std::min(h0 + p.tile_h + pad, s.height) - std::max(h0 - pad, 0);
  }
  p.recompute = static_cast<double>(halo_rows) / s.height;
  const int64_t image = int64_t{s.height} * s.width, weights = int64_t{s.init_channels} * s.in_channels * element(s);
  const int64_t x_bytes = s.batch * image * s.in_channels * element(s);
  p.dram_read = x_bytes + weights;
  if (has_ghosts(s)) p.dram_read += int64_t{s.init_channels} * s.dw_size * s.dw_size * element(s);
  p.dram_write = s.batch * image * s.out_channels * element(s);
  p.l2_read =
      ceil_div(s.batch, p.images) * p.images * p.channel_blocks * halo_rows * s.width * s.in_channels * element(s) +
      p.grid * p.block_c * s.in_channels * element(s);
  return true;
}

// Sectors that the stores touch, over those of the output: overlaps store twice, and the runs of bytes that an
// instruction stores begin and end inside of sectors. An instruction stores 256 bytes.
double stored_sectors(const GhostShape& s, const NhwcPlan& p) {
  const double twice = double(p.strips) * p.strip_h / p.tile_h * p.tiles_h * p.tile_h / s.height * p.channel_blocks *
                       p.block_c / s.init_channels;
  int align = kSectorBytes;
  for (const int c : {s.init_channels, s.out_channels, p.block_c}) {
    while (c * element(s) % align != 0) align /= 2;
  }
  if (!has_ghosts(s)) return twice * (1 + 4.0 * (kSectorBytes - align) / 256);  // 64 bytes of each of four pixels
  // A pair of lanes stores both halves of a pixel.
  const bool both = paired(s, p);
  const int lanes = p.block_c / nhwc_thread_channels(s.dw_size) * (both ? 2 : 1);
  const double runs =
      32.0 / lanes * (both && p.channel_blocks > 1 ? 2 : 1) + (32 % lanes == 0 || lanes % 32 == 0 ? 0 : 1);
  return twice * (1 + runs * (kSectorBytes - align) / 256);
}

// Clocks of the launch on its busiest SM: what it issues, moves through shared memory and through L2 or DRAM, which
// overlap but not wholly, and a part of the time that a block takes by itself. Instructions are those of the compiled
// kernel.
double cost(const GhostShape& s, const NhwcPlan& p) {
  const int warps = p.threads / 32, taps = s.dw_size * s.dw_size, thread_c = nhwc_thread_channels(s.dw_size);
  const int tiles = p.warps_n * p.warp_tiles, pad = s.dw_size / 2;
  const int rows = std::min(p.tile_h + (p.tiles_h > 2 ? 2 : p.tiles_h - 1) * pad, s.height);
  const bool fma = s.path == Path::kFloat32;
  const double pixels = double(p.images) * rows * s.width, together = fma ? kNhwcPixels / 2 : kNhwcPixels;
  const double chunks = std::ceil(pixels / together) * together / kNhwcPixels * p.warps_n;

  const bool ghosts = has_ghosts(s);
  const double prologue = warps * 350.0 + tiles * (25 + p.k_blocks * 14.0) +
                          std::ceil(tiles / 2.0) * (ghosts ? 300 + taps * 12 : 150) +
                          (ghosts ? 30.0 * p.images * (p.tile_h + pad) : 0);
  // of a chunk's pixels, and what its loop takes
  const double addresses = s.width % 4 == 0 || !ghosts ? 70 : 120;
  const double of_k = fma ? 8 * (34.0 * p.warp_tiles + 12) + 16 * p.warp_tiles  // a k block, of a chunk
                          : 10.0 * p.warp_tiles + (element(s) == 2 ? 25 : 41);
  const double of_chunk =
      p.k_blocks == 1 && !fma ? addresses + 33 * p.warp_tiles : addresses + 50 + 35 * p.warp_tiles + p.k_blocks * of_k;
  const int lanes = paired(s, p) ? 2 : 1, vectors = p.block_c / thread_c;
  const double positions = double(p.images) * p.strips * p.column_groups;
  const double in_step = p.threads / lanes / vectors * lanes, trips = std::floor(positions / in_step);
  const double strips = trips * warps + std::ceil((positions - trips * in_step) * vectors / 32);  // of whole warps
  const double of_row = kThreadColumns * (taps * thread_c + 8 + (lanes == 2 ? 6 : 0));
  const double cheap = ghosts ? warps * 60.0 + strips * ((p.strip_h + 2 * pad) * 50 + p.strip_h * of_row + 30) : 0;
  const double instructions = prologue + chunks * of_chunk + cheap;

  const double of_x1 = chunks * p.warp_tiles * 24 + strips * (p.strip_h + 2 * pad) * (kThreadColumns + 2 * pad) * 2.5;
  const double shared =
      chunks * p.k_blocks * (fma ? 32.0 : 8.0) * p.warp_tiles + tiles * p.k_blocks * 8 + (ghosts ? of_x1 : 0);
  const double blocks = double(ceil_div(p.grid, s.sm_count));
  constexpr double kDramBytes = 1830, kL2Bytes = 3000;  // a clock, of the device
  const double stored = p.dram_write * stored_sectors(s, p);
  const double memory = std::max(double(p.dram_read + p.dram_write) / kDramBytes, (p.l2_read + stored) / kL2Bytes) +
                        (stored - p.dram_write) / kDramBytes;
  const double resident = std::min<double>(p.blocks_per_sm, blocks);
  const double alone = instructions / warps * 2.5 + 2000 + p.k_blocks * std::ceil(chunks / warps) * 100;
  return std::hypot(blocks * instructions / 4, blocks * shared, memory) + std::ceil(blocks / resident) * alone * 0.2;
}

// size / 1, size / 2, … rounded up to multiples of ``align``, without repeats, ever sparser.
std::vector<int> divisions(int size, int align) {
  std::vector<int> sizes;
  for (int64_t parts = 1;; parts = std::max(parts + 1, parts * 5 / 4)) {
    const int part = static_cast<int>(std::min<int64_t>(round_up(ceil_div(size, parts), align), size));
    if (sizes.empty() || part < sizes.back()) sizes.push_back(part);
    if (part <= align) return sizes;
  }
}

}  // namespace

NhwcPlan plan_nhwc(const GhostShape& s) {
  NhwcPlan best{};
  if (!takes(s)) return best;
  double best_cost = 0;
  const int shortest = s.dw_size - 1;
  for (const int tile_h : divisions(s.height, 1)) {
    if (tile_h < shortest || int64_t{tile_h} * s.width < kNhwcPixels) continue;
    for (const int images : {1, 2, 4}) {
      if (images > 1 && (tile_h < s.height || images > s.batch || s.input_gate)) continue;
      for (const int block_c : divisions(s.init_channels, 4)) {
        if (block_c > 256) continue;
        for (int warp_tiles = nhwc_min_warp_tiles(s); warp_tiles <= nhwc_max_warp_tiles(s); ++warp_tiles) {
          for (const int threads : {256, 128, 64}) {
            if (threads > nhwc_max_threads(warp_tiles)) continue;
            for (const int strip_h : divisions(tile_h, 1)) {
              if (strip_h < (has_ghosts(s) ? shortest : tile_h)) continue;
              NhwcPlan p{};
              p.warp_tiles = warp_tiles, p.threads = threads, p.images = images, p.tile_h = tile_h;
              p.block_c = block_c, p.strip_h = strip_h;
              if (!complete(s, p)) continue;
              const double c = cost(s, p);
              if (best.block_c == 0 || c < best_cost) best = p, best_cost = c;
            }
          }
        }
      }
    }
  }
  return best;
}

bool nhwc_takes(const GhostForwardParams& a, const NhwcPlan& p) {
  if (p.block_c == 0) return false;
  const auto aligned = [](const void* data, int bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; };
  const GhostShape& s = a.shape;
  const Tensor4& x = a.x;
  const int64_t es = element(s), vector = kLoadBytes / es;
  // Pixels are vectors of 16 bytes, rows follow each other and so do the images of a block, within 32-bit offsets.
  if (x.stride_c != 1 || x.stride_w % vector != 0 || x.stride_h != x.stride_w * s.width || x.stride_n % vector != 0 ||
      !aligned(x.data, 16) || x.stride_h * s.height * es > INT32_MAX ||
      (p.images > 1 && x.stride_n != x.stride_h * s.height)) {
    return false;
  }
  if (a.primary_weight_stride_k != 1 || a.primary_weight_stride_n % vector != 0 ||
      a.primary_weight_stride_n > INT32_MAX / 4 || !aligned(a.primary_weight, 16))
    return false;
  if (!has_ghosts(s)) {  // its pixels are counted without rows
    const Tensor4& r = a.residual;
    if (a.output_gate.data != nullptr) return false;
    if (r.data != nullptr &&
        (r.stride_h != r.stride_w * s.width || (p.images > 1 && r.stride_n != r.stride_h * s.height)))
      return false;
  }
  if (a.input_gate != nullptr &&
      (a.input_gate_stride_c != 1 || a.input_gate_stride_n % vector != 0 || !aligned(a.input_gate, 16))) {
    return false;
  }
  for (const Tensor4* t : {&a.residual, &a.output_gate}) {
    if (t->data == nullptr) continue;
    if (t->stride_c != 1 || !aligned(t->data, static_cast<int>(4 * es))) return false;
    for (const int64_t stride : {t->stride_n, t->stride_h, t->stride_w}) {
      if (stride % 4 != 0) return false;
    }
  }
  return true;
}

const char* nhwc_params(const GhostForwardParams& a, const NhwcPlan& plan, NhwcParams* out) {
  NhwcParams p{a, plan};
  if (!narrow(a.out, &p.out) || !narrow(a.residual, &p.residual) || !narrow(a.output_gate, &p.output_gate)) {
    return "a stride within an image is beyond 2^31 elements";
  }
  const GhostShape& s = a.shape;
  const int es = element_size(s.path);
  p.x_pixel = static_cast<uint32_t>(a.x.stride_w * es);
  p.x_row = static_cast<uint32_t>(a.x.stride_h * es);
  p.out_pixel = p.out.stride_w * es;
  p.out_row = p.out.stride_h * es;
  p.lowest = a.primary.act == Act::kReLU ? 0.f : -std::numeric_limits<float>::infinity();
  p.channel_blocks = reciprocal_of(plan.channel_blocks);
  const int warps = plan.threads / 32, weight_warps = std::min(warps, plan.warps_n * plan.warp_tiles);
  p.weight_warps = reciprocal_of(weight_warps);
  p.weight_rows = warps / weight_warps;
  p.width = reciprocal_of(s.width);
  p.height = reciprocal_of(s.height);
  p.period = reciprocal_of(plan.tile_h + s.dw_size / 2);
  p.vectors = reciprocal_of(plan.block_c / nhwc_thread_channels(s.dw_size));
  p.column_groups = reciprocal_of(plan.column_groups);
  p.strips = reciprocal_of(plan.strips);
  *out = p;
  return nullptr;
}

}  // namespace ghostfused
