// Runs the CPU kernels without Torch, for the sanitizers and for instruction counts:
//   cpu_driver [--isa NAME] [--threads N] [--repeat N] CASE ...
// where a case is one of
//   ghost BATCH CIN H W CP RATIO D LAYOUT DTYPE EXTRAS            RATIO 1: no ghosts
//   conv BATCH CIN H W COUT KERNEL STRIDE LAYOUT DTYPE EXTRAS
//   depthwise BATCH C H W KERNEL_H KERNEL_W STRIDE LAYOUT DTYPE EXTRAS
//   squeeze BATCH C H W REDUCED GATE 0 LAYOUT DTYPE EXTRAS        REDUCED 0: global pooling
//   convert BATCH C H W 0 0 0 LAYOUT DTYPE 0                      from LAYOUT to the other
//   concat BATCH C1 H W C2 C3 C4 LAYOUT DTYPE EXTRAS                EXTRAS 1: C1 of the other layout; C3, C4 0: none
//   maxpool BATCH C H W KERNEL STRIDE 0 LAYOUT DTYPE 0
//   avgpool BATCH C H W KERNEL 0 0 LAYOUT DTYPE 0
//   upsample BATCH C H W 0 SCALE 0 LAYOUT DTYPE 0
//   gate ROWS COUNT STRIDE GATE 0 0 0 nchw DTYPE 0
//   cast ROWS COUNT STRIDE TO 0 0 0 nchw DTYPE 0                   TO: 0 float32, 1 float16, 2 bfloat16
// with LAYOUT nchw or nhwc, DTYPE float32, float16 or bfloat16, EXTRAS 0 or 1 (gates and residual; another activation).
// Every buffer is its own allocation of just the size needed. Prints a checksum per case, which mustn't depend on
// the number of threads; tests/kernels/test_cpu.py compares values.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../csrc/cpu/dispatch.h"

using namespace ghostfused;

namespace {

int thread_count = 2;

uint32_t state = 1;
float random_float() {  // of [-1, 1)
  state = state * 1664525 + 1013904223;
  return static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31f;
}

struct Buffer {
  std::unique_ptr<char[]> data;
  int64_t bytes;
};

// ``count`` random numbers; fp16 and bf16 get bits whose exponent is that of numbers near one.
Buffer numbers(int64_t count, Path path) {
  const int64_t size = path == Path::kFloat32 ? 4 : 2;
  Buffer b{std::make_unique<char[]>(count * size), count * size};
  for (int64_t i = 0; i < count; ++i) {
    const float x = random_float();
    if (size == 4) {
      std::memcpy(&b.data[i * 4], &x, 4);
    } else {
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      const uint16_t sign = bits >> 16 & 0x8000, mantissa = bits & 0x7f;
      const uint16_t half = path == Path::kBFloat16 ? sign | 0x3f00 | mantissa : sign | 0x3800 | mantissa << 3;
      std::memcpy(&b.data[i * 2], &half, 2);
    }
  }
  return b;
}

Tensor4 dense(const Buffer& b, bool channels_last, int64_t c, int64_t h, int64_t w) {
  return channels_last ? Tensor4{b.data.get(), c * h * w, 1, w * c, c} : Tensor4{b.data.get(), c * h * w, h * w, w, 1};
}

struct Drawer {
  Path path;
  bool channels_last, extras;
  std::vector<Buffer> buffers;

  char* numbers(int64_t count) {
    buffers.push_back(::numbers(count, path));
    return buffers.back().data.get();
  }
  Tensor4 tensor(int64_t n, int64_t c, int64_t h, int64_t w) {
    numbers(n * c * h * w);
    return dense(buffers.back(), channels_last, c, h, w);
  }
  ChannelVector vector(int64_t channels) { return {numbers(channels), 1}; }
  NormAct norm(int64_t channels, Act act) {
    ChannelVector v[6];
    for (ChannelVector& each : v) each = vector(channels);
    return {v[0], v[1], v[2], v[3], v[4], v[5], 2.f, 0.1f, act, false};
  }
};

bool once = true;  // nothing is repeated, to be counted

// What pack(to) writes; null: nothing.
template <typename Pack>
std::unique_ptr<char[]> packed(const Pack& pack) {
  const int64_t bytes = pack(nullptr);
  if (!bytes) return nullptr;
  auto memory = std::make_unique<char[]>(bytes);
  pack(memory.get());
  return memory;
}

// run({}), and then run with what was packed before, which must make the same.
template <typename Run>
void with_and_without(const Buffer& out, const cpu::Packed& packed, const Run& run) {
  run({});
  if (!once) return;
  const auto first = std::make_unique<char[]>(out.bytes);
  std::memcpy(first.get(), out.data.get(), out.bytes);
  std::memset(out.data.get(), -1, out.bytes);
  run(packed);
  if (std::memcmp(first.get(), out.data.get(), out.bytes) == 0) return;
  std::fprintf(stderr, "what is packed makes another result\n");
  std::exit(1);
}

void forward(const cpu::Isa& isa, const GhostForwardParams& p, const Buffer& out) {
  const auto weight = packed([&](void* to) { return isa.kernels->pack_weight(p, false, to); });
  const auto parameters = packed([&](void* to) { return isa.kernels->pack_parameters(p, to); });
  const cpu::Packed all{weight.get(), false, reinterpret_cast<const float*>(parameters.get())};
  with_and_without(out, all, [&](const cpu::Packed& packed) { isa.kernels->forward(p, packed, thread_count); });
}

void run_ghost(const cpu::Isa& isa, const int* n, Drawer& draw, Buffer& out, int kernel = 1, int stride = 1) {
  GhostForwardParams p{};
  GhostShape& s = p.shape;
  s.path = draw.path;
  s.channels_last = draw.channels_last;
  s.batch = n[0], s.in_channels = n[1], s.height = n[2], s.width = n[3];
  s.init_channels = n[4], s.ratio = std::max(n[5], 2), s.dw_size = n[6];
  const int64_t cp = s.init_channels, cheap = cp * (s.ratio - 1);
  s.out_channels = s.init_channels * n[5];
  p.kernel = kernel, p.stride = stride, p.dilation = 1;
  p.x_height = s.height, p.x_width = s.width;
  s.height = (s.height - 1) / p.stride + 1, s.width = (s.width - 1) / p.stride + 1;
  const int64_t area = p.kernel * p.kernel;
  p.x = draw.tensor(s.batch, s.in_channels, p.x_height, p.x_width);
  p.primary_weight = draw.numbers(cp * s.in_channels * area);
  p.primary_weight_stride_n = s.in_channels * area, p.primary_weight_stride_k = area;
  p.primary_weight_stride_h = p.kernel, p.primary_weight_stride_w = 1;
  p.cheap_weight = draw.numbers(cheap * s.dw_size * s.dw_size);
  p.cheap_weight_stride_c = s.dw_size * s.dw_size, p.cheap_weight_stride_h = s.dw_size, p.cheap_weight_stride_w = 1;
  p.primary = draw.norm(cp, draw.extras ? Act::kPReLU : Act::kReLU);
  p.cheap = draw.norm(cheap, draw.extras ? Act::kSiLU : Act::kReLU);
  if (draw.extras) {
    s.input_gate = true;
    p.gate_height = (s.height + 1) / 2, p.gate_width = (s.width + 1) / 2;
    if (n[5] > 1) p.output_gate = draw.tensor(s.batch, s.out_channels, p.gate_height, p.gate_width);
    p.residual = draw.tensor(s.batch, s.out_channels, s.height, s.width);
    p.input_gate = draw.numbers(int64_t{s.batch} * s.in_channels);
    p.input_gate_stride_n = s.in_channels, p.input_gate_stride_c = 1;
  }
  out = numbers(int64_t{s.batch} * s.out_channels * s.height * s.width, s.path);
  p.out = dense(out, s.channels_last, s.out_channels, s.height, s.width);
  if (s.height * s.width == 1) s.channels_last = true, p.out.stride_c = 1;
  forward(isa, p, out);
}

void run_conv(const cpu::Isa& isa, const int* n, Drawer& draw, Buffer& out) {
  const int ghost[] = {n[0], n[1], n[2], n[3], n[4], 1, 1};
  run_ghost(isa, ghost, draw, out, n[5], n[6]);
}

void run_depthwise(const cpu::Isa& isa, const int* n, Drawer& draw, Buffer& out) {
  DepthwiseParams p{};
  p.path = draw.path;
  p.channels_last = draw.channels_last;
  p.batch = n[0], p.channels = n[1], p.height = n[2], p.width = n[3];
  p.kernel_h = n[4], p.kernel_w = n[5], p.stride = n[6];
  p.out_height = (p.height - 1) / p.stride + 1, p.out_width = (p.width - 1) / p.stride + 1;
  p.x = draw.tensor(p.batch, p.channels, p.height, p.width);
  p.weight = draw.numbers(int64_t{p.channels} * p.kernel_h * p.kernel_w);
  p.weight_stride_c = p.kernel_h * p.kernel_w, p.weight_stride_h = p.kernel_w, p.weight_stride_w = 1;
  p.norm = draw.norm(p.channels, draw.extras ? Act::kHardswish : Act::kNone);
  out = numbers(int64_t{p.batch} * p.channels * p.out_height * p.out_width, p.path);
  p.out = dense(out, p.channels_last, p.channels, p.out_height, p.out_width);
  const auto parameters = packed([&](void* to) { return isa.kernels->pack_depthwise(p, to); });
  const cpu::Packed all{nullptr, false, reinterpret_cast<const float*>(parameters.get())};
  with_and_without(out, all, [&](const cpu::Packed& packed) { isa.kernels->depthwise(p, packed, thread_count); });
}

void run_squeeze(const cpu::Isa& isa, const int* n, Drawer& draw, Buffer& out) {
  SqueezeExciteParams p{};
  p.path = draw.path;
  p.batch = n[0], p.channels = n[1], p.height = n[2], p.width = n[3], p.reduced = n[4];
  p.gate = static_cast<Gate>(n[5]);
  p.act = draw.extras ? Act::kSiLU : Act::kReLU;
  p.x = draw.tensor(p.batch, p.channels, p.height, p.width);
  p.reduce = {draw.numbers(int64_t{p.reduced} * p.channels), p.channels, 1};
  p.expand = {draw.numbers(int64_t{p.reduced} * p.channels), p.reduced, 1};
  if (draw.extras) p.reduce_bias = draw.vector(p.reduced), p.expand_bias = draw.vector(p.channels);
  out = numbers(int64_t{p.batch} * p.channels, p.path);
  p.out = out.data.get();
  if (p.reduced) {
    isa.kernels->squeeze_excite(p, {}, {}, thread_count);
  } else {
    isa.kernels->global_pool(p, thread_count);
  }
}

void run_convert(const cpu::Isa& isa, const int* n, Drawer& draw, Buffer& out) {
  cpu::ConvertParams p{};
  p.path = draw.path;
  p.to_channels_last = !draw.channels_last;
  p.batch = n[0], p.channels = n[1], p.height = n[2], p.width = n[3];
  const int64_t count = int64_t{p.batch} * p.channels * p.height * p.width;
  p.from = draw.numbers(count);
  out = numbers(count, p.path);
  p.to = out.data.get();
  isa.kernels->convert(p, thread_count);
}

void run_concat(const cpu::Isa& isa, const int* n, Drawer& draw, Buffer& out) {
  cpu::ConcatParams p{};
  p.path = draw.path;
  p.batch = n[0], p.height = n[2], p.width = n[3];
  const int channels[] = {n[1], n[4], n[5], n[6]};
  int64_t all = 0;
  for (int i = 0; i < 4 && channels[i]; ++i) {
    draw.channels_last ^= draw.extras && i < 2;
    p.channels[i] = channels[i];
    p.parts[i] = draw.tensor(p.batch, channels[i], p.height, p.width);
    all += channels[i];
  }
  out = numbers(p.batch * all * p.height * p.width, p.path);
  p.out = dense(out, draw.channels_last, all, p.height, p.width);
  isa.kernels->concat(p, thread_count);
}

void run_pool(const cpu::Isa& isa, const int* n, Drawer& draw, Buffer& out) {
  cpu::PoolParams p{};
  p.path = draw.path;
  p.channels_last = draw.channels_last;
  p.batch = n[0], p.channels = n[1], p.height = n[2], p.width = n[3], p.kernel = n[4], p.stride = n[5];
  const bool means = p.stride == 0;
  if (means) p.stride = p.kernel;
  p.out_height = means ? p.height / p.kernel : (p.height - 1) / p.stride + 1;
  p.out_width = means ? p.width / p.kernel : (p.width - 1) / p.stride + 1;
  p.x = draw.tensor(p.batch, p.channels, p.height, p.width);
  out = numbers(int64_t{p.batch} * p.channels * p.out_height * p.out_width, p.path);
  p.out = dense(out, p.channels_last, p.channels, p.out_height, p.out_width);
  (means ? isa.kernels->avg_pool : isa.kernels->max_pool)(p, thread_count);
}

cpu::CastParams rows_of(const int* n, Path to, Drawer& draw, Buffer& out) {
  const int64_t rows = n[0], count = n[1], stride = n[2], pitch = (count - 1) * stride + 1;
  cpu::CastParams p{draw.path, to, {1, 1, rows, count}, {0, 0, pitch, stride}, nullptr, nullptr};
  p.from = draw.numbers(rows * pitch);
  out = numbers(rows * count, to);
  p.to = out.data.get();
  return p;
}

void run_upsample(const cpu::Isa& isa, const int* n, Drawer& draw, Buffer& out) {
  cpu::PoolParams p{};
  p.path = draw.path;
  p.channels_last = draw.channels_last;
  p.batch = n[0], p.channels = n[1], p.height = n[2], p.width = n[3], p.stride = n[5];
  p.out_height = p.height * p.stride, p.out_width = p.width * p.stride;
  p.x = draw.tensor(p.batch, p.channels, p.height, p.width);
  out = numbers(int64_t{p.batch} * p.channels * p.out_height * p.out_width, p.path);
  p.out = dense(out, p.channels_last, p.channels, p.out_height, p.out_width);
  isa.kernels->upsample(p, thread_count);
}

void run_cast(const cpu::Isa& isa, const int* n, Drawer& draw, Buffer& out) {
  const Path to = n[3] == 0 ? Path::kFloat32 : n[3] == 1 ? Path::kFloat16 : Path::kBFloat16;
  isa.kernels->cast(rows_of(n, to, draw, out), thread_count);
}

void run_gate(const cpu::Isa& isa, const int* n, Drawer& draw, Buffer& out) {
  isa.kernels->gate({rows_of(n, draw.path, draw, out), static_cast<Gate>(n[3])}, thread_count);
}

void run_case(const cpu::Isa& isa, char** arg, int repeat) {
  const std::string op = arg[0], layout = arg[8], dtype = arg[9];
  int n[7];
  for (int i = 0; i < 7; ++i) n[i] = std::atoi(arg[1 + i]);
  const Path path = dtype == "float32" ? Path::kFloat32 : dtype == "float16" ? Path::kFloat16 : Path::kBFloat16;
  const auto run = op == "depthwise"  ? run_depthwise
                   : op == "conv"     ? run_conv
                   : op == "convert"  ? run_convert
                   : op == "cast"     ? run_cast
                   : op == "concat"   ? run_concat
                   : op == "gate"     ? run_gate
                   : op == "upsample" ? run_upsample
                   : op == "maxpool"  ? run_pool
                   : op == "avgpool"  ? run_pool
                                      : run_squeeze;
  Buffer out{};
  for (int i = 0; i < repeat; ++i) {
    Drawer draw{path, layout == "nhwc", std::atoi(arg[10]) != 0, {}};
    op == "ghost" ? run_ghost(isa, n, draw, out) : run(isa, n, draw, out);
  }
  uint64_t sum = 14695981039346656037u;
  for (int64_t i = 0; i < out.bytes; ++i) sum = (sum ^ static_cast<uint8_t>(out.data[i])) * 1099511628211u;
  std::printf("%016lx", static_cast<unsigned long>(sum));
  for (int i = 0; i < 11; ++i) std::printf(" %s", arg[i]);
  std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) {
  const char* error = nullptr;
  const cpu::Isa* isa = cpu::chosen_isa(&error);
  int repeat = 1, i = 1;
  for (; i + 1 < argc && argv[i][0] == '-'; i += 2) {
    const std::string option = argv[i];
    if (option == "--threads") thread_count = std::atoi(argv[i + 1]);
    if (option == "--repeat") repeat = std::atoi(argv[i + 1]);
    if (option == "--isa") {
      for (isa = cpu::kIsas; isa->name && std::string(isa->name) != argv[i + 1];) ++isa;
      if (!isa->name || !isa->supported()) isa = nullptr, error = "no such instruction set here";
    }
  }
  if (!isa) return std::fprintf(stderr, "%s\n", error), 1;
  once = repeat == 1;
  for (; i + 11 <= argc; i += 11) run_case(*isa, argv + i, repeat);
}
