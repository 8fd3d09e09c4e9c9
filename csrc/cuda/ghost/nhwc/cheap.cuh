// The cheap operation and the store: x1 leaves shared memory as the output's first half, a depthwise conv of it, norm
// and activation as the second.
#pragma once

#include <type_traits>

#include "cuda/ghost/nhwc/channels.cuh"
#include "cuda/ghost/nhwc/load.cuh"
#include "cuda/ghost/store.cuh"

namespace ghostfused {

// A thread slides down strip_h rows of kThreadColumns columns. Row r of x1 adds to the kD outputs that it touches;
// their sums lie in registers, output o's at index o % kD, which is why rows come in kD phases.
template <Path kPath, int kTiles, int kD, Epilogue kEpilogue>
struct Cheap {
  using T = typename PathType<kPath>::T;
  static constexpr int kChannels = nhwc_thread_channels(kD), kColumns = kThreadColumns, kPad = kD / 2;
  static constexpr bool kReLU = kEpilogue == Epilogue::kReLU;
  static constexpr int kBytes = sizeof(T);
  // Blocks of few channels: neighbouring lanes have neighbouring positions and exchange, so that one instruction stores
  // both halves of a pixel: whole sectors.
  static constexpr bool kPaired = kTiles == 1 && kEpilogue != Epilogue::kAny && sizeof(T) == 2;
  using Vec = ChannelVectorOf<T, kChannels>;

  const NhwcParams& p;
  float weight[kD * kD][kChannels], shift[kChannels], slope[kChannels];
  float sum[kD][kColumns][kChannels];
  uint32_t row_bytes, pitch, out_pixel, out_row;
  uint32_t in;                   // x1's next row, first column
  unsigned char *to_x1, *to_x2;  // where the next row of either goes
  uint32_t from_a, from_b;       // kPaired: x1 of the row whose x2 comes next, of both lanes' positions
  bool has_x2;                   // the thread stores x2: kPaired, of two lanes the odd one
  // kAny: gate and residual of the thread's image and channels, the row of x1 that comes next, and the first column.
  const unsigned char *gate, *residual;
  float gate_scale_h, gate_scale_w;
  int row_h, col_w;

  __device__ __forceinline__ explicit Cheap(const NhwcParams& params) : p(params) {}

  __device__ __forceinline__ void load_weights(const float* cheap, int channels, int vector) {
    const float* from = cheap + vector * kChannels;
#pragma unroll
    for (int tap = 0; tap < kD * kD; ++tap) {
      const auto w =
          *reinterpret_cast<const std::conditional_t<kChannels == 4, float4, float2>*>(from + tap * channels);
      weight[tap][0] = w.x, weight[tap][1] = w.y;
      if constexpr (kChannels == 4) weight[tap][2] = w.z, weight[tap][3] = w.w;
    }
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      shift[i] = from[kD * kD * channels + i];
      if (kEpilogue == Epilogue::kAny) slope[i] = from[(kD * kD + 1) * channels + i];
    }
  }

  // Stores at a column of ``row``; the column is a constant, as loops over columns are unrolled.
  __device__ __forceinline__ void store(unsigned char* row, int column, Vec v) const {
    unsigned char* to = column == 0   ? row
                        : column == 1 ? advance<1>(row, out_pixel)
                        : column == 2 ? advance<2>(row, out_pixel)
                                      : advance<3>(row, out_pixel);
    store_global(to, v.raw);
  }

  // v * gate + residual at a pixel; ``second``: of the output's second half.
  __device__ __forceinline__ Vec gate_and_add(Vec v, bool second, int h, int w) const {
    if (p.residual.data == nullptr && p.output_gate.data == nullptr) return v;
    const int half = second ? p.args.shape.init_channels * kBytes : 0;
    float y[kChannels], z[kChannels];
    v.to_float(y);
    if (p.output_gate.data != nullptr) {
      const int gh = nearest(h, gate_scale_h, p.args.gate_height), gw = nearest(w, gate_scale_w, p.args.gate_width);
      load(p.output_gate, gate + half, gh, gw).to_float(z);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) y[i] *= z[i];
    }
    if (p.residual.data != nullptr) {
      load(p.residual, residual + half, h, w).to_float(z);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) y[i] += z[i];
    }
    return Vec::template of<false>(y);
  }

  __device__ __forceinline__ static Vec load(const DeviceTensor& t, const unsigned char* image, uint32_t h,
                                             uint32_t w) {
    Vec v;
    v.raw = *reinterpret_cast<const decltype(v.raw)*>(image +
                                                      (uint64_t{h} * t.stride_h + uint64_t{w} * t.stride_w) * kBytes);
    return v;
  }

  __device__ __forceinline__ void store_x1(Vec v, int column) {
    if constexpr (kEpilogue == Epilogue::kAny) v = gate_and_add(v, false, row_h, col_w + column);
    store(to_x1, column, v);
  }

  __device__ __forceinline__ void store_x2(float (&y)[kChannels], int column) {
    if constexpr (kEpilogue == Epilogue::kAny) activate<kChannels, kPath == Path::kFloat32>(y, p.args.cheap.act, slope);
    if constexpr (kEpilogue == Epilogue::kLowest) raise_to(y, p.lowest);
    Vec v = Vec::template of<kReLU>(y);
    if constexpr (kPaired) {
      Vec other;  // x2 of the even lane, for the odd one
      other.raw.x = __shfl_xor_sync(0xffffffffu, v.raw.x, 1);
      other.raw.y = __shfl_xor_sync(0xffffffffu, v.raw.y, 1);
      uint32_t step = pitch;
      set_apart(step);
      if (!has_x2) {
        load_shared(other.raw, from_a + column * step);
        load_shared(v.raw, from_b + column * step);
      }
      store(to_x1, column, other);  // of the even lane's position: its x1 by the even lane, its x2 by the odd one
      store(to_x2, column, v);      // of the odd lane's
    } else {
      if (!has_x2) return;  // nor are its gate and residual there
      if constexpr (kEpilogue == Epilogue::kAny) v = gate_and_add(v, true, row_h - 1 - kPad, col_w + column);
      store(to_x2, column, v);
    }
  }

  // Row r of x1, r % kD = kPhase, adds by the taps kFirst … kLast of a column to the outputs r - tap. ``center``: it is
  // a row of the strip, not of its halo. ``complete``: so is the output that it adds to last.
  template <int kPhase, int kFirst, int kLast>
  __device__ __forceinline__ void row(bool center, bool complete) {
    uint32_t next = in;
#pragma unroll
    for (int column = 0; column < kColumns + kD - 1; ++column) {
      Vec v;
      load_shared(v.raw, kStepsApart ? next : in + column * pitch);
      next += pitch;
      set_apart(next);
      if (!kPaired && column >= kPad && column < kColumns + kPad && center) store_x1(v, column - kPad);
      float x[kChannels];
      v.to_float(x);
#pragma unroll
      for (int tap = kFirst; tap <= kLast; ++tap) {
        float (&s)[kColumns][kChannels] = sum[(kPhase + kD - tap) % kD];
#pragma unroll
        for (int k = 0; k < kD; ++k) {
          if (column - k < 0 || column - k >= kColumns) continue;
          const bool begin = tap == 0 && k == 0;
#pragma unroll
          for (int i = 0; i < kChannels; ++i) {
            s[column - k][i] = fmaf(x[i], weight[tap * kD + k][i], begin ? shift[i] : s[column - k][i]);
          }
        }
      }
    }
    in += row_bytes;
    if (!kPaired && center) to_x1 = advance<1>(to_x1, out_row);
    if (kEpilogue == Epilogue::kAny) ++row_h;
    if (kLast == kD - 1 && complete) {
#pragma unroll
      for (int column = 0; column < kColumns; ++column) store_x2(sum[(kPhase + 1) % kD][column], column);
      to_x2 = advance<1>(to_x2, out_row);
      if constexpr (kPaired) {
        to_x1 = advance<1>(to_x1, out_row);
        from_a += row_bytes;
        from_b += row_bytes;
      }
    }
  }

  // The last rows of a strip add to fewer and fewer outputs.
  template <int kPhase>
  __device__ __forceinline__ void end() {
    row<kPhase, 1, 2>(true, true);
    row<(kPhase + 1) % 3, 2, 2>(false, true);
  }

  // 3×3: the first and last rows of a strip leave out the outputs that are not in it.
  __device__ __forceinline__ void strip3() {
    const int strip_h = p.plan.strip_h;
    row<0, 0, 0>(false, false);
    row<1, 0, 1>(true, false);
#pragma unroll 1
    for (int r = 2;; r += 3) {
      if (r == strip_h) return end<2>();
      row<2, 0, 2>(true, true);
      if (r + 1 == strip_h) return end<0>();
      row<0, 0, 2>(true, true);
      if (r + 2 == strip_h) return end<1>();
      row<1, 0, 2>(true, true);
    }
  }

  // Any size, with the code of one row: each adds to all outputs that it may touch, and those outside the strip are not
  // stored.
  __device__ __forceinline__ void strip() {
    const int strip_h = p.plan.strip_h;
#pragma unroll 1
    for (int r = 0; r < strip_h + kD - 1; ++r) {
      row<0, 0, kD - 1>(r >= kPad && r < strip_h + kPad, r >= kD - 1);
      // So that the next row is of phase 0 as well. What was sum[1] is stored.
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
#pragma unroll
        for (int i = 0; i < kChannels; ++i) {
          const float first = sum[0][column][i];
#pragma unroll
          for (int o = 1; o + 1 < kD; ++o) sum[o][column][i] = sum[o + 1][column][i];
          sum[kD - 1][column][i] = first;
        }
      }
    }
  }
};

template <Path kPath, int kTiles, int kD, Epilogue kEpilogue>
__device__ __forceinline__ void cheap_and_store(const NhwcParams& p, const NhwcTile& t, unsigned char* smem) {
  using Work = Cheap<kPath, kTiles, kD, kEpilogue>;
  constexpr int kPad = kD / 2, kBytes = Work::kBytes, kLanes = Work::kPaired ? 2 : 1;  // that share a channel vector
  const NhwcPlan& plan = p.plan;
  const GhostShape& s = p.args.shape;
  const int vectors = p.vectors.divisor, unit = threadIdx.x / kLanes, units = blockDim.x / kLanes;
  const int place = FastDivisor(p.vectors).divide(unit), vector = unit - place * vectors;
  const int step = units / vectors * kLanes;
  const int positions = plan.images * plan.strips * plan.column_groups;
  if (!Work::kPaired && place * kLanes >= step) return;

  Work work(p);
  work.load_weights(reinterpret_cast<const float*>(smem + plan.cheap_offset), plan.warps_n * kTiles * 16, vector);
  work.pitch = plan.pitch;
  work.row_bytes = plan.row_pixels * plan.pitch;
  work.out_pixel = p.out_pixel;
  work.out_row = p.out_row;
  const int channel = vector * Work::kChannels;
  const int c = t.c0 + channel;
  const bool odd_lane = Work::kPaired && threadIdx.x % 2 == 1;
  work.has_x2 = s.init_channels + c < s.out_channels && (odd_lane || !Work::kPaired);
  const uint32_t x1 = shared_address(smem) + plan.x1_offset + channel * kBytes;
  unsigned char* out = static_cast<unsigned char*>(p.out.data) + c * kBytes;

  if constexpr (kEpilogue == Epilogue::kAny) {
    work.gate_scale_h = static_cast<float>(p.args.gate_height) / static_cast<float>(s.height);
    work.gate_scale_w = static_cast<float>(p.args.gate_width) / static_cast<float>(s.width);
  }

  // The first row and column of a position: those that don't divide a tile overlap their neighbours.
  struct Place {
    int image, h, w;
  };
  const int place_of_warp = __shfl_sync(0xffffffffu, place, 0);
  const auto place_of = [&](int position) {
    const int strip = FastDivisor(p.column_groups).divide(position), column = position - strip * plan.column_groups;
    const int image = FastDivisor(p.strips).divide(strip);
    return Place{image, min((strip - image * plan.strips) * plan.strip_h, plan.tile_h - plan.strip_h),
                 min(column * kThreadColumns, s.width - kThreadColumns)};
  };
  const auto in_x1 = [&](const Place& at) {
    const int row = at.image * (plan.tile_h + kPad) + at.h;
    return x1 + row * work.row_bytes + at.w * work.pitch;
  };
  const auto in_out = [&](const Place& at) {
    return out + (t.n + at.image) * p.out.stride_n * kBytes + static_cast<int64_t>(t.h0 + at.h) * p.out_row +
           static_cast<int64_t>(at.w) * p.out_pixel;
  };
#pragma unroll 1
  for (int first = 0; first < positions; first += step) {
    if constexpr (Work::kPaired) {  // all lanes of a warp take part in each exchange: the last positions may come twice
      if (first + place_of_warp * 2 >= positions) break;
      const int even = min(first + min(place, step / 2 - 1) * 2, positions - 1), odd = min(even + 1, positions - 1);
      const Place a = place_of(even), b = place_of(odd);
      const int half = work.has_x2 ? s.init_channels * kBytes : 0;
      work.in = in_x1(odd_lane ? b : a);
      work.from_a = in_x1(a) + kPad * (work.row_bytes + work.pitch);
      work.from_b = in_x1(b) + kPad * (work.row_bytes + work.pitch);
      work.to_x1 = in_out(a) + half;
      work.to_x2 = in_out(b) + half;
    } else {
      if (first + place >= positions) break;
      const Place at = place_of(first + place);
      work.in = in_x1(at);
      work.to_x1 = in_out(at);
      work.to_x2 = work.to_x1 + s.init_channels * kBytes;
      if constexpr (kEpilogue == Epilogue::kAny) {
        const int n = t.n + at.image;
        work.gate = static_cast<const unsigned char*>(p.output_gate.data) + (n * p.output_gate.stride_n + c) * kBytes;
        work.residual = static_cast<const unsigned char*>(p.residual.data) + (n * p.residual.stride_n + c) * kBytes;
        work.row_h = t.h0 + at.h - kPad;
        work.col_w = at.w;
      }
    }
    if constexpr (kEpilogue == Epilogue::kAny ||
                  (kStepsApart && Work::kBytes == 4)) {  // it would spill, see vector.cuh
      work.strip();
    } else {
      work.strip3();
    }
  }
}

}  // namespace ghostfused
