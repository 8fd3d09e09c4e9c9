// What a frozen program launches for x of one shape, recorded while its steps run once. A replay makes no tensor but
// the result, and checks nothing but x and the weights that kernels read where they lie.
#pragma once

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "common/checker.h"
#include "cpu/launches.h"

namespace ghostfused::cpu {

constexpr int64_t kAlignment = 64;

struct FreeAligned {
  void operator()(char* p) const { ::operator delete(p, std::align_val_t{kAlignment}); }
};
using AlignedMemory = std::unique_ptr<char, FreeAligned>;
inline AlignedMemory aligned_memory(int64_t bytes) {
  return AlignedMemory(static_cast<char*>(::operator new(bytes, std::align_val_t{kAlignment})));
}

// Memory for the maps between the launches of one run.
struct Arena {
  AlignedMemory memory;
  int64_t size = 0;

  char* of(int64_t bytes) {
    if (size < bytes) {
      memory.reset();
      size = 0;
      memory = aligned_memory(bytes);
      size = bytes;
    }
    return memory.get();
  }
};

class Recording {
 public:
  // Whether its weights are where they were.
  bool is_current(const std::vector<Tensor>& tensors) const {
    return std::all_of(weights_.begin(), weights_.end(), [&](const Weight& weight) {
      return data_of(tensors[weight.tensor]) == std::pair{weight.data, weight.bytes};
    });
  }

  int64_t arena_bytes() const { return arena_bytes_; }

  // ``x``: where it begins; ``result``: where that will be.
  void run(void* x, void* result, char* arena, const Kernels& kernels) const {
    char* const bases[] = {static_cast<char*>(x), static_cast<char*>(result), arena};
    const Place* place = places_.data();
    for (Launch launch : launches_) {
      std::visit(
          [&](auto& launch) {
            launch.maps([&](auto& data) {
              if (data) data = bases[place->base] + place->offset;
              ++place;
            });
            launch.run(kernels, threads_);
          },
          launch);
    }
  }

  // Of the result.
  const std::vector<int64_t>& sizes() const { return sizes_; }
  const std::vector<int64_t>& strides() const { return strides_; }
  ScalarType dtype() const { return dtype_; }

 private:
  friend class Recorder;
  enum Base { kX, kResult, kArena };
  struct Place {
    Base base;
    int64_t offset;  // bytes
  };
  struct Weight {
    size_t tensor;
    const void* data;
    int64_t bytes;  // of its storage
  };

  static std::pair<const void*, int64_t> data_of(const Tensor& t) {
    int64_t bytes = 0;
    void* data = nullptr;
    if (aoti_torch_get_storage_size(t.get(), &bytes) || aoti_torch_get_data_ptr(t.get(), &data)) return {};
    return {data, bytes};
  }

  std::vector<Launch> launches_;
  std::vector<Place> places_;  // of the launches' maps, one after the other
  std::vector<Weight> weights_;
  std::vector<int64_t> sizes_, strides_;
  ScalarType dtype_{};
  int64_t arena_bytes_ = 0;
  int threads_ = 1;
};

// Listens to a run on this thread while it is there.
class Recorder {
 public:
  Recorder(const Tensor& x, int threads) : before_(current()) {
    current() = this;
    recording_->threads_ = threads;
    made(x);
  }
  ~Recorder() { current() = before_; }
  Recorder(const Recorder&) = delete;
  Recorder& operator=(const Recorder&) = delete;

  static Recorder*& current() {
    thread_local Recorder* recorder = nullptr;
    return recorder;
  }

  // A tensor, until another one has its place.
  void made(const Tensor& t) {
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
    maps_.push_back({static_cast<char*>(t.data_ptr()), (last + 1) * static_cast<int64_t>(t.element_size()), -1, -1});
  }

  void add(Launch launch) {
    std::visit(
        [&](auto& launch) {
          launch.maps([&](auto& data) { places_.push_back(data ? place_of(data) : MapPlace{-1, 0}); });
        },
        launch);
    recording_->launches_.push_back(std::move(launch));
  }

  // Something that no replay would do.
  void give_up() { possible_ = false; }

  // Null if there can't be one.
  std::shared_ptr<const Recording> finished(const Tensor& result, const std::vector<Tensor>& tensors) {
    const MapPlace place = place_of(result.data_ptr());
    if (!possible_ || place.map < 1 || place.offset != 0 || !find_weights(tensors)) return nullptr;
    make_parts_in_place(place.map);
    plan(place.map);
    for (MapPlace at : places_) {
      while (at.map >= 0 && maps_[at.map].whole >= 0) at = {maps_[at.map].whole, maps_[at.map].begins + at.offset};
      const bool is_x = at.map == 0, is_result = at.map == place.map;
      recording_->places_.push_back(at.map < 0  ? Recording::Place{}
                                    : is_x      ? Recording::Place{Recording::kX, at.offset}
                                    : is_result ? Recording::Place{Recording::kResult, at.offset}
                                                : Recording::Place{Recording::kArena, maps_[at.map].arena + at.offset});
    }
    for (int64_t d = 0; d < result.dim(); ++d) {
      recording_->sizes_.push_back(result.size(d));
      recording_->strides_.push_back(result.stride(d));
    }
    recording_->dtype_ = result.scalar_type();
    return recording_;
  }

 private:
  struct Map {
    char* begin;
    int64_t bytes;
    int64_t first, last;  // the launches that use it
    int64_t arena = 0;    // where it is there
    int64_t whole = -1;   // the map that it lies in, from byte ``begins`` on
    int64_t begins = 0;
  };
  struct MapPlace {
    int64_t map, offset;
  };

  // The last one made there: it is the one that is still alive.
  MapPlace place_of(const void* data) {
    const char* at = static_cast<const char*>(data);
    for (int64_t i = std::ssize(maps_) - 1; i >= 0; --i) {
      Map& map = maps_[i];
      if (at < map.begin || at >= map.begin + map.bytes) continue;
      map.last = std::ssize(recording_->launches_);
      if (map.first < 0) map.first = map.last;
      return {i, at - map.begin};
    }
    possible_ = false;
    return {-1, 0};
  }

  bool find_weights(const std::vector<Tensor>& tensors) {
    bool found_all = true;
    const auto find = [&](const void* data) {
      if (!data) return;
      size_t i = 0;
      while (i < tensors.size() && Recording::data_of(tensors[i]).first != data) ++i;
      found_all = found_all && i < tensors.size();
      if (found_all) recording_->weights_.push_back({i, data, Recording::data_of(tensors[i]).second});
    };
    for (const Launch& launch : recording_->launches_) {
      std::visit(
          [&](const auto& launch) {
            if constexpr (requires { launch.weights(find); }) launch.weights(find);
          },
          launch);
    }
    return found_all;
  }

  // Parts of a concatenation of one image's maps in NCHW are made where they lie in the whole: if all are, nothing is
  // left to copy.
  void make_parts_in_place(int64_t result) {
    const MapPlace* places = places_.data();
    for (Launch& launch : recording_->launches_) {
      int64_t count = 0;
      std::visit([&](auto& launch) { launch.maps([&](auto&) { ++count; }); }, launch);
      if (const auto* concat = std::get_if<ConcatLaunch>(&launch)) put_into_whole(*concat, places, result);
      places += count;
    }
  }

  void put_into_whole(const ConcatLaunch& concat, const MapPlace* parts, int64_t result) {
    const ConcatParams& p = concat.p;
    const int64_t plane = int64_t{p.height} * p.width, size = concat.number_bytes(), whole = parts[p.kParts].map;
    const auto is_dense = [&](const Tensor4& t) {
      return (p.width == 1 || t.stride_w == 1) && (p.height == 1 || t.stride_h == p.width) && t.stride_c == plane;
    };
    if (p.batch > 1 || !is_dense(p.out)) return;
    for (int64_t i = 0, begins = 0; i < p.kParts && parts[i].map >= 0; begins += concat.numbers(i++) * size) {
      Map& map = maps_[parts[i].map];
      const bool has_place = parts[i].map == 0 || parts[i].map == result || map.whole >= 0;
      const bool is_all = parts[i].offset == 0 && map.bytes == concat.numbers(i) * size && is_dense(p.parts[i]);
      if (has_place || !is_all || begins % kAlignment != 0) continue;
      map.whole = whole, map.begins = begins;
      maps_[whole].first = std::min(maps_[whole].first, map.first);
      maps_[whole].last = std::max(maps_[whole].last, map.last);
    }
  }

  // Gives each map but x and the result a place in the arena that no other one has while it is used: the largest first,
  // each as low as it can be.
  void plan(int64_t result) {
    std::vector<int64_t> order, placed;
    for (int64_t i = 1; i < std::ssize(maps_); ++i) {
      if (i != result && maps_[i].first >= 0 && maps_[i].whole < 0) order.push_back(i);
    }
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return maps_[a].bytes > maps_[b].bytes; });
    for (const int64_t i : order) {
      Map& map = maps_[i];
      std::vector<std::pair<int64_t, int64_t>> taken;
      for (const int64_t j : placed) {
        const Map& other = maps_[j];
        if (other.first <= map.last && map.first <= other.last)
          taken.push_back({other.arena, other.arena + other.bytes});
      }
      std::sort(taken.begin(), taken.end());
      for (const auto& [begin, end] : taken) {
        if (map.arena + map.bytes <= begin) break;
        map.arena = std::max(map.arena, (end + kAlignment - 1) / kAlignment * kAlignment);
      }
      recording_->arena_bytes_ = std::max(recording_->arena_bytes_, map.arena + map.bytes);
      placed.push_back(i);
    }
  }

  Recorder* const before_;
  std::shared_ptr<Recording> recording_ = std::make_shared<Recording>();
  std::vector<Map> maps_;  // x, and then what was made
  std::vector<MapPlace> places_;
  bool possible_ = true;
};

}  // namespace ghostfused::cpu
