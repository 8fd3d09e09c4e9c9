// Answers calls of the CPU kernels' ops with no Python and no Torch, for CPUs that only an emulator has:
//   cpu_ops_driver THREADS < calls > answers
// tests/helpers/aarch64.py is the other side. Everything is little-endian, in words of 8 bytes.
//   call:   the op's place in ``answer``, then its arguments. A tensor: 1 (0: none), dtype, dimensions, sizes, strides,
//           offset, bytes of the storage, the storage filled up to whole words. Numbers: a word each.
//   answer: 0, then the result as above; or the bytes of an error's message, and the message filled up.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <tuple>

#include "cpu/ops.h"

using namespace ghostfused;

namespace {

void read_bytes(void* to, int64_t bytes) {
  if (bytes && std::fread(to, bytes, 1, stdin) != 1) std::exit(0);  // the other side is done
}
void write_bytes(const void* from, int64_t bytes) {
  const char zeros[8] = {};
  std::fwrite(from, 1, bytes, stdout);
  std::fwrite(zeros, 1, -bytes & 7, stdout);
}
void write_word(int64_t word) { write_bytes(&word, 8); }

template <typename T>
T read() {
  if constexpr (std::is_same_v<T, OptionalTensor>) {
    return read<int64_t>() ? OptionalTensor(read<Tensor>()) : OptionalTensor();
  } else if constexpr (std::is_same_v<T, Tensor>) {
    auto t = std::make_unique<AtenTensorOpaque>();
    t->dtype = static_cast<int32_t>(read<int64_t>());
    t->sizes.resize(read<int64_t>());
    t->strides.resize(t->sizes.size());
    for (int64_t& size : t->sizes) size = read<int64_t>();
    for (int64_t& stride : t->strides) stride = read<int64_t>();
    t->offset = read<int64_t>();
    const int64_t bytes = read<int64_t>();
    t->storage = std::make_shared<Storage>(bytes);
    read_bytes(t->storage->data, bytes);
    char filling[8];
    read_bytes(filling, -bytes & 7);
    return Tensor(t.release());
  } else {
    static_assert(sizeof(T) == 8 || std::is_same_v<T, bool>);
    int64_t word;
    read_bytes(&word, 8);
    if constexpr (std::is_same_v<T, double>) {
      double number;
      std::memcpy(&number, &word, 8);
      return number;
    }
    return static_cast<T>(word);
  }
}

template <typename T>
T argument() {
  if constexpr (std::is_same_v<T, Tensor>) read<int64_t>();
  return read<T>();
}

template <typename... Args>
void call(Tensor (*op)(Args...)) {
  const std::tuple<Args...> args{argument<Args>()...};  // braces: from left to right
  Tensor out;
  try {
    out = std::apply(op, args);
    cpu::Packs packs(false);
    const cpu::UsePacks use(&packs);
    const Tensor frozen = std::apply(op, args);
    const Storage &storage = *out.get()->storage, &other = *frozen.get()->storage;
    if (storage.bytes != other.bytes || std::memcmp(storage.data, other.data, storage.bytes) != 0) {
      throw std::runtime_error("weights that are packed once give other bits");
    }
  } catch (const std::exception& error) {
    const std::string message = error.what();
    write_word(static_cast<int64_t>(message.size()));
    write_bytes(message.data(), static_cast<int64_t>(message.size()));
    return;
  }
  const AtenTensorOpaque& t = *out.get();
  write_word(0);
  for (const int64_t word : {int64_t{1}, int64_t{t.dtype}, out.dim()}) write_word(word);
  for (const int64_t size : t.sizes) write_word(size);
  for (const int64_t stride : t.strides) write_word(stride);
  write_word(t.offset);
  write_word(t.storage->bytes);
  write_bytes(t.storage->data, t.storage->bytes);
}

void answer(int64_t op) {
  switch (op) {
    case 0:
      return call(&GhostOp<Tensor>::run<cpu::launch>);
    case 1:
      return call(&depthwise<cpu::launch>);
    case 2:
      return call(&squeeze_excite<cpu::launch>);
    case 3:
      return call(&cpu::global_pool);
    case 4:
      return call(&cpu::linear);
    case 5:
      return call(&cpu::cast);
    case 6:
      return call(&cpu::concat);
    case 7:
      return call(&cpu::max_pool);
    case 8:
      return call(&cpu::avg_pool);
    case 9:
      return call(&cpu::through_gate);
    case 10:
      return call(&cpu::upsample);
  }
  std::abort();
}

}  // namespace

int main(int argc, char** argv) {
  const char* error = nullptr;
  const cpu::Isa* isa = cpu::chosen_isa(&error);
  if (!isa) return std::fprintf(stderr, "%s\n", error), 1;
  std::string supported;
  for (const cpu::Isa* each = cpu::kIsas; each->name; ++each) {
    if (each->supported()) supported += std::string(" ") + each->name;
  }
  std::fprintf(stderr, "%s of%s\n", isa->name, supported.c_str());
  if (argc > 1) torch::stable::thread_count = std::atoi(argv[1]);
  for (;;) {
    answer(read<int64_t>());
    std::fflush(stdout);
  }
}
