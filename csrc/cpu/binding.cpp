// The Torch side of the CPU kernels: the ops' registration (stable ABI, so that one build serves torch 2.11 and later),
// programs of them, and the Python module for plain-data queries.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <exception>
#include <string>

#include "common/guard.h"
#include "common/program.h"
#include "cpu/ops.h"
#include "cpu/pool.h"

#ifndef GHOSTFUSED_FLAGS  // setup.py's, for people to read
#define GHOSTFUSED_FLAGS ""
#endif

namespace ghostfused::cpu {
namespace {

constexpr const char* kGlobalPoolNames[] = {"global_pool", "x"};
constexpr const char* kLinearNames[] = {"linear", "x", "weight", "bias"};

using Forward = StepKind<&GhostOp<Tensor>::run<launch>, kForwardNames>;
using Depthwise = StepKind<&depthwise<launch>, kDepthwiseNames>;
using SqueezeExcite = StepKind<&squeeze_excite<launch>, kSqueezeExciteNames>;
using GlobalPool = StepKind<&global_pool, kGlobalPoolNames>;
using Linear = StepKind<&linear, kLinearNames>;
constexpr auto run_steps = &run_program<Forward, Depthwise, SqueezeExcite, GlobalPool, Linear>;

// A program, one that is per image, on a batch: a few images at a time on each thread, so that what is made of them
// stays in its core's cache, weights are read once for all of them, and no thread waits for another between two ops.
constexpr int64_t kImages = 4, kMaxRounds = 1024;  // of a batch so large that this doesn't do, a piece has more images

class Batch {
 public:
  Batch(Tensor& x, int64_t pieces, const Program& program) : program_(program), results_(pieces), errors_(pieces) {
    for (int64_t i = 0, batch = x.size(0); i < pieces; ++i) {
      const int64_t begin = i * batch / pieces, end = (i + 1) * batch / pieces;
      pieces_.push_back(torch::stable::narrow(x, 0, begin, end - begin));
    }
  }

  Tensor run() {
    const int64_t pieces = static_cast<int64_t>(pieces_.size());
    const auto body = [](Items& items, void* self) { static_cast<Batch*>(self)->run_pieces(items); };
    parallel_for(torch_threads(), pieces, pieces, body, this);
    for (const std::string& error : errors_) {
      if (!error.empty()) fail(error);
    }
    return joined();
  }

 private:
  void run_pieces(Items& items) {
    whole_images = true;
    for (int64_t begin, end; items.next(&begin, &end);) {
      for (int64_t i = begin; i < end; ++i) {
        try {
          results_[i] = run_steps(pieces_[i], program_);
        } catch (const std::exception& error) {  // the other pieces are to be made all the same
          errors_[i] = error.what();
        }
      }
    }
    whole_images = false;
  }

  Tensor joined() const {
    const Tensor& first = results_.front();
    const auto sizes = first.sizes();
    int64_t batch = 0;
    for (const Tensor& piece : pieces_) batch += piece.size(0);
    Tensor4 ignored;
    Tensor out = sizes.size() == 4 ? new_map(batch, sizes[1], sizes[2], sizes[3], first.scalar_type(),
                                             is_channels_last(first), &ignored)
                                   : new_output({batch, sizes[1]}, {sizes[1], 1}, first.scalar_type());
    int64_t begin = 0;
    for (size_t i = 0; i < results_.size(); ++i) {
      const int64_t count = pieces_[i].size(0);
      Tensor part = torch::stable::narrow(out, 0, begin, count);
      const auto got = results_[i].sizes(), wanted = part.sizes();
      if (!std::equal(got.begin(), got.end(), wanted.begin(), wanted.end())) {
        fail("program: expected results per image, got ", got[0], " of ", count, " images");
      }
      torch::stable::copy_(part, results_[i]);
      begin += count;
    }
    return out;
  }

  const Program& program_;
  std::vector<Tensor> pieces_, results_;
  std::vector<std::string> errors_;
};

Tensor run_batch(Tensor x, const Program& program) {
  if (program.per_image && x.dim() == 4) {
    const int64_t batch = x.size(0), threads = torch_threads();
    // as many for each thread
    const int64_t rounds = std::min((batch + kImages * threads - 1) / (kImages * threads), kMaxRounds);
    const int64_t pieces = rounds * threads;
    if (pieces > 1 && pieces <= batch) {
      size32("x", batch);
      Checker(x).check("x", x, {batch, x.size(1), x.size(2), x.size(3)});  // before anything else makes pieces of it
      return Batch(x, pieces, program).run();
    }
  }
  return run_steps(std::move(x), program);
}

using CpuPrograms = Programs<&run_batch, Forward, Depthwise, SqueezeExcite, GlobalPool, Linear>;

STABLE_TORCH_LIBRARY_IMPL(ghostfused, CPU, m) {
  m.impl("forward_cpu", TORCH_BOX(&GhostOp<Tensor>::run<launch>));
  m.impl("depthwise_cpu", TORCH_BOX(&depthwise<launch>));
  m.impl("squeeze_excite_cpu", TORCH_BOX(&squeeze_excite<launch>));
  m.impl("program_cpu", TORCH_BOX(&CpuPrograms::run_once));
  m.impl("keep_program_cpu", TORCH_BOX(&CpuPrograms::keep));
  m.impl("replay_cpu", TORCH_BOX(&CpuPrograms::run_kept));
}

py::dict build_info() {
  py::dict info;
  py::list compiled, usable;
  for (const Isa* isa = kIsas; isa->name; ++isa) {
    compiled.append(isa->name);
    if (isa->supported()) usable.append(isa->name);
  }
#ifdef __clang__
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["flags"] = GHOSTFUSED_FLAGS;
  info["compiled"] = compiled;
  info["supported"] = usable;
  const char* error = nullptr;
  const Isa* chosen = chosen_isa(&error);
  info["chosen"] = chosen ? py::object(py::str(chosen->name)) : py::none();
  info["error"] = chosen ? py::none() : py::object(py::str(error));
  return info;
}

// On as many threads as PyTorch has. Returns the operations that all of them did.
double multiply_adds(int64_t count, bool bfloat16) {
  struct Loop {
    int64_t count;
    Path path;
  } loop{count, bfloat16 ? Path::kBFloat16 : Path::kFloat32};
  const int threads = torch_threads(), items = 8 * threads;  // should a thread begin late, the others do more
  loop.count = (count + 7) / 8;
  const py::gil_scoped_release release;
  const auto body = [](Items& items, void* context) {
    const Loop& loop = *static_cast<Loop*>(context);
    for (int64_t begin, end; items.next(&begin, &end);) kernels().multiply_adds(loop.count, loop.path);
  };
  parallel_for(threads, items, items, body, &loop);
  return items * (kernels().multiply_adds(1, loop.path) * static_cast<double>(loop.count));
}

}  // namespace
}  // namespace ghostfused::cpu

PyMODINIT_FUNC PyInit__cpu() {
  static PyModuleDef definition{
      PyModuleDef_HEAD_INIT, "_cpu",
      "ghostfused's CPU kernels: loading this registers ghostfused::{forward,depthwise,squeeze_excite}_cpu.", -1};
  return ghostfused::py::make_module(definition, [](ghostfused::py::module_& m) {
    using ghostfused::py::arg;
    m.def("build_info", &ghostfused::cpu::build_info,
          "Instruction sets compiled, those that this CPU has, the chosen one, and why there is none.");
    ghostfused::bind_guard(m);
    m.def("drop_program", &ghostfused::cpu::CpuPrograms::drop, arg("number"),
          "Forgets a program that keep_program_cpu has kept.");
    m.def("multiply_adds", &ghostfused::cpu::multiply_adds, arg("count"), arg("bfloat16") = false,
          "Multiply-adds in registers, those of a 1×1 convolution of float32 or of bfloat16, on each of PyTorch's "
          "threads, for the benchmarks; returns the operations done.");
  });
}
