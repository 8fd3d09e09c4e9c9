// How a program runs: in which memory format each map lies, and which images of a batch go through which steps
// together. A result is the same number by number, whatever is decided here but the formats, and those depend on sizes
// alone.
#pragma once

#include <algorithm>
#include <exception>
#include <string>

#include "common/program.h"
#include "cpu/ops.h"
#include "cpu/pool.h"

namespace ghostfused::cpu {

// ``t`` in the other memory format.
inline Tensor converted(const Tensor& t, bool channels_last) {
  ConvertParams p{};
  p.path = Checker(t).path();
  p.batch = size32("x", t.size(0));
  p.channels = channels32("x", t.size(1));
  p.height = size32("x", t.size(2));
  p.width = size32("x", t.size(3));
  p.to_channels_last = channels_last;
  Tensor4 to;
  Tensor out = new_map(p.batch, p.channels, p.height, p.width, t.scalar_type(), channels_last, &to);
  p.from = t.data_ptr();
  p.to = to.data;
  run_launch(ConvertLaunch{p});
  return out;
}

// Whether ``t`` is a map that lies densely in just one of the two formats; *channels_last says in which.
inline bool has_format(const Tensor& t, bool* channels_last) {
  if (t.dim() != 4 || !t.is_cpu() || t.numel() == 0) return false;
  const int64_t c = t.size(1), h = t.size(2), w = t.size(3);
  if (c == 1 || h * w == 1) return false;
  *channels_last = is_channels_last(t);
  return !*channels_last
             ? t.is_contiguous()
             : t.stride(3) == c && (h == 1 || t.stride(2) == w * c) && (t.size(0) == 1 || t.stride(0) == h * w * c);
}

constexpr int64_t kFewVectors = 14;     // of pixels: such a map fills vectors better with channels
constexpr int64_t kTiledPixels = 4096;  // of a map of so many, matrices multiply too few channels to be worth it
constexpr size_t kFewSteps = 6;         // a program of fewer isn't worth a conversion at both ends

// What a program that may choose formats makes of x and of each result before others read it: maps of few pixels go in
// channels_last, larger ones of bf16 too where AMX multiplies it, and all others in NCHW, whose kernels go along rows.
// Vectors of four floats, which nobody has measured, leave each as it is.
inline Tensor adapted(Tensor t) {
  const Isa& isa = cpu::isa();
  const int64_t lanes = isa.lanes;
  bool channels_last;
  if (lanes < 8 || !has_format(t, &channels_last)) return t;
  const bool tiles = isa.tiles && t.scalar_type() == ScalarType::BFloat16;
  const bool wanted = t.size(2) * t.size(3) < (tiles ? kTiledPixels : kFewVectors * lanes);
  return wanted == channels_last ? t : converted(t, wanted);
}

// Runs programs of these steps.
template <typename... Steps>
class Network {
  using Reader = ProgramReader<Steps...>;

 public:
  static Tensor run(Tensor x, const Program& program) {
    const std::shared_ptr<Packs> packs = program.packs ? Packs::numbered(program.packs) : nullptr;
    const UsePacks use(packs.get());
    if (!program.per_image || x.dim() != 4) return Network(program).recorded(std::move(x), &Network::run_whole);
    size32("x", x.size(0));
    if (x.size(0) > 1) Checker(x).check("x", x, {x.size(0), x.size(1), x.size(2), x.size(3)});  // before it is cut
    const int64_t batch = x.size(0), threads = torch_threads();
    // as many for each thread
    const int64_t rounds = std::min((batch + kImages * threads - 1) / (kImages * threads), kMaxRounds);
    const int64_t pieces = rounds * threads;
    if (pieces < 2 || pieces > batch) return Network(program).recorded(std::move(x), &Network::run_piece);
    return Network(program).run_pieces(x, pieces);
  }

 private:
  // A batch, of a program that is per image, goes a few images at a time through each thread, so that what is made of
  // them stays in its core's cache, weights are read once for all of them, and no thread waits for another between two
  // ops.
  static constexpr int64_t kImages = 4, kMaxRounds = 1024;  // of a batch so large that this doesn't do, more images
  // Until a map is as narrow as that, even a few images' would leave the cache: they go one by one.
  static constexpr int64_t kNarrow = 64 << 10;  // bytes

  explicit Network(const Program& program)
      : program_(program), adapts_(program.any_format && program.alone.size() >= kFewSteps) {}

  // The same as (this->*run)(x), with no work of the host but the launches, where a program's weights don't change.
  Tensor recorded(Tensor x, Tensor (Network::*run)(Tensor) const) const {
    if (!current_packs) {
      check_elements(program_);
      return (this->*run)(std::move(x));
    }
    Packs::Key key(Packs::Kind::kRecording, program_.number, torch_threads(), static_cast<int64_t>(x.scalar_type()));
    for (int64_t d = 0; d < x.dim(); ++d) key.add(x.size(d), x.stride(d));
    if (const std::shared_ptr<const Recording> recording = current_packs->recording(key);
        recording && recording->is_current(program_.tensors)) {
      return replayed(std::move(x), *recording);
    }
    check_elements(program_);
    const Tensor& tensor = x;
    Recorder recorder(tensor, torch_threads());
    Tensor result = (this->*run)(x);
    if (auto recording = recorder.finished(result, program_.tensors)) current_packs->keep(key, std::move(recording));
    return result;
  }

  static Tensor replayed(const Tensor& x, const Recording& recording) {
    struct Borrowed {
      Packs& packs = *current_packs;
      Arena arena = packs.take_arena();
      ~Borrowed() { packs.give_back(std::move(arena)); }
    } borrowed;
    Tensor result = new_tensor(recording.sizes().data(), recording.strides().data(), std::ssize(recording.sizes()),
                               recording.dtype());
    recording.run(checked_data(x), result.data_ptr(), borrowed.arena.of(recording.arena_bytes()), kernels());
    return result;
  }

  static void* checked_data(const Tensor& x) {
    const Checker checker(x);
    if (x.dim() == 4) return checker.check("x", x, {x.size(0), x.size(1), x.size(2), x.size(3)});
    if (x.dim() == 2) return checker.check("x", x, {x.size(0), x.size(1)});
    fail("x: expected 2 or 4 dimensions, got ", x.dim());
  }

  Tensor run_whole(Tensor x) const {
    Reader reader(start(x), program_);
    while (!reader.at_end()) step(reader);
    return end(reader, x);
  }

  // On one thread if there are several images.
  Tensor run_piece(Tensor x) const {
    const int64_t images = x.size(0);
    if (images < 2 || torch_threads() > 1 || is_narrow(x)) return run_whole(std::move(x));
    std::vector<Tensor> results;
    Reader reader = run_to_narrow(image(x, 0));
    results.push_back(reader.take_last());
    for (int64_t i = 1; i < images; ++i) {
      Reader other(start(image(x, i)), program_);
      while (other.made() < reader.made()) step(other);
      results.push_back(other.take_last());
    }
    reader.put_last(joined(results));
    while (!reader.at_end()) step(reader);
    return end(reader, x);
  }

  // Until all that is left of the image is a narrow map, or to the end.
  Reader run_to_narrow(Tensor image) const {
    Reader reader(start(image), program_);
    do step(reader);
    while (!reader.at_end() && !(program_.alone[reader.made() - 1] && is_narrow(reader.last())));
    return reader;
  }

  static Tensor image(Tensor& x, int64_t i) { return torch::stable::narrow(x, 0, i, 1); }
  static bool is_narrow(const Tensor& map) {
    return map.numel() / std::max<int64_t>(map.size(0), 1) * map.element_size() <= kNarrow;
  }

  Tensor start(const Tensor& x) const { return adapts_ ? adapted(x) : x; }
  void step(Reader& reader) const {
    reader.step();
    if (adapts_ && !reader.at_end()) reader.put_last(adapted(reader.take_last()));
  }
  // In x's format, whatever the network's own.
  Tensor end(Reader& reader, const Tensor& x) const {
    Tensor last = reader.take_last();
    bool channels_last;
    if (!adapts_ || !has_format(last, &channels_last) || channels_last == is_channels_last(x)) return last;
    return converted(last, !channels_last);
  }

  // Each piece on one thread.
  Tensor run_pieces(Tensor& x, int64_t pieces) const {
    struct Pieces {
      const Network& network;
      Packs* const packs;
      std::vector<Tensor> parts, results;
      std::vector<std::string> errors;
    } all{*this, current_packs, {}, std::vector<Tensor>(pieces), std::vector<std::string>(pieces)};
    for (int64_t i = 0, batch = x.size(0); i < pieces; ++i) {
      const int64_t begin = i * batch / pieces, end = (i + 1) * batch / pieces;
      all.parts.push_back(torch::stable::narrow(x, 0, begin, end - begin));
    }
    const auto body = [](Items& items, void* context) {
      Pieces& all = *static_cast<Pieces*>(context);
      const UsePacks use(all.packs);
      whole_images = true;
      for (int64_t begin, end; items.next(&begin, &end);) {
        for (int64_t i = begin; i < end; ++i) {
          try {
            all.results[i] = all.network.recorded(all.parts[i], &Network::run_piece);
          } catch (const std::exception& error) {  // the other pieces are to be made all the same
            all.errors[i] = error.what();
          }
        }
      }
      whole_images = false;
    };
    parallel_for(torch_threads(), pieces, pieces, body, &all);
    for (size_t i = 0; i < all.errors.size(); ++i) {
      if (!all.errors[i].empty()) fail(all.errors[i]);
      if (all.results[i].size(0) != all.parts[i].size(0)) {
        fail("program: expected results per image, got ", all.results[i].size(0), " of ", all.parts[i].size(0),
             " images");
      }
    }
    return joined(all.results);
  }

  // One after the other.
  static Tensor joined(const std::vector<Tensor>& parts) {
    const Tensor& first = parts.front();
    const auto sizes = first.sizes();
    int64_t batch = 0;
    for (const Tensor& part : parts) batch += part.size(0);
    Tensor4 ignored;
    Tensor out = sizes.size() == 4 ? new_map(batch, sizes[1], sizes[2], sizes[3], first.scalar_type(),
                                             is_channels_last(first), &ignored)
                                   : new_output({batch, sizes[1]}, {sizes[1], 1}, first.scalar_type());
    int64_t begin = 0;
    for (const Tensor& part : parts) {
      const int64_t count = part.size(0);
      Tensor to = torch::stable::narrow(out, 0, begin, count);
      const auto got = part.sizes(), wanted = to.sizes();
      if (!std::equal(got.begin(), got.end(), wanted.begin(), wanted.end())) {
        fail("program: expected results of one size per image, got others");
      }
      copy(part, to);
      begin += count;
    }
    return out;
  }

  static void copy(const Tensor& from, Tensor& to) {
    const auto strides = from.strides(), wanted = to.strides();
    bool alike = from.numel() > 0 && from.numel() == from.size(0) * from.stride(0);
    for (size_t d = 0; d < strides.size(); ++d) alike = alike && strides[d] == wanted[d];
    const int64_t bytes = from.numel() * static_cast<int64_t>(from.element_size());
    if (alike) return run_launch(BytesLaunch{from.data_ptr(), to.data_ptr(), bytes});
    if (Recorder* recorder = Recorder::current()) recorder->give_up();
    torch::stable::copy_(to, from);
  }

  const Program& program_;
  const bool adapts_;
};

}  // namespace ghostfused::cpu
