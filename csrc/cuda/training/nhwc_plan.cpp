// What the kernels for channels_last take (pixels.cuh, strip.cuh), and how a batch is cut into blocks for them.
#include <algorithm>
#include <cmath>

#include "cuda/training/training.h"

namespace ghostfused {
namespace {

constexpr int kWarp = 32;
constexpr int kMinPairs = 6;  // of a block that hasn't all channels: fewer would use small parts of memory's sectors

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Pairs of channels × positions of a block's threads: few threads left over, and long rows of channels.
struct Split {
  int pairs, positions, threads;
};

Split split_threads(int pairs, int element) {
  Split best{};
  double best_use = -1;
  for (int blocks = 1; blocks <= pairs; ++blocks) {
    const int own = static_cast<int>(ceil_div(pairs, blocks));
    if (2 * own > kStripChannels) continue;
    if (own < kMinPairs && blocks > 1) break;
    // of the memory sectors that a row of channels touches, the share that it uses
    const double sectors = blocks == 1 ? 1. : 2. * element * own / (2. * element * own + 24.);
    for (int positions = 1; positions * own <= kStripThreads; ++positions) {
      const int threads = static_cast<int>(ceil_div(positions * own, kWarp)) * kWarp;
      if (threads < 3 * kWarp) continue;
      const double use = 0.7 * pairs * positions / (double{1} * blocks * threads) + 0.3 * sectors;
      if (use > best_use + 1e-9) best = {own, positions, threads}, best_use = use;
    }
  }
  return best;
}

const Kernel& kernel_of(TrainingStep step, Path path, int variant) {
  const int index = static_cast<int>(step);
  if (element_size(path) == 4) {
    return training_nhwc_kernel(2 * kTrainingNhwcKernels + (is_elementwise(step) ? 2 * index + variant : 2 + index));
  }
  return training_nhwc_kernel((path == Path::kFloat16 ? 0 : kTrainingNhwcKernels) + 2 * index + variant);
}

bool aligned(const TrainingMaps& maps, int element, int vector) {
  for (const void* map : {static_cast<const void*>(maps.out), static_cast<const void*>(maps.y2),
                          static_cast<const void*>(maps.dz1), static_cast<const void*>(maps.dz2), maps.grad, maps.y1}) {
    if (common_vector(vector, element, map, {}) < vector) return false;
  }
  return true;
}

bool strips_fit(TrainingStep step, const TrainingParams& params) {
  const GhostShape& s = params.args.shape;
  const NormAct &primary = params.args.primary, &cheap = params.args.cheap;
  if (s.dw_size != 3 || s.ratio != 2 || s.init_channels % 2 != 0 || s.out_channels != 2 * s.init_channels) return false;
  if (primary.act == Act::kPReLU || cheap.act == Act::kPReLU) return false;  // a number and a sum more per channel
  const TrainingMaps& m = params.maps;
  if (step == TrainingStep::kCheapBackward || step == TrainingStep::kPrimaryBackward) {
    if (!params.batch_statistics || params.args.output_gate.data != nullptr || m.product != nullptr) return false;
    if (m.dz2 == nullptr || params.sums == nullptr) return false;
  }
  if (step == TrainingStep::kPrimaryBackward && m.dz1 == nullptr) return false;
  const int element = element_size(s.path);
  if (!aligned(m, element, 2)) return false;
  // what is divided and counted in 32 bits, with room to spare
  const int64_t columns = ceil_div(s.width, kStripColumns);
  return s.batch * columns * s.height * std::max<int64_t>(columns, s.height) < (int64_t{1} << 31) &&
         int64_t{s.width} * s.out_channels * element < (int64_t{1} << 31);
}

TrainingPlan plan_strips(TrainingStep step, const TrainingParams& params, int sm_count) {
  const GhostShape& s = params.args.shape;
  const int index = static_cast<int>(step) - static_cast<int>(TrainingStep::kCheapStatistics);
  const int fitting = kStripBlocksPerSm[index], columns = static_cast<int>(ceil_div(s.width, kStripColumns));
  const int element = element_size(s.path);
  const Split split = split_threads(s.init_channels / 2, element);
  TrainingPlan p{};
  const bool masked = s.width % kStripColumns != 0;
  p.kernel = &kernel_of(step, s.path, masked);
  p.threads = split.threads;
  p.block_c = 2 * split.pairs;
  p.channel_blocks = static_cast<int>(ceil_div(s.init_channels, p.block_c));
  StripPlan& strip = p.strip;
  // The heights and numbers of blocks an SM for which the busiest SM takes least, counted in rows of a strip; a strip
  // costs about a row more than it has, a block six; and few warps hide little of memory's latency.
  double best = INFINITY;
  int rows = 1;
  for (int above = 1, last = 0; above <= s.height; ++above) {
    const int strip_h = static_cast<int>(ceil_div(s.height, above));
    if (strip_h == last) continue;
    last = strip_h;
    const int strips = static_cast<int>(s.batch * ceil_div(s.height, strip_h) * columns);
    for (int per_sm = 1; per_sm <= 2 * fitting; ++per_sm) {
      const int64_t wanted = std::max<int64_t>(1, int64_t{per_sm} * sm_count / p.channel_blocks);
      const int64_t each = ceil_div(ceil_div(strips, wanted), split.positions);
      const int64_t grid_rows = ceil_div(strips, each * split.positions);
      const int64_t waves = ceil_div(grid_rows * p.channel_blocks, sm_count);
      const double warps = std::min<int64_t>(waves, fitting) * split.threads / kWarp;
      const double cost = waves * (6. + each * (strip_h + 1.2)) * (1. + 5. / warps);
      if (cost >= best) continue;
      best = cost;
      rows = static_cast<int>(grid_rows);
      strip.strip_h = strip_h;
      strip.strips = strips;
      strip.row_strips = static_cast<int>(each * split.positions);
    }
  }
  strip.positions = split.positions;
  strip.pixel = element * s.init_channels;
  strip.out_pixel = element * s.out_channels;
  strip.by_lanes = reciprocal_of(split.pairs);
  strip.by_columns = reciprocal_of(columns);
  strip.by_strips = reciprocal_of(static_cast<uint32_t>(ceil_div(s.height, strip.strip_h)));
  strip.by_channel_blocks = reciprocal_of(p.channel_blocks);
  const int values = step == TrainingStep::kPrimaryBackward ? 2 + 9 : step == TrainingStep::kCheapBackward ? 2 : 3;
  p.passes = 1;
  p.rows = RowGroups::of(rows);
  p.partial = p.rows.partial(int64_t{values} * s.init_channels);
  p.counters = p.rows.counters(p.channel_blocks);
  return p;
}

// 16 bytes of channels, or 8; 0: neither.
int pixel_vector(const GhostShape& s) {
  const int full = 16 / element_size(s.path);
  return s.init_channels % full == 0 ? full : s.init_channels % (full / 2) == 0 ? full / 2 : 0;
}

bool pixels_fit(TrainingStep step, const TrainingParams& params) {
  const GhostShape& s = params.args.shape;
  const TrainingMaps& m = params.maps;
  const int element = element_size(s.path), vector = pixel_vector(s);
  if (vector == 0 || !aligned(m, element, vector)) return false;
  if (step == TrainingStep::kNormalize) {
    if (s.out_channels != 2 * s.init_channels) return false;
    if (params.args.output_gate.data != nullptr || params.args.residual.data != nullptr) return false;
  }
  return int64_t{s.batch} * s.height * s.width < (int64_t{1} << 30) && s.out_channels < (1 << 20);
}

TrainingPlan plan_pixels(TrainingStep step, const TrainingParams& params, int sm_count) {
  const GhostShape& s = params.args.shape;
  const int vector = pixel_vector(s), fitting = kPixelBlocksPerSm[static_cast<int>(step)];
  const int vectors = (step == TrainingStep::kNormalize ? s.out_channels : s.init_channels) / vector;
  TrainingPlan p{};
  p.kernel = &kernel_of(step, s.path, vector * element_size(s.path) == 16);
  p.threads = kTrainingThreads;
  PixelPlan& pixel = p.pixel;
  int lanes = 1;
  double best_use = 0;
  const int least = static_cast<int>(ceil_div(vectors, kPixelChannels / vector));
  for (int blocks = least; blocks < least + 4 && blocks <= vectors; ++blocks) {
    const int own = static_cast<int>(ceil_div(vectors, blocks));
    const double use = double{1} * vectors * (kTrainingThreads / own) / (ceil_div(vectors, own) * kTrainingThreads);
    if (use > best_use + 0.02) best_use = use, lanes = own;
  }
  p.block_c = lanes * vector;
  p.channel_blocks = static_cast<int>(ceil_div(vectors, lanes));
  pixel.positions = kTrainingThreads / lanes;
  pixel.pixels = s.batch * s.height * s.width;
  const int together = pixel.positions * kPixelsTogether;
  double best = INFINITY;
  int rows = 1;
  for (int per_sm = 1; per_sm <= 2 * fitting; ++per_sm) {
    const int64_t wanted = std::max<int64_t>(1, int64_t{per_sm} * sm_count / p.channel_blocks);
    const int64_t each = ceil_div(ceil_div(pixel.pixels, wanted), together);
    const int64_t grid_rows = ceil_div(pixel.pixels, each * together);
    const int64_t waves = ceil_div(grid_rows * p.channel_blocks, sm_count);
    const double warps = std::min<int64_t>(waves, fitting) * kTrainingThreads / kWarp;
    const double cost = waves * (1. + each) * (1. + 4. / warps);
    if (cost >= best) continue;
    best = cost;
    rows = static_cast<int>(grid_rows);
    pixel.row_pixels = static_cast<int>(each * together);
  }
  pixel.by_lanes = reciprocal_of(lanes);
  pixel.by_channel_blocks = reciprocal_of(p.channel_blocks);
  p.passes = 1;
  p.rows = RowGroups::of(rows);
  return p;
}

constexpr int kMaxFragments = 72 * 1024;  // bytes: three blocks an SM on the largest devices

// A pixel of x and of out must be one number, and vectors must fit both.
bool primary_fits(const TrainingParams& params) {
  const GhostForwardParams& a = params.args;
  const GhostShape& s = a.shape;
  if (element_size(s.path) != 2) return false;
  const int64_t pixel = a.x.stride_w;
  const bool dense = a.x.stride_c == 1 && (s.height == 1 || a.x.stride_h == pixel * s.width) &&
                     (s.batch == 1 || a.x.stride_n == pixel * s.width * s.height);
  if (!dense || s.in_channels % 8 != 0 || s.init_channels % 4 != 0 || s.out_channels % 4 != 0) return false;
  if (a.input_gate != nullptr || a.kernel != 1 || a.stride != 1 || a.primary_weight_stride_k != 1) return false;
  if (common_vector(8, 2, a.x.data, {pixel}) < 8) return false;
  if (common_vector(8, 2, a.primary_weight, {a.primary_weight_stride_n}) < 8) return false;
  if (common_vector(4, 2, params.maps.out, {}) < 4) return false;
  const int64_t pixels = int64_t{s.batch} * s.height * s.width;
  return pixels < (int64_t{1} << 30) && pixel < (1 << 20) && s.out_channels < (1 << 20) &&
         ceil_div(s.in_channels, 32) * 2 * kFragmentBytes <= std::min(kMaxFragments, s.smem_per_block - 4096);
}

TrainingPlan plan_primary(const TrainingParams& params, int sm_count) {
  const GhostShape& s = params.args.shape;
  TrainingPlan p{};
  PrimaryPlan& plan = p.primary;
  plan.k_blocks = static_cast<int>(ceil_div(s.in_channels, 32));
  plan.pixels = s.batch * s.height * s.width;
  double best = INFINITY;
  int rows = 1, tiles = 1;
  for (int of_warp = 1; of_warp <= kPrimaryTiles; ++of_warp) {
    for (const int warps_n : {1, 2, 4}) {
      const int all = of_warp * warps_n, fragments = all * plan.k_blocks * 2 * kFragmentBytes;
      if (fragments > std::min(kMaxFragments, s.smem_per_block - 4096)) continue;
      const int64_t blocks = ceil_div(s.init_channels, 16 * all);
      const int together = kMmaPixels * kPixelTiles * (kPrimaryWarps / warps_n);
      // instructions of a warp: each time, of a block
      const double each_time = of_warp * kPixelTiles * 26. + plan.k_blocks * 2. * of_warp * (kPixelTiles + 1) +
                               plan.k_blocks * 2. * kPixelTiles + 20.;
      const double of_block =
          150. + 3. * all * plan.k_blocks + 40. * of_warp + 12. * ceil_div(16 * all, kPrimaryThreads);
      for (int per_sm = 1; per_sm <= 8; ++per_sm) {
        const int64_t wanted = std::max<int64_t>(1, int64_t{per_sm} * sm_count / blocks);
        const int64_t times = ceil_div(ceil_div(plan.pixels, wanted), together);
        const int64_t grid_rows = ceil_div(plan.pixels, times * together);
        const int64_t waves = ceil_div(grid_rows * blocks, sm_count);
        const double warps = std::min<int64_t>(waves, kPrimaryBlocksPerSm[of_warp - 1]) * kPrimaryWarps;
        const double cost = waves * (of_block + times * each_time) * (1. + 4. / warps);
        if (cost >= best) continue;
        best = cost;
        rows = static_cast<int>(grid_rows);
        tiles = of_warp;
        plan.warps_n = warps_n;
        plan.row_pixels = static_cast<int>(times * together);
        p.block_c = 16 * all;
        p.channel_blocks = static_cast<int>(blocks);
        const int sums = 4 * (p.block_c * (1 + kPrimaryWarps / warps_n) + kPrimaryWarps + 1);
        p.smem_bytes = std::max(fragments, sums);
      }
    }
  }
  plan.index = (s.path == Path::kFloat16 ? 0 : kPrimaryTiles) + tiles - 1;
  plan.x_pixel = static_cast<uint32_t>(2 * params.args.x.stride_w);
  plan.out_pixel = 2 * s.out_channels;
  p.kernel = &kernel_of(TrainingStep::kPrimaryStatistics, s.path, tiles - 1);
  p.threads = kPrimaryThreads;
  p.passes = 1;
  p.rows = RowGroups::of(rows);
  p.partial =
      ceil_div(p.rows.partial(int64_t{3} * s.init_channels), kZeroWords) * kZeroWords;  // what follows is aligned
  p.counters = kZeroWords + p.rows.counters(p.channel_blocks);
  return p;
}

}  // namespace

const Kernel& training_nhwc_kernel(int index) {
  const Kernel* tables[] = {kFloat16NhwcTraining, kBFloat16NhwcTraining, kFloat32NhwcTraining};
  return tables[index / kTrainingNhwcKernels][index % kTrainingNhwcKernels];
}

bool nhwc_fits(TrainingStep step, const TrainingParams& params) {
  const GhostShape& s = params.args.shape;
  if (!s.channels_last) return false;
  if (step == TrainingStep::kPrimaryStatistics) return primary_fits(params);
  return is_elementwise(step) ? pixels_fit(step, params) : strips_fit(step, params);
}

TrainingPlan plan_nhwc(TrainingStep step, const TrainingParams& params, int sm_count) {
  if (step == TrainingStep::kPrimaryStatistics) return plan_primary(params, sm_count);
  return is_elementwise(step) ? plan_pixels(step, params, sm_count) : plan_strips(step, params, sm_count);
}

}  // namespace ghostfused
