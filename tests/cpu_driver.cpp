// Runs the CPU kernels without Torch, for the sanitizers and for instruction counts:
//   cpu_driver [--isa NAME] [--threads N] [--repeat N] BATCH CIN H W CP RATIO D LAYOUT DTYPE EXTRAS ...
// with LAYOUT nchw or nhwc, DTYPE float32, float16 or bfloat16, EXTRAS 0 or 1 (input gate, output gate and residual).
// Every buffer is its own allocation of just the size needed. Prints a checksum per case, which mustn't depend on
// the number of threads; tests/test_cpu.py compares values.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "../csrc/cpu/kernel.h"

using namespace ghostfused;

namespace {

int thread_count = 2;

void parallel_for(int64_t count, cpu::Body body, void* context) {
  std::vector<std::thread> threads;
  const int64_t share = (count + thread_count - 1) / thread_count;
  for (int64_t begin = 0; begin < count; begin += share) {
    threads.emplace_back(body, begin, std::min(begin + share, count), context);
  }
  for (std::thread& thread : threads) thread.join();
}

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

void run_case(const cpu::Isa& isa, char** arg, int repeat) {
  GhostForwardParams p{};
  GhostShape& s = p.shape;
  s.batch = std::atoi(arg[0]), s.in_channels = std::atoi(arg[1]), s.height = std::atoi(arg[2]), s.width = std::atoi(arg[3]);
  s.init_channels = std::atoi(arg[4]), s.ratio = std::atoi(arg[5]), s.dw_size = std::atoi(arg[6]);
  s.channels_last = std::string(arg[7]) == "nhwc";
  const std::string dtype = arg[8];
  s.path = dtype == "float32" ? Path::kFloat32 : dtype == "float16" ? Path::kFloat16 : Path::kBFloat16;
  const bool extras = std::atoi(arg[9]);
  const int64_t cp = s.init_channels, cheap = cp * (s.ratio - 1), pixels = int64_t{s.height} * s.width;
  s.out_channels = static_cast<int>(cp + cheap);
  s.input_gate = extras;

  const auto make = [&](int64_t count) { return numbers(count, s.path); };
  const Buffer x = make(s.batch * s.in_channels * pixels), weight = make(cp * s.in_channels);
  const Buffer cheap_weight = make(cheap * s.dw_size * s.dw_size);
  const Buffer input_gate = make(s.batch * s.in_channels), residual = make(s.batch * s.out_channels * pixels);
  p.gate_height = (s.height + 1) / 2, p.gate_width = (s.width + 1) / 2;
  const Buffer output_gate = make(int64_t{s.batch} * s.out_channels * p.gate_height * p.gate_width);
  const Buffer out = make(s.batch * s.out_channels * pixels);
  std::vector<Buffer> vectors;
  const auto half = [&](int64_t channels, Act act) {
    const auto vector = [&] {
      vectors.push_back(make(channels));
      return ChannelVector{vectors.back().data.get(), 1};
    };
    return NormAct{vector(), vector(), vector(), vector(), vector(), vector(), 2.f, 0.1f, act, false};
  };
  p.primary = half(cp, extras ? Act::kPReLU : Act::kReLU);
  p.cheap = half(cheap, extras ? Act::kSiLU : Act::kReLU);
  p.x = dense(x, s.channels_last, s.in_channels, s.height, s.width);
  p.out = dense(out, s.channels_last, s.out_channels, s.height, s.width);
  if (extras) {
    p.residual = dense(residual, s.channels_last, s.out_channels, s.height, s.width);
    p.output_gate = dense(output_gate, s.channels_last, s.out_channels, p.gate_height, p.gate_width);
    p.input_gate = input_gate.data.get();
    p.input_gate_stride_n = s.in_channels, p.input_gate_stride_c = 1;
  }
  p.primary_weight = weight.data.get();
  p.primary_weight_stride_n = s.in_channels, p.primary_weight_stride_k = 1;
  p.cheap_weight = cheap_weight.data.get();
  p.cheap_weight_stride_c = s.dw_size * s.dw_size, p.cheap_weight_stride_h = s.dw_size, p.cheap_weight_stride_w = 1;

  for (int i = 0; i < repeat; ++i) isa.forward(p, {thread_count, parallel_for});
  uint64_t sum = 14695981039346656037u;
  for (int64_t i = 0; i < out.bytes; ++i) sum = (sum ^ static_cast<uint8_t>(out.data[i])) * 1099511628211u;
  std::printf("%016lx", static_cast<unsigned long>(sum));
  for (int i = 0; i < 10; ++i) std::printf(" %s", arg[i]);
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
  for (; i + 10 <= argc; i += 10) run_case(*isa, argv + i, repeat);
}
