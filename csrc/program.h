// Several ops in one call: ghostfused/program.py describes the code.
#pragma once

#include <memory>
#include <mutex>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "arguments.h"

namespace ghostfused {

struct Program {
  std::vector<Tensor> tensors;
  std::vector<int64_t> code;
  std::vector<double> numbers;
};

class ProgramReader {
 public:
  ProgramReader(Tensor x, const Program& program) : program_(program), x_(std::move(x)) {}

  bool at_end() const { return position_ == program_.code.size(); }
  Tensor last() { return std::move(results_.back()); }
  void push(Tensor result) { results_.push_back(std::move(result)); }

  template <typename T>
  T next() {
    if constexpr (std::is_same_v<T, double>) {
      return item(program_.numbers, number_);
    } else if constexpr (std::is_same_v<T, Tensor>) {
      OptionalTensor t = next<OptionalTensor>();
      if (!t) fail("code: expected a tensor, got none");
      return *std::move(t);
    } else if constexpr (std::is_same_v<T, OptionalTensor>) {
      const int64_t code = item(program_.code, position_);
      if (code < 0) return std::nullopt;
      const size_t place = code / 2, given = 1 + program_.tensors.size();
      if (place == 0) return x_;
      if (place < given) return program_.tensors[place - 1];
      if (place - given >= results_.size())
        fail("code: expected a place below ", given + results_.size(), ", got ", place);
      Tensor& value = results_[place - given];
      if (!value.defined()) fail("code: tensor ", place, " is read after its last use");
      return code % 2 ? std::exchange(value, Tensor()) : value;
    } else {
      return static_cast<T>(item(program_.code, position_));
    }
  }

 private:
  template <typename T>
  static T item(const std::vector<T>& list, size_t& position) {
    if (position >= list.size()) fail("code: expected a place below ", list.size(), ", got ", position);
    return list[position++];
  }

  const Program& program_;
  const Tensor x_;
  std::vector<Tensor> results_;
  size_t position_ = 0, number_ = 0;
};

template <typename... Args>
Tensor call(Tensor (*op)(Args...), ProgramReader& reader) {
  std::tuple<Args...> args{reader.next<Args>()...};  // braces: from left to right
  return std::apply(op, std::move(args));
}

// ``ops`` are in the order of ghostfused/spec.py's STEPS.
template <auto... ops>
Tensor run_program(Tensor x, const Program& program) {
  ProgramReader reader(std::move(x), program);
  if (reader.at_end()) fail("code: expected at least one call");
  while (!reader.at_end()) {
    const int64_t op = reader.next<int64_t>();
    int64_t i = 0;
    const bool found = ((i++ == op && (reader.push(call(ops, reader)), true)) || ...);
    if (!found) fail("code: there is no op ", op);
  }
  return reader.last();
}

// Programs kept by number, so that a call of one need hand over nothing but x. ``run`` is run_program of some ops.
template <Tensor (*run)(Tensor x, const Program& program)>
class Programs {
 public:
  static Tensor run_once(Tensor x, std::vector<Tensor> tensors, std::vector<int64_t> code,
                         std::vector<double> numbers) {
    return run(std::move(x), {std::move(tensors), std::move(code), std::move(numbers)});
  }

  static int64_t keep(std::vector<Tensor> tensors, std::vector<int64_t> code, std::vector<double> numbers) {
    auto program = std::make_shared<const Program>(Program{std::move(tensors), std::move(code), std::move(numbers)});
    const std::lock_guard lock(table().mutex);
    table().programs.emplace(++table().last, std::move(program));
    return table().last;
  }

  static Tensor run_kept(Tensor x, int64_t number) {
    std::shared_ptr<const Program> program;  // whoever drops it meanwhile
    {
      const std::lock_guard lock(table().mutex);
      const auto found = table().programs.find(number);
      if (found == table().programs.end()) fail("program: there is none of number ", number);
      program = found->second;
    }
    return run(std::move(x), *program);
  }

  static void drop(int64_t number) {
    std::shared_ptr<const Program> program;  // its tensors are freed once the lock is
    const std::lock_guard lock(table().mutex);
    const auto found = table().programs.find(number);
    if (found == table().programs.end()) return;
    program = std::move(found->second);
    table().programs.erase(found);
  }

 private:
  struct Table {
    std::mutex mutex;
    std::unordered_map<int64_t, std::shared_ptr<const Program>> programs;
    int64_t last = 0;
  };
  static Table& table() {
    static Table* const table = new Table;  // never freed: at exit Torch may be gone before it
    return *table;
  }
};

}  // namespace ghostfused
