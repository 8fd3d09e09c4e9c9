// Several ops in one call: ghostfused/program.py describes the code.
#pragma once

#include <tuple>
#include <utility>
#include <vector>

#include "arguments.h"

namespace ghostfused {

class ProgramReader {
 public:
  ProgramReader(Tensor x, std::vector<Tensor> tensors, std::vector<int64_t> code, std::vector<double> numbers)
      : values_(std::move(tensors)), code_(std::move(code)), numbers_(std::move(numbers)) {
    values_.insert(values_.begin(), std::move(x));
  }

  bool at_end() const { return position_ == code_.size(); }
  Tensor last() { return std::move(values_.back()); }
  void push(Tensor result) { values_.push_back(std::move(result)); }

  template <typename T>
  T next() {
    if constexpr (std::is_same_v<T, double>) {
      return item(numbers_, number_);
    } else if constexpr (std::is_same_v<T, Tensor>) {
      OptionalTensor t = next<OptionalTensor>();
      if (!t) fail("code: expected a tensor, got none");
      return *std::move(t);
    } else if constexpr (std::is_same_v<T, OptionalTensor>) {
      const int64_t place = item(code_, position_);
      if (place < 0) return std::nullopt;
      Tensor& value = item_at(values_, static_cast<size_t>(place / 2));
      if (!value.defined()) fail("code: tensor ", place / 2, " is read after its last use");
      return place % 2 ? std::exchange(value, Tensor()) : value;
    } else {
      return static_cast<T>(item(code_, position_));
    }
  }

 private:
  template <typename T>
  static T& item_at(std::vector<T>& list, size_t i) {
    if (i >= list.size()) fail("code: expected a place below ", list.size(), ", got ", i);
    return list[i];
  }
  template <typename T>
  static T item(std::vector<T>& list, size_t& position) {
    return item_at(list, position++);
  }

  std::vector<Tensor> values_;  // x, the tensors, the results so far
  std::vector<int64_t> code_;
  std::vector<double> numbers_;
  size_t position_ = 0, number_ = 0;
};

template <typename... Args>
Tensor call(Tensor (*op)(Args...), ProgramReader& reader) {
  std::tuple<Args...> args{reader.next<Args>()...};  // braces: from left to right
  return std::apply(op, std::move(args));
}

// ``ops`` are in the order of ghostfused/spec.py's STEPS.
template <auto... ops>
Tensor program(Tensor x, std::vector<Tensor> tensors, std::vector<int64_t> code, std::vector<double> numbers) {
  ProgramReader reader(std::move(x), std::move(tensors), std::move(code), std::move(numbers));
  if (reader.at_end()) fail("code: expected at least one call");
  while (!reader.at_end()) {
    const int64_t op = reader.next<int64_t>();
    int64_t i = 0;
    const bool found = ((i++ == op && (reader.push(call(ops, reader)), true)) || ...);
    if (!found) fail("code: there is no op ", op);
  }
  return reader.last();
}

}  // namespace ghostfused
