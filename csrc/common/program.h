// Several ops in one call: ghostfused/ops/encoding.py describes the code.
#pragma once

#include <algorithm>
#include <cstring>
#include <iterator>
#include <memory>
#include <mutex>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "common/arguments.h"

namespace ghostfused {

struct Program {
  std::vector<Tensor> tensors;
  std::vector<int64_t> code;
  std::vector<double> numbers;
  bool any_format = false;  // maps between steps may lie in another memory format than x
  int64_t packs = 0;        // other than 0: weights don't change; programs of one number share what they make of them
  bool per_image = true;    // it makes the same of an image whatever others are in the batch: ProgramChecker's proof
  std::vector<bool> alone;  // per step: whether later steps read its result and nothing else that was there before
  std::vector<int64_t> elements;  // of each tensor when the program was kept: ``.data`` may give it others
  int64_t number = 0;             // the kept program's own
};

// A weight of another kernel size may be right for its step and not for what the step was made of. The tensors have
// left the caches since the last call.
inline void check_elements(const Program& program) {
  constexpr size_t kAhead = 8;
  const auto& [tensors, elements] = std::tie(program.tensors, program.elements);
  for (size_t i = 0; i < elements.size(); ++i) {
    if (i + kAhead < tensors.size()) __builtin_prefetch(tensors[i + kAhead].get());
    if (tensors[i].numel() == elements[i]) continue;
    fail("tensors[", i, "]: expected ", elements[i], " elements as when the program was made, got ",
         tensors[i].numel());
  }
}

// An op as a step; ``names_`` are its own and its arguments'.
template <auto run, const auto& names_>
struct StepKind {
  static constexpr auto op = run;
  static constexpr const char* const* names = names_;
  static constexpr size_t name_count = std::size(names_);
};

// Reads a program and calls nothing. Fails unless each step has all its arguments and each tensor is there to be read;
// what the tensors are the ops check.
//
// A program is per image if every step takes its maps from x and results, and all else from the tensors given: then
// every result has x's batch as its first size, and no image is part of another's weights.
class ProgramChecker {
 public:
  explicit ProgramChecker(Program& program) : program_(program), given_(1 + program.tensors.size()) {}

  template <typename... Steps>
  void run() {
    if (program_.code.empty()) fail("code: expected at least one call");
    while (position_ < program_.code.size()) {
      const int64_t op = program_.code[position_++];
      int64_t i = 0;
      const bool found = ((i++ == op && (step<Steps>(Steps::op), true)) || ...);
      if (!found) fail("code: step ", spent_.size(), ": there is no op ", op);
      spent_.push_back(false);
      program_.alone.push_back(std::count(spent_.begin(), spent_.end(), false) == 1);
    }
    std::fill_n(program_.alone.begin(), x_until_, false);
    if (number_ != program_.numbers.size()) {
      fail("numbers: expected ", number_, ", one for each float of a step, got ", program_.numbers.size());
    }
  }

 private:
  template <typename Step, typename... Args>
  void step(Tensor (*)(Args...)) {
    static_assert(Step::name_count == 1 + sizeof...(Args));
    const char* const* name = Step::names;
    op_ = *name;
    (argument(*++name, static_cast<Args*>(nullptr)), ...);
  }

  void argument(const char* name, Tensor*) { tensor(name, false); }
  void argument(const char* name, OptionalTensor*) { tensor(name, true); }
  void argument(const char* name, int64_t*) { next(name); }
  void argument(const char* name, bool*) {
    const int64_t value = next(name);
    if (value != 0 && value != 1) refuse(name, "expected 0 or 1, got ", value);
  }
  void argument(const char* name, double*) {
    if (number_ == program_.numbers.size()) refuse(name, "expected more numbers than ", number_);
    ++number_;
  }

  void tensor(const char* name, bool optional) {
    const int64_t code = next(name);
    if (code == -1 && optional) return;
    if (code < 0) refuse(name, "expected a tensor", optional ? " or -1" : "", ", got ", code);
    const size_t place = code / 2, places = given_ + spent_.size();
    if (place >= places) refuse(name, "expected a place below ", places, ", got ", place);
    const bool result = place >= given_, map = is_map(name);
    if (place == 0) x_until_ = spent_.size();
    if (map != (place == 0 || result)) program_.per_image = false;
    if (!result) {
      if (code % 2) refuse(name, "only results are used up, not tensor ", place);
      return;
    }
    if (spent_[place - given_]) refuse(name, "tensor ", place, " is read after its last use");
    spent_[place - given_] = code % 2;
  }

  // Whether an argument's first size is the batch.
  static bool is_map(const char* name) {
    for (const char* map : {"x", "input_gate", "residual", "output_gate", "second", "third", "fourth"}) {
      if (std::strcmp(name, map) == 0) return true;
    }
    return false;
  }

  int64_t next(const char* name) {
    if (position_ == program_.code.size()) refuse(name, "expected a longer code than ", position_);
    return program_.code[position_++];
  }

  template <typename... Parts>
  [[noreturn]] void refuse(const char* name, const Parts&... parts) const {
    fail("code: step ", spent_.size(), " (", op_, "): ", name, ": ", parts...);
  }

  Program& program_;
  const size_t given_;
  std::vector<bool> spent_;  // per result: whether its last use has come
  size_t x_until_ = 0;       // the last step that reads x
  size_t position_ = 0, number_ = 0;
  const char* op_ = nullptr;
};

// Runs a program that has been checked, step by step. The steps are in the order of ghostfused/spec/program_steps.py's
// STEPS.
template <typename... Steps>
class ProgramReader {
 public:
  ProgramReader(Tensor x, const Program& program) : program_(program), x_(std::move(x)) {}

  bool at_end() const { return position_ == program_.code.size(); }
  size_t made() const { return results_.size(); }
  const Tensor& last() const { return results_.back(); }
  Tensor take_last() { return std::move(results_.back()); }
  void put_last(Tensor t) { results_.back() = std::move(t); }

  void step() {
    const int64_t op = next_code();
    int64_t i = 0;
    ((i++ == op && (run<Steps>(), true)) || ...);
  }

 private:
  template <typename Step>
  void run() {
    try {
      results_.push_back(call(Step::op));
    } catch (const std::exception& error) {
      fail("step ", results_.size(), " (", *Step::names, "): ", error.what());
    }
  }

  template <typename... Args>
  Tensor call(Tensor (*op)(Args...)) {
    std::tuple<Args...> args{next<Args>()...};  // braces: from left to right
    return std::apply(op, std::move(args));
  }

  template <typename T>
  T next() {
    if constexpr (std::is_same_v<T, double>) {
      return program_.numbers[number_++];
    } else if constexpr (std::is_same_v<T, Tensor>) {
      return tensor(next_code());
    } else if constexpr (std::is_same_v<T, OptionalTensor>) {
      const int64_t code = next_code();
      return code < 0 ? OptionalTensor() : tensor(code);
    } else {
      return static_cast<T>(next_code());
    }
  }

  int64_t next_code() { return program_.code[position_++]; }

  Tensor tensor(int64_t code) {
    const size_t place = code / 2, given = 1 + program_.tensors.size();
    if (place == 0) return x_;
    if (place < given) return program_.tensors[place - 1];
    Tensor& value = results_[place - given];
    return code % 2 ? std::exchange(value, Tensor()) : value;
  }

  const Program& program_;
  const Tensor x_;
  std::vector<Tensor> results_;
  size_t position_ = 0, number_ = 0;
};

template <typename... Steps>
Tensor run_program(Tensor x, const Program& program) {
  check_elements(program);
  ProgramReader<Steps...> reader(std::move(x), program);
  while (!reader.at_end()) reader.step();
  return reader.take_last();
}

// Programs kept by number, so that a call of one need hand over nothing but x. ``run`` is run_program of the steps.
template <Tensor (*run)(Tensor x, const Program& program), typename... Steps>
class Programs {
 public:
  static Tensor run_once(Tensor x, std::vector<Tensor> tensors, std::vector<int64_t> code,
                         std::vector<double> numbers) {
    return run(std::move(x), checked(std::move(tensors), std::move(code), std::move(numbers)));
  }

  static int64_t keep(std::vector<Tensor> tensors, std::vector<int64_t> code, std::vector<double> numbers,
                      bool any_format, int64_t packs) {
    auto program = std::make_shared<Program>(checked(std::move(tensors), std::move(code), std::move(numbers)));
    program->any_format = any_format;
    program->packs = packs;
    for (const Tensor& tensor : program->tensors) program->elements.push_back(tensor.numel());
    const std::lock_guard lock(table().mutex);
    program->number = ++table().last;
    table().programs.emplace(table().last, std::move(program));
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
  static Program checked(std::vector<Tensor> tensors, std::vector<int64_t> code, std::vector<double> numbers) {
    Program program{std::move(tensors), std::move(code), std::move(numbers)};
    ProgramChecker(program).template run<Steps...>();
    return program;
  }

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
