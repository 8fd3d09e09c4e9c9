// Weights that never change, in the order in which the kernels read them.
#pragma once

#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <tuple>
#include <unordered_map>

#include "cpu/dispatch.h"

namespace ghostfused::cpu {

// Those of the programs that name one number: each is packed when a step first reads it so.
class Packs {
 public:
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
    if (!p.shape.channels_last) return {};
    const Key key{p.primary_weight,
                  p.shape.init_channels,
                  p.shape.in_channels,
                  p.kernel,
                  p.primary_weight_stride_n,
                  p.primary_weight_stride_k,
                  p.primary_weight_stride_h,
                  p.primary_weight_stride_w,
                  p.shape.height == 1 && p.shape.width == 1};
    return found(key, p.shape.path, [&](void* to) { return kernels.pack_weight(p, bfloat16_, to); });
  }

  // A fully connected layer's, row after row, each as it lies: only in half the bytes there is something to pack.
  Packed rows(const Matrix& weight, int64_t rows, int64_t columns, Path path) {
    if (!bfloat16_ || path == Path::kFloat16 || path == Path::kBFloat16) return {};
    return found(Key{weight.data, rows, columns, 0, columns, 1, 0, 0, true}, path, [&](void* to) {
      const auto* from = static_cast<const char*>(weight.data);
      for (int64_t i = 0; to && i < rows * columns; ++i) {  // the upper half of each number, the lower one is zero
        std::memcpy(static_cast<char*>(to) + 2 * i, from + 4 * i + 2, 2);
      }
      return 2 * rows * columns;
    });
  }

 private:
  static void replace(int64_t number, std::shared_ptr<Packs> packs) {
    const std::lock_guard lock(table().mutex);  // freed before its argument is
    const auto entry = table().packs.try_emplace(number).first;
    entry->second.swap(packs);
    if (!entry->second) table().packs.erase(entry);
  }

  struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  using Memory = std::unique_ptr<void, Free>;
  // the tensor, its sizes and strides, and whether a map of one pixel is multiplied
  using Key = std::tuple<const void*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool>;

  template <typename Pack>
  Packed found(const Key& key, Path path, const Pack& pack) {
    const bool half = bfloat16_ && path != Path::kFloat16 && path != Path::kBFloat16;
    const std::lock_guard lock(mutex_);
    const auto [entry, is_new] = memory_.try_emplace(key);
    if (is_new) {
      try {
        if (const int64_t bytes = pack(nullptr)) {
          entry->second.reset(::operator new(bytes, std::align_val_t{64}));
          pack(entry->second.get());
        }
      } catch (...) {
        memory_.erase(entry);
        throw;
      }
    }
    return {entry->second.get(), half};
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
  std::map<Key, Memory> memory_;
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
