// Which modules the NCHW kernel takes, and how it cuts them into blocks.
#include <algorithm>
#include <cstdint>

#include "cuda/ghost/nchw/nchw.h"

namespace ghostfused {
namespace {

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

// Whether it takes the kernel with everything.
bool is_full(const GhostShape& s) { return s.full || s.dw_size == 5; }

bool has_window(const GhostShape& s) { return s.window_stride > 0; }

constexpr bool is_wide(NchwMap map) { return map == NchwMap::kWide8 || map == NchwMap::kWide4; }

// Channels that a block's output vectors come in: of maps stored as one run, whole 16 bytes.
constexpr int channel_step(NchwMap map, int bytes) {
  return map == NchwMap::kSeven ? 16 / bytes : map == NchwMap::kFourteen && bytes == 2 ? 2 : 1;
}

// Input channels that come in whole steps, 7 × 7 also in whole vectors; half precision has half a step in others.
constexpr int in_channel_step(NchwMap map, Path path) {
  return path == Path::kFloat32 ? 4 : path == Path::kTF32 || map != NchwMap::kSeven ? 8 : 16;
}

// Where x1 and the rest lie in shared memory.
void lay_out(const GhostShape& s, NchwPlan& p) {
  const int bytes = element_size(p.path), vector = bytes * nchw_chunk(p.map), planes = round_up(p.block_c, 8);
  const bool fma = p.path == Path::kFloat32;
  if (is_wide(p.map)) {
    p.row_pitch = bytes * s.width + vector;  // a vector of zeros between rows
    p.plane_pitch = round_up(vector + (p.tile_h + s.dw_size - 1) * p.row_pitch, 16);
    const int period =
        8 * vector;  // a quarter warp (V = 4: half) stores 4 vectors of 2 (4) channels: no bank conflicts
    while (p.plane_pitch % period != period / 2) p.plane_pitch += 16;
  } else {
    p.row_pitch = nchw_small_row_pitch(p.map, bytes);
    p.plane_pitch = nchw_small_plane_pitch(p.map, bytes);
  }
  p.cheap_offset = 16 * std::max(16 * p.tiles, planes);
  p.gate_offset = p.cheap_offset + p.block_c * 4 * nchw_cheap_floats(s.dw_size);
  p.zero_offset = round_up(p.gate_offset + (s.input_gate ? bytes * s.in_channels : 0), 16);
  p.x1_offset = p.zero_offset + kNchwZeroBytes;
  p.stage_offset = round_up(p.x1_offset + planes * p.plane_pitch, 16);
  const int step = nchw_step(p.path), groups = ceil_div(p.block_c, kFmaChannels);
  // One number apart: lanes of two groups read them at once without bank conflicts.
  p.group_pitch = fma ? (p.k_chunk + 1) * 4 * kFmaChannels : 0;
  const int weights = has_window(s) ? p.tiles * 512 * 3 * (p.k_chunk / 4)
                      : fma         ? groups * p.group_pitch
                                    : p.tiles * (512 * (s.in_channels / step) + (s.in_channels % step ? 256 : 0));
  int stage = weights;
  if (p.map == NchwMap::kFourteen) stage = std::max(weights, p.block_c * p.plane_pitch);
  if (p.map == NchwMap::kSeven) {
    const int map = 49 * bytes, ghosts = map * p.block_c * (bytes == 2 ? 2 : 1);  // half precision: and x1
    stage = std::max(map * p.k_chunk + groups * p.group_pitch, ghosts);
    const bool summed = p.warps_k > 1 || bytes == 4 || is_full(s);  // in shared memory
    if (summed) stage = std::max(stage, p.warps * (fma ? kFmaChannels : 4 * p.tiles) * 1024);
  }
  p.smem_bytes = p.stage_offset + stage;
}

// Warp instructions of the busiest multiprocessor, from counts of the compiled kernels.
double cost(const GhostShape& s, const NchwPlan& p) {
  const bool wide = is_wide(p.map), seven = p.map == NchwMap::kSeven;
  const int v = nchw_chunk(p.map), d = s.dw_size, rows = p.strip_h, bytes = element_size(p.path);
  const int cols = wide ? v : s.width, halves = ceil_div(seven ? p.warp_c : p.block_c, 8);
  const double steps = static_cast<double>(s.in_channels) / nchw_step(p.path);
  const int halo_rows = std::min(p.tile_h + (wide ? d - 1 : 0), s.height);
  const int chunks = seven ? 7 : ceil_div(halo_rows * s.width, v);
  double primary = 0;
  if (has_window(s)) {
    const int quads = ceil_div(s.in_channels, 4), passes = ceil_div(ceil_div(chunks, 8), p.warps);
    const int loads = p.k_chunk / 4 < quads ? passes : 1;
    primary = passes * p.warps * (quads * 3 * (12 + 5.0 * ceil_div(p.block_c, 16)) + 80 + halves * 2 * (2 * v + 8)) +
              loads * (quads * p.tiles * 85.0 + p.warps * 40);
  } else if (p.path == Path::kFloat32) {
    const int warps = seven ? p.warps : ceil_div(chunks * ceil_div(p.block_c, kFmaChannels), 32);
    const double product = seven ? 9 + 60.0 : 6 + 34, epilogue = seven ? 250 : 200;
    primary =
        warps * (4 * steps * product / (seven ? p.warps_k : 1) + epilogue) + s.in_channels * p.block_c / 128.0 * 8;
  } else if (seven) {
    const double step = bytes == 2 ? 16 + 14 + 7 * p.tiles + 6 * p.tiles + 6 : 28 + 7 * p.tiles + 10 * p.tiles + 6;
    primary =
        p.warps * (steps / p.warps_k * step + 4 * p.tiles * (p.warps_k == 1 && bytes == 2 && !is_full(s) ? 16 : 30));
  } else {
    const double step = bytes == 2 ? 2 * v + v * p.tiles + p.tiles + 16 : 2 * v + 2 * v * p.tiles / 2.0 + p.tiles + 10;
    const double epilogue = 30 + halves * 2 * (2 * v + 8);
    primary = round_up(ceil_div(chunks, 8), p.warps) * (steps * step + epilogue) + steps * p.tiles * 14;
  }
  if (seven) {
    primary += s.in_channels * 49 * bytes / 16 / 32 * 4 + p.warps * 60 * ceil_div(s.in_channels, p.k_chunk);
  }
  const int positions = wide ? p.row_chunks * (p.tile_h / rows) * p.block_c : p.block_c * (s.height / rows);
  const double cheap =
      has_window(s)
          ? ceil_div(positions, 32) * ((rows + d - 1) * (cols * (d * d + 1.2) + 15) + rows * cols * 8 + 60)
          : ceil_div(positions, 32) * (rows * (cols * (d * d + 1.0) + 8) + (rows + d - 1) * (cols * 1.2 + 5) + 60);
  const double store = wide ? 0 : p.block_c * s.height * s.width * bytes / 512.0 * 8;
  const double parameters = p.warps * 80 + ceil_div(p.block_c, 32) * (150 + 6 * d * d) + (wide ? p.block_c * 10 : 0);
  const int64_t blocks = int64_t{s.batch} * p.tiles_h * p.channel_blocks;
  const int64_t waves = (blocks + s.sm_count - 1) / s.sm_count;
  // What a block waits for is hidden by the warps of others: 12 of them in two blocks or more, if the grid has so many.
  const int blocks_per_sm = std::min(s.smem_per_sm / (p.smem_bytes + 1024), 2 * kNchwMaxThreads / 32 / p.warps);
  const int64_t resident = std::min<int64_t>(waves, std::max(blocks_per_sm, 1)) * p.warps;
  const double idle = (resident < 12 ? 12.0 / static_cast<double>(resident) : 1) * (blocks_per_sm < 2 ? 1.5 : 1);
  return (primary + cheap + store + parameters) * static_cast<double>(waves) * (0.75 + 0.25 * idle);
}

// What the plan moves, as in LaunchPlan.
void count_traffic(const GhostShape& s, NchwPlan& p) {
  const int pad = s.dw_size / 2;
  const int64_t image = int64_t{s.height} * s.width, ghosts = s.out_channels - s.init_channels;
  int64_t rows = 0;  // of x1, halos included
  for (int h = 0; h < s.height; h += p.tile_h) {
    rows += std::min(h + p.tile_h + pad, s.height) - std::max(h - pad, 0);
  }
  const int64_t bytes = element_size(p.path);
  const bool window = has_window(s);
  const int64_t taps = window ? 9 : 1,
                x_pixels = window ? int64_t{s.window_stride} * s.window_stride : 1;  // of x, for one
  const int64_t parameters = bytes * (int64_t{s.init_channels} * s.in_channels * taps + ghosts * s.dw_size * s.dw_size);
  p.recompute = static_cast<double>(rows) / s.height;
  p.dram_read = bytes * s.batch * image * x_pixels * s.in_channels + parameters;
  p.dram_write = bytes * s.batch * image * s.out_channels;
  p.l2_read = s.batch * (bytes * rows * s.width * x_pixels * s.in_channels * p.channel_blocks + parameters * p.tiles_h);
  const int by_registers = p.map == NchwMap::kSeven ? 1 : std::max(1, 2 * kNchwMaxThreads / 32 / p.warps);
  p.blocks_per_sm = std::max(1, std::min(by_registers, s.smem_per_sm / (p.smem_bytes + 1024)));
}

struct Search {
  const GhostShape& s;
  Path path;
  NchwPlan best{};
  double best_cost = 0;

  void consider(NchwPlan p) {
    p.channel_blocks = ceil_div(s.init_channels, p.block_c);
    p.tiles_h = ceil_div(s.height, p.tile_h);
    p.row_chunks = s.width / nchw_chunk(p.map);
    lay_out(s, p);
    if (p.smem_bytes > s.smem_per_block) return;
    const double c = cost(s, p);
    if (best.block_c == 0 || c < best_cost) best = p, best_cost = c;
  }
  void map(NchwMap map, std::initializer_list<int> tile_counts) {
    for (const int tiles : tile_counts) {
      const int strip = nchw_strip_rows(map, tiles, s.dw_size), step = channel_step(map, element_size(path));
      const bool seven = map == NchwMap::kSeven, wide = is_wide(map);
      const int most =
          std::min(round_up(s.init_channels, step), (seven || path == Path::kFloat32 ? 4 : 1) * 16 * tiles);
      for (int blocks = ceil_div(s.init_channels, most);; ++blocks) {
        NchwPlan p{};
        p.map = map;
        p.path = path;
        p.strip_h = strip;
        p.tiles = tiles;
        p.block_c = round_up(ceil_div(s.init_channels, blocks), step);
        if (p.block_c <= most) with_channels(p, strip, wide, seven);
        if (p.block_c <= 8 || p.block_c * 4 <= most) break;
      }
    }
  }
  void with_channels(NchwPlan p, int strip, bool wide, bool seven) {
    if (seven) {
      p.tile_h = 7;
      for (int warps_c = ceil_div(p.block_c, 16 * p.tiles); warps_c <= ceil_div(p.block_c, 8) && warps_c <= 4;
           ++warps_c) {
        p.warp_c = round_up(ceil_div(p.block_c, warps_c), 8);
        for (p.warps_k = 1; p.warps_k <= std::min(kNchwMaxThreads / 32 / warps_c, std::max(s.in_channels / 16, 1));
             ++p.warps_k) {
          p.warps = warps_c * p.warps_k;
          for (int parts = 1; parts <= 8; ++parts) {
            p.k_chunk = round_up(ceil_div(s.in_channels, parts), in_channel_step(p.map, path));
            const int steps = p.k_chunk / nchw_step(path);
            if (ceil_div(steps, ceil_div(steps, p.warps_k)) == p.warps_k) consider(p);  // else one is idle
          }
        }
      }
      return;
    }
    p.warp_c = p.block_c;
    p.warps_k = 1;
    p.k_chunk = s.in_channels;
    const int most_h = wide ? round_up(s.height, strip) : s.height;
    for (p.tile_h = wide ? strip : s.height; p.tile_h <= most_h; p.tile_h += strip) {
      const int row_chunks = s.width / nchw_chunk(p.map), strips = p.tile_h / strip;
      const int64_t most_divided = int64_t{row_chunks} * std::max(p.tile_h + s.dw_size, strips * p.block_c);
      if (most_divided * row_chunks >= 1 << 20) break;  // SmallDivisor
      for (p.warps = 4; p.warps <= kNchwMaxThreads / 32; ++p.warps) {
        if (!has_window(s)) {
          consider(p);
          continue;
        }
        p.strip_h = p.tile_h;
        for (int steps = std::min(ceil_div(s.in_channels, 4), 128);; steps = ceil_div(steps, 2)) {
          p.k_chunk = 4 * steps;
          consider(p);
          if (steps == 1) break;
        }
      }
    }
  }
};

bool aligned(const void* data, int64_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

}  // namespace

bool nchw_takes(const GhostForwardParams& a, const NchwPlan& plan) {
  if (plan.block_c == 0) return false;
  const GhostShape& s = a.shape;
  if (has_window(s)) {  // it reads x and the weights with any strides
    return s.batch <= 65535 && int64_t{s.height} * s.width * s.out_channels < int64_t{1} << 30 &&
           a.input_gate == nullptr && a.residual.data == nullptr && a.output_gate.data == nullptr;
  }
  const bool wide = is_wide(plan.map);
  const int bytes = element_size(plan.path), step = channel_step(plan.map, bytes);
  if (s.in_channels % in_channel_step(plan.map, plan.path) != 0 || s.batch > 65535) return false;
  // Whole vectors: of pixels in wide maps, of maps in small ones.
  if (s.init_channels % step != 0 || s.out_channels % step != 0) return false;
  const int64_t pixels = int64_t{s.height} * s.width, vector = wide ? nchw_chunk(plan.map) : 16 / bytes;
  const auto dense = [&](const Tensor4& t) { return t.stride_w == 1 && t.stride_h == s.width; };
  if (!dense(a.x) || !dense(a.out) || !aligned(a.x.data, 16) || !aligned(a.out.data, 16)) return false;
  for (const Tensor4* t : {&a.x, &a.out}) {
    if (t->stride_n % vector != 0 || t->stride_n < 0) return false;
    if (wide ? t->stride_c % vector != 0 || t->stride_c < 0 : t->stride_c != pixels) return false;
  }
  const int weights = plan.path == Path::kFloat32 ? 16 : 8;
  if (a.primary_weight_stride_k != 1 || a.primary_weight_stride_n * bytes % weights != 0 ||
      !aligned(a.primary_weight, weights)) {
    return false;
  }
  // Bytes of an image are counted in 32 bits.
  const int64_t most = (int64_t{1} << 31) / bytes;
  return a.x.stride_c * s.in_channels < most && a.out.stride_c * s.out_channels < most &&
         a.primary_weight_stride_n * s.init_channels < most;
}

NchwPlan plan_nchw(const GhostShape& s) {
  const bool half = element_size(s.path) == 2, full = is_full(s);
  if (s.channels_last || s.ratio != 2 || (s.dw_size != 3 && !(half && s.dw_size == 5))) return {};
  // Which are compiled: see nchw.h.
  const bool tf32 = s.path == Path::kTF32 && !full && s.in_channels % nchw_step(Path::kTF32) == 0, one = full || !half;
  Search search{s, half || tf32 ? s.path : Path::kFloat32};
  if (has_window(s)) {
    if (half && s.width % 4 == 0 && s.width > 4) search.map(NchwMap::kWide4, {2});
    if (search.best.block_c > 0) count_traffic(s, search.best);
    return search.best;
  }
  if (s.width == 7 && s.height == 7) {
    search.map(NchwMap::kSeven, {search.path == Path::kFloat32 ? 2 : 3});
  } else if (s.width == 14 && s.height == 14) {
    one ? search.map(NchwMap::kFourteen, {2}) : search.map(NchwMap::kFourteen, {2, 4});
  } else if (s.width % 8 == 0 && s.width > 8 && half) {
    one ? search.map(NchwMap::kWide8, {2}) : search.map(NchwMap::kWide8, {1, 2});
  } else if (s.width % 4 == 0 && s.width > 4) {
    one ? search.map(NchwMap::kWide4, {2}) : search.map(NchwMap::kWide4, {2, 4});
  }
  if (search.best.block_c > 0) count_traffic(s, search.best);
  return search.best;
}

}  // namespace ghostfused
