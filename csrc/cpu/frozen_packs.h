// Weights that never change, in the order in which the kernels read them.
#pragma once

#include <bit>
#include <compare>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

#include "cpu/recording.h"

namespace ghostfused::cpu {

// Those of the programs that name one number: each is packed when a step first reads it so. And what these programs
// launch.
class Packs {
 public:
  // All that a pack or a recording is made of: what kind it is, tensors, and their sizes, strides and other numbers.
  enum class Kind : int64_t { kWeight, kRows, kParameters, kDepthwise, kRecording };
  class Key {
   public:
    template <typename... Parts>
    explicit Key(Kind kind, const Parts&... parts) {
      add(static_cast<int64_t>(kind), parts...);
    }
    template <typename... Parts>
    void add(const Parts&... parts) {
      (parts_.push_back(number(parts)), ...);
    }
    void add_norm(const NormAct& half) {
      for (const ChannelVector* v : {&half.bias, &half.mean, &half.var, &half.gamma, &half.beta, &half.slope}) {
        add(v->data, v->stride);
      }
      add(half.norm_is_float32, static_cast<int64_t>(half.act), std::bit_cast<int32_t>(half.eps),
          std::bit_cast<int32_t>(half.negative_slope));
    }
    auto operator<=>(const Key&) const = default;

   private:
    static int64_t number(int64_t value) { return value; }
    static int64_t number(const void* data) { return reinterpret_cast<intptr_t>(data); }
    std::vector<int64_t> parts_;
  };

  explicit Packs(bool bfloat16) : bfloat16_(bfloat16) {}

  // Null: there are none of that number.
  static std::shared_ptr<Packs> numbered(int64_t number) {
    const std::lock_guard lock(table().mutex);
    const auto found = table().packs.find(number);
    return found == table().packs.end() ? nullptr : found->second;
  }
  // Empty ones in place of those that there are.
  static void renew(int64_t number, bool bfloat16) { replace(number, std::make_shared<Packs>(bfloat16)); }
  static void drop(int64_t number) { replace(number, nullptr); }

  Packed weight(const Kernels& kernels, const GhostForwardParams& p) {
    const GhostShape& s = p.shape;
    const bool pixel = s.height == 1 && s.width == 1;
    Packed packed;
    if (s.channels_last || has_patches(p)) {
      Key key{Kind::kWeight, p.primary_weight};
      key.add(s.channels_last, s.init_channels, s.in_channels, p.kernel, pixel, p.primary_weight_stride_n,
              p.primary_weight_stride_k, p.primary_weight_stride_h, p.primary_weight_stride_w);
      packed.data = found(key, [&](void* to) { return kernels.pack_weight(p, bfloat16_, to); });
      packed.bfloat16 = s.channels_last && is_halved(s.path);
    }
    Key key{Kind::kParameters, p.cheap_weight};
    key.add(s.channels_last, s.init_channels, s.out_channels, s.ratio, s.dw_size, p.cheap_weight_stride_c,
            p.cheap_weight_stride_h, p.cheap_weight_stride_w);
    key.add_norm(p.primary);
    key.add_norm(p.cheap);
    packed.parameters = static_cast<const float*>(found(key, [&](void* to) { return kernels.pack_parameters(p, to); }));
    return packed;
  }

  Packed depthwise(const Kernels& kernels, const DepthwiseParams& p) {
    Key key{Kind::kDepthwise, p.weight};
    key.add(p.channels_last, p.channels, p.kernel_h, p.kernel_w, p.weight_stride_c, p.weight_stride_h,
            p.weight_stride_w);
    key.add_norm(p.norm);
    Packed packed;
    packed.parameters = static_cast<const float*>(found(key, [&](void* to) { return kernels.pack_depthwise(p, to); }));
    return packed;
  }

  // A fully connected layer's, row after row, each as it lies: only in half the bytes there is something to pack.
  Packed rows(const Matrix& weight, int64_t rows, int64_t columns, Path path) {
    if (!is_halved(path)) return {};
    Key key{Kind::kRows, weight.data};
    key.add(rows, columns);
    const void* data = found(key, [&](void* to) {
      const auto* from = static_cast<const char*>(weight.data);
      for (int64_t i = 0; to && i < rows * columns; ++i) {  // the upper half of each number, the lower one is zero
        std::memcpy(static_cast<char*>(to) + 2 * i, from + 4 * i + 2, 2);
      }
      return 2 * rows * columns;
    });
    return {data, true};
  }

  std::shared_ptr<const Recording> recording(const Key& key) {
    const std::lock_guard lock(mutex_);
    const auto found = recordings_.find(key);
    return found == recordings_.end() ? nullptr : found->second;
  }
  void keep(const Key& key, std::shared_ptr<const Recording> recording) {
    const std::lock_guard lock(mutex_);
    if (recordings_.size() >= kMaxRecordings) recordings_.clear();
    recordings_[key] = std::move(recording);
  }

  // An arena that nobody else has, until it is given back.
  Arena take_arena() {
    const std::lock_guard lock(mutex_);
    if (arenas_.empty()) return {};
    Arena arena = std::move(arenas_.back());
    arenas_.pop_back();
    return arena;
  }
  void give_back(Arena arena) {
    const std::lock_guard lock(mutex_);
    arenas_.push_back(std::move(arena));
  }

 private:
  static constexpr size_t kMaxRecordings = 64;  // of more shapes than that the oldest are of no use any more

  static void replace(int64_t number, std::shared_ptr<Packs> packs) {
    const std::lock_guard lock(table().mutex);  // freed before its argument is
    const auto entry = table().packs.try_emplace(number).first;
    entry->second.swap(packs);
    if (!entry->second) table().packs.erase(entry);
  }

  bool is_halved(Path path) const { return bfloat16_ && path != Path::kFloat16 && path != Path::kBFloat16; }

  template <typename Pack>
  const void* found(const Key& key, const Pack& pack) {
    const std::lock_guard lock(mutex_);
    const auto [entry, is_new] = memory_.try_emplace(key);
    if (is_new) {
      try {
        if (const int64_t bytes = pack(nullptr)) {
          entry->second = aligned_memory(bytes);
          pack(entry->second.get());
        }
      } catch (...) {
        memory_.erase(entry);
        throw;
      }
    }
    return entry->second.get();
  }

  struct Table {
    std::mutex mutex;
    std::unordered_map<int64_t, std::shared_ptr<Packs>> packs;
  };
  static Table& table() {
    static Table* const table = new Table;  // never freed: threads may still run at exit
    return *table;
  }

  const bool bfloat16_;
  std::mutex mutex_;
  std::map<Key, AlignedMemory> memory_;
  std::map<Key, std::shared_ptr<const Recording>> recordings_;
  std::vector<Arena> arenas_;
};

inline thread_local Packs* current_packs = nullptr;  // those of the program that this thread runs; null: it has none

// Until the end of its scope.
class UsePacks {
 public:
  explicit UsePacks(Packs* packs) : before_(current_packs) { current_packs = packs; }
  ~UsePacks() { current_packs = before_; }
  UsePacks(const UsePacks&) = delete;
  UsePacks& operator=(const UsePacks&) = delete;

 private:
  Packs* const before_;
};

}  // namespace ghostfused::cpu
